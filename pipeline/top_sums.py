"""Sums by id, and the largest of them: what every kernel of neighbourhoods ends with.

`top_sums` adds up entries (id, amount) and writes the largest sums in their order: by sum, then by the item's degree,
then by id. All are integers, so neither the order of the entries nor the selection changes a byte. Cost: two to seven
nanoseconds per entry; memory: Scratch, about sixty bytes per entry of one item.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.mixing import read_only

GOLDEN_32 = 0x9E3779B1  # 2 ** 32 / golden ratio: its multiples are spread evenly over 32 bits, whichever come first
LOW_32 = 0xFFFFFFFF
_FEW = 16  # candidates beyond those kept that are sorted rather than selected from
_SORTED_DIRECTLY = 128  # rows up to this long are sorted by counting who is ahead of whom


class Scratch(NamedTuple):
    """Memory that is used again for every item; see _scratch."""

    ids: Any
    adds: Any
    sketch: Any
    few_ids: Any
    few_adds: Any
    table: Any
    used: Any
    keys: Any
    names: Any
    spare_keys: Any
    spare_names: Any
    bins: Any


def degree_ranks(indptr: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The degree_rank of every row, uint8 [N]."""
    ranks: NDArray[np.uint8] = _degree_ranks(read_only(indptr, np.int64))
    return ranks


def empty_rows(size: int, width: int) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
    """Room for ids [size, width], their scores [size, width], and the rows' lengths [size]."""
    return np.zeros((size, width), np.uint32), np.zeros((size, width), np.int64), np.zeros(size, np.int64)


@numba.njit(cache=True)
def bit_length(value: Any) -> Any:
    """How many bits a number below 2 ** 32 has; none below 1."""
    length = 0
    for half in (16, 8, 4, 2, 1):
        if value >> (length + half):
            length += half
    return length + (value > 0)


@numba.njit(cache=True)
def degree_rank(degree: Any) -> Any:
    """An 8-bit logarithm of a degree: its bit length, then the three bits after the first. Never falls as it grows."""
    if degree <= 0:
        return 0
    if degree >= 1 << 31:
        return 255
    length = bit_length(degree)
    return (length << 3) | (((degree << 3) >> (length - 1)) & 7)


@numba.njit(cache=True, nogil=True)
def _degree_ranks(indptr: Any) -> Any:
    ranks = np.empty(len(indptr) - 1, np.uint8)
    for row in range(len(ranks)):
        ranks[row] = degree_rank(indptr[row + 1] - indptr[row])
    return ranks


@numba.njit(cache=True, inline="always")
def rank_of(item: Any, item_ranks: Any, item_indptr: Any) -> Any:
    """An item's degree_rank, from the ranks if there are any, else from its row."""
    if len(item_ranks):
        return np.int64(item_ranks[item])
    return degree_rank(item_indptr[item + np.uint64(1)] - item_indptr[item])


@numba.njit(cache=True, nogil=True)
def make_scratch(size: Any) -> Any:
    """Scratch for up to size entries of one item."""
    cells = 1 << _table_bits(size)
    return Scratch(
        np.empty(size, np.uint32), np.empty(size, np.uint32), np.empty(cells, np.uint32),
        np.empty(size + 1, np.uint32), np.empty(size + 1, np.uint32), np.zeros(cells, np.uint64),
        np.empty(size + 1, np.int64), np.empty(size + 1, np.int64), np.empty(size + 1, np.uint32),
        np.empty(size + 1, np.int64), np.empty(size + 1, np.uint32), np.empty(2048, np.int64),
    )  # fmt: skip


@numba.njit(cache=True)
def _table_bits(size: Any) -> Any:
    """Of a table for this many entries: eight times the room, as a collision costs more than a miss of the first cache,
    but no more than 32 KiB if twice the room will do."""
    return min(bit_length(8 * size), max(12, bit_length(2 * size)))


@numba.njit(cache=True, nogil=True)
def top_sums(
    ids: Any, adds: Any, size: Any, skip: Any, item_ranks: Any, item_indptr: Any, scratch: Any, top_ids: Any,
    top_scores: Any,
) -> Any:  # fmt: skip
    """Sum adds by id over the first size entries, and write the largest sums, without the id skip; returns how many.

    By sum descending, then degree_rank descending, then id. adds are at least 1; a sum is below 2 ** 32.
    Many entries are first summed in a sketch, one cell for all ids of a hash: no id has more than its cell. Only the
    entries of cells that reach a floor are then summed by id; if fewer ids than wanted reach it, it was too high.
    """
    wanted = len(top_ids)
    floor, bits = 0, 0
    if size >= 8 * wanted:
        bits = bit_length(2 * size)
        floor = _sketch_floor(ids, adds, size, wanted + wanted // 4 + 1, bits, scratch.sketch)
    while True:
        if floor > 1:
            few = _reaching(ids, adds, size, floor, bits, scratch)
            count = _sums(scratch.few_ids, scratch.few_adds, few, skip, floor, item_ranks, item_indptr, scratch)
        else:
            count = _sums(ids, adds, size, skip, 0, item_ranks, item_indptr, scratch)
        if count >= wanted or floor <= 1:
            break
        floor >>= 1
    kept = min(count, wanted)
    if kept:
        count = _narrow(scratch, count, kept)
        _sort(scratch, count)
        for k in range(kept):
            top_ids[k] = scratch.names[k]
            top_scores[k] = scratch.keys[k] >> 8
    return kept


@numba.njit(cache=True, inline="always")
def _cell(name: Any, bits: Any) -> Any:
    """The first bits of an id's 32-bit hash."""
    return ((np.uint64(name) * np.uint64(GOLDEN_32)) & np.uint64(LOW_32)) >> np.uint64(32 - bits)


@numba.njit(cache=True, nogil=True)
def _sketch_floor(ids: Any, adds: Any, size: Any, wanted: Any, bits: Any, sketch: Any) -> Any:
    """Sum adds by cell into sketch, and find a value that a few more cells than wanted reach, or 0."""
    cells = 1 << bits
    sketch[:cells] = 0
    total = np.int64(0)
    for k in range(size):
        total += np.int64(adds[k])
        sketch[_cell(ids[k], bits)] += adds[k]
    low, high = 0, total // wanted + 1
    guess = min(3 * total // size, high >> 1)
    for _ in range(12):
        if high - low <= 1:
            break
        reached = _count_reaching(sketch, cells, np.uint32(guess))
        if reached >= wanted:
            low = guess
            if reached <= wanted + wanted // 4:
                break
        else:
            high = guess
        guess = (low + high) >> 1 if high < 4 * low or low == 0 else 2 * low
    return low


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _count_reaching(sketch: Any, cells: Any, floor: Any) -> Any:
    """How many cells reach floor; counts in float32, which vectorises where numba's 64-bit integers do not."""
    count, one, none = np.float32(0), np.float32(1), np.float32(0)
    for cell in range(cells):
        count += one if sketch[cell] >= floor else none
    return count


@numba.njit(cache=True, nogil=True)
def _reaching(ids: Any, adds: Any, size: Any, floor: Any, bits: Any, scratch: Any) -> Any:
    """Copy the entries whose cell reaches floor to scratch.few_ids and few_adds; returns how many."""
    few_ids, few_adds, sketch = scratch.few_ids, scratch.few_adds, scratch.sketch
    count = np.uint64(0)
    for k in range(size):
        few_ids[count] = ids[k]
        few_adds[count] = adds[k]
        count += np.uint64(sketch[_cell(ids[k], bits)] >= floor)
    return np.int64(count)


@numba.njit(cache=True, nogil=True)
def _sums(
    ids: Any, adds: Any, size: Any, skip: Any, floor: Any, item_ranks: Any, item_indptr: Any, scratch: Any
) -> Any:
    """The ids whose sum reaches floor into scratch.names, sum << 8 | degree_rank into scratch.keys; returns how many.

    A slot of the table is sum << 32 | id, and 0 if free. What is not predictable is computed without a branch.
    """
    table, used, keys, names = scratch.table, scratch.used, scratch.keys, scratch.names
    bits = _table_bits(size)
    mask, low, free, half = np.uint64((1 << bits) - 1), np.uint64(LOW_32), np.uint64(0), np.uint64(32)
    count = np.uint64(0)
    for k in range(size):
        name = np.uint64(ids[k])
        slot = _cell(name, bits)
        found = table[slot]
        while (found != free) & ((found & low) != name):
            slot = (slot + np.uint64(1)) & mask
            found = table[slot]
        used[count] = np.int64(slot)
        count += np.uint64(found == free)
        table[slot] = (found | name) + (np.uint64(adds[k]) << half)
    reached = np.uint64(0)
    for k in range(count):
        slot = np.uint64(used[k])
        total, name = np.int64(table[slot] >> half), table[slot] & low
        table[slot] = free
        keys[reached] = (total << 8) | rank_of(name, item_ranks, item_indptr)
        names[reached] = np.uint32(name)
        reached += np.uint64((total >= floor) & (np.int64(name) != skip))
    return np.int64(reached)


@numba.njit(cache=True, nogil=True)
def _narrow(scratch: Any, count: Any, kept: Any) -> Any:
    """Drop what is not among the kept largest keys, or, of equal ones, smallest ids; returns how many stay, or a few
    more."""
    keys, names = scratch.keys, scratch.names
    sure, count = _select(scratch, 0, count, kept)
    if count > kept + _FEW:  # all undecided ones tie
        key = keys[sure]
        for k in range(sure, count):
            keys[k] = -np.int64(names[k])
        first = sure
        sure, count = _select(scratch, sure, count, kept)
        keys[first:count] = key
    return count


@numba.njit(cache=True, nogil=True)
def _select(scratch: Any, sure: Any, count: Any, kept: Any) -> Any:
    """Move keys that are surely among the kept largest to the front and drop those that surely are not.

    The first sure ones are. Returns (sure, count): those in between are few, or all equal.
    """
    keys, names, spare_keys, spare_names, bins = (
        scratch.keys, scratch.names, scratch.spare_keys, scratch.spare_names, scratch.bins,
    )  # fmt: skip
    while count > kept + _FEW:
        low, high = keys[sure], keys[sure]
        for k in range(sure, count):
            low, high = min(low, keys[k]), max(high, keys[k])
        if low == high:
            break
        shift = 0
        while (high - low) >> shift > 255:
            shift += 1
        bins[:256] = 0
        for k in range(sure, count):
            bins[(keys[k] - low) >> shift] += 1
        cut, above = 255, sure
        while above + bins[cut] < kept:
            above += bins[cut]
            cut -= 1
        undecided = 0
        for k in range(sure, count):
            key, name = keys[k], names[k]
            place = (key - low) >> shift
            spare_keys[undecided] = key
            spare_names[undecided] = name
            undecided += place == cut
            keys[sure] = key
            names[sure] = name
            sure += place > cut
        for k in range(undecided):
            keys[sure + k] = spare_keys[k]
            names[sure + k] = spare_names[k]
        count = sure + undecided
    return sure, count


@numba.njit(cache=True, nogil=True)
def _sort(scratch: Any, count: Any) -> None:
    """Sort the first count by key descending, then name ascending."""
    keys, names, spare_keys, spare_names = scratch.keys, scratch.names, scratch.spare_keys, scratch.spare_names
    if count > _SORTED_DIRECTLY:
        _radix_sort(scratch, count)
    else:
        for i in range(count):
            keys[i] = (keys[i] << 8) | (_SORTED_DIRECTLY - i)  # all differ: one comparison tells who is ahead
        for i in range(count):
            key, place = keys[i], 0
            for j in range(count):
                place += keys[j] > key
            spare_keys[place] = key >> 8
            spare_names[place] = names[i]
        for i in range(count):
            key, name = spare_keys[i], spare_names[i]
            place = i
            while place > 0 and keys[place - 1] == key and names[place - 1] > name:
                names[place] = names[place - 1]
                place -= 1
            keys[i], names[place] = key, name


@numba.njit(cache=True, nogil=True)
def _radix_sort(scratch: Any, count: Any) -> None:
    """By name, then by falling key, 11 bits at a time from the lowest; digits that all share are left out."""
    keys, names, spare_keys, spare_names, bins = (
        scratch.keys, scratch.names, scratch.spare_keys, scratch.spare_names, scratch.bins,
    )  # fmt: skip
    for digit in range(7):
        by_name = digit < 3
        shift = 11 * digit if by_name else 11 * (digit - 3)
        bins[:] = 0
        for k in range(count):
            value = np.int64(names[k]) if by_name else ~keys[k]
            bins[(value >> shift) & 2047] += 1
        value = np.int64(names[0]) if by_name else ~keys[0]
        if bins[(value >> shift) & 2047] == count:
            continue
        total = 0
        for k in range(2048):
            total, bins[k] = total + bins[k], total
        for k in range(count):
            value = np.int64(names[k]) if by_name else ~keys[k]
            place = (value >> shift) & 2047
            spare_keys[bins[place]] = keys[k]
            spare_names[bins[place]] = names[k]
            bins[place] += 1
        for k in range(count):
            keys[k] = spare_keys[k]
            names[k] = spare_names[k]
