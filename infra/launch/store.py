"""Files to an object store and back, by any fsspec URL: what the containers' demo needs of a store's own tools.

python -m infra.launch.store demo s3://bucket                  make the bucket; put demo and settings there
python -m infra.launch.store fetch s3://bucket/folder FOLDER   copy what lies below a URL to this machine
"""

from __future__ import annotations

import sys
from pathlib import Path

import fsspec

INFRA = Path(__file__).resolve().parents[1]


def put_demo(url: str) -> int:
    """Store the demo's data and all settings files below url, as they lie in infra/; returns how many files."""
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.makedirs(root.split("/")[0] if not root.startswith("/") else root, exist_ok=True)
    files = sorted([*(INFRA / "demo").glob("*.parquet"), *(INFRA / "settings").glob("*.yaml")])
    for file in files:
        filesystem.pipe_file(f"{root}/{file.relative_to(INFRA)}", file.read_bytes())
    return len(files)


def fetch(url: str, folder: Path) -> int:
    """Copy every object below url into folder; returns how many. Raises FileNotFoundError if there are none."""
    filesystem, root = fsspec.core.url_to_fs(url)
    names = filesystem.find(root)
    if not names:
        raise FileNotFoundError(f"nothing lies below {url}")
    for name in names:
        target = folder / name[len(root.rstrip("/")) + 1 :]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(filesystem.cat_file(name))
    return len(names)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["demo", url]:
            print(f"{put_demo(url)} files put below {url}")
        case ["fetch", url, folder]:
            print(f"{fetch(url, Path(folder))} files copied to {folder}")
        case _:
            sys.exit(__doc__)
