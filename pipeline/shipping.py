"""Parts of lists to the shards that need them: how tasks get at a graph, or at rows, that no host holds whole.

Every shard of items says which rows of a dataset of lists it needs and how much of each; the tasks that own those rows
send each shard one block (two columnar shuffles, no row of one entry). What a shard then holds is a small graph or
table of its own, on which the kernels work as on the whole. Only two numbers per node are on every host: a user's
degree and the logarithm of an item's, 4 and 1 bytes. Memory per task: the lists that one shard needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline.contracts.datasets import Lineage, Manifest, arrow_to_lists, lists_to_arrow, read_shard
from pipeline.contracts.storage import Storage
from pipeline.exact_kernel import Rows, prefix_lengths
from pipeline.exchange import gather, scatter
from pipeline.spark import run_tasks
from pipeline.walk_kernel import BipartiteGraph

Wanted = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""Rows, ascending, and how many first entries of each."""
_WANTED = pa.schema([("row", pa.uint32()), ("length", pa.uint32()), ("shard", pa.uint32())])
_PIECE_ENTRIES = 1 << 26
"""List entries that one task sends."""


@dataclass(frozen=True)
class Shipped:
    """Lists sent to shards: an exchange whose blocks hold `row`, the list's id, and the columns."""

    manifest: Manifest
    schema: pa.Schema

    def read(self, storage: Storage, shard: int) -> pa.Table:
        """What the shard asked for, rows ascending."""
        return gather(storage, self.manifest, shard, self.schema).sort_by("row").combine_chunks()


def ship(
    spark: SparkContext, storage: Storage, lineage: Lineage, name: str, lists: Manifest, schema: pa.Schema,
    owner: Callable[[NDArray[np.uint32]], NDArray[np.integer]], num_shards: int, want: Callable[[int], Wanted],
    label: str,
) -> Shipped:  # fmt: skip
    """Send every shard what want(shard) asks of the lists: so many first entries of the columns of some rows.

    lists has rows with an ascending `id` in each shard; owner says in which shard given ids are; schema is of the list
    columns to send. The scratch dataset `name` is the caller's to delete.
    """

    def ask(shard: int) -> tuple[pa.Table, NDArray[np.integer]]:
        rows, lengths = want(shard)
        table = pa.table([rows, lengths, np.full(len(rows), shard)], names=_WANTED.names).cast(_WANTED)
        return table, owner(rows)

    wanted = scatter(spark, storage, f"{name}-wanted", lineage, num_shards, ask, len(lists.shards), f"{label}, ask")

    def count(task: dict[str, Any]) -> dict[str, Any]:
        lengths = gather(storage, wanted, task["shard"], _WANTED).column("length").to_numpy()
        return {"entries": int(lengths.sum(dtype=np.int64))}

    tasks = [{"shard": number} for number in range(len(lists.shards))]
    entries = [result["entries"] for result in run_tasks(spark, tasks, count, f"{label}, count")]
    pieces = [
        (number, piece, count)
        for number, total in enumerate(entries)
        for count in [max(1, -(-total // _PIECE_ENTRIES))]
        for piece in range(count)
    ]
    sent = pa.schema([pa.field("row", pa.uint32()), *schema])

    def send(number: int) -> tuple[pa.Table, NDArray[np.integer]]:
        shard, piece, count = pieces[number]
        requests = gather(storage, wanted, shard, _WANTED)
        rows, lengths, targets = (requests[column].to_numpy() for column in _WANTED.names)
        lengths = lengths.astype(np.int64)
        before = np.cumsum(lengths) - lengths
        ours = (before * count // max(int(lengths.sum()), 1)) == piece
        rows, lengths, targets = rows[ours], lengths[ours], targets[ours]
        stored = read_shard(storage, lists, shard, ["id", *schema.names])
        places = np.searchsorted(stored.column("id").to_numpy(), rows)
        parts = [first_entries(stored.column(column), places, lengths) for column in schema.names]
        return pa.table([pa.array(rows), *parts], schema=sent), targets

    shipped = scatter(spark, storage, name, lineage, len(pieces), send, num_shards, f"{label}, send")
    storage.delete(wanted.dataset)
    return Shipped(shipped, sent)


def first_entries(column: pa.ChunkedArray, rows: NDArray[np.integer], lengths: NDArray[np.int64]) -> pa.ListArray:
    """Up to so many first entries of each of these rows of a list column."""
    indptr, values = arrow_to_lists(column)
    starts = indptr[rows]
    lengths = np.minimum(lengths, indptr[np.asarray(rows, np.int64) + 1] - starts)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    places = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], lengths)
    return lists_to_arrow(bounds, values[places])


# ------------------------------------------------------------------------------------------------ what a shard works on


def shard_graph(
    storage: Storage, items: pa.Table, lists: Shipped, ranks: NDArray[np.uint8], shard: int
) -> BipartiteGraph:
    """Some items (item_users rows), all of their users, and as much of these users' lists as was sent."""
    indptr, users = arrow_to_lists(items.column("neighbours"))
    shipped = lists.read(storage, shard)
    known = shipped.column("row").to_numpy()
    user_indptr, user_items = arrow_to_lists(shipped.column("neighbours"))
    # A hub's users that are not read were not asked for: they stand as one more user, without a list.
    places = np.searchsorted(known, users)
    places[np.append(known, 0)[places] != users] = len(known)
    return BipartiteGraph(
        item_indptr=indptr,
        item_users=places.astype(np.uint32),
        item_shares=arrow_to_lists(items.column("shares"))[1],
        user_indptr=np.append(user_indptr, user_indptr[-1]),
        user_items=user_items,
        user_shares=arrow_to_lists(shipped.column("shares"))[1],
        item_ranks=ranks,
        item_ids=items.column("id").to_numpy(),
    )


def wanted_users(items: pa.Table, degrees: NDArray[np.uint32], entry_budget: int) -> tuple[Wanted, NDArray[np.int64]]:
    """The users whose lists some items (item_users rows) read, and how far; and every item's level."""
    indptr, users = arrow_to_lists(items.column("neighbours"))
    distinct, places = np.unique(users, return_inverse=True)
    known = degrees[distinct].astype(np.int64)
    graph = BipartiteGraph(
        item_indptr=indptr,
        item_users=places.astype(np.uint32),
        item_shares=arrow_to_lists(items.column("shares"))[1],
        user_indptr=np.concatenate([[0], np.cumsum(known)]),
        user_items=np.zeros(0, np.uint32),
        user_shares=np.zeros(0, np.uint32),
        item_ranks=np.zeros(0, np.uint8),
    )
    levels, needed = prefix_lengths(graph, np.arange(len(indptr) - 1), entry_budget)
    asked = needed > 0
    return (distinct[asked], needed[asked]), levels


def shard_rows(storage: Storage, lists: Shipped, shard: int) -> Rows:
    """The rows that were sent to a shard of items, found by item."""
    shipped = lists.read(storage, shard)
    indptr, ids = arrow_to_lists(shipped.column("neighbours"))
    weights = arrow_to_lists(shipped.column("weights"))[1]
    return Rows(indptr, ids, weights, shipped.column("row").to_numpy())


def wanted_rows(own: pa.Table, num_rows: int, width: int, shorter_than: int | None) -> Wanted:
    """Which rows, and how much of each, it takes to compose these rows with those of their nearest items."""
    if shorter_than is not None:
        own = own.filter(pc.less(pc.list_value_length(own.column("neighbours")), shorter_than))
    indptr, ids = arrow_to_lists(own.column("neighbours"))
    places = np.arange(len(ids)) - np.repeat(indptr[:-1], np.diff(indptr))
    items = own.column("id").to_numpy()
    wanted = np.union1d(items, ids[places < num_rows])
    return wanted, np.where(np.isin(wanted, items), np.diff(indptr).max(initial=width), width)
