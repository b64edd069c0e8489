"""A session of this machine: what a task costs beside its work."""

from __future__ import annotations

import gc
import os
import platform
import resource
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from pyspark import SparkContext

from pipeline import spark as spark_module
from pipeline.spark import run_tasks
from pipeline.worker_daemon import is_copy
from tests.runs import ROOT


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


TWICE = """
import sys, time
from pyspark import SparkContext
from pipeline.contracts.config import SparkResources
from pipeline.spark import is_running, launch, run_tasks, session, stop
resources = SparkResources(master="local[1]", driver_memory="1g")
launch(resources)
deadline = time.monotonic() + 60
while SparkContext._gateway is None and time.monotonic() < deadline:
    time.sleep(0.05)
launched = SparkContext._gateway
for _ in range(2):
    spark = session(resources, "test")
    print(is_running(), SparkContext._gateway is launched, run_tasks(spark, [{}], lambda task: {"answer": 42}, "test"))
    stop(spark)
    print(is_running())
"""


def test_a_session_takes_the_launched_jvm_and_may_follow_one_that_still_stops() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["True True [{'answer': 42}]", "False"] * 2
    assert "Traceback" not in done.stderr


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
