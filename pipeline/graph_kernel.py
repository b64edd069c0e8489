"""The graph's kernel: events to rows of edges, and edges to the rows of the other side. Numpy in, numpy out.

Nothing here sorts all edges: events come sorted by user, edges reach an item's rows by counting. Random numbers are a
hash of (seed, ids), so that a row is the same whatever the shards are. Memory: what goes in and what comes out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.contracts.schemas import TRAIN_SPLIT
from pipeline.mixing import GOLDEN, mix, read_only

_TRAIN = TRAIN_SPLIT  # a compiled function takes it as a constant
_WHOLE = 62
"""Shares are added up as integers in units of 2 ** -62 of the row's weight: no sum loses what small edges weigh."""
STEPS = 8
"""Bins of a degree histogram per factor of two; below 16 every degree is a bin."""


class Rows(NamedTuple):
    """Edges by row: row r has the other ends ids[indptr[r]:indptr[r + 1]].

    indptr int64 [N + 1], ids uint32 [E]. weights float64 is [E] or, where edges do not differ, [0]; times int64, an
    edge's latest event, is [E] or, where nobody asks, [0]. An edge's weight counts as of its latest event.
    """

    indptr: Any
    ids: Any
    weights: Any
    times: Any

    @property
    def degrees(self) -> NDArray[np.int64]:
        """Edges of every row."""
        degrees: NDArray[np.int64] = np.diff(self.indptr)
        return degrees

    def part(self, start: int, stop: int) -> Rows:
        """Rows [start, stop)."""
        first, last = self.indptr[start], self.indptr[stop]
        return Rows(self.indptr[start : stop + 1] - first, *(array[first:last] for array in self[1:]))


class Events(NamedTuple):
    """Columns of interactions, rows sorted by user, then time. times may be [0] if nobody asks for them."""

    users: NDArray[np.uint32]
    items: NDArray[np.uint32]
    times: NDArray[np.int64]
    weights: NDArray[np.float32]
    splits: NDArray[np.uint8]


class Merged(NamedTuple):
    """What merge_events counted, and the first row of events that cannot be used (-1: none)."""

    used: int
    weightless: int
    bad_row: int


# ------------------------------------------------------------------------------------------------ events to rows


def merge_events(
    events: Events, start: int, stop: int, num_items: int, weighted: bool, decay: float
) -> tuple[Rows, Merged]:
    """Rows [start, stop) of the users: one edge per user and item of the training period, first touched first.

    An edge's weight is the sum of its events', each halved 1 / decay before the edge's latest (decay 0: never).
    Events must be of these users. A row is bad whose item is not one of num_items, or whose weight is below 0, infinite
    or NaN; weight 0 makes no edge.
    """
    timed = len(events.times) > 0
    size = len(events.users)
    indptr, ids = np.empty(stop - start + 1, np.int64), np.empty(size, np.uint32)
    weights, times = np.empty(size if weighted else 0), np.empty(size if timed else 0, np.int64)
    columns = Events(*(read_only(column) for column in events))
    used, weightless, bad = _merge(columns, start, num_items, weighted, decay, indptr, ids, weights, times)
    count = indptr[-1] if bad < 0 else 0
    return Rows(indptr, ids[:count], weights[:count], times[:count]), Merged(used, weightless, bad)


def collect_rows(
    owners: NDArray[np.uint32], edges: tuple[NDArray[Any], NDArray[Any], NDArray[Any]], start: int, stop: int
) -> Rows:
    """Rows [start, stop) from their edges (ids, weights, times) in any order, which every row keeps."""
    indptr = np.zeros(stop - start + 1, np.int64)
    rows = Rows(indptr, *(np.empty_like(column) for column in edges))
    _collect(read_only(owners), Rows(indptr, *(read_only(column) for column in edges)), start, rows)
    return rows


def to_shards(
    rows: Rows, first_row: int, num_ids: int, num_shards: int
) -> tuple[NDArray[np.uint32], Rows, NDArray[np.uint16]]:
    """All edges by the shard that owns their id on the other side, otherwise in order.

    Returns every edge's row, the edges as Rows with a row per shard, and every edge's shard.
    """
    owners, ids = np.empty(len(rows.ids), np.uint32), np.empty_like(rows.ids)
    weights, times = np.empty_like(rows.weights), np.empty_like(rows.times)
    indptr = np.zeros(num_shards + 1, np.int64)
    edges = Rows(indptr, ids, weights, times)
    _send(rows, first_row, num_ids, num_shards, owners, edges)
    return owners, edges, np.repeat(np.arange(num_shards).astype(np.uint16), np.diff(indptr))


# ------------------------------------------------------------------------------------------------ rows to rows


def limit_rows(
    rows: Rows, first_row: int, least: int, most: int, seed: int | None = None, by_user: bool = True
) -> tuple[Rows, int, int]:
    """Empty the rows with fewer than `least` edges, and cut those with more than `most` (0: none), in place.

    Kept are the edges of the latest events, equals by id; or, given a seed, any: drawn by (seed, user, item).
    Returns the rows, and how many edges either rule removed.
    """
    if least <= 1 and not most:
        return rows, 0, 0
    random, key = seed is not None, np.uint64(seed or 0)
    too_few, too_many = _limit(rows, first_row, least, most, random, key, by_user)
    count = rows.indptr[-1]
    return Rows(rows.indptr, *(array[:count] for array in rows[1:])), int(too_few), int(too_many)


def shuffle_rows(rows: Rows, first_row: int, seed: int) -> None:
    """Put every row into a random order, drawn by (seed, row), in place."""
    _shuffle(rows, first_row, np.uint64(seed))


def running_shares(rows: Rows, decay: float) -> NDArray[np.uint32]:
    """For every edge the row's weight up to and including it, as round(share * 2 ** 32) - 1; of the last 2 ** 32 - 1.

    Weights count as of the row's latest event: however old the row is, its newest edges weigh something.
    """
    shares = np.empty(len(rows.ids), np.uint32)
    _share(rows, decay, shares)
    return shares


def degree_bins(degrees: NDArray[np.integer]) -> NDArray[np.int64]:
    """The histogram bin of each degree."""
    return np.searchsorted(_BIN_STARTS, degrees, side="right") - 1


def bin_start(number: int) -> int:
    """The least degree of a bin."""
    return int(_BIN_STARTS[number])


_BIN_STARTS = np.array(
    [*range(2 * STEPS), *((STEPS + step) << octave for octave in range(1, 40) for step in range(STEPS))]
)


# ------------------------------------------------------------------------------------------------ compiled


@numba.njit(cache=True, nogil=True)
def _merge(
    events: Any, start: Any, num_items: Any, weighted: Any, decay: Any, indptr: Any, ids: Any, weights: Any, times: Any
) -> Any:
    """A small hash table per user, in the first-level cache, holds where the item's edge is; it is 2 to 4 times as
    large as the user's events."""
    users, items, moments, strengths, splits = events
    timed = len(times) > 0
    longest, place = 0, 0
    while place < len(users):
        end = place + 1
        while end < len(users) and users[end] == users[place]:
            end += 1
        longest = max(longest, end - place)
        place = end
    bits = 1
    while (1 << bits) < 2 * longest:
        bits += 1
    table = np.empty(1 << bits, np.uint32)
    row, edges, used, weightless, place = 0, 0, 0, 0, 0
    while place < len(users):
        user, end = users[place], place + 1
        while end < len(users) and users[end] == user:
            end += 1
        while row <= np.int64(user) - start:
            indptr[row] = edges
            row += 1
        bits = 1
        while (1 << bits) < 2 * (end - place):
            bits += 1
        shift, mask, before = np.uint64(64 - bits), (1 << bits) - 1, edges - 1
        table[: 1 << bits] = 0
        for event in range(place, end):
            if splits[event] != _TRAIN:
                continue
            weight, item = np.float64(strengths[event]), items[event]
            if item >= num_items or not 0.0 <= weight < np.inf:
                return used, weightless, event
            if weight == 0.0:
                weightless += 1
                continue
            used += 1
            slot = np.int64((np.uint64(item) * GOLDEN) >> shift)
            while table[slot] != 0 and ids[before + table[slot]] != item:
                slot = (slot + 1) & mask
            known = np.int64(table[slot])
            edge = before + known if known else np.int64(edges)
            if not known:
                table[slot] = edges - before
                ids[edge] = item
                edges += 1
                if weighted:
                    weights[edge] = weight
            elif weighted:
                if decay > 0.0:
                    weights[edge] *= np.exp2(np.float64(times[edge] - moments[event]) * decay)
                weights[edge] += weight
            if timed:
                times[edge] = moments[event]
        place = end
    while row < len(indptr):
        indptr[row] = edges
        row += 1
    return used, weightless, -1


@numba.njit(cache=True, nogil=True)
def _collect(owners: Any, edges: Any, start: Any, rows: Any) -> None:
    indptr, ids, weights, times = rows
    weighted, timed = len(weights) > 0, len(times) > 0
    for owner in owners:
        indptr[np.int64(owner) - start + 1] += 1
    for row in range(1, len(indptr)):
        indptr[row] += indptr[row - 1]
    free = indptr[:-1].copy()
    for edge in range(len(owners)):
        row = np.int64(owners[edge]) - start
        place = free[row]
        free[row] += 1
        ids[place] = edges.ids[edge]
        if weighted:
            weights[place] = edges.weights[edge]
        if timed:
            times[place] = edges.times[edge]


@numba.njit(cache=True, nogil=True)
def _send(rows: Any, first_row: Any, num_ids: Any, num_shards: Any, owners: Any, edges: Any) -> None:
    """Stable counting sort by shard; sharding.shard_of says which."""
    indptr, ids, weights, times = edges
    weighted, timed = len(weights) > 0, len(times) > 0
    shards = np.empty(len(ids), np.uint16)
    for edge in range(len(ids)):
        shard = ((np.int64(rows.ids[edge]) + 1) * num_shards - 1) // num_ids
        shards[edge] = shard
        indptr[shard + 1] += 1
    for shard in range(num_shards):
        indptr[shard + 1] += indptr[shard]
    free = indptr[:-1].copy()
    for row in range(len(rows.indptr) - 1):
        for edge in range(rows.indptr[row], rows.indptr[row + 1]):
            place = free[shards[edge]]
            free[shards[edge]] += 1
            owners[place] = first_row + row
            ids[place] = rows.ids[edge]
            if weighted:
                weights[place] = rows.weights[edge]
            if timed:
                times[place] = rows.times[edge]


@numba.njit(cache=True, nogil=True)
def _limit(rows: Any, first_row: Any, least: Any, most: Any, random: Any, seed: Any, by_user: Any) -> Any:
    """An edge stays if its key is below the most-th smallest, or equal and its id among the smallest of those."""
    indptr, ids, weights, times = rows
    kept, too_few, too_many = 0, 0, 0
    stream = mix(seed + GOLDEN)
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        degree = stop - start
        indptr[row] = kept
        if degree < least:
            too_few += degree
            continue
        keys = np.empty(degree if 0 < most < degree else 0, np.int64)
        border, last = np.int64(0), np.int64(0)
        if len(keys) > 0:
            too_many += degree - most
            for place in range(degree):
                if random:
                    one, other = np.uint64(first_row + row), np.uint64(ids[start + place])
                    pair = (one << np.uint64(32)) | other if by_user else (other << np.uint64(32)) | one
                    keys[place] = np.int64(mix(stream ^ (pair * GOLDEN)) >> np.uint64(1))
                else:
                    keys[place] = -times[start + place]
            border = np.partition(keys, most - 1)[most - 1]
            equal = ids[start:stop][keys == border].astype(np.int64)
            room = most - np.sum(keys < border)
            last = np.partition(equal, room - 1)[room - 1]
        for place in range(degree):
            edge = start + place
            if len(keys) == 0 or keys[place] < border or (keys[place] == border and np.int64(ids[edge]) <= last):
                ids[kept] = ids[edge]
                if len(weights) > 0:
                    weights[kept] = weights[edge]
                if len(times) > 0:
                    times[kept] = times[edge]
                kept += 1
    indptr[-1] = kept
    return too_few, too_many


@numba.njit(cache=True, nogil=True)
def _shuffle(rows: Any, first_row: Any, seed: Any) -> None:
    """Fisher and Yates."""
    indptr, ids, weights, times = rows
    for row in range(len(indptr) - 1):
        start = indptr[row]
        stream = mix(mix(seed + GOLDEN) ^ (np.uint64(first_row + row) * GOLDEN))
        for place in range(indptr[row + 1] - start - 1, 0, -1):
            bits = mix(stream + np.uint64(place) * GOLDEN) >> np.uint64(11)
            one, other = start + place, start + np.int64(np.float64(bits) * 2.0**-53 * np.float64(place + 1))
            ids[one], ids[other] = ids[other], ids[one]
            if len(weights) > 0:
                weights[one], weights[other] = weights[other], weights[one]
            if len(times) > 0:
                times[one], times[other] = times[other], times[one]


@numba.njit(cache=True, nogil=True)
def _share(rows: Any, decay: Any, shares: Any) -> None:
    indptr, _, weights, times = rows
    whole = np.float64(1 << _WHOLE)
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        if start == stop:
            continue
        newest = np.int64(0)
        if decay > 0.0:
            newest = times[start:stop].max()
        total, lost = 0.0, 0.0
        for edge in range(start, stop):  # Kahan's sum
            weight = weights[edge]
            if decay > 0.0:
                weight *= np.exp2(np.float64(times[edge] - newest) * decay)
            term = weight - lost
            added = total + term
            lost = (added - total) - term
            total = added
        running = np.int64(0)
        for edge in range(start, stop):
            weight = weights[edge]
            if decay > 0.0:
                weight *= np.exp2(np.float64(times[edge] - newest) * decay)
            running += np.int64(weight / total * whole)
            rounded = (running + (1 << (_WHOLE - 33))) >> (_WHOLE - 32)
            shares[edge] = min(max(rounded - 1, 0), 0xFFFFFFFF)
        shares[stop - 1] = 0xFFFFFFFF
