"""Pairs and hard negatives, against slow versions and by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark import SparkContext

from pipeline import pairs
from pipeline.contracts import schemas
from pipeline.contracts.config import Pairs, parse_settings
from pipeline.contracts.datasets import Lineage, arrow_to_lists, commit, open_manifest, read_table, write_shard
from pipeline.contracts.storage import Storage
from pipeline.neighbourhoods import Neighbourhoods
from pipeline.pairs import consecutive_pairs, drawn, rank_range
from tests.oracles import expected_visits, successors
from tests.synthetic import compressed, shop_settings, store_graph

LINEAGE = Lineage("pairs", {}, {})


def interactions(events: list[tuple[int, int, int]], splits: list[int]) -> pa.Table:
    users, items, times = zip(*events, strict=True)
    columns = [users, items, times, [1.0] * len(events), splits]
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


def ranking_by_power_iteration(adjacency: np.ndarray) -> list[np.ndarray]:
    visits = [expected_visits(adjacency, item, 14, 0.5) for item in range(len(adjacency))]
    return [np.argsort(-row, kind="stable")[: int((row > 0).sum())] for row in visits]


@pytest.mark.parametrize("strategy", ["replicate", "shuffle"])
@pytest.mark.parametrize("is_resumed", [False, True])
def test_hard_negatives_come_from_the_given_ranks_of_the_queries_alone(
    spark: SparkContext, storage: Storage, monkeypatch: pytest.MonkeyPatch, strategy: str, is_resumed: bool
) -> None:
    """Calibrated against exact personalised PageRank: what is drawn for ranks 20 to 50 lies about there.

    Also after an attempt by the other strategy that was killed.
    """
    generator = np.random.default_rng(0)
    groups = np.arange(90)[:, None] // 30 == np.arange(45)[None, :] // 15
    adjacency = (generator.random((90, 45)) < np.where(groups, 0.35, 0.06)).astype(float)
    store_graph(storage, compressed(adjacency), 3)
    events = [(user, int(item), 0) for user in range(45) for item in np.flatnonzero(adjacency[:40, user])[:2]]
    rows = interactions(events, [0] * len(events))
    commit(storage, schemas.INTERACTIONS, [write_shard(storage, schemas.INTERACTIONS, 0, rows, LINEAGE)], LINEAGE)
    tree = shop_settings(Path("data"), Path(storage.url))
    tree["task"]["pairs"] = {"num_hard_negatives": 6, "hard_negative_ranks": [20, 50], "compose_rows": 10}
    if is_resumed:
        tree["resources"]["walks"] = {"strategy": "shuffle" if strategy == "replicate" else "replicate"}
        with monkeypatch.context() as patch:
            patch.setattr(Neighbourhoods, "store", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                pairs.run(spark, storage, parse_settings(tree), LINEAGE)
        assert "queries" in storage.names("pairs-ranking")
    tree["resources"]["walks"] = {"strategy": strategy}
    pairs.run(spark, storage, parse_settings(tree), LINEAGE)

    queries = set(read_table(storage, open_manifest(storage, schemas.PAIRS)).column("query").to_pylist())
    table = read_table(storage, open_manifest(storage, schemas.HARD_NEGATIVES))
    indptr, values = arrow_to_lists(table.column("negatives"))
    exact, ranks = ranking_by_power_iteration(adjacency), []
    for item in range(90):
        drawn = values[indptr[item] : indptr[item + 1]].tolist()
        assert len(set(drawn)) == len(drawn) == (6 if item in queries else 0)
        ranks += [int(np.flatnonzero(exact[item] == other)[0]) + 1 for other in drawn]
    assert 0 < len(queries) < 90
    assert np.mean([15 <= rank <= 55 for rank in ranks]) > 0.9
    assert 28 < np.mean(ranks) < 42
    assert storage.names("pairs-ranking") == []


def test_an_item_without_ranks_that_deep_has_what_exists() -> None:
    ids = np.array([[4, 3, 2, 9], [1, 2, 0, 0]], np.uint32)
    rows = drawn(ids, np.array([4, 2]), np.array([7, 8]), 1, 2, seed=3)
    assert set(rows[0].tolist()) <= {3, 2, 9}
    assert [len(row) for row in rows] == [2, 1]
    assert rows[1].tolist() == [2]


def test_ranks_scale_to_the_catalogue_unless_given() -> None:
    assert rank_range(Pairs(hard_negative_ranks=(2000, 5000)), 50, 2_000_000_000) == (1999, 5000)
    assert rank_range(Pairs(), 50, 4707) == (50, 470)
    assert rank_range(Pairs(), 50, 10**9) == (50, 5000)
    low, high = rank_range(Pairs(), 50, 40)
    assert low < high


def slow_questions(events: list[tuple[int, int, int]], splits: list[int]) -> list[tuple[int, int, list[int]]]:
    """(query, target, seen before) of every validation event where a user touches an item anew, but not its first."""
    found = []
    for place, (user, item, _) in enumerate(events):
        before = [other for owner, other, _ in events[:place] if owner == user]
        if splits[place] == schemas.VALIDATION_SPLIT and before and item not in before:
            found.append((before[-1], item, sorted(set(before))))
    return found


def test_questions_are_the_validation_events_and_what_their_users_had_seen() -> None:
    generator = np.random.default_rng(3)
    drawn_events = zip(generator.integers(0, 12, 400), generator.integers(0, 25, 400), range(400), strict=True)
    events = sorted(((int(u), int(i), int(t)) for u, i, t in drawn_events), key=lambda event: (event[0], event[2]))
    splits = [int(split) for split in generator.choice([0, 1, 2], 400, p=[0.6, 0.3, 0.1])]
    table = pairs.validation_questions(interactions(events, splits), share=1.0, seed=1)
    found = [(row["query"], row["target"], sorted(row["seen"])) for row in table.to_pylist()]
    assert found == slow_questions(events, splits)
    assert table.schema == schemas.QUESTIONS.arrow
    some = pairs.validation_questions(interactions(events, splits), share=0.5, seed=1)
    assert 0.3 * len(found) < some.num_rows < 0.7 * len(found)
    # a user's questions are drawn alike whoever else is in the shard
    last = [place for place, event in enumerate(events) if event[0] == 11]
    alone = interactions([events[place] for place in last], [splits[place] for place in last])
    kept = pairs.validation_questions(alone, share=0.5, seed=1).to_pylist()
    assert kept == some.to_pylist()[some.num_rows - len(kept) :]
    assert pairs.validation_questions(interactions(events, [0] * 400), 1.0, 1).num_rows == 0
