"""Where items are: in sets, given as bits, and in tables of rows. numpy in, numpy out."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.contracts.rows import Table
from pipeline.mixing import read_only

_ZERO, _ONE, _SIX, _MASK = np.uint64(0), np.uint64(1), np.uint64(6), np.uint64(63)
_BUCKETS = 12
"""Two to this power are the places of a table that are looked up, before shards are compared."""


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


def members_of(
    bits: NDArray[np.uint64],
    members: NDArray[np.uint32],
    ids: NDArray[np.integer],
    weights: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of some ids [n], of those that weigh something, are in a set: their places [k], and where in the set [k].

    The set is given as bits and as its ascending members.
    """
    own, shares = read_only(ids, np.int64), read_only(np.ones(0, np.float32) if weights is None else weights)
    found = np.empty((2, len(own)), np.int64)
    count = _find_members(bits, read_only(members), own, shares, found)
    return found[0, :count], found[1, :count]


def places_of(table: Table, ids: NDArray[np.integer], weights: NDArray[np.float32]) -> NDArray[np.int64]:
    """Where the rows of ids, of any shape, are in a table, as Table.places; of what weighs nothing any place."""
    places = np.zeros(ids.shape, np.int64)
    firsts = table.first_ids
    shift = max(0, int(table.num_rows).bit_length() - _BUCKETS)
    starts = np.arange((table.num_rows >> shift) + 1) << shift
    shards = np.searchsorted(firsts, starts, side="right") - 1
    own, shares = read_only(ids, np.int64).reshape(-1), read_only(weights).reshape(-1)
    _find_places(own, shares, firsts, table.first_places - firsts, shards, shift, places.reshape(-1))
    return places


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
def _find_members(bits: Any, members: Any, ids: Any, weights: Any, found: Any) -> Any:
    """Without a branch for what is seldom true and cannot be foretold."""
    places, slots = found[0], found[1]
    count: Any = 0
    for k in range(len(ids)):
        place = np.uint64(ids[k])
        places[count] = k
        count += np.int64((bits[place >> _SIX] >> (place & _MASK)) & _ONE) & np.int64(
            not len(weights) or weights[k] > 0
        )
    for k in range(count):
        slots[k] = np.searchsorted(members, np.uint32(ids[places[k]]))
    return count


@numba.njit(nogil=True, cache=True)
def _find_places(ids: Any, weights: Any, firsts: Any, gaps: Any, shards: Any, shift: Any, places: Any) -> None:
    """shards has the shard of every 2 ** shift-th id: seldom is an id's own another."""
    for k in range(len(ids)):
        if weights[k] > 0:
            shard = shards[ids[k] >> shift]
            while shard + 1 < len(firsts) and firsts[shard + 1] <= ids[k]:
                shard += 1
            places[k] = ids[k] + gaps[shard]
