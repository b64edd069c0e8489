"""The walk kernel against the expected visits worked out densely."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.walk_kernel import visit_counts, walks_per_hop
from tests.oracles import expected_visits
from tests.synthetic import compressed


def random_graph(num_items: int = 30, num_users: int = 25, seed: int = 1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    present = generator.random((num_items, num_users)) < 0.2
    return np.where(present, generator.integers(1, 9, (num_items, num_users)), 0).astype(np.float64)


@pytest.mark.parametrize("weighted", [False, True])
def test_first_hops_follow_the_stated_distribution(weighted: bool) -> None:
    """With one hop the visits of different walks are independent, so a chi-square test is exact."""
    adjacency = random_graph()
    shape = adjacency if weighted else (adjacency > 0).astype(float)
    p_values = []
    for item in range(10):
        ids, counts, lengths = visit_counts(
            compressed(adjacency), np.array([item]), np.array([20_000]), 30, 7, weighted
        )
        kept = ids[0, : lengths[0]]
        expected = expected_visits(shape, item, 1, 0.5)
        observed = np.zeros(len(adjacency))
        observed[kept] = counts[0, : lengths[0]]
        assert observed[expected == 0].sum() == 0
        reached = expected > 0
        share = expected[reached] / expected[reached].sum() * observed.sum()
        p_values.append(stats.chisquare(observed[reached], share).pvalue)
    assert min(p_values) > 1e-4
    assert max(p_values) > 0.05


@pytest.mark.parametrize("weighted", [False, True])
def test_visits_over_several_hops_match_the_power_iteration(weighted: bool) -> None:
    adjacency = random_graph(seed=3)
    shape = adjacency if weighted else (adjacency > 0).astype(float)
    per_hop = walks_per_hop(200_000, 4, 0.5)
    ids, counts, lengths = visit_counts(compressed(adjacency), np.array([4]), per_hop, 30, 5, weighted)
    estimate = np.zeros(len(adjacency))
    estimate[ids[0, : lengths[0]]] = counts[0, : lengths[0]] / 200_000
    np.testing.assert_allclose(estimate, expected_visits(shape, 4, 4, 0.5), atol=5e-3)


def test_an_items_row_does_not_depend_on_the_others_in_the_call() -> None:
    graph = compressed(random_graph())
    per_hop = walks_per_hop(300, 3, 0.5)
    together = visit_counts(graph, np.arange(30), per_hop, 8, 0)
    for item in (0, 13, 29):
        alone = visit_counts(graph, np.array([item]), per_hop, 8, 0)
        for place in range(3):
            np.testing.assert_array_equal(together[place][item], alone[place][0])


def test_rows_are_sorted_by_count_then_id_and_leave_out_the_item() -> None:
    ids, counts, lengths = visit_counts(compressed(random_graph()), np.arange(30), walks_per_hop(50, 3, 0.5), 10, 2)
    for item in range(30):
        row = [(-count, i) for i, count in zip(ids[item, : lengths[item]], counts[item, : lengths[item]], strict=True)]
        assert row == sorted(row)
        assert item not in ids[item, : lengths[item]]
        assert counts[item, lengths[item] :].sum() == 0


def test_items_alone_or_without_users_have_no_neighbours() -> None:
    adjacency = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    ids, _, lengths = visit_counts(compressed(adjacency), np.arange(4), walks_per_hop(20, 3, 0.5), 5, 0)
    assert lengths.tolist() == [0, 1, 1, 0]
    assert ids[1, 0] == 2
    assert ids[2, 0] == 1


def test_how_many_walks_go_on_is_their_expectation() -> None:
    assert walks_per_hop(1000, 3, 0.5).tolist() == [1000, 500, 250]
    assert walks_per_hop(10, 4, 0.0).tolist() == [10, 10, 10, 10]


def test_another_seed_gives_other_walks() -> None:
    graph = compressed(random_graph())
    first, second = (visit_counts(graph, np.arange(30), np.array([40]), 10, seed)[1] for seed in (0, 1))
    assert (first != second).any()
