"""The session of this machine: how it starts, and who may speak to its workers."""

from __future__ import annotations

import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from pyspark import SparkContext

from pipeline import session
from tests.runs import ROOT


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
    assert session._unix_sockets.__wrapped__() == {}
    assert not any(long.iterdir())


TWICE = """
import sys, time
from pyspark import SparkContext
from pipeline.contracts.config import SparkResources
from pipeline.session import is_running, launch, session, stop
from pipeline.spark import run_tasks
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


IMPORTS = """
from pipeline.contracts.config import SparkResources
from pipeline.session import session, stop
from pipeline.spark import run_tasks

spark = session(SparkResources(master="local[1]", driver_memory="1g"), "test", ("wave", "cmd"))
print(run_tasks(spark, [{}], lambda task: {"there": "wave" in __import__("sys").modules}, "test"))
stop(spark)
"""


def test_workers_begin_with_the_modules_that_a_session_names() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["[{'there': True}]"]
    without = IMPORTS.replace(', ("wave", "cmd")', "")
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["[{'there': False}]"]
