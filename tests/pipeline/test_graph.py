"""The graph stage: edges, pruning, rows; the same bytes for any number of partitions."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pyspark.sql import SparkSession

from pipeline.contracts.datasets import arrow_to_lists
from pipeline.graph import adjacency, distinct_edges, prune_users

COLUMNS = "user_id long, item_id long, timestamp long, weight float, split int"


def test_only_training_events_make_edges_and_repeats_add_up(spark: SparkSession) -> None:
    rows = [(0, 5, 10, 1.0, 0), (0, 5, 30, 2.5, 0), (0, 6, 40, 1.0, 1), (1, 5, 50, 1.0, 2), (1, 7, 5, 1.0, 0)]
    found = distinct_edges(spark.createDataFrame(rows, COLUMNS)).collect()
    assert {tuple(row) for row in found} == {(0, 5, 3.5, 30), (1, 7, 1.0, 5)}


def test_pruning_keeps_a_users_most_recent_items(spark: SparkSession) -> None:
    rows = [(0, item, 10 * item, 1.0, 0) for item in range(6)] + [(1, 0, 1, 1.0, 0)]
    edges = distinct_edges(spark.createDataFrame(rows, COLUMNS))
    kept = {(row["user_id"], row["item_id"]) for row in prune_users(edges, 2).collect()}
    assert kept == {(0, 4), (0, 5), (1, 0)}
    assert prune_users(edges, 0).count() == 7


def test_rows_are_dense_sorted_and_carry_running_weights() -> None:
    edges = pa.table({"id": [4, 2, 4], "neighbour": [9, 1, 3], "weight": pa.array([2.0, 1.0, 0.5], pa.float32())})
    table = adjacency(edges, 2, 6)
    assert table.column("id").to_pylist() == [2, 3, 4, 5]
    assert table.column("neighbours").to_pylist() == [[1], [], [3, 9], []]
    assert table.column("cumulative_weights").to_pylist() == [[1.0], [], [0.5, 2.5], []]


def test_shuffled_edges_give_the_same_rows() -> None:
    generator = np.random.default_rng(0)
    pairs = np.unique(generator.integers(0, 40, (300, 2)), axis=0)
    edges = pa.table(
        {"id": pairs[:, 0], "neighbour": pairs[:, 1], "weight": generator.random(len(pairs)).astype(np.float32)}
    )
    shuffled = edges.take(pa.array(generator.permutation(len(pairs))))
    assert adjacency(edges, 0, 40).equals(adjacency(shuffled, 0, 40))
    indptr, values = arrow_to_lists(adjacency(edges, 0, 40).column("neighbours"))
    assert len(values) == len(pairs)
    assert indptr[-1] == len(pairs)
