"""What a trained model depends on. Imports no torch, so that who only asks whether it is up to date need not wait."""

from __future__ import annotations

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage, trace
from pipeline.contracts.storage import Storage


def lineage(storage: Storage, settings: Settings, world_size: int) -> Lineage:
    """What the model depends on now; the number of ranks counts, as sums of floats depend on it."""
    return trace(storage, schemas.TRAIN, settings, {"world_size": str(world_size)})
