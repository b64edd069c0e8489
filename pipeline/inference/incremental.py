"""Tonight's embeddings from last night's: only what the changes reach is made again, to the same bytes as all of it.

Reads, beside what a whole run reads, the kept layers of an earlier run of the same model. An item's first message is
made again if its content changed; its next vector if its list changed, or it, or one of its list, has another message;
and so on. What comes out as it was goes no further. Sums are exact and blocks of one size (`sums.py`, `network.py`), so
a vector does not depend on which others are made beside it. Memory per task: one shard; the changed vectors are mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    arrow_to_lists,
    arrow_to_vectors,
    find_manifest,
    open_manifest,
    read_rows,
)
from pipeline.contracts.errors import PipelineError
from pipeline.contracts.replica import map_rows
from pipeline.contracts.rows import Table, describe_rows, read_own_rows
from pipeline.contracts.sharding import count_shards, shard_bounds
from pipeline.contracts.storage import Storage
from pipeline.inference.comparing import as_bits, rows_with, same_lists, same_shards, same_vectors
from pipeline.inference.halves import as_single
from pipeline.inference.network import Array, Network, filled, in_blocks
from pipeline.inference.publishing import Publisher
from pipeline.inference.reducers import key_of, read_lists
from pipeline.inference.sums import add_rows, exponent_of, largest_of, quantum
from pipeline.inference.vectors import as_stored
from pipeline.spark import Task, run_tasks
from pipeline.steps import Made, Output, Report, run_step

_LAYERS = schemas.LAYERS.name
_CONTENT, _LIST = 1, 2
"""What changed of an item, as bits."""
AGAIN = f"{_LAYERS}/again"


@dataclass(frozen=True)
class Earlier:
    """An earlier run whose layers can be gone on from, and the manifests of what it read and made."""

    storage: Storage
    features: Manifest
    neighbours: Manifest
    embeddings: Manifest

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
        kept = {name: find_manifest(earlier, f"{_LAYERS}/{name}") for name in layer_names(network.num_layers)}
    except PipelineError as error:
        return None, str(error)
    if features is None or neighbours is None or embeddings is None or model is None:
        return None, f"{url} has no embeddings"
    if embeddings.lineage.inputs.get(schemas.MODEL.name) != lineage.inputs.get(schemas.MODEL.name):
        return None, "the model is another"
    wanted = {name: value for name, value in lineage.settings.items() if name != "resources.rows_per_shard"}
    if wanted != {name: value for name, value in embeddings.lineage.settings.items() if name in wanted}:
        return None, "the settings of inference are others"
    for name, manifest in kept.items():
        if manifest is None or manifest.lineage.fingerprint != embeddings.lineage.fingerprint:
            return None, f"{url} did not keep {name}: set resources.inference.keep_layers there"
    for dataset, manifest in ((schemas.FEATURES, features), (schemas.NEIGHBOURS, neighbours)):
        if manifest.content != embeddings.lineage.inputs.get(dataset.name):
            return None, f"the {dataset.name} of {url} are no longer those that it embedded"
    if embeddings.num_rows > open_manifest(storage, schemas.ITEMS).num_rows:
        return None, "items were numbered anew"
    return Earlier(earlier, features, neighbours, embeddings), ""


def layer_names(num_layers: int) -> list[str]:
    """The datasets of a run that a later one goes on from."""
    return [f"projected-{n + 1}" for n in range(num_layers)] + [f"hidden-{n}" for n in range(1, num_layers)]


class TooDifferentError(Exception):
    """The changes moved what every sum is rounded to, so that every item has to be made again."""


class Incremental:
    """The steps of an incremental run, on shards of consecutive items.

    What is made again of a layer is a dataset of two parts: `NAME-ids` [k, 1], ascending, and `NAME-rows` [k, width].
    """

    def __init__(
        self, spark: SparkSession, storage: Storage, settings: Settings, lineage: Lineage, network: Network,
        earlier: Earlier,
    ) -> None:  # fmt: skip
        self._spark, self._storage, self._lineage, self._network = spark, storage, lineage, network
        self._earlier, self._cache = earlier, settings.resources.cache
        self._layer_dtype, self._dtype = settings.task.inference.layer_dtype, settings.task.inference.dtype
        self._features, self._neighbours, self._items = (
            open_manifest(storage, d) for d in (schemas.FEATURES, schemas.NEIGHBOURS, schemas.ITEMS)
        )
        self._num_items = self._items.num_rows
        self._num_shards = count_shards(self._num_items, settings.resources.rows_per_shard)
        self._publisher = Publisher(storage, settings, lineage)
        self.remade: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tasks get all but the session."""
        return {name: value for name, value in vars(self).items() if name != "_spark"}

    def run(self) -> None:
        """Write EMBEDDINGS. Raises TooDifferentError, with nothing published, where a whole run is needed."""
        self._find_changes()
        self._project()
        for layer in range(self._network.num_layers):
            self._combine(layer)

    def _bounds(self, shard: int) -> tuple[int, int]:
        return shard_bounds(self._num_items, self._num_shards, shard)

    def _find_changes(self) -> None:
        """Of every item, whether its content or its list is another than in the earlier run; new items: both."""
        earlier, storage, bounds = self._earlier, self._storage, self._bounds
        features, neighbours = self._features, self._neighbours

        def find(task: Task) -> tuple[Sequence[Made], Report]:
            start, stop = bounds(task["shard"])
            flags = np.full(stop - start, _CONTENT | _LIST, np.uint8)
            known = max(0, min(stop, earlier.num_items) - start)
            flags[:known] = 0
            if known and not same_shards(features, earlier.features, start, start + known):
                now = read_rows(storage, features, start, start + known, ["features"]).column("features")
                then = read_rows(earlier.storage, earlier.features, start, start + known, ["features"])
                same = same_vectors(arrow_to_vectors(now), arrow_to_vectors(then.column("features")))
                flags[:known] |= np.where(same, 0, _CONTENT).astype(np.uint8)
            if known and not same_shards(neighbours, earlier.neighbours, start, start + known):
                lists = (
                    read_rows(where, manifest, start, start + known)
                    for where, manifest in ((storage, neighbours), (earlier.storage, earlier.neighbours))
                )
                flags[:known] |= np.where(same_lists(*lists), 0, _LIST).astype(np.uint8)
            return [flags[:, None]], {"remade": int((flags > 0).sum())}

        output = Output(f"{AGAIN}/changes", raw=True, describe=lambda _: describe_rows("uint8", 1))
        self.remade["changed items"] = sum(report["remade"] for report in self._step("find changes", [output], find))

    def _project(self) -> None:
        """The first layer's messages of items whose content changed."""
        storage, network, bounds, own_of = self._storage, self._network, self._bounds, self._own(0)
        changes, old, largest = open_manifest(storage, f"{AGAIN}/changes"), self._old("projected-1"), self._largest
        dtype, stored = self._layer_dtype, self._stored

        def make(task: Task) -> tuple[Sequence[Made], Report]:
            start, _ = bounds(task["shard"])
            ids = start + np.flatnonzero(read_own_rows(storage, changes, task["shard"])[:, 0] & _CONTENT)
            own = own_of(task["shard"], ids)
            made = in_blocks(lambda part: stored(network.project(0, own(part)), dtype, ids[part]), len(ids))
            return [ids.astype(np.uint32)[:, None], made], {"remade": len(ids), **largest(old, ids, made)}

        self.remade["messages of layer 1"] = self._again("project layer 1 again", ["projected-1"], make)

    def _combine(self, layer: int) -> None:
        """The next vectors of items that the changes reach, and their messages for the layer after, or embeddings."""
        storage, network, bounds, stored = self._storage, self._network, self._bounds, self._stored
        neighbours, cache, is_last = self._neighbours, self._cache, layer + 1 == network.num_layers
        changes, own_of, largest = open_manifest(storage, f"{AGAIN}/changes"), self._own(layer), self._largest
        overlay = self._overlay(f"projected-{layer + 1}")
        unit = quantum(self._old(f"projected-{layer + 1}").metadata["exponent"], self._layer_dtype)
        dtype = self._dtype if is_last else self._layer_dtype
        following_names = () if is_last else (f"hidden-{layer + 1}", f"projected-{layer + 2}")
        old = [self._old(name) for name in following_names]
        moved = open_manifest(storage, f"{AGAIN}/hidden-{layer}-ids") if layer else None
        earlier, publish, num_items = self._earlier, self._publish, self._num_items

        def make(task: Task) -> tuple[Sequence[Made], Report]:
            start, stop = bounds(task["shard"])
            flags = read_own_rows(storage, changes, task["shard"])[:, 0]
            table = overlay()
            lists = read_rows(storage, neighbours, start, stop)
            reached = (flags & (_LIST if layer else _LIST | _CONTENT)) > 0
            if moved is not None:
                own_ids = read_own_rows(storage, moved, task["shard"])[:, 0].astype(np.int64)
                reached[own_ids - start] = True
            indptr, found = arrow_to_lists(lists.column("neighbours"))
            reached |= rows_with(as_bits(table.new_ids, num_items), indptr, found)
            ids = start + np.flatnonzero(reached)
            index, weights = network.lists(layer, *read_lists(lists.take(ids - start)))
            own = own_of(task["shard"], ids)

            def block(part: slice) -> tuple[Array, ...]:
                pooled = filled(table.sums(index[part], weights[part], unit, network.reduction)) * np.float32(unit)
                following = network.combine(layer, own(part), pooled)
                if is_last:
                    return (stored(network.head(following), dtype, ids[part]),)
                kept = stored(following, dtype, ids[part])
                return kept, stored(network.project(layer + 1, as_single(kept)), dtype, ids[part])

            made = in_blocks(block, len(ids))
            if is_last:
                whole = publish(task["shard"], ids, made[0])
                return [whole[0]], {"remade": len(ids), **whole[1]}
            known = ids < earlier.num_items
            is_other = np.ones(len(ids), np.bool_)
            same = [
                same_vectors(array[known], old_rows(earlier, was, ids[known], cache))
                for array, was in zip(made, old, strict=True)
            ]
            is_other[known] = ~np.logical_and.reduce(same)
            kept, rows = ids[is_other], [array[is_other] for array in made]
            numbers = kept.astype(np.uint32)[:, None]
            return [numbers, rows[0], numbers, rows[1]], {"remade": len(ids), **largest(old[1], kept, rows[1])}

        label = f"combine layer {layer + 1} again"
        if not is_last:
            self.remade[f"vectors of layer {layer + 1}"] = self._again(label, following_names, make)
            return
        before, publisher = self.remade, self._publisher

        def describe(reports: list[Report]) -> dict[str, Any]:
            made = sum(report["remade"] for report in reports)
            return {**publisher.describe(reports), "remade": {**before, "embeddings": made}}

        self._step(label, [Output(schemas.EMBEDDINGS, describe=describe)], make)

    # ------------------------------------------------------------------------------------------ parts

    def _publish(self, shard: int, ids: NDArray[np.int64], vectors: Array) -> tuple[pa.Table, Report]:
        """A shard of EMBEDDINGS: the earlier run's, and what was made again."""
        start, stop = self._bounds(shard)
        whole = np.zeros((stop - start, vectors.shape[1]), vectors.dtype)
        rows = self._publisher.former(start, stop)
        if rows is not None:
            whole[: rows.num_rows] = arrow_to_vectors(rows.column("embedding"))
        whole[ids - start] = vectors
        return self._publisher.rows(start, stop, whole, rows)

    def _own(self, layer: int) -> Callable[[int, NDArray[np.int64]], Callable[[slice], Array]]:
        """Of some items of a shard: what they are before a layer, by blocks."""
        storage, network, bounds, features = self._storage, self._network, self._bounds, self._features
        overlay = self._overlay(f"hidden-{layer}") if layer else None

        def of(shard: int, ids: NDArray[np.int64]) -> Callable[[slice], Array]:
            if overlay is not None:
                table = overlay()
                return lambda part: as_single(filled(table.rows(ids[part])))
            start, stop = bounds(shard)
            if not len(ids):
                stop = start + 1
            rows = read_rows(storage, features, start, stop, ["features"]).column("features")
            content = arrow_to_vectors(rows)[ids - start]
            return lambda part: network.standardise(as_single(filled(content[part])), filled(ids[part]))

        return of

    def _stored(self, vectors: Array, dtype: str, ids: NDArray[np.int64]) -> Array:
        storage, items = self._storage, self._items
        return as_stored(vectors, dtype, lambda row: key_of(storage, items, int(ids[row])))

    def _old(self, name: str) -> Manifest:
        return open_manifest(self._earlier.storage, f"{_LAYERS}/{name}")

    def _overlay(self, name: str) -> Callable[[], Overlay]:
        """A layer as it is tonight: to be opened in a task."""
        earlier, old, cache, storage = self._earlier, self._old(name), self._cache, self._storage
        ids, rows = (open_manifest(storage, f"{AGAIN}/{name}-{part}") for part in ("ids", "rows"))
        return lambda: Overlay.open(earlier, old, storage, ids, rows, cache)

    def _largest(self, old: Manifest, ids: NDArray[np.int64], made: Array) -> Report:
        """The largest value of what was made, and which shards of the earlier layer lose their largest by it."""
        ends = np.cumsum([shard.rows for shard in old.shards])
        known = ids[ids < old.num_rows]
        shards = np.searchsorted(ends, known, side="right")
        values = old_rows(self._earlier, old, known, self._cache).max(axis=1, initial=0)
        tops = np.array(old.metadata["largest"])[shards]
        return {"largest": largest_of(made), "tops": np.unique(shards[values >= tops]).tolist()}

    def _again(self, label: str, names: Sequence[str], make: Callable[[Task], tuple[Sequence[Made], Report]]) -> int:
        """A step that makes parts of layers again, the last of messages; returns of how many items."""
        outputs = []
        for name in names:
            told = describe_rows(self._layer_dtype, self._old(name).metadata["width"])
            outputs.append(Output(f"{AGAIN}/{name}-ids", raw=True, describe=lambda _: describe_rows("uint32", 1)))
            outputs.append(Output(f"{AGAIN}/{name}-rows", raw=True, describe=lambda _, told=told: told))  # type: ignore[misc]
        reports = self._step(label, outputs, make)
        self._check_scale(names[-1], reports)
        return sum(report["remade"] for report in reports)

    def _check_scale(self, name: str, reports: list[Report]) -> None:
        """TooDifferentError if the layer's largest value, as it is now, is in another power of two."""
        old, earlier, storage = self._old(name), self._earlier, self._storage
        lost = sorted({shard for report in reports for shard in report["tops"]})
        kept = [float(value) for shard, value in enumerate(old.metadata["largest"]) if shard not in lost]
        made = [float(report["largest"]) for report in reports]
        exponent = exponent_of(max([*kept, *made], default=0.0))
        if exponent < old.metadata["exponent"] and lost:
            ids = open_manifest(storage, f"{AGAIN}/{name}-ids")
            firsts = np.concatenate([[0], np.cumsum([shard.rows for shard in old.shards])])

            def look(task: Task) -> Task:
                rows = read_own_rows(earlier.storage, old, task["shard"])
                own = np.ones(len(rows), np.bool_)
                gone = all_ids(storage, ids).astype(np.int64) - firsts[task["shard"]]
                own[gone[(gone >= 0) & (gone < len(rows))]] = False
                return {"largest": largest_of(rows[own])}

            tasks = [{"shard": shard} for shard in lost]
            found = run_tasks(self._spark, tasks, look, f"inference: largest values of {name}")
            exponent = exponent_of(max([*kept, *made, *(result["largest"] for result in found)]))
        if exponent != old.metadata["exponent"]:
            raise TooDifferentError(name)

    def keep(self) -> None:
        """Write tonight's layers whole, for the next run to go on from."""
        bounds = self._bounds
        for name in layer_names(self._network.num_layers):
            overlay, old, dtype = self._overlay(name), self._old(name), self._layer_dtype
            told = {**describe_rows(dtype, old.metadata["width"]), "exponent": old.metadata["exponent"]}

            def make(task: Task, overlay: Callable[[], Overlay] = overlay) -> tuple[Sequence[Made], Report]:
                rows = overlay().rows(np.arange(*bounds(task["shard"])))
                return [rows], {"largest": largest_of(rows)}

            def describe(reports: list[Report], told: dict[str, Any] = told) -> dict[str, Any]:
                return {**told, "largest": [report["largest"] for report in reports]}

            self._step(f"keep {name}", [Output(f"{_LAYERS}/{name}", raw=True, describe=describe)], make)

    def _step(
        self, label: str, outputs: Sequence[Output], make: Callable[[Task], tuple[Sequence[Made], Report]]
    ) -> list[Report]:
        name, tasks = f"{AGAIN}/step-{label.replace(' ', '-')}", [{"shard": n} for n in range(self._num_shards)]
        return run_step(
            self._spark, self._storage, self._lineage, name, tasks, outputs, make, f"inference: {label}"
        )  # fmt: skip


@dataclass(frozen=True)
class Overlay:
    """A layer of an earlier run, and above it the rows that were made again."""

    old: Table
    new_ids: NDArray[np.integer]
    new: Table

    @classmethod
    def open(
        cls, earlier: Earlier, old: Manifest, storage: Storage, ids: Manifest, rows: Manifest, cache: str | None
    ) -> Overlay:
        """Map both."""
        return cls(map_rows(earlier.storage, old, cache), all_ids(storage, ids), map_rows(storage, rows, cache))

    def _slots(self, ids: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        slots = np.searchsorted(self.new_ids, ids)
        is_new = slots < len(self.new_ids)
        is_new[is_new] = self.new_ids[slots[is_new]] == ids[is_new]
        return np.where(is_new, slots, 0), is_new

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
        if is_new.any():
            shares = np.where(is_new, weights, np.float32(0)).reshape(-1)
            places = self.new.places(slots).reshape(-1)
            add_rows(self.new.rows, indptr, places, shares, unit, out, reduction)
        return out


def all_ids(storage: Storage, ids: Manifest) -> NDArray[np.integer]:
    """The ids of what was made again, ascending."""
    found: NDArray[np.integer] = np.concatenate(
        [read_own_rows(storage, ids, shard)[:, 0] for shard in range(len(ids.shards))]
    )
    return found


def old_rows(earlier: Earlier, old: Manifest, ids: NDArray[np.int64], cache: str | None) -> Array:
    """Rows of an earlier layer."""
    table = map_rows(earlier.storage, old, cache)
    rows: Array = table.rows[table.places(ids)]
    return rows
