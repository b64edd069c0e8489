"""The walk itself: numpy in, numpy out.

A walk starts at an item and hops item, user, item: each hop steps to one of the item's users and from there to one of
that user's items, and counts a visit there. After every hop it ends with the restart probability, and after max_hops in
any case. The visit counts of an item's walks, without the item itself, estimate its personalised PageRank.

Random numbers are a hash of (seed, item, walk, hop, side): no state, so any item's result is the same in any order, on
any machine. How many of the walks make hop h is fixed at its expectation instead of drawn, which lowers the variance.
Cost: two random reads of the graph per hop; memory per call: a hash table of 4 x visits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.contracts.datasets import open_manifest
from pipeline.contracts.replica import map_lists
from pipeline.contracts.schemas import ITEM_USERS, USER_ITEMS
from pipeline.contracts.storage import Storage


@dataclass(frozen=True)
class BipartiteGraph:
    """Both directions in compressed rows: indptr int64 [N + 1], ids uint32 and running weights float32 [E]."""

    item_indptr: NDArray[np.int64]
    item_users: NDArray[np.uint32]
    item_weights: NDArray[np.float32]
    user_indptr: NDArray[np.int64]
    user_items: NDArray[np.uint32]
    user_weights: NDArray[np.float32]

    @classmethod
    def open(cls, storage: Storage, cache: str | None) -> BipartiteGraph:
        """This host's memory-mapped copy of the run's graph, made if it is not there yet."""
        arrays: list[NDArray[Any]] = []
        for dataset in (ITEM_USERS, USER_ITEMS):
            manifest = open_manifest(storage, dataset)
            arrays += [*map_lists(storage, manifest, "neighbours", cache)]
            arrays.append(map_lists(storage, manifest, "cumulative_weights", cache)[1])
        return cls(*arrays)


def walks_per_hop(num_walks: int, max_hops: int, restart_probability: float) -> NDArray[np.int64]:
    """How many of an item's walks make hop 1, 2, ..., max_hops."""
    alive = num_walks * (1.0 - restart_probability) ** np.arange(max_hops)
    return np.maximum(np.round(alive).astype(np.int64), 0)


def visit_counts(
    graph: BipartiteGraph,
    items: NDArray[np.integer],
    per_hop: NDArray[np.int64],
    num_neighbours: int,
    seed: int,
    weighted: bool = False,
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
    """The most visited items of each given item.

    Returns ids [B, num_neighbours], their visit counts in the same shape, both by count descending and then id, padded
    with 0, and how many are real [B]. An item without users has none.
    """
    capacity = 1 << max(4, int(4 * max(int(per_hop.sum()), 1) - 1).bit_length())
    size = len(items)
    ids = np.zeros((size, num_neighbours), np.uint32)
    counts = np.zeros((size, num_neighbours), np.int64)
    lengths = np.zeros(size, np.int64)
    _walk_items(
        np.asarray(items, np.int64), graph.item_indptr, graph.item_users, graph.item_weights, graph.user_indptr,
        graph.user_items, graph.user_weights, per_hop, np.uint64(seed), weighted, capacity, ids, counts, lengths,
    )  # fmt: skip
    return ids, counts, lengths


@numba.njit(cache=True, inline="always")
def _mix(value: Any) -> Any:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, inline="always")
def _pick(start: Any, degree: Any, weights: Any, weighted: Any, random: Any) -> Any:
    """The place of a random edge of a row: uniform, or in proportion to the edges' weights."""
    if not weighted:
        return start + np.int64(((random >> np.uint64(32)) * np.uint64(degree)) >> np.uint64(32))
    target = np.float64(random >> np.uint64(11)) * (1.0 / 9007199254740992.0) * weights[start + degree - 1]
    low, high = start, start + degree - 1
    while low < high:
        middle = (low + high) // 2
        if weights[middle] > target:
            high = middle
        else:
            low = middle + 1
    return low


@numba.njit(cache=True, nogil=True)
def _walk_items(
    items: Any, item_indptr: Any, item_users: Any, item_weights: Any, user_indptr: Any, user_items: Any,
    user_weights: Any, per_hop: Any, seed: Any, weighted: Any, capacity: Any, ids: Any, counts: Any, lengths: Any,
) -> None:  # fmt: skip
    """Walk from each item and keep its top rows; loops, as numba compiles them."""
    keys = np.zeros(capacity, np.uint64)
    visits = np.zeros(capacity, np.int64)
    used = np.zeros(capacity, np.int64)
    mask = np.uint64(capacity - 1)
    num_hops = len(per_hop)
    golden = np.uint64(0x9E3779B97F4A7C15)
    for place in range(len(items)):
        item = items[place]
        if item_indptr[item + 1] == item_indptr[item]:
            continue
        stream = _mix(_mix(seed + golden) ^ (np.uint64(item) * golden))
        num_used = 0
        for walk in range(per_hop[0]):
            here = item
            for hop in range(num_hops):
                if walk >= per_hop[hop]:
                    break
                step = stream + (np.uint64(walk) * np.uint64(num_hops) + np.uint64(hop)) * np.uint64(2)
                start = item_indptr[here]
                edge = _pick(start, item_indptr[here + 1] - start, item_weights, weighted, _mix(step))
                user = item_users[edge]
                start = user_indptr[user]
                edge = _pick(start, user_indptr[user + 1] - start, user_weights, weighted, _mix(step + np.uint64(1)))
                here = np.int64(user_items[edge])
                if here == item:
                    continue
                slot = _mix(np.uint64(here) + golden) & mask
                while keys[slot] != np.uint64(0) and keys[slot] != np.uint64(here + 1):
                    slot = (slot + np.uint64(1)) & mask
                if keys[slot] == np.uint64(0):
                    keys[slot] = np.uint64(here + 1)
                    used[num_used] = np.int64(slot)
                    num_used += 1
                visits[slot] += 1
        packed = np.empty(num_used, np.uint64)
        for k in range(num_used):
            slot_used = used[k]
            id_last = np.uint64(0xFFFFFFFF) - (keys[slot_used] - np.uint64(1))
            packed[k] = (np.uint64(visits[slot_used]) << np.uint64(32)) | id_last
            keys[slot_used] = np.uint64(0)
            visits[slot_used] = 0
        packed.sort()
        kept = min(num_used, ids.shape[1])
        lengths[place] = kept
        for k in range(kept):
            entry = packed[num_used - 1 - k]
            ids[place, k] = np.uint32(np.uint64(0xFFFFFFFF) - (entry & np.uint64(0xFFFFFFFF)))
            counts[place, k] = np.int64(entry >> np.uint64(32))
