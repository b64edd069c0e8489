"""Which way an attempt goes, and that what an earlier one left is of the same way, and still there.

Shard 7 has other items where they were laid out otherwise, and a change is one against some earlier run: neither is in
the stage's lineage, as all ways give the same bytes in the end. What passes between layers is not safe from a crash of
the machine, so it is read and compared after one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.contracts import schemas
from pipeline.contracts.datasets import MANIFEST, Lineage, withdraw_broken
from pipeline.contracts.storage import Storage

_NOTE = "way.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_LAYERS = schemas.LAYERS.name
AGAIN = f"{_LAYERS}/again"
"""What an incremental run makes again."""


def go_on(storage: Storage, folder: str, lineage: Lineage, way: Mapping[str, Any]) -> None:
    """Leave of what lies in the folder what can be gone on from this way: all, or nothing; note the way."""
    told = {**way, "lineage": lineage.fingerprint}
    now = {"way": json.loads(json.dumps(told)), "started": _started(storage)}
    known = _noted(storage, folder)
    if known == now:
        return
    if known is None or known["way"] != now["way"]:
        storage.delete(folder)
    else:
        withdraw_broken(storage, folder)
    storage.write_bytes(f"{folder}/{_NOTE}", json.dumps(now, sort_keys=True).encode())


def is_under_way(storage: Storage, lineage: Lineage) -> bool:
    """Whether an attempt has begun to make all items: what it has made is gone on from, whatever could be done else.

    An incremental run would put the earlier run's layers in the place of its own.
    """
    known = _noted(storage, _LAYERS)
    return known is not None and known["way"].get("lineage") == lineage.fingerprint


def sweep(storage: Storage, lineage: Lineage) -> None:
    """Delete what a run that was killed after its embeddings were there had no time to delete."""
    known = _noted(storage, _LAYERS)
    all_of_it = known is not None and is_under_way(storage, lineage) and not known["way"]["keeps"]
    storage.delete(_LAYERS if all_of_it else AGAIN)


def finish_again(storage: Storage, keeps: bool) -> None:
    """Delete what an incremental run needs no more."""
    storage.remove(f"{_LAYERS}/{_NOTE}")  # of an attempt at a whole run before it
    storage.delete(AGAIN if keeps else _LAYERS)


def let_go(storage: Storage) -> None:
    """Delete what was kept; what remains if that is broken off says no more that it is whole."""
    for path in storage.files(_LAYERS):
        if path.endswith(f"/{MANIFEST}"):
            storage.remove(f"{_LAYERS}/{path}")
    storage.delete(_LAYERS)


def _noted(storage: Storage, folder: str) -> dict[str, Any] | None:
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        note = json.loads(storage.read_bytes(f"{folder}/{_NOTE}"))
        return {"way": dict(note["way"]), "started": note["started"]}
    return None


def _started(storage: Storage) -> str:
    """Which start of this machine it is, where what was written may be lost by the next; of a store nothing is."""
    if storage.is_local:
        with suppress(OSError):
            return _BOOT.read_text().strip()
    return ""
