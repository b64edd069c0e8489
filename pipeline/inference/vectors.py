"""Vectors as they are stored, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.contracts.errors import DataError
from pipeline.inference.halves import as_half, as_single
from pipeline.inference.network import Array
from pipeline.steps import Report


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


def statistics(vectors: Array) -> Report:
    """Of a shard's embeddings: how many, how many are all zeros, and their lengths."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    return {
        "items": len(norms),
        "zeros": int((norms == 0).sum()),
        "norm_sum": float(norms.sum()),
        "norm_squares": float((norms**2).sum()),
        "norms": [float(norms.min()), float(norms.max())] if len(norms) else [],
        "width": vectors.shape[1],
        "dtype": vectors.dtype.str,
    }


def describe_embeddings(reports: list[Report]) -> dict[str, Any]:
    """What the manifest says of all embeddings."""
    items = sum(report["items"] for report in reports)
    mean = sum(report["norm_sum"] for report in reports) / max(1, items)
    squares = sum(report["norm_squares"] for report in reports) / max(1, items)
    norms = [norm for report in reports for norm in report["norms"]]
    return {
        "items": items, "zeros": sum(report["zeros"] for report in reports), "norm_mean": mean,
        "norm_deviation": max(0.0, squares - mean**2) ** 0.5, "norm_least": min(norms, default=0.0),
        "norm_most": max(norms, default=0.0), "width": reports[0]["width"], "dtype": reports[0]["dtype"],
    }  # fmt: skip
