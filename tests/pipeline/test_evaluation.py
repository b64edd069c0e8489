"""Ranks and metrics against slow, obvious versions and numbers worked by hand; the stage against both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark import SparkContext

from pipeline import evaluation, ranking
from pipeline.contracts import datasets, schemas
from pipeline.contracts.config import Settings, parse_settings
from pipeline.contracts.datasets import Lineage
from pipeline.contracts.errors import DataError
from pipeline.contracts.storage import Storage
from pipeline.questions import Events, item_to_item, read_events, sample_blocks
from pipeline.ranking import Catalogue, Questions

LINEAGE = Lineage("test", {}, {})
HALF_LIFE = 10.0


def random_events(num_users: int = 12, num_items: int = 30, num_events: int = 300, seed: int = 1) -> Events:
    """Users who repeat themselves; the last third of the time is test, a slice before it validation."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(num_users, size=num_events), rng.integers(num_items, size=num_events)
    timestamp = rng.integers(100, size=num_events)
    split = np.where(timestamp < 55, 0, np.where(timestamp < 65, 1, 2))
    split[user == 0], split[user == 1] = 2, 0
    order = np.lexsort((timestamp, user))
    return Events(user[order], item[order], timestamp[order], split[order])


def asked(questions: Questions) -> list[tuple[dict[int, float], int, set[int]]]:
    """Questions as plain values: the query's items and weights, the target, what was seen."""
    plain = []
    for row, target in zip(questions.rows, questions.targets, strict=True):
        history: dict[int, float] = {}
        for place in range(questions.indptr[row], questions.indptr[row + 1]):
            item = int(questions.items[place])
            history[item] = history.get(item, 0) + float(questions.weights[place])
        seen = questions.seen[questions.seen_indptr[row] : questions.seen_indptr[row + 1]].tolist()
        assert len(seen) == len(set(seen))
        plain.append((history, int(target), set(seen)))
    return plain


def slow_item_to_item(events: Events) -> list[tuple[dict[int, float], int, set[int]]]:
    found = []
    for user in sorted(set(events.user.tolist())):
        items, splits = events.item[events.user == user].tolist(), events.split[events.user == user].tolist()
        found += [
            ({items[place - 1]: 1.0}, items[place], set(items[:place]))
            for place in range(1, len(items))
            if splits[place] == 2 and items[place] not in items[:place]
        ]
    return found


def slow_user_to_item(events: Events) -> list[tuple[dict[int, float], set[int], set[int]]]:
    found = []
    for user in sorted(set(events.user.tolist())):
        rows = [tuple(map(int, row)) for row in zip(*vars(events).values(), strict=True) if row[0] == user]
        train = [(item, time) for _, item, time, split in rows if split == 0]
        seen = {item for _, item, _, split in rows if split != 2}
        targets = {item for _, item, _, split in rows if split == 2} - seen
        if train and targets:
            weights: dict[int, float] = {}
            for item, time in train:
                weights[item] = weights.get(item, 0) + 0.5 ** ((max(t for _, t in train) - time) / HALF_LIFE)
            total = sum(weights.values())
            found.append(({item: weight / total for item, weight in weights.items()}, targets, seen))
    return found


def slow_ranks(questions: Questions, scores_of: Callable[[dict[int, float]], Any]) -> list[float]:
    """The definition: among unseen items, 1 + those above + half of those equal."""
    ranks = []
    for history, target, seen in asked(questions):
        scores = scores_of(history)
        others = [scores[i] for i in range(len(scores)) if i != target and i not in seen]
        equal = [math.isclose(s, scores[target], rel_tol=1e-6, abs_tol=1e-9) for s in others]
        ranks.append(1 + sum(s > scores[target] for s, e in zip(others, equal, strict=True) if not e) + sum(equal) / 2)
    return ranks


def adjacency(rows: np.ndarray, columns: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    edges = np.unique(np.stack([rows, columns], axis=1), axis=0)
    counts = np.bincount(edges[:, 0], minlength=num_rows)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), edges[:, 1].astype(np.uint32)


def both_questions(events: Events) -> list[Questions]:
    return [item_to_item(events)[1], evaluation.user_to_item(events, HALF_LIFE)[1]]


# ------------------------------------------------------------------------------------------------ questions


def test_item_to_item_asks_what_the_slow_reading_of_the_protocol_asks() -> None:
    events = random_events()
    counts, questions, users = item_to_item(events)
    expected = slow_item_to_item(events)
    assert asked(questions) == expected
    assert counts["queries"] == len(expected) == len(users)
    left_out = counts["without_earlier_item"] + counts["target_seen_before"]
    assert counts["test_events"] == left_out + len(expected) == (events.split == 2).sum()
    assert counts["without_earlier_item"] > 0
    assert counts["target_seen_before"] > 0


def test_user_to_item_asks_what_the_slow_reading_of_the_protocol_asks() -> None:
    events = random_events()
    counts, questions, users = evaluation.user_to_item(events, HALF_LIFE)
    expected = slow_user_to_item(events)
    for row, (history, targets, seen) in enumerate(expected):
        mine = [question for question, own in zip(asked(questions), questions.rows, strict=True) if own == row]
        assert {target for _, target, _ in mine} == targets
        assert mine[0][0] == pytest.approx(history)
        assert mine[0][2] == seen
    assert counts["queries"] == len(expected) == len(users)
    assert counts["users_with_test_events"] == len(expected) + counts["without_history"] + counts["without_new_items"]


def test_users_of_one_moment_give_no_user_query_and_are_counted() -> None:
    events = Events(*(np.array(v) for v in ([0, 0, 1, 1], [1, 2, 1, 3], [5, 5, 90, 90], [0, 0, 2, 2])))
    counts, questions, _ = evaluation.user_to_item(events, HALF_LIFE)
    assert counts == {"users_with_test_events": 1, "without_history": 1, "without_new_items": 0, "queries": 0}
    assert len(questions.rows) == 0


def test_chosen_questions_are_those_of_all_questions() -> None:
    events = random_events()
    chosen = np.array([0, 3, 4, 7])
    everything = asked(item_to_item(events)[1])
    assert asked(item_to_item(events, chosen)[1]) == [everything[place] for place in chosen]
    _, questions, users = evaluation.user_to_item(events, HALF_LIFE)
    _, some, some_users = evaluation.user_to_item(events, HALF_LIFE, chosen)
    assert some_users.tolist() == users[chosen].tolist()
    assert asked(some) == [q for q, row in zip(asked(questions), questions.rows, strict=True) if row in chosen]


def test_joined_questions_stay_the_same_questions() -> None:
    parts = [evaluation.user_to_item(random_events(seed=seed), HALF_LIFE)[1] for seed in (1, 2, 3)]
    assert asked(ranking.join_questions(parts)) == [question for part in parts for question in asked(part)]


def test_every_query_is_drawn_at_most_once_and_from_the_shard_that_has_it() -> None:
    tasks = sample_blocks([5, 0, 20, 7], limit=13, seed=[1, 2], block=4)
    drawn = [(part["shard"], local) for task in tasks for part in task["parts"] for local in part["chosen"]]
    assert len(drawn) == len(set(drawn)) == 13
    assert all(local < [5, 0, 20, 7][shard] for shard, local in drawn)
    assert max(sum(len(part["chosen"]) for part in task["parts"]) for task in tasks) == 4
    assert sample_blocks([0, 0], 10, [1]) == []
    all_of_them = sample_blocks([2, 1], 10, [1])
    assert all_of_them == [{"parts": [{"shard": 0, "chosen": [0, 1]}, {"shard": 1, "chosen": [0]}]}]


# ------------------------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize("normalise", [False, True])
def test_vector_ranks_equal_the_definition(normalise: bool) -> None:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(30, 6)).astype(np.float32)
    vectors[7] = vectors[8] = vectors[9]  # equal scores for every query
    vectors[4] = 0
    columns = np.array([0, 2, 3, 5])
    catalogue = Catalogue(vectors, columns, normalise)
    dense = vectors[:, columns].astype(np.float64)
    if normalise:
        dense /= np.maximum(np.linalg.norm(dense, axis=1), 1e-30)[:, None]
    for questions in both_questions(random_events()):
        expected = slow_ranks(questions, lambda history: dense @ sum(w * dense[i] for i, w in history.items()))
        assert ranking.vector_ranks(questions, catalogue).tolist() == expected


def test_popularity_ranks_share_ties_evenly() -> None:
    degrees = np.array([5, 3, 3, 3, 0, 9])
    indptr, none = np.array([0, 1, 2]), np.array([0, 1, 1])
    questions = Questions(indptr, np.array([4, 4]), np.ones(2), none, np.array([5]), np.array([0, 1]), np.array([2, 2]))
    # the query of item 4 saw 5: items 0 above, 1 and 3 equal: 1 + 1 + 1; the other one also has item 5 above
    assert ranking.popularity_ranks(questions, degrees).tolist() == [3.0, 4.0]


def test_item_knn_ranks_equal_dense_cosines_of_cooccurrence() -> None:
    events = random_events(num_events=500)
    train = events.split == 0
    users, items = events.user[train], events.item[train]
    touched = np.zeros((12, 30))
    touched[users, items] = 1
    together = touched.T @ touched
    norms = np.sqrt(np.maximum(np.diag(together), 1))
    cosines = together / norms[:, None] / norms[None, :]
    graphs = adjacency(items, users, 30), adjacency(users, items, 12)
    for questions in both_questions(events):
        expected = slow_ranks(questions, lambda history: sum(w * cosines[i] for i, w in history.items()))
        assert ranking.cooccurrence_ranks(questions, *graphs).tolist() == expected


def test_a_seen_item_is_never_ranked_above() -> None:
    vectors = np.eye(40, dtype=np.float32) + np.linspace(0, 1, 40, dtype=np.float32)[:, None]
    seen = np.array([i for i in range(40) if i != 3])
    questions = Questions(
        np.array([0, 1]), np.array([39]), np.ones(1), np.array([0, 39]), seen, np.array([0]), np.array([3])
    )
    assert ranking.vector_ranks(questions, Catalogue(vectors)).tolist() == [1.0]
    assert ranking.popularity_ranks(questions, np.arange(40)).tolist() == [1.0]


def test_block_size_changes_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(4).normal(size=(30, 8)).astype(np.float32)
    for questions in both_questions(random_events()):
        whole = ranking.vector_ranks(questions, Catalogue(vectors)).tolist()
        for columns, block_bytes in ((1, 1), (7, 100), (29, 10**6)):
            with monkeypatch.context() as patch:
                patch.setattr(ranking, "COLUMNS", columns)
                assert ranking.vector_ranks(questions, Catalogue(vectors), block_bytes).tolist() == whole


def test_top_k_is_exact_search_without_the_item_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "COLUMNS", 11)
    vectors = np.random.default_rng(5).normal(size=(50, 5)).astype(np.float32)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    ids, best = ranking.top_k(vectors, Catalogue(vectors), 20, np.arange(50))
    assert ids.tolist() == np.argsort(-scores, axis=1)[:, :20].tolist()
    np.testing.assert_allclose(best, -np.sort(-scores, axis=1)[:, :20], rtol=1e-5)
    assert ranking.top_k(vectors[:1], Catalogue(vectors[:1]), 5, np.array([0]))[0].shape == (1, 0)


# ------------------------------------------------------------------------------------------------ metrics


def test_metrics_of_a_hand_worked_case() -> None:
    # query 0: one target at rank 3; query 1: targets at ranks 1, 4 and 30
    values = ranking.query_metrics(np.array([3.0, 1, 4, 30]), np.array([0, 1, 1, 1]), 2, [2, 10])
    found = dict(zip(ranking.metric_names([2, 10]), values.T.tolist(), strict=True))
    assert found["mrr"] == [1 / 3, 1]
    assert found["hit_rate@2"] == [0, 1]
    assert found["hit_rate@10"] == [1, 1]
    assert found["recall@2"] == pytest.approx([0, 1 / 3])
    assert found["recall@10"] == pytest.approx([1, 2 / 3])
    assert found["ndcg@2"] == pytest.approx([0, 1 / (1 + 1 / math.log2(3))])
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert found["ndcg@10"] == pytest.approx([1 / math.log2(4), (1 + 1 / math.log2(5)) / ideal])


def test_one_target_per_query_makes_recall_the_hit_rate() -> None:
    ranks = np.random.default_rng(6).integers(1, 40, size=100) / 2 + 0.5
    found = ranking.query_metrics(ranks, np.arange(100), 100, [10])
    assert found[:, 1].tolist() == found[:, 2].tolist()


def test_bootstrap_intervals_hold_the_mean_and_shrink_with_more_users() -> None:
    rng = np.random.default_rng(7)
    widths = []
    for size in (200, 20_000):
        values = rng.random((size, 1))
        means = ranking.bootstrap_means(values, np.arange(size), 400, seed=1)
        low, high = np.percentile(means, [2.5, 97.5])
        assert low < values.mean() < high
        assert high - low == pytest.approx(2 * 1.96 * values.std() / size**0.5, rel=0.15)
        widths.append(high - low)
    assert widths[1] < widths[0] / 8


def test_bootstrap_resamples_users_and_not_their_queries() -> None:
    users = np.repeat(np.arange(20), 50)
    values = np.repeat(np.random.default_rng(8).random(20), 50)[:, None]
    by_user = ranking.bootstrap_means(values, users, 500, seed=1).std()
    by_query = ranking.bootstrap_means(values, np.arange(1000), 500, seed=1).std()
    assert by_user > 4 * by_query


def test_a_lead_is_paired_so_equal_methods_differ_by_nothing() -> None:
    values = np.random.default_rng(9).random((300, 2))
    names = ["mrr", "hit_rate@10"]
    found = ranking.compare({"a": values, "b": values - 0.1}, np.arange(300), names, 200, 1)
    lead = found["leads"]["b"]["mrr"]
    assert [lead["mean"], lead["low"], lead["high"]] == pytest.approx([0.1, 0.1, 0.1])
    alone = ranking.compare({"a": values}, np.zeros(300, dtype=int), names, 200, 1)
    assert alone["methods"]["a"]["mrr"]["low"] is None


def test_embedding_health_of_known_shapes() -> None:
    same = np.ones((50, 4), dtype=np.float32)
    found = evaluation.embedding_health(same, seed=1)
    assert found["mean_norm"] == 2.0
    assert found["mean_cosine"] == pytest.approx(1.0)
    spread = np.random.default_rng(1).normal(size=(2000, 16)).astype(np.float32)
    found = evaluation.embedding_health(spread, seed=1)
    assert abs(found["mean_cosine"]) < 0.01
    assert found["cosine_kurtosis"] == pytest.approx(-6 / (16 + 2), abs=0.1)  # of random directions, exactly
    assert found["coverage@10"] > 0.3


# ------------------------------------------------------------------------------------------------ stage


def make_settings(storage: Storage, **changes: object) -> Settings:
    data = {"interactions": {"paths": "x.parquet", "user": "u", "item": "i", "timestamp": "t"}}
    chosen = {"k": [2, 10], "bootstrap": 50, "half_life_days": HALF_LIFE / 86_400, "examples": 3, **changes}
    run, cache = storage.url, f"{storage.url}-cache"
    return parse_settings({"task": {"data": data, "evaluation": chosen}, "resources": {"run": run, "cache": cache}})


def write(storage: Storage, dataset: schemas.Dataset, tables: list[pa.Table], **metadata: object) -> None:
    shards = [datasets.write_shard(storage, dataset, number, table, LINEAGE) for number, table in enumerate(tables)]
    datasets.commit(storage, dataset, shards, LINEAGE, metadata)


def described_degrees(indptr: np.ndarray) -> dict[str, Any]:
    """The graph's metadata, as far as it is shown."""
    degrees, nodes = np.unique(np.diff(indptr), return_counts=True)
    found: dict[str, Any] = {"mean": 1.5, "median": 1, "p99": 2, "max": int(degrees.max()), "without_edges": 0}
    found["histogram"] = [list(pair) for pair in zip(degrees.tolist(), nodes.tolist(), strict=True)]
    return {"degrees": {"before": found, "after": found}, "removed": {"above_limit": 0, "below_minimum": 0}}


def write_run(storage: Storage, events: Events, num_items: int, num_users: int, num_shards: int) -> np.ndarray:
    """All that the stage reads, with random embeddings; returns these."""
    rng = np.random.default_rng(10)
    train = events.split == 0
    item_users = adjacency(events.item[train], events.user[train], num_items)
    user_items = adjacency(events.user[train], events.item[train], num_users)
    columns: dict[str, Any] = {"user_id": events.user, "item_id": events.item, "timestamp": events.timestamp}
    columns |= {"weight": np.ones(len(events.user)), "split": events.split}
    interactions = pa.table(columns).cast(schemas.INTERACTIONS.arrow)
    size = -(-len(interactions) // num_shards)
    write(storage, schemas.INTERACTIONS, [interactions.slice(n * size, size) for n in range(num_shards)])
    ids = pa.array(np.arange(num_items), pa.uint32())
    keys = pa.array([f"key{i}" for i in range(num_items)])
    degrees = pa.array(np.diff(item_users[0]))
    titles = pa.array([f"<b>item {i}</b>" if i % 2 else None for i in range(num_items)], pa.string())
    nodes = pa.table([keys, ids, degrees, degrees, titles], schema=schemas.ITEMS.arrow)
    write(storage, schemas.ITEMS, [nodes.slice(0, 7), nodes.slice(7)])
    for dataset, (indptr, values) in ((schemas.ITEM_USERS, item_users), (schemas.USER_ITEMS, user_items)):
        lists = datasets.lists_to_arrow(indptr, values)
        shares = datasets.lists_to_arrow(np.zeros_like(indptr), np.zeros(0, np.uint32))
        rows = pa.array(np.arange(len(indptr) - 1), pa.uint32())
        write(storage, dataset, [pa.table([rows, lists, shares], schema=dataset.arrow)], **described_degrees(indptr))
    features = datasets.vectors_to_arrow(rng.normal(size=(num_items, 6)).astype(np.float32))
    described = [("text", 0, 4), ("missing", 4, 5), ("degree", 5, 6)]
    kinds = [{"name": kind, "kind": kind, "start": start, "stop": stop} for kind, start, stop in described]
    write(storage, schemas.FEATURES, [pa.table({"id": ids, "features": features})], columns=kinds)
    vectors = rng.normal(size=(num_items, 5)).astype(np.float32)
    table = pa.table({"key": keys, "id": ids, "embedding": datasets.vectors_to_arrow(vectors)})
    write(storage, schemas.EMBEDDINGS, [table.slice(0, 11), table.slice(11)])
    recall = {"k": 10, "recall": 1.0, "reached": True, "target": 0.95, "search": {}, "curve": [], "num_queries": 5}
    recall |= {"factory": "auto", "bytes_per_vector": 20.0, "num_vectors": num_items, "nlist": None}
    history = [{"epoch": 1, "loss": 0.5, "pairs": 10}, {"epoch": 2, "loss": 0.25, "pairs": 10}]
    for dataset, name, tree in ((schemas.INDEX, "recall.json", recall), (schemas.MODEL, "history.json", history)):
        shard = datasets.write_file(storage, dataset.name, name, json.dumps(tree).encode(), LINEAGE)
        datasets.commit(storage, dataset, [shard], LINEAGE)
    return vectors


def evaluate(spark: SparkContext, storage: Storage, settings: Settings) -> tuple[dict, bytes, bytes]:
    lineage = datasets.trace(storage, schemas.EVALUATION_STAGE, settings)
    evaluation.run(spark, storage, settings, lineage)
    manifest = datasets.open_manifest(storage, schemas.EVALUATION)
    numbers, page = (datasets.read_file(storage, manifest, name) for name in ("metrics.json", "report.html"))
    return json.loads(numbers), numbers, page


def test_the_stage_reports_what_the_slow_protocol_gives(spark: SparkContext, storage: Storage) -> None:
    events = random_events()
    vectors = write_run(storage, events, 30, 12, num_shards=3).astype(np.float64)
    settings = make_settings(storage, cold_degree=4, tail_share=0.5)
    metrics, numbers, page = evaluate(spark, storage, settings)
    degrees = np.bincount(
        np.unique(events.user[events.split == 0] * 30 + events.item[events.split == 0]) % 30, minlength=30
    )
    questions = item_to_item(events)[1]
    ranks = np.array(slow_ranks(questions, lambda history: vectors @ vectors[next(iter(history))]))
    for name, limit in (("all", 10**9), ("cold", 4), ("tail", int(np.sort(degrees)[14]))):
        found = metrics["tasks"]["item_to_item"]["slices"][name]
        kept = degrees[questions.targets] <= limit
        assert found["counts"]["targets"] == kept.sum()
        assert set(found["methods"]) == {"PinSage", "popularity", "item-kNN", "content-only kNN"}
        mine = found["methods"]["PinSage"]
        assert mine["mrr"]["mean"] == pytest.approx((1 / ranks[kept]).mean())
        assert mine["hit_rate@10"]["mean"] == pytest.approx((ranks[kept] <= 10).mean())
        assert mine["mrr"]["low"] <= mine["mrr"]["mean"] <= mine["mrr"]["high"]
    users = slow_user_to_item(events)
    firsts = []
    for history, targets, seen in users:
        scores = vectors @ sum(weight * vectors[item] for item, weight in history.items())
        best = max(scores[target] for target in targets)
        firsts.append(1 + sum(scores[i] > best for i in range(30) if i not in seen and i not in targets))
    found = metrics["tasks"]["user_to_item"]["slices"]["all"]
    assert found["methods"]["PinSage"]["mrr"]["mean"] == pytest.approx(np.mean(1 / np.array(firsts)))
    assert found["counts"]["candidates"] == pytest.approx(np.mean([30 - len(seen) for _, _, seen in users]))
    assert [len(example["neighbours"]) for example in metrics["examples"]] == [8, 8, 8]
    assert b"<b>item" not in page
    assert b"users with at least so many items" in page
    again = evaluate(spark, storage, settings)
    assert again[1:] == (numbers, page)


def test_shards_of_interactions_change_no_number(spark: SparkContext, tmp_path: object) -> None:
    found = []
    for num_shards in (1, 7):
        storage = Storage(f"{tmp_path}/{num_shards}")
        write_run(storage, random_events(), 30, 12, num_shards)
        found.append(evaluate(spark, storage, make_settings(storage, max_events=20))[0]["tasks"])
    assert found[0] == found[1]
    assert found[0]["item_to_item"]["num_ranked"] == 20


def test_a_run_without_askable_events_says_why(spark: SparkContext, storage: Storage) -> None:
    events = Events(*(np.array(v) for v in ([0, 0, 1], [1, 2, 3], [5, 6, 90], [0, 0, 2])))
    write_run(storage, events, 30, 2, num_shards=1)
    metrics, _, page = evaluate(spark, storage, make_settings(storage))
    assert metrics["tasks"]["item_to_item"]["counts"]["without_earlier_item"] == 1
    assert metrics["tasks"]["user_to_item"]["slices"] == {}
    assert b"no user has both training history and test events" in page


def test_embeddings_of_another_catalogue_are_refused(spark: SparkContext, storage: Storage) -> None:
    write_run(storage, random_events(), 30, 12, num_shards=1)
    nothing = datasets.read_table(storage, datasets.open_manifest(storage, schemas.EMBEDDINGS)).slice(0, 9)
    write(storage, schemas.EMBEDDINGS, [nothing])
    with pytest.raises(DataError, match="embeddings has 9 rows and items has 30"):
        evaluate(spark, storage, make_settings(storage))


def test_every_users_events_are_read_once_and_whole_wherever_shards_are_empty(storage: Storage) -> None:
    """Ids that went on from an earlier run, none of whose users came again, leave the first shards empty."""
    users = np.array([5, 5, 6, 7, 7, 7, 7, 8], np.int64)
    times, shards = np.arange(len(users)), []
    columns = schemas.INTERACTIONS.arrow
    for number, rows in enumerate([[], [], [0, 1], [], [2, 3], [4, 5], [], [6, 7], []]):
        values = {"user_id": users[rows], "item_id": np.ones(len(rows)), "timestamp": times[rows]}
        table = pa.table([pa.array(values.get(f.name, np.zeros(len(rows))), f.type) for f in columns], schema=columns)
        shards.append(datasets.write_shard(storage, schemas.INTERACTIONS, number, table, LINEAGE))
    manifest = datasets.commit(storage, schemas.INTERACTIONS, shards, LINEAGE)
    found = [read_events(storage, manifest, number) for number in range(len(shards))]
    assert [sorted(set(events.user.tolist())) for events in found] == [[], [], [5], [], [6, 7], [], [], [8], []]
    assert [time for events in found for time in events.timestamp.tolist()] == times.tolist()
