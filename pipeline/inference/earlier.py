"""An earlier run whose layers tonight's go on from: what it has to have kept, and its rows under those of tonight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage, Manifest, find_manifest, open_manifest
from pipeline.contracts.errors import PipelineError
from pipeline.contracts.replica import Rows
from pipeline.contracts.rows import Table, is_dense, is_streamed, read_own_rows, take_rows
from pipeline.contracts.sharding import count_shards, shard_bounds
from pipeline.contracts.storage import Storage
from pipeline.inference.members import Members, places_of
from pipeline.inference.network import Array, Network
from pipeline.inference.reducers import num_neighbours
from pipeline.inference.sums import add_rows

CONTENT, LISTS, WEIGHTS, SUMS = "features", "lists", "weights", "sums"
"""What inference reads, as raw rows: vectors as stored, neighbours and their weights. A short list has its own item,
which weighs nothing, in the places that are left: it is reached whenever the item itself has changed, and not else.
And the last layer's sums over neighbours, packed: most items that are reached have few neighbours that were made again,
and 2 or 3 rows are read in place of 50."""
PATCHED = "patched"
"""In a base's metadata: whether a patch belongs to it."""


@dataclass(frozen=True)
class Kept:
    """Rows that a run kept: of a base, and above them those of a patch, if it has one: its items' ids, and their rows.

    The base may have been made nights before, and have fewer items: new ones are in the patch.
    """

    base: Manifest
    ids: Manifest | None = None
    rows: Manifest | None = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What is said of the base: type and width; of a layer its exponent, and every shard's largest value."""
        return self.base.metadata


@dataclass(frozen=True)
class Earlier:
    """An earlier run whose layers can be gone on from, and the manifests of what it read and made."""

    storage: Storage
    features: Manifest
    neighbours: Manifest
    embeddings: Manifest
    kept: dict[str, Kept]

    def told(self) -> dict[str, Any]:
        """Which run it is, and what it has: changes are changes of that."""
        parts = [self.features, self.neighbours, self.embeddings]
        for kept in self.kept.values():
            parts += [part for part in (kept.base, kept.ids, kept.rows) if part is not None]
        return {"earlier": self.storage.url, "contents": [part.content for part in parts]}


def find_earlier(
    storage: Storage, settings: Settings, lineage: Lineage, network: Network
) -> tuple[Earlier | None, str]:
    """The earlier run that the settings name, if its layers serve; and why not, in words."""
    url, layers = settings.task.data.previous, network.num_layers
    if url is None or not layers:
        return None, ""
    earlier = Storage(url)
    try:
        features, neighbours, embeddings, model = (
            find_manifest(earlier, d) for d in (schemas.FEATURES, schemas.NEIGHBOURS, schemas.EMBEDDINGS, schemas.MODEL)
        )
        found = {name: [find_manifest(earlier, dataset) for dataset in parts_of(name)] for name in kept_names(network)}
    except PipelineError as error:
        return None, str(error)
    if features is None or neighbours is None or embeddings is None or model is None:
        return None, f"{url} has no embeddings"
    if embeddings.lineage.inputs.get(schemas.MODEL.name) != lineage.inputs.get(schemas.MODEL.name):
        return None, "the model is another"
    wanted = {name: value for name, value in lineage.settings.items() if name != "resources.rows_per_shard"}
    if wanted != {name: value for name, value in embeddings.lineage.settings.items() if name in wanted}:
        return None, "the settings of inference are others"
    kept = {}
    for name, (base, *patch) in found.items():
        parts = [base, *patch] if base is not None and base.metadata.get(PATCHED) else [base]
        if base is None or any(p is None or p.lineage.fingerprint != embeddings.lineage.fingerprint for p in parts):
            return None, f"{url} did not keep {name}: set resources.inference.keep_layers there"
        kept[name] = Kept(base, *parts[1:])
    for dataset, manifest in ((schemas.FEATURES, features), (schemas.NEIGHBOURS, neighbours)):
        if manifest.content != embeddings.lineage.inputs.get(dataset.name):
            return None, f"the {dataset.name} of {url} are no longer those that it embedded"
    if embeddings.num_rows > open_manifest(storage, schemas.ITEMS).num_rows:
        return None, "items were numbered anew"
    if num_neighbours(open_manifest(storage, schemas.NEIGHBOURS)) != kept[LISTS].metadata["width"]:
        return None, "lists of neighbours are of another length"
    return Earlier(earlier, features, neighbours, embeddings, kept), ""


def kept_names(network: Network) -> list[str]:
    """The datasets of a run that a later one goes on from: what its layers read, the layers, the last one's sums."""
    count = network.num_layers
    layers = [f"projected-{n + 1}" for n in range(count)] + [f"hidden-{n}" for n in range(1, count)]
    return [CONTENT, LISTS, WEIGHTS, *layers, *([SUMS] if keeps_sums(network) else [])]


def keeps_sums(network: Network) -> bool:
    """Whether sums are of use to a later run: from the largest of many values nothing can be taken off."""
    return network.reduction == "sum"


def parts_of(name: str) -> tuple[str, str, str]:
    """The datasets of what is kept under a name: the base, and ids and rows of its patch."""
    base = f"{schemas.LAYERS.name}/{name}"
    return base, f"{base}-ids", f"{base}-rows"


def as_kept(
    index: NDArray[np.integer], weights: NDArray[np.float32], ids: NDArray[np.integer], width: int
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Lists [n, T] of items as LISTS and WEIGHTS have them, [n, width] each."""
    lists = np.repeat(ids.astype(np.uint32)[:, None], width, axis=1)
    shares = np.zeros((len(ids), width), np.float32)
    shares[:, : weights.shape[1]] = weights
    given = weights > 0
    lists[:, : index.shape[1]][given] = index[given]
    return lists, shares


def continued_bounds(former: Sequence[int], num_items: int, rows_per_shard: int) -> list[int]:
    """Where shards begin, and the last one's end: as in the earlier run, whose shards have so many rows.

    Its shards are kept as far as they are of a fair size, so that they are the same on nights that bring new items;
    what follows is cut evenly.
    """
    bounds = [0]
    for rows in former:
        if not rows_per_shard <= 2 * rows <= 2 * rows_per_shard:
            break
        bounds.append(bounds[-1] + rows)
    first, rest = bounds[-1], num_items - bounds[-1]
    count = count_shards(rest, rows_per_shard)
    more = [first + shard_bounds(rest, count, shard)[1] for shard in range(count)] if rest or len(bounds) == 1 else []
    return [*bounds, *more]


@dataclass(frozen=True)
class Patch:
    """Rows of some items: their ids, ascending, also as a set, and the rows in that order."""

    ids: NDArray[np.uint32]
    members: Members
    table: Table

    @classmethod
    def open(cls, storage: Storage, ids: Manifest, rows: Manifest, num_items: int, cache: str | None) -> Patch:
        """Map it; num_items is of tonight."""
        members = _members(storage.url, ids.dataset, ids.content, num_items)
        return cls(all_ids(storage, ids), members, _map_once(Rows.of(storage, rows, cache)))

    def find(
        self, ids: NDArray[np.integer], weights: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of some ids [n], of those that weigh something, it has which: their places [k], and those in its rows [k]."""
        found, slots = self.members.find(ids, weights)
        return found, places_of(self.table, slots)


@dataclass(frozen=True)
class Overlay:
    """Rows of a base and of patches above it, the newest first; where the base is, if many of its rows are read."""

    old: Table
    patches: tuple[Patch, ...]
    source: tuple[Storage, Manifest] | None = None

    @classmethod
    def open(
        cls, earlier: Earlier, name: str, num_items: int, cache: str | None, share: float,
        newer: tuple[Storage, Manifest, Manifest] | None = None,
    ) -> Overlay:  # fmt: skip
        """What was kept under a name; above it newer rows: where they are, ids and rows.

        num_items is of tonight; share of the earlier rows will be read.
        """
        kept = earlier.kept[name]
        old = _map_once(Rows.of(earlier.storage, kept.base, cache, is_dense(kept.base, share), stays=True))
        patches = [] if newer is None else [Patch.open(*newer, num_items, cache)]
        if kept.ids is not None and kept.rows is not None:
            patches.append(Patch.open(earlier.storage, kept.ids, kept.rows, num_items, cache))
        source = (earlier.storage, kept.base) if is_streamed(kept.base, share) else None
        return cls(old, tuple(patches), source)

    def rows(self, ids: NDArray[np.integer]) -> Array:
        """Rows [n, width] of items."""
        found = [patch.find(ids) for patch in self.patches]
        in_base = np.ones(len(ids), np.float32)
        for own, _ in found:
            in_base[own] = 0
        return self._renew(self.old.rows[places_of(self.old, ids, in_base)], found)

    def rows_of(self, ids: NDArray[np.integer]) -> Callable[[slice], Array]:
        """Of items, ascending and near each other, the rows of every part.

        If many are read and memory has most of them not, they are taken off the disk, file after file, at once.
        """
        base = None if self.source is None else take_rows(*self.source, ids[ids < self.old.num_rows])
        if base is None:
            return lambda part: self.rows(ids[part])
        whole = np.zeros((len(ids), base.shape[1]), base.dtype)
        whole[: len(base)] = base
        self._renew(whole, [patch.find(ids) for patch in self.patches])
        return lambda part: whole[part]

    def _renew(self, rows: Array, found: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Array:
        """The rows, with those that patches have put in their place: of each patch which, and where they are in it."""
        for patch, (own, places) in reversed([*zip(self.patches, found, strict=True)]):
            rows[own] = patch.table.rows[places]
        return rows

    def lists_with(self, members: Members, start: int, stop: int) -> NDArray[np.bool_]:
        """Of LISTS as they were last night: which of items [start, stop) have one of a set in theirs."""
        result = np.zeros(stop - start, np.bool_)
        known = max(0, min(stop, self.old.num_rows) - start)
        result[:known] = members.rows_with(self.old.rows, places_of(self.old, np.arange(start, start + known)))
        for patch in self.patches[1:]:
            low, high = np.searchsorted(patch.ids, [start, stop])
            places = places_of(patch.table, np.arange(low, high))
            result[patch.ids[low:high].astype(np.int64) - start] = members.rows_with(patch.table.rows, places)
        return result

    def sums(self, index: Array, weights: Array, unit: float, reduction: str) -> NDArray[np.int32]:
        """Sums [n, m] over lists [n, T] of items."""
        indptr = np.arange(len(index) + 1) * index.shape[1]
        return self._sums(indptr, index.reshape(-1), weights.reshape(-1), unit, reduction)

    def renewed(
        self, former: Callable[[NDArray[np.integer]], NDArray[np.int32]], stays: NDArray[np.bool_], index: Array,
        weights: Array, unit: float,
    ) -> NDArray[np.int32]:  # fmt: skip
        """The same, weighted, made of those that were before the newest patch, which former gives of some lists [k].

        So where a list stays, and less than half of it was made again: that is taken off, and added as it is now.
        """
        (size, width), newest = index.shape, self.patches[0]
        own, places = newest.find(index.reshape(-1), weights.reshape(-1))
        lists = own // width
        counts = np.bincount(lists, minlength=size)
        stays = stays & (2 * counts < width)
        is_own, kept = stays[lists], np.flatnonzero(stays)
        own, places, indptr = own[is_own], places[is_own], np.concatenate([[0], np.cumsum(counts[kept])])
        ids, shares = index.reshape(-1)[own], weights.reshape(-1)[own]
        sums = former(kept)
        sums -= Overlay(self.old, self.patches[1:])._sums(indptr, ids, shares, unit, "sum")
        add_rows(newest.table.rows, indptr, places, shares, unit, sums)
        if len(kept) == size:
            return sums
        result = np.empty((size, sums.shape[1]), np.int32)
        result[kept], result[~stays] = sums, self.sums(index[~stays], weights[~stays], unit, "sum")
        return result

    def _sums(
        self, indptr: NDArray[np.integer], ids: NDArray[np.integer], weights: NDArray[np.float32], unit: float,
        reduction: str,
    ) -> NDArray[np.int32]:  # fmt: skip
        """Over lists [indptr[i]:indptr[i + 1]]: the sums of all parts, which integers allow."""
        out, left = np.zeros((len(indptr) - 1, self.old.rows.shape[1]), np.int32), weights
        for patch in self.patches:
            own, places = patch.find(ids, left)
            if len(own):
                add_rows(patch.table.rows, np.searchsorted(own, indptr), places, left[own], unit, out, reduction)
                left = left.copy()
                left[own] = 0
        add_rows(self.old.rows, indptr, places_of(self.old, ids, left), left, unit, out, reduction)
        return out


@lru_cache(maxsize=16)
def _map_once(rows: Rows) -> Table:
    """Kept by the process for its next tasks, for which the system need not find the pages anew."""
    return rows.map()


def all_ids(storage: Storage, ids: Manifest) -> NDArray[np.uint32]:
    """The ids of what was made again, ascending."""
    return _all_ids(storage.url, ids.dataset, ids.content)


@lru_cache(maxsize=16)
def _members(url: str, dataset: str, content: str, num_items: int) -> Members:
    return Members.of(_all_ids(url, dataset, content), num_items)


@lru_cache(maxsize=16)
def _all_ids(url: str, dataset: str, content: str) -> NDArray[np.uint32]:
    """Kept by the process: its next tasks read the same."""
    storage = Storage(url)
    ids = open_manifest(storage, dataset)
    found: NDArray[np.uint32] = np.concatenate(
        [read_own_rows(storage, ids, shard)[:, 0] for shard in range(len(ids.shards))]
    )
    return found
