"""`make audit`: what this project installs, as a CycloneDX list, and whether advisories name any of it.

The list, dist/sbom.cdx.json, is made from constraints.txt without a network. The advisories are asked for only where
they answer, by pip-audit; where they do not, a line says so and nothing fails. Exit code 1: a pinned package has one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SERVICE = "https://pypi.org/pypi/pip/json"
PROBE_SECONDS, AUDIT_SECONDS, ASKING = 5, 20, 6


def main() -> int:
    """Write the list, ask for advisories; returns the exit code."""
    parser = argparse.ArgumentParser(description="Software bill of materials, and advisories about what is in it.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "sbom.cdx.json")
    parser.add_argument("--offline", action="store_true", help="only the list")
    arguments = parser.parse_args()
    pins = list(pinned((ROOT / "constraints.txt").read_text(encoding="utf-8")))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(bill_of_materials(pins), encoding="utf-8")
    print(f"audit: {len(pins)} packages are in {arguments.output}")
    if arguments.offline:
        return 0
    if not service_answers():
        print(f"audit: no advisories from {SERVICE}; nothing was checked")
        return 0
    return ask(pins)


def pinned(text: str) -> Iterator[tuple[str, str]]:
    """Name and version of every pin that holds for this Python and machine."""
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement.name, next(iter(requirement.specifier)).version


def bill_of_materials(pins: list[tuple[str, str]]) -> str:
    """CycloneDX 1.6, with the licences of what is installed here."""
    own = Component(name="pinsage-pipeline", type=ComponentType.APPLICATION, bom_ref="pinsage-pipeline")
    bom = Bom(components=[_component(name, version) for name, version in pins])
    bom.metadata.component = own
    bom.register_dependency(own, bom.components)
    text: str = JsonV1Dot6(bom).output_as_string(indent=1)
    return text


def _component(name: str, version: str) -> Component:
    licences = []
    try:
        found = metadata.metadata(name).json
        text = str(found.get("license_expression") or found.get("license") or "")
        licences = [DisjunctiveLicense(name=text.strip())] if 0 < len(text.strip()) < 100 else []
    except metadata.PackageNotFoundError:  # of an extra that is not installed here
        pass
    url = PackageURL("pypi", None, name, version)
    return Component(
        name=name, version=version, type=ComponentType.LIBRARY, purl=url, bom_ref=str(url), licenses=licences
    )


def service_answers() -> bool:
    """Whether the advisories can be had: a mirror of the packages alone has none."""
    try:
        with urllib.request.urlopen(SERVICE, timeout=PROBE_SECONDS) as answer:
            return "vulnerabilities" in json.load(answer)
    except (OSError, ValueError):
        return False


def ask(pins: list[tuple[str, str]]) -> int:
    """Run pip-audit on the pins, several of it side by side as it asks for one after the other.

    Returns 1 if a package has an advisory, else 0, with a line about what was not answered in time or is not known.
    """
    skipped, found, late = 0, [], False
    with ThreadPoolExecutor(ASKING) as pool:
        for answer in pool.map(_ask, (pins[place::ASKING] for place in range(ASKING))):
            late |= answer is None
            for package in answer or ():
                skipped += "skip_reason" in package
                found += [(package["name"], package["version"], advisory) for advisory in package.get("vulns", ())]
    for name, version, advisory in found:
        mended = ", ".join(advisory["fix_versions"]) or "no version yet"
        print(f"audit: {name} {version}: {advisory['id']}, mended in {mended}")
    if late:
        print(f"audit: not all was answered within {AUDIT_SECONDS} s")
    told = f"{len(found)} advisories" if skipped < len(pins) else "nothing was checked"
    print(f"audit: {told}; {skipped} of {len(pins)} packages are not known to {SERVICE.split('/')[2]}")
    return int(bool(found))


def _ask(pins: list[tuple[str, str]]) -> list[dict[str, Any]] | None:
    """What pip-audit says of some pins; None if that takes too long or it fails."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}=={version}\n" for name, version in pins))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "-r", file.name, "--no-deps", "--disable-pip", "-f", "json"]
        command += ["--progress-spinner", "off"]
        try:
            done = subprocess.run(command, timeout=AUDIT_SECONDS, check=False, capture_output=True, text=True)
            answer: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
        except (subprocess.TimeoutExpired, ValueError, KeyError):
            return None
    return answer


if __name__ == "__main__":
    sys.exit(main())
