"""The archive of Spark's classes: made by the first session of a user, read by the next."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import jvm

SESSION = """
import sys
from pipeline.contracts.config import SparkResources
from pipeline.session import session
options = {"spark.driver.extraJavaOptions": f"{sys.argv[1]} -XX:TieredStopAtLevel=1"}
spark = session(SparkResources(master="local[1]", conf=options), "test")
assert spark.parallelize([1, 2], 1).count() == 2
spark.stop()
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(jvm, "default_cache", lambda: tmp_path)
    return tmp_path


def test_an_archive_is_made_where_none_is_finished(cache: Path) -> None:
    first = jvm.archive_options("")
    assert first.startswith(f"-XX:ArchiveClassesAtExit={cache}/spark-")
    archive = Path(first.split()[0].partition("=")[2])
    archive.write_bytes(bytes(4096))  # broken off
    assert jvm.archive_options("") == first
    archive.write_bytes(b"\xa8\xab\x0b\xf0" + bytes(4096))
    assert jvm.archive_options("").startswith(f"-XX:SharedArchiveFile={archive} ")
    assert jvm.archive_options("more.jar").startswith("-XX:ArchiveClassesAtExit")


def test_without_java_or_a_place_there_is_none(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jvm, "default_cache", lambda: tmp_path / "a folder")
    assert jvm.archive_options("") == ""
    monkeypatch.setattr(jvm, "default_cache", lambda: tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert jvm.archive_options("") == ""


def test_the_second_session_reads_what_the_first_left(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "t"), "PYTHONPATH": os.pathsep.join(sys.path)}
    log = tmp_path / "classes.log"

    def start() -> None:
        command = [sys.executable, "-c", SESSION, f"-Xlog:class+load=info:file={log}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "[warning]" not in done.stdout + done.stderr

    start()
    assert "shared objects file (top)" not in log.read_text()
    patience = time.monotonic() + 60
    while not any(map(jvm._is_finished, tmp_path.glob("t/*/spark-*.jsa"))):
        assert time.monotonic() < patience, "no archive"
        time.sleep(0.1)
    start()
    lines = [line for line in log.read_text().splitlines() if " org.apache.spark.SparkContext source: " in line]
    assert lines
    assert all("shared objects file (top)" in line for line in lines)
