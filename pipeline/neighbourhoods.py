"""Every item's nearest items as a dataset: what the stages walks and pairs share.

Two strategies with one result. replicate: every host maps one copy of the graph, and of the rows that are composed.
shuffle: every shard of items is sent the parts of users' lists, or of rows, that it needs (`shipping`); of walks, the
walkers move (`walkers`). `choose` takes the first that fits. The kernels see a graph either way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from pipeline.contracts import schemas
from pipeline.contracts.config import Resources, Settings
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    begin,
    commit,
    finished_manifest,
    lists_to_arrow,
    open_manifest,
    read_shard,
)
from pipeline.contracts.replica import default_cache, map_lists, map_values
from pipeline.contracts.schemas import Dataset
from pipeline.contracts.sharding import shard_bounds
from pipeline.contracts.storage import Storage
from pipeline.exact_kernel import ONE, Found, Rows, compose, exact_neighbours
from pipeline.shipping import Wanted, shard_graph, shard_rows, ship, wanted_rows, wanted_users
from pipeline.spark import make_shards
from pipeline.walk_kernel import BipartiteGraph, degree_ranks, visit_counts, walks_per_hop
from pipeline.walkers import Walk, counted_visits, move_walkers, top_visits

Near = Callable[[NDArray[np.int64], int], Found]
Composed = Callable[[NDArray[np.int64], int, Found | None], Found]
_BLOCK = 1 << 15
"""Items handled at once inside a task."""


@dataclass(frozen=True)
class Choice:
    """A strategy, and why."""

    strategy: str
    reason: str


def choose(storage: Storage, resources: Resources) -> Choice:
    """How the graph reaches the tasks: as the settings say, or by its bytes against memory and disk of this host."""
    wanted = resources.walks.strategy
    if wanted != "auto":
        return Choice(wanted, "as resources.walks.strategy says")
    size = graph_bytes(open_manifest(storage, schemas.ITEM_USERS))
    memory = int(resources.walks.host_memory) if resources.walks.host_memory else _half_of_memory()
    if size > memory:
        given = "resources.walks.host_memory" if resources.walks.host_memory else "half of this host's memory"
        return Choice("shuffle", f"the graph takes {_size(size)} and {given} is {_size(memory)}")
    folder = default_cache() if resources.cache is None else Path(resources.cache)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        return Choice("shuffle", f"the graph takes {_size(size)} and {folder} has {_size(free)} free")
    return Choice("replicate", f"the graph takes {_size(size)} of every host's {_size(memory)}")


def graph_bytes(item_users: Manifest) -> int:
    """What both directions take, memory-mapped: ids, shares if weighted, and row pointers."""
    report = item_users.metadata
    per_edge = 16 if report.get("weighted") else 8
    return int(report["edges"]) * per_edge + 8 * (int(report["users"]) + int(report["items"]) + 2)


class Neighbourhoods:
    """What one stage needs of the graph, under one strategy; scratch datasets lie below the folder `scratch`."""

    def __init__(
        self, spark: SparkSession, storage: Storage, settings: Settings, lineage: Lineage, scratch: str, strategy: str
    ) -> None:
        self._spark, self._storage, self._lineage, self._folder = spark, storage, lineage, scratch
        self._cache, self._walks, self._seed = settings.resources.cache, settings.task.walks, settings.task.seed
        self._replicated = strategy == "replicate"
        self._item_users = open_manifest(storage, schemas.ITEM_USERS)
        self._user_items = open_manifest(storage, schemas.USER_ITEMS)
        self.num_items, self.num_shards = self._item_users.num_rows, len(self._item_users.shards)
        self.bounds = partial(shard_bounds, self.num_items, self.num_shards)
        """The items [start, stop) of a shard: every dataset made here is cut as ITEM_USERS is."""

    def scratch(self, name: str) -> str:
        """The name of a dataset that the stage keeps only while it runs."""
        return f"{self._folder}/{name}"

    def store(
        self, dataset: Dataset | str, make: Callable[[int], pa.Table], label: str, metadata: Mapping[str, object]
    ) -> Manifest:
        """Make every shard of a dataset of items, but what an interrupted attempt finished."""
        return self._store(dataset, self.num_shards, make, label, metadata)

    def store_rows(self, width: int) -> Manifest:
        """Every item's nearest items by the first hop, weights as shares of its mass, as a scratch dataset."""
        near, bounds = self.first_hop(), self.bounds

        def make(shard: int) -> pa.Table:
            hop = near(shard)
            return neighbour_rows(*bounds(shard), (hop(items, width) for items in blocks(*bounds(shard))), 1 / ONE)

        return self.store(self.scratch("rows"), make, f"{self._lineage.stage}: first hop", {})

    def first_hop(self) -> Callable[[int], Near]:
        """Of a shard: a function of some of its items and T that reads their first hop; ships users' lists first."""
        storage, cache, budget = self._storage, self._cache, self._walks.entry_budget
        if self._replicated:

            def whole(_: int) -> Near:
                graph = BipartiteGraph.open(storage, cache)
                return lambda items, width: exact_neighbours(graph, items, width, budget)

            return whole
        item_users, ranks, degrees = self._item_users, self._ranks(), self._degrees()

        def want(shard: int) -> Wanted:
            return wanted_users(storage, item_users, map_values(storage, degrees, "degree", cache), budget, shard)[0]

        name = self.scratch("users")
        lists = ship(
            self._spark, storage, self._lineage, name, self._user_items, schemas.USER_ITEMS.arrow,
            ["neighbours", "shares"], self.num_shards, want, f"{self._lineage.stage}: users' lists",
        )  # fmt: skip

        def own(shard: int) -> Near:
            known = map_values(storage, degrees, "degree", cache)
            levels = wanted_users(storage, item_users, known, budget, shard)[1]
            graph = shard_graph(storage, item_users, lists, map_values(storage, ranks, "degree", cache), shard)
            return lambda items, width: exact_neighbours(graph, items, width, budget, levels[items - graph.first_item])

        return own

    def composed(self, rows: Manifest, num_rows: int, width: int) -> Callable[[int], Composed]:
        """Of a shard: a function of some of its items, T and their own rows (None: those of `rows`) that adds a hop."""
        storage, cache, restart = self._storage, self._cache, self._walks.restart_probability
        if self._replicated:

            def whole(_: int) -> Composed:
                table = Rows(
                    *map_lists(storage, rows, "neighbours", cache), map_lists(storage, rows, "weights", cache)[1]
                )
                indptr = BipartiteGraph.open(storage, cache).item_indptr
                return lambda items, top, own: compose(
                    table, items, num_rows, width, restart, top, item_indptr=indptr, own=own
                )

            return whole
        ranks = self._ranks()
        lists = ship(
            self._spark, storage, self._lineage, self.scratch("shipped-rows"), rows, schemas.NEIGHBOURS.arrow,
            ["neighbours", "weights"], self.num_shards,
            lambda shard: wanted_rows(storage, rows, shard, num_rows, width), f"{self._lineage.stage}: rows",
        )  # fmt: skip

        def own(shard: int) -> Composed:
            table, known = shard_rows(storage, lists, shard), map_values(storage, ranks, "degree", cache)
            return lambda items, top, own: compose(
                table, items, num_rows, width, restart, top, item_ranks=known, own=own
            )

        return own

    def visited(self) -> Callable[[int, int], Iterator[Found]]:
        """Of a shard and T: the most visited items of all its items, block after block; walkers move first."""
        storage, cache, walks, seed = self._storage, self._cache, self._walks, self._seed
        if self._replicated:
            per_hop = walks_per_hop(walks.num_walks, walks.max_hops, walks.restart_probability)
            bounds = self.bounds

            def whole(shard: int, top: int) -> Iterator[Found]:
                graph = BipartiteGraph.open(storage, cache)
                return (visit_counts(graph, items, per_hop, top, seed) for items in blocks(*bounds(shard)))

            return whole
        walk = Walk(walks.num_walks, walks.max_hops, walks.restart_probability, seed)
        item_users, user_items, ranks = self._item_users, self._user_items, self._ranks()
        counted = move_walkers(
            self._spark, storage, self._lineage, item_users, user_items, walk, self.scratch("walkers")
        )
        num_items, num_shards, per_shard = self.num_items, self.num_shards, counted.cells_per_shard

        def own(shard: int, top: int) -> Iterator[Found]:
            known = map_values(storage, ranks, "degree", cache)
            for cell in range(shard * per_shard, (shard + 1) * per_shard):
                bounds = shard_bounds(num_items, num_shards * per_shard, cell)
                yield top_visits(counted_visits(storage, counted, cell), *bounds, top, known)

        return own

    def clean(self) -> None:
        """Remove the scratch datasets."""
        self._storage.delete(self._folder)

    def _ranks(self) -> Manifest:
        return self._numbers("item-ranks", self._item_users, degree_ranks)

    def _degrees(self) -> Manifest:
        return self._numbers("user-degrees", self._user_items, lambda indptr: np.diff(indptr).astype(np.uint32))

    def _numbers(
        self, name: str, lists: Manifest, number: Callable[[NDArray[np.int64]], NDArray[np.unsignedinteger]]
    ) -> Manifest:
        """One number per row of a graph's direction, from the row pointers, as a scratch dataset."""
        storage = self._storage

        def make(shard: int) -> pa.Table:
            lengths = pc.list_value_length(read_shard(storage, lists, shard, ["neighbours"]).column("neighbours"))
            return pa.table({"degree": number(np.concatenate([[0], np.cumsum(lengths.to_numpy(), dtype=np.int64)]))})

        dataset, label = self.scratch(name), f"{self._lineage.stage}: {name}"
        return self._store(dataset, len(lists.shards), make, label, {})

    def _store(
        self, dataset: Dataset | str, num_shards: int, make: Callable[[int], pa.Table], label: str,
        metadata: Mapping[str, object],
    ) -> Manifest:  # fmt: skip
        done = finished_manifest(self._storage, dataset, self._lineage)
        if done is not None:
            return done
        begin(self._storage, dataset)
        shards = make_shards(self._spark, self._storage, dataset, self._lineage, num_shards, make, label)
        return commit(self._storage, dataset, shards, self._lineage, metadata)


def blocks(start: int, stop: int, size: int = _BLOCK) -> Iterator[NDArray[np.int64]]:
    """The items [start, stop), so many at a time."""
    return (np.arange(low, min(low + size, stop)) for low in range(start, stop, size))


def neighbour_rows(start: int, stop: int, found: Iterable[Found], unit: float | None = None) -> pa.Table:
    """NEIGHBOURS rows of items [start, stop) from their blocks; weights are scores times unit, or L1-normalised."""
    ids, weights, lengths = [np.zeros(0, np.uint32)], [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
    for block_ids, scores, block_lengths in found:
        kept = np.arange(block_ids.shape[1]) < block_lengths[:, None]
        scaled = normalised(scores) if unit is None else (scores * unit).astype(np.float32)
        ids.append(block_ids[kept])
        weights.append(scaled[kept])
        lengths.append(block_lengths)
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return pa.table(
        {
            "id": pa.array(np.arange(start, stop), pa.uint32()),
            "neighbours": lists_to_arrow(indptr, np.concatenate(ids)),
            "weights": lists_to_arrow(indptr, np.concatenate(weights)),
        },
        schema=schemas.NEIGHBOURS.arrow,
    )


def normalised(scores: NDArray[np.int64]) -> NDArray[np.float32]:
    """Scores [B, T] as weights that sum to 1 in every row that has any."""
    totals = scores.sum(axis=1, keepdims=True)
    weights: NDArray[np.float32] = (scores / np.maximum(totals, 1)).astype(np.float32)
    return weights


def _half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"
