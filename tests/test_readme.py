"""The README speaks of the real project: its commands, stages and file tree."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.contracts import schemas
from tests.runs import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, re.MULTILINE))
    assert {"demo", "test", "lint", "cluster-test"} <= named
    assert named <= targets


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^pinsage (\w+)", TEXT, re.MULTILINE))))
def test_every_command_it_names_exists(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_its_table_of_stages_is_the_real_one() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| `(.*?)` \|$", TEXT, re.MULTILINE)
    expected = [
        (stage.name, ", ".join(d.name for d in stage.reads) or "your files", ", ".join(d.name for d in stage.writes))
        for stage in schemas.STAGES
    ]
    assert [row[:3] for row in rows] == expected
    assert all((ROOT / row[3]).is_file() for row in rows)


def test_every_path_it_names_exists() -> None:
    tree = re.search(r"## The code\n\n```\n(.*?)```", TEXT, re.DOTALL)
    assert tree
    folder = ""
    for line in tree.group(1).splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else name
        assert (ROOT / (folder + name if line.startswith(" ") else name)).exists(), name
    for name in re.findall(r"`((?:pipeline|model|jobs|infra|tests)/[\w./-]+)`", TEXT):
        if "STAGE" not in name:
            assert (ROOT / name).exists(), name


def test_no_figure_is_left_open() -> None:
    named = {"ITEM_KEY", "PINSAGE_WEBHOOK", "PINSAGE_LOG", "SPARK_MASTER"}
    assert not set(re.findall(r"\b[A-Z]+_[A-Z]+\b", TEXT)) - named
