"""Sums over neighbours, exact whatever their order: what makes every way of moving data give the same bytes.

A product weight x value is rounded once, to a multiple of a power of two that the layer's largest value decides, and
added as an integer. Integer sums have no order, so gathered or shuffled, in one part or in many, today's whole
catalogue or the few items that changed: an item's sum is the same to the last bit. Weights of a list sum to 1 and
values are not negative, so a sum stays below 2 ** bits. float32 layers keep 30 bits, more than float32 itself does for
the largest values; float16 layers 22, of which three bytes are sent.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.inference.halves import widened
from pipeline.mixing import read_only
from pipeline.walk_kernel import prefetch

BITS = {"float32": 30, "float16": 22}
"""Of a sum, by the layer's stored type."""
WIRE_BYTES = {"float32": 4, "float16": 3}
"""Of a sum, when it is sent."""
_AHEAD = 8
"""Neighbours that are asked for before they are needed."""
_LINE = 64


def largest_of(rows: NDArray[Any]) -> float:
    """The largest value, at least 0. Numbers of float16 from 0 up are in the order of their bits: quick to compare."""
    if rows.dtype != np.float16:
        return float(rows.max(initial=0))
    return float(rows.view(np.int16).max(initial=0).view(np.float16))


def top_of(ids: NDArray[np.integer], rows: NDArray[Any]) -> dict[str, Any]:
    """The largest value of items' rows, and the first item that has it; -1 if there are none."""
    values = rows.view(np.int16) if rows.dtype == np.float16 else rows
    return {
        "largest": largest_of(rows),
        "largest_id": int(ids[int(values.argmax()) // rows.shape[1]]) if rows.size else -1,
    }


def exponent_of(largest: float) -> int:
    """Of the least power of two that no value of a layer exceeds: it stays while the largest changes a little."""
    return math.frexp(largest)[1] if largest > 0 else 0


def quantum(exponent: int, dtype: str) -> float:
    """What an integer sum of 1 stands for."""
    return 2.0 ** (exponent - BITS[dtype])


def add_rows(
    rows: NDArray[Any],
    indptr: NDArray[np.integer],
    places: NDArray[np.integer],
    weights: NDArray[np.float32],
    unit: float,
    out: NDArray[np.int32],
    reduction: str = "sum",
) -> None:
    """Add to out [n, m] every list's weighted rows of a layer [R, m], float16 or float32, in multiples of unit.

    List i is places and weights [indptr[i]:indptr[i + 1]]; what weighs 0 adds nothing and may point at any row. With
    reduction `max` every value of out becomes the largest of itself and the list's, whatever they weigh.
    """
    stored = rows.view(np.uint16) if rows.dtype == np.float16 else rows
    bounds, found = read_only(indptr, np.int64), read_only(places, np.int64)
    if reduction == "sum":
        _add(read_only(stored), bounds, found, read_only(weights * np.float32(1 / unit)), out)
    else:
        _largest(read_only(stored), bounds, found, read_only(weights), np.float32(1 / unit), out)


@numba.njit(nogil=True, cache=True)
def _add(rows: Any, indptr: Any, places: Any, weights: Any, out: Any) -> None:
    """Two neighbours at a time: half the reads and writes of the sums."""
    width, half, step, flat = rows.shape[1], np.float32(0.5), _LINE // rows.itemsize, rows.reshape(-1)
    for i in range(len(indptr) - 1):
        sums = out[i]
        for at in range(indptr[i], indptr[i + 1], 2):
            for ahead in range(at + _AHEAD, min(at + _AHEAD + 2, len(places))):
                for line in range(0, width, step):
                    prefetch(flat, places[ahead] * width + line)
            has_two = at + 1 < indptr[i + 1]
            second = at + 1 if has_two else at
            wa, wb = weights[at], weights[second] if has_two else np.float32(0.0)
            if wa == 0 and wb == 0:
                continue
            a, b = rows[places[at]], rows[places[second]]
            for j in range(width):
                sums[j] += np.int32(wa * widened(a[j]) + half) + np.int32(wb * widened(b[j]) + half)


@numba.njit(nogil=True, cache=True)
def _largest(rows: Any, indptr: Any, places: Any, weights: Any, scale: Any, out: Any) -> None:
    for i in range(len(indptr) - 1):
        for at in range(indptr[i], indptr[i + 1]):
            if weights[at] > 0:
                row = rows[places[at]]
                for j in range(rows.shape[1]):
                    out[i, j] = max(out[i, j], np.int32(scale * widened(row[j]) + np.float32(0.5)))
