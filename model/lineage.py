"""What a trained model depends on, and how an earlier run's is taken over.

Imports no torch, so that who only asks whether a model is up to date need not wait for it.
"""

from __future__ import annotations

import json

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings, select
from pipeline.contracts.datasets import Lineage, Manifest, open_manifest, read_file, take_over, trace
from pipeline.contracts.errors import DataError
from pipeline.contracts.storage import Storage

DESCRIPTION, WEIGHTS = "model.json", "model.safetensors"


def lineage(storage: Storage, settings: Settings, world_size: int) -> Lineage:
    """What the model depends on now; the number of ranks counts, as sums of floats depend on it.

    Without an epoch of training, only on the earlier model and on what features mean.
    """
    training, inputs = settings.task.training, {"world_size": str(world_size)}
    if training.previous is not None:
        inputs["previous model"] = open_manifest(Storage(training.previous), schemas.MODEL).content
    if training.epochs:
        return trace(storage, schemas.TRAIN, settings, inputs)
    inputs[schemas.ENCODERS.name] = open_manifest(storage, schemas.ENCODERS).content
    return Lineage(schemas.TRAIN.name, select(settings, schemas.TRAIN.settings), inputs)


def adopt(storage: Storage, settings: Settings, lineage: Lineage) -> Manifest:
    """Take the earlier run's model as it is, byte for byte. DataError if it is of another shape or other features."""
    earlier = Storage(str(settings.task.training.previous))
    check_fits(storage, earlier, settings)
    return take_over(storage, earlier, schemas.MODEL, lineage)


def check_fits(storage: Storage, earlier: Storage, settings: Settings) -> None:
    """Raise DataError unless an earlier run's model reads tonight's features and has the shape of the settings."""
    described = json.loads(read_file(earlier, open_manifest(earlier, schemas.MODEL), DESCRIPTION))
    remedy = "leave out task.training.previous and task.features.previous, to train from the beginning"
    ours, theirs = (open_manifest(where, schemas.ENCODERS).content for where in (storage, earlier))
    if ours != theirs:
        raise DataError(
            f"the model of task.training.previous, {earlier.url}, learned from features of other encoders than those "
            f"of {storage.url}; set task.features.previous to the same run, or {remedy}"
        )
    shape, before = settings.task.model.model_dump(mode="json"), described["model"]
    differ = [name for name, value in shape.items() if before.get(name) != value]
    if differ:
        told = ", ".join(f"task.model.{name} was {before.get(name)} and is {shape[name]}" for name in differ)
        raise DataError(f"the model of task.training.previous, {earlier.url}, has another shape: {told}; {remedy}")
    if settings.task.model.item_dimensions:
        _check_ids(storage, earlier, remedy)


def _check_ids(storage: Storage, earlier: Storage, remedy: str) -> None:
    """Raise DataError unless items of an earlier run have the same ids here: what a model learned of them is by id."""
    ours, theirs = (open_manifest(where, schemas.ITEMS) for where in (storage, earlier))
    if theirs.content not in (ours.content, ours.lineage.inputs.get("previous items")):
        raise DataError(
            f"the model of task.training.previous, {earlier.url}, has learned vectors of items by their ids, and "
            f"{storage.url} has numbered its items anew; set task.data.previous to the same run, or {remedy}"
        )
