"""A stage's steps: tasks with several outputs each, kept as they finish.

A step is over when its own small dataset, a report per task, is committed; a restarted stage takes the reports from
there and runs nothing, even if the step's outputs were deleted since because all that read them is over, too. Of a
step that was broken off, the tasks whose outputs and report are all there are not run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline.contracts.datasets import (
    Lineage,
    Shard,
    begin,
    commit,
    finished_file,
    finished_manifest,
    finished_shard,
    shard_name,
    withdraw_receipt,
    write_file,
    write_shard,
)
from pipeline.contracts.rows import rows_name, write_rows
from pipeline.contracts.schemas import Dataset
from pipeline.contracts.storage import Storage
from pipeline.exchange import blocks_name, stream_blocks, write_blocks
from pipeline.spark import Task, run_tasks

Blocks = tuple[pa.Table, NDArray[np.integer]]
"""Rows, and the destination of each."""
BlockStream = Iterator[tuple[int, pa.Table]]
"""Blocks made one after the other, by ascending destination."""


@dataclass(frozen=True)
class Encoded:
    """A shard as its bytes; read_soon as in Storage.write_bytes."""

    data: memoryview
    rows: int
    read_soon: bool = True


Made: TypeAlias = "pa.Table | Encoded | Blocks | BlockStream | NDArray[Any]"
"""What a task makes for an output: a shard, blocks for destinations, or raw rows."""
Report = dict[str, Any]


@dataclass(frozen=True)
class Output:
    """A dataset that a step writes: a shard per task, with destinations a file of blocks, with raw a matrix of rows.

    With several a task makes a shard for every number in its "shards", one after the other, and may complete its report
    meanwhile. describe makes the manifest's metadata from the reports; what it raises is raised before the dataset
    exists.
    """

    dataset: Dataset | str
    destinations: int = 0
    describe: Callable[[list[Report]], dict[str, Any]] | None = None
    raw: bool = False
    several: bool = False

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.dataset if isinstance(self.dataset, str) else self.dataset.name

    def numbers(self, task: Task) -> list[int]:
        """Of the files that a task writes."""
        return list(task["shards"]) if self.several else [task["number"]]

    def file(self, number: int) -> str:
        """The name of one file."""
        return rows_name(number) if self.raw else blocks_name(number) if self.destinations else shard_name(number)

    def write(self, storage: Storage, task: Task, made: Made | Iterator[Made], lineage: Lineage) -> list[Shard]:
        """Store what one task made for this output."""
        numbers: list[int] = self.numbers(task)
        each: Iterable[Any] = made if self.several else [made]  # type: ignore[assignment]
        return [self._write(storage, number, own, lineage) for number, own in zip(numbers, each, strict=True)]

    def _write(self, storage: Storage, number: int, made: Made, lineage: Lineage) -> Shard:
        if self.raw:
            assert isinstance(made, np.ndarray)
            return write_rows(storage, self.name, number, made, lineage)
        if isinstance(made, Encoded):
            return write_file(storage, self.name, shard_name(number), made.data, lineage, made.rows, made.read_soon)
        if isinstance(made, tuple):
            return write_blocks(storage, self.name, number, made[0], made[1], self.destinations, lineage)
        if self.destinations:
            return stream_blocks(storage, self.name, number, made, self.destinations, lineage)
        return write_shard(storage, self.dataset, number, made, lineage)


def _finished(storage: Storage, output: Output, task: Task, lineage: Lineage) -> list[Shard] | None:
    """The files that an interrupted attempt of a task finished of an output, if all are there."""
    names = map(output.file, output.numbers(task))
    found = [finished_shard(storage, output.dataset, name, lineage) for name in names]
    return None if None in found else [shard for shard in found if shard is not None]


def run_step(
    spark: SparkContext,
    storage: Storage,
    lineage: Lineage,
    name: str,
    tasks: Sequence[Mapping[str, Any]],
    outputs: Sequence[Output],
    make: Callable[[Task], tuple[Sequence[Made | Iterator[Made]], Report]],
    label: str,
    before_last: Callable[[], None] | None = None,
) -> list[Report]:
    """Run make on every task, store what it returns for each of the outputs, and return the tasks' reports in order.

    A report is a small dict of JSON values; name is that of the dataset of reports. A restarted stage may have cut its
    work into other tasks, on other cores: what an attempt finished counts for the same task alone. before_last is
    called when all outputs but the last are there, which is that by which a stage counts as over.
    """
    done = finished_manifest(storage, name, lineage)
    if done is not None:
        reports: list[Report] = done.metadata["reports"]
        return reports
    for dataset in (name, *(output.dataset for output in outputs)):
        begin(storage, dataset)

    def work(task: Task) -> Task:
        file = f"part-{task['number']:05d}.json"
        noted = finished_file(storage, name, file, lineage)
        earlier = {} if noted is None else json.loads(noted[1])
        is_same = earlier.get("task") == task
        found = [_finished(storage, output, task, lineage) for output in outputs] if is_same else []
        if noted is None or not is_same or None in found:
            withdraw_receipt(storage, name, file)  # as what it tells of is made anew from here on
            made, report = make(task)
            pairs = zip(outputs, made, strict=True)
            shards = [output.write(storage, task, rows, lineage) for output, rows in pairs]
            stored = write_file(storage, name, file, json.dumps({"task": task, "report": report}).encode(), lineage)
        else:
            shards, stored, report = [own for own in found if own is not None], noted[0], earlier["report"]
        return {"report": report, "noted": asdict(stored), "shards": [list(map(asdict, own)) for own in shards]}

    results = run_tasks(spark, [{**task, "number": number} for number, task in enumerate(tasks)], work, label)
    reports = [result["report"] for result in results]
    for place, output in enumerate(outputs):
        metadata = {"destinations": output.destinations} if output.destinations else {}
        metadata |= output.describe(reports) if output.describe else {}
        shards = (Shard(**shard) for result in results for shard in result["shards"][place])
        if before_last is not None and place + 1 == len(outputs):
            before_last()
        commit(storage, output.dataset, shards, lineage, metadata)
    commit(storage, name, (Shard(**result["noted"]) for result in results), lineage, {"reports": reports})
    return reports
