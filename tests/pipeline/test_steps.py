"""A step of several outputs is run once: after a failure the rest of it, and never again when it is over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark import SparkContext

from pipeline.contracts.datasets import Lineage, commit, open_manifest, read_shard, withdraw_broken
from pipeline.contracts.errors import DataError
from pipeline.contracts.storage import Storage
from pipeline.exchange import gather
from pipeline.steps import Output, run_step

LINEAGE = Lineage("ingest", {}, {})
ROWS = pa.schema([("number", pa.int64())])
OUTPUTS = (Output("ingest/rows"), Output("ingest/sent", 2, lambda reports: {"sum": sum(r["ten"] for r in reports)}))


def run(
    spark: SparkContext, storage: Storage, lineage: Lineage = LINEAGE, fails: int | None = None, cut: str = "so"
) -> Any:
    """Three tasks; every task that is run leaves a mark in the run's folder."""

    def make(task: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        if task["of"] == fails:
            raise DataError(f"task {fails} fails")
        marks = len(storage.names("marks"))
        storage.write_bytes(f"marks/{task['of']}-{marks}", b"")
        rows = pa.table({"number": [task["of"], 10]}, schema=ROWS)
        return (rows, (rows, np.array([task["of"] % 2, 1]))), {"ten": 10 * task["of"]}

    tasks = [{"of": number, "cut": cut if number else ""} for number in range(3)]
    return run_step(spark, storage, lineage, "ingest/step", tasks, OUTPUTS, make, "test: step")


def test_outputs_and_reports_are_stored_and_the_step_is_over(spark: SparkContext, storage: Storage) -> None:
    assert run(spark, storage) == [{"ten": 0}, {"ten": 10}, {"ten": 20}]
    rows, sent = (open_manifest(storage, name) for name in ("ingest/rows", "ingest/sent"))
    assert [read_shard(storage, rows, n).column("number").to_pylist() for n in range(3)] == [[0, 10], [1, 10], [2, 10]]
    assert gather(storage, sent, 1, ROWS).column("number").to_pylist() == [10, 1, 10, 10]
    assert sent.metadata["sum"] == 30
    storage.delete("ingest/rows")
    assert run(spark, storage) == [{"ten": 0}, {"ten": 10}, {"ten": 20}]
    assert len(storage.names("marks")) == 3


def test_a_restart_runs_only_the_tasks_that_were_not_finished(spark: SparkContext, storage: Storage) -> None:
    with pytest.raises(DataError, match="task 2 fails"):
        run(spark, storage, fails=2)
    storage.delete("ingest/rows/part-00001.parquet")  # as if it had been killed between its files
    assert run(spark, storage) == [{"ten": 0}, {"ten": 10}, {"ten": 20}]
    assert sorted(mark[0] for mark in storage.names("marks")) == ["0", "1", "1", "2"]


def test_a_restart_that_cuts_its_work_differently_takes_nothing_for_another_task(
    spark: SparkContext, storage: Storage
) -> None:
    with pytest.raises(DataError, match="task 2 fails"):
        run(spark, storage, fails=2)
    run(spark, storage, cut="otherwise")
    assert sorted(mark[0] for mark in storage.names("marks")) == ["0", "1", "1", "2"]


def test_of_a_task_that_was_begun_anew_nothing_older_counts(spark: SparkContext, storage: Storage) -> None:
    """Cut one way, then another and killed between its outputs and its report, then the first way again."""
    with pytest.raises(DataError, match="task 2 fails"):
        run(spark, storage, fails=2)
    with pytest.raises(DataError, match="task 1 fails"):
        run(spark, storage, fails=1, cut="otherwise")
    run(spark, storage)
    assert sorted(mark[0] for mark in storage.names("marks")) == ["0", "1", "1", "2", "2"]


def test_another_lineage_runs_all_of_it(spark: SparkContext, storage: Storage) -> None:
    run(spark, storage)
    run(spark, storage, Lineage("ingest", {"other": 1}, {}))
    assert len(storage.names("marks")) == 6


def test_a_step_that_is_over_is_run_again_for_what_was_damaged_since(spark: SparkContext, storage: Storage) -> None:
    """A stage killed at its very end leaves its steps' reports, by which it would take the damaged output as made."""
    run(spark, storage)
    other = commit(storage, "graph/other", [], Lineage("graph", {}, {}), {"reports": []})
    shard = "ingest/rows/part-00001.parquet"
    storage.write_bytes(shard, storage.read_bytes(shard)[:-1] + b"?")
    assert withdraw_broken(storage) == ["ingest/rows"]
    assert open_manifest(storage, "graph/other") == other
    assert run(spark, storage) == [{"ten": 0}, {"ten": 10}, {"ten": 20}]
    assert open_manifest(storage, "ingest/rows").num_rows == 6
