"""Exact PageRank against the slow oracle, and quality by hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from infra.bench.generate import graph
from infra.bench.measure import Exact, alternate, exact_ppr, gather, in_threads, quality
from infra.bench.quality import build_graph
from tests.oracles import expected_visits


@pytest.mark.parametrize("weighted", [False, True])
def test_power_iteration_is_the_oracle(weighted: bool) -> None:
    random = np.random.default_rng(0)
    adjacency = np.where(random.random((40, 25)) < 0.2, random.integers(1, 9, (40, 25)), 0).astype(float)
    adjacency[np.arange(40), np.arange(40) % 25] = 1.0
    items, users = np.nonzero(adjacency)
    found = build_graph(users, items, adjacency[items, users] if weighted else None)
    asked = np.arange(0, 40, 2)
    exact = exact_ppr(found, asked, 10, restart_probability=0.4, max_hops=6)
    for row, item in enumerate(asked):
        expected = expected_visits(adjacency if weighted else (adjacency > 0).astype(float), int(item), 6, 0.4)
        np.testing.assert_allclose(exact.scores[row], expected, rtol=1e-5, atol=1e-7)
        assert np.allclose(np.sort(expected)[::-1][:10], expected[exact.top[row]], rtol=1e-5)


def test_the_same_in_any_number_of_threads() -> None:
    found = graph(500, 100, 2000, seed=1)
    items = np.arange(70)
    one, two = (exact_ppr(found, items, 20, threads=threads) for threads in (1, 2))
    assert np.array_equal(one.scores, two.scores)
    assert np.array_equal(one.top, two.top)


def test_quality_by_hand() -> None:
    scores = np.array([[0.0, 0.4, 0.3, 0.2, 0.1]], np.float32)
    exact = Exact(np.array([0]), scores, np.array([[1, 2]], np.uint32), np.array([2]))
    found = np.array([[1, 3]], np.uint32), np.array([[3, 1]]), np.array([2])
    result = {name: float(values[0]) for name, values in quality(found, exact).items()}
    assert result["overlap"] == 0.5
    assert result["mass"] == pytest.approx((0.4 + 0.2) / (0.4 + 0.3))
    assert result["l1"] == pytest.approx(abs(4 / 7 - 3 / 4) + 3 / 7 + 1 / 4)


def test_what_has_no_neighbours_is_left_out_and_a_short_row_is_not_blamed() -> None:
    scores = np.array([[0.0, 0.5, 0.0], [0.0, 0.0, 0.0]], np.float32)
    exact = Exact(np.array([0, 1]), scores, np.array([[1, 2], [0, 2]], np.uint32), np.array([1, 0]))
    found = np.array([[1, 0], [0, 0]], np.uint32), np.array([[7, 0], [0, 0]]), np.array([1, 0])
    result = quality(found, exact)
    assert result["overlap"][0] == 1.0
    assert result["l1"][0] == 0.0
    assert np.isnan(result["overlap"][1])


def test_cases_take_turns_after_a_call_that_is_not_counted() -> None:
    calls: list[str] = []
    seconds = alternate({"a": partial(calls.append, "a"), "b": partial(calls.append, "b")}, 2)
    assert "".join(calls) == "ababab"
    assert (
        [len(times.wall) for times in seconds.values()]
        == [len(times.processor) for times in seconds.values()]
        == [2, 2]
    )


def test_threads_share_the_items_in_order() -> None:
    items = np.arange(100)
    for threads in (1, 3):
        assert np.array_equal(np.concatenate(in_threads(lambda some: 2 * some, items, threads)), 2 * items)


def test_gathers_read_all_over_the_array() -> None:
    array = np.zeros(1000, np.uint32)
    array[500:] = 1
    assert gather([array], 10_000) == pytest.approx(5000, abs=300)
