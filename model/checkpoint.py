"""All training state, saved whole or not at all, while training goes on.

One object per checkpoint, `training/checkpoints/step-000001500.pt` in the run: the SHA-256 of what follows, then what
torch saves. The last few and the best few by the validation metric are kept until the model is there. A checkpoint
that is damaged is passed over for the one before it; one that cannot be written costs a line in the log.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pipeline.contracts import schemas
from pipeline.contracts.datasets import Lineage
from pipeline.contracts.errors import SettingsError, StorageError
from pipeline.contracts.storage import Storage

FOLDER = f"{schemas.TRAINING}/checkpoints"
_NAME = re.compile(r"step-(\d{9})\.pt")
_DIGEST_BYTES = hashlib.sha256().digest_size
_RANKS = "world_size"
logger = logging.getLogger(__name__)


class Keeper:
    """Writes checkpoints in a thread of its own, one at a time, and deletes those that have had their day.

    kept is [(name, metric or None)], oldest first: part of the state, so that a resumed run knows which were best.
    """

    def __init__(self, storage: Storage, lineage: Lineage, keep: int) -> None:
        self.storage, self.lineage, self.keep = storage, lineage, keep
        self.kept: list[tuple[str, float | None]] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def save(self, step: int, state: dict[str, Any], metric: float | None = None) -> None:
        """Store a copy of the state as it is now; waits only for the checkpoint before this one."""
        self.wait()
        name = f"step-{step:09d}.pt"
        entries = [*(entry for entry in self.kept if entry[0] != name), (name, metric)]
        last = {entry[0] for entry in entries[-self.keep :]}
        measured = [(value, other) for other, value in entries if value is not None]
        best = {other for _, other in sorted(measured)[-self.keep :]}
        before, self.kept = self.kept, [entry for entry in entries if entry[0] in last | best]
        content = {"lineage": asdict(self.lineage), "state": _copied({**state, "kept": [list(e) for e in self.kept]})}
        self._last = self._writer.submit(self._write, name, content, before)

    def wait(self) -> None:
        """Until what was saved is stored, or given up."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        self._writer.shutdown()

    def _write(self, name: str, content: dict[str, Any], before: list[tuple[str, float | None]]) -> None:
        buffer = io.BytesIO(bytes(_DIGEST_BYTES))
        buffer.seek(_DIGEST_BYTES)
        torch.save(content, buffer)
        view = buffer.getbuffer()
        view[:_DIGEST_BYTES] = hashlib.sha256(view[_DIGEST_BYTES:]).digest()
        try:
            self.storage.write_bytes(f"{FOLDER}/{name}", view)
            kept = {entry[0] for entry in self.kept}
            for other in self.storage.names(FOLDER):
                if _NAME.fullmatch(other) and other not in kept:
                    self.storage.remove(f"{FOLDER}/{other}")
        except StorageError as error:
            self.kept = before
            logger.warning("no checkpoint at %s: %s; training goes on, the one before it still counts", name, error)


def read(storage: Storage) -> bytes | None:
    """The newest checkpoint that is whole, for `decode`; None if there is none."""
    for name in sorted(filter(_NAME.fullmatch, storage.names(FOLDER)), reverse=True):
        try:
            return storage.read_with(f"{FOLDER}/{name}", _checked)
        except FileNotFoundError:
            logger.warning("%s/%s is listed and gone; the checkpoint before it is taken", FOLDER, name)
        except ValueError:
            logger.warning("%s/%s is damaged: its checksum differs; the checkpoint before it is taken", FOLDER, name)
    return None


def _checked(data: bytes) -> bytes:
    if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
        raise ValueError("another checksum")
    return data


def decode(data: bytes | None, lineage: Lineage) -> dict[str, Any] | None:
    """The state to resume from, on the CPU; None, and a line in the log, where training starts from the beginning.

    Raises SettingsError if the checkpoint is of other settings: days of training are not thrown away for a word that
    was changed, nor gone on with under another meaning.
    """
    if data is None:
        return None
    try:
        content = torch.load(io.BytesIO(data[_DIGEST_BYTES:]), map_location="cpu", weights_only=True)
        saved, state = Lineage(**content["lineage"]), content["state"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        logger.warning("the checkpoint cannot be read (%s); training starts from the beginning", error)
        return None
    inputs = {name for name in saved.inputs.keys() | lineage.inputs.keys() if name != _RANKS}
    changed = sorted(name for name in inputs if saved.inputs.get(name) != lineage.inputs.get(name))
    if changed:
        logger.info("the checkpoint is of other data (%s); training starts from the beginning", ", ".join(changed))
        return None
    before, now = _flat(saved.settings), _flat(lineage.settings)
    differ = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    meaning = [name for name in differ if not name.startswith("resources.")]
    if meaning:
        shown = ", ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in meaning)
        raise SettingsError(
            f"there is a checkpoint at epoch {state['position'][0]} step {state['position'][1]} of other settings: "
            f"{shown}; set them back to go on from it, or give it up with `pinsage train --force`"
        )
    differ += [_RANKS] if saved.inputs.get(_RANKS) != lineage.inputs.get(_RANKS) else []
    if differ:
        logger.warning("%s changed since the checkpoint: the last bits of the weights may, too", ", ".join(differ))
    found: dict[str, Any] = state
    return found


def delete(storage: Storage) -> None:
    """Forget all checkpoints."""
    storage.delete(FOLDER)


def _copied(tree: Any) -> Any:
    """The same tree with every tensor copied to memory of its own: training goes on changing the original."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {name: _copied(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_copied(value) for value in tree]
    return tree


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return found
