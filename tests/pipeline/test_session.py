"""The session of this machine: how it starts, and who may speak to its workers."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from pyspark import SparkContext

from pipeline import session, worker_daemon
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


INTERRUPTED = """
import time
from jobs.stage import exit_codes
from pipeline.contracts.config import SparkResources
from pipeline.session import session, stop
from pipeline.spark import run_tasks

def wait(task):
    open(task["path"], "w").close()
    time.sleep(60)
    return {}

with exit_codes():
    spark = session(SparkResources(master="local[1]", driver_memory="1g"), "test")
    try:
        run_tasks(spark, [{"path": PATH}], wait, "test")
    finally:
        stop(spark)
"""


def test_interrupted_while_spark_works_a_person_reads_one_line(tmp_path: Path) -> None:
    """As by Ctrl-C, which all processes of a terminal are sent."""
    started = tmp_path / "started"
    code = INTERRUPTED.replace("PATH", repr(str(started)))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=100)
    lines = [line for line in (out + err).splitlines() if not line.startswith("WARNING: Using incubator")]
    assert (process.returncode, lines) == (
        130, ["interrupted; the same command goes on from the last finished shard"],
    )  # fmt: skip


AHEAD = """
import os, signal, sys, threading, wave
from pipeline import session
from pipeline.contracts.config import SparkResources
from pipeline.spark import run_tasks

wave.marked = os.getpid()
import numpy

case, resources = sys.argv[1], SparkResources(master="local[1]", driver_memory="1g")
other = SparkResources(**{**resources.model_dump(), "conf": {"spark.executorEnv.MKL_NUM_THREADS": "2"}})
if case == "early environment":
    resources = other
if case == "a thread":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
session.launch(resources, ("cmd",))
forked = list(session._ahead.values())
print(len(forked))
if case == "killed":
    os.kill(forked[0], signal.SIGKILL)
if case == "other environment":
    resources = other
if case == "no driver":
    print(forked[0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
spark = session.session(resources, "test")


def look(task):
    import os, sys, wave

    import numpy
    from threadpoolctl import threadpool_info

    if "note" in task:
        with open(task["note"], "w") as file:
            file.write(f"{os.getpid()} {os.getppid()}")
        os.kill(task["driver"], 9)
        __import__("time").sleep(100)
    threads = [os.environ.get(f"{name}_NUM_THREADS") for name in ("OMP", "MKL")]
    is_driver = getattr(wave, "marked", 0) == task["driver"]
    blas = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    return {"found": [is_driver, "cmd" in sys.modules, os.getpid() != task["driver"], *threads, *blas]}


if case == "no driver later":
    run_tasks(spark, [{"driver": os.getpid(), "note": sys.argv[2]}], look, "test")
if case == "killed later":
    assert run_tasks(spark, [{"driver": os.getpid()}], look, "test")[0]["found"][0]
    os.kill(forked[0], signal.SIGKILL)
print(run_tasks(spark, [{"driver": os.getpid()}] * 3, look, "test")[2]["found"])
session.stop(spark)
print(session._ahead, [pid for pid in forked if os.path.exists(f"/proc/{pid}")])
"""
FORKED, ALONE = "[True, True, True, '1', None, 1]", "[False, False, True, '1', None, 1]"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: elsewhere no process is forked ahead")
@pytest.mark.parametrize(
    ("case", "count", "expected"),
    [
        ("plain", 1, FORKED),
        ("a thread", 0, ALONE),
        ("killed", 1, ALONE),
        ("killed later", 1, FORKED),  # Spark goes on with the worker that it has
        ("early environment", 0, ALONE.replace("None", "'2'")),
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
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=100)
    assert done.returncode == -signal.SIGKILL
    wait_for_the_end_of([int(done.stdout.splitlines()[1])])


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: elsewhere no process is forked ahead")
def test_workers_and_their_daemon_go_with_a_driver_that_is_killed_while_they_work(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AHEAD, "no driver later", str(tmp_path / "note")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=100)
    assert done.returncode == -signal.SIGKILL
    wait_for_the_end_of([int(pid) for pid in (tmp_path / "note").read_text().split()])


def wait_for_the_end_of(pids: list[int]) -> None:
    """Of processes that may stay as zombies, where nobody waits for orphans."""

    def is_there(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + 60
    while any(map(is_there, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_there, pids))


def test_spark_does_not_wait_for_a_fork_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_daemon, "_PATIENCE", 0.2)
    path = str(tmp_path / "s")
    assert not worker_daemon._hand_over(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(path)
        server.listen(1)
        assert not worker_daemon._hand_over(path)


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
