"""Items that share users onto the same shards, so that what is sent to a shard serves many of its items.

Label propagation (Raghavan, Albert, Kumara 2007) between items and users: a node takes the commonest label among its
neighbours, the smallest of several. Each half round is one pass over the lists of one side; every host maps the other
side's labels, 4 bytes per node. Items are then laid out by label and cut into shards of equal size: their homes.
Cost: about 0.2 core-microseconds per edge in all. Only strategy `shuffle` lays items out so: ids stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline.contracts import schemas
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    arrow_to_lists,
    begin,
    commit,
    finished_manifest,
    read_shard,
)
from pipeline.contracts.replica import map_values
from pipeline.contracts.sharding import shard_bounds, shard_of
from pipeline.contracts.storage import Storage
from pipeline.exchange import destination_rows, gather, scatter
from pipeline.spark import make_shards

_READ = 64
"""Neighbours of a node that are asked for their label."""
_LABELLED = pa.schema([("id", pa.uint32()), ("label", pa.uint32())])
_HOMES = pa.schema([("id", pa.uint32()), ("home", pa.uint32())])
_LISTS = schemas.ITEM_USERS.arrow


@dataclass(frozen=True)
class Homes:
    """Where every item is worked on: `lists` are its rows by home, `home` the home of every item by id."""

    lists: Manifest
    home: Manifest
    schema: pa.Schema

    def read(self, storage: Storage, shard: int) -> pa.Table:
        """The rows of a home, by id ascending."""
        return gather(storage, self.lists, shard, self.schema).sort_by("id").combine_chunks()


def lay_out(
    spark: SparkContext, storage: Storage, lineage: Lineage, item_users: Manifest, user_items: Manifest, rounds: int,
    scratch: str, cache: str | None, num_homes: int | None = None, schema: pa.Schema = _LISTS,
) -> Homes:  # fmt: skip
    """Give every item a home, as many as item_users has shards, and send its row there; 0 rounds: homes by id.

    Both may be lists of items by items, of another schema: items that are neighbours then share a home.
    """
    num_items, num_shards = item_users.num_rows, len(item_users.shards)
    num_homes = num_homes or num_shards
    home = finished_manifest(storage, f"{scratch}/home", lineage)
    if home is None:
        labels = _propagated(spark, storage, lineage, item_users, user_items, rounds, scratch, cache)
        home = _placed(spark, storage, lineage, item_users, labels, scratch, num_homes)

    def send(shard: int) -> tuple[pa.Table, NDArray[Any]]:
        homes = read_shard(storage, home, shard).column("home").to_numpy()
        return read_shard(storage, item_users, shard), homes

    label = f"{lineage.stage}: items to homes"
    lists = scatter(spark, storage, f"{scratch}/lists", lineage, num_shards, send, num_homes, label)
    assert lists.num_rows == num_items
    return Homes(lists, home, schema)


def _propagated(
    spark: SparkContext, storage: Storage, lineage: Lineage, item_users: Manifest, user_items: Manifest, rounds: int,
    scratch: str, cache: str | None,
) -> Manifest | None:  # fmt: skip
    """Every item's label after so many rounds, None for its own id; of the rounds only the last two are kept."""
    labels: Manifest | None = None
    for half in range(2 * rounds):
        lists = item_users if half % 2 else user_items
        step = replace(lineage, settings={**lineage.settings, "half round": half})
        name = f"{scratch}/labels-of-{'items' if half % 2 else 'users'}"

        def make(shard: int, lists: Manifest = lists, known: Manifest | None = labels) -> pa.Table:
            table = read_shard(storage, lists, shard, ["id", "neighbours"])
            indptr, ids = arrow_to_lists(table.column("neighbours"))
            there = np.zeros(0, np.uint32) if known is None else map_values(storage, known, "label", cache)
            own = table.column("id").to_numpy()
            return pa.table({"label": _commonest(indptr, ids, np.asarray(there), own)})

        begin(storage, name)
        label = f"{lineage.stage}: labels, half round {half + 1}"
        shards = make_shards(spark, storage, name, step, len(lists.shards), make, label)
        labels = commit(storage, name, shards, step)
    return labels


def _placed(
    spark: SparkContext, storage: Storage, lineage: Lineage, item_users: Manifest, labels: Manifest | None,
    scratch: str, num_homes: int,
) -> Manifest:  # fmt: skip
    """Items in the order of (label, id), cut into equal parts: a dense dataset of every item's part."""
    num_items, num_shards = item_users.num_rows, len(item_users.shards)

    def by_label(shard: int) -> tuple[pa.Table, NDArray[Any]]:
        start, stop = shard_bounds(num_items, num_shards, shard)
        ids = np.arange(start, stop, dtype=np.uint32)
        found = ids if labels is None else read_shard(storage, labels, shard).column("label").to_numpy()
        return pa.table([ids, found], schema=_LABELLED), shard_of(found, num_items, num_shards)

    labelled = scatter(
        spark,
        storage,
        f"{scratch}/by-label",
        lineage,
        num_shards,
        by_label,
        num_shards,
        f"{lineage.stage}: items by label",
    )
    counts = destination_rows(spark, storage, labelled, f"{lineage.stage}: count labels")
    firsts = np.concatenate([[0], np.cumsum(counts)])

    def by_item(shard: int) -> tuple[pa.Table, NDArray[Any]]:
        rows = gather(storage, labelled, shard, _LABELLED).sort_by([("label", "ascending"), ("id", "ascending")])
        ids = rows.column("id").to_numpy()
        homes = shard_of(firsts[shard] + np.arange(len(ids)), num_items, num_homes)
        return pa.table([ids, homes.astype(np.uint32)], schema=_HOMES), shard_of(ids, num_items, num_shards)

    placed = scatter(
        spark,
        storage,
        f"{scratch}/by-item",
        lineage,
        num_shards,
        by_item,
        num_shards,
        f"{lineage.stage}: homes by item",
    )
    name = f"{scratch}/home"
    begin(storage, name)

    def make(shard: int) -> pa.Table:
        return gather(storage, placed, shard, _HOMES).sort_by("id").select(["home"])

    shards = make_shards(spark, storage, name, lineage, num_shards, make, f"{lineage.stage}: homes")
    for done in (labelled, placed):
        storage.delete(done.dataset)
    return commit(storage, name, shards, lineage)


@numba.njit(cache=True, nogil=True)
def _commonest(indptr: Any, ids: Any, labels: Any, own: Any) -> Any:
    """The commonest label among up to _READ evenly spread neighbours of every row; its own id if it has none.

    Without labels a neighbour's label is its id.
    """
    found = np.empty(len(indptr) - 1, np.uint32)
    buffer = np.empty(_READ, np.uint32)
    for row in range(len(indptr) - 1):
        start, degree = indptr[row], indptr[row + 1] - indptr[row]
        count = min(degree, _READ)
        if count == 0:
            found[row] = own[row]
            continue
        for k in range(count):
            neighbour = ids[start + k * degree // count]
            buffer[k] = labels[neighbour] if len(labels) else neighbour
        part = buffer[:count]
        part.sort()
        best, most, length = part[0], 0, 0
        for k in range(count):
            length = length + 1 if k and part[k] == part[k - 1] else 1
            if length > most:
                best, most = part[k], length
        found[row] = best
    return found
