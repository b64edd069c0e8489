"""The archive of packages for executors: what is in it, and that it runs wherever it is unpacked."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

from infra.launch.package import SPARES, build_environment, needed

LARGE = ("torch", "numba", "scikit-learn", "scipy", "pandas", "pyarrow", "faiss-cpu", "numpy", "s3fs", "pydantic")


def test_a_package_left_out_takes_along_what_only_it_needs() -> None:
    everything, without = needed(set()), needed({"torch"})
    assert {"torch", "sympy", "numba", "llvmlite", "pyarrow", "pydantic-core", "pyspark"} <= everything
    assert "sympy" not in without, "only torch needs it"
    assert "filelock" in without, "we need it too"
    assert not {"py4j", "pyspark", "dgl", "networkx"} & needed({*SPARES, "torch"})
    assert not {"pytest", "mypy", "pinsage-pipeline", "flask"} & everything, "tools and our own code stay at home"


def test_an_unpacked_archive_runs_where_it_lies_and_sees_nothing_of_the_host(tmp_path: Path) -> None:
    made = [build_environment(tmp_path / name / "environment.tar.gz", LARGE) for name in ("first", "second")]
    assert made[0].read_bytes() == made[1].read_bytes(), "the same packages give the same bytes"
    with tarfile.open(made[0]) as archive:
        archive.extractall(tmp_path / "un packed", filter="data")
    elsewhere = (tmp_path / "un packed").rename(tmp_path / "else where")
    look = "import sys, yaml; print(yaml.__file__, yaml.__with_libyaml__, sys.flags.no_site)"
    command = [str(elsewhere / "bin" / "python"), "-c", look]
    where = {"PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin"}
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", env=where)
    assert said.stdout.strip() == f"{elsewhere}/lib/yaml/__init__.py True 1"
    command[-1] = "import pytest"
    missing = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=where)
    assert "No module named 'pytest'" in missing.stderr
