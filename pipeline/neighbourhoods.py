"""Every item's nearest items as a dataset: what the stages walks and pairs share.

Two strategies with one result. replicate: every host maps one copy of the graph, and of the rows that are composed.
shuffle: items that share users are laid out together (`clusters`), and every shard of them is sent the parts of users'
lists, or of rows, that it needs (`shipping`); of walks, the walkers move (`walkers`). `choose` takes the first that
fits. The kernels see a graph either way.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline.clusters import Homes, lay_out
from pipeline.contracts import schemas
from pipeline.contracts.config import Resources, Settings, Walks
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    arrow_to_lists,
    begin,
    commit,
    finished_manifest,
    lists_to_arrow,
    open_manifest,
    read_shard,
)
from pipeline.contracts.host import physical_memory
from pipeline.contracts.replica import default_cache, forget, map_lists, map_values, padded
from pipeline.contracts.schemas import Dataset
from pipeline.contracts.sharding import shard_bounds, shard_of
from pipeline.contracts.storage import Storage
from pipeline.differences import Noting
from pipeline.exact_kernel import ONE, Found, Rows, compose, exact_neighbours
from pipeline.exchange import gather, scatter
from pipeline.shipping import Wanted, shard_graph, shard_rows, ship, wanted_rows, wanted_users
from pipeline.spark import make_shards
from pipeline.walk_kernel import BipartiteGraph, degree_ranks, visit_counts, walks_per_hop
from pipeline.walkers import Walk, counted_visits, move_walkers, top_visits

Near = Callable[[NDArray[np.int64], int], Found]
Composed = Callable[[NDArray[np.int64], int, Found | None], Found]
_GRAPH_LISTS = pa.schema([schemas.USER_ITEMS.arrow.field(name) for name in ("neighbours", "shares")])
_ROW_LISTS = pa.schema([schemas.NEIGHBOURS.arrow.field(name) for name in ("neighbours", "weights")])
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
    """What one stage needs of the graph, under one strategy; scratch datasets lie below the folder `scratch`.

    Work is cut into as many shards as ITEM_USERS has: replicated, of consecutive items; shuffled, of items that lie
    close together, and what is made of them is sent on to its place. attempt is the lineage of all that is kept
    meanwhile: a shard of one strategy is none of the other's, and `auto` may choose otherwise on another day.
    """

    def __init__(
        self, spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage, scratch: str, strategy: str
    ) -> None:
        self._spark, self._storage, self._lineage, self._folder = spark, storage, lineage, scratch
        self._cache, self._walks, self._seed = settings.resources.cache, settings.task.walks, settings.task.seed
        self._rounds = settings.resources.walks.cluster_rounds
        self._replicated = strategy == "replicate"
        self.attempt = replace(lineage, settings={**lineage.settings, "strategy": strategy})
        self._item_users = open_manifest(storage, schemas.ITEM_USERS)
        self._user_items = open_manifest(storage, schemas.USER_ITEMS)
        self._laid_out: Homes | None = None
        self.num_items, self.num_shards = self._item_users.num_rows, len(self._item_users.shards)

    def scratch(self, name: str) -> str:
        """The name of a dataset that the stage keeps only while it runs."""
        return f"{self._folder}/{name}"

    def items_of(self) -> Callable[[int], NDArray[np.int64]]:
        """Of a shard of the work: its items, ascending."""
        if self._replicated:
            return self.consecutive()
        storage, homes = self._storage, self._homes()
        return lambda shard: homes.read(storage, shard).column("id").to_numpy().astype(np.int64)

    def consecutive(self) -> Callable[[int], NDArray[np.int64]]:
        """Of a shard of a dataset: its items, under any strategy."""
        return partial(_consecutive, self.num_items, self.num_shards)

    def owner(self) -> Callable[[NDArray[np.integer]], NDArray[np.integer]]:
        """Of items: the shard of the work that each is in."""
        if self._replicated:
            num_items, num_shards = self.num_items, self.num_shards
            return lambda items: shard_of(items, num_items, num_shards)
        storage, home, cache = self._storage, self._homes().home, self._cache
        return lambda items: map_values(storage, home, "home", cache)[items]

    def store(
        self, dataset: Dataset, make: Callable[[int], pa.Table], label: str, metadata: Mapping[str, object],
        in_order: bool = False, noting: Noting | None = None,
    ) -> Manifest:  # fmt: skip
        """Make a dataset of items from the rows that make returns for every shard of the work.

        in_order: the shards are of consecutive items under any strategy. What an interrupted attempt finished is kept.
        """
        if in_order or self._replicated:
            return self._store(dataset, self.num_shards, make, label, metadata, noting)
        done = finished_manifest(self._storage, dataset, self._lineage)
        if done is not None:
            return done
        storage, num_items, num_shards = self._storage, self.num_items, self.num_shards

        def send(shard: int) -> tuple[pa.Table, NDArray[np.integer]]:
            rows = make(shard)
            return rows, shard_of(rows.column("id").to_numpy(), num_items, num_shards)

        name = self.scratch(f"{dataset.name}-by-home")
        sent = scatter(self._spark, storage, name, self.attempt, num_shards, send, num_shards, label)

        def receive(shard: int) -> pa.Table:
            return gather(storage, sent, shard, dataset.arrow).sort_by("id")

        return self._store(dataset, num_shards, receive, f"{label}, in order", metadata, noting)

    def store_rows(self, width: int) -> Manifest:
        """Every item's nearest items by the first hop, weights as shares of its mass, by shards of the work."""
        near, items_of = self.first_hop(), self.items_of()

        def make(shard: int) -> pa.Table:
            hop, items = near(shard), items_of(shard)
            return neighbour_rows(items, (hop(block, width) for block in blocks(items)), 1 / ONE)

        label = f"{self._lineage.stage}: first hop"
        return self._store(self.scratch("rows"), self.num_shards, make, label, {})

    def nearest(self, top: int) -> Callable[[int], Callable[[NDArray[np.int64]], Found]]:
        """Of a shard: a function of some of its items that finds their top neighbours, composed as the settings say."""
        walks = self._walks
        if walks.compose == "none":
            first = self.first_hop()
            return lambda shard: partial(_swapped, first(shard), top)
        if walks.compose == "all":
            adding = self.composed(self.store_rows(top), walks.compose_rows, top)

            def add(shard: int) -> Callable[[NDArray[np.int64]], Found]:
                compose_all = adding(shard)
                return lambda items: compose_all(items, top, None)

            return add
        if self._replicated:
            storage, cache, budget = self._storage, self._cache, walks.entry_budget

            def fill(_: int) -> Callable[[NDArray[np.int64]], Found]:
                graph = BipartiteGraph.open(storage, cache)

                def find(items: NDArray[np.int64]) -> Found:
                    return composed_here(graph, items, exact_neighbours(graph, items, top, budget), walks)

                return find

            return fill
        rows, storage = self.store_rows(top), self._storage
        adding = self.composed(rows, walks.compose_rows, top, top)

        def refill(shard: int) -> Callable[[NDArray[np.int64]], Found]:
            table, compose_own = read_shard(storage, rows, shard), adding(shard)
            known = table.column("id").to_numpy()

            def find(items: NDArray[np.int64]) -> Found:
                found = as_found(table.take(np.searchsorted(known, items)), top)
                short = short_rows(found)
                return replaced(found, short, compose_own(items[short], top, taken(found, short)))

            return find

        return refill

    def first_hop(self) -> Callable[[int], Near]:
        """Of a shard: a function of some of its items and T that reads their first hop; ships users' lists first."""
        storage, cache, budget = self._storage, self._cache, self._walks.entry_budget
        if self._replicated:

            def whole(_: int) -> Near:
                graph = BipartiteGraph.open(storage, cache)
                return lambda items, width: exact_neighbours(graph, items, width, budget)

            return whole
        homes, ranks, degrees = self._homes(), self._ranks(), self._degrees()
        num_users, num_lists = self._user_items.num_rows, len(self._user_items.shards)

        def want(shard: int) -> Wanted:
            return wanted_users(homes.read(storage, shard), map_values(storage, degrees, "degree", cache), budget)[0]

        lists = ship(
            self._spark, storage, self.attempt, self.scratch("users"), self._user_items, _GRAPH_LISTS,
            lambda users: shard_of(users, num_users, num_lists), self.num_shards, want,
            f"{self._lineage.stage}: users' lists",
        )  # fmt: skip

        def own(shard: int) -> Near:
            rows = homes.read(storage, shard)
            levels = wanted_users(rows, map_values(storage, degrees, "degree", cache), budget)[1]
            graph = shard_graph(storage, rows, lists, map_values(storage, ranks, "degree", cache), shard)
            ids = rows.column("id").to_numpy()

            def near(items: NDArray[np.int64], width: int) -> Found:
                places = np.searchsorted(ids, items)
                return exact_neighbours(graph, places, width, budget, levels[places])

            return near

        return own

    def composed(
        self, rows: Manifest, num_rows: int, width: int, shorter_than: int | None = None
    ) -> Callable[[int], Composed]:
        """Of a shard: a function of some of its items, T and their own rows (None: those of `rows`) that adds a hop.

        shorter_than: only items whose rows are will be asked for.
        """
        storage, cache, restart = self._storage, self._cache, self._walks.restart_probability
        if self._replicated:

            def whole(_: int) -> Composed:
                lists, weights = (map_lists(storage, rows, column, cache) for column in ("neighbours", "weights"))
                table, indptr = Rows(*lists, weights[1]), BipartiteGraph.open(storage, cache).item_indptr
                return lambda items, top, own: compose(
                    table, items, num_rows, width, restart, top, item_indptr=indptr, own=own
                )

            return whole
        ranks = self._ranks()
        lists = ship(
            self._spark, storage, self.attempt, self.scratch("shipped-rows"), rows, _ROW_LISTS, self.owner(),
            self.num_shards, lambda shard: wanted_rows(read_shard(storage, rows, shard), num_rows, width, shorter_than),
            f"{self._lineage.stage}: rows",
        )  # fmt: skip

        def own(shard: int) -> Composed:
            table, known = shard_rows(storage, lists, shard), map_values(storage, ranks, "degree", cache)
            return lambda items, top, own: compose(
                table, items, num_rows, width, restart, top, item_ranks=known, own=own
            )

        return own

    def visited(self) -> Callable[[int, int], Iterator[Found]]:
        """Of consecutive items and T: the most visited items of them all, block after block; walkers move first."""
        storage, cache, walks, seed = self._storage, self._cache, self._walks, self._seed
        num_items, num_shards = self.num_items, self.num_shards
        if self._replicated:
            per_hop = walks_per_hop(walks.num_walks, walks.max_hops, walks.restart_probability)

            def whole(shard: int, top: int) -> Iterator[Found]:
                graph = BipartiteGraph.open(storage, cache)
                items = _consecutive(num_items, num_shards, shard)
                return (visit_counts(graph, block, per_hop, top, seed) for block in blocks(items))

            return whole
        walk, ranks = Walk(walks.num_walks, walks.max_hops, walks.restart_probability, seed), self._ranks()
        counted = move_walkers(
            self._spark, storage, self.attempt, self._item_users, self._user_items, walk, self.scratch("walkers")
        )
        per_shard = counted.cells_per_shard

        def own(shard: int, top: int) -> Iterator[Found]:
            known = map_values(storage, ranks, "degree", cache)
            for cell in range(shard * per_shard, (shard + 1) * per_shard):
                bounds = shard_bounds(num_items, num_shards * per_shard, cell)
                yield top_visits(counted_visits(storage, counted, cell), *bounds, top, known)

        return own

    def clean(self) -> None:
        """Remove the scratch datasets, and this host's copies of them."""
        forget(self._storage, self._folder, self._cache)
        self._storage.delete(self._folder)

    def _homes(self) -> Homes:
        if self._laid_out is None:
            self._laid_out = lay_out(
                self._spark, self._storage, self.attempt, self._item_users, self._user_items, self._rounds,
                self.scratch("homes"), self._cache,
            )  # fmt: skip
        return self._laid_out

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

        return self._store(self.scratch(name), len(lists.shards), make, f"{self._lineage.stage}: {name}", {})

    def _store(
        self, dataset: Dataset | str, num_shards: int, make: Callable[[int], pa.Table], label: str,
        metadata: Mapping[str, object], noting: Noting | None = None,
    ) -> Manifest:  # fmt: skip
        lineage = self.attempt if isinstance(dataset, str) else self._lineage
        done = finished_manifest(self._storage, dataset, lineage)
        if done is not None:
            return done
        if noting is not None:
            return noting.store(self._spark, num_shards, make, label, metadata)
        begin(self._storage, dataset)
        shards = make_shards(self._spark, self._storage, dataset, self.attempt, num_shards, make, label)
        return commit(self._storage, dataset, shards, lineage, metadata)


def blocks(items: NDArray[np.int64], size: int = _BLOCK) -> Iterator[NDArray[np.int64]]:
    """The items, so many at a time."""
    return (items[low : low + size] for low in range(0, len(items), size))


def _consecutive(num_items: int, num_shards: int, shard: int) -> NDArray[np.int64]:
    return np.arange(*shard_bounds(num_items, num_shards, shard))


def short_rows(found: Found) -> NDArray[np.int64]:
    """The places of rows that have some neighbours, but fewer than there is room for."""
    return np.flatnonzero((found[2] > 0) & (found[2] < found[0].shape[1]))


def composed_here(graph: BipartiteGraph, items: NDArray[np.int64], found: Found, walks: Walks) -> Found:
    """First hops of items, found on the whole graph, with a second hop where walks.compose wants one."""
    top, budget = found[0].shape[1], walks.entry_budget
    if walks.compose == "none":
        return found
    found = rounded(found)
    places = short_rows(found) if walks.compose == "short" else np.arange(len(found[2]))
    own = taken(found, places)
    others = np.unique(own[0][:, : walks.compose_rows]).astype(np.int64)
    rows = as_rows(others, exact_neighbours(graph, others, top, budget))
    ranks = graph.item_ranks if len(graph.item_ranks) else None
    added = compose(
        rows, items[places], walks.compose_rows, top, walks.restart_probability, top, item_ranks=ranks,
        item_indptr=graph.item_indptr, own=own,
    )  # fmt: skip
    return replaced(found, places, added)


def taken(found: Found, places: NDArray[np.int64]) -> Found:
    """The rows at some places."""
    return found[0][places], found[1][places], found[2][places]


def replaced(found: Found, places: NDArray[np.int64], others: Found) -> Found:
    """The rows with others at some places."""
    found[0][places], found[1][places], found[2][places] = others
    return found


def rounded(found: Found) -> Found:
    """Scores as rows keep them, as float32 shares of an item's mass: both strategies then compose the same numbers."""
    shares = (found[1] * (1 / ONE)).astype(np.float32)
    return found[0], np.round(shares.astype(np.float64) * ONE).astype(np.int64), found[2]


def as_rows(items: NDArray[np.int64], found: Found) -> Rows:
    """Found rows as a table for compose, weights as shares of an item's mass."""
    ids, scores, lengths = found
    kept = np.arange(ids.shape[1]) < lengths[:, None]
    weights = (scores[kept] * (1 / ONE)).astype(np.float32)
    return Rows(np.concatenate([[0], np.cumsum(lengths)]), ids[kept], weights, items.astype(np.uint32))


def as_found(rows: pa.Table, width: int) -> Found:
    """Stored rows, whose weights are shares of an item's mass, as they were found."""
    indptr, ids = arrow_to_lists(rows.column("neighbours"))
    scores = np.round(arrow_to_lists(rows.column("weights"))[1].astype(np.float64) * ONE).astype(np.int64)
    every = np.arange(rows.num_rows)
    found_ids, found_scores = (
        padded(indptr, ids, every, width, np.uint32),
        padded(indptr, scores, every, width, np.int64),
    )
    return found_ids, found_scores, np.diff(indptr)


def _swapped(near: Near, width: int, items: NDArray[np.int64]) -> Found:
    return near(items, width)


def neighbour_rows(items: NDArray[np.int64], found: Iterable[Found], unit: float | None = None) -> pa.Table:
    """NEIGHBOURS rows of the items from their blocks; weights are scores times unit, or else L1-normalised."""
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
            "id": pa.array(items, pa.uint32()),
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
    return physical_memory() // 2


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"
