"""The pins of constraints.txt hold for every Python that pyproject.toml promises, not for this one alone."""

from __future__ import annotations

from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.runs import ROOT

PYTHONS = ("3.10.0", "3.11.0", "3.12.0", "3.13.0")


def holds_for(line: str, python: str) -> bool:
    """Whether a line of constraints.txt counts there."""
    marker = Requirement(line).marker
    named = {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    return marker is None or marker.evaluate(named)


@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_can_be_installed_on_every_python_promised(python: str) -> None:
    """As far as the versions installed here say which Pythons they want: the others are of another Python's lines."""
    promised = SpecifierSet(metadata.metadata("pinsage-pipeline")["Requires-Python"])
    assert python in promised
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    checked, refused = 0, []
    for line in lines:
        requirement = Requirement(line)
        try:
            found = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        wants = str(found.metadata.json.get("requires_python", ""))
        if wants and found.version in requirement.specifier and holds_for(line, python):
            checked += 1
            if python not in SpecifierSet(wants):
                refused.append(f"{line}: wants Python {wants}")
    assert refused == []
    assert checked > 80
