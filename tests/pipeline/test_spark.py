"""A session of this machine: what a task costs beside its work."""

from __future__ import annotations

import gc
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from pyspark import SparkContext

from pipeline import spark as spark_module
from pipeline.spark import run_tasks


def test_what_a_worker_imported_is_not_looked_through_after_every_task(spark: SparkContext) -> None:
    def frozen(task: dict[str, Any]) -> dict[str, Any]:
        return {"objects": gc.get_freeze_count()}

    found = [run_tasks(spark, [{}], frozen, "test")[0]["objects"] for _ in range(3)]
    assert found[-1] > 1000


def test_workers_of_this_machine_are_spoken_to_where_nobody_else_can(spark: SparkContext) -> None:
    conf = spark.getConf()
    assert conf.get("spark.python.unix.domain.socket.enabled") == "true"
    folder = Path(str(conf.get("spark.python.unix.domain.socket.dir")))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert any(folder.iterdir())


def test_where_a_folders_name_is_too_long_for_a_socket_tcp_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert spark_module._unix_sockets.__wrapped__() == {}
    assert not any(long.iterdir())
