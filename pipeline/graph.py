"""Training interactions to a bipartite graph in compressed rows, both directions.

Reads INTERACTIONS, USERS, ITEMS; writes ITEM_USERS and USER_ITEMS. Only training events enter: nothing dated after the
split reaches the graph. Repeated events of one user and item become one edge with the summed weight. One shuffle per
direction; memory: one shard per task.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage, begin, commit, lists_to_arrow, open_manifest
from pipeline.contracts.errors import DataError
from pipeline.contracts.sharding import count_shards, shard_bounds
from pipeline.contracts.storage import Storage
from pipeline.spark import progress, read_dataset, write_shards


def run(spark: SparkSession, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Build both directions of the graph from the training interactions."""
    for dataset in schemas.GRAPH.writes:
        begin(storage, dataset)
    interactions = open_manifest(storage, schemas.INTERACTIONS)
    num_users, num_items = (open_manifest(storage, d).num_rows for d in (schemas.USERS, schemas.ITEMS))
    events = read_dataset(spark, storage, interactions, ["user_id", "item_id", "timestamp", "weight", "split"])
    all_edges = distinct_edges(events)
    edges = prune_users(all_edges, settings.task.graph.max_user_degree).persist(StorageLevel.MEMORY_AND_DISK)
    with progress("graph: edges", 1, spark):
        num_edges = edges.count()
        before = all_edges.count() if settings.task.graph.max_user_degree else num_edges
    if not num_edges:
        raise DataError(
            "the graph has no edge: no training interaction is left; look at `pinsage status` and the split"
        )
    report = {"users": num_users, "items": num_items, "edges": num_edges, "edges_pruned": before - num_edges}
    for dataset, row, column, num_rows in (
        (schemas.ITEM_USERS, "item_id", "user_id", num_items),
        (schemas.USER_ITEMS, "user_id", "item_id", num_users),
    ):
        num_shards = count_shards(num_rows, settings.resources.rows_per_shard)
        rows = edges.select(F.col(row).alias("id"), F.col(column).alias("neighbour"), "weight")

        def finish(shard: int, group: pa.Table, bounds: tuple[int, int] = (num_rows, num_shards)) -> pa.Table:
            return adjacency(group, *shard_bounds(*bounds, shard))

        shards = write_shards(
            rows, num_rows, num_shards, storage, dataset, lineage, finish, f"graph: write {dataset.name}"
        )
        commit(storage, dataset, shards, lineage, report)
    edges.unpersist()


def distinct_edges(events: DataFrame) -> DataFrame:
    """One row per user and item of the training period: summed weight, latest timestamp."""
    training = events.where((F.col("split") == schemas.TRAIN_SPLIT) & (F.col("weight") > 0))
    return training.groupBy("user_id", "item_id").agg(
        F.sum(F.col("weight").cast("double")).cast("float").alias("weight"), F.max("timestamp").alias("timestamp")
    )


def prune_users(edges: DataFrame, max_degree: int) -> DataFrame:
    """Keep the max_degree most recent items of every user, ties by item id; 0 keeps all."""
    if not max_degree:
        return edges
    order = Window.partitionBy("user_id").orderBy(F.desc("timestamp"), "item_id")
    return edges.withColumn("place", F.row_number().over(order)).where(F.col("place") <= max_degree).drop("place")


def adjacency(edges: pa.Table, start: int, stop: int) -> pa.Table:
    """Rows [start, stop) of the graph from their edges (id, neighbour, weight): sorted lists, empty where none."""
    ids = edges.column("id").to_numpy()
    neighbours = edges.column("neighbour").to_numpy()
    order = np.lexsort((neighbours, ids))
    ids, neighbours = ids[order], neighbours[order].astype(np.uint32)
    weights = edges.column("weight").to_numpy()[order].astype(np.float64)
    indptr = np.searchsorted(ids, np.arange(start, stop + 1))
    running = np.concatenate([[0.0], np.cumsum(weights)])
    within = running[1:] - np.repeat(running[indptr[:-1]], np.diff(indptr))
    return pa.table(
        {
            "id": pa.array(np.arange(start, stop), pa.uint32()),
            "neighbours": lists_to_arrow(indptr, neighbours),
            "cumulative_weights": lists_to_arrow(indptr, within.astype(np.float32)),
        },
        schema=schemas.ITEM_USERS.arrow,
    )
