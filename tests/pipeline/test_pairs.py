"""Pairs and hard negatives, against slow versions and by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from pipeline.contracts import schemas
from pipeline.contracts.config import Pairs
from pipeline.contracts.datasets import arrow_to_lists
from pipeline.pairs import consecutive_pairs, hard_negatives, rank_range
from pipeline.walk_kernel import visit_counts, walks_per_hop
from tests.oracles import successors
from tests.synthetic import compressed


def interactions(events: list[tuple[int, int, int]], splits: list[int]) -> pa.Table:
    users, items, times = zip(*events, strict=True)
    columns = [users, items, times, range(len(events)), [1.0] * len(events), splits]
    return pa.table([pa.array(column) for column in columns], names=schemas.INTERACTIONS.arrow.names).cast(
        schemas.INTERACTIONS.arrow
    )


@pytest.mark.parametrize(("window", "max_gap"), [(1, 0), (3, 0), (2, 4)])
def test_pairs_are_each_users_following_items(window: int, max_gap: int) -> None:
    generator = np.random.default_rng(window)
    events = sorted(
        (int(u), int(i), int(t))
        for u, i, t in zip(
            generator.integers(0, 9, 200), generator.integers(0, 6, 200), generator.integers(0, 50, 200), strict=True
        )
    )
    events.sort(key=lambda event: (event[0], event[2]))
    found = consecutive_pairs(interactions(events, [0] * len(events)), window, max_gap)
    counted = Counter(zip(found.column("query").to_pylist(), found.column("positive").to_pylist(), strict=True))
    assert counted == successors(events, window, max_gap)


def test_nothing_after_the_split_is_paired() -> None:
    events = [(0, 1, 10), (0, 2, 20), (0, 3, 30), (0, 4, 40)]
    found = consecutive_pairs(interactions(events, [0, 0, 1, 2]), 3, 0)
    assert found.to_pydict() == {"query": [1], "positive": [2], "timestamp": [20]}


def test_hard_negatives_come_from_the_given_ranks() -> None:
    generator = np.random.default_rng(0)
    adjacency = (generator.random((60, 30)) < 0.2).astype(float)
    graph, per_hop = compressed(adjacency), walks_per_hop(2000, 3, 0.5)
    ids, _, lengths = visit_counts(graph, np.arange(60), per_hop, 40, 3)
    table = hard_negatives(graph, 10, 20, (15, 40), per_hop, 6, 3, False)
    indptr, values = arrow_to_lists(table.column("negatives"))
    assert table.column("id").to_pylist() == list(range(10, 20))
    for row, item in enumerate(range(10, 20)):
        drawn = values[indptr[row] : indptr[row + 1]].tolist()
        allowed = ids[item, 15 : lengths[item]].tolist()
        assert len(drawn) == len(set(drawn)) == min(6, len(allowed))
        assert set(drawn) <= set(allowed)


def test_ranks_scale_to_the_catalogue_unless_given() -> None:
    assert rank_range(Pairs(hard_negative_ranks=(2000, 5000)), 50, 2_000_000_000) == (1999, 5000)
    assert rank_range(Pairs(), 50, 4707) == (50, 470)
    assert rank_range(Pairs(), 50, 10**9) == (50, 5000)
    low, high = rank_range(Pairs(), 50, 40)
    assert low < high
