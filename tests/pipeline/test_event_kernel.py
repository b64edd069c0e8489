"""Order, splits and degrees of one shard's events, against slow and obvious versions."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.contracts.config import Split
from pipeline.event_kernel import (
    bucket_counts,
    closest_moment,
    degrees,
    moments,
    split_at_random,
    split_by_time,
    split_last_out,
    stable_order,
    user_order,
)


def events(seed: int, count: int = 400, num_users: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, items and timestamps in the order of users, with ties and repeated edges."""
    generator = np.random.default_rng(seed)
    users = np.sort(generator.integers(100, 100 + num_users, count)).astype(np.uint32)
    return users, generator.integers(0, 15, count).astype(np.uint32), generator.integers(-50, 50, count)


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
@pytest.mark.parametrize("bits", [1, 11, 12, 64])
def test_order_is_that_of_a_stable_sort(count: int, bits: int) -> None:
    keys = np.random.default_rng(bits).integers(0, 2**bits, count, dtype=np.uint64, endpoint=bits < 64)
    assert stable_order(keys).tolist() == np.argsort(keys, kind="stable").tolist()


@pytest.mark.parametrize(("first", "last"), [(0, 3), (-5, 10**9), (-(2**62), 2**62), (-(2**63), 2**63 - 1)])
@pytest.mark.parametrize("num_users", [1, 3, 2**31])
def test_user_order_is_by_user_then_time_then_place(first: int, last: int, num_users: int) -> None:
    generator = np.random.default_rng(1)
    users = generator.integers(0, num_users, 500).astype(np.uint32)
    times = generator.choice(generator.integers(first, last, 40, endpoint=True), 500)
    times[:2] = first, last
    assert user_order(users, times).tolist() == np.lexsort((np.arange(500), times, users)).tolist()


def test_no_events_have_an_order() -> None:
    assert len(user_order(np.zeros(0, np.uint32), np.zeros(0, np.int64))) == 0


def test_the_last_events_of_every_user_are_held_out_but_not_all_there_are() -> None:
    users = np.array([1] * 5 + [2] * 3 + [3] * 4 + [7], np.uint32)
    assert split_last_out(users, 1, 2).tolist() == [0, 0, 1, 2, 2] + [0] * 3 + [0, 1, 2, 2] + [0]
    assert split_last_out(users[:0], 1, 2).tolist() == []


def test_a_split_by_time_is_one_moment_for_all() -> None:
    times = np.array([5, 9, 10, 11, 20, 4])
    assert split_by_time(times, 10, 20).tolist() == [0, 0, 1, 1, 2, 0]
    assert split_by_time(times, 10, 10).tolist() == [0, 0, 2, 2, 2, 0]


def test_a_random_split_meets_its_shares_and_depends_on_seed_and_place_alone() -> None:
    split, positions = Split(kind="random", validation=0.1, test=0.2), np.arange(50_000)
    found = split_at_random(positions, split, 1)
    assert np.bincount(found) / len(found) == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    assert split_at_random(positions[300:400], split, 1).tolist() == found[300:400].tolist()
    assert (split_at_random(positions, split, 2) != found).mean() > 0.3


def test_moments_from_parts_are_those_of_the_whole() -> None:
    times = np.random.default_rng(0).integers(1_000_000, 90_000_000, 5000)
    first, last = int(times.min()), int(times.max())
    parts = np.sum([bucket_counts(part, first, last) for part in np.array_split(times, 7)], axis=0)
    split = Split(validation=0.1, test=0.2)
    assert parts.sum() == len(times)
    validation_from, test_from = moments(first, last, parts, split)
    assert (times >= test_from).mean() == pytest.approx(0.2, abs=0.001)
    assert (times >= validation_from).mean() == pytest.approx(0.3, abs=0.001)


def test_a_split_of_coarsely_dated_events_comes_as_close_as_it_can() -> None:
    """By hand: 60, 25 and 15 of 100 events in three years."""
    years, counts = [2000, 2001, 2002], np.array([60, 25, 15])
    assert closest_moment(years, counts, 0.1) == 2002
    assert closest_moment(years, counts, 0.35) == 2001
    assert closest_moment(years, counts, 0.9) == 2001, "the first year is always learned from"
    assert closest_moment(years, counts, 0.001) == 2002, "the last is always measured on"


@pytest.mark.parametrize("count", [0, 1, 400])
def test_degrees_count_distinct_partners_and_first_sights(count: int) -> None:
    users, items, times = events(3, count)
    edges = set(zip(users.tolist(), items.tolist(), strict=True))
    degree, first_seen, found, counts, firsts = degrees(users, items, times, 98, 125)
    for user in range(98, 125):
        own = times[users == user]
        assert degree[user - 98] == sum(edge[0] == user for edge in edges)
        assert first_seen[user - 98] == (own.min() if len(own) else -1)
    assert found.tolist() == sorted({item for _, item in edges})
    assert counts.tolist() == [sum(edge[1] == item for edge in edges) for item in found.tolist()]
    assert firsts.tolist() == [times[items == item].min() for item in found.tolist()]
