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
from pipeline.inference.lanes import LANES, ROWS, add_lanes
from pipeline.inference.network import Network, filled
from pipeline.mixing import read_only
from pipeline.walk_kernel import prefetch

BITS = {"float32": 30, "float16": 22}
"""Of a sum, by the layer's stored type."""
WIRE_BYTES = {"float32": 4, "float16": 3}
"""Of a sum, when it is sent or kept."""
_AHEAD = 4
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

    List i is places and weights [indptr[i]:indptr[i + 1]]; what weighs 0 adds nothing, and points at any row. With
    reduction `max` every value of out becomes the largest of itself and the list's, whatever they weigh.
    """
    stored = rows.view(np.uint16) if rows.dtype == np.float16 else rows
    bounds, found = read_only(indptr, np.int64), read_only(places, np.int64)
    if reduction == "sum":
        _add(read_only(stored), bounds, found, read_only(weights * np.float32(1 / unit)), out)
    else:
        _largest(read_only(stored), bounds, found, read_only(weights), np.float32(1 / unit), out)


def scaled(sums: NDArray[np.int32], unit: float) -> NDArray[np.float32]:
    """What the sums stand for, as float32, rounded once: the unit is a power of two."""
    values = sums.astype(np.float32)
    values *= np.float32(unit)
    return values


def pooled(network: Network, sums: Any, unit: float) -> Any:
    """What a layer's combine reads: the sums as float32, a block of them."""
    if isinstance(sums, np.ndarray):
        return scaled(filled(sums, network.block), unit)
    return network.scale_held(sums, unit)


def packed(sums: NDArray[np.int32], dtype: str) -> NDArray[np.uint8]:
    """Sums [n, m] as they are sent or kept: of every integer the bytes that it has, low ones first."""
    if WIRE_BYTES[dtype] == 4:
        return np.ascontiguousarray(sums, "<i4").view(np.uint8)
    result = np.empty((len(sums), 3 * sums.shape[1]), np.uint8)
    _pack(read_only(sums).reshape(-1), result.reshape(-1))
    return result


def unpacked(data: NDArray[np.uint8], dtype: str) -> NDArray[np.int32]:
    """What was packed; to be written to."""
    if WIRE_BYTES[dtype] == 4:
        whole: NDArray[np.int32] = data.view("<i4").astype(np.int32)
        return whole
    result = np.empty((len(data), data.shape[1] // 3), np.int32)
    _unpack(read_only(data).reshape(-1), result.reshape(-1))
    return result


@numba.njit(nogil=True, cache=True)
def _pack(sums: Any, data: Any) -> None:
    for k in range(len(sums)):
        for byte in range(3):
            data[3 * k + byte] = np.uint8((sums[k] >> (8 * byte)) & 255)


@numba.njit(nogil=True, cache=True)
def _unpack(data: Any, sums: Any) -> None:
    for k in range(len(sums)):
        low, middle, high = np.int32(data[3 * k]), np.int32(data[3 * k + 1]), np.int32(data[3 * k + 2])
        sums[k] = low | (middle << np.int32(8)) | (high << np.int32(16))


@numba.njit(nogil=True, cache=True)
def _add(rows: Any, indptr: Any, places: Any, weights: Any, out: Any) -> None:
    """Four neighbours at a time: a quarter of the reads and writes of the sums."""
    width, step, flat, sums, none = (
        rows.shape[1],
        _LINE // rows.itemsize,
        rows.reshape(-1),
        out.reshape(-1),
        len(places),
    )
    whole, nothing = width // LANES * LANES, np.float32(0)
    for i in range(len(indptr) - 1):
        stop = indptr[i + 1]
        for at in range(indptr[i], stop, ROWS):
            for ahead in range(at + _AHEAD, min(at + _AHEAD + ROWS, none)):
                for line in range(0, width, step):
                    prefetch(flat, places[ahead] * width + line)
            b, c, d = min(at + 1, stop - 1), min(at + 2, stop - 1), min(at + 3, stop - 1)
            wb, wc = weights[b] if b > at else nothing, weights[c] if c > b else nothing
            shares = (weights[at], wb, wc, weights[d] if d > c else nothing)
            if shares == (nothing, nothing, nothing, nothing):
                continue
            first = (places[at] * width, places[b] * width, places[c] * width, places[d] * width)
            for j in range(0, whole, LANES):
                own = (first[0] + j, first[1] + j, first[2] + j, first[3] + j)
                add_lanes(sums, i * width + j, flat, own, shares)
            for j in range(whole, width):
                for k in range(ROWS):
                    sums[i * width + j] += np.int32(shares[k] * widened(flat[first[k] + j]) + np.float32(0.5))


@numba.njit(nogil=True, cache=True)
def _largest(rows: Any, indptr: Any, places: Any, weights: Any, scale: Any, out: Any) -> None:
    for i in range(len(indptr) - 1):
        for at in range(indptr[i], indptr[i + 1]):
            if weights[at] > 0:
                row = rows[places[at]]
                for j in range(rows.shape[1]):
                    out[i, j] = max(out[i, j], np.int32(scale * widened(row[j]) + np.float32(0.5)))
