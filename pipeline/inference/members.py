"""Where items are: in sets, given as bits, and in tables of rows. numpy in, numpy out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.contracts.rows import Table
from pipeline.mixing import read_only

_ZERO, _ONE, _SIX, _MASK = np.uint64(0), np.uint64(1), np.uint64(6), np.uint64(63)
_TWO, _FOUR, _TOP = np.uint64(2), np.uint64(4), np.uint64(56)
_PAIRS, _FOURS, _BYTES, _EACH = (np.uint64(int(byte * 8, 16)) for byte in ("55", "33", "0f", "01"))
_BUCKETS = 12
"""Two to this power are the places of a table that are looked up, before shards are compared."""


@dataclass(frozen=True)
class Members:
    """A set of ids: one bit for each that could be, and of every 64 of them how many members are before.

    So a member's place among all is a count, not a search: 5 ns in place of 150.
    """

    bits: NDArray[np.uint64]
    before: NDArray[np.uint32]

    @classmethod
    def of(cls, ids: NDArray[np.integer], size: int) -> Members:
        """Some distinct ids below size."""
        bits = np.zeros((size >> 6) + 1, np.uint64)
        before = np.empty(len(bits), np.uint32)
        _set(read_only(ids, np.int64), bits, before)
        return cls(bits, before)

    def rows_with(self, lists: NDArray[np.uint32], places: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which of the rows of lists [R, T] at some places [n] have a member."""
        result = np.zeros(len(places), np.bool_)
        _find(read_only(self.bits), read_only(lists), read_only(places, np.int64), result)
        return result

    def find(
        self, ids: NDArray[np.integer], weights: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of some ids [n], of those that weigh something, are members: their places [k], and where in order of
        all members each is [k]."""
        own, shares = read_only(ids, np.int64), read_only(np.ones(0, np.float32) if weights is None else weights)
        found = np.empty((2, len(own)), np.int64)
        count = _find_members(read_only(self.bits), read_only(self.before), own, shares, found)
        return found[0, :count], found[1, :count]


def places_of(table: Table, ids: NDArray[np.integer], weights: NDArray[np.float32] | None = None) -> NDArray[np.int64]:
    """Where the rows of ids, of any shape, are in a table, as Table.places; of what weighs nothing any place."""
    weights = np.ones(ids.shape, np.float32) if weights is None else weights
    places = np.zeros(ids.shape, np.int64)
    firsts = table.first_ids
    shift = max(0, int(table.num_rows).bit_length() - _BUCKETS)
    starts = np.arange((table.num_rows >> shift) + 1) << shift
    shards = np.searchsorted(firsts, starts, side="right") - 1
    own, shares = read_only(ids, np.int64).reshape(-1), read_only(weights).reshape(-1)
    _find_places(own, shares, firsts, table.first_places - firsts, shards, shift, places.reshape(-1))
    return places


@numba.njit(nogil=True, cache=True, inline="always")
def _count(word: Any) -> Any:
    """Of its bits those that are 1: side by side in pairs, fours, bytes, and all bytes by one product."""
    word -= (word >> _ONE) & _PAIRS
    word = (word & _FOURS) + ((word >> _TWO) & _FOURS)
    word = (word + (word >> _FOUR)) & _BYTES
    return (word * _EACH) >> _TOP


@numba.njit(nogil=True, cache=True)
def _set(ids: Any, bits: Any, before: Any) -> None:
    for k in range(len(ids)):
        place = np.uint64(ids[k])
        bits[place >> _SIX] |= _ONE << (place & _MASK)
    total = _ZERO
    for word in range(len(bits)):
        before[word] = total
        total += _count(bits[word])


@numba.njit(nogil=True, cache=True)
def _find(bits: Any, lists: Any, places: Any, result: Any) -> None:
    for row in range(len(result)):
        found, listed = _ZERO, lists[places[row]]
        for k in range(len(listed)):
            place = np.uint64(listed[k])
            found |= bits[place >> _SIX] >> (place & _MASK)
        result[row] = (found & _ONE) != _ZERO


@numba.njit(nogil=True, cache=True)
def _find_members(bits: Any, before: Any, ids: Any, weights: Any, found: Any) -> Any:
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
        place = np.uint64(ids[places[k]])
        lower = bits[place >> _SIX] & ((_ONE << (place & _MASK)) - _ONE)
        slots[k] = before[place >> _SIX] + _count(lower)
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
