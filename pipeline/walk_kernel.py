"""Personalised-PageRank neighbourhoods by random walks, and what the kernels share: numpy in, numpy out.

A walk starts at an item and hops item, user, item: each hop steps to one of the item's users and from there to one of
that user's items, and counts a visit there. After every hop it ends with the restart probability, and after max_hops in
any case. The visit counts of an item's walks, without the item itself, estimate its personalised PageRank.

Random numbers are a hash of (seed, item, walk, hop): no state, so an item's row is the same in any order and on any
machine. How many of the walks make hop h is fixed at its expectation, and the first hop's steps to users are spread
evenly over the item's edges instead of drawn, which both lower the variance. All walks of several items take a step
together: their random reads overlap, and those, four per hop, are the cost. Memory per call: visits of a few items.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from numpy.typing import NDArray

from pipeline.contracts.datasets import open_manifest
from pipeline.contracts.replica import map_lists
from pipeline.contracts.schemas import ITEM_USERS, USER_ITEMS, Dataset
from pipeline.contracts.storage import Storage

_GOLDEN = 0x9E3779B97F4A7C15
_GOLDEN_32 = 0x9E3779B1  # 2 ** 32 / golden ratio: its multiples are spread evenly over 32 bits, whichever come first
_LOW_32 = 0xFFFFFFFF
_BLOCK_WALKS = 1024  # walks that step together: enough to overlap memory reads, few enough to stay in the cache
_FEW = 16  # candidates beyond those kept that are sorted rather than selected from
_SORTED_DIRECTLY = 128  # rows up to this long are sorted by counting who is ahead of whom


@dataclass(frozen=True)
class BipartiteGraph:
    """Both directions of the graph in compressed rows; every edge is in both.

    indptr int64 [N + 1], ids uint32 [E]. shares uint32 [E] or, unweighted, [0]: the running share of the row's weight
    up to and including each edge, in units of 2 ** -32, from -1 up: a row ends with 2 ** 32 - 1. item_ranks uint8: the
    items' degree_rank [N], or [0] to take it from item_indptr. A user's items must be in random order: any first part
    of them is then a uniform sample. A graph may hold the lists of some items: row r is then that of item_ids[r].
    """

    item_indptr: NDArray[np.int64]
    item_users: NDArray[np.uint32]
    item_shares: NDArray[np.uint32]
    user_indptr: NDArray[np.int64]
    user_items: NDArray[np.uint32]
    user_shares: NDArray[np.uint32]
    item_ranks: NDArray[np.uint8]
    item_ids: NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))

    @classmethod
    def open(cls, storage: Storage, cache: str | None) -> BipartiteGraph:
        """This host's memory-mapped copy of the run's graph, made if it is not there yet."""

        def lists(dataset: Dataset) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32]]:
            manifest = open_manifest(storage, dataset)
            shares = map_lists(storage, manifest, "shares", cache)[1]
            return *map_lists(storage, manifest, "neighbours", cache), shares

        return cls(*lists(ITEM_USERS), *lists(USER_ITEMS), np.zeros(0, np.uint8))


class GraphArrays(NamedTuple):
    """BipartiteGraph as the compiled functions take it."""

    item_indptr: Any
    item_users: Any
    item_shares: Any
    user_indptr: Any
    user_items: Any
    user_shares: Any
    item_ranks: Any
    item_ids: Any


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


def walks_per_hop(num_walks: int, max_hops: int, restart_probability: float) -> NDArray[np.int64]:
    """How many of an item's walks make hop 1, 2, ..., max_hops."""
    alive = num_walks * (1.0 - restart_probability) ** np.arange(max_hops)
    return np.maximum(np.round(alive).astype(np.int64), 0)


def visit_counts(
    graph: BipartiteGraph, items: NDArray[np.integer], per_hop: NDArray[np.int64], num_neighbours: int, seed: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
    """The most visited items of each given item; weighted if the graph is.

    Returns ids [B, num_neighbours], their visit counts in the same shape, both by count descending, then degree_rank
    descending, then id, padded with 0, and how many are real [B]. An item without users has none.
    """
    ids, counts, lengths = empty_rows(len(items), num_neighbours)
    _count_visits(graph_arrays(graph), read_only(items, np.int64), per_hop, np.uint64(seed), ids, counts, lengths)
    return ids, counts, lengths


def walk_ends(graph: BipartiteGraph, items: NDArray[np.integer], per_hop: NDArray[np.int64], seed: int) -> int:
    """The steps of visit_counts alone: the sum of all ids visited, for measuring what a step costs."""
    return int(_sum_visits(graph_arrays(graph), read_only(items, np.int64), per_hop, np.uint64(seed)))


def degree_ranks(indptr: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The degree_rank of every row, uint8 [N]."""
    ranks: NDArray[np.uint8] = _degree_ranks(read_only(indptr, np.int64))
    return ranks


def graph_arrays(graph: BipartiteGraph) -> GraphArrays:
    """The graph's arrays, all read-only, so that one compiled version serves memory-mapped graphs and others."""
    return GraphArrays(*(read_only(getattr(graph, name)) for name in GraphArrays._fields))


def read_only(array: NDArray[Any], dtype: Any = None) -> NDArray[Any]:
    """A read-only, contiguous view of an array, or a copy if its type has to change."""
    view = np.ascontiguousarray(array, dtype).view(np.ndarray)
    if view.flags.writeable:
        view = view[:]
        view.flags.writeable = False
    return view


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


def _generate_prefetch(typing_context: Any, array: Any, place: Any) -> Any:
    """Start to load array[place] into the cache; a place outside the array does no harm."""
    signature = numba.types.void(array, place)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        for_reading, keep, is_data = number(0), number(3), number(1)
        function = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, for_reading, keep, is_data])
        return context.get_dummy_value()

    return signature, generate


prefetch: Any = intrinsic(_generate_prefetch)


# ------------------------------------------------------------------------------------------------------- steps


@numba.njit(cache=True, inline="always")
def _mix(value: Any) -> Any:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, inline="always")
def share_at(point: Any, start: Any, degree: Any, shares: Any) -> Any:
    """The row's first edge whose running share reaches point (32 bits), without a branch to mispredict."""
    while degree > 1:
        half = degree >> 1
        start += half if np.int64(shares[start + half - 1]) < point else 0
        degree -= half
    return start


@numba.njit(cache=True, inline="always")
def _pick(point: Any, start: Any, degree: Any, shares: Any, weighted: Any) -> Any:
    """The place of a row's edge that 32 random bits choose: any alike, or in proportion to weight."""
    if weighted:
        return share_at(point, start, degree, shares)
    return start + ((point * degree) >> 32)


@numba.njit(cache=True, nogil=True)
def _walk_block(graph: Any, items: Any, per_hop: Any, seed: Any, bits: Any, edges: Any, visits: Any) -> None:
    """All walks from a few items that have users; visits [items, sum(per_hop)] get the items after hop 1, 2, ...

    Each loop is one of a hop's reads, for all walks: none waits for another, and asks memory for what the next loop
    reads. bits uint64 and edges int64 are [items, walks]: a hop's random bits, and where the walks are.
    """
    indptr, users, user_indptr, user_items = graph.item_indptr, graph.item_users, graph.user_indptr, graph.user_items
    weighted = len(graph.item_shares) > 0
    low, half, golden, one = np.int64(_LOW_32), np.uint64(32), np.uint64(_GOLDEN), np.uint64(1)
    before, now = 0, 0
    for hop in range(len(per_hop)):
        alive = per_hop[hop]
        going_on = per_hop[hop + 1] if hop + 1 < len(per_hop) else 0
        for row in range(len(items)):
            stream = _mix(_mix(seed + golden) ^ (np.uint64(items[row]) * golden))
            counter = stream + np.uint64(hop << 32) * golden
            for walk in range(alive):
                counter += golden
                bits[row, walk] = _mix(counter)
            if hop == 0:
                offset, start = np.int64(_mix(stream) >> half), indptr[items[row]]
                degree = indptr[items[row] + 1] - start
                for walk in range(alive):
                    point = (offset + walk * _GOLDEN_32) & low
                    edges[row, walk] = _pick(point, start, degree, graph.item_shares, weighted)
            else:
                for walk in range(alive):
                    here = np.uint64(visits[row, before + walk])
                    start = indptr[here]
                    point = np.int64(bits[row, walk] >> half)
                    edges[row, walk] = _pick(point, start, indptr[here + one] - start, graph.item_shares, weighted)
                    prefetch(users, edges[row, walk])
        for row in range(len(items)):
            for walk in range(alive):
                edges[row, walk] = users[np.uint64(edges[row, walk])]
                prefetch(user_indptr, edges[row, walk])
        for row in range(len(items)):
            for walk in range(alive):
                user = np.uint64(edges[row, walk])
                start = user_indptr[user]
                point = np.int64(bits[row, walk]) & low
                edges[row, walk] = _pick(point, start, user_indptr[user + one] - start, graph.user_shares, weighted)
                prefetch(user_items, edges[row, walk])
        for row in range(len(items)):
            for walk in range(alive):
                visits[row, now + walk] = user_items[np.uint64(edges[row, walk])]
            for walk in range(going_on):
                prefetch(indptr, visits[row, now + walk])
        before, now = now, now + alive


@numba.njit(cache=True, nogil=True)
def _with_users(graph: Any, items: Any) -> Any:
    """Places of the items that have any user."""
    places = np.empty(len(items), np.int64)
    count = 0
    for place in range(len(items)):
        places[count] = place
        count += graph.item_indptr[items[place] + 1] > graph.item_indptr[items[place]]
    return places[:count]


@numba.njit(cache=True, nogil=True)
def _sum_visits(graph: Any, items: Any, per_hop: Any, seed: Any) -> Any:
    places = _with_users(graph, items)
    size = max(1, _BLOCK_WALKS // max(per_hop[0], 1))
    bits, edges = np.empty((size, per_hop[0]), np.uint64), np.empty((size, per_hop[0]), np.int64)
    visits = np.empty((size, per_hop.sum()), np.uint32)
    total = 0
    for first in range(0, len(places), size):
        block = items[places[first : first + size]]
        _walk_block(graph, block, per_hop, seed, bits, edges, visits)
        for row in range(len(block)):
            for visit in range(visits.shape[1]):
                total += visits[row, visit]
    return total


@numba.njit(cache=True, nogil=True)
def _count_visits(graph: Any, items: Any, per_hop: Any, seed: Any, ids: Any, counts: Any, lengths: Any) -> None:
    places = _with_users(graph, items)
    size = max(1, _BLOCK_WALKS // max(per_hop[0], 1))
    bits, edges = np.empty((size, per_hop[0]), np.uint64), np.empty((size, per_hop[0]), np.int64)
    visits = np.empty((size, per_hop.sum()), np.uint32)
    scratch = make_scratch(visits.shape[1])
    scratch.adds[:] = 1
    for first in range(0, len(places), size):
        block = items[places[first : first + size]]
        _walk_block(graph, block, per_hop, seed, bits, edges, visits)
        for row in range(len(block)):
            place = places[first + row]
            lengths[place] = top_sums(
                visits[row], scratch.adds, visits.shape[1], block[row], graph.item_ranks, graph.item_indptr, scratch,
                ids[place], counts[place],
            )  # fmt: skip


# ---------------------------------------------------------------------------------- sums by id, and the largest


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
    return ((np.uint64(name) * np.uint64(_GOLDEN_32)) & np.uint64(_LOW_32)) >> np.uint64(32 - bits)


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
    mask, low, free, half = np.uint64((1 << bits) - 1), np.uint64(_LOW_32), np.uint64(0), np.uint64(32)
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
