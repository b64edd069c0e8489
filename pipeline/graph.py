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

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from pipeline import graph_kernel as kernel
from pipeline.contracts import schemas
from pipeline.contracts.config import Graph, Settings
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    Shard,
    begin,
    commit,
    finished_manifest,
    finished_shard,
    lists_to_arrow,
    open_manifest,
    read_shard,
    write_file,
    write_shard,
)
from pipeline.contracts.errors import DataError
from pipeline.contracts.schemas import Dataset, how_to_build
from pipeline.contracts.sharding import count_shards, shard_bounds, stage_seed
from pipeline.contracts.storage import Storage
from pipeline.exchange import gather, scatter
from pipeline.graph_kernel import Events, Rows
from pipeline.spark import Task, run_tasks, say

_DAY = 86_400
_FOOTER_BYTES = 1 << 16
Counts = dict[str, Any]


def run(spark: SparkSession, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Build both directions of the graph from the training interactions."""
    finished = {dataset.name: finished_manifest(storage, dataset, lineage) for dataset in schemas.GRAPH.writes}
    for dataset in schemas.GRAPH.writes:
        if finished[dataset.name] is None:
            begin(storage, dataset)
    maker = plan(spark, storage, settings)

    def step(name: str, dataset: Dataset | None, num_tasks: int, make: Callable[[int], _Made]) -> _Step:
        done = finished[dataset.name] if dataset else None
        return _Step(spark, storage, lineage, f"graph/{name}", dataset, done, num_tasks, make)

    limited, num_shards = maker.limits_items, (maker.num_user_shards, maker.num_item_shards)
    users = step("users", None if limited else schemas.USER_ITEMS, maker.num_parts, maker.users)
    edges = users.send("graph/edges", num_shards[1], "graph: edges from users to items")
    _check_any(storage, edges, users)
    items = step("items", schemas.ITEM_USERS, num_shards[1], lambda shard: maker.items(edges, shard))
    rows = users
    if limited:
        kept = items.send("graph/kept", num_shards[0], "graph: edges back to users")
        _check_any(storage, kept, users)
        rows = step("rows", schemas.USER_ITEMS, num_shards[0], lambda shard: maker.users_again(kept, shard))
    stored = {part.name: part.collect() for part in {users.name: users, items.name: items, rows.name: rows}.values()}
    before = [_degrees_before(spark, storage, dataset) for dataset in (schemas.USERS, schemas.ITEMS)]
    counted = [stored[part.name][1] for part in (users, items, rows)]
    report = {"users": maker.num_users, "items": maker.num_items, "weighted": maker.limits.has_weights}
    report |= make_report(*counted, *before)
    for dataset, part in ((schemas.ITEM_USERS, items), (schemas.USER_ITEMS, rows)):
        if finished[dataset.name] is None:
            commit(storage, dataset, stored[part.name][0], lineage, report)
    say(summary(report))
    storage.delete(schemas.GRAPH.name)


def _check_any(storage: Storage, edges: Manifest, users: _Step) -> None:
    """Raise DataError if no edge is left."""
    if edges.num_rows:
        return
    events = users.collect()[1]["events"]
    storage.delete(schemas.GRAPH.name)
    if events:
        raise DataError(
            f"the graph has no edge: its limits leave none of what {events:,} training interactions make; lower "
            "task.graph.min_user_degree or min_item_degree"
        )
    raise DataError("the graph has no edge: no training interaction is left; look at `pinsage status` and the split")


# ------------------------------------------------------------------------------------------------ steps


class _Made(NamedTuple):
    """Shards to store, what was counted, and edges to send on with the destination of each."""

    shards: list[tuple[int, pa.Table]]
    counts: Counts
    edges: pa.Table | None = None
    destinations: NDArray[np.integer] | None = None


@dataclass(frozen=True)
class _Step:
    """Tasks that each store some shards of a dataset and a note of them; the notes `name` are scratch.

    A task whose note and shards an interrupted attempt left is not done again.
    """

    spark: SparkSession
    storage: Storage
    lineage: Lineage
    name: str
    dataset: Dataset | None
    finished: Manifest | None
    num_tasks: int
    make: Callable[[int], _Made]

    def send(self, name: str, num_destinations: int, label: str) -> Manifest:
        """Do all tasks, and exchange the edges that they send on."""
        store = self._storing()

        def make(number: int) -> tuple[pa.Table, NDArray[np.integer]]:
            made = store(number)[0]
            assert made.edges is not None
            assert made.destinations is not None
            return made.edges, made.destinations

        return scatter(self.spark, self.storage, name, self.lineage, self.num_tasks, make, num_destinations, label)

    def collect(self) -> tuple[list[Shard], Counts]:
        """All shards, made where they are missing, and the sums of what was counted."""
        storage, name, lineage, dataset = self.storage, self.name, self.lineage, self.dataset
        store, is_finished = self._storing(), self.finished is not None

        def work(task: Task) -> Task:
            note = finished_shard(storage, name, f"part-{task['number']:05d}.json", lineage)
            if note is not None:
                found: Task = json.loads(storage.read_bytes(f"{name}/{note.name}"))
                names = [] if dataset is None or is_finished else [shard["name"] for shard in found["shards"]]
                if all(finished_shard(storage, dataset or "", file, lineage) for file in names):
                    return found
            return store(task["number"])[1]

        label = f"graph: {'counts' if dataset is None else dataset.name}"
        results = run_tasks(self.spark, [{"number": number} for number in range(self.num_tasks)], work, label)
        return [Shard(**shard) for result in results for shard in result["shards"]], added(r["counts"] for r in results)

    def _storing(self) -> Callable[[int], tuple[_Made, Task]]:
        storage, name, lineage, dataset, make = self.storage, self.name, self.lineage, self.dataset, self.make
        is_finished = self.finished is not None

        def store(number: int) -> tuple[_Made, Task]:
            made = make(number)
            stored = []
            if dataset is not None and not is_finished:
                stored = [asdict(write_shard(storage, dataset, shard, table, lineage)) for shard, table in made.shards]
            note: Task = {"shards": stored, "counts": made.counts}
            write_file(storage, name, f"part-{number:05d}.json", json.dumps(note).encode(), lineage)
            return made._replace(shards=[]), note

        return store


def added(counts: Iterable[Counts]) -> Counts:
    """Sums of numbers by name, at any depth; of `most` and `latest` the largest."""
    total: Counts = {}
    for count in counts:
        for name, value in count.items():
            if isinstance(value, Mapping):
                total[name] = added([total.get(name, {}), dict(value)])
            elif name in ("most", "latest"):
                total[name] = max(total.get(name, value), value)
            else:
                total[name] = total.get(name, 0) + value
    return total


# ------------------------------------------------------------------------------------------------ what a task makes


def plan(spark: SparkSession, storage: Storage, settings: Settings) -> Maker:
    """Which users and items the tasks own: a part of the users per shard of interactions, in one or more shards."""
    interactions = open_manifest(storage, schemas.INTERACTIONS)
    num_users, num_items = (open_manifest(storage, d).num_rows for d in (schemas.USERS, schemas.ITEMS))
    rows_per_shard, num_parts = settings.resources.rows_per_shard, max(1, len(interactions.shards))
    limits = settings.task.graph
    day = 1 if settings.task.data.interactions.timestamp_unit == "order" else _DAY
    return Maker(
        storage, interactions, _user_spans(spark, storage, interactions), limits, settings.task.seed,
        decay=1 / (limits.half_life_days * day) if limits.half_life_days else 0.0,
        num_users=num_users, num_items=num_items, num_parts=num_parts,
        num_user_shards=num_parts * -(-count_shards(num_users, rows_per_shard) // num_parts),
        num_item_shards=count_shards(num_items, rows_per_shard),
    )  # fmt: skip


@dataclass(frozen=True)
class Maker:
    """Makes rows and edges of any part or shard. spans are the first and last user of every shard of interactions."""

    storage: Storage
    interactions: Manifest
    spans: tuple[tuple[int, int] | None, ...]
    limits: Graph
    seed: int
    decay: float
    num_users: int
    num_items: int
    num_parts: int
    num_user_shards: int
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

    def users(self, part: int) -> _Made:
        """The rows of a part's users from their events, and all their edges by the shard of their item."""
        limits, (start, stop) = self.limits, shard_bounds(self.num_users, self.num_parts, part)
        events = self._events(start, stop)
        rows, merged = kernel.merge_events(events, start, stop, self.num_items, limits.has_weights, self.decay)
        if merged.bad_row >= 0:
            user, item, weight = (column[merged.bad_row] for column in (events.users, events.items, events.weights))
            raise DataError(
                f"interactions: user {user}, item {item}, weight {weight}: expected an item below {self.num_items:,} "
                f"and a finite weight above 0; {how_to_build('interactions', 'again')}"
            )
        counts = {"events": merged.used, "duplicates": merged.used - len(rows.ids), "weightless": merged.weightless}
        if self.decay and len(rows.times):
            counts["latest"] = int(rows.times.max())
        rows, too_few, too_many = kernel.limit_rows(
            rows, start, limits.min_user_degree, limits.max_user_degree, self._drawn("users"), by_user=True
        )
        counts |= {"below_minimum": too_few, "above_limit": too_many}
        each = self.num_user_shards // self.num_parts
        shards = range(part * each, (part + 1) * each)
        stored = [] if self.limits_items else self._user_items(rows, start, shards)
        if not self.limits_items:
            counts |= degree_counts(rows.degrees)
        owners, edges, destinations = kernel.to_shards(rows, start, self.num_items, self.num_item_shards)
        return _Made(stored, counts, self._table(owners, edges.ids, edges), destinations)

    def items(self, edges: Manifest, shard: int) -> _Made:
        """The rows of a shard's items from the edges sent there; and those that limits leave, by their user's shard."""
        limits, (start, stop) = self.limits, shard_bounds(self.num_items, self.num_item_shards, shard)
        rows = self._gathered(edges, shard, "item", "user", start, stop)
        rows, too_few, too_many = kernel.limit_rows(
            rows, start, limits.min_item_degree, limits.max_item_degree, self._drawn("items"), by_user=False
        )
        counts = {"below_minimum": too_few, "above_limit": too_many, **degree_counts(rows.degrees)}
        stored = [(shard, self._adjacency(rows, start))]
        if not self.limits_items:
            return _Made(stored, counts)
        owners, back, destinations = kernel.to_shards(rows, start, self.num_users, self.num_user_shards)
        return _Made(stored, counts, self._table(back.ids, owners, back), destinations)

    def users_again(self, kept: Manifest, shard: int) -> _Made:
        """The rows of a shard's users from the edges that the items' limits left."""
        start, stop = shard_bounds(self.num_users, self.num_user_shards, shard)
        rows = self._gathered(kept, shard, "user", "item", start, stop)
        return _Made(self._user_items(rows, start, range(shard, shard + 1)), degree_counts(rows.degrees))

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

    def _user_items(self, rows: Rows, start: int, shards: range) -> list[tuple[int, pa.Table]]:
        """Shards of USER_ITEMS from their rows, which it shuffles."""
        kernel.shuffle_rows(rows, start, stage_seed(self.seed, "graph order"))
        found = []
        for shard in shards:
            first, last = shard_bounds(self.num_users, self.num_user_shards, shard)
            found.append((shard, self._adjacency(rows.part(first - start, last - start), first)))
        return found

    def _adjacency(self, rows: Rows, start: int) -> pa.Table:
        weighted = self.limits.has_weights
        shares = kernel.running_shares(rows, self.decay) if weighted else np.zeros(0, np.uint32)
        columns = [
            pa.array(np.arange(start, start + len(rows.indptr) - 1), pa.uint32()),
            lists_to_arrow(rows.indptr, rows.ids),
            lists_to_arrow(rows.indptr if weighted else np.zeros_like(rows.indptr), shares),
        ]
        return pa.table(columns, schema=schemas.ITEM_USERS.arrow)


def _user_spans(spark: SparkSession, storage: Storage, interactions: Manifest) -> tuple[tuple[int, int] | None, ...]:
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

    tasks = [
        {"first": first, "stop": min(first + 32, len(interactions.shards))}
        for first in range(0, len(interactions.shards), 32)
    ]
    results = run_tasks(spark, tasks, work, "graph: which users are where")
    return tuple(None if found is None else (found[0], found[1]) for result in results for found in result["spans"])


# ------------------------------------------------------------------------------------------------ report


def degree_counts(degrees: NDArray[np.integer]) -> Counts:
    """A histogram of degrees that can be added to others."""
    numbers = np.bincount(kernel.degree_bins(degrees))
    bins = {str(place): int(numbers[place]) for place in np.flatnonzero(numbers)}
    return {"degrees": {"bins": bins, "edges": int(degrees.sum()), "most": int(degrees.max(initial=0))}}


def _degrees_before(spark: SparkSession, storage: Storage, dataset: Dataset) -> Counts:
    """What the whole training period gives, as ingest counted it."""
    manifest = open_manifest(storage, dataset)

    def work(task: Task) -> Task:
        return degree_counts(read_shard(storage, manifest, task["shard"], ["degree"]).column("degree").to_numpy())

    tasks = [{"shard": number} for number in range(len(manifest.shards))]
    return added(run_tasks(spark, tasks, work, f"graph: degrees of {dataset.name}"))


def make_report(users: Counts, items: Counts, rows: Counts, users_before: Counts, items_before: Counts) -> Counts:
    """What became of the events, and the degrees of both sides before and after the limits."""
    names = {"below_minimum": "{}s_below_minimum", "above_limit": "{}s_above_limit"}
    report = {name: users[name] for name in ("events", "duplicates", "weightless")}
    if "latest" in users:
        report["latest_event"] = users["latest"]
    report["edges"] = rows["degrees"]["edges"]
    report["removed"] = {
        names[rule].format(side): counts[rule] for side, counts in (("user", users), ("item", items)) for rule in names
    }
    report["degrees"] = {
        side: {"before": statistics(before["degrees"]), "after": statistics(after["degrees"])}
        for side, before, after in (("users", users_before, rows), ("items", items_before, items))
    }
    return report


def statistics(degrees: Counts) -> Counts:
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


def summary(report: Counts) -> str:
    """What became of the training events, in one line for a person."""
    found = f"graph: {report['events']:,} training events make {report['edges']:,} edges"
    if report["duplicates"]:
        found += f"; {report['duplicates']:,} repeat one"
    rules = {
        "users_below_minimum": "of users below the minimum", "users_above_limit": "of users above the limit",
        "items_below_minimum": "of items below the minimum", "items_above_limit": "of items above the limit",
    }  # fmt: skip
    removed = [f"{report['removed'][rule]:,} {words}" for rule, words in rules.items() if report["removed"][rule]]
    found += f"; removed: {', '.join(removed)}" if removed else ""
    after = {side: report["degrees"][side]["after"]["without_edges"] for side in ("users", "items")}
    return f"{found}; without edges: {after['users']:,} users, {after['items']:,} items"
