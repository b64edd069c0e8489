"""Seeds to blocks, with the edges being predicted taken out.

Nodes are numbered in the order in which they are met: seeds first, then their neighbours, then theirs. So the nodes of
every layer are a prefix of the nodes of the layer below, and one neighbour table serves all layers: layer k reads its
first sizes[k] rows. Cost: one pass over what is read of the lists of sizes[1] nodes; memory: 16 bytes per entry that is
read, 8 more per entry of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ids = NDArray[np.uint32]
_SUSPECTS = 1 << 16
"""Slots, by the last bits of an id, that say where something may be hidden."""
_AT_ONCE = 16
"""Lists that are fetched beside each other."""


@dataclass(frozen=True)
class NeighbourTable:
    """Every item's neighbour list: row r is [indptr[r], indptr[r + 1]); width is the length of the longest."""

    indptr: NDArray[np.int64]
    neighbours: Ids
    weights: NDArray[np.float32]
    width: int

    @staticmethod
    def of(indptr: NDArray[np.int64], neighbours: Ids, weights: NDArray[np.float32]) -> NeighbourTable:
        """A table over plain (memory-mapped) arrays; reads indptr once."""
        return NeighbourTable(indptr, neighbours, weights, width=int(np.diff(indptr).max(initial=0)))


@dataclass(frozen=True)
class Hop:
    """The lists of the nodes that so many steps lead to from the seeds, as Blocks has them, and as wide as is read."""

    index: NDArray[np.int32]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class Blocks:
    """All that K layers need to embed the seeds.

    ids [sizes[0]] are the items whose features are read, index [sizes[1], T] their neighbours as positions in ids and
    weights [sizes[1], T] their importance: rows sum to 1, or to 0 without neighbours; padding is index 0, weight 0.
    sizes[k] nodes leave layer k; sizes[K] are the seeds. hops are index and weights in narrower pieces.
    """

    ids: Ids
    hops: tuple[Hop, ...]
    sizes: tuple[int, ...]

    @cached_property
    def index(self) -> NDArray[np.int32]:
        """All hops', one below the other."""
        return _stacked([hop.index for hop in self.hops], np.int32)

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """All hops', one below the other."""
        return _stacked([hop.weights for hop in self.hops], np.float32)


class HiddenEdges(NamedTuple):
    """Edges that no list may show: objects[i] is hidden in the list of subjects[i]; sorted by subject."""

    subjects: Ids
    objects: Ids


def hide(query: Ids, positive: Ids) -> HiddenEdges:
    """Both directions of every pair of the global batch: what is to be predicted must not be read off the graph."""
    subjects, objects = np.concatenate([query, positive]), np.concatenate([positive, query])
    order = np.argsort(subjects, kind="stable")
    return HiddenEdges(subjects[order], objects[order])


def reach(num_layers: int, fan_outs: Sequence[int] | None, width: int) -> tuple[int, ...]:
    """The most entries of a list that any layer reads: of the seeds', of their neighbours', and so on [num_layers].

    fan_outs are the layers', from the features up; all layers read the seeds, only the first the outermost nodes.
    """
    read = [min(width, fan_out) for fan_out in fan_outs or [width] * num_layers]
    return tuple(max(read[: num_layers - hop]) for hop in range(num_layers))


def build_blocks(
    table: NeighbourTable,
    seeds: Ids,
    hidden: HiddenEdges,
    widths: Sequence[int],
    alone: NDArray[np.bool_] | None = None,
) -> Blocks:
    """Blocks that embed the distinct seeds with a layer for each of widths, see reach; no list shows a hidden edge.

    What is left of a list with a hidden entry is scaled back to sum 1. Seeds that are alone [seeds] get empty lists."""
    ids, sizes = seeds, [len(seeds)]
    hops = []
    read = 0
    empty = np.zeros(len(seeds), np.bool_) if alone is None else alone
    for most in widths:
        lists, weights, _ = _read_lists(
            ids[read:],
            table.indptr,
            table.neighbours,
            table.weights,
            hidden.subjects,
            hidden.objects,
            empty,
            most,
        )
        read = len(ids)
        ids, numbers = _renumber(ids, lists, weights, len(table.indptr) - 1)
        empty = np.zeros(len(ids) - read, np.bool_)
        hops.append(Hop(numbers, weights))
        sizes.append(len(ids))
    return Blocks(ids, tuple(hops), tuple(reversed(sizes)))


def _stacked(parts: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    """The parts one below the other, filled up with 0 on the right."""
    rows = np.cumsum([0, *map(len, parts)])
    into = np.zeros((rows[-1], max((part.shape[1] for part in parts), default=0)), dtype)
    for first, part in zip(rows, parts, strict=False):
        into[first : first + len(part), : part.shape[1]] = part
    return into


def distinct(ids: Ids, num_items: int) -> tuple[Ids, NDArray[np.int32]]:
    """The distinct ids in order of appearance, and each id's position among them."""
    found, numbers = _renumber(ids[:0], ids[None, :], np.ones((1, len(ids)), np.float32), num_items)
    return found, numbers[0]


@njit(nogil=True, cache=True)
def _read_lists(
    rows: Ids,
    indptr: NDArray[Any],
    neighbours: Ids,
    weights: NDArray[Any],
    subjects: Ids,
    objects: Ids,
    empty: NDArray[np.bool_],
    most: int,
) -> tuple[NDArray[Any], NDArray[Any], Any]:
    """The first `most` entries of the rows' lists that are not hidden, as ids and weights [R, most], padded with 0.

    Rows lie anywhere in memory: those of _AT_ONCE lists are asked for at once, and what is touched for that returned,
    so that the compiler does not leave it out.
    """
    lists = np.zeros((rows.size, most), np.uint32)
    result = np.zeros((rows.size, most), np.float32)
    suspects = np.zeros(_SUSPECTS, np.bool_)  # most rows are told by it not to be among the subjects
    for subject in subjects:
        suspects[subject & (_SUSPECTS - 1)] = True
    starts, stops, touched = np.empty(_AT_ONCE, np.int64), np.empty(_AT_ONCE, np.int64), np.float32(0)
    for r in range(rows.size):
        place = r % _AT_ONCE
        if place == 0:
            some = min(_AT_ONCE, rows.size - r)
            for k in range(some):
                starts[k] = indptr[rows[r + k]]
                stops[k] = indptr[rows[r + k] + np.int64(1)]
            for k in range(some):
                if starts[k] < stops[k]:
                    last = min(starts[k] + most, stops[k]) - 1
                    touched += neighbours[starts[k]] + weights[starts[k]] + neighbours[last] + weights[last]
        start = starts[place]
        length = 0 if empty[r] else stops[place] - start
        full = min(most, length)  # entries without anything hidden
        if not suspects[rows[r] & (_SUSPECTS - 1)]:
            for t in range(full):
                lists[r, t] = neighbours[start + t]
                result[r, t] = weights[start + t]
            continue
        first_hidden = np.searchsorted(subjects, rows[r])
        total = 0.0
        used = 0
        for t in range(length):
            if used == most:
                break
            shown = True
            place = first_hidden
            while place < subjects.size and subjects[place] == rows[r]:
                shown &= objects[place] != neighbours[start + t]
                place += 1
            if shown:
                lists[r, used] = neighbours[start + t]
                result[r, used] = weights[start + t]
                total += weights[start + t]
                used += 1
        if used < full and total > 0:
            for t in range(used):
                result[r, t] = np.float32(result[r, t] / total)
    return lists, result, touched


@njit(nogil=True, cache=True)
def _renumber(known: Ids, lists: Ids, weights: NDArray[Any], num_items: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Positions of the lists' ids in (known, then the new ones as they appear): (all ids, positions).

    Entries of weight 0 add no id and get position 0. One open-addressing hash table, no sort; it grows with what is
    found, as most entries repeat another.
    """
    ids = np.empty(min(known.size + lists.size, num_items), np.uint32)
    numbers = np.zeros(lists.shape, np.int32)
    count = known.size
    ids[:count] = known
    slots = _slots_of(ids[:count])
    for r in range(lists.shape[0]):
        for t in range(lists.shape[1]):
            if weights[r, t] == 0:
                continue
            slot = _slot_of(lists[r, t], slots, ids)
            if slots[slot] < 0:
                slots[slot] = count
                ids[count] = lists[r, t]
                count += 1
                if 2 * count > slots.size:
                    numbers[r, t] = count - 1
                    slots = _slots_of(ids[:count])
                    continue
            numbers[r, t] = slots[slot]
    return ids[:count].copy(), numbers


@njit(nogil=True, cache=True)
def _slots_of(ids: Ids) -> NDArray[Any]:
    """A hash table of distinct ids' positions, with room for as many more."""
    bits = 4
    while (1 << bits) < 4 * ids.size:
        bits += 1
    slots = np.full(1 << bits, -1, np.int32)
    for number in range(ids.size):
        slots[_slot_of(ids[number], slots, ids)] = number
    return slots


@njit(nogil=True, cache=True)
def _slot_of(key: int, slots: NDArray[Any], ids: Ids) -> Any:
    """The slot that holds key, or the free one where it belongs."""
    mask = slots.size - 1
    product = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    slot = np.int64(product >> np.uint64(32)) & mask
    while slots[slot] >= 0 and ids[slots[slot]] != key:
        slot = (slot + 1) & mask
    return slot
