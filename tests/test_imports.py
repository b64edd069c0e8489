"""Imports point one way, so that a stage can be read, run and replaced alone.

Every file is parsed, none is run: imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("pipeline", "model", "jobs", "infra", "tests")
PACKAGES = (
    "pipeline", "pipeline.contracts", "pipeline.gate", "pipeline.inference", "pipeline.nightly", "pipeline.releases",
    "model", "jobs",
)  # fmt: skip

# Modules of `pipeline` that are no stage but a stage's inner part, and the modules that may import them.
KERNELS = {
    "ann": {"index", "nightly", "plan", "releases"},
    "clusters": {"inference", "neighbourhoods"},
    "digests": {"differences", "inference"},
    "differences": {"features", "inference", "neighbourhoods", "walks"},
    "encoders": {"features", "newcomers"},
    "event_kernel": {"ingest"},
    "exact_kernel": {"neighbourhoods", "newcomers", "shipping"},
    "graph_kernel": {"graph"},
    "inference": {"newcomers"},
    "input_files": {"guess", "sources"},
    "jvm": {"session"},
    "keys": {"ingest", "newcomers"},
    "worker_daemon": {"session"},
    "mixing": {
        "digests",
        "differences",
        "event_kernel",
        "exact_kernel",
        "graph_kernel",
        "inference",
        "top_sums",
        "walk_kernel",
        "walkers",
        "worker_daemon",
    },
    "neighbourhoods": {"newcomers", "pairs", "walks"},
    "questions": {"evaluation", "gate", "pairs"},
    "ranking": {"evaluation", "gate", "questions"},
    "releases": {"nightly"},
    "report": {"evaluation", "index", "nightly"},
    "shipping": {"neighbourhoods"},
    "sources": {"guess", "ingest", "newcomers"},
    "steps": {"compact", "graph", "inference", "ingest", "pairs"},
    "top_sums": {"exact_kernel", "walk_kernel"},
    "walk_kernel": {"exact_kernel", "inference", "neighbourhoods", "newcomers", "shipping", "walkers"},
    "walkers": {"neighbourhoods"},
}
# STYLE names numpy, pyarrow, fsspec and pydantic; the settings file is YAML, and a host's copy of a dataset has a lock.
CONTRACT_LIBRARIES = {"filelock", "fsspec", "numpy", "pyarrow", "pydantic", "yaml"} | sys.stdlib_module_names


class Import(NamedTuple):
    importer: str  # dotted name of the importing module: pipeline.walks
    target: str  # dotted name of what it imports: pipeline.contracts.config.Settings
    where: str  # file and line


class Rule(NamedTuple):
    name: str
    breaks: Callable[[str, str], bool]  # importer, target


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def room(name: str) -> str:
    """`walks` for pipeline.walks and for anything in pipeline.walks; empty for the package itself."""
    return ([*name.split("."), ""])[1]


def reaches_another_stage(importer: str, target: str) -> bool:
    """Whether a module of `pipeline` imports one that is neither contracts, spark, its own room nor its kernel."""
    if not inside(importer, "pipeline") or inside(importer, "pipeline.contracts") or not inside(target, "pipeline"):
        return False
    allowed = {"contracts", room(importer)} | {kernel for kernel, users in KERNELS.items() if room(importer) in users}
    if room(importer) != "contracts":
        allowed |= {"spark", "exchange"}
    return room(target) not in allowed


RULES = (
    Rule(
        "nothing imports jobs",
        lambda importer, target: inside(target, "jobs") and not inside(importer, "jobs", "tests"),
    ),
    Rule(
        "nothing imports infra",
        lambda importer, target: inside(target, "infra") and not inside(importer, "infra", "tests"),
    ),
    Rule(
        "nothing imports tests",
        lambda importer, target: inside(target, "tests") and not inside(importer, "tests"),
    ),
    Rule("a stage imports contracts, spark and its own kernel", reaches_another_stage),
    Rule(
        "contracts import nothing else of the project",
        lambda importer, target: (
            inside(importer, "pipeline.contracts")
            and inside(target, *ROOMS)
            and not inside(target, "pipeline.contracts")
        ),
    ),
    Rule(
        "contracts import few libraries",
        lambda importer, target: (
            inside(importer, "pipeline.contracts")
            and not inside(target, *ROOMS)
            and target.split(".")[0] not in CONTRACT_LIBRARIES
        ),
    ),
    Rule(
        "pipeline never imports torch or the model",
        lambda importer, target: inside(importer, "pipeline") and inside(target, "torch", "dgl", "model"),
    ),
    Rule(
        "model never imports Spark",
        lambda importer, target: inside(importer, "model") and inside(target, "pyspark", "py4j"),
    ),
    Rule(
        "model imports only the contracts of pipeline",
        lambda importer, target: (
            inside(importer, "model") and inside(target, "pipeline") and not inside(target, "pipeline.contracts")
        ),
    ),
    Rule("package __init__ files import nothing", lambda importer, target: importer in PACKAGES),
)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def targets(node: ast.AST, package: str) -> Iterator[str]:
    """The dotted names that one syntax node imports, seen from a module of `package`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        yield from (f"{source}.{alias.name}" for alias in node.names if source != "__future__")
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    importer = module_name(path, root)
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        for target in targets(node, package):
            yield Import(importer, target, f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}")


def violations(rule: Rule, root: Path) -> list[str]:
    files = sorted(path for name in ROOMS for path in (root / name).rglob("*.py"))
    found = (edge for path in files for edge in imports_of(path, root) if rule.breaks(edge.importer, edge.target))
    return [f"{edge.where} imports {edge.target}: {rule.name}" for edge in found]


def plant(root: Path, file: str, source: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_imports_point_one_way(rule: Rule) -> None:
    found = violations(rule, ROOT)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("name", "file", "source"),
    [
        ("nothing imports jobs", "pipeline/walks.py", "def late():\n    import jobs.cli"),
        ("nothing imports jobs", "infra/bench/run.py", "from jobs.stage import main"),
        ("nothing imports infra", "jobs/cli.py", "from infra import bench"),
        ("nothing imports tests", "model/loss.py", "from tests.oracles import slow_loss"),
        ("a stage imports contracts, spark and its own kernel", "pipeline/walks.py", "from pipeline import graph"),
        ("a stage imports contracts, spark and its own kernel", "pipeline/walks.py", "from . import graph"),
        ("a stage imports contracts, spark and its own kernel", "pipeline/index.py", "import pipeline.walk_kernel"),
        ("a stage imports contracts, spark and its own kernel", "pipeline/walks/step.py", "from ..graph import run"),
        ("a stage imports contracts, spark and its own kernel", "pipeline/spark.py", "from pipeline.graph import run"),
        ("a stage imports contracts, spark and its own kernel", "pipeline/walk_kernel.py", "import pipeline.walks"),
        ("contracts import nothing else of the project", "pipeline/contracts/storage.py", "from pipeline import spark"),
        ("contracts import few libraries", "pipeline/contracts/schemas.py", "import pyspark.sql"),
        ("contracts import few libraries", "pipeline/contracts/schemas.py", "import pandas"),
        ("pipeline never imports torch or the model", "pipeline/inference.py", "from torch import nn"),
        (
            "pipeline never imports torch or the model",
            "pipeline/inference.py",
            "from importlib import import_module\nimport_module('dgl')",
        ),
        (
            "pipeline never imports torch or the model",
            "pipeline/contracts/sharding.py",
            "from model.export import layers",
        ),
        ("model never imports Spark", "model/loader.py", "if True:\n    from pyspark.sql import SparkSession"),
        ("model imports only the contracts of pipeline", "model/minibatch.py", "from pipeline.walks import run"),
        ("package __init__ files import nothing", "pipeline/__init__.py", "from pipeline.contracts import config"),
        ("package __init__ files import nothing", "jobs/__init__.py", "import os"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, name: str, file: str, source: str) -> None:
    plant(tmp_path, file, source)
    assert [rule.name for rule in RULES if violations(rule, tmp_path)].count(name) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("pipeline/walks.py", "from pipeline import neighbourhoods\nfrom pipeline.contracts import config\nimport os"),
        ("pipeline/pairs.py", "from pipeline.neighbourhoods import choose\nfrom pipeline.exchange import gather"),
        ("pipeline/walks/__init__.py", "from pipeline.walks.shuffle import run"),
        (
            "pipeline/contracts/storage.py",
            "from __future__ import annotations\nimport fsspec, os\nfrom .errors import StorageError",
        ),
        (
            "model/loss.py",
            "import torch\nfrom model.layers import pool\nfrom pipeline.contracts.config import Settings",
        ),
        ("jobs/inference.py", "from model.export import layers\nfrom pipeline import inference"),
        ("tests/test_cli.py", "from jobs import cli\nfrom tests.oracles import walk"),
    ],
)
def test_what_is_allowed_is_let_through(tmp_path: Path, file: str, source: str) -> None:
    plant(tmp_path, file, source)
    assert [found for rule in RULES for found in violations(rule, tmp_path)] == []


def test_no_job_hides_a_package_or_a_standard_module() -> None:
    """Run by path, a job has jobs/ first on its path: jobs/model.py or jobs/inspect.py would be imported instead."""
    names = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__"}
    assert names.isdisjoint(sys.stdlib_module_names | set(ROOMS))
