"""Random walks to every item's most visited items and their weights.

Reads ITEM_USERS and USER_ITEMS; writes NEIGHBOURS. Every host maps one local copy of the graph, shared by its tasks
(DESIGN D3, strategy `replicate`); a task walks from the items of one shard. Memory per task: one output shard and the
kernel's hash table.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings, Walks
from pipeline.contracts.datasets import Lineage, begin, commit, lists_to_arrow, open_manifest
from pipeline.contracts.sharding import count_shards, shard_bounds
from pipeline.contracts.storage import Storage
from pipeline.spark import make_shards
from pipeline.walk_kernel import BipartiteGraph, visit_counts, walks_per_hop


def run(spark: SparkSession, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Walk from every item, one shard per task."""
    begin(storage, schemas.NEIGHBOURS)
    num_items = open_manifest(storage, schemas.ITEM_USERS).num_rows
    cache, walks, seed = settings.resources.cache, settings.task.walks, settings.task.seed
    num_shards = count_shards(num_items, settings.resources.rows_per_shard)

    def make(shard: int) -> pa.Table:
        graph = BipartiteGraph.open(storage, cache)
        return neighbour_rows(graph, *shard_bounds(num_items, num_shards, shard), walks, seed)

    shards = make_shards(spark, storage, schemas.NEIGHBOURS, lineage, num_shards, make, "walks: top neighbours")
    commit(storage, schemas.NEIGHBOURS, shards, lineage, {"items": num_items, "num_neighbours": walks.num_neighbours})


def neighbour_rows(graph: BipartiteGraph, start: int, stop: int, walks: Walks, seed: int) -> pa.Table:
    """NEIGHBOURS rows of items [start, stop): the top T by visits, weights that sum to 1."""
    per_hop = walks_per_hop(walks.num_walks, walks.max_hops, walks.restart_probability)
    ids, counts, lengths = visit_counts(
        graph, np.arange(start, stop), per_hop, walks.num_neighbours, seed, walks.weighted
    )
    kept = np.arange(ids.shape[1]) < lengths[:, None]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return pa.table(
        {
            "id": pa.array(np.arange(start, stop), pa.uint32()),
            "neighbours": lists_to_arrow(indptr, ids[kept]),
            "weights": lists_to_arrow(indptr, normalised(counts)[kept]),
        },
        schema=schemas.NEIGHBOURS.arrow,
    )


def normalised(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Visit counts [B, T] as weights that sum to 1 in every row that has any."""
    totals = counts.sum(axis=1, keepdims=True)
    weights: NDArray[np.float32] = (counts / np.maximum(totals, 1)).astype(np.float32)
    return weights
