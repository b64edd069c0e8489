"""Layer-wise map and reduce against the same network computed for all items at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from pipeline import inference
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
from pipeline.contracts.storage import Storage
from tests.synthetic import shop_settings

LINEAGE = Lineage("before", {}, {})
NUM_ITEMS, WIDTH = 23, 5
Array = NDArray[Any]


class PlainNetwork:
    """A network in numpy, small enough to check by eye."""

    def __init__(self, num_layers: int, breaks_at: float | None = None) -> None:
        generator = np.random.default_rng(0)
        self.num_layers = num_layers
        self.q = generator.normal(size=(num_layers, WIDTH, 4)).astype(np.float32)
        self.w = generator.normal(size=(num_layers, WIDTH + 4, WIDTH)).astype(np.float32)
        self.breaks_at = breaks_at

    def standardise(self, features: Array, ids: NDArray[np.integer]) -> Array:
        return features - np.float32(0.5)

    def project(self, layer: int, hidden: Array) -> Array:
        result: Array = np.maximum(hidden @ self.q[layer], 0)
        return result

    def pool(self, layer: int, projected: Array, neighbours: NDArray[np.int64], weights: Array) -> Array:
        result: Array = np.einsum("bt,btm->bm", weights, projected[neighbours])
        return result

    def combine(self, layer: int, hidden: Array, pooled: Array) -> Array:
        z = np.maximum(np.concatenate([hidden, pooled], axis=1) @ self.w[layer], 0)
        result: Array = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-9)
        return result

    def head(self, hidden: Array) -> Array:
        result: Array = hidden * 2 if self.breaks_at is None else hidden * np.float32(np.nan)
        return result


def store_inputs(storage: Storage) -> tuple[Array, list[list[int]], list[list[float]]]:
    """Items, features and neighbours of three shards; item 4 has no neighbours."""
    generator = np.random.default_rng(1)
    features = generator.random((NUM_ITEMS, WIDTH)).astype(np.float32)
    lists = [sorted(generator.choice(NUM_ITEMS, size, replace=False).tolist()) for size in generator.integers(1, 7, 23)]
    lists[4] = []
    weights = [(np.ones(len(row)) / max(len(row), 1)).tolist() for row in lists]
    for shard, (start, stop) in enumerate([(0, 8), (8, 15), (15, 23)]):
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
        commit(storage, dataset, [shard for shard in shards if shard], LINEAGE)
    return features, lists, weights


def all_at_once(network: PlainNetwork, features: Array, lists: list[list[int]], weights: list[list[float]]) -> Array:
    """The same layers on whole matrices, neighbours as a dense matrix."""
    dense = np.zeros((NUM_ITEMS, NUM_ITEMS), np.float32)
    for item, (row, shares) in enumerate(zip(lists, weights, strict=True)):
        dense[item, row] = shares
    hidden = network.standardise(features, np.arange(len(features)))
    for layer in range(network.num_layers):
        hidden = network.combine(layer, hidden, dense @ network.project(layer, hidden))
    return network.head(hidden)


@pytest.mark.parametrize("rows_per_shard", [23, 8, 4])
@pytest.mark.parametrize("num_layers", [0, 2])
def test_layer_by_layer_equals_all_at_once(
    spark: SparkSession, storage: Storage, num_layers: int, rows_per_shard: int
) -> None:
    network = PlainNetwork(num_layers)
    expected = all_at_once(network, *store_inputs(storage))
    tree = shop_settings(Path("data"), Path(storage.url))
    tree["resources"]["rows_per_shard"] = rows_per_shard
    inference.run(spark, storage, parse_settings(tree), Lineage("inference", {}, {}), network)
    stored = read_table(storage, open_manifest(storage, schemas.EMBEDDINGS))
    np.testing.assert_allclose(arrow_to_vectors(stored.column("embedding")), expected, rtol=1e-5, atol=1e-6)
    assert stored.column("key").to_pylist() == [f"key {i}" for i in range(NUM_ITEMS)]
    assert storage.names(schemas.LAYERS.name) == []


def test_a_diverged_model_is_refused_by_item_and_nothing_is_published(spark: SparkSession, storage: Storage) -> None:
    store_inputs(storage)
    settings = parse_settings(shop_settings(Path("data"), Path(storage.url)))
    with pytest.raises(DataError, match=r"item key 0 got an embedding with NaN.*learning_rate"):
        inference.run(spark, storage, settings, Lineage("inference", {}, {}), PlainNetwork(1, breaks_at=0))
    assert find_manifest(storage, schemas.EMBEDDINGS) is None
