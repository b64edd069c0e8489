"""An earlier run whose layers tonight's go on from: what it has to have kept, and its rows under those of tonight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage, Manifest, find_manifest, open_manifest
from pipeline.contracts.errors import PipelineError
from pipeline.contracts.replica import Rows
from pipeline.contracts.rows import Table, is_dense, read_own_rows
from pipeline.contracts.sharding import count_shards, shard_bounds
from pipeline.contracts.storage import Storage
from pipeline.inference.members import as_bits, slots_of
from pipeline.inference.network import Array, Network
from pipeline.inference.sums import add_rows

CONTENT, LISTS, WEIGHTS = "features", "lists", "weights"
"""What inference reads, as raw rows: vectors as stored, neighbours and their weights. A short list has its own item,
which weighs nothing, in the places that are left: it is reached whenever the item itself has changed, and not else."""


@dataclass(frozen=True)
class Earlier:
    """An earlier run whose layers can be gone on from, and the manifests of what it read and made."""

    storage: Storage
    features: Manifest
    neighbours: Manifest
    embeddings: Manifest
    kept: dict[str, Manifest]

    @property
    def num_items(self) -> int:
        return self.embeddings.num_rows


def find_earlier(
    storage: Storage, settings: Settings, lineage: Lineage, network: Network
) -> tuple[Earlier | None, str]:
    """The earlier run that the settings name, if its layers serve; and why not, in words."""
    url = settings.task.data.previous
    if url is None or not network.num_layers:
        return None, ""
    earlier = Storage(url)
    try:
        features, neighbours, embeddings, model = (
            find_manifest(earlier, d) for d in (schemas.FEATURES, schemas.NEIGHBOURS, schemas.EMBEDDINGS, schemas.MODEL)
        )
        found = {
            name: find_manifest(earlier, f"{schemas.LAYERS.name}/{name}") for name in kept_names(network.num_layers)
        }
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
    for name, manifest in found.items():
        if manifest is None or manifest.lineage.fingerprint != embeddings.lineage.fingerprint:
            return None, f"{url} did not keep {name}: set resources.inference.keep_layers there"
        kept[name] = manifest
    for dataset, manifest in ((schemas.FEATURES, features), (schemas.NEIGHBOURS, neighbours)):
        if manifest.content != embeddings.lineage.inputs.get(dataset.name):
            return None, f"the {dataset.name} of {url} are no longer those that it embedded"
    if embeddings.num_rows > open_manifest(storage, schemas.ITEMS).num_rows:
        return None, "items were numbered anew"
    if num_neighbours(open_manifest(storage, schemas.NEIGHBOURS)) != kept[LISTS].metadata["width"]:
        return None, "lists of neighbours are of another length"
    return Earlier(earlier, features, neighbours, embeddings, kept), ""


def kept_names(num_layers: int) -> list[str]:
    """The datasets of a run that a later one goes on from: what its layers read, and the layers."""
    layers = [f"projected-{n + 1}" for n in range(num_layers)] + [f"hidden-{n}" for n in range(1, num_layers)]
    return [CONTENT, LISTS, WEIGHTS, *layers]


def num_neighbours(neighbours: Manifest) -> int:
    """The most neighbours that a list has room for."""
    return int(neighbours.metadata["num_neighbours"])


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
class Overlay:
    """Rows that an earlier run kept, and above them those of tonight."""

    old: Table
    new_ids: NDArray[np.uint32]
    bits: NDArray[np.uint64]
    new: Table

    @classmethod
    def open(
        cls, earlier: Earlier, name: str, storage: Storage, ids: Manifest, rows: Manifest, num_items: int,
        cache: str | None, share: float,
    ) -> Overlay:  # fmt: skip
        """Map both; num_items is of tonight, and share of the earlier rows will be read."""
        kept, new_ids = earlier.kept[name], all_ids(storage, ids)
        old = _map_once(Rows.of(earlier.storage, kept, cache, is_dense(kept, share)))
        return cls(old, new_ids, as_bits(new_ids, num_items), _map_once(Rows.of(storage, rows, cache)))

    def _slots(self, ids: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        slots = slots_of(self.bits, self.new_ids, ids)
        is_new = slots >= 0
        return np.maximum(slots, 0), is_new

    def rows(self, ids: NDArray[np.integer]) -> Array:
        """Rows [n, width] of items."""
        slots, is_new = self._slots(ids)
        result: Array = self.old.rows[self.old.places(np.where(is_new, 0, ids))]
        result[is_new] = self.new.rows[self.new.places(slots[is_new])]
        return result

    def sums(
        self, index: NDArray[np.integer], weights: NDArray[np.float32], unit: float, reduction: str
    ) -> NDArray[np.int32]:
        """Sums over lists [n, T] of items: those of both parts, which integers allow."""
        slots, is_new = self._slots(index)
        indptr = np.arange(len(index) + 1) * index.shape[1]
        out = np.zeros((len(index), self.old.rows.shape[1]), np.int32)
        places = self.old.places(np.where(is_new, 0, index))
        add_rows(
            self.old.rows,
            indptr,
            places.reshape(-1),
            np.where(is_new, np.float32(0), weights).reshape(-1),
            unit,
            out,
            reduction,
        )
        if is_new.any():  # few: only those
            indptr = np.concatenate([[0], np.cumsum(is_new.sum(axis=1))])
            add_rows(self.new.rows, indptr, self.new.places(slots[is_new]), weights[is_new], unit, out, reduction)
        return out


@lru_cache(maxsize=16)
def _map_once(rows: Rows) -> Table:
    """Kept by the process for its next tasks, for which the system need not find the pages anew."""
    return rows.map()


def all_ids(storage: Storage, ids: Manifest) -> NDArray[np.uint32]:
    """The ids of what was made again, ascending."""
    return _all_ids(storage.url, ids.dataset, ids.content)


@lru_cache(maxsize=16)
def _all_ids(url: str, dataset: str, content: str) -> NDArray[np.uint32]:
    """Kept by the process: its next tasks read the same."""
    storage = Storage(url)
    ids = open_manifest(storage, dataset)
    found: NDArray[np.uint32] = np.concatenate(
        [read_own_rows(storage, ids, shard)[:, 0] for shard in range(len(ids.shards))]
    )
    return found
