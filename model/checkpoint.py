"""All training state, saved whole or not at all.

One object `model/checkpoint.pt` in the run: the SHA-256 of what follows, then what torch saves. It lies beside the
shards of MODEL without being one, so committing the model sweeps it away. It belongs to one lineage: another one's is
not resumed from. A checkpoint that cannot be used costs the time since the start, never the result.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
from typing import Any

import torch

from pipeline.contracts import schemas
from pipeline.contracts.storage import Storage

PATH = f"{schemas.MODEL.name}/checkpoint.pt"
_DIGEST_BYTES = hashlib.sha256().digest_size
logger = logging.getLogger(__name__)


def save(storage: Storage, fingerprint: str, state: dict[str, Any]) -> None:
    """Replace the checkpoint by this state: tensors, numbers, strings, lists, dicts. Memory: the state, once more."""
    buffer = io.BytesIO(bytes(_DIGEST_BYTES))
    buffer.seek(_DIGEST_BYTES)
    torch.save({"fingerprint": fingerprint, "state": state}, buffer)
    view = buffer.getbuffer()
    view[:_DIGEST_BYTES] = hashlib.sha256(view[_DIGEST_BYTES:]).digest()
    storage.write_bytes(PATH, view)


def read(storage: Storage) -> bytes | None:
    """The stored checkpoint as it is, for `decode`; None if there is none."""
    try:
        return storage.read_bytes(PATH)
    except FileNotFoundError:
        return None


def decode(data: bytes | None, fingerprint: str) -> dict[str, Any] | None:
    """The state to resume from, on the CPU; None, and a line in the log, where training starts from the beginning."""
    if data is None:
        return None
    if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
        logger.warning("%s is damaged: its checksum differs; training starts from the beginning", PATH)
        return None
    try:
        content = torch.load(io.BytesIO(data[_DIGEST_BYTES:]), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        logger.warning("%s cannot be read (%s); training starts from the beginning", PATH, error)
        return None
    if content["fingerprint"] != fingerprint:
        logger.info("%s is of other settings or inputs; training starts from the beginning", PATH)
        return None
    state: dict[str, Any] = content["state"]
    return state


def delete(storage: Storage) -> None:
    """Forget the checkpoint, if there is one."""
    storage.delete(PATH)
