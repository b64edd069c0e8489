"""Tonight's embeddings from last night's: only what the changes reach is made again, to the same bytes as all of it.

Reads ITEMS, what differs between the nights (`differences`), the earlier embeddings, and what the earlier run kept: its
layers, content and lists, as raw rows that are mapped, so that of what did not change no more is read than the ids of
its neighbours. An item's first message is made again if its content changed; its next vector if its list changed, or
it, or one of its list, has a message made again; and so on. Sums are exact and blocks of one size (`sums.py`,
`network.py`), so a vector does not depend on which others are made beside it. Memory per task: one shard's embeddings,
or its rows of what was kept, what is read and made again of its items, 2 to 7 KB of each; and of the process the ids
that were made again of each layer, with 1.5 bits an item of the catalogue for each: a few sets, kept for its next task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage, Manifest, arrow_to_vectors, begin, commit, find_manifest, open_manifest
from pipeline.contracts.rows import describe_rows, read_own_rows, settle
from pipeline.contracts.storage import Storage
from pipeline.differences import find_changed
from pipeline.inference.earlier import (
    CONTENT,
    LISTS,
    PATCHED,
    SUMS,
    WEIGHTS,
    Earlier,
    Overlay,
    all_ids,
    as_kept,
    continued_bounds,
    keeps_sums,
    kept_names,
    parts_of,
)
from pipeline.inference.halves import as_single
from pipeline.inference.network import Array, Network, filled, in_blocks
from pipeline.inference.publishing import Publisher
from pipeline.inference.reducers import key_of, read_lists
from pipeline.inference.sums import exponent_of, largest_of, packed, pooled, quantum, top_of, unpacked
from pipeline.inference.vectors import as_stored
from pipeline.inference.ways import AGAIN
from pipeline.spark import Task, run_tasks
from pipeline.steps import Made, Output, Report, run_step

_LAYERS = schemas.LAYERS.name
_MOST = 4
"""One in so many items changed: from there on nearly all are reached, and a whole run costs less."""
_TASK_SHARDS, _TASK_ROWS, _TASK_CHANGED, _CORE_TASKS = 8, 400_000, 4000, 4
"""So many shards are one task, as little is made of each, where they are of so many items and of about so many that
changed, and each core still has so many tasks: a task costs Spark and Python 30 ms, and blocks are filled."""
_FILES = 64
"""So many files of a base are one task: on a local disk they only get a second name."""
_SAME_IDS = {CONTENT: "projected-1", WEIGHTS: LISTS}
"""What is made again of the same items as something else, and does not list them again."""

Changed = Callable[[int, int], pa.Table]


class TooDifferentError(Exception):
    """Every item has to be made again; why, in words."""


def find_changes(storage: Storage, earlier: Earlier) -> tuple[Changed, Changed] | None:
    """Of rows [start, stop), those of FEATURES and of NEIGHBOURS that differ; None if nobody noted what there was."""
    content, lists = (
        find_changed(storage, open_manifest(storage, dataset), earlier.storage, then, dataset)
        for dataset, then in ((schemas.FEATURES, earlier.features), (schemas.NEIGHBOURS, earlier.neighbours))
    )
    return None if content is None or lists is None else (content, lists)


def shards_together(num_shards: int, rows_per_shard: int, cores: int, changed: int = 0) -> int:
    """How many shards one task takes, of a catalogue of which so many items changed."""
    by_changes = _TASK_CHANGED * num_shards // max(1, changed)
    by_rows, by_cores = _TASK_ROWS // rows_per_shard, num_shards // (_CORE_TASKS * cores)
    return max(1, min(_TASK_SHARDS, by_changes, by_rows, by_cores))


class Incremental:
    """The steps of an incremental run, on shards of consecutive items: the earlier run's, and of what is new.

    What is made again of a layer is a dataset of two parts: `NAME-ids` [k, 1], ascending, and `NAME-rows` [k, width].
    """

    def __init__(
        self, spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage, network: Network,
        earlier: Earlier, changed: tuple[Changed, Changed],
    ) -> None:  # fmt: skip
        self._spark, self._storage, self._lineage, self._network = spark, storage, lineage, network
        self._earlier, self._changed, self._cache = earlier, changed, settings.resources.cache
        self._layer_dtype, self._dtype = settings.task.inference.layer_dtype, settings.task.inference.dtype
        self._keeps = settings.resources.inference.keep_layers
        self._items = open_manifest(storage, schemas.ITEMS)
        self._num_items = self._items.num_rows
        former = [shard.rows for shard in earlier.embeddings.shards]
        self._cuts = continued_bounds(former, self._num_items, settings.resources.rows_per_shard)
        self._sizes = len(self._cuts) - 1, settings.resources.rows_per_shard, spark.defaultParallelism
        self._together = shards_together(*self._sizes)
        self._publisher = Publisher(storage, settings, lineage)
        self.remade: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tasks get all but the session."""
        return {name: value for name, value in vars(self).items() if name != "_spark"}

    def run(self) -> None:
        """Write EMBEDDINGS, and before that, if asked to, what the next run goes on from.

        Raises TooDifferentError, with nothing published, where a whole run is needed.
        """
        self._find_changes()
        for layer in range(self._network.num_layers):
            self._combine(layer)

    def _find_changes(self) -> None:
        """Content and lists that are others than in the earlier run, and the first layer's messages of such content."""
        network, stored = self._network, self._stored
        dtype, (content_of, lists_of) = self._layer_dtype, self._changed
        width, inputs = self._width(LISTS), self._earlier.kept[CONTENT].metadata

        def make(task: Task) -> tuple[Sequence[Made], Report]:
            content, lists = content_of(task["start"], task["stop"]), lists_of(task["start"], task["stop"])
            ids, listed = (table.column("id").to_numpy().astype(np.int64) for table in (content, lists))
            rows = arrow_to_vectors(content.column("features")).astype(inputs["dtype"], copy=False)

            def message(part: slice) -> Array:
                own = network.standardise(
                    as_single(filled(rows[part], network.block)), filled(ids[part], network.block)
                )
                return stored(network.project(0, own), dtype, ids[part])

            made = in_blocks(message, len(ids), network.block)
            index, weights = as_kept(*read_lists(lists, width), listed, width)
            numbers, lists_numbers = (found.astype(np.uint32)[:, None] for found in (ids, listed))
            report = {"changed": len(np.union1d(ids, listed)), "remade": len(ids), "largest": largest_of(made)}
            return [lists_numbers, index, weights, rows, numbers, made], report

        told = {name: self._told(name) for name in (LISTS, WEIGHTS, CONTENT, "projected-1")}
        outputs = [self._ids(LISTS), *(self._rows(name, told[name]) for name in (LISTS, WEIGHTS, CONTENT))]
        outputs += [self._ids("projected-1"), self._rows("projected-1", told["projected-1"])]
        reports = self._step("find changes", outputs, make)
        self.remade["changed items"] = sum(report["changed"] for report in reports)
        changed = self.remade["changed items"]
        if _MOST * changed > self._num_items:
            raise TooDifferentError(f"{changed:,} of {self._num_items:,} changed")
        self._together = shards_together(*self._sizes, changed)
        self._check_scale("projected-1", reports)
        self.remade["messages of layer 1"] = sum(report["remade"] for report in reports)

    def _combine(self, layer: int) -> None:
        """The next vectors of items that the changes reach, and their messages for the layer after, or embeddings."""
        network, stored, cuts = self._network, self._stored, self._cuts
        earlier, is_last = self._earlier, layer + 1 == self._network.num_layers
        own_of, changed_of = self._own(layer), self._made_again
        messages, lists_of, weights_of = map(self._overlay, (f"projected-{layer + 1}", LISTS, WEIGHTS))
        sums_of = self._sums(layer)
        unit = quantum(earlier.kept[f"projected-{layer + 1}"].metadata["exponent"], self._layer_dtype)
        layer_dtype = self._layer_dtype
        dtype = self._dtype if is_last else layer_dtype
        following_names = [] if is_last else [f"hidden-{layer + 1}", f"projected-{layer + 2}"]
        moved = f"hidden-{layer}" if layer else "projected-1"
        publish, keeps_last = self._publisher.renewed, is_last and self._keeps and keeps_sums(network)

        def make(task: Task) -> tuple[Sequence[Made | Iterator[Made]], Report]:
            start, stop = task["start"], task["stop"]
            table, lists = messages(1.0), lists_of(1.0)
            reached = np.zeros(stop - start, np.bool_)
            for name in (LISTS, moved):
                reached[changed_of(name, start, stop).astype(np.int64) - start] = True
            reached |= lists.lists_with(table.patches[0].members, start, stop)
            ids = start + np.flatnonzero(reached)
            share = len(ids) / max(1, stop - start)
            own, kept_weights = own_of(share, ids), weights_of(share).rows_of(ids)(slice(None))
            index, weights = network.lists(layer, np.where(kept_weights > 0, lists.rows(ids), 0), kept_weights)
            sums = sums_of(table, ids, share)

            def block(part: slice) -> tuple[Array, ...]:
                summed = sums(part, index[part], weights[part])
                following = network.combine(layer, own(part), pooled(network, summed, unit))
                if is_last:
                    made = stored(network.head(following), dtype, ids[part])
                    return (made, packed(summed, layer_dtype)) if keeps_last else (made,)
                kept = stored(following, dtype, ids[part])
                return kept, stored(network.project(layer + 1, as_single(kept)), dtype, ids[part])

            made, numbers = in_blocks(block, len(ids), network.block), ids.astype(np.uint32)[:, None]
            if is_last:
                published: list[Report] = []

                def shards() -> Iterator[Made]:
                    for shard in task["shards"]:
                        first, last = cuts[shard], cuts[shard + 1]
                        own = slice(*np.searchsorted(ids, [first, last]))
                        whole, report = publish(first, last, ids[own], made[0][own])
                        published.append(report)
                        yield whole

                report = {"remade": len(ids), "published": published}
                return [*([numbers, made[1]] if keeps_last else []), shards()], report
            report = {"remade": len(ids), "largest": largest_of(made[1])}
            return [numbers, made[0], numbers, made[1]], report

        label = f"combine layer {layer + 1} again"
        if not is_last:
            outputs = [
                part for name in following_names for part in (self._ids(name), self._rows(name, self._told(name)))
            ]
            reports = self._step(label, outputs, make)
            self._check_scale(following_names[-1], reports)
            self.remade[f"vectors of layer {layer + 1}"] = sum(report["remade"] for report in reports)
            return
        before, publisher = self.remade, self._publisher

        def describe(reports: list[Report]) -> dict[str, Any]:
            made = sum(report["remade"] for report in reports)
            published = [shard for report in reports for shard in report["published"]]
            return {**publisher.describe(published), "remade": {**before, "embeddings": made}}

        sums = [self._ids(SUMS), self._rows(SUMS, self._told(SUMS))] if keeps_last else []
        embeddings = Output(schemas.EMBEDDINGS, describe=describe, several=True)
        self._step(label, [*sums, embeddings], make, before_last=self._keep if self._keeps else None)

    def _sums(self, layer: int) -> Callable[..., Callable[..., NDArray[np.int32]]]:
        """In a task, of a table of messages, the ids [n] that are reached and their share of all: a function of a part
        of them, its index and weights [k, T], to its sums [k, m].

        In the last layer those of last night, where lists stay, with what was made again put in its place.
        """
        network, changed_of, dtype = self._network, self._made_again, self._layer_dtype
        unit = quantum(self._earlier.kept[f"projected-{layer + 1}"].metadata["exponent"], dtype)
        former = self._former(SUMS) if layer + 1 == network.num_layers and keeps_sums(network) else None

        def open_sums(table: Overlay, ids: NDArray[np.int64], share: float) -> Callable[..., NDArray[np.int32]]:
            if former is None:
                return lambda part, index, weights: table.sums(index, weights, unit, network.reduction)
            stays = np.ones(len(ids), np.bool_)
            if len(ids):
                stays = ~np.isin(ids, changed_of(LISTS, int(ids[0]), int(ids[-1]) + 1))
            kept, before = former(share).rows_of(ids[stays]), np.concatenate([[0], np.cumsum(stays)])

            def some(part: slice, index: Array, weights: Array) -> NDArray[np.int32]:
                first, last = before[part.start], before[min(part.stop, len(ids))]
                rows = kept(slice(first, last))

                def sums_of(lists: NDArray[np.integer]) -> NDArray[np.int32]:
                    places = before[part.start + lists] - first
                    return unpacked(rows if len(places) == len(rows) else rows[places], dtype)

                return table.renewed(sums_of, stays[part], index, weights, unit)

            return some

        return open_sums

    def _keep(self) -> None:
        """Keep tonight's layers, and what they were made of, for the next run to go on from.

        What the earlier run kept stays the base, as the same files, and what was made again since then becomes one
        patch; where that has become large, all rows are written anew.
        """
        for name in kept_names(self._network):
            if _MOST * len(self._patched(name)) > self._num_items:
                self._keep_whole(name)
            else:
                self._keep_patch(name)
            for made in parts_of(name):
                manifest = find_manifest(self._storage, made)
                if manifest is not None:
                    settle(self._storage, made, manifest.shards)

    def _patched(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint32]:
        """The items [start, stop) of whose rows some night since the base made newer ones, ascending."""
        stop = self._num_items if stop is None else stop
        kept, again = self._earlier.kept[name], self._made_again(name, start, stop)
        if kept.ids is None:
            return again
        return np.union1d(_within(all_ids(self._earlier.storage, kept.ids), start, stop), again)

    def _keep_whole(self, name: str) -> None:
        overlay = self._overlay(name)

        def make(task: Task) -> tuple[Sequence[Made], Report]:
            ids = np.arange(task["start"], task["stop"])
            rows = overlay(1.0).rows(ids)
            return [rows], top_of(ids, rows)

        output = Output(parts_of(name)[0], raw=True, describe=self._with_tops(name))
        self._step(f"keep {name}", [output], make, 1)

    def _keep_patch(self, name: str) -> None:
        overlay, patched, (_, own_ids, own_rows) = self._overlay(name), self._patched, parts_of(name)

        def make(task: Task) -> tuple[Sequence[Made], Report]:
            ids = patched(name, task["start"], task["stop"])
            rows = overlay(0.0).rows(ids)
            return [ids[:, None], rows], top_of(ids, rows)

        outputs = [
            Output(own_ids, raw=True, describe=lambda _: describe_rows("uint32", 1)),
            Output(own_rows, raw=True, describe=self._with_tops(name)),
        ]
        self._step(f"keep {name}", outputs, make)
        storage, earlier, base = self._storage, self._earlier.storage, self._earlier.kept[name].base
        begin(storage, base.dataset)

        def share(task: Task) -> Task:
            for shard in base.shards[task["first"] : task["first"] + _FILES]:
                storage.copy_from(earlier, f"{base.dataset}/{shard.name}")
            return {}

        tasks = [{"first": first} for first in range(0, len(base.shards), _FILES)]
        run_tasks(self._spark, tasks, share, f"inference: base of {name}")
        commit(storage, base.dataset, base.shards, self._lineage, {**base.metadata, PATCHED: True})

    def _with_tops(self, name: str) -> Callable[[list[Report]], dict[str, Any]]:
        """Metadata of rows that were kept: of a layer with its exponent and every shard's largest value."""
        told, exponent = self._told(name), self._earlier.kept[name].metadata.get("exponent")

        def describe(reports: list[Report]) -> dict[str, Any]:
            if exponent is None:
                return told
            tops = {name: [report[name] for report in reports] for name in ("largest", "largest_id")}
            return {**told, "exponent": exponent, **tops}

        return describe

    # ------------------------------------------------------------------------------------------ parts

    def _own(self, layer: int) -> Callable[[float, NDArray[np.int64]], Callable[[slice], Array]]:
        """In a task that asks for a share of its items, these ids: what they are before a layer, a block of them."""
        network, overlay = self._network, self._overlay(f"hidden-{layer}" if layer else CONTENT)
        size = network.block

        def open_own(share: float, ids: NDArray[np.int64]) -> Callable[[slice], Array]:
            rows = overlay(share).rows_of(ids)
            if layer:
                return lambda part: as_single(filled(rows(part), size))
            return lambda part: network.standardise(as_single(filled(rows(part), size)), filled(ids[part], size))

        return open_own

    def _made_again(self, name: str, start: int, stop: int) -> NDArray[np.uint32]:
        """Which of the items [start, stop) were made again."""
        return _within(all_ids(self._storage, self._again(name, "ids")), start, stop)

    def _stored(self, vectors: Array, dtype: str, ids: NDArray[np.int64]) -> Array:
        storage, items = self._storage, self._items
        return as_stored(vectors, dtype, lambda row: key_of(storage, items, int(ids[row])))

    def _again(self, name: str, part: str) -> Manifest:
        name = _SAME_IDS.get(name, name) if part == "ids" else name
        return open_manifest(self._storage, f"{AGAIN}/{name}-{part}")

    def _overlay(self, name: str) -> Callable[[float], Overlay]:
        """What was kept as it is tonight: to be opened in a task that reads a share of its rows."""
        earlier, cache, num_items = self._earlier, self._cache, self._num_items
        newer = (self._storage, self._again(name, "ids"), self._again(name, "rows"))
        return lambda share: Overlay.open(earlier, name, num_items, cache, share, newer)

    def _former(self, name: str) -> Callable[[float], Overlay]:
        """What was kept as it was: to be opened in a task that reads a share of its rows."""
        earlier, cache, num_items = self._earlier, self._cache, self._num_items
        return lambda share: Overlay.open(earlier, name, num_items, cache, share)

    def _width(self, name: str) -> int:
        return int(self._earlier.kept[name].metadata["width"])

    def _told(self, name: str) -> dict[str, Any]:
        return describe_rows(self._earlier.kept[name].metadata["dtype"], self._width(name))

    def _ids(self, name: str) -> Output:
        return Output(f"{AGAIN}/{name}-ids", raw=True, describe=lambda _: describe_rows("uint32", 1))

    def _rows(self, name: str, told: dict[str, Any]) -> Output:
        return Output(f"{AGAIN}/{name}-rows", raw=True, describe=lambda _: told)

    def _check_scale(self, name: str, reports: list[Report]) -> None:
        """TooDifferentError if the layer's largest value, as it is now, is in another power of two."""
        known, lost = [float(report["largest"]) for report in reports], []
        for place, (rows, _, newer) in enumerate(self._parts(name)):
            gone = np.isin(rows.metadata["largest_id"], newer)
            pairs = zip(rows.metadata["largest"], gone, strict=True)
            known += [float(value) for value, is_gone in pairs if not is_gone]
            lost += [{"part": place, "shard": int(shard)} for shard in np.flatnonzero(gone)]
        former, exponent = self._earlier.kept[name].metadata["exponent"], exponent_of(max(known, default=0.0))
        if exponent < former and lost:
            parts_of_layer, earlier = partial(self._parts, name), self._earlier.storage

            def look(task: Task) -> Task:
                rows, ids, newer = parts_of_layer()[task["part"]]
                start = sum(shard.rows for shard in rows.shards[: task["shard"]])
                found = read_own_rows(earlier, rows, task["shard"])
                own = np.arange(start, start + len(found)) if ids is None else ids[start : start + len(found)]
                return {"largest": largest_of(found[~np.isin(own, newer)])}

            found = run_tasks(self._spark, lost, look, f"inference: largest values of {name}")
            exponent = exponent_of(max([*known, *(result["largest"] for result in found)]))
        if exponent != former:
            raise TooDifferentError("the largest values of a layer changed by a power of two")

    def _parts(self, name: str) -> list[tuple[Manifest, NDArray[np.uint32] | None, NDArray[np.uint32]]]:
        """Rows that were kept of a layer, the items that they are of (None: all), and of which there are newer ones."""
        kept, again = self._earlier.kept[name], all_ids(self._storage, self._again(name, "ids"))
        if kept.ids is None or kept.rows is None:
            return [(kept.base, None, again)]
        return [(kept.base, None, self._patched(name)), (kept.rows, all_ids(self._earlier.storage, kept.ids), again)]

    def _step(
        self, label: str, outputs: Sequence[Output],
        make: Callable[[Task], tuple[Sequence[Made | Iterator[Made]], Report]], together: int | None = None,
        before_last: Callable[[], None] | None = None,
    ) -> list[Report]:  # fmt: skip
        """A task for the items of some shards that follow each other."""
        cuts, name, tasks = self._cuts, f"{AGAIN}/step-{label.replace(' ', '-')}", []
        together = together or self._together
        for first in range(0, len(cuts) - 1, together):
            last = min(first + together, len(cuts) - 1)
            tasks.append({"start": cuts[first], "stop": cuts[last], "shards": list(range(first, last))})
        return run_step(
            self._spark, self._storage, self._lineage, name, tasks, outputs, make, f"inference: {label}", before_last
        )


def _within(ids: NDArray[np.uint32], start: int, stop: int) -> NDArray[np.uint32]:
    """Of ascending ids those in [start, stop)."""
    low, high = np.searchsorted(ids, [start, stop])
    return ids[low:high]
