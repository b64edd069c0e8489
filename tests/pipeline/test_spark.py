"""Tasks and the workers that do them: what a task costs beside its work."""

from __future__ import annotations

import gc
import os
import platform
import resource
from pathlib import Path
from typing import Any

import pytest
from py4j.protocol import Py4JNetworkError
from pyspark import RDD, SparkContext

from pipeline.spark import run_tasks
from pipeline.worker_daemon import is_copy


def test_what_a_worker_imported_is_not_looked_through_after_every_task(spark: SparkContext) -> None:
    def frozen(task: dict[str, Any]) -> dict[str, Any]:
        return {"objects": gc.get_freeze_count()}

    found = [run_tasks(spark, [{}], frozen, "test")[0]["objects"] for _ in range(3)]
    assert found[-1] > 1000


def test_workers_are_forked_from_a_process_with_no_thread_that_a_fork_would_miss(spark: SparkContext) -> None:
    def look(task: dict[str, Any]) -> dict[str, Any]:
        import pyspark

        daemon = Path(f"/proc/{os.getppid()}")
        threads = sorted((daemon / "task").iterdir(), key=lambda thread: int(thread.name))
        return {
            "command": (daemon / "cmdline").read_text(), "from": pyspark.__file__,
            "threads": [(thread / "comm").read_text().strip() for thread in threads],
        }  # fmt: skip

    found = run_tasks(spark, [{}], look, "test")[0]
    assert "pipeline.worker_daemon" in found["command"]
    assert set(found["threads"][1:]) <= {"jemalloc_bg_thd"}  # Arrow's allocator's: forks are provided for
    assert ".zip" not in found["from"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("/env/lib/site-packages/pyspark/python/lib/pyspark.zip", True),
        ("/env/lib/site-packages/pyspark/python/lib/py4j-0.10.9.9-src.zip", True),
        ("/opt/spark/python/lib/pyspark.zip", False),  # another Spark's, which is to be used
        ("/other/site-packages/pyspark/python/lib/pyspark.zip", False),
        ("/job/pinsage.zip", False),
        ("pinsage.zip", False),
        ("/env/lib/site-packages", False),
    ],
)
def test_only_the_zip_of_the_installed_pyspark_is_passed_over(entry: str, expected: bool) -> None:
    assert is_copy(entry, ["/job", entry, "/env/lib/site-packages"]) is expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library is told to keep memory")
def test_a_worker_reuses_the_memory_of_what_it_freed(spark: SparkContext) -> None:
    def faults(task: dict[str, Any]) -> dict[str, Any]:
        counts = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            bytearray(task["bytes"])
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return {"faults": counts}

    size = 48 << 20
    found = run_tasks(spark, [{"bytes": size}], faults, "test")[0]["faults"]
    assert max(found[1:]) < size // resource.getpagesize() // 20


@pytest.mark.parametrize("failure", ["", "py4j"])
def test_an_interrupt_stays_one_when_spark_fails_while_it_passes(
    spark: SparkContext, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """py4j loses its connection to the JVM as it lets an interrupt through, and pyspark then asks the JVM for more."""

    def interrupted(rdd: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            if failure:
                raise Py4JNetworkError("Answer from Java side is empty")

    monkeypatch.setattr(RDD, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tasks(spark, [{}], lambda task: task, "test")


def test_an_error_of_spark_stays_one(spark: SparkContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(rdd: object) -> None:
        raise Py4JNetworkError("Answer from Java side is empty")

    monkeypatch.setattr(RDD, "collect", failed)
    with pytest.raises(Py4JNetworkError):
        run_tasks(spark, [{}], lambda task: task, "test")
