"""Personalised-PageRank neighbourhoods by reading the graph instead of walking on it: numpy in, numpy out.

`exact_neighbours` sums the first item-user-item hop of an item: each of its users passes the item's share on to that
user's items. A budget bounds the entries read: long lists are cut, and stand for the rest as users' lists are in random
order. `compose` adds longer hops: the rows of an item's nearest items, each by its weight (Jeh and Widom 2003).

Scores are integer sums, in units of 2 ** -30 of an item's mass, so no order of reading changes a byte. A row depends on
the item's users, their degrees up to the budget, and the parts of their lists that are read, on nothing else.
Cost: one sequential read per user, one add to a small table per entry. Memory per call: a few times the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.mixing import read_only
from pipeline.top_sums import empty_rows, make_scratch, top_sums
from pipeline.walk_kernel import BipartiteGraph, graph_arrays, prefetch, share_at

_MAX_USERS = 1024  # of one item that are read: an item with more is a hub, and those stand for the others
ONE = 1 << 30
"""An item's whole mass, in the units of scores."""
Found = tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]
"""ids [B, T], their scores [B, T], and how many of each row are real [B]; the rest is 0."""
_NO_IDS = np.zeros(0, np.uint32)
_NO_RANKS = np.zeros(0, np.uint8)
_NO_INDPTR = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Rows:
    """Rows of neighbours, heaviest first: indptr int64 [N + 1], ids uint32 [E], weights float32 [E].

    Row r is item r's, or, in a table of some items, that of items[r]: their ids uint32 [N], ascending.
    """

    indptr: NDArray[np.int64]
    ids: NDArray[np.uint32]
    weights: NDArray[np.float32]
    items: NDArray[np.uint32] | None = None


def exact_neighbours(
    graph: BipartiteGraph,
    items: NDArray[np.integer],
    num_neighbours: int,
    entry_budget: int,
    levels: NDArray[np.int64] | None = None,
) -> Found:
    """The items that one hop from each given item most likely ends at; weighted if the graph is. items are its rows.

    Each user's list is read up to the item's level, which prefix_lengths gives and levels may repeat, for a graph whose
    lists are cut there. Returns ids [B, num_neighbours], scores in the same shape, both by score descending, then
    degree_rank descending, then id, padded with 0, and how many are real [B].
    """
    ids, scores, lengths = empty_rows(len(items), num_neighbours)
    levels = read_only(_NO_INDPTR if levels is None else levels, np.int64)
    _exact_rows(graph_arrays(graph), read_only(items, np.int64), entry_budget, levels, ids, scores, lengths)
    return ids, scores, lengths


def prefix_lengths(
    graph: BipartiteGraph, items: NDArray[np.integer], entry_budget: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How far each item reads its users' lists [B], the level of water_level, and how far each user's is read [M].

    Needs no list of the graph, only their lengths.
    """
    levels, needed = np.zeros(len(items), np.int64), np.zeros(len(graph.user_indptr) - 1, np.int64)
    _levels(graph_arrays(graph), read_only(items, np.int64), entry_budget, levels, needed)
    return levels, needed


def compose(
    rows: Rows,
    items: NDArray[np.integer],
    num_rows: int,
    width: int,
    restart_probability: float,
    num_neighbours: int,
    item_ranks: NDArray[np.uint8] | None = None,
    item_indptr: NDArray[np.int64] | None = None,
    own: Found | None = None,
) -> Found:
    """Each item's row, and the rows of its heaviest neighbours times their weight: one hop more than rows have.

    score(i) = row_i + (1 - restart_probability) * sum over the num_rows first j of row_i of w_ij * row_j[:width].
    row_i is taken from own, as exact_neighbours gives it, or else from rows. The tie-break takes degree_rank from
    item_ranks uint8 [N] or else from the graph's item_indptr. Returns as
    exact_neighbours; the scores of a whole row sum to up to 2 - restart_probability.
    """
    ids, scores, lengths = empty_rows(len(items), num_neighbours)
    own_ids, own_scores, own_lengths = empty_rows(0, 0) if own is None else own
    _compose_rows(
        read_only(rows.indptr), read_only(rows.ids), read_only(rows.weights),
        read_only(_NO_IDS if rows.items is None else rows.items), read_only(own_ids), read_only(own_scores),
        read_only(own_lengths), read_only(items, np.int64), num_rows, width, 1.0 - restart_probability,
        read_only(_NO_RANKS if item_ranks is None else item_ranks),
        read_only(_NO_INDPTR if item_indptr is None else item_indptr), ids, scores, lengths,
    )  # fmt: skip
    return ids, scores, lengths


@numba.njit(cache=True, nogil=True)
def water_level(degrees: Any, entry_budget: Any) -> Any:
    """The largest L with sum(min(degrees, L)) <= entry_budget, but at least 1; entry_budget itself if all fit."""
    low, high = 1, entry_budget + 1
    while high - low > 1:
        level = (low + high) >> 1
        total = 0
        for degree in degrees:
            total += min(degree, level)
        if total <= entry_budget:
            low = level
        else:
            high = level
    return low


@numba.njit(cache=True, nogil=True)
def _read_users(graph: Any, item: Any, entry_budget: Any, users: Any, shares: Any, degrees: Any) -> Any:
    """The item's users, each's share of its mass in units of 2 ** -32, and their degrees; returns how many.

    A hub's are every so manyth, by share if weighted: a user met twice counts twice.
    """
    start = graph.item_indptr[item]
    degree = graph.item_indptr[item + 1] - start
    limit = min(len(users), entry_budget)
    weighted = len(graph.item_shares) > 0
    count = 0
    if degree <= limit:
        before = np.int64(-1)
        for k in range(degree):
            users[k] = graph.item_users[start + k]
            if weighted:
                reached = np.int64(graph.item_shares[start + k])
                shares[k] = reached - before
                before = reached
            else:
                shares[k] = (1 << 32) // degree
        count = degree
    else:
        last = np.int64(-1)
        for k in range(limit):
            if weighted:
                edge = share_at(((2 * k + 1) << 31) // limit, start, degree, graph.item_shares)
            else:
                edge = start + (2 * k + 1) * degree // (2 * limit)
            if edge == last:
                shares[count - 1] += (1 << 32) // limit
            else:
                users[count] = graph.item_users[edge]
                shares[count] = (1 << 32) // limit
                count += 1
            last = edge
    for k in range(count):
        degrees[k] = graph.user_indptr[users[k] + 1] - graph.user_indptr[users[k]]
    return count


@numba.njit(cache=True, nogil=True)
def _levels(graph: Any, items: Any, entry_budget: Any, levels: Any, needed: Any) -> None:
    users, shares, degrees = np.empty((3, _MAX_USERS), np.int64)
    for place in range(len(items)):
        count = _read_users(graph, items[place], entry_budget, users, shares, degrees)
        levels[place] = water_level(degrees[:count], entry_budget)
        for k in range(count):
            needed[users[k]] = max(needed[users[k]], min(degrees[k], levels[place]))


@numba.njit(cache=True, nogil=True)
def _exact_rows(graph: Any, items: Any, entry_budget: Any, levels: Any, ids: Any, scores: Any, lengths: Any) -> None:
    """While one item's lists are summed, the next one's are on their way: plans [2] hold both, in turns."""
    user_items, user_shares = graph.user_items, graph.user_shares
    users, shares, degrees = np.empty((3, 2, _MAX_USERS), np.int64)
    counts = np.zeros(2, np.int64)
    scratch = make_scratch(min(entry_budget, 4096))
    for step in range(len(items) + 1):
        new, place = step & 1, step - 1
        if step < len(items):
            _ask_ahead(graph, items, step)
            item, level = items[step], levels[step] if len(levels) else 0
            counts[new] = _plan(graph, item, entry_budget, level, users[new], shares[new], degrees[new])
        if place < 0:
            continue
        old = 1 - new
        needed = degrees[old, : counts[old]].sum()
        if needed > len(scratch.ids):
            scratch = make_scratch(2 * needed)
        size = 0
        for k in range(counts[old]):
            start, length = graph.user_indptr[users[old, k]], degrees[old, k]
            if length > 0:
                _read_list(user_items, user_shares, start, length, shares[old, k], size, scratch.ids, scratch.adds)
            size += length
        item = np.int64(graph.item_ids[items[place]]) if len(graph.item_ids) else items[place]
        lengths[place] = top_sums(
            scratch.ids, scratch.adds, size, item, graph.item_ranks, graph.item_indptr, scratch, ids[place],
            scores[place],
        )  # fmt: skip


@numba.njit(cache=True, inline="always")
def _ask_ahead(graph: Any, items: Any, step: Any) -> None:
    """Start to load what the plans of the items after this one read."""
    if step + 4 < len(items):
        prefetch(graph.item_indptr, items[step + 4])
        prefetch(graph.item_users, graph.item_indptr[items[step + 2]])


@numba.njit(cache=True, nogil=True)
def _plan(graph: Any, item: Any, entry_budget: Any, level: Any, users: Any, shares: Any, lengths: Any) -> Any:
    """The item's users, their shares and how much of their lists to read, which starts to load; returns how many."""
    count = _read_users(graph, item, entry_budget, users, shares, lengths)
    if not level:
        level = water_level(lengths[:count], entry_budget)
    for k in range(count):
        lengths[k] = min(lengths[k], level)
        start = graph.user_indptr[users[k]]
        for entry in range(start, start + min(lengths[k], 512), 16):  # later lines come by themselves, in sequence
            prefetch(graph.user_items, entry)
    return count


@numba.njit(cache=True, nogil=True)
def _read_list(
    user_items: Any, user_shares: Any, start: Any, length: Any, share: Any, size: Any, ids: Any, adds: Any
) -> None:
    """Write length entries of a user's list from place size on, each with its part of the user's share."""
    first, place = np.uint64(start), np.uint64(size)
    if len(user_shares):
        unit = share * (ONE / 4294967296.0) / (np.int64(user_shares[start + length - 1]) + 1)
        before = np.int64(-1)
        for k in range(np.uint64(length)):
            ids[place + k] = user_items[first + k]
            reached = np.int64(user_shares[first + k])
            adds[place + k] = max(np.int64((reached - before) * unit + 0.5), 1)
            before = reached
    else:
        add = np.uint32(max((share >> 2) // length, 1))
        for k in range(np.uint64(length)):
            ids[place + k] = user_items[first + k]
            adds[place + k] = add


@numba.njit(cache=True, inline="always")
def _row_of(item: Any, known: Any) -> Any:
    """The row of an item in a table of all items (known is empty) or of some; -1 if it is not there."""
    if len(known) == 0:
        return np.int64(item)
    low, high = 0, len(known)
    while low < high:
        middle = (low + high) >> 1
        if known[middle] < item:
            low = middle + 1
        else:
            high = middle
    return low if low < len(known) and known[low] == item else -1


@numba.njit(cache=True, nogil=True)
def _compose_rows(
    indptr: Any, row_ids: Any, weights: Any, known: Any, own_ids: Any, own_scores: Any, own_lengths: Any, items: Any,
    num_rows: Any, width: Any, going_on: Any, item_ranks: Any, item_indptr: Any, ids: Any, scores: Any, lengths: Any,
) -> None:  # fmt: skip
    scratch = make_scratch(4096)
    for place in range(len(items)):
        item, start, size = items[place], 0, 0
        if len(own_lengths):
            size = own_lengths[place]
        else:
            row = _row_of(item, known)
            if row >= 0:
                start = indptr[row]
                size = indptr[row + 1] - start
        used = min(num_rows, size)
        needed = size + used * width
        if needed > len(scratch.ids):
            scratch = make_scratch(2 * needed)
        for k in range(size):
            if len(own_lengths):
                scratch.ids[k] = own_ids[place, k]
                scratch.adds[k] = own_scores[place, k]
            else:
                scratch.ids[k] = row_ids[start + k]
                scratch.adds[k] = max(np.int64(weights[start + k] * ONE + 0.5), 1)
        for j in range(used):
            row = _row_of(np.int64(scratch.ids[j]), known)
            if row < 0:
                continue
            factor = going_on * np.float64(scratch.adds[j])
            other = indptr[row]
            length = min(width, indptr[row + 1] - other)
            for k in range(length):
                scratch.ids[size + k] = row_ids[other + k]
                scratch.adds[size + k] = max(np.int64(factor * weights[other + k] + 0.5), 1)
            size += length
        lengths[place] = top_sums(
            scratch.ids, scratch.adds, size, item, item_ranks, item_indptr, scratch, ids[place], scores[place]
        )
