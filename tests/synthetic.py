"""Small graphs and shops whose right answer is planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.contracts import schemas
from pipeline.contracts.datasets import Lineage, commit, lists_to_arrow, write_shard
from pipeline.contracts.sharding import shard_bounds
from pipeline.contracts.storage import Storage
from pipeline.walk_kernel import BipartiteGraph


def compressed(adjacency: NDArray[np.float64], weighted: bool = False, seed: int = 0) -> BipartiteGraph:
    """A dense [items, users] weight matrix as the kernel's graph, users' items shuffled by seed."""
    generator = np.random.default_rng(seed)

    def rows(
        matrix: NDArray[np.float64], shuffled: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32]]:
        ids = [np.flatnonzero(row) for row in matrix]
        if shuffled:
            ids = [generator.permutation(row) for row in ids]
        indptr = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
        shares = [running_shares(row[columns]) for row, columns in zip(matrix, ids, strict=True)] if weighted else []
        empty = np.zeros(0, np.uint32)
        return indptr, np.concatenate([empty, *ids]).astype(np.uint32), np.concatenate([empty, *shares])

    return BipartiteGraph(*rows(adjacency, False), *rows(adjacency.T, True), np.zeros(0, np.uint8))


def running_shares(weights: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Each edge's running share of its row's weight, in units of 2 ** -32, the last one's 2 ** 32 - 1."""
    running = np.cumsum(weights) / np.maximum(weights.sum(), 1e-300)
    shares: NDArray[np.uint32] = np.clip(np.round(running * 2.0**32) - 1, 0, 2**32 - 1).astype(np.uint32)
    return shares


def store_graph(storage: Storage, graph: BipartiteGraph, num_shards: int = 1) -> None:
    """Write both directions as the graph stage would, each in so many shards."""
    sides = (
        (schemas.ITEM_USERS, graph.item_indptr, graph.item_users, graph.item_shares),
        (schemas.USER_ITEMS, graph.user_indptr, graph.user_items, graph.user_shares),
    )
    size = {"items": len(graph.item_indptr) - 1, "users": len(graph.user_indptr) - 1, "edges": len(graph.item_users)}
    for dataset, indptr, ids, shares in sides:
        lineage, shards = Lineage("graph", {}, {}), []
        for number in range(num_shards):
            start, stop = shard_bounds(len(indptr) - 1, num_shards, number)
            bounds = indptr[start : stop + 1]
            inside = slice(int(bounds[0]), int(bounds[-1]))
            columns: list[Any] = [
                pa.array(np.arange(start, stop), pa.uint32()),
                lists_to_arrow(bounds - bounds[0], ids[inside]),
                lists_to_arrow(bounds - bounds[0] if len(shares) else np.zeros(len(bounds), int), shares[inside]),
            ]
            shards.append(write_shard(storage, dataset, number, pa.table(columns, schema=dataset.arrow), lineage))
        commit(storage, dataset, shards, lineage, {**size, "weighted": len(shares) > 0})


def write_shop(
    folder: Path, num_users: int = 240, num_groups: int = 6, items_per_group: int = 12, seed: int = 0
) -> None:
    """interactions.parquet and items.parquet of a shop whose baskets stay within one group of items.

    An item's title names its group, and each group's last two items are sold only in the last tenth of the time:
    cold in training, to be found by their words alone. Item "lonely" is never sold.
    """
    generator = np.random.default_rng(seed)
    users: list[str] = []
    items: list[str] = []
    times: list[int] = []
    for user in range(num_users):
        group = user % num_groups
        newest = items_per_group if user >= num_users * 9 // 10 else items_per_group - 2
        for place, item in enumerate(generator.permutation(newest)[:6]):
            users.append(f"basket {user:04d}")
            items.append(f"g{group}-{item:02d}")
            times.append(1_600_000_000 + user * 3600 + place)
    words = ["lamp", "mug", "kite", "rug", "vase", "drum", "sock", "tent"]
    colours = ["red", "blue", "green", "black", "white", "pink", "grey", "gold", "teal", "plum", "rose", "lime"]
    keys = [f"g{group}-{item:02d}" for group in range(num_groups) for item in range(items_per_group)]
    titles = [f"{colours[item]} {words[group]}" for group in range(num_groups) for item in range(items_per_group)]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"basket": users, "product": items, "when": times}), folder / "interactions.parquet")
    catalogue = {"product": [*keys, "lonely"], "name": [*titles, "red lonely thing"]}
    prices = [1.0 + place % items_per_group for place in range(len(keys))] + [None]
    pq.write_table(pa.table({**catalogue, "price": pa.array(prices, pa.float64())}), folder / "items.parquet")


def shop_settings(folder: Path, run: Path, **task: Any) -> dict[str, Any]:
    """Settings for write_shop's files, small enough for a test; task overrides sections of the task."""
    data = {
        "interactions": {
            "paths": str(folder / "interactions.parquet"), "user": "basket", "item": "product", "timestamp": "when",
        },
        "items": {
            "paths": str(folder / "items.parquet"), "key": "product", "title": "name",
            "columns": [{"name": "name", "kind": "text"}, {"name": "price", "kind": "numeric"}],
        },
    }  # fmt: skip
    small = {
        "name": "shop",
        "data": data,
        "features": {"text_dimensions": 16, "text_buckets": 1024},
        "walks": {"num_neighbours": 10, "num_walks": 100},
        "pairs": {"num_hard_negatives": 5},
        "model": {"hidden_dimensions": 16, "output_dimensions": 8},
        "training": {"epochs": 2, "batch_size": 64},
        "index": {"num_queries": 20},
        "evaluation": {"k": [5, 10], "bootstrap": 50, "examples": 2},
    }
    resources = {
        "run": str(run), "cache": str(run.parent / "cache"), "rows_per_shard": 30, "events_per_shard": 500,
        "spark": {"master": "local[2]", "driver_memory": "1g"},
        "training": {"threads": 1, "checkpoint_every_steps": 5},
    }  # fmt: skip
    return {"task": {**small, **task}, "resources": resources}
