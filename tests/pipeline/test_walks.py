"""The walks stage: the same neighbours by every strategy, however the work is cut and interrupted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline import differences, neighbourhoods, walkers, walks
from pipeline.contracts import schemas
from pipeline.contracts.config import Settings, parse_settings
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    arrow_to_lists,
    find_manifest,
    open_manifest,
    read_shard,
    read_table,
    write_shard,
)
from pipeline.contracts.errors import SettingsError
from pipeline.contracts.storage import Storage
from pipeline.walk_kernel import BipartiteGraph
from tests.oracles import expected_visits
from tests.synthetic import compressed, shop_settings, store_graph

LINEAGE = Lineage("walks", {}, {})


def some_adjacency(num_items: int = 60, num_users: int = 40, seed: int = 4) -> NDArray[np.float64]:
    """Edge weights [items, users] with a popular item, a busy user, and an item and a user without any edge."""
    generator = np.random.default_rng(seed)
    present = generator.random((num_items, num_users)) < 0.12
    present[5, ::2] = present[::3, 7] = True
    present[3] = present[:, 11] = False
    weights: NDArray[np.float64] = np.where(present, generator.integers(1, 9, present.shape), 0).astype(np.float64)
    return weights


def settings_for(
    storage: Storage, strategy: str = "auto", resources: dict[str, Any] | None = None, **task: Any
) -> Settings:
    tree = shop_settings(Path("data"), Path(storage.url))
    tree["task"]["walks"] = {"num_neighbours": 8, "entry_budget": 60, "compose_rows": 4, **task}
    tree["resources"] |= {"walks": {"strategy": strategy, "cluster_rounds": 1}, **(resources or {})}
    return parse_settings(tree)


def neighbours(
    spark: SparkContext, storage: Storage, graph: BipartiteGraph, num_shards: int, strategy: str, **task: Any
) -> Manifest:
    store_graph(storage, graph, num_shards)
    for name in ("neighbours", "walks"):
        storage.delete(name)
    walks.run(spark, storage, settings_for(storage, strategy, **task), LINEAGE)
    assert storage.names("walks") == []
    return open_manifest(storage, schemas.NEIGHBOURS)


@pytest.mark.parametrize(
    ("weighted", "task"),
    [
        (False, {"compose": "none"}),
        (True, {"compose": "all"}),
        (True, {"compose": "short", "num_neighbours": 30, "entry_budget": 10_000}),
    ],
)
def test_exact_rows_are_the_same_whoever_holds_the_graph_and_however_it_is_cut(
    spark: SparkContext, storage: Storage, weighted: bool, task: dict[str, Any]
) -> None:
    """1, 3 and 7 shards of a replicated graph, and lists shipped to shards: byte for byte."""
    graph = compressed(some_adjacency(), weighted)
    whole = read_table(storage, neighbours(spark, storage, graph, 1, "replicate", **task))
    schemas.NEIGHBOURS.check(whole.schema, "rows")
    if task["compose"] == "short":
        lengths = pc.list_value_length(whole.column("neighbours")).to_numpy()
        alone = read_table(storage, neighbours(spark, storage, graph, 1, "replicate", **{**task, "compose": "none"}))
        before = pc.list_value_length(alone.column("neighbours")).to_numpy()
        assert (lengths >= before).all()
        assert (lengths[(before > 0) & (before < 30)] > before[(before > 0) & (before < 30)]).mean() > 0.9
        full = np.flatnonzero(before == 30)
        assert whole.column("neighbours").take(full).equals(alone.column("neighbours").take(full))
    for num_shards, strategy in ((3, "replicate"), (1, "shuffle"), (7, "shuffle")):
        found = neighbours(spark, storage, graph, num_shards, strategy, **task)
        assert len(found.shards) == num_shards
        assert read_table(storage, found).equals(whole), (num_shards, strategy)


def test_weights_of_every_row_sum_to_one_and_items_without_users_have_none(
    spark: SparkContext, storage: Storage
) -> None:
    table = read_table(storage, neighbours(spark, storage, compressed(some_adjacency()), 2, "auto"))
    indptr, weights = arrow_to_lists(table.column("weights"))
    for item in range(60):
        row = weights[indptr[item] : indptr[item + 1]]
        assert len(row) <= 8
        assert (np.diff(row) <= 0).all()
        assert row.sum() == pytest.approx(1.0 if len(row) else 0.0, abs=1e-6)
    assert indptr[3] == indptr[4]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("strategy", ["replicate", "shuffle"])
def test_walks_by_every_strategy_follow_the_stated_distribution(
    spark: SparkContext, storage: Storage, strategy: str, weighted: bool
) -> None:
    """Every item's visits over three hops against the power iteration; both strategies pass the same test."""
    adjacency = some_adjacency(24, 16)
    task = {"estimator": "walks", "num_walks": 20_000, "num_neighbours": 24, "max_hops": 3}
    found = neighbours(spark, storage, compressed(adjacency, weighted), 3, strategy, **task)
    table = read_table(storage, found)
    indptr, ids = arrow_to_lists(table.column("neighbours"))
    weights = arrow_to_lists(table.column("weights"))[1]
    shape = adjacency if weighted else (adjacency > 0).astype(float)
    scores = []
    for item in np.flatnonzero(adjacency.sum(axis=1)):
        expected = expected_visits(shape, int(item), 3, 0.5)
        row = slice(indptr[item], indptr[item + 1])
        estimate = np.zeros(len(adjacency))
        estimate[ids[row]] = weights[row] * expected.sum()
        assert (estimate[expected == 0] == 0).all()
        # Visits of one walk depend on each other, so this deviation is only roughly of size 1.
        reached = expected > 0
        scores += [*((estimate - expected)[reached] / np.sqrt(expected[reached] / 20_000))]
    assert np.abs(scores).max() < 6
    assert 0.5 < np.std(scores) < 1.5


def test_walkers_do_not_lose_or_invent_walks_and_hubs_are_split(
    spark: SparkContext, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With cells and parts as small as can be, so that popular nodes' rows are several tasks' work."""
    monkeypatch.setattr(walkers, "_TASK_ROWS", 40)
    monkeypatch.setattr(walkers, "_CELL_VISITS", 3000)
    adjacency = some_adjacency(24, 16)
    store_graph(storage, compressed(adjacency), 2)
    item_users, user_items = (open_manifest(storage, dataset) for dataset in (schemas.ITEM_USERS, schemas.USER_ITEMS))
    walk = walkers.Walk(500, 1, 0.5, seed=1)
    counted = walkers.move_walkers(spark, storage, LINEAGE, item_users, user_items, walk, "walks/test")
    assert counted.cells_per_shard > 1
    num_cells = 2 * counted.cells_per_shard
    visits = [walkers.counted_visits(storage, counted, cell) for cell in range(num_cells)]
    sources, nodes, counts = (np.concatenate(column) for column in zip(*visits, strict=True))
    assert len(np.unique(sources.astype(np.int64) * 100 + nodes)) == len(sources)
    shape = (adjacency > 0).astype(float)
    for item in np.flatnonzero(shape.sum(axis=1)):
        mine = sources == item
        expected = expected_visits(shape, int(item), 1, 0.5)
        assert counts[mine].sum() == pytest.approx(500 * expected.sum(), abs=5 * np.sqrt(500) / 2)
        assert (expected[nodes[mine]] > 0).all()


def test_walks_of_one_item_at_one_node_stop_each_for_itself_whichever_tasks_moved_them() -> None:
    """One walk each in 2 000 tasks, twice in some: as many go on as of 2 000 coins, not all or none."""
    walk = walkers.Walk(1000, 3, 0.5, seed=1)
    rows = pa.table([[7, 7], [9, 9], [1, 1]], schema=walkers.WALKERS)
    going = [walkers.survivors(rows, walk, 1, cell, part) for cell in range(500) for part in range(2)]
    counts = np.array([sum(table["count"].to_pylist()) for table in going])
    assert counts.sum() == pytest.approx(1000, abs=5 * np.sqrt(500))
    assert set(counts.tolist()) == {0, 1, 2}


def test_more_walks_than_there_are_places_for_are_refused_before_any_walk(
    spark: SparkContext, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_graph(storage, compressed(some_adjacency(24, 16)), 2)
    item_users, user_items = (open_manifest(storage, dataset) for dataset in (schemas.ITEM_USERS, schemas.USER_ITEMS))
    monkeypatch.setattr(walkers, "MAX_DESTINATIONS", 3)
    with pytest.raises(SettingsError, match=r"9 walks from each of 24 items are sent to 4 places, at most 3; lower"):
        walkers.move_walkers(spark, storage, LINEAGE, item_users, user_items, walkers.Walk(9, 1, 0.5, 1), "walks/test")


def test_a_restart_does_only_what_is_missing(spark: SparkContext, storage: Storage) -> None:
    finished = neighbours(spark, storage, compressed(some_adjacency()), 4, "shuffle")
    kept = Path(storage.locate("neighbours/part-00002.parquet"))
    # What an interrupted attempt leaves: shards with receipts and no manifest, one shard missing.
    attempt = replace(LINEAGE, settings={**LINEAGE.settings, "strategy": "replicate"})
    for number in (0, 1, 2):
        write_shard(storage, schemas.NEIGHBOURS, number, read_shard(storage, finished, number), attempt)
    first_made = kept.stat().st_mtime_ns
    storage.delete("neighbours/_manifest.json")
    storage.delete("neighbours/part-00003.parquet")
    assert find_manifest(storage, schemas.NEIGHBOURS) is None
    walks.run(spark, storage, settings_for(storage), LINEAGE)
    assert kept.stat().st_mtime_ns == first_made
    assert read_table(storage, open_manifest(storage, schemas.NEIGHBOURS)).num_rows == 60


@pytest.mark.parametrize("task", [{"compose": "all"}, {"compose": "short"}, {"estimator": "walks"}])
@pytest.mark.parametrize(("first", "then"), [("shuffle", "replicate"), ("replicate", "shuffle")])
def test_what_an_attempt_by_another_strategy_left_is_not_gone_on_from(
    spark: SparkContext, storage: Storage, monkeypatch: pytest.MonkeyPatch, first: str, then: str, task: dict[str, Any]
) -> None:
    """Its shards are of other items, or of other draws; the lineage of what the stage makes knows no strategy."""
    graph = compressed(some_adjacency())
    expected = read_table(storage, neighbours(spark, storage, graph, 4, then, **task))
    storage.delete(schemas.NEIGHBOURS.name)

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if "estimator" in task:  # when all shards are there
            patch.setattr(differences, "commit", killed)
        else:  # when all is there that they are made of
            patch.setattr(neighbourhoods.Neighbourhoods, "store", killed)
        with pytest.raises(KeyboardInterrupt):
            walks.run(spark, storage, settings_for(storage, first, **task), LINEAGE)
    walks.run(spark, storage, settings_for(storage, then, **task), LINEAGE)
    assert read_table(storage, open_manifest(storage, schemas.NEIGHBOURS)).equals(expected)


def test_the_content_of_neighbours_does_not_tell_of_the_host(spark: SparkContext, storage: Storage) -> None:
    graph = compressed(some_adjacency())
    contents = {neighbours(spark, storage, graph, 3, strategy).content for strategy in ("replicate", "shuffle")}
    assert len(contents) == 1


def test_a_damaged_local_copy_of_the_graph_changes_nothing(spark: SparkContext, storage: Storage) -> None:
    graph = compressed(some_adjacency())
    before = neighbours(spark, storage, graph, 2, "replicate").content
    copies = list(Path(storage.url).parent.glob("cache/*/user_items/*-neighbours/values.npy"))
    assert len(copies) == 1
    data = bytearray(copies[0].read_bytes())
    data[140:180] = bytes(40)
    copies[0].write_bytes(bytes(data))
    storage.delete("neighbours")
    walks.run(spark, storage, settings_for(storage, "replicate"), LINEAGE)
    assert open_manifest(storage, schemas.NEIGHBOURS).content == before
    assert copies[0].read_bytes() != bytes(data)


@pytest.mark.parametrize(
    ("given", "strategy", "reason"),
    [
        ({}, "replicate", "of every host's"),
        ({"walks": {"host_memory": "1kB"}}, "shuffle", "resources.walks.host_memory is 0.00 GiB"),
        ({"walks": {"strategy": "shuffle"}}, "shuffle", "as resources.walks.strategy says"),
    ],
)
def test_auto_chooses_by_bytes_and_says_why(
    storage: Storage, given: dict[str, Any], strategy: str, reason: str
) -> None:
    store_graph(storage, compressed(some_adjacency()))
    choice = neighbourhoods.choose(storage, settings_for(storage, resources={"walks": {}, **given}).resources)
    assert choice.strategy == strategy
    assert reason in choice.reason


def test_auto_ships_lists_if_the_disk_has_no_room_for_the_graph(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_graph(storage, compressed(some_adjacency()))
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    choice = neighbourhoods.choose(storage, settings_for(storage).resources)
    assert (choice.strategy, "has 0.00 GiB free" in choice.reason) == ("shuffle", True)


def test_the_graphs_bytes_count_both_directions(storage: Storage) -> None:
    for weighted, per_edge in ((False, 8), (True, 16)):
        graph = compressed(some_adjacency(), weighted)
        store_graph(storage, graph)
        size = neighbourhoods.graph_bytes(open_manifest(storage, schemas.ITEM_USERS))
        assert size == per_edge * len(graph.item_users) + 8 * (60 + 40 + 2)
