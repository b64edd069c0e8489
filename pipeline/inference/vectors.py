"""Vectors as they are stored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.contracts.errors import DataError
from pipeline.inference.halves import as_half, as_single
from pipeline.inference.network import Array


def as_stored(vectors: Array, dtype: str, name: Callable[[int], str]) -> Array:
    """The vectors in a type. DataError, with the first item's name by row, for what is no number or fits no float16."""
    stored: Array
    if dtype == "float16":
        stored, is_finite = as_half(as_single(vectors))
    else:
        stored, is_finite = as_single(vectors), bool(np.isfinite(vectors).all())
    if is_finite:
        return stored
    row = int((~np.isfinite(stored).all(axis=1)).argmax())
    if np.isfinite(vectors[row]).all():
        raise DataError(
            f"item {name(row)} has a value of {np.abs(vectors[row]).max():.6g}, and float16 ends at 65504; set "
            "task.inference.layer_dtype and task.inference.dtype to float32"
        )
    raise DataError(
        f"item {name(row)} got an embedding with NaN or infinity: the model has diverged; run `pinsage train --force` "
        "with a smaller task.training.learning_rate"
    )
