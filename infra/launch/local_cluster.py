"""A real Spark standalone cluster on this machine's loopback: one master, two workers, stopped when the block ends.

`python infra/launch/local_cluster.py` starts one and prints how to submit to it until Ctrl-C; the cluster test uses
`standalone_cluster`. What it listens on is 127.0.0.1 only.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyspark

SPARK_CLASS = Path(pyspark.__file__).parent / "bin" / "spark-class"
SPARK_SUBMIT = SPARK_CLASS.with_name("spark-submit")
START_SECONDS = 90


@contextmanager
def standalone_cluster(folder: Path, num_workers: int = 2, memory: str = "1g") -> Iterator[str]:
    """Start the cluster with its logs and scratch space in folder; yields the master's URL."""
    folder.mkdir(parents=True, exist_ok=True)
    port, page = _free_port(), _free_port()
    url = f"spark://127.0.0.1:{port}"
    mine = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # code comes with the job
    environment = {
        **mine, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_NO_DAEMONIZE": "1",
        "SPARK_LOCAL_DIRS": str(folder / "scratch"), "SPARK_DAEMON_MEMORY": "256m",
    }  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str) -> None:
        with open(folder / f"{name}.log", "wb") as log:
            command = [str(SPARK_CLASS), *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    try:
        address = ("--host", "127.0.0.1")
        start(
            "master", "org.apache.spark.deploy.master.Master", *address, "--port", str(port), "--webui-port", str(page)
        )
        _wait(page, processes, folder, 0)
        for worker in range(num_workers):
            work = (
                "--cores",
                "1",
                "--memory",
                memory,
                "--webui-port",
                "0",
                "--work-dir",
                str(folder / f"worker-{worker}"),
            )
            start(f"worker-{worker}", "org.apache.spark.deploy.worker.Worker", *address, *work, url)
        _wait(page, processes, folder, num_workers)
        yield url
    finally:
        for process in reversed(processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(page: int, processes: list[subprocess.Popen[bytes]], folder: Path, num_workers: int) -> None:
    """Wait until the master says that so many workers are alive."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in processes):
            break
        try:
            with opener.open(f"http://127.0.0.1:{page}/json/", timeout=5) as answer:
                if json.load(answer)["aliveworkers"] >= num_workers:
                    return
        except (urllib.error.URLError, OSError, ValueError):
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the local Spark cluster did not start within {START_SECONDS} s; its logs are in {folder}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    with standalone_cluster(Path("runs/local-cluster")) as master:
        print(f"{SPARK_SUBMIT} --master {master} --py-files dist/pinsage.zip jobs/walks.py --settings FILE")
        print("Ctrl-C stops it", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()
