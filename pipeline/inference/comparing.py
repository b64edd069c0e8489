"""What differs between two nights: vectors, lists, and which lists the differences reach. numpy in, numpy out."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.contracts.datasets import Manifest, arrow_to_lists
from pipeline.mixing import read_only

_ZERO, _ONE, _SIX, _MASK = np.uint64(0), np.uint64(1), np.uint64(6), np.uint64(63)


def same_shards(now: Manifest, then: Manifest, start: int, stop: int) -> bool:
    """Whether rows [start, stop) lie in shards of the same bytes, so that nobody has to look."""

    def covering(manifest: Manifest) -> list[tuple[int, str]]:
        firsts = np.concatenate([[0], np.cumsum([shard.rows for shard in manifest.shards])])
        return [
            (int(firsts[number]), shard.sha256)
            for number, shard in enumerate(manifest.shards)
            if firsts[number] < stop and firsts[number + 1] > start
        ]

    return covering(now) == covering(then)


def same_vectors(now: NDArray[Any], then: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows [n, width] have the same bits."""
    if now.dtype != then.dtype or now.shape != then.shape:
        return np.zeros(len(now), np.bool_)
    kind = f"u{now.dtype.itemsize}"
    result = np.zeros(len(now), np.bool_)
    _same_rows(read_only(now).view(kind), read_only(then).view(kind), result)
    return result


def same_lists(now: pa.Table, then: pa.Table) -> NDArray[np.bool_]:
    """Which rows of NEIGHBOURS are the same, ids and weights."""
    result = np.zeros(now.num_rows, np.bool_)
    _same_lists(_columns(now), _columns(then), result)
    return result


def _columns(lists: pa.Table) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    indptr, ids = arrow_to_lists(lists.column("neighbours"))
    weights = arrow_to_lists(lists.column("weights"))[1]
    return read_only(indptr, np.int64), read_only(ids), read_only(weights).view("u4")


def as_bits(ids: NDArray[np.integer], size: int) -> NDArray[np.uint64]:
    """A set of ids below size, one bit for each that could be."""
    bits = np.zeros((size >> 6) + 1, np.uint64)
    _set(read_only(ids, np.int64), bits)
    return bits


def rows_with(bits: NDArray[np.uint64], indptr: NDArray[np.integer], ids: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which lists have an id of the set."""
    result = np.zeros(len(indptr) - 1, np.bool_)
    _find(bits, read_only(indptr, np.int64), read_only(ids), result)
    return result


@numba.njit(nogil=True, cache=True)
def _same_rows(now: Any, then: Any, result: Any) -> None:
    for row in range(len(now)):
        same = True
        for j in range(now.shape[1]):
            same &= now[row, j] == then[row, j]
        result[row] = same


@numba.njit(nogil=True, cache=True)
def _same_lists(now: Any, then: Any, result: Any) -> None:
    starts, ids, weights = now
    old_starts, old_ids, old_weights = then
    for row in range(len(result)):
        start, old = starts[row], old_starts[row]
        length = starts[row + 1] - start
        same = length == old_starts[row + 1] - old
        if same:
            for k in range(length):
                same &= ids[start + k] == old_ids[old + k] and weights[start + k] == old_weights[old + k]
        result[row] = same


@numba.njit(nogil=True, cache=True)
def _set(ids: Any, bits: Any) -> None:
    for k in range(len(ids)):
        place = np.uint64(ids[k])
        bits[place >> _SIX] |= _ONE << (place & _MASK)


@numba.njit(nogil=True, cache=True)
def _find(bits: Any, indptr: Any, ids: Any, result: Any) -> None:
    for row in range(len(result)):
        for k in range(indptr[row], indptr[row + 1]):
            place = np.uint64(ids[k])
            if (bits[place >> _SIX] >> (place & _MASK)) & _ONE != _ZERO:
                result[row] = True
                break
