"""Every item's embedding, layer by layer, as map and reduce.

Reads ITEMS, FEATURES, NEIGHBOURS and MODEL; writes EMBEDDINGS. Per layer, map projects every item once and reduce sums
its neighbours' projections, combines them with the item's own vector and normalises; the head follows the last layer.
So each item is computed once per layer, however many neighbourhoods it is in. Reducer `gather`: every host maps one
local copy of the projected layer, shared by its tasks. Memory per task: one shard of vectors and of neighbours.

The network comes in as plain array functions (`model.export`), so that nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    Shard,
    arrow_to_lists,
    arrow_to_vectors,
    begin,
    commit,
    find_manifest,
    open_manifest,
    read_rows,
    vectors_to_arrow,
)
from pipeline.contracts.errors import DataError
from pipeline.contracts.replica import map_vectors, padded
from pipeline.contracts.sharding import count_shards, shard_bounds
from pipeline.contracts.storage import Storage
from pipeline.spark import make_shards

Array = NDArray[Any]


class Network(Protocol):
    """The trained model as array functions; must pickle, as Spark ships it to its tasks."""

    num_layers: int

    def standardise(self, features: Array, ids: NDArray[np.integer]) -> Array:
        """Content vectors [n, F] to the first layer's input [n, F]."""

    def project(self, layer: int, hidden: Array) -> Array:
        """What an item [n, d] says to those that have it as neighbour [n, m]."""

    def pool(self, layer: int, projected: Array, neighbours: Array, weights: Array) -> Array:
        """What items get [n, m] from rows of projected [N, m], by neighbours and weights [n, T]."""

    def combine(self, layer: int, hidden: Array, pooled: Array) -> Array:
        """An item's next vector [n, d] from its own [n, d'] and its neighbours' [n, m]."""

    def head(self, hidden: Array) -> Array:
        """The embedding [n, d] of the last layer's output."""


def run(spark: SparkSession, storage: Storage, settings: Settings, lineage: Lineage, network: Network) -> None:
    """Embed every item of the catalogue."""
    begin(storage, schemas.EMBEDDINGS)
    steps = _Steps(spark, storage, settings, lineage, network)
    hidden: str | None = None
    for layer in range(network.num_layers):
        projected = steps.project(layer, hidden)
        hidden = steps.combine(layer, hidden, projected)
    steps.embed(hidden)
    storage.delete(schemas.LAYERS.name)


class _Steps:
    """One map or reduce after the other, each a dataset of its own until the embeddings are there."""

    def __init__(
        self, spark: SparkSession, storage: Storage, settings: Settings, lineage: Lineage, network: Network
    ) -> None:
        self.spark, self.storage, self.lineage, self.network = spark, storage, lineage, network
        self.cache = settings.resources.cache
        self.layer_dtype, self.dtype = settings.task.inference.layer_dtype, settings.task.inference.dtype
        self.features, self.neighbours, self.items = (
            open_manifest(storage, d) for d in (schemas.FEATURES, schemas.NEIGHBOURS, schemas.ITEMS)
        )
        self.num_items = self.items.num_rows
        self.num_shards = count_shards(self.num_items, settings.resources.rows_per_shard)

    def project(self, layer: int, hidden: str | None) -> str:
        """Map: what every item says to its neighbours."""
        network, load, dtype = self.network, self._loader(hidden), self.layer_dtype

        def make(start: int, stop: int) -> pa.Table:
            return _layer_rows(start, network.project(layer, load(start, stop)), dtype)

        return self._layer(
            f"{schemas.LAYERS.name}/projected-{layer + 1}", make, f"inference: project layer {layer + 1}"
        )

    def combine(self, layer: int, hidden: str | None, projected: str) -> str:
        """Reduce: gather the neighbours' messages and make every item's next vector."""
        network, load, dtype, storage, cache = (
            self.network,
            self._loader(hidden),
            self.layer_dtype,
            self.storage,
            self.cache,
        )
        messages, neighbours = open_manifest(storage, projected), self.neighbours

        def make(start: int, stop: int) -> pa.Table:
            table = map_vectors(storage, messages, "vector", cache)
            index, weights = _neighbourhoods(storage, neighbours, start, stop)
            pooled = network.pool(layer, table, index, weights)
            return _layer_rows(start, network.combine(layer, load(start, stop), pooled), dtype)

        return self._layer(f"{schemas.LAYERS.name}/output-{layer + 1}", make, f"inference: combine layer {layer + 1}")

    def embed(self, hidden: str | None) -> None:
        """Map: the head, and the caller's keys."""
        network, load, storage, items, dtype = self.network, self._loader(hidden), self.storage, self.items, self.dtype

        def make(start: int, stop: int) -> pa.Table:
            vectors = network.head(load(start, stop))
            keys = read_rows(storage, items, start, stop, ["key", "id"])
            bad = ~np.isfinite(vectors).all(axis=1)
            if bad.any():
                raise DataError(
                    f"item {keys.column('key')[int(bad.argmax())]} got an embedding with NaN or infinity: the model "
                    "has diverged; run `pinsage train --force` with a smaller task.training.learning_rate"
                )
            return pa.table(
                {
                    "key": keys.column("key"),
                    "id": keys.column("id"),
                    "embedding": vectors_to_arrow(vectors.astype(dtype)),
                }
            )

        shards = self._shards(schemas.EMBEDDINGS, make, "inference: head")
        commit(storage, schemas.EMBEDDINGS, shards, self.lineage, {"items": self.num_items})

    def _layer(self, name: str, make: Callable[[int, int], pa.Table], label: str) -> str:
        finished = find_manifest(self.storage, name)
        if finished is None or finished.lineage.fingerprint != self.lineage.fingerprint:
            begin(self.storage, name)
            commit(self.storage, name, self._shards(name, make, label), self.lineage)
        return name

    def _shards(self, dataset: schemas.Dataset | str, make: Callable[[int, int], pa.Table], label: str) -> list[Shard]:
        num_items, num_shards = self.num_items, self.num_shards

        def rows(shard: int) -> pa.Table:
            return make(*shard_bounds(num_items, num_shards, shard))

        return make_shards(self.spark, self.storage, dataset, self.lineage, num_shards, rows, label)

    def _loader(self, hidden: str | None) -> Callable[[int, int], Array]:
        """How a task reads its items' vectors: the previous layer's, or the standardised features."""
        storage, features, network = self.storage, self.features, self.network
        previous = None if hidden is None else open_manifest(storage, hidden)

        def load(start: int, stop: int) -> Array:
            if previous is None:
                rows = read_rows(storage, features, start, stop, ["features"]).column("features")
                return network.standardise(arrow_to_vectors(rows).astype(np.float32), np.arange(start, stop))
            rows = read_rows(storage, previous, start, stop, ["vector"]).column("vector")
            return arrow_to_vectors(rows).astype(np.float32)

        return load


def _neighbourhoods(storage: Storage, neighbours: Manifest, start: int, stop: int) -> tuple[Array, Array]:
    """Neighbour ids and weights [n, T] of items [start, stop); padding weighs 0."""
    table = read_rows(storage, neighbours, start, stop)
    indptr, ids = arrow_to_lists(table.column("neighbours"))
    _, weights = arrow_to_lists(table.column("weights"))
    rows, width = np.arange(stop - start), max(1, int(np.diff(indptr).max(initial=0)))
    return padded(indptr, ids, rows, width, np.int64), padded(indptr, weights, rows, width, np.float32)


def _layer_rows(start: int, vectors: Array, dtype: str) -> pa.Table:
    ids = pa.array(np.arange(start, start + len(vectors)), pa.uint32())
    return pa.table({"id": ids, "vector": vectors_to_arrow(vectors.astype(dtype))})
