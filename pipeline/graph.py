"""Training interactions to a bipartite graph in compressed rows, both directions.

Reads INTERACTIONS, USERS, ITEMS; writes ITEM_USERS and USER_ITEMS. Only training events enter: nothing dated after the
split reaches the graph. Repeated events of one user and item become one edge. Limits are applied once, the users'
first; where items have limits too, the edges that these leave go back to the users: both directions always hold the
same edges.

Interactions lie by user, so a task makes the users' rows from its shard and sends every edge to the shard that owns its
item: one columnar exchange of 6 to 8 bytes an edge, up to 24 with weights and times. Nothing is sorted. Memory: one
shard per task; on the driver, histograms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline import graph_kernel as kernel
from pipeline.contracts import schemas
from pipeline.contracts.config import Graph, Settings
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    begin,
    finished_manifest,
    lists_to_arrow,
    open_manifest,
    read_shard,
)
from pipeline.contracts.errors import DataError
from pipeline.contracts.schemas import Dataset, how_to_build
from pipeline.contracts.sharding import count_shards, shard_bounds, stage_seed
from pipeline.contracts.storage import Storage
from pipeline.exchange import gather
from pipeline.graph_kernel import Events, Rows
from pipeline.spark import Task, run_tasks, say
from pipeline.steps import Blocks, Output, Report, run_step

_DAY = 86_400
_FOOTER_BYTES = 1 << 16
_GROUP_SHARDS = 32
_EMPTY_ROWS = 10
"""Users of a part, in rows_per_shard: only a part of users mostly without interactions has more and is cut."""
Made = tuple[list[pa.Table | Blocks], Report]


def run(spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Build both directions of the graph from the training interactions."""
    for dataset in schemas.GRAPH.writes:
        if finished_manifest(storage, dataset, lineage) is None:
            begin(storage, dataset)
    maker = plan(spark, storage, settings)
    before = {dataset.name: _degrees_before(spark, storage, dataset) for dataset in (schemas.USERS, schemas.ITEMS)}
    sizes = {"users": maker.num_users, "items": maker.num_items, "weighted": maker.limits.has_weights}
    parts = [{"part": part} for part in range(maker.num_parts)]
    shards = [{"shard": shard} for shard in range(maker.num_item_shards)]
    counted: dict[str, Report] = {}

    def describe(side: str, *earlier: str) -> Any:
        """What a manifest says of its side; raises DataError if there is nothing to commit."""

        def metadata(reports: list[Report]) -> dict[str, Any]:
            rules = added([*(counted[name] for name in earlier), *reports])
            if not rules["degrees"]["edges"]:
                raise DataError(_why_empty(counted.get("users", rules)["events"]))
            return sizes | describe_side(rules, before[side])

        return metadata

    def step(name: str, tasks: Sequence[Task], outputs: Sequence[Output], make: Any, label: str) -> None:
        done = run_step(spark, storage, lineage, f"graph/{name}", tasks, outputs, make, f"graph: {label}")
        counted[name] = added(done)

    edges, kept = Output("graph/edges", maker.num_item_shards), Output("graph/kept", maker.num_parts)
    user_items = Output(schemas.USER_ITEMS, describe=describe("users", *(["users"] if maker.limits_items else [])))
    item_users = Output(schemas.ITEM_USERS, describe=describe("items"))
    if not maker.limits_items:
        step("users", parts, [user_items, edges], maker.users, "rows of users, edges to items")
        sent = open_manifest(storage, edges.name)
        step("items", shards, [item_users], lambda task: maker.items(task, sent), "rows of items")
    else:
        step("users", parts, [edges], maker.users, "edges to items")
        sent = open_manifest(storage, edges.name)
        step("items", shards, [item_users, kept], lambda task: maker.items(task, sent), "rows of items, edges back")
        back = open_manifest(storage, kept.name)
        step("rows", parts, [user_items], lambda task: maker.users_again(task, back), "rows of users")
    say(summary(*(open_manifest(storage, output.dataset).metadata for output in (user_items, item_users))))
    storage.delete(schemas.GRAPH.name)


def _why_empty(events: int) -> str:
    if events:
        return (
            f"the graph has no edge: its limits leave none of what {events:,} training interactions make; lower "
            "task.graph.min_user_degree or min_item_degree"
        )
    return "the graph has no edge: no training interaction is left; look at `pinsage status` and the split"


# ------------------------------------------------------------------------------------------------ what a task makes


def plan(spark: SparkContext, storage: Storage, settings: Settings) -> Maker:
    """Which users and items the tasks own: of the users as many parts as interactions have shards, or a multiple."""
    interactions = open_manifest(storage, schemas.INTERACTIONS)
    num_users, num_items = (open_manifest(storage, d).num_rows for d in (schemas.USERS, schemas.ITEMS))
    rows_per_shard, num_shards = settings.resources.rows_per_shard, max(1, len(interactions.shards))
    limits = settings.task.graph
    return Maker(
        storage, interactions, _user_spans(spark, storage, interactions), limits, settings.task.seed,
        decay=decay(settings), num_users=num_users, num_items=num_items,
        num_parts=num_shards * -(-count_shards(num_users, _EMPTY_ROWS * rows_per_shard) // num_shards),
        num_item_shards=count_shards(num_items, rows_per_shard),
    )  # fmt: skip


def decay(settings: Settings) -> float:
    """How often a weight halves in a unit of the timestamps; 0: never."""
    half_life = settings.task.graph.half_life_days
    day = 1 if settings.task.data.interactions.timestamp_unit == "order" else _DAY
    return 1 / (half_life * day) if half_life else 0.0


@dataclass(frozen=True)
class Maker:
    """Makes rows and edges of any part of the users and any shard of the items, and counts.

    spans are the first and last user of every shard of interactions.
    """

    storage: Storage
    interactions: Manifest
    spans: tuple[tuple[int, int] | None, ...]
    limits: Graph
    seed: int
    decay: float
    num_users: int
    num_items: int
    num_parts: int
    num_item_shards: int

    @property
    def limits_items(self) -> bool:
        """Whether the users' rows have to wait for what the items' limits leave."""
        return self.limits.max_item_degree > 0 or self.limits.min_item_degree > 1

    @property
    def edge_schema(self) -> pa.Schema:
        """What is sent of an edge."""
        names = [("user", pa.uint32()), ("item", pa.uint32())]
        if self.limits.has_weights:
            names.append(("weight", pa.float64()))
        if self.decay or (self.limits.max_item_degree and self.limits.keep == "recent"):
            names.append(("time", pa.int64()))
        return pa.schema(names)

    def users(self, task: Task) -> Made:
        """The rows of a part's users, unless they have to wait; and their edges by the shard of their item."""
        limits, (start, stop) = self.limits, shard_bounds(self.num_users, self.num_parts, task["part"])
        events = self._events(start, stop)
        rows, merged = kernel.merge_events(events, start, stop, self.num_items, limits.has_weights, self.decay)
        if merged.bad_row >= 0:
            user, item, weight = (column[merged.bad_row] for column in (events.users, events.items, events.weights))
            raise DataError(
                f"interactions: user {user}, item {item}, weight {weight}: expected an item below {self.num_items:,} "
                f"and a finite weight above 0; {how_to_build('interactions', 'again')}"
            )
        report: Report = {"events": merged.used, "duplicates": merged.used - len(rows.ids)}
        report["weightless"] = merged.weightless
        if self.decay and len(rows.times):
            report["latest"] = int(rows.times.max())
        rows, too_few, too_many = kernel.limit_rows(
            rows, start, limits.min_user_degree, limits.max_user_degree, self._drawn("users"), by_user=True
        )
        report |= {"below_minimum": too_few, "above_limit": too_many}
        made: list[pa.Table | Blocks] = []
        if not self.limits_items:
            report |= degree_counts(rows.degrees)
            made.append(self._user_items(rows, start))
        owners, edges, destinations = kernel.to_shards(rows, start, self.num_items, self.num_item_shards)
        return [*made, (self._table(owners, edges.ids, edges), destinations)], report

    def items(self, task: Task, sent: Manifest) -> Made:
        """The rows of a shard's items; with limits, also the edges that these leave by the part of their user."""
        limits, (start, stop) = self.limits, shard_bounds(self.num_items, self.num_item_shards, task["shard"])
        rows = self._gathered(sent, task["shard"], "item", "user", start, stop)
        rows, too_few, too_many = kernel.limit_rows(
            rows, start, limits.min_item_degree, limits.max_item_degree, self._drawn("items"), by_user=False
        )
        report = {"below_minimum": too_few, "above_limit": too_many, **degree_counts(rows.degrees)}
        adjacency = self._adjacency(rows, start)
        if not self.limits_items:
            return [adjacency], report
        owners, edges, destinations = kernel.to_shards(rows, start, self.num_users, self.num_parts)
        return [adjacency, (self._table(edges.ids, owners, edges), destinations)], report

    def users_again(self, task: Task, kept: Manifest) -> Made:
        """The rows of a part's users from the edges that the items' limits left."""
        start, stop = shard_bounds(self.num_users, self.num_parts, task["part"])
        rows = self._gathered(kept, task["part"], "user", "item", start, stop)
        return [self._user_items(rows, start)], degree_counts(rows.degrees)

    def _events(self, start: int, stop: int) -> Events:
        """All events of the users [start, stop), from the shards that have any."""
        capped = self.limits.max_user_degree or self.limits.max_item_degree
        timed = self.decay > 0 or bool(capped and self.limits.keep == "recent")
        columns = ["user_id", "item_id", "weight", "split", *(["timestamp"] if timed else [])]
        parts = [schemas.INTERACTIONS.arrow.empty_table().select(columns)]
        for number, span in enumerate(self.spans):
            if span is None or span[0] >= stop or span[1] < start:
                continue
            table = read_shard(self.storage, self.interactions, number, columns).select(columns)
            users = table.column("user_id").to_numpy()
            if (users[1:] < users[:-1]).any() or span[1] >= self.num_users:
                raise DataError(
                    f"interactions shard {number} is not in the order of users below {self.num_users:,}; "
                    f"{how_to_build('interactions', 'again')}"
                )
            first, end = np.searchsorted(users, np.array([start, min(stop, span[1] + 1)], np.uint32))
            parts.append(table.slice(first, end - first))
        whole = pa.concat_tables(parts).combine_chunks()
        users, items, weights, splits = (whole.column(name).to_numpy() for name in columns[:4])
        times = whole.column("timestamp").to_numpy() if timed else np.zeros(0, np.int64)
        return Events(users, items, times, weights, splits)

    def _drawn(self, purpose: str) -> int | None:
        return stage_seed(self.seed, f"graph limits {purpose}") if self.limits.keep == "random" else None

    def _table(self, users: NDArray[np.uint32], items: NDArray[np.uint32], edges: Rows) -> pa.Table:
        arrays = {"user": users, "item": items, "weight": edges.weights, "time": edges.times}
        return pa.table([arrays[name] for name in self.edge_schema.names], schema=self.edge_schema)

    def _gathered(self, sent: Manifest, shard: int, owner: str, other: str, start: int, stop: int) -> Rows:
        edges = gather(self.storage, sent, shard, self.edge_schema)
        columns = {name: edges.column(name).to_numpy() for name in edges.column_names}
        weights, times = columns.get("weight", np.zeros(0)), columns.get("time", np.zeros(0, np.int64))
        return kernel.collect_rows(columns[owner], (columns[other], weights, times), start, stop)

    def _user_items(self, rows: Rows, start: int) -> pa.Table:
        """Rows of users, which it shuffles."""
        kernel.shuffle_rows(rows, start, stage_seed(self.seed, "graph order"))
        return self._adjacency(rows, start)

    def _adjacency(self, rows: Rows, start: int) -> pa.Table:
        weighted = self.limits.has_weights
        shares = kernel.running_shares(rows, self.decay) if weighted else np.zeros(0, np.uint32)
        columns = [
            pa.array(np.arange(start, start + len(rows.indptr) - 1), pa.uint32()),
            lists_to_arrow(rows.indptr, rows.ids),
            lists_to_arrow(rows.indptr if weighted else np.zeros_like(rows.indptr), shares),
        ]
        return pa.table(columns, schema=schemas.ITEM_USERS.arrow)


def _user_spans(spark: SparkContext, storage: Storage, interactions: Manifest) -> tuple[tuple[int, int] | None, ...]:
    """The first and last user of every shard, None of an empty one, from the shards' last bytes if these say it."""

    def span(number: int) -> tuple[int, int] | None:
        shard = interactions.shards[number]
        if not shard.rows:
            return None
        path = f"{interactions.dataset}/{shard.name}"
        try:
            end = storage.read_range(path, max(0, shard.bytes - _FOOTER_BYTES), shard.bytes)
            footer = pq.read_metadata(pa.BufferReader(end))
            place = footer.schema.names.index("user_id")
            found = [footer.row_group(group).column(place).statistics for group in range(footer.num_row_groups)]
            return min(part.min for part in found), max(part.max for part in found)
        except (OSError, ValueError, AttributeError, TypeError, pa.ArrowException):  # no statistics, or damaged
            users = read_shard(storage, interactions, number, ["user_id"]).column("user_id").to_numpy()
            return int(users.min()), int(users.max())

    def work(task: Task) -> Task:
        return {"spans": [span(number) for number in range(task["first"], task["stop"])]}

    results = run_tasks(spark, _groups(interactions), work, "graph: which users are where")
    return tuple(None if found is None else (found[0], found[1]) for result in results for found in result["spans"])


def _groups(manifest: Manifest) -> list[Task]:
    """Tasks for what takes less time of a shard than a task does: so many of them, one after the other."""
    count = len(manifest.shards)
    return [{"first": first, "stop": min(first + _GROUP_SHARDS, count)} for first in range(0, count, _GROUP_SHARDS)]


# ------------------------------------------------------------------------------------------------ report


def degree_counts(degrees: NDArray[np.integer]) -> Report:
    """A histogram of degrees that can be added to others."""
    numbers = np.bincount(kernel.degree_bins(degrees))
    bins = {str(place): int(numbers[place]) for place in np.flatnonzero(numbers)}
    return {"degrees": {"bins": bins, "edges": int(degrees.sum()), "most": int(degrees.max(initial=0))}}


def added(reports: Iterable[Report]) -> Report:
    """Sums of numbers by name, at any depth; of `most` and `latest` the largest."""
    total: Report = {}
    for report in reports:
        for name, value in report.items():
            if isinstance(value, Mapping):
                total[name] = added([total.get(name, {}), dict(value)])
            elif name in ("most", "latest"):
                total[name] = max(total.get(name, value), value)
            else:
                total[name] = total.get(name, 0) + value
    return total


def _degrees_before(spark: SparkContext, storage: Storage, dataset: Dataset) -> Report:
    """What the whole training period gives, as ingest counted it."""
    manifest = open_manifest(storage, dataset)

    def work(task: Task) -> Task:
        tables = (read_shard(storage, manifest, number, ["degree"]) for number in range(task["first"], task["stop"]))
        return added(degree_counts(table.column("degree").to_numpy()) for table in tables)

    return added(run_tasks(spark, _groups(manifest), work, f"graph: degrees of {dataset.name}"))


def describe_side(report: Report, before: Report) -> dict[str, Any]:
    """What a manifest says of one side: what became of events and edges, degrees before and after the limits."""
    events: Report = {name: report[name] for name in ("events", "duplicates", "weightless", "latest") if name in report}
    return {
        "edges": report["degrees"]["edges"], **events,
        "removed": {rule: report[rule] for rule in ("below_minimum", "above_limit")},
        "degrees": {"before": statistics(before["degrees"]), "after": statistics(report["degrees"])},
    }  # fmt: skip


def statistics(degrees: Report) -> dict[str, Any]:
    """Mean, median and 99th percentile (to an eighth above 15) of those with edges; [least degree, nodes] by bin."""
    bins = sorted((int(place), nodes) for place, nodes in degrees["bins"].items())
    histogram = [[kernel.bin_start(place), nodes] for place, nodes in bins]
    without = sum(nodes for degree, nodes in histogram if degree == 0)
    total = sum(nodes for _, nodes in histogram) - without

    def quantile(share: float) -> int:
        below = 0
        for degree, nodes in histogram:
            below += nodes if degree else 0
            if below >= share * total and degree:
                return int(degree)
        return 0

    return {
        "nodes": total + without, "without_edges": without, "mean": degrees["edges"] / max(total, 1),
        "median": quantile(0.5), "p99": quantile(0.99), "max": degrees["most"], "histogram": histogram,
    }  # fmt: skip


def summary(users: Mapping[str, Any], items: Mapping[str, Any]) -> str:
    """What became of the training events, in one line for a person, from the metadata of USER_ITEMS and ITEM_USERS."""
    found = f"graph: {users['events']:,} training events make {users['edges']:,} edges"
    if users["duplicates"]:
        found += f"; {users['duplicates']:,} repeat one"
    removed = [
        f"{side['removed'][rule]:,} of {name} {words}"
        for name, side in (("users", users), ("items", items))
        for rule, words in (("below_minimum", "below the minimum"), ("above_limit", "above the limit"))
        if side["removed"][rule]
    ]
    found += f"; removed: {', '.join(removed)}" if removed else ""
    empty = [f"{side['degrees']['after']['without_edges']:,}" for side in (users, items)]
    return f"{found}; without edges: {empty[0]} users, {empty[1]} items"
