"""The graph stage: the same edges in both directions, limits, weights, bad input; the same bytes however it is cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark import SparkContext

from pipeline import graph, ingest, steps
from pipeline.contracts import schemas
from pipeline.contracts.config import Settings, parse_settings
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    commit,
    open_manifest,
    read_table,
    trace,
    write_shard,
)
from pipeline.contracts.errors import DataError
from pipeline.contracts.storage import Storage
from tests.synthetic import shop_settings, write_shop

Event = tuple[int, int, int, float, int]
"""user, item, time, weight, split."""
LINEAGE = Lineage("ingest", {}, {})
DAY = 86_400


def random_events(count: int = 600, num_users: int = 40, num_items: int = 25, seed: int = 0) -> list[Event]:
    generator = np.random.default_rng(seed)
    columns = (
        (num_users * generator.random(count) ** 2).astype(int), (num_items * generator.random(count) ** 2).astype(int),
        generator.integers(0, 300, count) * DAY, generator.choice([0.5, 1.0, 4.0], count),
        generator.choice(3, count, p=[0.8, 0.1, 0.1]),
    )  # fmt: skip
    return list(zip(*(column.tolist() for column in columns), strict=True))


def write_run(
    storage: Storage, events: Sequence[Event], num_users: int, num_items: int, cuts: Sequence[int] = (),
    rows_per_shard: int = 100,
) -> None:  # fmt: skip
    """What ingest leaves; cuts are the rows where a new shard of interactions begins."""
    rows = sorted(events, key=lambda event: (event[0], event[2]))
    names = ["user_id", "item_id", "timestamp", "weight", "split"]
    columns: dict[str, Any] = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    columns["position"] = list(range(len(rows)))
    schema = schemas.INTERACTIONS.arrow
    table = pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)
    bounds = [0, *cuts, len(rows)]
    shards = [
        write_shard(storage, schemas.INTERACTIONS, number, table.slice(first, stop - first), LINEAGE)
        for number, (first, stop) in enumerate(pairwise(bounds))
    ]
    commit(storage, schemas.INTERACTIONS, shards, LINEAGE)
    edges = {(user, item) for user, item, _, weight, split in events if split == 0 and weight > 0}
    for dataset, count, side in ((schemas.USERS, num_users, 0), (schemas.ITEMS, num_items, 1)):
        degrees = Counter(edge[side] for edge in edges)
        columns = {"key": [str(n) for n in range(count)], "id": list(range(count)), "title": [None] * count}
        columns |= {"degree": [degrees[n] for n in range(count)], "first_seen": [0] * count}
        nodes = pa.table([pa.array(columns[f.name], f.type) for f in dataset.arrow], schema=dataset.arrow)
        parts = [nodes.slice(start, rows_per_shard) for start in range(0, count, rows_per_shard)]
        shards = [write_shard(storage, dataset, number, part, LINEAGE) for number, part in enumerate(parts)]
        commit(storage, dataset, shards, LINEAGE)


def make_settings(storage: Storage, rows_per_shard: int = 10, **limits: Any) -> Settings:
    data = {"interactions": {"paths": "x.parquet", "user": "u", "item": "i", "timestamp": "t"}}
    resources = {"run": storage.url, "rows_per_shard": rows_per_shard}
    return parse_settings({"task": {"data": data, "graph": limits}, "resources": resources})


def build(spark: SparkContext, storage: Storage, **limits: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the stage; the metadata of USER_ITEMS and of ITEM_USERS."""
    settings = make_settings(storage, **limits)
    graph.run(spark, storage, settings, trace(storage, schemas.GRAPH, settings))
    assert storage.names("graph") == []
    users, items = (open_manifest(storage, dataset).metadata for dataset in (schemas.USER_ITEMS, schemas.ITEM_USERS))
    for name in ("users", "items", "edges", "weighted"):
        assert users[name] == items[name]
    return users, items


def lists(storage: Storage, dataset: schemas.Dataset, column: str = "neighbours") -> list[list[int]]:
    table = read_table(storage, open_manifest(storage, dataset))
    assert table.column("id").to_pylist() == list(range(len(table)))
    found: list[list[int]] = table.column(column).to_pylist()
    return found


def edges_of(storage: Storage) -> set[tuple[int, int]]:
    """(user, item) of every edge, after checking that both directions hold them all, once, in the order they should."""
    by_item = [(user, item) for item, users in enumerate(lists(storage, schemas.ITEM_USERS)) for user in users]
    by_user = [(user, item) for user, items in enumerate(lists(storage, schemas.USER_ITEMS)) for item in items]
    assert by_item == sorted(by_item, key=lambda edge: (edge[1], edge[0]))
    assert sorted(by_item) == sorted(by_user)
    assert len(set(by_item)) == len(by_item)
    return set(by_item)


def trained(events: Sequence[Event]) -> dict[tuple[int, int], int]:
    """The latest time of every edge."""
    found: dict[tuple[int, int], int] = {}
    for user, item, time, weight, split in events:
        if split == 0 and weight > 0:
            found[user, item] = max(time, found.get((user, item), 0))
    return found


def limited(
    edges: dict[tuple[int, int], int], side: int, least: int, most: int
) -> tuple[dict[tuple[int, int], int], int, int]:
    """Slow and obvious: what is left, and how many edges each rule removed."""
    kept: dict[tuple[int, int], int] = {}
    too_few, too_many = 0, 0
    for node in {edge[side] for edge in edges}:
        own = sorted((edge for edge in edges if edge[side] == node), key=lambda edge: (-edges[edge], edge[1 - side]))
        if len(own) < least:
            too_few += len(own)
            continue
        too_many += len(own) - len(own[: most or None])
        kept |= {edge: edges[edge] for edge in own[: most or None]}
    return kept, too_few, too_many


# ------------------------------------------------------------------------------------------------ edges


def test_only_training_events_make_edges_and_both_directions_hold_them(spark: SparkContext, storage: Storage) -> None:
    events = random_events()
    write_run(storage, events, 40, 25, cuts=[200, 400])
    report, _ = build(spark, storage)
    expected = trained(events)
    assert edges_of(storage) == set(expected)
    used = sum(event[4] == 0 for event in events)
    assert (report["events"], report["duplicates"]) == (used, used - len(expected))
    assert (report["edges"], report["users"], report["items"], report["weighted"]) == (len(expected), 40, 25, False)
    assert lists(storage, schemas.ITEM_USERS, "shares") == [[]] * 25


@pytest.mark.parametrize("limits", [{}, {"max_item_degree": 6, "keep": "random"}, {"half_life_days": 30.0}])
def test_how_interactions_and_graph_are_cut_changes_no_row(
    spark: SparkContext, tmp_path: Path, limits: dict[str, Any]
) -> None:
    """Shards of whole users, shards that cut users in two, empty ones, a few users of many."""
    events = [event for event in random_events(150) if event[0] != 39]
    starts = np.searchsorted(sorted(event[0] for event in events), [10, 20, 30]).tolist()
    cuttings: list[list[int]] = [[], starts, [1, 2, 2, 50, 51, 140], [75]]
    found = []
    for number, cuts in enumerate(cuttings):
        storage = Storage(f"{tmp_path}/{number}")
        write_run(storage, events, 40, 25, cuts)
        build(spark, storage, rows_per_shard=7 + 9 * number, **limits)
        found.append([read_table(storage, open_manifest(storage, dataset)) for dataset in schemas.GRAPH.writes])
    for other in found[1:]:
        assert other == found[0]


def test_a_users_items_are_in_an_order_of_chance_that_the_seed_decides(spark: SparkContext, storage: Storage) -> None:
    write_run(storage, [(user, item, item, 1.0, 0) for user in range(300) for item in range(4)], 300, 4)
    build(spark, storage, rows_per_shard=100)
    counts = Counter(tuple(row) for row in lists(storage, schemas.USER_ITEMS))
    assert len(counts) == 24
    assert max(counts.values()) < 30  # 12.5 each


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("limits", "rules"),
    [
        ({"max_user_degree": 5}, (1, 5, 1, 0)),
        ({"max_user_degree": 0, "min_user_degree": 4}, (4, 0, 1, 0)),
        ({"max_item_degree": 4}, (1, 5000, 1, 4)),
        ({"max_user_degree": 8, "min_user_degree": 3, "max_item_degree": 7, "min_item_degree": 3}, (3, 8, 3, 7)),
    ],
)
def test_limits_leave_what_the_slow_rules_leave(
    spark: SparkContext, storage: Storage, limits: dict[str, int], rules: tuple[int, int, int, int]
) -> None:
    events = random_events()
    write_run(storage, events, 40, 25, cuts=[300])
    users, items = build(spark, storage, **limits)
    edges, *by_users = limited(trained(events), 0, *rules[:2])
    edges, *by_items = limited(edges, 1, *rules[2:])
    assert edges_of(storage) == set(edges)
    assert users["removed"] == dict(zip(("below_minimum", "above_limit"), by_users, strict=True))
    assert items["removed"] == dict(zip(("below_minimum", "above_limit"), by_items, strict=True))
    assert users["edges"] == len(edges)


def test_random_limits_keep_as_many_edges_and_the_same_in_both_directions(
    spark: SparkContext, storage: Storage
) -> None:
    events = random_events()
    write_run(storage, events, 40, 25, cuts=[300])
    build(spark, storage, keep="random", max_user_degree=8, max_item_degree=6)
    edges = edges_of(storage)
    assert edges < set(trained(events))
    assert max(Counter(user for user, _ in edges).values()) <= 8
    assert max(Counter(item for _, item in edges).values()) == 6


def test_degrees_before_and_after_are_those_of_the_edges(
    spark: SparkContext, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_GROUP_SHARDS", 2)
    events = random_events()
    write_run(storage, events, 45, 30, cuts=[300], rows_per_shard=10)
    reports = build(spark, storage, max_user_degree=6, min_item_degree=2)
    for when, edges in (("before", set(trained(events))), ("after", edges_of(storage))):
        for side, count in enumerate((45, 30)):
            degrees = np.bincount([edge[side] for edge in edges], minlength=count)
            found = reports[side]["degrees"][when]
            assert found["nodes"] == count
            assert found["without_edges"] == (degrees == 0).sum()
            assert found["max"] == degrees.max()
            assert found["mean"] == pytest.approx(degrees.sum() / (degrees > 0).sum())
            histogram = np.unique(degrees[degrees < 16], return_counts=True)
            assert [bin for bin in found["histogram"] if bin[0] < 16] == [list(pair) for pair in zip(*histogram)]  # noqa: B905
            own = np.sort(degrees[degrees > 0])
            if degrees.max() < 16:
                assert found["median"] == own[-(-len(own) // 2) - 1]
    line = graph.summary(*reports)
    assert f"make {len(edges):,} edges" in line
    assert f"{reports[0]['removed']['above_limit']:,} of users above the limit" in line


# ------------------------------------------------------------------------------------------------ weights


def weights_of(storage: Storage, dataset: schemas.Dataset) -> list[dict[int, float]]:
    """Every row's share of each neighbour."""
    rows = []
    for ids, shares in zip(lists(storage, dataset), lists(storage, dataset, "shares"), strict=True):
        assert len(ids) == len(shares)
        assert shares == sorted(shares)
        assert not shares or shares[-1] == 2**32 - 1
        points = np.diff([-1, *shares])
        rows.append(dict(zip(ids, (points / 2**32).tolist(), strict=True)))
    return rows


@pytest.mark.parametrize("limits", [{}, {"max_item_degree": 100}])
def test_weighted_rows_share_by_the_sum_of_events_halved_with_age(
    spark: SparkContext, storage: Storage, limits: dict[str, int]
) -> None:
    events = random_events(200)
    write_run(storage, events, 40, 25, cuts=[100])
    report, _ = build(spark, storage, weighted=True, half_life_days=20.0, **limits)
    latest = max(event[2] for event in events if event[4] == 0)
    assert (report["weighted"], report["latest"]) == (True, latest)
    weights: dict[tuple[int, int], float] = {}
    for user, item, time, weight, split in events:
        if split == 0:
            weights[user, item] = weights.get((user, item), 0) + weight * 2 ** ((time - latest) / DAY / 20)
    for dataset, side in ((schemas.USER_ITEMS, 0), (schemas.ITEM_USERS, 1)):
        for row, shares in enumerate(weights_of(storage, dataset)):
            own = {edge[1 - side]: weight for edge, weight in weights.items() if edge[side] == row}
            total = sum(own.values())
            assert shares == pytest.approx({node: weight / total for node, weight in own.items()}, abs=1e-8)


def test_a_half_life_of_seconds_leaves_rows_that_end_years_ago(spark: SparkContext, storage: Storage) -> None:
    """By the latest event of all they weigh 2 ** -31536000, which is no float; by their own, 1 : 2 : 4."""
    events = [(0, item, item, 1.0, 0) for item in range(3)] + [(1, 3, 365 * DAY, 1.0, 0)]
    write_run(storage, events, 2, 4)
    build(spark, storage, half_life_days=1 / DAY)
    found = weights_of(storage, schemas.USER_ITEMS)
    assert found[0] == pytest.approx({0: 1 / 7, 1: 2 / 7, 2: 4 / 7})
    assert found[1] == {3: 1.0}
    assert weights_of(storage, schemas.ITEM_USERS) == [{0: 1.0}, {0: 1.0}, {0: 1.0}, {1: 1.0}]


def test_where_time_is_only_an_order_a_half_life_counts_steps(storage: Storage) -> None:
    data = {"interactions": {"paths": "x", "user": "u", "item": "i", "timestamp": "t", "timestamp_unit": "order"}}
    task = {"data": data, "split": {"kind": "leave_last_out", "validation": 1, "test": 1}}
    settings = parse_settings({"task": {**task, "graph": {"half_life_days": 4.0}}, "resources": {"run": storage.url}})
    assert graph.decay(settings) == 0.25
    assert graph.decay(make_settings(storage, half_life_days=2.0)) == 0.5 / DAY
    assert graph.decay(make_settings(storage)) == 0.0


# ------------------------------------------------------------------------------------------------ bad input


def test_isolated_items_and_users_have_empty_rows(spark: SparkContext, storage: Storage) -> None:
    """The first, the last, and users beyond those of any interaction."""
    write_run(storage, [(3, 5, 0, 1.0, 0), (4, 5, 0, 1.0, 1), (6, 2, 0, 1.0, 0)], 60, 35)
    reports = build(spark, storage, rows_per_shard=2)
    assert edges_of(storage) == {(3, 5), (6, 2)}
    assert len(lists(storage, schemas.USER_ITEMS)) == 60
    assert [report["degrees"]["after"]["without_edges"] for report in reports] == [58, 33]
    assert [shard.rows for shard in open_manifest(storage, schemas.USER_ITEMS).shards] == [20] * 3


def test_a_hub_on_either_side_keeps_its_edges_or_as_many_as_it_may(spark: SparkContext, storage: Storage) -> None:
    """User 7 and item 11 have each a tenth of all edges, and every event comes twice."""
    others = [(user, 13 + (user * 31 + k * 17) % 987, k, 1.0, 0) for user in range(1000) for k in range(8)]
    hubs = [(7, item, item, 1.0, 0) for item in range(1000)] + [(user, 11, user, 1.0, 0) for user in range(1000)]
    events = [event for event in [*others, *hubs] if event != (7, 11, 11, 1.0, 0)] * 2
    write_run(storage, events, 1000, 1000, cuts=[5000])
    reports = build(spark, storage, rows_per_shard=200)
    assert edges_of(storage) == set(trained(events))
    assert reports[0]["duplicates"] >= len(events) // 2
    assert [report["degrees"]["after"]["max"] for report in reports] == [1000, 1000]
    assert reports[0]["degrees"]["after"]["median"] <= 10
    storage.delete(schemas.ITEM_USERS.name)
    build(spark, storage, rows_per_shard=200, max_user_degree=100, max_item_degree=50)
    edges = edges_of(storage)
    assert {item for user, item in edges if user == 7} <= set(range(899, 1000)) | {11}
    assert {user for user, item in edges if item == 11} <= set(range(948, 1000)) | {7}


def test_user_and_item_of_one_number_are_an_edge_like_any_other(spark: SparkContext, storage: Storage) -> None:
    """Users and items are two spaces of ids. An item whose only user has nothing else is reached from itself alone."""
    write_run(storage, [(0, 0, 0, 1.0, 0), (1, 1, 0, 1.0, 0), (1, 0, 1, 1.0, 0), (2, 2, 0, 1.0, 0)], 3, 3)
    build(spark, storage)
    assert edges_of(storage) == {(0, 0), (1, 1), (1, 0), (2, 2)}
    build(spark, storage, min_user_degree=2)
    assert edges_of(storage) == {(1, 1), (1, 0)}


@pytest.mark.parametrize(
    ("events", "limits", "message"),
    [
        ([(0, 0, 0, 1.0, 1)], {}, "no training interaction is left; look at `pinsage status` and the split"),
        ([(0, 0, 0, 1.0, 0)], {"min_user_degree": 2}, "limits leave none of what 1 training interactions make"),
        ([(0, 0, 0, 1.0, 0)], {"min_item_degree": 2}, "lower task.graph.min_user_degree or min_item_degree"),
    ],
)
def test_a_graph_without_edges_says_why(
    spark: SparkContext, storage: Storage, events: list[Event], limits: dict[str, int], message: str
) -> None:
    write_run(storage, events, 2, 2)
    with pytest.raises(DataError, match=f"the graph has no edge.*{message}"):
        build(spark, storage, **limits)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_ingest_would_have_refused_is_refused(
    spark: SparkContext, storage: Storage, weight: float
) -> None:
    write_run(storage, [(0, 0, 0, 1.0, 0), (1, 1, 0, weight, 0)], 2, 2)
    with pytest.raises(DataError, match=rf"user 1, item 1, weight {weight}: .*above 0; run `pinsage ingest --force`"):
        build(spark, storage)


def test_weights_that_are_nothing_or_nonsense_do_not_come_from_ingest_to_the_graph(
    spark: SparkContext, storage: Storage, tmp_path: Path
) -> None:
    write_shop(tmp_path / "data", num_users=60)
    path = tmp_path / "data" / "interactions.parquet"
    table = pq.read_table(path)
    weights = np.ones(len(table))
    weights[:80] = np.tile([0.0, -1.0, np.nan, np.inf], 20)
    pq.write_table(table.append_column("strength", pa.array(weights)), path)
    tree = shop_settings(tmp_path / "data", Path(storage.url), graph={"weighted": True})
    tree["task"]["data"]["interactions"]["weight"] = "strength"
    tree["task"]["data"]["max_quarantined_share"] = 0.5
    settings = parse_settings(tree)
    ingest.run(spark, storage, settings, trace(storage, schemas.INGEST, settings, ingest.inputs(settings.task.data)))
    graph.run(spark, storage, settings, trace(storage, schemas.GRAPH, settings))
    users, items = (
        read_table(storage, open_manifest(storage, dataset)).column("key").to_pylist()
        for dataset in (schemas.USERS, schemas.ITEMS)
    )
    found = {(users[user], items[item]) for user, item in edges_of(storage)}
    raw = zip(*(table.column(name).to_pylist()[80:] for name in ("basket", "product")), strict=True)
    assert found <= set(raw)
    assert len(found) > 150


def test_interactions_out_of_order_are_refused(spark: SparkContext, storage: Storage) -> None:
    write_run(storage, [(0, 0, 0, 1.0, 0), (1, 1, 0, 1.0, 0)], 2, 2)
    manifest = open_manifest(storage, schemas.INTERACTIONS)
    table = read_table(storage, manifest).take([1, 0])
    commit(storage, schemas.INTERACTIONS, [write_shard(storage, schemas.INTERACTIONS, 0, table, LINEAGE)], LINEAGE)
    with pytest.raises(DataError, match="interactions shard 0 is not in the order of users"):
        build(spark, storage)


# ------------------------------------------------------------------------------------------------ restarts


@pytest.mark.parametrize("limits", [{}, {"max_item_degree": 6}])
@pytest.mark.parametrize("moment", ["user_items", "item_users"])
def test_after_a_kill_what_was_finished_is_kept_and_the_bytes_are_the_same(
    spark: SparkContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, limits: dict[str, int]
) -> None:
    """Killed when all shards of one of the outputs lie there, the other being finished or not yet begun."""
    events = random_events()
    whole, storage = Storage(f"{tmp_path}/whole"), Storage(f"{tmp_path}/run")
    for one in (whole, storage):
        write_run(one, events, 40, 25, cuts=[300])
    build(spark, whole, **limits)

    def interrupted(*arguments: Any) -> Manifest:
        if getattr(arguments[1], "name", "") == moment:
            raise KeyboardInterrupt
        return commit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(spark, storage, **limits)
    made = [file for name in ("item_users", "user_items") for file in Path(storage.root).glob(f"{name}/*.parquet")]
    lost = Path(storage.locate(f"{moment}/part-00001.parquet"))
    lost.unlink()
    stamps = {file: file.stat().st_mtime_ns for file in made if file != lost}
    assert len(stamps) >= 1
    build(spark, storage, **limits)
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    for dataset in schemas.GRAPH.writes:
        assert open_manifest(storage, dataset).content == open_manifest(whole, dataset).content
