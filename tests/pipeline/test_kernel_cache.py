"""Kernels of packaged code are compiled once per host and version, wherever the package lies."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from infra.launch.package import build
from pipeline.kernel_cache import ByContent
from pipeline.mixing import mix
from tests.runs import ROOT

USE = """
import numpy as np
from pipeline.inference import halves
halves.as_single(np.arange(4, dtype=np.float16))
kernel = halves._widen
print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()), kernel.stats.cache_path)
"""


def test_a_package_at_another_place_finds_what_was_compiled(tmp_path: Path) -> None:
    """Two applications are sent the same zip: the second compiles nothing. Another version of the code does."""
    package = build(tmp_path / "pinsage.zip")
    first, second = (_use(tmp_path, package, place) for place in ("app-1", "app-2"))
    assert (first[:2], second[:2]) == (["0", "1"], ["1", "0"])
    assert first[2] == second[2]
    with zipfile.ZipFile(package, "a") as archive:
        archive.writestr("pipeline/changed.py", "")
    assert _use(tmp_path, package, "app-3")[:2] == ["0", "1"]


def test_every_kernel_is_kept() -> None:
    """One that is not is compiled in every worker of every night."""
    found = []
    for source in sorted((ROOT / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.FunctionDef):
                marks = [ast.unparse(mark) for mark in node.decorator_list if "njit" in ast.unparse(mark)]
                found += [(f"{source.name}: {node.name}", mark) for mark in marks]
    assert len(found) > 20
    assert [name for name, mark in found if "cache=True" not in mark] == []


def test_code_in_a_folder_is_left_to_numba() -> None:
    """An installed tree, or a clone, has its kernels beside it."""
    assert ByContent.from_function(mix.py_func, mix.py_func.__code__.co_filename) is None


def _use(tmp_path: Path, package: Path, place: str) -> list[str]:
    """Call a kernel of the package from a folder of its own; cache hits, misses and the cache's folder."""
    folder = tmp_path / place
    folder.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(shutil.copy(package, folder)),
        "PYTHONSAFEPATH": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "NUMBA_CACHE_LOCATOR_CLASSES": "pipeline.kernel_cache.ByContent,ZipCacheLocator",
    }
    ran = subprocess.run([sys.executable, "-c", USE], env=environment, cwd=folder, check=True, capture_output=True)
    return ran.stdout.decode().split()
