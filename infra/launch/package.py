"""What Spark ships to its executors: the code as one zip, and the packages it needs as one relocatable archive.

    python infra/launch/package.py dist/pinsage.zip --environment dist/environment.tar.gz
    spark-submit --py-files dist/pinsage.zip --archives dist/environment.tar.gz#env \\
        --conf spark.pyspark.python=./env/bin/python --conf spark.pyspark.driver.python=$PWD/.venv/bin/python ...

Hosts then need Spark, Java and a bare Python of the same minor version, nothing else. The archive holds the files of
the pinned packages that are installed beside this Python, and `bin/python`, which starts the host's Python on them and
on no package of the host. What executors never import is left out: Spark itself, which is there already, and DGL.
PyTorch is read by the stage `inference` alone: `--without torch` makes a smaller one for the others.

The same sources and packages give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "model", "jobs")
SPARES = ("pyspark", "dgl")
PROJECT = "pinsage-pipeline"
EXTRAS = {"s3": "s3fs", "gcs": "gcsfs"}
"""Extras of ours that go along where their package is installed: executors read and write storage themselves."""

PYTHON = """#!/bin/sh
# The host's Python on the packages of this archive: -S hides those of the host.
here=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd) || exit
python=$(PATH=$PATH:/usr/local/bin:/usr/bin; command -v python{version}) || {{
    echo "environment: this host has no python{version}, for which the packages were built; install it" >&2
    exit 127
}}
PYTHONPATH="$here/lib${{PYTHONPATH:+:$PYTHONPATH}}" exec "$python" -S "$@"
"""


def build(target: Path) -> Path:
    """Write the zip of the code; returns its path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for package in PACKAGES:
            for source in sorted((ROOT / package).rglob("*")):
                if source.is_file() and "__pycache__" not in source.parts:
                    entry = zipfile.ZipInfo(str(source.relative_to(ROOT)), (1980, 1, 1, 0, 0, 0))
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    archive.writestr(entry, source.read_bytes())
    return target


def build_environment(target: Path, without: Iterable[str] = ()) -> Path:
    """Write the archive of the packages, but those named and what only they need; returns its path.

    Raises PackageNotFoundError where a package, or this project, is not installed beside this Python.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    site = Path(sysconfig.get_path("purelib"))
    start = PYTHON.format(version="{}.{}".format(*sys.version_info[:2]))
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with (
            open(unfinished, "wb") as file,
            gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w|") as archive,
        ):
            _add(archive, "bin/python", start.encode(), 0o755)
            for name in sorted(needed({canonicalize_name(name) for name in (*SPARES, *without)})):
                for part in sorted(distribution(name).files or (), key=str):
                    source = Path(str(part.locate()))
                    if part.suffix != ".pyc" and ".." not in part.parts and source.is_relative_to(site):
                        _add(archive, f"lib/{source.relative_to(site)}", source.read_bytes(), 0o644)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def needed(without: set[str]) -> set[str]:
    """Names of the installed packages that the pipeline needs, directly or not, but for those named."""
    extras = [extra for extra, package in EXTRAS.items() if find_spec(package)]
    wanted = [Requirement(f"{PROJECT}[{','.join(extras)}]")]
    found: dict[str, set[str]] = {}
    while wanted:
        requirement = wanted.pop()
        name, asked = canonicalize_name(requirement.name), {"", *requirement.extras}
        if name in without or asked <= found.get(name, set()):
            continue
        found[name] = asked = found.get(name, set()) | asked
        wanted += [
            line
            for line in map(Requirement, distribution(name).requires or [])
            if line.marker is None or any(line.marker.evaluate({"extra": extra}) for extra in asked)
        ]
    return found.keys() - {PROJECT}


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, BytesIO(data))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make what spark-submit ships to executors.")
    parser.add_argument("code", nargs="?", default="dist/pinsage.zip", type=Path, help="the zip for --py-files")
    parser.add_argument("--environment", type=Path, help="also the archive of packages for --archives, a .tar.gz")
    parser.add_argument("--without", action="append", default=[], help="a package to leave out; repeatable")
    given = parser.parse_args()
    made = [build(given.code)]
    if given.environment:
        made.append(build_environment(given.environment, given.without))
    for path in made:
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
