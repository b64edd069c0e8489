"""Raw files to clean interactions, users, items and content, all with dense ids.

Reads the user's files; writes INTERACTIONS, USERS, ITEMS, CONTENT and QUARANTINE. The files are read twice, which costs
less than keeping a copy: first for what is bad in them and for their keys, which are sorted by hash, a range of hashes
per task, so that an id is the rank of its key's hash; then to send every event, as ids, to the shard of its user. Where
the files are what came since an earlier run (task.data.append), that run's events are sent along as they are. Rows
pass between tasks as blocks of columns (exchange.py), not through Spark. Memory: one piece of a file, one range of keys
or one shard per task, beside the sorted hashes, which the tasks of a host map together; on the driver only counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark import SparkContext

from pipeline import event_kernel, sources
from pipeline import keys as kernel
from pipeline.contracts import schemas
from pipeline.contracts.config import Data, Settings
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    Shard,
    begin,
    commit,
    finished_manifest,
    open_manifest,
    read_rows,
    read_shard,
    write_shard,
)
from pipeline.contracts.errors import DataError
from pipeline.contracts.replica import forget
from pipeline.contracts.schemas import Dataset
from pipeline.contracts.sharding import MAX_IDS, count_shards, shard_bounds, shard_of
from pipeline.contracts.storage import Storage, describe_inputs
from pipeline.exchange import gather
from pipeline.keys import Keys, KeyTable
from pipeline.spark import Task, say
from pipeline.steps import Blocks, Output, Report, run_step

TRAIN, VALIDATION, TEST = schemas.TRAIN_SPLIT, schemas.VALIDATION_SPLIT, schemas.TEST_SPLIT
SCRATCH = "ingest"
EVENTS_BAD, CATALOGUE_BAD = f"{SCRATCH}/events-quarantine", f"{SCRATCH}/catalogue-quarantine"
_CHANGED = "a file of task.data changed while it was being read; run again, when nobody writes there"
_SHOWN_REPEATED = 10_000
_COUNTED_REASONS = 10_000
"""Reasons may name keys: their summary stops growing here."""
_EXAMPLES = 5


def inputs(data: Data) -> dict[str, str]:
    """What ingest reads besides settings: the user's files by size and time stamp, and the ids of an earlier run.

    Raises DataError if a path names nothing.
    """
    found = {}
    for name, source in (("interactions", data.interactions), ("items", data.items)):
        for place, path in enumerate(() if source is None else source.paths):
            try:
                files = describe_inputs(path)
            except FileNotFoundError:
                raise DataError(f"{path}: there is no such file; correct task.data.{name}.paths") from None
            for number, file in enumerate(files):
                found[f"{name} path {place} file {number}"] = f"{file['bytes']} bytes, {file['stamp']}"
    if data.previous is not None:
        earlier = Storage(data.previous)
        read = (schemas.USERS, schemas.ITEMS, *([schemas.INTERACTIONS] if data.append else []))
        found |= {f"previous {d.name}": open_manifest(earlier, d).content for d in read}
    return found


def run(spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Read, clean, number, split and store everything that later stages need of the user's files."""
    work = _Work(spark, storage, lineage, settings)
    catalogue = _read_catalogue(work)
    seen = _read_events(work)
    _set_aside(work, catalogue, seen)
    users, items = _number(work, "user", schemas.USERS), _number(work, "item", schemas.ITEMS)
    unknown = _report_unknown(work, seen, items)
    if work.split.kind == "temporal" and seen.first == seen.last:
        raise DataError(
            f"all interactions have the timestamp {seen.first}: a temporal split needs time; check "
            "task.data.interactions.timestamp, or set task.split.kind to leave_last_out or random"
        )
    for side in (users, items):
        _place(work, side)
    _send_events(work, seen, users, items)
    if catalogue is not None:
        _send_content(work, items)
    if inputs(work.data) != lineage.inputs:
        raise DataError(_CHANGED)
    for dataset in schemas.INGEST.writes:
        if dataset is not schemas.QUARANTINE and finished_manifest(storage, dataset, lineage) is None:
            begin(storage, dataset)
    report = _write_interactions(work, seen, users, items, {"bad_items": catalogue or 0, **unknown})
    _write_users(work, users)
    _write_items(work, items)
    say(summary(report, users.count, items.count))
    storage.delete(SCRATCH)
    for side in (users, items):
        forget(storage, side.table, work.cache)
    forget(storage, f"{SCRATCH}/listed", work.cache)


@dataclass(frozen=True)
class _Seen:
    """What the first reading of the events found, over all pieces."""

    rows: int  # clean, of known items or not
    bad: int
    weightless: int
    known: int  # rows of items that the catalogue has, or that are added
    unknown: int
    first: int
    last: int
    kept: int = 0  # of an earlier run, whose first and last are counted in

    @property
    def total(self) -> int:
        """All rows that were read."""
        return self.rows + self.weightless + self.bad


@dataclass(frozen=True)
class _Side:
    """Users or items: how many there are, how many of them an earlier run had, and where the sorted keys are.

    table is the scratch dataset of KeyTable. offsets has, for each range of hashes, the first id of its new keys.
    """

    name: str
    dataset: Dataset
    count: int
    earlier: int
    present: int  # of tonight's input
    table: str
    offsets: tuple[int, ...]
    num_shards: int


class _Work:
    """What every step needs; tasks take it along, without Spark."""

    def __init__(self, spark: SparkContext, storage: Storage, lineage: Lineage, settings: Settings) -> None:
        self._spark: SparkContext | None = spark
        self.storage, self.lineage, self.cache = storage, lineage, settings.resources.cache
        self.data, self.split, self.seed = settings.task.data, settings.task.split, settings.task.seed
        self.rows_per_shard = settings.resources.rows_per_shard
        self.events_per_shard = settings.resources.events_per_shard
        self.events_plan = sources.plan_interactions(self.data.interactions, self.events_per_shard)
        self.items_plan = [] if self.data.items is None else sources.plan_items(self.data.items, self.rows_per_shard)
        self.earlier = None if self.data.previous is None else Storage(self.data.previous)
        self.kept = None
        if self.data.append and self.earlier is not None:
            self.kept = open_manifest(self.earlier, schemas.INTERACTIONS)
        self.integers = {side: self._are_integers(side) for side in ("user", "item")}
        rows = sum(task["rows"] for task in self.items_plan or self.events_plan)
        self.num_ranges = {
            "item": kernel.count_ranges(rows), "user": kernel.count_ranges(sum(t["rows"] for t in self.events_plan))
        }  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spark": None}

    def _are_integers(self, side: str) -> bool:
        """Whether every key of the side, tonight's and earlier, is sure to be an integer: then none need be text."""
        column = getattr(self.data.interactions, side)
        found = all(column in task["integers"] for task in self.events_plan)
        if side == "item" and self.data.items is not None:
            found &= all(self.data.items.key in task["integers"] for task in self.items_plan)
        if self.earlier is not None:
            found &= bool(open_manifest(self.earlier, _dataset(side)).metadata.get("integer_keys"))
        return found

    def run(
        self, step: str, tasks: Sequence[Task], outputs: Sequence[Output],
        make: Callable[[Task], tuple[Sequence[pa.Table | Blocks], Report]], label: str,
    ) -> list[Report]:  # fmt: skip
        """Run a step of the stage, or take what it reported when it ran."""
        assert self._spark is not None
        name = f"{SCRATCH}/{step}"
        return run_step(self._spark, self.storage, self.lineage, name, tasks, outputs, make, f"ingest: {label}")

    def open(self, name: str) -> Manifest:
        """The manifest of a scratch dataset."""
        return open_manifest(self.storage, f"{SCRATCH}/{name}")

    def keys(self, side: str, name: str, number: int, *more: pa.Field) -> tuple[Keys, pa.Table]:
        """Keys, and the columns beside them, that were sent to a range of hashes."""
        schema = pa.schema([kernel.column(self.integers[side]), *more])
        table = gather(self.storage, self.open(name), number, schema)
        return kernel.from_table(table), table

    def events(self, task: Task) -> tuple[pa.Table, pa.Table, int]:
        """One piece of the interactions, as read_interactions gives it."""
        integers = [side for side, are in self.integers.items() if are]
        return sources.read_interactions(task, self.data.interactions, integers)

    def items(self, task: Task) -> tuple[pa.Table, pa.Table]:
        """One piece of the catalogue, as read_items gives it."""
        assert self.data.items is not None
        return sources.read_items(task, self.data.items, self.integers["item"])

    def by_range(self, side: str, keys: Keys, **more: Any) -> Blocks:
        """Keys, in the order of hashes or not, on their way to their ranges of hashes."""
        places = kernel.range_of(keys.hashes, self.num_ranges[side]).astype(np.uint16)
        return pa.table({**keys.columns, **more}), places


def _dataset(side: str) -> Dataset:
    return schemas.USERS if side == "user" else schemas.ITEMS


def _scratch(name: str, destinations: int = 0) -> Output:
    return Output(f"{SCRATCH}/{name}", destinations)


def _ranges(count: int) -> list[Task]:
    return [{"range": number} for number in range(count)]


# ------------------------------------------------------------------------------------------------ reading


_POSITION, _COUNT = pa.field("position", pa.int64()), pa.field("count", pa.int64())


def _read_catalogue(work: _Work) -> int | None:
    """Find the catalogue's bad rows and its keys; returns how many rows are bad or repeat a key, None without one."""
    if not work.items_plan:
        return None
    num_ranges = work.num_ranges["item"]

    def read(task: Task) -> tuple[Sequence[pa.Table | Blocks], Report]:
        good, bad = work.items(task)
        blocks = work.by_range("item", kernel.hashed(good.column("item_key")), position=good.column("position"))
        return (bad, blocks), {"rows": good.num_rows, "bad": bad.num_rows}

    def list_keys(task: Task) -> tuple[Sequence[pa.Table], Report]:
        keys, rows = work.keys("item", "catalogue-keys", task["range"], _POSITION)
        positions = rows.column("position").to_numpy()
        order, starts = kernel.grouped(keys)
        sizes = np.diff(np.append(starts, len(order)))
        later = np.ones(len(order), dtype=bool)
        later[starts] = False
        again = order[later]
        firsts = positions[np.repeat(order[starts], sizes)[later]]
        kept = np.argsort(positions[again])[:_SHOWN_REPEATED]
        repeated = pa.table(
            {"position": positions[again][kept], "first": firsts[kept], "key": keys.take(again[kept]).shown}
        )
        listed = keys.take(order[starts])
        some = listed.take(np.arange(min(3, len(listed)))).shown.to_pylist()
        return (kernel.table_of(listed), repeated), {"repeated": int(later.sum()), "some": some}

    outputs = (Output(CATALOGUE_BAD), _scratch("catalogue-keys", num_ranges))
    found = work.run("catalogue", work.items_plan, outputs, read, "read items")
    listing = Output(f"{SCRATCH}/listed", describe=lambda _: {"columns": _columns(work, "item")})
    repeats = work.run(
        "catalogue-listed", _ranges(num_ranges), (listing, _scratch("repeated")), list_keys, "list items"
    )
    return sum(int(report["bad"]) for report in found) + sum(int(report["repeated"]) for report in repeats)


def _read_events(work: _Work) -> _Seen:
    """Find the events' bad rows and their keys. With a catalogue, items are looked up at once."""
    adds = work.data.items is None or work.data.unknown_items == "add"
    listed = work.open("listed") if work.items_plan else None

    def read(task: Task) -> tuple[Sequence[pa.Table | Blocks], Report]:
        good, bad, weightless = work.events(task)
        users, items = (kernel.hashed(good.column(name)) for name in ("user_key", "item_key"))
        moments = good.column("timestamp").to_numpy()
        report = {"rows": good.num_rows, "bad": bad.num_rows, "weightless": weightless, "unknown": 0}
        if listed is None:
            item_blocks = work.by_range("item", kernel.distinct(items))
        else:
            known = KeyTable.open(work.storage, listed, work.cache).find(items) >= 0
            strangers, counts = kernel.counted(items.take(np.flatnonzero(~known)))
            item_blocks = work.by_range("item", strangers, count=counts)
            report["unknown"] = int(counts.sum())
            if not adds and not known.all():
                users, moments = users.take(np.flatnonzero(known)), moments[known]
        report |= {"known": len(users)}
        if len(moments):
            report |= {"first": int(moments.min()), "last": int(moments.max())}
        return (bad, work.by_range("user", kernel.distinct(users)), item_blocks), report

    outputs = (
        Output(EVENTS_BAD),
        _scratch("user-keys", work.num_ranges["user"]),
        _scratch("item-keys", work.num_ranges["item"]),
    )
    found = work.run("events-read", work.events_plan, outputs, read, "read interactions")
    totals = {name: sum(report[name] for report in found) for name in ("rows", "bad", "weightless", "known", "unknown")}
    first = min((report["first"] for report in found if "first" in report), default=0)
    last = max((report["last"] for report in found if "last" in report), default=0)
    if work.kept is not None:
        told = work.kept.metadata
        first = min(first, told["first"]) if totals["known"] else told["first"]
        last = max(last, told["last"])
    return _Seen(**totals, first=first, last=last, kept=0 if work.kept is None else work.kept.num_rows)


# ------------------------------------------------------------------------------------------------ bad rows


def _set_aside(work: _Work, catalogue: int | None, seen: _Seen) -> None:
    """Publish the bad rows; raise DataError if they are more than their share, or if nothing else is left."""
    quarantine = _store_quarantine(work, catalogue is not None)
    found = [] if catalogue is None else work.open("catalogue").metadata["reports"]
    num_items = sum(report["rows"] + report["bad"] for report in found)
    for kind, plan, num_bad, all_rows in (
        ("interactions", work.events_plan, seen.bad, seen.total),
        ("items", work.items_plan, catalogue or 0, num_items),
    ):
        _check_share(work.storage, quarantine, kind, plan, num_bad, all_rows, work.data.max_quarantined_share)
    if not seen.rows and work.events_plan:
        raise DataError(f"{', '.join(work.data.interactions.paths)}: no interaction is left to learn from")


def _store_quarantine(work: _Work, has_catalogue: bool) -> Manifest:
    """Commit all bad rows as one dataset, a shard per piece that has any, with the commonest reasons."""
    storage, lineage = work.storage, work.lineage
    tables = [_bad_rows(storage, EVENTS_BAD)]
    repeated = schemas.QUARANTINE.arrow.empty_table()
    if has_catalogue:
        tables += [_bad_rows(storage, CATALOGUE_BAD)]
        repeated = _repeated_items(work)
    begin(storage, schemas.QUARANTINE)
    reasons: Counter[str] = Counter()
    shards: list[Shard] = []
    for table in chain(*tables, [repeated]):
        if table.num_rows or (table is repeated and not shards):
            if len(reasons) < _COUNTED_REASONS:
                reasons.update(table.column("reason").to_pylist())
            shards.append(write_shard(storage, schemas.QUARANTINE, len(shards), table, lineage))
    commonest = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:20]
    metadata = {"reasons": [{"reason": reason, "rows": rows} for reason, rows in commonest]}
    return commit(storage, schemas.QUARANTINE, shards, lineage, metadata)


def _repeated_items(work: _Work) -> pa.Table:
    """Quarantine rows for the first catalogue rows that have the key of an earlier row."""
    manifest = work.open("repeated")
    found = None
    for number, shard in enumerate(manifest.shards):
        if shard.rows or found is None:
            rows = read_shard(work.storage, manifest, number)
            found = rows if found is None else pa.concat_tables([found, rows])
            found = found.sort_by("position").slice(0, _SHOWN_REPEATED)
    urls = {sources.file_of(task["position"]): task["url"] for task in work.items_plan}
    lines = []
    for row in () if found is None else found.to_pylist():
        key, first = row["key"], f"row {sources.row_of(row['first'])} of {urls[sources.file_of(row['first'])]}"
        reason = f"item key {key!r} is already in {first}; keys must be unique"
        source, number = urls[sources.file_of(row["position"])], sources.row_of(row["position"])
        lines.append({"source": source, "row": number, "reason": reason, "values": key})
    return pa.Table.from_pylist(lines, schema=schemas.QUARANTINE.arrow)


def _bad_rows(storage: Storage, name: str) -> Iterator[pa.Table]:
    manifest = open_manifest(storage, name)
    return (read_shard(storage, manifest, number) for number, shard in enumerate(manifest.shards) if shard.rows)


def _check_share(
    storage: Storage, quarantine: Manifest, kind: str, plan: Sequence[Task], num_bad: int, total: int, most: float
) -> None:
    """Raise DataError if more than the share of one kind of input is bad, or if there are no interactions at all."""
    urls = {task["url"] for task in plan}
    if plan and not total and kind == "interactions":
        raise DataError(f"{', '.join(sorted(urls))}: no rows; give files that hold interactions")
    if num_bad <= most * total:
        return
    lines: list[str] = []
    for number in range(len(quarantine.shards)):
        rows = read_shard(storage, quarantine, number, ["source", "row", "reason"]).slice(0, 1000).to_pylist()
        lines += [f"  {row['source']} row {row['row']}: {row['reason']}" for row in rows if row["source"] in urls]
        if len(lines) >= 5:
            break
    raise DataError(
        f"{num_bad:,} of {total:,} rows of {kind} are bad, more than task.data.max_quarantined_share ({most:.2%}) "
        "allows; the first:\n" + "\n".join(lines[:5]) + "\n"
        f"  all of them, with reasons: {storage.locate(schemas.QUARANTINE.name)}; mend the files or raise the share"
    )


# ------------------------------------------------------------------------------------------------ ids


def _number(work: _Work, name: str, dataset: Dataset) -> _Side:
    """Sort the side's keys by hash, a range per task, with those of an earlier run, whose ids they keep."""
    num_ranges = work.num_ranges[name]
    earlier = 0 if work.earlier is None else _send_earlier(work, name, dataset)
    listed = work.open("listed") if name == "item" and work.items_plan else None
    adds = work.data.unknown_items == "add"

    def number(task: Task) -> tuple[Sequence[pa.Table], Report]:
        report: Report = {}
        if listed is None:
            tonight = kernel.distinct(work.keys(name, f"{name}-keys", task["range"])[0])
        else:
            tonight = kernel.keys_of(read_shard(work.storage, listed, task["range"]))
            found, rows = work.keys(name, f"{name}-keys", task["range"], _COUNT)
            strangers, counts = kernel.counted(found, rows.column("count").to_numpy())
            report = {"strangers": len(strangers), "examples": kernel.commonest(strangers, counts, _EXAMPLES)}
            if adds:
                tonight = kernel.distinct(kernel.concatenated([tonight, strangers]))
        if not earlier:
            return [kernel.table_of(tonight)], {**report, "new": len(tonight), "present": len(tonight)}
        former, rows = work.keys(name, f"{name}-earlier", task["range"], pa.field("id", pa.int64()))
        both, known, present = kernel.united(former, rows.column("id").to_numpy(), tonight)
        report |= {"new": int((known < 0).sum()), "present": int(np.count_nonzero(present))}
        return [kernel.table_of(both, known=known, present=present)], report

    keys = Output(f"{SCRATCH}/{name}-table", describe=lambda _: {"columns": _columns(work, name)})
    reports = work.run(f"{name}-numbers", _ranges(num_ranges), [keys], number, f"number {dataset.name}")
    new = [report["new"] for report in reports]
    total = earlier + sum(new)
    check_ids(total, dataset)
    for done in (f"{name}-keys", f"{name}-earlier"):
        work.storage.delete(f"{SCRATCH}/{done}")
    offsets = earlier + np.concatenate([[0], np.cumsum(new[:-1], dtype=np.int64)])
    table = f"{SCRATCH}/{name}-ids" if earlier else f"{SCRATCH}/{name}-table"
    num_shards = count_shards(total, work.rows_per_shard)
    present = sum(report["present"] for report in reports) if listed is not None or work.kept is None else total
    return _Side(name, dataset, total, earlier, present, table, tuple(offsets.astype(int).tolist()), num_shards)


def check_ids(total: int, dataset: Dataset) -> None:
    """Raise DataError for more ids than 32 bits can tell apart."""
    if total > MAX_IDS:
        raise DataError(
            f"{total:,} {dataset.name}: ids are 32-bit (half the memory of every graph and neighbour table), so "
            f"at most {MAX_IDS:,} fit; split the catalogue or drop {dataset.name} that are never used"
        )


def _columns(work: _Work, side: str) -> list[str]:
    return ["hash"] if work.integers[side] else ["hash", "check", "key"]


def _send_earlier(work: _Work, name: str, dataset: Dataset) -> int:
    """Send an earlier run's keys and ids to their ranges of hashes; returns how many there are."""
    earlier = work.earlier
    assert earlier is not None
    manifest = open_manifest(earlier, dataset)

    def send(task: Task) -> tuple[Sequence[Blocks], Report]:
        rows = read_shard(earlier, manifest, task["shard"], ["key", "id"])
        texts = rows.column("key")
        keys = kernel.hashed(texts.cast(pa.int64()) if work.integers[name] else texts)
        return [work.by_range(name, keys, id=rows.column("id").cast(pa.int64()))], {}

    shards: list[Task] = [{"shard": number} for number in range(len(manifest.shards))]
    output = _scratch(f"{name}-earlier", work.num_ranges[name])
    work.run(f"{name}-earlier-sent", shards, [output], send, f"read earlier {dataset.name}")
    return manifest.num_rows


def _place(work: _Work, side: _Side) -> None:
    """Send every key with its id to its shard of the side's dataset, and store ids to look up unless rows are ids."""
    manifest = work.open(f"{side.name}-table")

    def place(task: Task) -> tuple[Sequence[pa.Table | Blocks], Report]:
        table = read_shard(work.storage, manifest, task["range"])
        keys, offset = kernel.keys_of(table), side.offsets[task["range"]]
        if not side.earlier:
            ids = np.arange(offset, offset + len(keys))
        else:
            known = table.column("known").to_numpy()
            ids = np.where(known < 0, offset + np.cumsum(known < 0) - 1, known)
        blocks = (
            pa.table({"key": keys.outside, "id": ids.astype(np.uint32)}),
            shard_of(ids, side.count, side.num_shards),
        )
        if not side.earlier:
            return [blocks], {}
        there = np.flatnonzero(table.column("present").to_numpy())
        return [blocks, kernel.table_of(keys.take(there), id=ids[there].astype(np.uint32))], {}

    columns = [*_columns(work, side.name), "id"]
    lookup = [Output(side.table, describe=lambda _: {"columns": columns})] if side.earlier else []
    placed = _scratch(f"{side.name}-placed", side.num_shards)
    label = f"place {side.dataset.name}"
    work.run(f"{side.name}-places", _ranges(len(side.offsets)), [placed, *lookup], place, label)


def _report_unknown(work: _Work, seen: _Seen, items: _Side) -> dict[str, Any]:
    """What is to be said of items that the catalogue lacks; DataError if those are all."""
    if not work.items_plan:
        return {"unknown_items": 0, "events_of_unknown_items": 0}
    found = work.open(f"{items.name}-numbers").metadata["reports"]
    ranked = sorted((-count, key) for report in found for count, key in report["examples"])
    examples = [key for _, key in ranked[:_EXAMPLES]]
    if not seen.known and work.events_plan:
        listing = work.open("catalogue-listed").metadata["reports"]
        some = [key for report in listing for key in report["some"]][:3]
        raise DataError(
            f"no interaction names an item of the catalogue: interactions have keys such as {examples[:3]}, the "
            f"catalogue has {some}; check task.data.items.key and task.data.interactions.item"
        )
    return {
        "unknown_items": sum(report["strangers"] for report in found),
        "events_of_unknown_items": seen.unknown,
        "unknown_item_examples": examples,
    }


# ------------------------------------------------------------------------------------------------ events


def _events_schema(work: _Work) -> pa.Schema:
    """An event on its way to its user's shard. Files and rows keep their order, so it need not say its place."""
    fields = [("user_id", pa.uint32()), ("item_id", pa.uint32()), ("timestamp", pa.int64()), ("weight", pa.float32())]
    return pa.schema(fields + ([("split", pa.uint8())] if work.split.kind == "random" else []))


def _num_event_shards(work: _Work, seen: _Seen, users: _Side) -> int:
    return min(count_shards(seen.rows + seen.kept, work.events_per_shard), users.count)


def _send_events(work: _Work, seen: _Seen, users: _Side, items: _Side) -> None:
    """Read the events again, and send them under their ids to the shards of their users."""
    num_shards = _num_event_shards(work, seen, users)
    user_table, item_table = (open_manifest(work.storage, side.table) for side in (users, items))
    schema, drops = _events_schema(work), work.data.unknown_items == "drop" and bool(work.items_plan)

    def sent(columns: dict[str, Any]) -> tuple[Sequence[pa.Table | Blocks], Report]:
        counts = np.zeros(0, np.int64)
        if work.split.kind == "temporal":
            counts = event_kernel.bucket_counts(columns["timestamp"], seen.first, seen.last)
        filled = np.flatnonzero(counts)
        blocks = pa.table(columns, schema=schema), shard_of(columns["user_id"], users.count, num_shards)
        return (blocks, pa.table({"bucket": filled, "count": counts[filled]})), {}

    def send(task: Task) -> tuple[Sequence[pa.Table | Blocks], Report]:
        if "kept" in task:
            assert work.earlier is not None
            assert work.kept is not None
            rows = read_shard(work.earlier, work.kept, task["kept"], schema.names)
            return sent({name: rows.column(name).to_numpy() for name in schema.names})
        good, _, _ = work.events(task)
        item_ids = KeyTable.open(work.storage, item_table, work.cache).find(kernel.hashed(good.column("item_key")))
        if drops and (item_ids < 0).any():
            good, item_ids = good.filter(pa.array(item_ids >= 0)), item_ids[item_ids >= 0]
        user_ids = KeyTable.open(work.storage, user_table, work.cache).find(kernel.hashed(good.column("user_key")))
        moments = good.column("timestamp").to_numpy()
        within = not len(moments) or (moments.min() >= seen.first and moments.max() <= seen.last)
        if not within or (item_ids < 0).any() or (user_ids < 0).any():
            raise DataError(f"{task['url']}: {_CHANGED}")
        columns: dict[str, Any] = {
            "user_id": user_ids.astype(np.uint32), "item_id": item_ids.astype(np.uint32), "timestamp": moments,
            "weight": good.column("weight"),
        }  # fmt: skip
        if work.split.kind == "random":
            columns["split"] = event_kernel.split_at_random(good.column("position").to_numpy(), work.split, work.seed)
        return sent(columns)

    outputs = (_scratch("events", num_shards), _scratch("moments"))
    kept: list[Task] = [{"kept": number} for number in range(0 if work.kept is None else len(work.kept.shards))]
    work.run("events-sent", [*kept, *work.events_plan], outputs, send, "number interactions")


def _moments(work: _Work, seen: _Seen) -> tuple[int, int]:
    manifest = work.open("moments")
    counts = np.zeros(event_kernel.NUM_BUCKETS, np.int64)
    for number in range(len(manifest.shards)):
        rows = read_shard(work.storage, manifest, number)
        counts[rows.column("bucket").to_numpy()] += rows.column("count").to_numpy()
    return event_kernel.moments(seen.first, seen.last, counts, work.split)


_DAYS = ("day", "events", "users", "repeats", "digest")
_DAYS_KEPT = 400


def _daily(work: _Work) -> dict[str, Any]:
    """The last days that have events, as INTERACTIONS' metadata: what a gate compares nights by."""
    found: dict[int, list[int]] = {}
    manifest = work.open("days")
    for number in range(len(manifest.shards)):
        rows = read_shard(work.storage, manifest, number)
        for day, *counts in zip(*(rows.column(name).to_pylist() for name in _DAYS), strict=True):
            found[day] = [one + other for one, other in zip(found.get(day, [0] * len(counts)), counts, strict=True)]
        found = {day: found[day] for day in sorted(found)[-_DAYS_KEPT:]}
    days = [[day, *counts[:-1], f"{counts[-1] % 2**64:016x}"] for day, counts in sorted(found.items())]
    return {"days": {"columns": list(_DAYS), "rows": days}}


_DEGREES = pa.schema([("id", pa.uint32()), ("count", pa.uint32()), ("first", pa.int64())])


def _write_interactions(work: _Work, seen: _Seen, users: _Side, items: _Side, said: dict[str, Any]) -> dict[str, Any]:
    """Write the shards of events, each with its users' degrees, and send its items' degrees to their shards."""
    num_shards, schema, split = _num_event_shards(work, seen, users), _events_schema(work), work.split
    before = {} if work.kept is None else work.kept.metadata
    report: dict[str, Any] = {
        "read": seen.total + before.get("read", 0), "bad": seen.bad + before.get("bad", 0), "kept": seen.kept,
        "weightless": seen.weightless + before.get("weightless", 0), **said,
        "split": split.kind, "first": seen.first, "last": seen.last,
    }  # fmt: skip
    has_clock = work.data.interactions.timestamp_unit != "order"
    first_held = (0, 0)
    if split.kind == "temporal":
        first_held = _moments(work, seen)
        report |= {"validation_from": first_held[0], "test_from": first_held[1]}

    def write(task: Task) -> tuple[Sequence[pa.Table | Blocks], Report]:
        sent = gather(work.storage, work.open("events"), task["range"], schema)
        order = event_kernel.user_order(sent.column("user_id").to_numpy(), sent.column("timestamp").to_numpy())
        columns = {name: sent.column(name).to_numpy()[order] for name in schema.names}
        repeats = 0
        if work.data.drop_repeats:
            first = event_kernel.firsts(columns["user_id"], columns["item_id"], columns["timestamp"])
            repeats = len(first) - int(first.sum())
            columns = {name: values[first] for name, values in columns.items()}
        if split.kind == "temporal":
            columns["split"] = event_kernel.split_by_time(columns["timestamp"], *first_held)
        elif split.kind == "leave_last_out":
            held = int(split.validation), int(split.test)
            columns["split"] = event_kernel.split_last_out(columns["user_id"], *held)
        learns = np.flatnonzero(columns["split"] == TRAIN)
        training = [columns[name][learns] for name in ("user_id", "item_id", "timestamp")]
        start, stop = shard_bounds(users.count, num_shards, task["range"])
        degree, first_seen, ids, counts, firsts = event_kernel.degrees(
            training[0], training[1], training[2], start, stop
        )
        rows = pa.table({"id": ids, "count": counts.astype(np.uint32), "first": firsts}, schema=_DEGREES)
        marks = np.bincount(columns["split"], minlength=3).tolist()
        by_day = event_kernel.daily(*(columns[name] for name in ("user_id", "item_id", "timestamp")))
        return (
            pa.table(dict(zip(_DAYS, by_day, strict=True))).slice(0, None if has_clock else 0),
            pa.table(columns).select(schemas.INTERACTIONS.arrow.names),
            pa.table({"degree": degree, "first_seen": first_seen}),
            (rows, shard_of(ids, items.count, items.num_shards)),
        ), {"marks": marks, "repeats": repeats}

    def describe(reports: list[Report]) -> dict[str, Any]:
        marks = np.sum([done["marks"] for done in reports], axis=0).tolist()
        if not marks[TRAIN]:
            raise DataError(f"the split leaves no training interaction: {report}; make task.split.test smaller")
        by_split = {"train": marks[TRAIN], "validation": marks[VALIDATION], "test": marks[TEST]}
        by_split["repeats_dropped"] = sum(done["repeats"] for done in reports) + before.get("repeats_dropped", 0)
        return {**report, **by_split, **(_daily(work) if has_clock else {})}

    outputs = (
        _scratch("days"),
        Output(schemas.INTERACTIONS, describe=describe),
        _scratch("user-degrees"),
        _scratch("item-degrees", items.num_shards),
    )
    reports = work.run("events-written", _ranges(num_shards), outputs, write, "write interactions")
    work.storage.delete(f"{SCRATCH}/events")
    return describe(reports)


# ------------------------------------------------------------------------------------------------ users, items, content


def _placed(work: _Work, side: _Side, number: int) -> tuple[pa.Array, int, int]:
    """The keys of a shard of users or items, by id, as text, and which ids they are."""
    kind = pa.int64() if work.integers[side.name] else pa.string()
    schema = pa.schema([("key", kind), ("id", pa.uint32())])
    rows = gather(work.storage, work.open(f"{side.name}-placed"), number, schema)
    start, stop = shard_bounds(side.count, side.num_shards, number)
    ids = rows.column("id").to_numpy()
    assert len(ids) == stop - start, f"{side.name} shard {number} has {len(ids)} keys for {stop - start} ids"
    keys = rows.column("key").take(pa.array(np.argsort(ids, kind="stable")))
    return keys.cast(pa.string()), start, stop


def _describe(work: _Work, side: _Side) -> Callable[[list[Report]], dict[str, Any]]:
    found = {"new": side.count - side.earlier, "present": side.present, "integer_keys": work.integers[side.name]}
    return lambda _: found


def _write_users(work: _Work, users: _Side) -> None:
    def write(task: Task) -> tuple[Sequence[pa.Table], Report]:
        keys, start, stop = _placed(work, users, task["range"])
        seen = _rows_of_users(work, users, start, stop)
        columns = {"key": keys, "id": np.arange(start, stop, dtype=np.uint32)}
        return [pa.table({**columns, "degree": seen.column("degree"), "first_seen": seen.column("first_seen")})], {}

    output = Output(users.dataset, describe=_describe(work, users))
    work.run("users-written", _ranges(users.num_shards), [output], write, "write users")


def _rows_of_users(work: _Work, users: _Side, start: int, stop: int) -> pa.Table:
    return read_rows(work.storage, work.open("user-degrees"), start, stop)


def _content_schema(work: _Work) -> pa.Schema:
    content = pa.schema([]) if work.data.items is None else sources.content_schema(work.data.items)
    return pa.schema([pa.field("id", pa.uint32()), pa.field("title", pa.string()), *content])


def _send_content(work: _Work, items: _Side) -> None:
    """Read the catalogue again, and send titles and content to the shards of their items."""
    schema, manifest = _content_schema(work), open_manifest(work.storage, items.table)

    def send(task: Task) -> tuple[Sequence[Blocks], Report]:
        good, _ = work.items(task)
        ids = KeyTable.open(work.storage, manifest, work.cache).find(kernel.hashed(good.column("item_key")))
        if (ids < 0).any():
            raise DataError(f"{task['url']}: {_CHANGED}")
        rows = good.drop_columns(["item_key", "position"]).add_column(0, "id", pa.array(ids.astype(np.uint32)))
        return [(rows.cast(schema), shard_of(ids, items.count, items.num_shards))], {}

    output = _scratch("content", items.num_shards)
    work.run("content-sent", work.items_plan, [output], send, "send content")


def _write_items(work: _Work, items: _Side) -> None:
    """Write the items, and their content by id: nulls where the catalogue has none, of repeated keys the first row."""
    schema = _content_schema(work)

    def write(task: Task) -> tuple[Sequence[pa.Table], Report]:
        number = task["range"]
        keys, start, stop = _placed(work, items, number)
        degree, first_seen = np.zeros(stop - start, np.int64), np.full(stop - start, np.iinfo(np.int64).max)
        parts = gather(work.storage, work.open("item-degrees"), number, _DEGREES)
        places = parts.column("id").to_numpy().astype(np.int64) - start
        np.add.at(degree, places, parts.column("count").to_numpy().astype(np.int64))
        np.minimum.at(first_seen, places, parts.column("first").to_numpy())
        first_seen[degree == 0] = -1
        rows = schema.empty_table()
        if work.items_plan:
            rows = gather(work.storage, work.open("content"), number, schema)
        owners, firsts = np.unique(rows.column("id").to_numpy().astype(np.int64) - start, return_index=True)
        chosen = np.full(stop - start, -1)
        chosen[owners] = firsts
        content = rows.drop_columns(["id"]).take(pa.array(chosen, mask=chosen < 0))
        ids = np.arange(start, stop, dtype=np.uint32)
        columns = {"key": keys, "id": ids, "degree": degree, "first_seen": first_seen}
        nodes = pa.table({**columns, "title": content.column("title")})
        return [nodes, content.drop_columns(["title"]).add_column(0, pa.field("id", pa.uint32()), pa.array(ids))], {}

    outputs = (
        Output(items.dataset, describe=_describe(work, items)),
        Output(schemas.CONTENT, describe=lambda _: {"columns": schema.names[2:]}),
    )
    work.run("items-written", _ranges(items.num_shards), outputs, write, "write items")


def summary(report: dict[str, Any], num_users: int, num_items: int) -> str:
    """What became of the interactions, in one line for a person."""
    found = (
        f"ingest: {report['read']:,} interactions read: {report['train']:,} to train, {report['validation']:,} to "
        f"validate, {report['test']:,} to test; {num_users:,} users, {num_items:,} items"
    )
    if report["bad"] or report["bad_items"]:
        found += f"; set aside as bad: {report['bad']:,} interactions, {report['bad_items']:,} items (see quarantine)"
    if report["weightless"]:
        found += f"; {report['weightless']:,} weigh nothing"
    if report["events_of_unknown_items"]:
        some = ", ".join(map(repr, report["unknown_item_examples"][:3]))
        found += (
            f"; {report['events_of_unknown_items']:,} interactions are of {report['unknown_items']:,} items that the "
            f"catalogue lacks, such as {some}"
        )
    return found
