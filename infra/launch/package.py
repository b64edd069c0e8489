"""The code as one zip for `spark-submit --py-files`: `python infra/launch/package.py dist/pinsage.zip`.

Third-party packages are not in it: install constraints.txt on the hosts, or ship an environment as your cluster does.
The same sources give the same bytes.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "model", "jobs")


def build(target: Path) -> Path:
    """Write the zip; returns its path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for package in PACKAGES:
            for source in sorted((ROOT / package).rglob("*")):
                if source.is_file() and "__pycache__" not in source.parts:
                    entry = zipfile.ZipInfo(str(source.relative_to(ROOT)), (1980, 1, 1, 0, 0, 0))
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    archive.writestr(entry, source.read_bytes())
    return target


if __name__ == "__main__":
    print(build(Path(sys.argv[1] if len(sys.argv) > 1 else "dist/pinsage.zip")))
