"""What the catalogue of releases keeps on storage: the pointer that readers follow, and a record of every release.

Below the site: `releases/live.json` (Pointer, the one object that is ever replaced), `releases/<id>.json` (Record),
`releases/pins/<id>.json`, `releases/leases/<id>/<holder>.json`; the release's data stays in its run, `runs/<id>`. Every
object ends with a checksum of itself, so that one that was cut short or edited by hand is told from one of ours.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from pipeline.contracts.errors import DataError

VERSION = 1
"""Of these objects; another one is refused."""
FOLDER, RUNS = "releases", "runs"
LIVE = f"{FOLDER}/live.json"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED = {"live", "pins", "leases"}


@dataclass(frozen=True)
class Record:
    """A release: which run, which bytes, what it promised; written once.

    datasets has the content hash of every dataset's manifest that readers may open; space_id names the vector space of
    the embeddings: the content of the model that made them. quality is what the run says of itself, gate the verdict
    that it was published under (None: no gate was asked).
    """

    release: str
    created_at: float
    created_by: str
    space_id: str
    datasets: dict[str, str]
    num_items: int
    num_bytes: int
    quality: dict[str, float] = field(default_factory=dict)
    gate: dict[str, Any] | None = None
    forced: bool = False

    @property
    def run(self) -> str:
        """Where its data lies, below the site."""
        return f"{RUNS}/{self.release}"


@dataclass(frozen=True)
class Pointer:
    """What is live, and the way back.

    stack: releases from the oldest to the live one; publishing pushes, rolling back pops to withdrawn. record is the
    checksum of the live one's record. sequence counts moves. collecting: what `gc` is deleting and nobody may publish,
    go back to or open. nonce makes every content another.
    """

    sequence: int = 0
    stack: tuple[str, ...] = ()
    withdrawn: tuple[str, ...] = ()
    collecting: tuple[str, ...] = ()
    record: str = ""
    space_id: str = ""
    moved_at: float = 0.0
    moved_by: str = ""
    action: str = ""
    nonce: str = ""

    @property
    def release(self) -> str | None:
        """The live release; None before the first."""
        return self.stack[-1] if self.stack else None

    @property
    def previous(self) -> str | None:
        """What a rollback leads to: the one below, unless `gc` has begun with it."""
        below = [name for name in self.stack[:-1] if name not in self.collecting]
        return below[-1] if below else None

    @property
    def released(self) -> frozenset[str]:
        """All that ever were live and are there."""
        return frozenset(self.stack + self.withdrawn)


Sealed = TypeVar("Sealed", Record, Pointer)


def seal(value: Record | Pointer, nonce: bool = False) -> bytes:
    """As stored: JSON with its own checksum; nonce gives it a content that never was."""
    tree: dict[str, Any] = {"version": VERSION, **asdict(value)}
    if nonce:
        tree["nonce"] = uuid.uuid4().hex
    return json.dumps({**tree, "checksum": _checksum(tree)}, indent=1, sort_keys=True).encode()


def unseal(kind: type[Sealed], data: bytes, where: str, remedy: str) -> Sealed:
    """What `seal` stored. Raises DataError, with the remedy, for anything else."""
    try:
        tree = json.loads(data)
        checksum, version = tree.pop("checksum"), tree.pop("version")
        if version != VERSION:
            raise ValueError(f"it is of version {version}, this code reads version {VERSION}")
        if checksum != _checksum({"version": version, **tree}):
            raise ValueError("its checksum is not that of its content: it was cut short or edited by hand")
        tuples = {f.name for f in fields(kind) if str(f.type).startswith("tuple")}
        values: dict[str, Any] = {name: tuple(value) if name in tuples else value for name, value in tree.items()}
        return kind(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is not what we wrote: {error}; {remedy}") from None


def digest(data: bytes) -> str:
    """What the pointer says of a record."""
    return hashlib.sha256(data).hexdigest()


def is_id(name: str) -> bool:
    """Whether it can be a release's id, which becomes part of paths."""
    return bool(_ID.fullmatch(name)) and ".." not in name and name not in _RESERVED


def checked_id(release: str) -> str:
    """The id, if it can be one. Raises DataError."""
    if not is_id(release):
        raise DataError(
            f"{release!r} cannot be a release: its id is the name of its run's folder, at most 100 letters, digits, "
            f"dots, dashes and underscores, not {', '.join(sorted(_RESERVED))}; `pinsage releases` lists them"
        )
    return release


def record_path(release: str) -> str:
    """Where the record of a release lies."""
    return f"{FOLDER}/{checked_id(release)}.json"


def whoami() -> str:
    """Who writes: user, host and process, for messages."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}, process {os.getpid()}"


def _checksum(tree: Mapping[str, Any]) -> str:
    return digest(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())
