"""Of two writers who saw the same, one wins: on a disk and in memory here, on S3 in tests/pipeline/releases."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.contracts.errors import StorageError
from pipeline.contracts.storage import Storage
from tests.runs import ROOT


@pytest.fixture(params=["disk", "memory"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "site") if request.param == "disk" else f"memory://{uuid.uuid4()}")


def test_a_write_happens_only_where_the_expected_content_lies(anywhere: Storage) -> None:
    assert not anywhere.write_if("a/live", b"something", b"new")
    assert anywhere.write_if("a/live", None, b"first")
    assert not anywhere.write_if("a/live", None, b"other")
    assert not anywhere.write_if("a/live", b"firs", b"other")
    assert anywhere.read_bytes("a/live") == b"first"
    assert anywhere.write_if("a/live", b"first", b"second")
    assert anywhere.read_bytes("a/live") == b"second"


def test_of_many_threads_that_count_in_one_object_none_is_lost(anywhere: Storage) -> None:
    anywhere.write_if("count", None, b"0")

    def count(_: int) -> None:
        for _ in range(20):
            while True:
                seen = anywhere.read_bytes("count")
                if anywhere.write_if("count", seen, str(int(seen) + 1).encode()):
                    break

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    assert anywhere.read_bytes("count") == b"80"


HOLDER = """
import sys, time
from pipeline.contracts.conditional import _folder_lock
with _folder_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_writer_is_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(Storage(str(tmp_path)).write_if, "live", None, b"new")
        assert wait([written], timeout=0.2).not_done  # it waits for the holder
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert written.result(timeout=60)


def test_a_store_without_conditions_is_refused() -> None:
    class PlainFileSystem(MemoryFileSystem):
        protocol = "plain"

    fsspec.register_implementation("plain", PlainFileSystem, clobber=True)
    with pytest.raises(StorageError, match=r"plain has no write that depends on what lies there.*on s3, gs or a file"):
        Storage("plain://site").write_if("live", None, b"new")
