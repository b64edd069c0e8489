"""How items are cut into shards, and how their neighbours' messages reach them.

`gather`: shards of consecutive items, and one layer of messages mapped by every host. What a host's memory does not
hold of it is read from disk, a page for every look-up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    arrow_to_lists,
    open_manifest,
    read_rows,
)
from pipeline.contracts.errors import DataError
from pipeline.contracts.replica import Rows
from pipeline.contracts.rows import Table
from pipeline.contracts.sharding import count_shards, shard_bounds
from pipeline.contracts.storage import Storage
from pipeline.contracts.vectors import read_vectors
from pipeline.inference.members import places_of
from pipeline.inference.network import Array, Lists, Network
from pipeline.inference.publishing import Publisher
from pipeline.inference.sums import add_rows
from pipeline.mixing import read_only
from pipeline.steps import Made, Output, Report

Sums = Callable[[slice], Any]
"""Of a shard: the sums int32 [n, m] of some of its rows, or what the network's sum_held makes of them."""


class Reducer(Protocol):
    """Shards of items, and what they get from their neighbours."""

    num_shards: int

    def ids(self, shard: int) -> NDArray[np.int64]:
        """The ids of a shard's items, ascending."""

    def name_of(self, shard: int, row: int) -> str:
        """The key of one of them, for messages."""

    def features(self, shard: int) -> Array:
        """Their content vectors [n, F], as stored."""

    def sums(self, layer: int, projected: Manifest, unit: float) -> Callable[[int], Sums]:
        """Of a shard: what its items' neighbours say, summed in multiples of unit; may run steps of its own first."""

    def embedded(self) -> Output:
        """What the step that makes the embeddings writes."""

    def made_of(self, shard: int, vectors: Array) -> tuple[Made, Report]:
        """A shard's embeddings as that, and its report."""

    def finish(self) -> None:
        """Make EMBEDDINGS of it, where it is not that yet."""


class Gather:
    """Shards of consecutive items; every host maps the whole layer."""

    def __init__(self, storage: Storage, settings: Settings, lineage: Lineage, network: Network) -> None:
        self._storage, self._network, self._cache = storage, network, settings.resources.cache
        self._publisher = Publisher(storage, settings, lineage)
        self._features, self._neighbours, self._items = (
            open_manifest(storage, d) for d in (schemas.FEATURES, schemas.NEIGHBOURS, schemas.ITEMS)
        )
        self._num_items = self._items.num_rows
        self.num_shards = count_shards(self._num_items, settings.resources.rows_per_shard)

    def _bounds(self, shard: int) -> tuple[int, int]:
        return shard_bounds(self._num_items, self.num_shards, shard)

    def ids(self, shard: int) -> NDArray[np.int64]:
        return np.arange(*self._bounds(shard))

    def name_of(self, shard: int, row: int) -> str:
        return key_of(self._storage, self._items, self._bounds(shard)[0] + row)

    def features(self, shard: int) -> Array:
        return read_vectors(self._storage, self._features, *self._bounds(shard), "features")

    def sums(self, layer: int, projected: Manifest, unit: float) -> Callable[[int], Sums]:
        storage, neighbours, cache, network, bounds = (
            self._storage, self._neighbours, self._cache, self._network, self._bounds
        )  # fmt: skip
        columns, listed = projected.metadata["width"], num_neighbours(neighbours)

        def of(shard: int) -> Sums:
            start, stop = bounds(shard)
            index, weights = network.lists(layer, *read_lists(read_rows(storage, neighbours, start, stop), listed))
            rows = Rows.of(storage, projected, cache)
            held = hold_once(rows, network) if network.reduction == "sum" else None
            if held is not None:
                return lambda part: network.sum_held(held, index[part], weights[part], unit)
            table = _map_once(rows)
            places, length = places_of(table, index, weights), index.shape[1]

            def some(part: slice) -> NDArray[np.int32]:
                own, shares = places[part], weights[part]
                out = np.zeros((len(own), columns), np.int32)
                indptr = np.arange(len(own) + 1) * length
                add_rows(table.rows, indptr, own.reshape(-1), shares.reshape(-1), unit, out, network.reduction)
                return out

            return some

        return of

    def embedded(self) -> Output:
        return Output(schemas.EMBEDDINGS, describe=self._publisher.describe)

    def made_of(self, shard: int, vectors: Array) -> tuple[Made, Report]:
        return self._publisher.rows(*self._bounds(shard), vectors)

    def finish(self) -> None:
        pass


@lru_cache(maxsize=1)
def _map_once(rows: Rows) -> Table:
    """One layer, kept by the process for its next tasks: not two, as a deleted one leaves the disk when nobody maps it.

    The system need not find the pages anew then.
    """
    return rows.map()


KEPT_SECONDS = 20.0
"""A GPU's memory is given back when no task has asked for the layer in it for so long: later stages may want it."""
_held: list[tuple[Rows, Any]] = []
"""One layer, kept by the process where its network's GPU holds it; or that it does not."""
_giving_back: list[threading.Timer] = []


def hold_once(rows: Rows, network: Network) -> Any:
    """What the network's GPU holds of a layer, for this task and the process's next ones; None if nothing."""
    for timer in _giving_back:
        timer.cancel()
    _giving_back.clear()
    kept = next(iter(_held), None)
    if kept is None or kept[0] != rows:
        _held.clear()
        kept = rows, network.hold(_map_once(rows).parts())
        _held.append(kept)
    if kept[1] is not None:

        def give_back() -> None:
            _held.clear()
            network.give_back()

        timer = threading.Timer(KEPT_SECONDS, give_back)
        timer.daemon = True
        timer.start()
        _giving_back.append(timer)
    return kept[1]


def read_lists(table: pa.Table, width: int) -> Lists:
    """Neighbour ids and weights [n, T] of rows of NEIGHBOURS; padding weighs 0. T is width, or what the longest needs.

    A sum of floats along a list may depend on T: width is the same for all rows of all runs. Raises DataError for
    weights that do not sum to at most 1, on which the sums' integers rely.
    """
    indptr, ids = arrow_to_lists(table.column("neighbours"))
    _, weights = arrow_to_lists(table.column("weights"))
    shape = table.num_rows, max(1, width, int(np.diff(indptr).max(initial=0)))
    index, shares = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    row = _spread(read_only(indptr, np.int64), read_only(ids), read_only(weights), index, shares)
    if row >= 0:
        total = float(shares[row].sum(dtype=np.float64))
        raise DataError(
            f"the neighbours of item {table.column('id')[row].as_py()} have weights from {shares[row].min():g}, in all "
            f"{total:g}, expected shares of 1; run `pinsage walks --force`"
        )
    return index, shares


@numba.njit(nogil=True, cache=True)
def _spread(indptr: Any, ids: Any, weights: Any, index: Any, shares: Any) -> Any:
    """Lists to rows; returns the first row whose weights are no shares of 1, or -1."""
    bad = -1
    for row in range(len(indptr) - 1):
        start, total, least = indptr[row], 0.0, np.float32(0)
        for place in range(indptr[row + 1] - start):
            index[row, place] = ids[start + place]
            weight = weights[start + place]
            shares[row, place] = weight
            total += weight
            least = weight if not weight >= least else least
        if bad < 0 and not (total < 1.01 and least >= 0):
            bad = row
    return bad


def num_neighbours(neighbours: Manifest) -> int:
    """The most neighbours that a list has room for."""
    return int(neighbours.metadata["num_neighbours"])


def key_of(storage: Storage, items: Manifest, item: int) -> str:
    """The caller's key of an item."""
    return str(read_rows(storage, items, item, item + 1, ["key"]).column("key")[0])
