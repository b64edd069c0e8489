"""Layer-wise map and reduce against the same network computed for all items at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline import spark as spark_module
from pipeline import steps
from pipeline.contracts import schemas
from pipeline.contracts.config import parse_settings
from pipeline.contracts.datasets import (
    Lineage,
    arrow_to_vectors,
    commit,
    find_manifest,
    finished_shard,
    lists_to_arrow,
    open_manifest,
    read_table,
    vectors_to_arrow,
    write_shard,
)
from pipeline.contracts.errors import DataError
from pipeline.contracts.replica import Rows
from pipeline.contracts.rows import describe_rows, write_rows
from pipeline.contracts.storage import Storage
from pipeline.inference import reducers, stage, ways
from pipeline.inference.network import filled
from pipeline.inference.reducers import read_lists
from pipeline.inference.shuffle import Edges
from pipeline.inference.sums import add_rows, scaled
from pipeline.inference.vectors import as_stored
from pipeline.spark import run_tasks
from tests.synthetic import shop_settings

LINEAGE = Lineage("before", {}, {})
NUM_ITEMS, WIDTH = 23, 5
Array = NDArray[Any]


class PlainNetwork:
    """A network in numpy, small enough to check by eye; breaks_in names the function that makes NaN.

    One that holds has layers elsewhere, and sums them there, as if it had a GPU.
    """

    list_kinds: tuple[int, ...] = (0, 1)
    reads = "all in the first layer, two in the second"

    def __init__(self, num_layers: int, reduction: str = "sum", breaks_in: str = "", holds: bool = False) -> None:
        generator, self.holds, self.gave_back = np.random.default_rng(0), holds, 0
        self.num_layers, self.reduction, self.breaks_in, self.block = num_layers, reduction, breaks_in, 256
        self.q = generator.normal(size=(num_layers, WIDTH, 4)).astype(np.float32)
        self.w = generator.normal(size=(num_layers, WIDTH + 4, WIDTH)).astype(np.float32)

    def standardise(self, features: Array, ids: NDArray[np.integer]) -> Array:
        assert len(features) == len(ids) == self.block
        return features - np.float32(0.5)

    def project(self, layer: int, hidden: Array) -> Array:
        result: Array = np.maximum(hidden @ self.q[layer], 0)
        return result * np.float32(np.nan if self.breaks_in == "project" else 1)

    def lists(self, layer: int, index: NDArray[np.integer], weights: Array) -> tuple[NDArray[np.integer], Array]:
        if layer == 0:
            return index, weights
        kept = weights[:, :2] / np.maximum(weights[:, :2].sum(axis=1, keepdims=True), np.float32(1e-9))
        return index[:, :2], kept

    def hold(self, parts: Sequence[Array]) -> Any:
        return {"rows": np.concatenate(parts)} if self.holds else None

    def sum_held(self, held: Any, index: NDArray[np.integer], weights: Array, unit: float) -> Any:
        indptr = np.arange(len(index) + 1) * index.shape[1]
        sums = np.zeros((len(index), held["rows"].shape[1]), np.int32)
        add_rows(held["rows"], indptr, index.reshape(-1), weights.reshape(-1), unit, sums)
        return {"sums": sums}

    def scale_held(self, sums: Any, unit: float) -> Any:
        return scaled(filled(sums["sums"], self.block), unit)

    def give_back(self) -> None:
        self.gave_back += 1

    def fetch(self, sums: Any) -> NDArray[np.int32]:
        return np.asarray(sums["sums"])

    def combine(self, layer: int, hidden: Array, pooled: Array) -> Array:
        z = np.maximum(np.concatenate([hidden, pooled], axis=1) @ self.w[layer], 0)
        result: Array = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-9)
        return result

    def head(self, hidden: Array) -> Array:
        return hidden * np.float32(np.nan if self.breaks_in == "head" else 2)


def store_inputs(storage: Storage) -> tuple[Array, list[list[int]], list[list[float]]]:
    """Items, features and neighbours of three shards; item 4 has no neighbours."""
    generator = np.random.default_rng(1)
    features = generator.random((NUM_ITEMS, WIDTH)).astype(np.float32)
    lists = [sorted(generator.choice(NUM_ITEMS, size, replace=False).tolist()) for size in generator.integers(1, 7, 23)]
    lists[4] = []
    weights = [(np.ones(len(row)) / max(len(row), 1)).tolist() for row in lists]
    for shard, (start, stop) in enumerate([(0, 7), (7, 15), (15, 23)]):
        ids = pa.array(np.arange(start, stop), pa.uint32())
        indptr = np.concatenate([[0], np.cumsum([len(row) for row in lists[start:stop]])])
        flat = np.array([i for row in lists[start:stop] for i in row], np.uint32)
        flat_weights = np.array([w for row in weights[start:stop] for w in row], np.float32)
        tables = {
            schemas.FEATURES: [ids, vectors_to_arrow(features[start:stop])],
            schemas.NEIGHBOURS: [ids, lists_to_arrow(indptr, flat), lists_to_arrow(indptr, flat_weights)],
            schemas.ITEMS: [
                pa.array([f"key {i}" for i in range(start, stop)]),
                ids,
                pa.array([0] * (stop - start), pa.int64()),
                pa.array([-1] * (stop - start), pa.int64()),
                pa.nulls(stop - start, pa.string()),
            ],
        }
        for dataset, columns in tables.items():
            names = [column.name for column in dataset.columns or ()]
            write_shard(storage, dataset, shard, pa.table(columns, names=names), LINEAGE)
    for dataset in (schemas.FEATURES, schemas.NEIGHBOURS, schemas.ITEMS):
        shards = [finished_shard(storage, dataset, number, LINEAGE) for number in range(3)]
        commit(storage, dataset, [shard for shard in shards if shard], LINEAGE, {"num_neighbours": 6})
    return features, lists, weights


def all_at_once(network: PlainNetwork, features: Array, lists: list[list[int]], weights: list[list[float]]) -> Array:
    """The same layers on whole matrices, neighbours as a dense matrix."""
    hidden = features - np.float32(0.5)
    for layer in range(network.num_layers):
        dense = np.zeros((NUM_ITEMS, NUM_ITEMS), np.float32)
        for item, (row, shares) in enumerate(zip(lists, weights, strict=True)):
            read, total = (row, 1.0) if layer == 0 else (row[:2], sum(shares[:2]))
            dense[item, read] = np.array(shares[: len(read)]) / max(total, 1e-9)
        projected = network.project(layer, hidden)
        if network.reduction == "sum":
            pooled = dense @ projected
        else:
            pooled = np.stack([projected[np.flatnonzero(row)].max(axis=0, initial=0) for row in dense])
        hidden = network.combine(layer, hidden, pooled)
    return network.head(hidden)


def embed(
    spark: SparkContext, storage: Storage, network: PlainNetwork, rows_per_shard: int, *overrides: str
) -> tuple[Array, list[str], dict[str, Any]]:
    """The stage's embeddings, their keys, and what the manifest says."""
    tree = shop_settings(Path("data"), Path(storage.url))
    tree["resources"]["rows_per_shard"] = rows_per_shard
    for override in overrides:
        name, _, value = override.partition("=")
        *folders, last = name.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    settings = parse_settings(tree)
    told = {"rows_per_shard": rows_per_shard, "task": [given for given in overrides if given.startswith("task.")]}
    stage.run(spark, storage, settings, Lineage("inference", told, {}), network)
    manifest = open_manifest(storage, schemas.EMBEDDINGS)
    stored = read_table(storage, manifest)
    assert storage.names(schemas.LAYERS.name) == []
    return arrow_to_vectors(stored.column("embedding")), stored.column("key").to_pylist(), manifest.metadata


GATHER = "resources.inference.reducer=gather"
SHUFFLE = (
    "resources.inference.reducer=shuffle",
    "resources.inference.hub_share=0.1",
    "resources.inference.cluster_rounds=1",
)
BY_ID = (*SHUFFLE, "resources.inference.cluster_rounds=0")
NO_HUBS = (
    "resources.inference.reducer=shuffle",
    "resources.inference.hub_share=0",
    "resources.inference.cluster_rounds=0",
)


def test_layers_that_are_held_and_summed_elsewhere_give_the_same_bytes(spark: SparkContext, storage: Storage) -> None:
    store_inputs(storage)
    expected, _, _ = embed(spark, storage, PlainNetwork(2), 4, GATHER)
    found, _, _ = embed(spark, storage, PlainNetwork(2, holds=True), 4, GATHER)
    np.testing.assert_array_equal(found, expected)


def test_what_is_held_is_given_back_when_no_task_asks_for_it(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reducers, "KEPT_SECONDS", 600)
    matrix, network = np.arange(12, dtype=np.float32).reshape(4, 3), PlainNetwork(1, holds=True)
    shard = write_rows(storage, "layer", 0, matrix, LINEAGE)
    rows = Rows.of(storage, commit(storage, "layer", [shard], LINEAGE, describe_rows("float32", 3)), None)
    first = reducers.hold_once(rows, network)
    np.testing.assert_array_equal(first["rows"], matrix)
    assert reducers.hold_once(rows, network) is first
    assert network.gave_back == 0
    monkeypatch.setattr(reducers, "KEPT_SECONDS", 0.05)
    assert reducers.hold_once(rows, network) is first
    waited = time.monotonic() + 60
    while not network.gave_back and time.monotonic() < waited:
        time.sleep(0.05)
    assert network.gave_back == 1
    monkeypatch.setattr(reducers, "KEPT_SECONDS", 600)
    assert reducers.hold_once(rows, network) is not first
    assert reducers.hold_once(rows, PlainNetwork(1)) is not None, "the process holds it already"


@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_all_ways_give_the_bytes_of_one_and_the_values_of_whole_matrices(
    spark: SparkContext, storage: Storage, reduction: str
) -> None:
    network = PlainNetwork(2, reduction)
    expected = all_at_once(network, *store_inputs(storage))
    ways = [(23, (GATHER,)), (4, (GATHER,)), (8, BY_ID)]
    if reduction == "sum":
        ways += [(4, SHUFFLE), (23, NO_HUBS)]
    first: Array | None = None
    for rows_per_shard, overrides in ways:
        vectors, keys, told = embed(spark, storage, network, rows_per_shard, *overrides)
        first = vectors if first is None else first
        np.testing.assert_array_equal(vectors, first, err_msg=f"{rows_per_shard} {overrides}")
        np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)
        assert keys == [f"key {i}" for i in range(NUM_ITEMS)]
        norms = np.linalg.norm(expected, axis=1)
        assert told["norm_mean"] == pytest.approx(norms.mean())
        assert (told["items"], told["zeros"]) == (NUM_ITEMS, int((norms == 0).sum()))
        assert told["spread"] == pytest.approx(((expected - expected.mean(axis=0)) ** 2).sum(axis=1).mean(), rel=1e-4)
        assert (told["without_edges"], told["drift"]) == (NUM_ITEMS, None)


def test_half_precision_layers_are_near_and_shuffled_as_gathered(spark: SparkContext, storage: Storage) -> None:
    network = PlainNetwork(2)
    expected = all_at_once(network, *store_inputs(storage))
    half = ("task.inference.layer_dtype=float16", "task.inference.dtype=float16")
    gathered, _, _ = embed(spark, storage, network, 8, GATHER, *half)
    shuffled, _, _ = embed(spark, storage, network, 8, *BY_ID, *half)
    np.testing.assert_array_equal(gathered, shuffled)
    assert gathered.dtype == np.float16
    np.testing.assert_allclose(gathered, expected, atol=4e-3)
    assert np.abs(gathered - expected).max() > 1e-6


def test_without_layers_the_head_reads_content(spark: SparkContext, storage: Storage) -> None:
    network = PlainNetwork(0)
    expected = all_at_once(network, *store_inputs(storage))
    vectors, _, _ = embed(spark, storage, network, 8, *SHUFFLE)
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "breaks_at"),
    [
        ((GATHER,), ("project layer 1", "combine layer 1", "combine layer 2")),
        (BY_ID, ("edges", "partial sums 1", "combine layer 1", "embeddings in order")),
    ],
)
def test_broken_off_it_goes_on_to_the_same_bytes(
    spark: SparkContext, storage: Storage, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...],
    breaks_at: tuple[str, ...],
) -> None:  # fmt: skip
    """Broken off in the middle of several steps in turn, when half of a step's tasks are done."""
    network = PlainNetwork(2)
    store_inputs(storage)
    expected, _, _ = embed(spark, storage, network, 8, *overrides)
    storage.delete(schemas.EMBEDDINGS.name)
    storage.delete(schemas.EXCHANGE)
    left = [f"inference: {label}" for label in breaks_at]
    original = spark_module.run_tasks

    class BrokenOffError(Exception):
        pass

    def breaking(session: SparkContext, tasks: Any, work: Any, label: str) -> Any:
        if label not in left:
            return original(session, tasks, work, label)
        left.remove(label)
        original(session, tasks[:1], work, label)
        raise BrokenOffError

    monkeypatch.setattr(steps, "run_tasks", breaking)
    for _ in breaks_at:
        with pytest.raises(BrokenOffError):
            embed(spark, storage, network, 8, *overrides)
    found, _, _ = embed(spark, storage, network, 8, *overrides)
    np.testing.assert_array_equal(found, expected)
    assert not left


@pytest.mark.parametrize(
    ("first", "broken_off_at", "then"),
    [
        (SHUFFLE, "partial sums 1", (GATHER,)),
        ((GATHER,), "combine layer 1", SHUFFLE),
        ((GATHER,), "combine layer 2", BY_ID),
        (SHUFFLE, "combine layer 1", BY_ID),
        (BY_ID, "combine layer 2", NO_HUBS),
    ],
)
def test_what_an_attempt_by_another_way_left_is_not_gone_on_from(
    spark: SparkContext, storage: Storage, monkeypatch: pytest.MonkeyPatch, first: tuple[str, ...],
    broken_off_at: str, then: tuple[str, ...],
) -> None:  # fmt: skip
    """Its shards have other items, which nothing else tells: they are as long, and the stage's lineage is the same."""
    store_inputs(storage)
    expected, _, _ = embed(spark, storage, PlainNetwork(2), 4, GATHER)
    storage.delete(schemas.EMBEDDINGS.name)

    class BrokenOffError(Exception):
        pass

    def breaking(session: SparkContext, tasks: Any, work: Any, label: str) -> Any:
        if label == f"inference: {broken_off_at}":
            raise BrokenOffError
        return run_tasks(session, tasks, work, label)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "run_tasks", breaking)
        with pytest.raises(BrokenOffError):
            embed(spark, storage, PlainNetwork(2), 4, *first)
    assert storage.names(schemas.LAYERS.name)
    np.testing.assert_array_equal(embed(spark, storage, PlainNetwork(2), 4, *then)[0], expected)


@pytest.mark.parametrize("is_another_start", [True, False])
def test_after_a_crash_of_the_machine_what_lies_there_is_compared(
    spark: SparkContext, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_another_start: bool
) -> None:
    """A layer's file has its size, and zeros in it that were never written; without a crash it is what it was."""
    store_inputs(storage)
    expected, _, _ = embed(spark, storage, PlainNetwork(2), 8, GATHER)
    storage.delete(schemas.EMBEDDINGS.name)
    boot, labels = tmp_path / "boot_id", []
    boot.write_text("one\n")
    monkeypatch.setattr(ways, "_BOOT", boot)

    def watching(session: SparkContext, tasks: Any, work: Any, label: str) -> Any:
        labels.append(label)
        if label == "inference: combine layer 2" and labels.count(label) == 1:
            raise KeyboardInterrupt
        return run_tasks(session, tasks, work, label)

    monkeypatch.setattr(steps, "run_tasks", watching)
    with pytest.raises(KeyboardInterrupt):
        embed(spark, storage, PlainNetwork(2), 8, GATHER)
    if is_another_start:
        boot.write_text("two\n")
        lost = Path(storage.locate(f"{schemas.LAYERS.name}/projected-2/part-00001.rows"))
        lost.write_bytes(bytes(lost.stat().st_size))
    np.testing.assert_array_equal(embed(spark, storage, PlainNetwork(2), 8, GATHER)[0], expected)
    assert (labels.count("inference: combine layer 1") == 2) == is_another_start


def test_layers_that_a_kill_left_beside_finished_embeddings_are_swept_unless_they_are_kept(storage: Storage) -> None:
    for keeps in (False, True):
        ways.go_on(storage, schemas.LAYERS.name, LINEAGE, {"reducer": "gather", "keeps": keeps})
        for name in ("projected-1", "again/projected-1-rows"):
            write_rows(storage, f"{schemas.LAYERS.name}/{name}", 0, np.zeros((2, 2), np.float32), LINEAGE)
        ways.sweep(storage, Lineage("another", {}, {}))
        assert storage.names(schemas.LAYERS.name) == ["projected-1", "way.json"], "of an attempt with another model"
        ways.sweep(storage, LINEAGE)
        assert storage.names(schemas.LAYERS.name) == (["projected-1", "way.json"] if keeps else [])


def test_content_and_neighbours_of_other_items_are_refused(spark: SparkContext, storage: Storage) -> None:
    store_inputs(storage)
    items = open_manifest(storage, schemas.ITEMS)
    commit(storage, schemas.ITEMS, items.shards[:2], LINEAGE)
    with pytest.raises(DataError, match=r"features is of 23 items, and items has 15; run `pinsage features --force`"):
        embed(spark, storage, PlainNetwork(2), 8, GATHER)
    commit(storage, schemas.ITEMS, items.shards, LINEAGE, {"changed": True})
    features = open_manifest(storage, schemas.FEATURES)
    made_of = Lineage("features", {}, {schemas.ITEMS.name: items.content})
    commit(storage, schemas.FEATURES, features.shards, made_of)
    with pytest.raises(DataError, match=r"features was made of another items than .*; run `pinsage features` to build"):
        embed(spark, storage, PlainNetwork(2), 8, GATHER)
    assert find_manifest(storage, schemas.EMBEDDINGS) is None


def test_more_hubs_than_are_allowed_are_none_however_many_lists_they_are_in(
    spark: SparkContext, storage: Storage
) -> None:
    """References are told apart up to a number, beyond which two items are alike."""
    count = 4200
    indptr, ids = np.arange(0, 2 * count + 1, 2), np.tile(np.array([0, 1], np.uint32), count)
    columns = [
        pa.array(np.arange(count), pa.uint32()),
        lists_to_arrow(indptr, ids),
        lists_to_arrow(indptr, np.full(2 * count, 0.5, np.float32)),
    ]
    table = pa.table(columns, names=[column.name for column in schemas.NEIGHBOURS.columns or ()])
    shard = write_shard(storage, schemas.NEIGHBOURS, 0, table, LINEAGE)
    commit(storage, schemas.NEIGHBOURS, [shard], LINEAGE, {"num_neighbours": 2})
    tree = shop_settings(Path("data"), Path(storage.url))
    for share, expected in ((0.0, 0), (1 / count, 0), (2 / count, 2)):
        tree["resources"]["inference"] = {"cluster_rounds": 0, "hub_share": share}
        edges = Edges(spark, storage, parse_settings(tree), PlainNetwork(2), 1)
        assert edges.hubs.num_rows == expected


def test_edges_are_worked_out_once_for_many_models(
    spark: SparkContext, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_inputs(storage)
    first, other = PlainNetwork(2), PlainNetwork(2)
    other.q = other.q * np.float32(0.5)
    embed(spark, storage, first, 8, *BY_ID)
    labels = []
    original = spark_module.run_tasks

    def watching(session: SparkContext, tasks: Any, work: Any, label: str) -> Any:
        labels.append(label)
        return original(session, tasks, work, label)

    monkeypatch.setattr(steps, "run_tasks", watching)
    shuffled, _, _ = embed(spark, storage, other, 8, *BY_ID, "task.inference.dtype=float32")
    assert not {"inference: edges", "inference: choose hubs", "inference: count references"} & set(labels)
    assert [label for label in labels if "partial sums" in label]
    gathered, _, _ = embed(spark, storage, other, 8, GATHER)
    np.testing.assert_array_equal(shuffled, gathered)


@pytest.mark.parametrize("breaks_in", ["head", "project"])
def test_a_diverged_model_is_refused_by_item_and_nothing_is_published(
    spark: SparkContext, storage: Storage, breaks_in: str
) -> None:
    store_inputs(storage)
    with pytest.raises(DataError, match=r"item key 0 got an embedding with NaN.*learning_rate"):
        embed(spark, storage, PlainNetwork(1, breaks_in=breaks_in), 8, GATHER)
    assert find_manifest(storage, schemas.EMBEDDINGS) is None


def test_what_float16_cannot_hold_is_told_before_it_is_infinite() -> None:
    vectors = np.ones((3, 2), np.float32)
    vectors[1] = 70_000
    with pytest.raises(DataError, match=r"item shoe 1 has a value of 70000, and float16 ends at 65504"):
        as_stored(vectors, "float16", lambda row: f"shoe {row}")
    assert as_stored(vectors, "float32", str).dtype == np.float32


def test_weights_that_are_no_shares_are_refused() -> None:
    def rows(weights: list[float]) -> pa.Table:
        columns = [pa.array([7], pa.uint32()), lists_to_arrow(np.array([0, 2]), np.array([1, 2], np.uint32))]
        return pa.table(
            [*columns, lists_to_arrow(np.array([0, 2]), np.array(weights, np.float32))],
            names=["id", "neighbours", "weights"],
        )

    index, weights = read_lists(rows([0.75, 0.25]), 0)
    assert (index.tolist(), weights.tolist()) == ([[1, 2]], [[0.75, 0.25]])
    for bad in ([3.0, 1.0], [0.5, -0.5], [np.nan, 0.1]):
        with pytest.raises(DataError, match=r"item 7 have weights from .*, expected shares of 1"):
            read_lists(rows(bad), 0)
