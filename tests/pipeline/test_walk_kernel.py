"""The kernels against dense oracles, and against themselves on other graphs and in other batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from pipeline.exact_kernel import Rows, compose, exact_neighbours, prefix_lengths, water_level
from pipeline.top_sums import make_scratch, top_sums
from pipeline.walk_kernel import (
    BipartiteGraph,
    degree_rank,
    degree_ranks,
    share_at,
    visit_counts,
    walk_ends,
    walks_per_hop,
)
from tests.oracles import composed, expected_visits, largest
from tests.synthetic import compressed, running_shares

UNIT = 2.0**-30
Result = tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]


def random_graph(num_items: int = 30, num_users: int = 25, seed: int = 1, density: float = 0.2) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    present = generator.random((num_items, num_users)) < density
    return np.where(present, generator.integers(1, 9, (num_items, num_users)), 0).astype(np.float64)


def planted_graph(num_items: int = 3000, num_users: int = 1500, num_topics: int = 30) -> NDArray[np.float64]:
    """Users of 20 to 300 items, most of them of the user's topic; items of skewed popularity."""
    generator = np.random.default_rng(5)
    popularity = generator.lognormal(0, 1, num_items)
    adjacency = np.zeros((num_items, num_users))
    for user in range(num_users):
        inside = np.arange(num_items) % num_topics == user % num_topics
        odds = popularity * np.where(inside, 0.7 / popularity[inside].sum(), 0.3 / popularity.sum())
        size = int(np.clip(generator.lognormal(np.log(40), 0.9), 5, 400))
        adjacency[generator.choice(num_items, size, replace=False, p=odds / odds.sum()), user] = 1.0
    return adjacency


def dense(result: Result, place: int, num_items: int) -> NDArray[np.float64]:
    """One row's scores as an array [num_items]."""
    ids, scores, lengths = result
    row = np.zeros(num_items)
    row[ids[place, : lengths[place]]] = scores[place, : lengths[place]]
    return row


def binary(adjacency: NDArray[np.float64], weighted: bool) -> NDArray[np.float64]:
    return adjacency if weighted else (adjacency > 0).astype(float)


def assert_same(first: Result, second: Result) -> None:
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def degrees(graph: BipartiteGraph) -> NDArray[np.int64]:
    return np.diff(graph.item_indptr)


ESTIMATORS: dict[str, Callable[[BipartiteGraph, NDArray[np.int64], int], Result]] = {
    "walks": lambda graph, items, kept: visit_counts(graph, items, walks_per_hop(60, 3, 0.5), kept, 3),
    "exact": lambda graph, items, kept: exact_neighbours(graph, items, kept, 40),
}
both = pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS)


# ---------------------------------------------------------------------------------------------------- walks


@pytest.mark.parametrize("weighted", [False, True])
def test_walks_follow_the_stated_distribution(weighted: bool) -> None:
    """One walk of two hops under many seeds, by the joint chance of where both hops end: independent draws."""
    adjacency = random_graph(7, 5, seed=2, density=0.5)
    graph, shape, num_seeds = compressed(adjacency, weighted), binary(adjacency, weighted), 12_000
    to_user, to_item = shape / shape.sum(axis=1, keepdims=True), (shape / shape.sum(axis=0, keepdims=True)).T
    hop = to_user @ to_item
    for item in (0, 3):
        expected: Counter[tuple[int, ...]] = Counter()
        for first, second in product(range(7), repeat=2):
            met = tuple(sorted(end for end in (first, second) if end != item))
            expected[met] += hop[item, first] * hop[first, second]
        observed: Counter[tuple[int, ...]] = Counter()
        for seed in range(num_seeds):
            ids, counts, lengths = visit_counts(graph, np.array([item]), np.array([1, 1]), 2, seed)
            observed[tuple(sorted(np.repeat(ids[0, : lengths[0]], counts[0, : lengths[0]])))] += 1
        assert set(observed) <= {met for met in expected if expected[met] > 0}
        outcomes = [met for met in expected if expected[met] * num_seeds > 5]
        rare = 1.0 - sum(expected[met] for met in outcomes)
        counts_found = [observed[met] for met in outcomes]
        found = np.array([*counts_found, num_seeds - sum(counts_found)])
        share = np.array([*(expected[met] for met in outcomes), rare]) * num_seeds
        found, share = found[share > 1e-6], share[share > 1e-6]
        assert stats.chisquare(found, share * found.sum() / share.sum()).pvalue > 1e-3


@pytest.mark.parametrize("weighted", [False, True])
def test_visits_over_several_hops_match_the_power_iteration(weighted: bool) -> None:
    adjacency = random_graph(seed=3)
    result = visit_counts(compressed(adjacency, weighted), np.array([4]), walks_per_hop(400_000, 4, 0.5), 30, 5)
    expected = expected_visits(binary(adjacency, weighted), 4, 4, 0.5)
    np.testing.assert_allclose(dense(result, 0, 30) / 400_000, expected, atol=3e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_first_steps_are_spread_evenly_over_the_edges(weighted: bool) -> None:
    """Each user here has the seed and one item of its own: its visits tell how many walks came by."""
    weights = np.array([1.0, 2, 3, 4, 5, 6, 7, 8])
    adjacency = np.concatenate([weights[None, :], 1e9 * np.eye(8)])
    graph = compressed(adjacency, True)
    if not weighted:
        even = np.concatenate([running_shares(np.ones(8)), graph.item_shares[8:]])
        graph = replace(graph, item_shares=even)
    for seed in range(20):
        visits = dense(visit_counts(graph, np.array([0]), np.array([800]), 9, seed), 0, 9)[1:]
        share = weights / weights.sum() if weighted else np.full(8, 1 / 8)
        assert np.abs(visits - 800 * share).max() < 3.0  # binomial: a standard deviation of 9


def test_how_many_walks_go_on_is_their_expectation() -> None:
    assert walks_per_hop(1000, 3, 0.5).tolist() == [1000, 500, 250]
    assert walks_per_hop(10, 4, 0.0).tolist() == [10, 10, 10, 10]
    adjacency = 1.0 - np.eye(20)[:, :4]  # no user has every item, and no item is the only one of a user
    ids, counts, _ = visit_counts(compressed(adjacency), np.array([19]), walks_per_hop(100, 3, 0.5), 20, 1)
    assert 19 not in ids[0, counts[0] > 0]
    assert 150 < counts.sum() <= 175


def test_another_seed_gives_other_walks() -> None:
    graph = compressed(random_graph())
    first, second = (visit_counts(graph, np.arange(30), np.array([40]), 10, seed)[1] for seed in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize("weighted", [False, True])
def test_steps_alone_are_those_that_are_counted(weighted: bool) -> None:
    graph, per_hop = compressed(random_graph(), weighted), walks_per_hop(100, 3, 0.5)
    ids, counts, _ = visit_counts(graph, np.arange(30), per_hop, 30, 2)
    back_home = per_hop.sum() - counts.sum(axis=1)
    assert (ids * counts).sum() + (np.arange(30) * back_home).sum() == walk_ends(graph, np.arange(30), per_hop, 2)


# ---------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("weighted", [False, True])
def test_exact_is_the_first_hop_when_the_budget_covers_it(weighted: bool) -> None:
    adjacency = random_graph(60, 40)
    graph = compressed(adjacency, weighted)
    result = exact_neighbours(graph, np.arange(60), 60, 10_000)
    for item in range(60):
        expected = expected_visits(binary(adjacency, weighted), item, 1, 0.5)
        np.testing.assert_allclose(dense(result, item, 60) * UNIT, expected, atol=1e-7)
        assert result[2][item] == (expected > 0).sum()


@both
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_by_score_then_degree_then_id(
    estimate: Callable[[BipartiteGraph, NDArray[np.int64], int], Result], weighted: bool
) -> None:
    """For rows shorter than all, longer, and in each way of selecting; with ranks given and derived."""
    adjacency = random_graph(300, 120, density=0.06)
    graph = compressed(adjacency, weighted)
    everything = estimate(graph, np.arange(300), 300)
    ranked = replace(graph, item_ranks=degree_ranks(graph.item_indptr))
    for kept in (1, 5, 20, 100, 300):
        result = estimate(graph, np.arange(300), kept)
        assert_same(result, estimate(ranked, np.arange(300), kept))
        for item in range(0, 300, 7):
            expected = largest(dense(everything, item, 300), degrees(graph), kept)
            count = result[2][item]
            assert [(s, i) for s, i in zip(result[1][item, :count], result[0][item, :count], strict=True)] == expected
            assert not result[1][item, count:].any()
            assert item not in result[0][item, :count]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 60))
def test_the_water_level_is_the_highest_that_fits(sizes: list[int], budget: int) -> None:
    level = water_level(np.array(sizes, np.int64), budget)
    assert 1 <= level <= budget
    assert level == 1 or sum(min(size, level) for size in sizes) <= budget
    assert level == budget or sum(min(size, level + 1) for size in sizes) > budget


@pytest.mark.parametrize("weighted", [False, True])
def test_a_budget_is_kept_and_its_estimate_is_unbiased(weighted: bool) -> None:
    """Over many shuffles of the users' lists; unweighted the mean is exact, weighted a prefix is a ratio estimate."""
    adjacency = random_graph(40, 12, seed=4, density=0.5)
    adjacency[:, 6:] *= random_graph(40, 6, seed=9, density=0.3) > 0
    shape = binary(adjacency, weighted)
    budget, num_shuffles = 30, 600
    total = np.zeros(40)
    for seed in range(num_shuffles):
        graph = compressed(adjacency, weighted, seed)
        result = exact_neighbours(graph, np.array([0]), 40, budget)
        total += dense(result, 0, 40) * UNIT
        assert result[2][0] <= budget
    users = np.flatnonzero(adjacency[0])
    read = np.minimum(adjacency[:, users].astype(bool).sum(axis=0), prefix_lengths(graph, np.array([0]), budget)[0][0])
    assert read.sum() <= budget < adjacency[:, users].astype(bool).sum()
    expected = expected_visits(shape, 0, 1, 0.5)
    np.testing.assert_allclose(total / num_shuffles, expected, atol=0.012 if weighted else 0.006)


def cut(graph: BipartiteGraph, items: NDArray[np.int64], lengths: NDArray[np.int64]) -> BipartiteGraph:
    """The graph with the rows of these items only, and every user's list cut to its length, as another host gets it."""
    kept = np.isin(np.arange(len(graph.item_indptr) - 1), items)
    inside = np.repeat(kept, degrees(graph))
    first = np.minimum(lengths, np.diff(graph.user_indptr))
    places = np.arange(len(graph.user_items)) - np.repeat(graph.user_indptr[:-1], np.diff(graph.user_indptr))
    prefix = places < np.repeat(first, np.diff(graph.user_indptr))
    weighted = len(graph.item_shares) > 0
    return BipartiteGraph(
        np.concatenate([[0], np.cumsum(np.where(kept, degrees(graph), 0))]),
        graph.item_users[inside],
        graph.item_shares[inside] if weighted else graph.item_shares,
        np.concatenate([[0], np.cumsum(first)]),
        graph.user_items[prefix],
        graph.user_shares[prefix] if weighted else graph.user_shares,
        degree_ranks(graph.item_indptr),
    )


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 1500), st.sampled_from([1, 3, 10, 40, 200]), st.sampled_from([1, 2, 50]))
def test_the_largest_sums_are_found_whatever_the_amounts(seed: int, size: int, kept: int, spread: int) -> None:
    """Equal amounts, a few large ones, and ids that share a cell; the item to skip has the most."""
    generator = np.random.default_rng(seed)
    ids = (generator.integers(0, 400, size) ** spread % 401).astype(np.uint32) << np.uint32(generator.integers(0, 20))
    amounts = (generator.pareto(0.5, size) if spread > 1 else np.zeros(size)).clip(0, 1e5).astype(np.uint32) + 1
    skip, used = int(ids[0]), np.unique(ids)
    ranks = generator.integers(0, 3, int(used.max()) + 1).astype(np.uint8)
    sums = {int(i): int(amounts[ids == i].sum()) for i in used if i != skip}
    order = sorted(sums, key=lambda i: (-sums[i], -int(ranks[i]), i))[:kept]
    top_ids, top_scores = np.zeros(kept, np.uint32), np.zeros(kept, np.int64)
    count = top_sums(
        ids, amounts, size, skip, ranks, np.zeros(0, np.int64), make_scratch(size), top_ids, top_scores
    )  # fmt: skip
    assert top_ids[:count].tolist() == order
    assert top_scores[:count].tolist() == [sums[i] for i in order]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("budget", [3, 20, 90, 2048])
def test_lists_cut_at_the_needed_prefixes_give_the_same_bytes(weighted: bool, budget: int) -> None:
    graph = compressed(random_graph(200, 60, density=0.15), weighted)
    items = np.arange(20, 90)
    whole = exact_neighbours(graph, items, 25, budget)
    at_the_budget = cut(graph, items, np.full(60, budget))
    assert_same(whole, exact_neighbours(at_the_budget, items, 25, budget))
    levels, _ = prefix_lengths(graph, items, budget)
    needed = np.zeros(60, np.int64)
    for item, level in zip(items, levels, strict=True):
        users = graph.item_users[graph.item_indptr[item] : graph.item_indptr[item + 1]]
        needed[users] = np.maximum(needed[users], level)
    assert_same(whole, exact_neighbours(cut(graph, items, needed), items, 25, budget, levels))


# --------------------------------------------------------------------------------------------------- compose


def rows_of(result: Result) -> Rows:
    """Rows by item id, as stored: their weights sum to 1."""
    ids, scores, lengths = result
    inside = np.arange(ids.shape[1]) < lengths[:, None]
    weights = scores / np.maximum(scores.sum(axis=1, keepdims=True), 1)
    return Rows(np.concatenate([[0], np.cumsum(lengths)]), ids[inside], weights[inside].astype(np.float32))


@pytest.mark.parametrize(("num_rows", "width"), [(50, 50), (7, 50), (50, 4), (3, 2), (0, 5)])
def test_composing_is_the_product_of_the_rows(num_rows: int, width: int) -> None:
    graph = compressed(random_graph(50, 30))
    rows = rows_of(exact_neighbours(graph, np.arange(50), 50, 1000))
    matrix = np.zeros((50, 50))
    first, narrow = matrix.copy(), matrix.copy()
    for item in range(50):
        ids, weights = (part[rows.indptr[item] : rows.indptr[item + 1]] for part in (rows.ids, rows.weights))
        matrix[item, ids] = weights
        first[item, ids[:num_rows]] = weights[:num_rows]
        narrow[item, ids[:width]] = weights[:width]
    result = compose(rows, np.arange(50), num_rows, width, 0.4, 50, item_indptr=graph.item_indptr)
    for item in range(50):
        expected = matrix[item] + 0.6 * first[item] @ narrow
        expected[item] = 0.0
        np.testing.assert_allclose(dense(result, item, 50) * UNIT, expected, atol=1e-6)
    if num_rows == width == 50:
        np.testing.assert_allclose(dense(result, 9, 50) * UNIT, composed(matrix, 9, 0.4), atol=1e-6)


def test_composed_ranks_are_sorted_at_any_depth() -> None:
    adjacency = random_graph(4000, 400, density=0.02)
    graph = compressed(adjacency)
    items = np.arange(4000)
    rows = rows_of(exact_neighbours(graph, items, 300, 4096))
    few = np.array([0, 77, 3999])
    deep = compose(rows, few, 100, 100, 0.5, 5000, degree_ranks(graph.item_indptr))
    short = compose(rows, few, 100, 100, 0.5, 60, item_indptr=graph.item_indptr)
    for place, item in enumerate(few):
        assert deep[2][place] > 2000
        found = largest(dense(deep, place, 4000), degrees(graph), 5000)
        assert [i for _, i in found] == deep[0][place, : deep[2][place]].tolist()
        assert deep[0][place, :60].tolist() == short[0][place].tolist()
        assert item not in deep[0][place, : deep[2][place]]


# ---------------------------------------------------------------------------------- quality, on a planted graph


def overlap_and_mass(result: Result, exact: NDArray[np.float64], kept: int) -> tuple[float, float]:
    """Share of the exact top rows found, and the exact mass of what was found by that of the exact top rows."""
    overlaps, masses = [], []
    for place, row in enumerate(exact):
        best = np.argsort(-row, kind="stable")[:kept]
        found = result[0][place, : result[2][place]]
        overlaps.append(len(np.intersect1d(best, found)) / kept)
        masses.append(row[found].sum() / row[best].sum())
    return float(np.mean(overlaps)), float(np.mean(masses))


def test_neighbourhoods_are_those_of_the_power_iteration() -> None:
    adjacency = planted_graph()
    graph, queries = compressed(adjacency), np.arange(0, 3000, 50)
    truth = np.stack([expected_visits(adjacency, int(item), 14, 0.5) for item in queries])
    walks = visit_counts(graph, queries, walks_per_hop(200, 3, 0.5), 50, 0)
    many = visit_counts(graph, queries, walks_per_hop(20_000, 3, 0.5), 50, 0)
    exact = exact_neighbours(graph, queries, 50, 2048)
    rows = rows_of(exact_neighbours(graph, np.arange(3000), 100, 2048))
    longer = compose(rows, queries, 100, 100, 0.5, 50, item_indptr=graph.item_indptr)
    bars = {"walks": (0.36, 0.60), "many": (0.88, 0.985), "exact": (0.85, 0.975), "longer": (0.85, 0.975)}
    whole = exact_neighbours(graph, queries, 3000, 2048)  # so many that no sketch is made, and all are sorted
    assert_same(exact, (whole[0][:, :50], whole[1][:, :50], np.minimum(whole[2], 50)))
    results = {"walks": walks, "many": many, "exact": exact, "longer": longer}
    found = {name: overlap_and_mass(result, truth, 50) for name, result in results.items()}
    assert all(np.greater_equal(found[name], bars[name]).all() for name in bars), found
    shares = np.stack([dense(many, place, 3000) for place in range(len(queries))]) / 20_000
    kept = shares > 0
    error = (shares - truth)[kept] / np.sqrt(truth[kept] / 20_000)  # below 1, as the first hop is not drawn
    assert 0.5 < np.sqrt((error**2).mean()) < 1.2


# ------------------------------------------------------------------------------------------- all, on odd graphs


@both
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_row_does_not_depend_on_the_others_in_the_call(
    estimate: Callable[[BipartiteGraph, NDArray[np.int64], int], Result], data: Any
) -> None:
    """Nor on their order, or on being asked for twice."""
    adjacency = random_graph(25, 15, seed=data.draw(st.integers(0, 1000)), density=data.draw(st.floats(0.02, 0.6)))
    graph = compressed(adjacency, data.draw(st.booleans()))
    items = np.array(data.draw(st.lists(st.integers(0, 24), max_size=60)), np.int64)
    together = estimate(graph, items, 6)
    alone = [estimate(graph, np.array([item]), 6) for item in items]
    for part in range(3):
        for place in range(len(items)):
            np.testing.assert_array_equal(together[part][place], alone[place][part][0])


@both
def test_items_alone_or_without_users_have_no_neighbours(
    estimate: Callable[[BipartiteGraph, NDArray[np.int64], int], Result],
) -> None:
    adjacency = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    ids, _, lengths = estimate(compressed(adjacency), np.arange(4), 5)
    assert lengths.tolist() == [0, 1, 1, 0]
    assert ids[1, 0] == 2
    assert ids[2, 0] == 1
    assert [part.shape for part in estimate(compressed(adjacency), np.arange(0), 5)] == [(0, 5), (0, 5), (0,)]
    assert estimate(compressed(np.zeros((3, 2))), np.arange(3), 5)[2].tolist() == [0, 0, 0]


@both
@pytest.mark.parametrize("weighted", [False, True])
def test_an_edge_in_the_graph_twice_counts_twice(
    estimate: Callable[[BipartiteGraph, NDArray[np.int64], int], Result], weighted: bool
) -> None:
    """User 0 has item 1 twice and items 0 and 2 once; with weights, as much of them as one edge of weight 2."""
    shares = [running_shares(np.ones(n)) for n in (1, 2, 1)] if weighted else [np.zeros(0, np.uint32)]
    users = running_shares(np.ones(4)) if weighted else np.zeros(0, np.uint32)
    graph = BipartiteGraph(
        np.array([0, 1, 3, 4]), np.zeros(4, np.uint32), np.concatenate(shares), np.array([0, 4]),
        np.array([1, 0, 2, 1], np.uint32), users, np.zeros(0, np.uint8),
    )  # fmt: skip
    ids, scores, lengths = estimate(graph, np.array([0]), 5)
    assert ids[0, : lengths[0]].tolist() == [1, 2]
    assert scores[0, 0] > 1.2 * scores[0, 1]


@pytest.mark.parametrize("weighted", [False, True])
def test_hubs_are_read_in_part(weighted: bool) -> None:
    """An item of 5000 users, one of whom has 100 000 items; the rest have the hub and one of ten other items."""
    num_users, num_long = 5000, 100_000
    long_list = np.arange(11, 11 + num_long)
    np.random.default_rng(0).shuffle(long_list)
    user_items = [np.array([0, 1 + user % 10]) for user in range(num_users - 1)] + [np.concatenate([[0], long_list])]
    user_indptr = np.concatenate([[0], np.cumsum([len(row) for row in user_items])])
    items = np.concatenate(user_items)
    order = np.argsort(items, kind="stable")
    item_users = np.repeat(np.arange(num_users), np.diff(user_indptr))[order]
    item_indptr = np.concatenate([[0], np.cumsum(np.bincount(items))])

    def shares(indptr: NDArray[np.int64]) -> NDArray[np.uint32]:
        rows = [running_shares(np.ones(size)) for size in np.diff(indptr)]
        return np.concatenate(rows) if weighted else np.zeros(0, np.uint32)

    graph = BipartiteGraph(
        item_indptr, item_users.astype(np.uint32), shares(item_indptr), user_indptr, items.astype(np.uint32),
        shares(user_indptr), np.zeros(0, np.uint8),
    )  # fmt: skip
    ids, scores, lengths = exact_neighbours(graph, np.array([0, 1, 11]), 10, 2048)
    assert sorted(ids[0]) == list(range(1, 11))
    np.testing.assert_allclose(scores[0] * UNIT, 0.05, atol=0.002)
    assert lengths.tolist() == [10, 1, 10]
    assert (scores[2] <= 2**30 // 2000).all()
    assert prefix_lengths(graph, np.array([0, 11]), 1500)[0].tolist() == [1, 1500]
    visits = visit_counts(graph, np.array([0]), np.array([5000]), 10, 0)
    np.testing.assert_allclose(visits[1][0] / 5000, 0.05, atol=0.015)


def test_a_budget_smaller_than_an_items_users_is_kept() -> None:
    graph = compressed(np.ones((6, 50)))
    ids, scores, _ = exact_neighbours(graph, np.array([2]), 6, 4)
    assert 0 < len(ids[0][scores[0] > 0]) <= 4


def test_degree_ranks_grow_with_the_degree() -> None:
    sizes = np.concatenate([np.arange(3000), 2 ** np.arange(1, 62) - 1, 2 ** np.arange(1, 62)])
    ranks = np.array([degree_rank(int(size)) for size in np.sort(sizes)])
    assert (np.diff(ranks) >= 0).all()
    assert ranks[0] == 0
    assert ranks[1] == 8
    assert ranks.max() == 255
    assert degree_rank(1 << 31) > degree_rank((1 << 31) - (1 << 28))
    assert degree_ranks(np.array([0, 0, 5, 6])).tolist() == [0, degree_rank(5), 8]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), st.integers(0, 2**32 - 1))
def test_a_point_falls_on_the_first_edge_that_reaches_it(ends: list[int], point: int) -> None:
    shares = np.array(sorted([*ends, 2**32 - 1]), np.uint32)
    assert share_at(point, 0, len(shares), shares) == np.searchsorted(shares, point)
