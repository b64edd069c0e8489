"""Personalised-PageRank neighbourhoods by random walks: numpy in, numpy out.

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
from functools import lru_cache
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
from pipeline.mixing import GOLDEN, mix, read_only
from pipeline.top_sums import (
    GOLDEN_32,
    LOW_32,
    empty_rows,
    make_scratch,
    top_sums,
)
from pipeline.top_sums import degree_rank as degree_rank
from pipeline.top_sums import degree_ranks as degree_ranks

_MOST_RANKS = 1 << 28  # of items' ranks that every process keeps: a quarter of a GiB
_BLOCK_WALKS = 1024  # walks that step together: enough to overlap memory reads, few enough to stay in the cache


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

        items, users = lists(ITEM_USERS), lists(USER_ITEMS)
        assert isinstance(items[0], np.memmap)
        return cls(*items, *users, _kept_ranks(str(items[0].filename), len(items[0])))


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


@lru_cache(maxsize=1)
def _kept_ranks(indptr_file: str, size: int) -> NDArray[np.uint8]:
    """The items' ranks, made once per process: a byte is read faster than two row pointers. None if size is huge."""
    if size > _MOST_RANKS:
        return np.zeros(0, np.uint8)
    return degree_ranks(np.load(indptr_file, mmap_mode="r"))


def graph_arrays(graph: BipartiteGraph) -> GraphArrays:
    """The graph's arrays, all read-only, so that one compiled version serves memory-mapped graphs and others."""
    return GraphArrays(*(read_only(getattr(graph, name)) for name in GraphArrays._fields))


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


@numba.njit(cache=True)
def share_at(point: Any, start: Any, degree: Any, shares: Any) -> Any:
    """The row's first edge whose running share reaches point (32 bits).

    Looks first where it would be if all weighed the same, then ever further away: rows are in no order of weight.
    """
    low, high = start, start + degree - 1  # the edge is in low ... high
    guess, stride = start + ((point * degree) >> 32), 1
    if np.int64(shares[guess]) < point:
        low = guess + 1
        while low + stride < high and np.int64(shares[low + stride]) < point:
            low += stride + 1
            stride *= 2
        high = min(high, low + stride)
    else:
        high = guess
        while high - stride >= low and np.int64(shares[high - stride]) >= point:
            high -= stride
            stride *= 2
        low = max(low, high - stride)
    while low < high:
        middle = (low + high) >> 1
        if np.int64(shares[middle]) < point:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(cache=True, inline="always")
def pick(point: Any, start: Any, degree: Any, shares: Any, weighted: Any) -> Any:
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
    weighted, none = len(graph.item_shares) > 0, graph.item_shares[:0]
    low, half, golden, one = np.int64(LOW_32), np.uint64(32), GOLDEN, np.uint64(1)
    before, now = 0, 0
    for hop in range(len(per_hop)):
        alive = per_hop[hop]
        going_on = per_hop[hop + 1] if hop + 1 < len(per_hop) else 0
        for row in range(len(items)):
            stream = mix(mix(seed + golden) ^ (np.uint64(items[row]) * golden))
            counter = stream + np.uint64(hop << 32) * golden
            for walk in range(alive):
                counter += golden
                bits[row, walk] = mix(counter)
            if hop == 0:
                offset, start = np.int64(mix(stream) >> half), indptr[items[row]]
                degree = indptr[items[row] + 1] - start
                for walk in range(alive):
                    point = (offset + walk * GOLDEN_32) & low
                    edges[row, walk] = pick(point, start, degree, graph.item_shares, weighted)
            else:
                if weighted:
                    for walk in range(alive):
                        here = np.uint64(visits[row, before + walk])
                        start = indptr[here]
                        place = pick(np.int64(bits[row, walk] >> half), start, indptr[here + one] - start, none, False)
                        prefetch(graph.item_shares, place)
                for walk in range(alive):
                    here = np.uint64(visits[row, before + walk])
                    start = indptr[here]
                    point = np.int64(bits[row, walk] >> half)
                    edges[row, walk] = pick(point, start, indptr[here + one] - start, graph.item_shares, weighted)
                    prefetch(users, edges[row, walk])
        for row in range(len(items)):
            for walk in range(alive):
                edges[row, walk] = users[np.uint64(edges[row, walk])]
                prefetch(user_indptr, edges[row, walk])
        for row in range(len(items)):
            if weighted:
                for walk in range(alive):
                    user = np.uint64(edges[row, walk])
                    start = user_indptr[user]
                    place = pick(np.int64(bits[row, walk]) & low, start, user_indptr[user + one] - start, none, False)
                    prefetch(graph.user_shares, place)
            for walk in range(alive):
                user = np.uint64(edges[row, walk])
                start = user_indptr[user]
                point = np.int64(bits[row, walk]) & low
                edges[row, walk] = pick(point, start, user_indptr[user + one] - start, graph.user_shares, weighted)
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
