"""Partial sums to the shards that need them: inference where no host holds a layer.

Items are laid out so that neighbours share a shard (`clusters`, on the neighbour lists themselves). Per layer, the task
of a source shard sums, for every destination shard, what its own items contribute to each of that shard's items, and
sends the sums: one row where several neighbours live together. The items that are in most lists, the hubs, are not
summed so: their messages go to every host, as one small table. Which edges lead where is worked out once per neighbour
table, as one columnar block per pair of shards, and kept for later layers and later models. Memory per task: one shard
of vectors and of sums, one block, and the hubs' messages, mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline.clusters import lay_out
from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    arrow_to_vectors,
    finished_manifest,
    one_array,
    open_manifest,
    read_rows,
    read_shard,
    vectors_to_arrow,
)
from pipeline.contracts.replica import map_rows, map_values
from pipeline.contracts.rows import describe_rows, read_own_rows
from pipeline.contracts.sharding import count_shards, shard_bounds, shard_of
from pipeline.contracts.storage import Storage
from pipeline.exchange import each_block, gather
from pipeline.inference.network import Array, Network
from pipeline.inference.publishing import Publisher
from pipeline.inference.reducers import Sums, key_of, num_neighbours, read_lists
from pipeline.inference.sums import WIRE_BYTES, add_rows, packed, unpacked
from pipeline.spark import Task
from pipeline.steps import BlockStream, Made, Output, Report, run_step

_COUNTS = pa.schema([("id", pa.uint32()), ("count", pa.uint32())])
_MOST_COUNT = 4095
"""References are told apart up to so many: an item with more is a hub if any is."""
Homes = Callable[[NDArray[np.integer]], NDArray[np.integer]]
_LAYERS, _EXCHANGE = schemas.LAYERS.name, schemas.EXCHANGE


class Edges:
    """Which item's messages go where: decided by the neighbour table, the cut into shards, and how layers read lists.

    `ids` are every shard's items, ascending; `hubs` the hubs' ids, ascending; both as raw rows [n, 1]. `edges` has a
    file per destination shard, of it a block for every source shard, and `hub_edges` a shard per destination shard.
    An edge is the place of its destination, its source (an id, or a slot among the hubs), and a weight for every kind
    of list that a layer reads.
    """

    def __init__(
        self, spark: SparkContext, storage: Storage, settings: Settings, network: Network, num_shards: int
    ) -> None:
        resources = settings.resources.inference
        self._spark, self._storage, self._network = spark, storage, network
        self._cache, self._neighbours = settings.resources.cache, open_manifest(storage, schemas.NEIGHBOURS)
        self.num_items, self.num_shards, self.kinds = self._neighbours.num_rows, num_shards, network.list_kinds
        self._rounds, self._share = resources.cluster_rounds, resources.hub_share
        decides = {"num_shards": num_shards, "rounds": self._rounds, "hubs": self._share, "lists": network.reads}
        self._lineage = Lineage(
            schemas.INFERENCE.name, decides, {schemas.NEIGHBOURS.name: self._neighbours.content}
        )  # fmt: skip
        weights = [(f"weight_{kind}", pa.float32()) for kind in range(max(self.kinds) + 1)]
        self.schema = pa.schema([("place", pa.uint32()), ("source", pa.uint32()), *weights])
        self._make()
        self.ids, self.hubs, self.edges, self.hub_edges = (
            open_manifest(storage, f"{_EXCHANGE}/{name}") for name in ("ids", "hubs", "edges", "hub-edges")
        )

    def __getstate__(self) -> dict[str, Any]:
        """Tasks get all but the session."""
        return {name: value for name, value in vars(self).items() if name != "_spark"}

    def _make(self) -> None:
        storage, num_items, num_shards = self._storage, self.num_items, self.num_shards
        lists, width = self._laid_out(), num_neighbours(self._neighbours)
        self.home = home = self._homes()

        def count(task: Task) -> tuple[Sequence[Made], Report]:
            table = lists(task["shard"])
            index, weights = read_lists(table, width)
            found, counts = np.unique(index[weights > 0], return_counts=True)
            counted = pa.table([found.astype(np.uint32), counts.astype(np.uint32)], schema=_COUNTS)
            return [(counted, shard_of(found, num_items, num_shards)), table.column("id").to_numpy()[:, None]], {}

        references = Output(f"{_EXCHANGE}/references", destinations=num_shards)
        self._step("count references", [references, self._raw("ids")], count)
        threshold = self._threshold()

        def choose(task: Task) -> tuple[Sequence[Made], Report]:
            start, _ = shard_bounds(num_items, num_shards, task["shard"])
            counts = read_own_rows(storage, open_manifest(storage, f"{_EXCHANGE}/counts"), task["shard"])[:, 0]
            return [(start + np.flatnonzero(counts >= threshold)).astype(np.uint32)[:, None]], {}

        self._step("choose hubs", [self._raw("hubs")], choose)
        self._lead(lists, home)
        for name in ("references", "counts", "homes/lists", "homes/labels-of-items", "homes/labels-of-users"):
            storage.delete(f"{_EXCHANGE}/{name}")

    def _lead(self, lists: Callable[[int], pa.Table], home: Homes) -> None:
        """Send every edge to the shard of its source, but those of hubs."""
        storage, cache, schema, network, kinds = self._storage, self._cache, self.schema, self._network, self.kinds
        hubs, num_shards = open_manifest(storage, f"{_EXCHANGE}/hubs"), self.num_shards
        width = num_neighbours(self._neighbours)

        def lead(task: Task) -> tuple[Sequence[Made], Report]:
            index, weights = read_lists(lists(task["shard"]), width)
            shares = np.zeros((max(kinds) + 1, *index.shape), np.float32)
            for layer, kind in enumerate(kinds):
                _, read = network.lists(layer, index, weights)
                shares[kind, :, : read.shape[1]] = read
            places, columns = np.nonzero((shares > 0).any(axis=0))
            sources, found = index[places, columns], shares[:, places, columns]
            slots, is_hub = find_hubs(hub_ids(storage, hubs, cache), sources)

            def edges(chosen: NDArray[np.bool_], ends: NDArray[np.integer]) -> pa.Table:
                columns = [places[chosen].astype(np.uint32), ends[chosen].astype(np.uint32), *found[:, chosen]]
                return pa.table(columns, schema=schema)

            homes = home(sources[~is_hub]).astype(np.int64)
            pairs = np.unique(places[~is_hub] * num_shards + homes).size
            report = {"edges": len(sources), "hub_edges": int(is_hub.sum()), "partial_rows": int(pairs)}
            return [(edges(~is_hub, sources), homes), edges(is_hub, slots)], report

        outputs = [Output(f"{_EXCHANGE}/edges", destinations=num_shards), Output(f"{_EXCHANGE}/hub-edges")]
        self.reports = self._step("edges", outputs, lead)

    def _laid_out(self) -> Callable[[int], pa.Table]:
        """The rows of NEIGHBOURS of a shard's items, after items were given their shards."""
        storage, neighbours, num_items, num_shards = self._storage, self._neighbours, self.num_items, self.num_shards
        if not self._rounds:
            return lambda shard: read_rows(storage, neighbours, *shard_bounds(num_items, num_shards, shard))
        if finished_manifest(storage, self._step_name("edges"), self._lineage) is not None:
            return lambda shard: schemas.NEIGHBOURS.arrow.empty_table()  # nobody asks
        homes = lay_out(
            self._spark, storage, self._lineage, neighbours, neighbours, self._rounds, f"{_EXCHANGE}/homes",
            self._cache, num_shards, schemas.NEIGHBOURS.arrow,
        )  # fmt: skip
        return lambda shard: homes.read(storage, shard)

    def _homes(self) -> Homes:
        """The shard of given items."""
        storage, cache, num_items, num_shards = self._storage, self._cache, self.num_items, self.num_shards
        if not self._rounds:
            return lambda items: shard_of(items, num_items, num_shards)
        home = open_manifest(storage, f"{_EXCHANGE}/homes/home")
        return lambda items: map_values(storage, home, "home", cache)[items]

    def _threshold(self) -> int:
        """So many references make a hub: the most items that the settings allow."""
        storage, num_items, num_shards = self._storage, self.num_items, self.num_shards

        def add(task: Task) -> tuple[Sequence[Made], Report]:
            start, stop = shard_bounds(num_items, num_shards, task["shard"])
            sent = gather(storage, open_manifest(storage, f"{_EXCHANGE}/references"), task["shard"], _COUNTS)
            places = sent.column("id").to_numpy().astype(np.int64) - start
            counts = np.bincount(places, sent.column("count").to_numpy(), stop - start).astype(np.uint32)
            classes = np.bincount(np.minimum(counts, _MOST_COUNT), minlength=_MOST_COUNT + 1)
            used = np.flatnonzero(classes)
            return [counts[:, None]], {"classes": dict(zip(used.tolist(), classes[used].tolist(), strict=True))}

        total = np.zeros(_MOST_COUNT + 2, np.int64)
        for report in self._step("add references", [self._raw("counts")], add):
            for number, items in report["classes"].items():
                total[int(number)] += items
        at_least = np.cumsum(total[::-1])[::-1]  # items with so many references or more
        found = int(np.argmax(at_least <= self._share * num_items))
        return max(1, found) if found <= _MOST_COUNT else num_items + 1  # so many are in all lists: no item is

    def _raw(self, name: str) -> Output:
        return Output(f"{_EXCHANGE}/{name}", raw=True, describe=lambda _: describe_rows("uint32", 1))

    def _step_name(self, label: str) -> str:
        return f"{_EXCHANGE}/step-{label.replace(' ', '-')}"

    def _step(
        self, label: str, outputs: Sequence[Output], make: Callable[[Task], tuple[Sequence[Made], Report]]
    ) -> list[Report]:
        tasks = [{"shard": shard} for shard in range(self.num_shards)]
        return run_step(
            self._spark, self._storage, self._lineage, self._step_name(label), tasks, outputs, make,
            f"inference: {label}",
        )  # fmt: skip


class Shuffle:
    """Shards of items that lie close together; partial sums are sent between them."""

    def __init__(
        self, spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage, network: Network
    ) -> None:
        self._spark, self._storage, self._lineage, self._network = spark, storage, lineage, network
        self._cache, self._dtype = settings.resources.cache, settings.task.inference.layer_dtype
        self._items, features = open_manifest(storage, schemas.ITEMS), open_manifest(storage, schemas.FEATURES)
        self._num_items = self._items.num_rows
        self.num_shards = count_shards(self._num_items, settings.resources.rows_per_shard)
        self._edges = Edges(spark, storage, settings, network, self.num_shards)
        self._content_schema = read_shard(storage, features, 0, ["id", "features"]).schema
        self._publisher = Publisher(storage, settings, lineage)
        self._send_content(features)

    def __getstate__(self) -> dict[str, Any]:
        """Tasks get all but the session."""
        return {name: value for name, value in vars(self).items() if name != "_spark"}

    def ids(self, shard: int) -> NDArray[np.int64]:
        return read_own_rows(self._storage, self._edges.ids, shard)[:, 0].astype(np.int64)

    def name_of(self, shard: int, row: int) -> str:
        return key_of(self._storage, self._items, int(self.ids(shard)[row]))

    def _send_content(self, features: Manifest) -> None:
        """Every item's content to its shard."""
        storage, home = self._storage, self._edges.home

        def send(task: Task) -> tuple[Sequence[Made], Report]:
            rows = read_shard(storage, features, task["shard"], ["id", "features"])
            return [(rows, home(rows.column("id").to_numpy()))], {}

        output = Output(f"{_LAYERS}/content", destinations=self.num_shards)
        self._step("content to shards", len(features.shards), [output], send)

    def features(self, shard: int) -> Array:
        sent = open_manifest(self._storage, f"{_LAYERS}/content")
        rows = gather(self._storage, sent, shard, self._content_schema).sort_by("id")
        return arrow_to_vectors(rows.column("features"))

    def sums(self, layer: int, projected: Manifest, unit: float) -> Callable[[int], Sums]:
        kind, width = f"weight_{self._edges.kinds[layer]}", int(projected.metadata["width"])
        partial = self._send_sums(layer, projected, unit, kind)
        messages = self._collect_hubs(layer, width)
        storage, cache, edges, reduction = self._storage, self._cache, self._edges, self._network.reduction
        dtype = self._dtype
        schema = _partial_schema(width, dtype)

        def of(shard: int) -> Sums:
            out = np.zeros((edges.ids.shards[shard].rows, width), np.int32)
            own = read_shard(storage, edges.hub_edges, shard)
            if own.num_rows:
                table = map_rows(storage, messages, cache)
                indptr = np.searchsorted(own.column("place").to_numpy(), np.arange(len(out) + 1))
                slots, weights = own.column("source").to_numpy(), own.column(kind).to_numpy()
                add_rows(table.rows, indptr, table.places(slots), weights, unit, out, reduction)
            for block in each_block(storage, partial, shard, schema):
                places = block.column("place").to_numpy()
                sums = _from_column(block.column("sums"), dtype)
                if reduction == "sum":
                    out[places] += sums
                else:
                    out[places] = np.maximum(out[places], sums)
            return lambda part: out[part]

        return of

    def _send_sums(self, layer: int, projected: Manifest, unit: float, kind: str) -> Manifest:
        """Of every source shard: partial sums to all destinations, and its hubs' messages."""
        storage, cache, edges, dtype = self._storage, self._cache, self._edges, self._dtype
        num_items, num_shards, ids_of, reduction = self._num_items, self.num_shards, self.ids, self._network.reduction

        def send(task: Task) -> tuple[Sequence[Made], Report]:
            shard = task["shard"]
            rows, ids = read_own_rows(storage, projected, shard), ids_of(shard)
            _, is_hub = find_hubs(hub_ids(storage, edges.hubs, cache), ids)
            told = pa.table({"id": ids[is_hub].astype(np.uint32), "message": vectors_to_arrow(rows[is_hub])})
            sent = {"bytes": 0}

            def blocks() -> BlockStream:
                for destination in range(num_shards):
                    for own in each_block(storage, edges.edges, shard, edges.schema, [destination]):
                        places = own.column("place").to_numpy()
                        firsts = np.flatnonzero(np.diff(places, prepend=-1))
                        out = np.zeros((len(firsts), rows.shape[1]), np.int32)
                        sources = np.searchsorted(ids, own.column("source").to_numpy())
                        weights = own.column(kind).to_numpy()
                        add_rows(rows, np.append(firsts, len(places)), sources, weights, unit, out, reduction)
                        sums = _as_column(out, dtype)
                        sent["bytes"] += sums.nbytes + 4 * len(firsts)
                        yield destination, pa.table({"place": places[firsts], "sums": sums})

            return [blocks(), (told, shard_of(ids[is_hub], num_items, num_shards))], sent

        name = f"{_LAYERS}/partial-{layer + 1}"
        outputs = [
            Output(name, destinations=num_shards),
            Output(f"{_LAYERS}/hub-messages-{layer + 1}", destinations=num_shards),
        ]
        self._step(f"partial sums {layer + 1}", num_shards, outputs, send)
        return open_manifest(storage, name)

    def _collect_hubs(self, layer: int, width: int) -> Manifest:
        """The hubs' messages in the order of their ids, for every host."""
        storage, dtype, name = self._storage, self._dtype, f"{_LAYERS}/hubs-{layer + 1}"
        sent = open_manifest(storage, f"{_LAYERS}/hub-messages-{layer + 1}")
        element = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
        schema = pa.schema([("id", pa.uint32()), ("message", pa.list_(element, width))])

        def collect(task: Task) -> tuple[Sequence[Made], Report]:
            return [arrow_to_vectors(gather(storage, sent, task["shard"], schema).sort_by("id").column("message"))], {}

        output = Output(name, raw=True, describe=lambda _: describe_rows(dtype, width))
        self._step(f"hubs {layer + 1}", self.num_shards, [output], collect)
        return open_manifest(storage, name)

    # ------------------------------------------------------------------------------------------ embeddings

    def embedded(self) -> Output:
        return Output(f"{_LAYERS}/embedded", destinations=self.num_shards, describe=lambda reports: reports[0])

    def made_of(self, shard: int, vectors: Array) -> tuple[Made, Report]:
        ids = self.ids(shard)
        table = pa.table({"id": pa.array(ids, pa.uint32()), "embedding": vectors_to_arrow(vectors)})
        told = {"width": vectors.shape[1], "dtype": vectors.dtype.str}
        return (table, shard_of(ids, self._num_items, self.num_shards)), told

    def finish(self) -> None:
        storage, num_items, num_shards, publisher = self._storage, self._num_items, self.num_shards, self._publisher
        sent = open_manifest(storage, f"{_LAYERS}/embedded")
        element = pa.field("element", pa.from_numpy_dtype(np.dtype(sent.metadata["dtype"])), nullable=False)
        schema = pa.schema([("id", pa.uint32()), ("embedding", pa.list_(element, sent.metadata["width"]))])

        def order(task: Task) -> tuple[Sequence[Made], Report]:
            rows = gather(storage, sent, task["shard"], schema).sort_by("id")
            vectors = arrow_to_vectors(rows.column("embedding"))
            table, report = publisher.rows(*shard_bounds(num_items, num_shards, task["shard"]), vectors)
            return [table], report

        output = Output(schemas.EMBEDDINGS, describe=publisher.describe)
        self._step("embeddings in order", num_shards, [output], order)

    def _step(
        self, label: str, num_tasks: int, outputs: Sequence[Output],
        make: Callable[[Task], tuple[Sequence[Made], Report]],
    ) -> list[Report]:  # fmt: skip
        name, tasks = f"{_LAYERS}/step-{label.replace(' ', '-')}", [{"shard": shard} for shard in range(num_tasks)]
        return run_step(
            self._spark, self._storage, self._lineage, name, tasks, outputs, make, f"inference: {label}"
        )  # fmt: skip


def hub_ids(storage: Storage, hubs: Manifest, cache: str | None) -> NDArray[np.integer]:
    """All hubs' ids, ascending."""
    if not hubs.num_rows:
        return np.zeros(0, np.uint32)
    table = map_rows(storage, hubs, cache)
    found: NDArray[np.integer] = table.rows[table.places(np.arange(hubs.num_rows)), 0]
    return found


def find_hubs(hubs: NDArray[np.integer], items: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Each item's slot among the hubs, and whether it is one."""
    slots = np.searchsorted(hubs, items)
    is_hub = slots < len(hubs)
    is_hub[is_hub] = hubs[slots[is_hub]] == items[is_hub]
    return slots, is_hub


def _as_column(sums: NDArray[np.int32], dtype: str) -> pa.Array:
    """Sums [n, m] as a column of bytes."""
    rows = packed(sums, dtype)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])


def _from_column(column: pa.ChunkedArray, dtype: str) -> NDArray[np.int32]:
    """What was a column of bytes."""
    array = one_array(column)
    size = array.type.byte_width
    return unpacked(
        np.frombuffer(array.buffers()[1], np.uint8, len(array) * size, array.offset * size).reshape(-1, size), dtype
    )


def _partial_schema(width: int, dtype: str) -> pa.Schema:
    return pa.schema([("place", pa.uint32()), ("sums", pa.binary(width * WIRE_BYTES[dtype]))])
