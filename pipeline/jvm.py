"""Spark's JVM on this machine: light, and with its classes from an archive, as the first leaves it for those to come.

Much of what a session takes to start is Java reading, checking and linking Spark's classes. It can keep them as they
lie in memory (dynamic class data sharing, JEP 350): 2.1 seconds and 2.6 core-seconds less of 10.9 and 13.2 for a small
inference. It compares versions and the class path, and goes on without an archive that does not fit or that nobody
finished: its first word is written last.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pyspark

from pipeline.contracts.errors import StorageError
from pipeline.contracts.replica import default_cache

LIGHT = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""Of Spark's JVMs, unless resources.spark.conf has options of its own. They only hand out tasks, no rows pass through
them; compiling what runs for seconds cost more than all else: 18 core-seconds a session without, 7 with it."""
_MAGIC = (0xF00BABA8).to_bytes(4, "little")
_SILENT = "-Xlog:cds=off -Xlog:cds+dynamic=off"
_DIGITS = 16


def archive_options(class_path: str) -> str:
    """Options that read Spark's classes from this user's archive, or make one as the JVM ends; 110 MB of the cache.

    class_path is what the session adds to Spark's own. Empty where there is no place for it.
    """
    java = shutil.which("java", path=_java_home()) or shutil.which("java")
    try:
        folder = default_cache()
    except StorageError:
        return ""
    if java is None or any(letter in str(folder) for letter in " '\"\\"):
        return ""
    file = Path(java).resolve()
    found = file.stat()
    about = (str(file), found.st_size, found.st_mtime_ns, pyspark.__version__, pyspark.__file__, class_path)
    archive = folder / f"spark-{hashlib.sha256(repr(about).encode()).hexdigest()[:_DIGITS]}.jsa"
    return f"{'-XX:SharedArchiveFile' if _is_finished(archive) else '-XX:ArchiveClassesAtExit'}={archive} {_SILENT}"


def _java_home() -> str:
    home = os.environ.get("JAVA_HOME")
    return "" if home is None else str(Path(home) / "bin")


def _is_finished(archive: Path) -> bool:
    try:
        with open(archive, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False
