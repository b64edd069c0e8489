"""The command line, called as a person calls it, on one small shop that is ingested once."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyspark import SparkContext
from typer.testing import CliRunner

from jobs.cli import app
from tests.synthetic import shop_settings, write_shop


@dataclass(frozen=True)
class Outcome:
    """What a command printed, on both streams, and how it ended."""

    exit_code: int
    text: str


@dataclass(frozen=True)
class Shop:
    """A folder with data, settings and perhaps a run, and the commands that one can type there."""

    folder: Path

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    @property
    def settings_file(self) -> Path:
        """The settings, as YAML."""
        return self.folder / "pinsage.yaml"

    def configure(self, change: Callable[[dict[str, Any]], object] | None = None) -> None:
        """Write the settings file anew, with a change made to its tree."""
        tree = shop_settings(self.folder, self.run)
        if change is not None:
            change(tree)
        self.settings_file.write_text(yaml.safe_dump(tree), encoding="utf-8")

    def copy(self, folder: Path) -> Shop:
        """The same elsewhere, time stamps and all."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("cache"))
        copy = Shop(folder)
        copy.configure()
        return copy

    def pinsage(self, *arguments: str) -> Outcome:
        """Run a command in this process; an exception that is no exit shows as the traceback it would be."""
        result = CliRunner().invoke(app, [*arguments, "--settings", str(self.settings_file)], env={"COLUMNS": "200"})
        text = result.output
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            text += "".join(traceback.format_exception(result.exception))
        return Outcome(result.exit_code, text)

    def made(self) -> set[str]:
        """The datasets that exist: those with a manifest."""
        return {path.parent.name for path in self.run.glob("*/_manifest.json")}


@pytest.fixture
def new_shop(tmp_path: Path, spark: SparkContext) -> Shop:
    """A shop that nothing was run on."""
    shop = Shop(tmp_path / "shop")
    write_shop(shop.folder)
    shop.configure()
    return shop


@pytest.fixture(scope="session")
def graph_made(tmp_path_factory: pytest.TempPathFactory, spark: SparkContext) -> Shop:
    """A shop with a run that has come as far as the graph; to be copied, not changed."""
    shop = Shop(tmp_path_factory.mktemp("jobs") / "shop")
    write_shop(shop.folder)
    shop.configure()
    for stage in ("ingest", "graph"):
        outcome = shop.pinsage(stage)
        assert outcome.exit_code == 0, outcome.text
    return shop


@pytest.fixture
def shop(tmp_path: Path, graph_made: Shop) -> Shop:
    """As graph_made; a copy, to do to it what one likes."""
    return graph_made.copy(tmp_path / "shop")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, graph_made: Shop) -> Shop:
    """A shop on which all ran: ingest, graph and features alone, the rest by `run`; to be copied, not changed."""
    shop = graph_made.copy(tmp_path_factory.mktemp("finished") / "shop")
    outcome = shop.pinsage("features")
    assert "features: done in" in outcome.text, outcome.text
    outcome = shop.pinsage("run")
    assert outcome.exit_code == 0, outcome.text
    assert "ingest: up to date\ngraph: up to date\nfeatures: up to date\nwalks: pers" in outcome.text
    assert "report: " in outcome.text
    return shop
