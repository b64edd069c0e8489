"""The graph's kernel against dicts and loops: merging, limits, order, shares, exchange."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pipeline.contracts.sharding import shard_of
from pipeline.graph_kernel import (
    Events,
    Rows,
    bin_start,
    collect_rows,
    degree_bins,
    limit_rows,
    merge_events,
    running_shares,
    shuffle_rows,
    to_shards,
)

EVENT = st.tuples(
    st.integers(3, 7), st.integers(0, 5), st.integers(0, 50), st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.integers(0, 2)
)
"""user, item, time, weight, split."""


def events_of(rows: list[tuple[int, int, int, float, int]]) -> Events:
    rows = sorted(rows, key=lambda row: (row[0], row[2]))
    types = (np.uint32, np.uint32, np.int64, np.float32, np.uint8)
    return Events(*(np.array([row[k] for row in rows], kind) for k, kind in enumerate(types)))


def rows_of(lists: list[list[int]], weights: list[list[float]] | None = None, times: object = None) -> Rows:
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in lists])]).astype(np.int64)
    ids = np.array([i for row in lists for i in row], np.uint32)
    heavy = np.array([w for row in weights or [] for w in row], np.float64)
    moments = np.array([t for row in times or [] for t in row], np.int64)  # type: ignore[attr-defined]
    return Rows(indptr, ids, heavy, moments)


def lists_of(rows: Rows, column: str = "ids") -> list[list[float]]:
    return [getattr(rows, column)[a:b].tolist() for a, b in pairwise(rows.indptr)]


@examples(deadline=None, max_examples=60)
@given(st.lists(EVENT, max_size=40), st.sampled_from([0.0, 0.1]))
def test_events_become_one_edge_per_user_and_item_of_the_training_period(
    rows: list[tuple[int, int, int, float, int]], decay: float
) -> None:
    expected: dict[int, dict[int, list[float]]] = {user: {} for user in range(2, 9)}
    used = 0
    for user, item, time, weight, split in sorted(rows, key=lambda row: (row[0], row[2])):
        if split == 0 and weight > 0:
            used += 1
            old, latest = expected[user].get(item, [0.0, time])
            expected[user][item] = [old * 2 ** (-(time - latest) * decay) + weight, time]
    found, counts = merge_events(events_of(rows), 2, 9, 6, weighted=True, decay=decay)
    assert lists_of(found) == [list(edges) for edges in expected.values()]
    assert lists_of(found, "times") == [[time for _, time in edges.values()] for edges in expected.values()]
    weights = [weight for edges in expected.values() for weight, _ in edges.values()]
    np.testing.assert_allclose(found.weights, weights, rtol=1e-12)
    assert (counts.used, counts.bad_row) == (used, -1)
    assert counts.weightless == sum(split == 0 and weight == 0 for *_, weight, split in rows)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), -float("inf")])
def test_an_event_that_cannot_be_weighed_is_named(weight: float) -> None:
    rows = [(0, 1, 5, 1.0, 0), (0, 2, 6, weight, 1), (1, 1, 7, weight, 0)]
    assert merge_events(events_of(rows), 0, 2, 3, False, 0.0)[1].bad_row == 2, "in the training period only"
    assert merge_events(events_of(rows[:1]), 0, 2, 1, False, 0.0)[1].bad_row == 0, "no such item"


@examples(deadline=None, max_examples=60)
@given(
    st.lists(st.dictionaries(st.integers(0, 30), st.integers(0, 4), max_size=12), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_limits_keep_the_latest_edges_equals_by_id(rows: list[dict[int, int]], least: int, most: int) -> None:
    given_rows = rows_of([list(row) for row in rows], None, [list(row.values()) for row in rows])
    found, too_few, too_many = limit_rows(given_rows, 0, least, most)
    expected = []
    for row in rows:
        kept = sorted(row, key=lambda item: (-row[item], item))[: most or None] if len(row) >= least else []
        expected.append([item for item in row if item in kept])
    assert lists_of(found) == expected
    assert lists_of(found, "times") == [[row[i] for i in kept] for row, kept in zip(rows, expected, strict=True)]
    assert too_few == sum(len(row) for row in rows if len(row) < least)
    assert too_many == sum(max(0, len(row) - most) for row in rows if len(row) >= least and most)


def test_limits_by_chance_are_fair_and_know_no_partition() -> None:
    users, items = 3000, 10
    whole, *_ = limit_rows(rows_of([list(range(items))] * users), 0, 1, 3, seed=5)
    assert set(whole.degrees) == {3}
    counts = np.bincount(whole.ids, minlength=items)
    assert ((counts - 900) ** 2 / (900 * 0.7)).sum() < 30  # chi-square-like: 10 items, 3 of 10 each
    part, *_ = limit_rows(rows_of([list(range(items))[::-1]] * 50), 700, 1, 3, seed=5)
    assert [sorted(row) for row in lists_of(part)] == lists_of(whole.part(700, 750))
    by_item, *_ = limit_rows(rows_of([list(range(700, 750))]), 4, 1, 20, seed=5, by_user=False)
    other, *_ = limit_rows(rows_of([list(range(700, 750))]), 4, 1, 20, seed=6, by_user=False)
    assert lists_of(by_item) != lists_of(other)


def test_any_first_part_of_a_shuffled_row_is_a_uniform_sample() -> None:
    lists = [[3, 1, 4, 5]] * 4000
    rows = rows_of(lists, [[3.0, 1.0, 4.0, 5.0]] * 4000)
    shuffle_rows(rows, 0, 7)
    np.testing.assert_array_equal(rows.ids, rows.weights)
    orders = {tuple(row) for row in lists_of(rows)}
    assert len(orders) == 24
    for place in range(4):
        counts = np.bincount(rows.ids.reshape(-1, 4)[:, place], minlength=6)[[1, 3, 4, 5]]
        assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001
    again = rows_of(lists[:10])
    shuffle_rows(again, 990, 7)
    assert lists_of(again) == lists_of(rows)[990:1000]


def test_shares_by_hand() -> None:
    rows = rows_of([[8, 9], [], [7], [1, 2, 3, 4]], [[0.5, 2.0], [], [1e-30], [1e30, 1e30, 2e30, 4e30]])
    ends = [2**32 / 5, 2**32, 2**32, 2**29, 2**30, 2**31, 2**32]
    assert running_shares(rows, 0.0).tolist() == [round(end) - 1 for end in ends]


def test_shares_of_old_rows_count_from_the_rows_own_newest_event() -> None:
    """A half-life of a second and a row ten years old: 2 to the -3e8 is no float, and 1 : 2 is still 1 : 2."""
    rows = rows_of([[1, 2, 3], [4]], [[1.0, 1.0, 1.0], [1.0]], [[0, 1, -(10**8)], [3 * 10**8]])
    shares = running_shares(rows, 1.0).tolist()
    assert shares == [round(2**32 / 3) - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1]


def test_shares_of_a_long_row_lose_nothing() -> None:
    """3 million equal edges: a running sum in float32 would stand still at 2 ** 24 / 10."""
    size = 3_000_000
    shares = running_shares(Rows(np.array([0, size]), np.zeros(size, np.uint32), np.full(size, 0.1), np.zeros(0)), 0.0)
    exact = np.round((np.arange(size) + 1) * (2.0**32 / size)) - 1
    assert np.abs(shares - exact).max() <= 1
    assert (np.diff(shares.astype(np.int64)) > 0).all()


def test_shares_follow_the_weights_however_unequal() -> None:
    generator = np.random.default_rng(0)
    weights = np.exp(generator.normal(0, 8, 1000))
    shares = running_shares(rows_of([list(range(1000))], [weights.tolist()]), 0.0).astype(np.int64)
    assert (np.diff(shares) >= 0).all()
    exact = np.cumsum(weights.astype(np.longdouble))
    np.testing.assert_allclose(shares, exact / exact[-1] * 2.0**32 - 1, atol=1.1)


def test_edges_reach_the_shard_of_their_id_and_come_back_in_order() -> None:
    generator = np.random.default_rng(1)
    lists = [generator.permutation(100)[: generator.integers(0, 9)].tolist() for _ in range(40)]
    weights = [[float(i) for i in row] for row in lists]
    rows = rows_of(lists, weights, lists)
    owners, edges, shards = to_shards(rows, 500, 100, 7)
    np.testing.assert_array_equal(shards, shard_of(edges.ids, 100, 7))
    np.testing.assert_array_equal(np.diff(edges.indptr), np.bincount(shards, minlength=7))
    np.testing.assert_array_equal(edges.weights, edges.ids)
    back = collect_rows(edges.ids, (owners, edges.weights, edges.times), 0, 100)
    expected = [[500 + user for user, row in enumerate(lists) if item in row] for item in range(100)]
    assert lists_of(back) == expected
    assert lists_of(back, "times") == [[item] * len(row) for item, row in enumerate(expected)]


def test_ids_up_to_the_last_that_32_bits_hold() -> None:
    last = 2**32 - 1
    events = events_of([(last, last, 1, 1.0, 0), (last, last - 1, 2, 1.0, 0), (last - 1, last, 3, 1.0, 0)])
    rows, counts = merge_events(events, last - 2, 2**32, 2**32, weighted=False, decay=0.0)
    assert counts.bad_row == -1
    assert lists_of(rows) == [[], [last], [last, last - 1]]
    owners, edges, shards = to_shards(rows, last - 2, 2**32, 1000)
    assert (edges.ids.tolist(), owners.tolist()) == ([last, last, last - 1], [last - 1, last, last])
    assert shards.tolist() == [999] * 3
    assert lists_of(collect_rows(edges.ids, (owners, edges.weights, edges.times), last - 1, 2**32)) == [
        [last],
        [last - 1, last],
    ]
    shuffle_rows(rows, last - 2, 0)
    limit_rows(rows, last - 2, 1, 1, seed=0)


def test_degrees_fall_into_the_bin_that_begins_at_or_below_them() -> None:
    degrees = np.array([0, 1, 2, 15, 16, 17, 18, 31, 32, 1000, 2**31, 2**40])
    starts = np.array([bin_start(place) for place in degree_bins(degrees)])
    assert starts[:6].tolist() == [0, 1, 2, 15, 16, 16]
    assert (starts <= degrees).all()
    assert (degrees < starts * 1.125 + 1).all()
