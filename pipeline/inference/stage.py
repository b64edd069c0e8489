"""Every item's embedding, layer by layer, as map and reduce.

Reads ITEMS, FEATURES, NEIGHBOURS and MODEL; writes EMBEDDINGS. Map projects every item once, to what it says to those
that have it as neighbour; reduce sums that over every item's neighbours, combines the sum with the item's own vector,
and already projects it for the next layer, or makes the embedding. So each item is computed once per layer, however
many neighbourhoods it is in, and every layer passes storage once. How the projections reach the items is the reducer's
business: `gather` maps a whole layer on every host, `shuffle` sends partial sums (`reducers.py`, `shuffle.py`). Sums
are exact (`sums.py`) and products are made in blocks of one size, so all ways give the same bytes. What a killed run
has finished, shard by shard, is not made again. Memory per task: one shard of vectors, neighbours and sums.

The network comes in as plain array functions (`model.export`), so that nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import (
    Lineage,
    begin,
    check_sources,
    find_manifest,
    finished_manifest,
    open_manifest,
    read_rows,
)
from pipeline.contracts.errors import DataError, PipelineError
from pipeline.contracts.replica import forget
from pipeline.contracts.rows import describe_rows, read_own_rows, settle
from pipeline.contracts.schemas import how_to_build
from pipeline.contracts.storage import Storage
from pipeline.inference import ways
from pipeline.inference.choice import make_reducer
from pipeline.inference.earlier import (
    CONTENT,
    LISTS,
    SUMS,
    WEIGHTS,
    as_kept,
    find_earlier,
    keeps_sums,
    kept_names,
)
from pipeline.inference.halves import as_single
from pipeline.inference.incremental import Incremental, TooDifferentError, find_changes
from pipeline.inference.network import Array, Network, filled, in_blocks
from pipeline.inference.reducers import Gather, Reducer, num_neighbours, read_lists
from pipeline.inference.sums import exponent_of, packed, pooled, quantum, top_of
from pipeline.inference.vectors import as_stored
from pipeline.inference.ways import AGAIN
from pipeline.spark import Task, say
from pipeline.steps import Made, Output, Report, run_step


def run(spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage, network: Network) -> None:
    """Embed every item of the catalogue; of an earlier run of the same model only what has changed since."""
    _check_inputs(storage)
    begin(storage, schemas.EMBEDDINGS)
    if not _from_earlier(spark, storage, settings, lineage, network):
        _run_all(spark, storage, settings, lineage, network)
    if find_manifest(storage, schemas.EMBEDDINGS) is None:
        say("inference: once more, as what an earlier attempt had made is gone")
        storage.delete(schemas.LAYERS.name)
        _run_all(spark, storage, settings, lineage, network)


def _check_inputs(storage: Storage) -> None:
    """Raise DataError if content or neighbours are of other items than are there now."""
    items = open_manifest(storage, schemas.ITEMS)
    for dataset in (schemas.FEATURES, schemas.NEIGHBOURS):
        check_sources(storage, dataset)
        rows = open_manifest(storage, dataset).num_rows
        if rows != items.num_rows:
            raise DataError(
                f"{storage.locate(dataset.name)} is of {rows:,} items, and {schemas.ITEMS.name} has "
                f"{items.num_rows:,}; {how_to_build(dataset.name, 'again')}"
            )


def _from_earlier(
    spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage, network: Network
) -> bool:
    """Whether the embeddings could be made from those of an earlier run."""
    if ways.is_under_way(storage, lineage):
        return False
    earlier, reason = find_earlier(storage, settings, lineage, network)
    changes = None if earlier is None else find_changes(storage, earlier)
    if earlier is None or changes is None:
        if reason or earlier is not None:
            say(f"inference: all items, as {reason or 'it is not known what changed of features and neighbours'}")
        return False
    ways.go_on(storage, AGAIN, lineage, {"keeps": settings.resources.inference.keep_layers, **earlier.told()})
    try:
        Incremental(spark, storage, settings, lineage, network, earlier, changes).run()
    except (TooDifferentError, PipelineError) as error:  # what the earlier run has kept may be damaged
        say(f"inference: all items, as {error}")
        storage.delete(AGAIN)
        return False
    remade = open_manifest(storage, schemas.EMBEDDINGS).metadata["remade"]
    told = ", ".join(f"{count:,} {name}" for name, count in remade.items())
    say(f"inference: from {earlier.storage.url}, made again: {told}")
    ways.finish_again(storage, settings.resources.inference.keep_layers)
    forget(storage, schemas.LAYERS.name, settings.resources.cache)
    return True


def _run_all(spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage, network: Network) -> None:
    reducer = make_reducer(spark, storage, settings, lineage, network)
    keeps = settings.resources.inference.keep_layers and isinstance(reducer, Gather)
    layers = Layers(spark, storage, settings, lineage, network, reducer, keeps)
    if not network.num_layers:
        layers.embed()
    else:
        layers.project()
        if keeps:
            layers.keep_lists()
    for layer in range(network.num_layers):
        layers.combine(layer)
    reducer.finish()
    if not keeps:
        storage.delete(schemas.LAYERS.name)
    forget(storage, schemas.LAYERS.name, settings.resources.cache)


class Layers:
    """One map or reduce after the other, each a step whose outputs are datasets of their own."""

    def __init__(
        self, spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage, network: Network,
        reducer: Reducer, keeps: bool = False,
    ) -> None:  # fmt: skip
        self.keeps, self.cache = keeps, settings.resources.cache
        self.spark, self.storage, self.lineage, self.network, self.reducer = spark, storage, lineage, network, reducer
        self.layer_dtype, self.dtype = settings.task.inference.layer_dtype, settings.task.inference.dtype
        self.tasks = [{"shard": shard} for shard in range(reducer.num_shards)]

    def project(self) -> None:
        """Map: what every item says to its neighbours in the first layer."""
        if self._is_done("project layer 1"):
            return
        network, reducer, stored, keeps = self.network, self.reducer, self._stored(self.layer_dtype), self.keeps

        def make(task: Task) -> tuple[Sequence[Made], Report]:
            ids, features, keep = reducer.ids(task["shard"]), reducer.features(task["shard"]), stored(task["shard"])
            own = _standardised(network, ids, features)
            projected = in_blocks(lambda part: keep(part, network.project(0, own(part))), len(ids), network.block)
            made = [projected, features] if keeps else [projected]
            return made, {**_widths(ids, projected=projected), "content": [features.dtype.str, features.shape[1]]}

        outputs = [self._raw("projected-1", "projected")]
        if keeps:
            outputs.append(
                Output(_dataset(CONTENT), raw=True, describe=lambda reports: describe_rows(*reports[0]["content"]))
            )
        self._step("project layer 1", outputs, make)

    def keep_lists(self) -> None:
        """Neighbours and weights as raw rows, for a later run: of shards of consecutive items."""
        storage, reducer = self.storage, self.reducer
        neighbours = open_manifest(storage, schemas.NEIGHBOURS)
        width = num_neighbours(neighbours)

        def make(task: Task) -> tuple[Sequence[Made], Report]:
            ids = reducer.ids(task["shard"])
            start = int(ids[0]) if len(ids) else 0
            rows = read_rows(storage, neighbours, start, start + len(ids))
            return as_kept(*read_lists(rows, width), ids, width), {}

        outputs = [
            Output(_dataset(name), raw=True, describe=lambda _, dtype=dtype: describe_rows(dtype, width))  # type: ignore[misc]
            for name, dtype in ((LISTS, "uint32"), (WEIGHTS, "float32"))
        ]
        self._step("keep lists", outputs, make)

    def combine(self, layer: int) -> None:
        """Reduce: every item's sum over its neighbours, its next vector, and what that says in the layer after.

        In the last layer, its embedding.
        """
        if self._is_done(f"combine layer {layer + 1}"):
            return
        network, hidden, is_last = self.network, self._hidden(layer), layer + 1 == self.network.num_layers
        stored = self._stored(self.dtype if is_last else self.layer_dtype)
        projected = open_manifest(self.storage, _dataset(f"projected-{layer + 1}"))
        unit = quantum(projected.metadata["exponent"], self.layer_dtype)
        sums, made_of, ids_of = self.reducer.sums(layer, projected, unit), self.reducer.made_of, self.reducer.ids
        keeps, layer_dtype = is_last and self.keeps and keeps_sums(network), self.layer_dtype

        def make(task: Task) -> tuple[Sequence[Made], Report]:
            shard = task["shard"]
            (count, own), keep, summed = hidden(shard), stored(shard), sums(shard)

            def block(part: slice) -> tuple[Array, ...]:
                own_sums = summed(part)
                following = network.combine(layer, own(part), pooled(network, own_sums, unit))
                if is_last:
                    made = keep(part, network.head(following))
                    if not keeps:
                        return (made,)
                    sums_here = own_sums if isinstance(own_sums, np.ndarray) else network.fetch(own_sums)
                    return made, packed(sums_here, layer_dtype)
                kept = keep(part, following)
                return kept, keep(part, network.project(layer + 1, as_single(kept)))

            made = in_blocks(block, count, network.block)
            if is_last:
                rows, report = made_of(shard, made[0])
                return [*made[1:], rows], {**report, "packed_width": made[1].shape[1] if keeps else 0}
            return made, _widths(ids_of(shard), hidden=made[0], projected=made[1])

        outputs = [self.reducer.embedded()]
        if keeps:  # before the embeddings: who has these is not run again
            outputs.insert(0, Output(_dataset(SUMS), raw=True, describe=_describe_sums))
        if not is_last:
            outputs = [self._raw(f"hidden-{layer + 1}", "hidden"), self._raw(f"projected-{layer + 2}", "projected")]
        self._step(f"combine layer {layer + 1}", outputs, make, self._settle if is_last and self.keeps else None)
        if not self.keeps:
            self.storage.delete(projected.dataset)
            forget(self.storage, projected.dataset, self.cache)

    def embed(self) -> None:
        """Map: the head alone, for a network without layers."""
        network, hidden, stored, made_of = self.network, self._hidden(0), self._stored(self.dtype), self.reducer.made_of

        def make(task: Task) -> tuple[Sequence[Made], Report]:
            (count, own), keep = hidden(task["shard"]), stored(task["shard"])
            vectors = in_blocks(lambda part: keep(part, network.head(own(part))), count, network.block)
            rows, report = made_of(task["shard"], vectors)
            return [rows], report

        self._step("head", [self.reducer.embedded()], make)

    def _hidden(self, layer: int) -> Callable[[int], tuple[int, Callable[[slice], Array]]]:
        """Of a shard: its rows, and its items' vectors by blocks: the previous layer's, or standardised features."""
        storage, network, reducer = self.storage, self.network, self.reducer
        previous = open_manifest(storage, _dataset(f"hidden-{layer}")) if layer else None

        def read(shard: int) -> tuple[int, Callable[[slice], Array]]:
            if previous is not None:
                rows = read_own_rows(storage, previous, shard)
                return len(rows), lambda part: as_single(filled(rows[part], network.block))
            ids = reducer.ids(shard)
            return len(ids), _standardised(network, ids, reducer.features(shard))

        return read

    def _stored(self, dtype: str) -> Callable[[int], Callable[[slice, Array], Array]]:
        """Of a shard: how a block of its vectors is stored; DataError for what is no number, or fits no float16."""
        name_of = self.reducer.name_of
        return lambda shard: (
            lambda part, vectors: as_stored(vectors, dtype, lambda row: name_of(shard, part.start + row))
        )

    def _raw(self, name: str, of: str) -> Output:
        dtype = self.layer_dtype

        def describe(reports: list[Report]) -> dict[str, Any]:
            width = max(report[of]["width"] for report in reports)
            tops = {name: [report[of][name] for report in reports] for name in ("largest", "largest_id")}
            return {**describe_rows(dtype, width), "exponent": exponent_of(max(tops["largest"])), **tops}

        return Output(_dataset(name), raw=True, describe=describe)

    def _settle(self) -> None:
        """What is kept is safe from a crash before the embeddings say that it is there."""
        for name in map(_dataset, kept_names(self.network)):
            settle(self.storage, name, open_manifest(self.storage, name).shards)

    def _is_done(self, label: str) -> bool:
        """Whether a killed run finished the step: what it read may be gone."""
        return finished_manifest(self.storage, _step_name(label), self.lineage) is not None

    def _step(
        self, label: str, outputs: Sequence[Output], make: Callable[[Task], tuple[Sequence[Made], Report]],
        before_last: Callable[[], None] | None = None,
    ) -> list[Report]:  # fmt: skip
        return run_step(
            self.spark, self.storage, self.lineage, _step_name(label), self.tasks, outputs, make,
            f"inference: {label}", before_last,
        )  # fmt: skip


def _standardised(network: Network, ids: NDArray[np.int64], features: Array) -> Callable[[slice], Array]:
    """By blocks, what content vectors are to the first layer."""
    size = network.block
    return lambda part: network.standardise(as_single(filled(features[part], size)), filled(ids[part], size))


def _step_name(label: str) -> str:
    return _dataset(f"step-{label.replace(' ', '-')}")


def _describe_sums(reports: list[Report]) -> dict[str, Any]:
    return describe_rows("uint8", reports[0]["packed_width"])


def _dataset(name: str) -> str:
    return f"{schemas.LAYERS.name}/{name}"


def _widths(ids: NDArray[np.int64], **arrays: Array) -> Report:
    return {name: {"width": array.shape[1], **top_of(ids, array)} for name, array in arrays.items()}
