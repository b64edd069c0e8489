"""Kernel of ingest: one shard's events in memory, ordered, split and counted. numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.contracts.config import Split
from pipeline.contracts.schemas import TEST_SPLIT, TRAIN_SPLIT, VALIDATION_SPLIT
from pipeline.mixing import GOLDEN, mix

DAY = 86_400
"""Seconds, of timestamps that have a clock."""
NUM_BUCKETS = 1 << 16
"""Of a temporal split's histogram of time."""
_DIGIT_BITS = 11


def user_order(users: NDArray[np.integer], timestamps: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The order by user and time; events of one user and time keep theirs."""
    if not len(users):
        return np.zeros(0, np.uint32)
    first_user, first_time = int(users.min()), int(timestamps.min())
    user_bits = (int(users.max()) - first_user).bit_length()
    time_bits = (int(timestamps.max()) - first_time).bit_length()
    moments = timestamps.astype(np.uint64) - np.uint64(first_time & 0xFFFFFFFFFFFFFFFF)
    owners = users.astype(np.uint64) - np.uint64(first_user)
    if user_bits + time_bits <= 64:
        return stable_order((owners << np.uint64(time_bits)) | moments if user_bits else moments)
    order = stable_order(moments)
    again: NDArray[np.uint32] = order[stable_order(owners[order])]
    return again


def stable_order(keys: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """The order of unsigned keys; equal ones keep theirs. Time and memory: 12 bytes a row moved per 11 bits in use."""
    if not len(keys):
        return np.zeros(0, np.uint32)
    order: NDArray[np.uint32] = _radix_order(keys, int(keys.max()).bit_length())
    return order


def daily(
    users: NDArray[np.integer], items: NDArray[np.integer], timestamps: NDArray[np.int64]
) -> tuple[NDArray[np.int64], ...]:
    """Of events in user_order, by day that has any: the day since 1970, its events, the users and the repeats among
    them, and a digest of what was touched at which second. A repeat has another event's user, item and timestamp.

    Digests of parts add up, modulo 2 ** 64, to that of the whole; two days of one digest hold the same events.
    """
    days, place = np.unique(timestamps // DAY, return_inverse=True)
    keys, parts = _event_hashes(users.astype(np.uint64), items.astype(np.uint64), timestamps)
    order = np.argsort(keys)
    again = order[1:][keys[order[1:]] == keys[order[:-1]]]
    first = np.ones(len(users), bool)
    first[1:] = (users[1:] != users[:-1]) | (place[1:] != place[:-1])
    digests = np.zeros(len(days), np.uint64)
    np.add.at(digests, place, parts)
    counts = (np.bincount(rows, minlength=len(days)) for rows in (place, place[first], place[again]))
    return days, *counts, digests.view(np.int64)


def firsts(users: NDArray[np.integer], items: NDArray[np.integer], timestamps: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which events are the first of their user, item and timestamp."""
    keys, _ = _event_hashes(users.astype(np.uint64), items.astype(np.uint64), timestamps)
    order = np.argsort(keys, kind="stable")
    result = np.ones(len(keys), np.bool_)
    result[order[1:]] = keys[order[1:]] != keys[order[:-1]]
    return result


def bucket_counts(timestamps: NDArray[np.int64], first: int, last: int) -> NDArray[np.int64]:
    """Events in each bucket of the time from first to last [NUM_BUCKETS]."""
    width = max(1, -(-(last - first + 1) // NUM_BUCKETS))
    return np.bincount((timestamps - first) // width, minlength=NUM_BUCKETS)


def moments(first: int, last: int, counts: NDArray[np.int64], split: Split) -> tuple[int, int]:
    """The moments from which on events validate and test, from bucket_counts of them all."""
    width = max(1, -(-(last - first + 1) // NUM_BUCKETS))
    places = np.flatnonzero(counts)
    starts = [first + width * place for place in places.tolist()]
    wanted = split.validation + split.test
    return closest_moment(starts, counts[places], wanted), closest_moment(starts, counts[places], split.test)


def closest_moment(starts: Sequence[int], counts: NDArray[np.integer], share: float) -> int:
    """The start of a bucket such that the events from it on are closest to the share; never the first bucket's.

    Where many events carry one timestamp, as in data dated by year, the share is met only roughly, but there is always
    something to learn from and something to measure on.
    """
    from_here_on = counts.sum() - np.cumsum(counts)[:-1]
    return int(starts[1 + int(np.abs(from_here_on - share * counts.sum()).argmin())])


def split_by_time(timestamps: NDArray[np.int64], validation_from: int, test_from: int) -> NDArray[np.uint8]:
    """Train before both moments, validation from the first, test from the second on."""
    held = np.where(timestamps >= validation_from, VALIDATION_SPLIT, TRAIN_SPLIT)
    return np.where(timestamps >= test_from, TEST_SPLIT, held).astype(np.uint8)


def split_last_out(users: NDArray[np.integer], validation: int, test: int) -> NDArray[np.uint8]:
    """Each user's last events, in the order of user_order; users who have no more than those only train."""
    is_last = np.ones(len(users), dtype=bool)
    is_last[:-1] = users[1:] != users[:-1]
    ends = np.flatnonzero(is_last) + 1
    sizes = np.diff(np.concatenate([[0], ends]))
    place = np.repeat(ends, sizes) - np.arange(len(users))  # from 1, the last
    held = np.where(place <= test, TEST_SPLIT, VALIDATION_SPLIT)
    learns = (place > validation + test) | (np.repeat(sizes, sizes) <= validation + test)
    return np.where(learns, TRAIN_SPLIT, held).astype(np.uint8)


def split_at_random(positions: NDArray[np.int64], split: Split, seed: int) -> NDArray[np.uint8]:
    """By a draw from (seed, position) alone."""
    draws: NDArray[np.float64] = _draws(positions, np.uint64(seed))
    held = np.where(draws < split.test, TEST_SPLIT, VALIDATION_SPLIT)
    return np.where(draws < split.test + split.validation, held, TRAIN_SPLIT).astype(np.uint8)


def degrees(
    users: NDArray[np.integer], items: NDArray[np.uint32], timestamps: NDArray[np.int64], start: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
    """Of the training events of users [start, stop), in the order of users: every user's distinct items and first
    timestamp (-1 if there is none); and the items, ascending, with the distinct users and first timestamp of each."""
    order = stable_order(items.astype(np.uint64))
    owners = users.astype(np.int64) - start
    degree, first_seen = np.zeros(stop - start, np.int64), np.full(stop - start, -1, np.int64)
    found, counts, firsts = _degrees(order, owners, items, timestamps, degree, first_seen)
    return degree, first_seen, found, counts, firsts


@numba.njit(cache=True, nogil=True)
def _radix_order(keys: Any, num_bits: Any) -> Any:
    """By digits from the least significant on; digits that all keys share cost a count only."""
    count, mask = len(keys), np.uint64((1 << _DIGIT_BITS) - 1)
    one, other = keys.copy(), np.empty(count, np.uint64)
    order, next_order = np.arange(count).astype(np.uint32), np.empty(count, np.uint32)
    for shift in range(0, num_bits, _DIGIT_BITS):
        ends = np.zeros((1 << _DIGIT_BITS) + 1, np.int64)
        for k in range(count):
            ends[np.int64((one[k] >> np.uint64(shift)) & mask) + 1] += 1
        if ends.max() == count:
            continue
        for value in range(1 << _DIGIT_BITS):
            ends[value + 1] += ends[value]
        for k in range(count):
            digit = np.int64((one[k] >> np.uint64(shift)) & mask)
            place = ends[digit]
            ends[digit] += 1
            other[place], next_order[place] = one[k], order[k]
        one, other, order, next_order = other, one, next_order, order
    return order


@numba.njit(cache=True, nogil=True)
def _event_hashes(users: Any, items: Any, timestamps: Any) -> Any:
    """Hashes of user, item and timestamp, and of item and second of the day."""
    whole, parts = np.empty(len(users), np.uint64), np.empty(len(users), np.uint64)
    for k in range(len(users)):
        item = mix(items[k] + GOLDEN)
        whole[k] = mix(mix(item + users[k]) ^ (np.uint64(timestamps[k]) * GOLDEN))
        parts[k] = mix(item ^ (np.uint64(timestamps[k] % DAY) * GOLDEN))
    return whole, parts


@numba.njit(cache=True, nogil=True)
def _draws(positions: Any, seed: Any) -> Any:
    """In [0, 1), from 53 bits of a hash of seed and position."""
    result, secret = np.empty(len(positions), np.float64), mix(seed + GOLDEN)
    for k in range(len(positions)):
        bits = mix(secret ^ mix(np.uint64(positions[k]) * GOLDEN))
        result[k] = np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0)
    return result


@numba.njit(cache=True, nogil=True)
def _degrees(order: Any, owners: Any, items: Any, timestamps: Any, degree: Any, first_seen: Any) -> Any:
    count = len(order)
    found, counts, firsts = np.empty(count, np.uint32), np.empty(count, np.int64), np.empty(count, np.int64)
    last_owner, used = np.int64(-1), 0
    for k in range(count):
        row = order[k]
        owner, item, moment = owners[row], items[row], timestamps[row]
        if not used or found[used - 1] != item:
            found[used], counts[used], firsts[used] = item, 1, moment
            used += 1
            degree[owner] += 1
        else:
            if owner != last_owner:  # an item's rows are in the order of users
                counts[used - 1] += 1
                degree[owner] += 1
            if moment < firsts[used - 1]:
                firsts[used - 1] = moment
        last_owner = owner
    seen = np.zeros(len(degree), np.bool_)
    for row in range(count):
        owner = owners[row]
        if not seen[owner] or timestamps[row] < first_seen[owner]:
            first_seen[owner], seen[owner] = timestamps[row], True
    return found[:used], counts[:used], firsts[:used]
