"""Sets of items as bits: which lists have one of them, and where it is among them. numpy in, numpy out."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.mixing import read_only

_ZERO, _ONE, _SIX, _MASK = np.uint64(0), np.uint64(1), np.uint64(6), np.uint64(63)


def as_bits(ids: NDArray[np.integer], size: int) -> NDArray[np.uint64]:
    """A set of ids below size, one bit for each that could be."""
    bits = np.zeros((size >> 6) + 1, np.uint64)
    _set(read_only(ids, np.int64), bits)
    return bits


def rows_with(bits: NDArray[np.uint64], lists: NDArray[np.uint32], places: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which of the rows of lists [R, T] at some places [n] have an id of the set."""
    result = np.zeros(len(places), np.bool_)
    _find(bits, read_only(lists), read_only(places, np.int64), result)
    return result


def slots_of(bits: NDArray[np.uint64], members: NDArray[np.uint32], ids: NDArray[np.integer]) -> NDArray[np.int64]:
    """Where each id, of any shape, is among the ascending members of a set, given its bits too; -1 where it is not."""
    slots = np.empty(ids.shape, np.int64)
    _find_slots(bits, read_only(members), read_only(ids, np.int64).reshape(-1), slots.reshape(-1))
    return slots


@numba.njit(nogil=True, cache=True)
def _set(ids: Any, bits: Any) -> None:
    for k in range(len(ids)):
        place = np.uint64(ids[k])
        bits[place >> _SIX] |= _ONE << (place & _MASK)


@numba.njit(nogil=True, cache=True)
def _find(bits: Any, lists: Any, places: Any, result: Any) -> None:
    for row in range(len(result)):
        found, listed = _ZERO, lists[places[row]]
        for k in range(len(listed)):
            place = np.uint64(listed[k])
            found |= bits[place >> _SIX] >> (place & _MASK)
        result[row] = (found & _ONE) != _ZERO


@numba.njit(nogil=True, cache=True)
def _find_slots(bits: Any, members: Any, ids: Any, slots: Any) -> None:
    for k in range(len(ids)):
        place = np.uint64(ids[k])
        slots[k] = -1
        if (bits[place >> _SIX] >> (place & _MASK)) & _ONE != _ZERO:
            slots[k] = np.searchsorted(members, np.uint32(place))
