"""Runs of the real command on a small shop, and what a run's folder holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.contracts import schemas
from tests.synthetic import shop_settings, write_shop

ROOT = Path(__file__).resolve().parents[1]
CLOCKED = (f"{schemas.TRAINING}/", f"{schemas.INDEX_LOG}/", f"{schemas.METRICS}/")


def make_shop(folder: Path, **task: Any) -> Path:
    """Write the shop and its settings; returns the settings file. Its run is folder/run."""
    write_shop(folder / "data")
    settings = folder / "shop.yaml"
    settings.write_text(yaml.safe_dump(shop_settings(folder / "data", folder / "run", **task)))
    return settings


def command(*arguments: str) -> list[str]:
    """The `pinsage` command of this environment."""
    return [sys.executable, "-m", "jobs.cli", *arguments]


def environment() -> dict[str, str]:
    """As a user's shell: no colours, the project importable, no JVM of this process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYSPARK_", "SPARK_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "TERM": "dumb"}


def pinsage(
    *arguments: str, expect: int = 0, surroundings: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `pinsage` to its end and check its exit code; surroundings are further environment variables."""
    variables = {**environment(), **(surroundings or {})}
    done = subprocess.run(command(*arguments), env=variables, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def stored_bytes(run: Path) -> dict[str, bytes]:
    """Every file of every finished dataset of a run, manifests by what they say of the content.

    The trainer's log, the index's and the stages' metrics are none: they tell the time.
    """
    found = {}
    for file in sorted(run.rglob("*")):
        if file.is_dir():
            continue
        name = str(file.relative_to(run))
        if file.name == "_manifest.json":
            found[name] = json.loads(file.read_text())["content"].encode()
        elif "/" in name and not name.startswith(CLOCKED):
            found[name] = file.read_bytes()
    return found


def differences(first: Path, second: Path) -> list[str]:
    """Names of files that only one run has or that differ."""
    one, other = stored_bytes(first), stored_bytes(second)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
