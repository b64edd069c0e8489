"""The walks stage: rows, weights, and the same neighbours however the work is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from pipeline import walks
from pipeline.contracts import schemas
from pipeline.contracts.config import Settings, Walks, parse_settings
from pipeline.contracts.datasets import (
    Lineage,
    arrow_to_lists,
    commit,
    find_manifest,
    lists_to_arrow,
    open_manifest,
    read_shard,
    read_table,
    write_shard,
)
from pipeline.contracts.storage import Storage
from tests.synthetic import compressed, shop_settings

LINEAGE = Lineage("graph", {}, {})


def some_adjacency(num_items: int = 40, num_users: int = 20) -> NDArray[np.float64]:
    generator = np.random.default_rng(4)
    present: NDArray[np.float64] = (generator.random((num_items, num_users)) < 0.15).astype(np.float64)
    present[3] = 0.0
    return present


def store_graph(storage: Storage, adjacency: NDArray[np.float64]) -> None:
    """Write both directions as the graph stage would."""
    graph = compressed(adjacency)
    for dataset, indptr, ids, weights in (
        (schemas.ITEM_USERS, graph.item_indptr, graph.item_users, graph.item_weights),
        (schemas.USER_ITEMS, graph.user_indptr, graph.user_items, graph.user_weights),
    ):
        columns: list[Any] = [
            pa.array(np.arange(len(indptr) - 1), pa.uint32()),
            lists_to_arrow(indptr, ids),
            lists_to_arrow(indptr, weights),
        ]
        shard = write_shard(storage, dataset, 0, pa.table(columns, schema=dataset.arrow), LINEAGE)
        commit(storage, dataset, [shard], LINEAGE)


def settings_for(storage: Storage, rows_per_shard: int) -> Settings:
    tree = shop_settings(Path("data"), Path(storage.url))
    tree["resources"]["rows_per_shard"] = rows_per_shard
    return parse_settings(tree)


def test_weights_of_every_row_sum_to_one_and_items_without_users_have_none(storage: Storage) -> None:
    adjacency = some_adjacency()
    table = walks.neighbour_rows(compressed(adjacency), 0, 40, Walks(num_neighbours=6, num_walks=50), seed=1)
    schemas.NEIGHBOURS.check(table.schema, "rows")
    indptr, weights = arrow_to_lists(table.column("weights"))
    for item in range(40):
        row = weights[indptr[item] : indptr[item + 1]]
        assert len(row) <= 6
        assert (np.diff(row) <= 0).all()
        assert row.sum() == pytest.approx(1.0 if len(row) else 0.0, abs=1e-6)
    assert indptr[3] == indptr[4]


@pytest.mark.parametrize("rows_per_shard", [40, 14, 6])
def test_neighbours_do_not_depend_on_the_number_of_shards(
    spark: SparkSession, storage: Storage, rows_per_shard: int
) -> None:
    """1, 3 and 7 shards."""
    adjacency = some_adjacency()
    store_graph(storage, adjacency)
    settings = settings_for(storage, rows_per_shard)
    walks.run(spark, storage, settings, Lineage("walks", {}, {}))
    manifest = open_manifest(storage, schemas.NEIGHBOURS)
    assert len(manifest.shards) == -(-40 // rows_per_shard)
    whole = walks.neighbour_rows(compressed(adjacency), 0, 40, settings.task.walks, settings.task.seed)
    assert read_table(storage, manifest).equals(whole)


def test_a_restart_does_only_what_is_missing(spark: SparkSession, storage: Storage) -> None:
    store_graph(storage, some_adjacency())
    settings, lineage = settings_for(storage, 10), Lineage("walks", {"attempt": 1}, {})
    walks.run(spark, storage, settings, lineage)
    finished = open_manifest(storage, schemas.NEIGHBOURS)
    kept = Path(storage.locate("neighbours/part-00002.parquet"))
    # What an interrupted attempt leaves: shards with receipts and no manifest, one shard missing.
    for number in (0, 1, 2):
        write_shard(storage, schemas.NEIGHBOURS, number, read_shard(storage, finished, number), lineage)
    first_made = kept.stat().st_mtime_ns
    storage.delete("neighbours/_manifest.json")
    storage.delete("neighbours/part-00003.parquet")
    assert find_manifest(storage, schemas.NEIGHBOURS) is None
    walks.run(spark, storage, settings, lineage)
    assert kept.stat().st_mtime_ns == first_made
    assert open_manifest(storage, schemas.NEIGHBOURS).content == finished.content
