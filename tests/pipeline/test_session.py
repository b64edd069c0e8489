"""The session of this machine: how it starts, and who may speak to its workers."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import tempfile
import time
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


AHEAD = """
import os, signal, sys, threading, wave
from pipeline import session
from pipeline.contracts.config import SparkResources
from pipeline.spark import run_tasks

wave.marked = os.getpid()
case, resources = sys.argv[1], SparkResources(master="local[1]", driver_memory="1g")
if case == "a thread":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
session.launch(resources, ("cmd",))
forked = list(session._ahead.values())
print(len(forked))
if case == "killed":
    os.kill(forked[0], signal.SIGKILL)
if case == "other environment":
    resources = SparkResources(**{**resources.model_dump(), "conf": {"spark.executorEnv.MKL_NUM_THREADS": "2"}})
if case == "no driver":
    print(forked[0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
spark = session.session(resources, "test")


def look(task):
    import os, sys, wave

    threads = [os.environ.get(f"{name}_NUM_THREADS") for name in ("OMP", "MKL")]
    is_driver = getattr(wave, "marked", 0) == task["driver"]
    return {"found": [is_driver, "cmd" in sys.modules, os.getpid() != task["driver"], *threads]}


print(run_tasks(spark, [{"driver": os.getpid()}] * 3, look, "test")[2]["found"])
session.stop(spark)
print(session._ahead, [pid for pid in forked if os.path.exists(f"/proc/{pid}")])
"""
FORKED, ALONE = "[True, True, True, '1', None]", "[False, False, True, '1', None]"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: elsewhere no process is forked ahead")
@pytest.mark.parametrize(
    ("case", "count", "expected"),
    [
        ("plain", 1, FORKED),
        ("a thread", 0, ALONE),
        ("killed", 1, ALONE),
        ("other environment", 1, ALONE.replace("None", "'2'")),
    ],
)
def test_workers_are_forked_from_the_driver_where_that_is_safe(case: str, count: int, expected: str) -> None:
    command = [sys.executable, "-c", AHEAD, case]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == [str(count), expected, "{} []"]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: elsewhere no process is forked ahead")
def test_what_was_forked_ahead_goes_with_a_driver_that_is_killed() -> None:
    command = [sys.executable, "-c", AHEAD, "no driver"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    forked = Path("/proc", done.stdout.splitlines()[1])
    deadline = time.monotonic() + 20
    while forked.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not forked.exists()


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
