"""Raw files to clean interactions, users, items and content, all with dense ids.

Reads the user's files; writes INTERACTIONS, USERS, ITEMS, CONTENT and QUARANTINE. Files are read once, in Python
tasks that set bad rows aside; Spark then sorts the keys (ids are ranks, so they do not depend on partitions), joins ids
to events and shuffles them to their shards. Memory: one file chunk or one shard per task; on the driver only counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from pipeline import sources
from pipeline.contracts import schemas
from pipeline.contracts.config import Data, Settings, Split
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    Shard,
    begin,
    commit,
    finished_shard,
    open_manifest,
    read_shard,
    shard_name,
    write_file,
    write_shard,
)
from pipeline.contracts.errors import DataError
from pipeline.contracts.sharding import MAX_IDS, count_shards
from pipeline.contracts.storage import Storage, describe_inputs
from pipeline.spark import Task, progress, read_dataset, run_tasks, say, write_shards

TRAIN, VALIDATION, TEST = schemas.TRAIN_SPLIT, schemas.VALIDATION_SPLIT, schemas.TEST_SPLIT
EVENTS, EVENTS_BAD = "ingest/events", "ingest/events-quarantine"
CATALOGUE, CATALOGUE_BAD = "ingest/catalogue", "ingest/catalogue-quarantine"
_EVENT_COLUMNS = ["user_key", "item_key", "timestamp", "position", "weight"]
_BUCKETS = 1 << 16
_SHOWN_REPEATED = 10_000
_COUNTED_REASONS = 10_000
"""Reasons may name keys: their summary stops growing here."""
_BROADCAST_ROWS = 1_000_000
"""Keys up to this many go to every task whole, about 50 MB, instead of sorting all events by key."""


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
        found |= {f"previous {d.name}": open_manifest(earlier, d).content for d in (schemas.USERS, schemas.ITEMS)}
    return found


def run(spark: SparkSession, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Read, clean, number, split and store everything that later stages need of the user's files."""
    data, rows_per_shard = settings.task.data, settings.resources.rows_per_shard
    events_plan = sources.plan_interactions(data.interactions, settings.resources.events_per_shard)
    items_plan = [] if data.items is None else sources.plan_items(data.items, rows_per_shard)

    events, dropped = _clean(
        spark, storage, lineage, events_plan, EVENTS, EVENTS_BAD, data, "ingest: read interactions"
    )
    catalogue, _ = _clean(spark, storage, lineage, items_plan, CATALOGUE, CATALOGUE_BAD, data, "ingest: read items")
    num_repeated, repeated = _repeated_items(spark, storage, catalogue, items_plan)
    quarantine = _store_quarantine(storage, lineage, repeated)
    bad_events, bad_items = (open_manifest(storage, name).num_rows for name in (EVENTS_BAD, CATALOGUE_BAD))
    bad_items += num_repeated
    for kind, plan, num_bad, total in (
        ("interactions", events_plan, bad_events, events.num_rows + dropped + bad_events),
        ("items", items_plan, bad_items, catalogue.num_rows + bad_items - num_repeated),
    ):
        _check_share(storage, quarantine, kind, plan, num_bad, total, data.max_quarantined_share)
    if not events.num_rows:
        raise DataError(f"{', '.join(data.interactions.paths)}: no interaction is left to learn from")
    for dataset in schemas.INGEST.writes:
        if dataset is not schemas.QUARANTINE:
            begin(storage, dataset)

    rows = read_dataset(spark, storage, events, _EVENT_COLUMNS)
    listed = (
        _first_of_each_key(read_dataset(spark, storage, catalogue, ["item_key", "title", "position"]))
        if items_plan
        else None
    )
    known, unknown = _known_events(rows, listed, data)
    known = known.persist(StorageLevel.MEMORY_AND_DISK)
    earlier = None if data.previous is None else Storage(data.previous)
    users = _number(spark, known.select(F.col("user_key").alias("key")).distinct(), earlier, schemas.USERS)
    item_keys = known.select(F.col("item_key").alias("key")).distinct()
    if listed is not None:
        item_keys = item_keys.union(listed.select(F.col("item_key").alias("key"))).distinct()
    items = _number(spark, item_keys, earlier, schemas.ITEMS)

    numbered = (
        known.join(users.lookup("user_key", "user_id"), "user_key")
        .join(items.lookup("item_key", "item_id"), "item_key")
        .select("user_id", "item_id", "timestamp", "position", "weight")
    )
    split, split_report = _split(numbered, settings.task.split, settings.task.seed)
    split = split.persist(StorageLevel.MEMORY_AND_DISK)
    num_shards = min(count_shards(events.num_rows, settings.resources.events_per_shard), users.count)
    shards = write_shards(
        split.withColumn("id", F.col("user_id")), users.count, num_shards, storage, schemas.INTERACTIONS,
        lineage, _interactions, "ingest: write interactions",
    )  # fmt: skip
    counts = {row["split"]: row["count"] for row in split.groupBy("split").count().collect()}
    if not counts.get(TRAIN):
        raise DataError(f"the split leaves no training interaction: {split_report}; make task.split.test smaller")
    report = {
        "read": events.num_rows + dropped + bad_events, "bad": bad_events, "bad_items": bad_items,
        "weightless": dropped, **unknown, **split_report,
        "train": counts.get(TRAIN, 0), "validation": counts.get(VALIDATION, 0), "test": counts.get(TEST, 0),
    }  # fmt: skip
    for dataset, side, other, numbers, titles in (
        (schemas.USERS, "user_id", "item_id", users, None),
        (schemas.ITEMS, "item_id", "user_id", items, listed),
    ):
        stored = _store_nodes(storage, dataset, lineage, split, side, other, numbers, titles, rows_per_shard)
        commit(storage, dataset, stored, lineage, {"new": numbers.count - numbers.earlier})
    _store_content(spark, storage, lineage, catalogue if items_plan else None, items, rows_per_shard)
    commit(storage, schemas.INTERACTIONS, shards, lineage, report)
    say(summary(report, users.count, items.count))
    for cached in (known, split):
        cached.unpersist()
    for numbers in (users, items):
        numbers.release()
    storage.delete("ingest")


# ------------------------------------------------------------------------------------------------ cleaning


def _clean(
    spark: SparkSession, storage: Storage, lineage: Lineage, plan: Sequence[Task], good_name: str, bad_name: str,
    data: Data, label: str,
) -> tuple[Manifest, int]:  # fmt: skip
    """Read every piece of the plan into a shard of clean rows and one of bad rows; also counts rows of weight 0.

    Of the latter only the receipt of an empty file is kept: a restart needs their number and nothing else.
    """

    def work(task: Task) -> Task:
        number = task["number"]
        names = (good_name, bad_name, f"{good_name}-weightless")
        good, bad, counted = (finished_shard(storage, name, number, lineage) for name in names)
        if good is None or bad is None or counted is None:
            weightless = 0
            if good_name == EVENTS:
                rows, rejected, weightless = sources.read_interactions(task, data.interactions)
            else:
                assert data.items is not None
                rows, rejected = sources.read_items(task, data.items)
            good = write_shard(storage, good_name, number, rows, lineage)
            bad = write_shard(storage, bad_name, number, rejected, lineage)
            counted = write_file(storage, names[2], shard_name(number), b"", lineage, rows=weightless)
        return {"good": asdict(good), "bad": asdict(bad), "weightless": counted.rows}

    results = run_tasks(spark, [{**task, "number": number} for number, task in enumerate(plan)], work, label)
    commit(storage, bad_name, (Shard(**result["bad"]) for result in results), lineage)
    good_shards = (Shard(**result["good"]) for result in results)
    weightless = sum(result["weightless"] for result in results)
    return commit(storage, good_name, good_shards, lineage), weightless


def _repeated_items(
    spark: SparkSession, storage: Storage, catalogue: Manifest, plan: Sequence[Task]
) -> tuple[int, pa.Table]:
    """How many catalogue rows have the key of an earlier row, and quarantine rows for the first of them."""
    if not catalogue.num_rows:
        return 0, schemas.QUARANTINE.arrow.empty_table()
    rows = read_dataset(spark, storage, catalogue, ["item_key", "position"])
    order = Window.partitionBy("item_key").orderBy("position")
    ranked = rows.withColumn("place", F.row_number().over(order)).withColumn("first", F.first("position").over(order))
    later = ranked.where("place > 1").persist()
    with progress("ingest: find repeated items", 1, spark):
        count = later.count()
    urls = {sources.file_of(task["position"]): task["url"] for task in plan}
    found = []
    for row in later.orderBy("position").limit(_SHOWN_REPEATED).collect() if count else ():
        key, first = row["item_key"], f"row {sources.row_of(row['first'])} of {urls[sources.file_of(row['first'])]}"
        reason = f"item key {key!r} is already in {first}; keys must be unique"
        source, number = urls[sources.file_of(row["position"])], sources.row_of(row["position"])
        found.append({"source": source, "row": number, "reason": reason, "values": key})
    later.unpersist()
    return count, pa.Table.from_pylist(found, schema=schemas.QUARANTINE.arrow)


def _first_of_each_key(catalogue: DataFrame) -> DataFrame:
    order = Window.partitionBy("item_key").orderBy("position")
    return catalogue.withColumn("place", F.row_number().over(order)).where("place = 1").drop("place")


def _store_quarantine(storage: Storage, lineage: Lineage, repeated: pa.Table) -> Manifest:
    """Commit all bad rows as one dataset, a shard per piece that has any, with the commonest reasons."""
    begin(storage, schemas.QUARANTINE)
    reasons: Counter[str] = Counter()
    shards: list[Shard] = []
    for table in chain(_bad_rows(storage, EVENTS_BAD), _bad_rows(storage, CATALOGUE_BAD), [repeated]):
        if table.num_rows or (table is repeated and not shards):
            if len(reasons) < _COUNTED_REASONS:
                reasons.update(table.column("reason").to_pylist())
            shards.append(write_shard(storage, schemas.QUARANTINE, len(shards), table, lineage))
    commonest = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:20]
    metadata = {"reasons": [{"reason": reason, "rows": rows} for reason, rows in commonest]}
    return commit(storage, schemas.QUARANTINE, shards, lineage, metadata)


def _bad_rows(storage: Storage, name: str) -> Iterator[pa.Table]:
    manifest = open_manifest(storage, name)
    return (read_shard(storage, manifest, number) for number, shard in enumerate(manifest.shards) if shard.rows)


def _check_share(
    storage: Storage, quarantine: Manifest, kind: str, plan: Sequence[Task], num_bad: int, total: int, most: float
) -> None:
    """Raise DataError if more than the share of one kind of input is bad, or if there are no interactions at all."""
    urls = {task["url"] for task in plan}
    if not total and kind == "interactions":
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


def _known_events(events: DataFrame, catalogue: DataFrame | None, data: Data) -> tuple[DataFrame, dict[str, Any]]:
    """Events of items in the catalogue, and what is to be said of the others."""
    if catalogue is None:
        return events, {"unknown_items": 0, "events_of_unknown_items": 0}
    keys = catalogue.select("item_key").persist(StorageLevel.MEMORY_AND_DISK)
    with progress("ingest: look up items", 1, events.sparkSession):
        listed = F.broadcast(keys) if keys.count() <= _BROADCAST_ROWS else keys
        strangers = events.groupBy("item_key").count().join(listed, "item_key", "left_anti").persist()
        total = strangers.agg(F.count("item_key"), F.coalesce(F.sum("count"), F.lit(0))).collect()[0]
    examples = [row["item_key"] for row in strangers.orderBy(F.desc("count"), "item_key").limit(5).collect()]
    strangers.unpersist()
    report = {"unknown_items": total[0], "events_of_unknown_items": total[1], "unknown_item_examples": examples}
    if data.unknown_items == "add":
        return events, report
    known = events if not total[1] else events.join(listed, "item_key", "left_semi")
    if total[1] and not known.take(1):
        some = [row["item_key"] for row in keys.limit(3).collect()]
        raise DataError(
            f"no interaction names an item of the catalogue: interactions have keys such as {examples[:3]}, the "
            f"catalogue has {some}; check task.data.items.key and task.data.interactions.item"
        )
    return known, report


# ------------------------------------------------------------------------------------------------ ids


class _Numbered:
    """Keys with their ids, how many there are, and how many of them an earlier run had."""

    def __init__(self, rows: DataFrame, ranged: DataFrame, count: int, earlier: int) -> None:
        self.rows, self._ranged, self.count, self.earlier = rows, ranged, count, earlier

    def release(self) -> None:
        """Free what Spark keeps of it."""
        self.rows.unpersist()
        self._ranged.unpersist()

    def lookup(self, key: str, id_column: str) -> DataFrame:
        """Keys and ids under these names, sent whole to every task if that is cheaper than sorting the events."""
        table = self.rows.select(F.col("key").alias(key), F.col("id").alias(id_column))
        return F.broadcast(table) if self.count <= _BROADCAST_ROWS else table


def _number(spark: SparkSession, keys: DataFrame, earlier: Storage | None, dataset: schemas.Dataset) -> _Numbered:
    """Give every key its rank among the new keys, after the ids of the earlier run, which are kept."""
    old, num_old = None, 0
    if earlier is not None:
        manifest = open_manifest(earlier, dataset)
        old, num_old = read_dataset(spark, earlier, manifest, ["key", "id"]), manifest.num_rows
        keys = keys.join(old.select("key"), "key", "left_anti")
    partitions = int(spark.conf.get("spark.sql.shuffle.partitions") or "8")
    ranged = keys.repartitionByRange(partitions, "key").sortWithinPartitions("key")
    ranged = ranged.withColumn("partition", F.spark_partition_id()).persist(StorageLevel.DISK_ONLY)
    with progress(f"ingest: number {dataset.name}", 1, spark):
        sizes = {row[0]: row[1] for row in ranged.groupBy("partition").count().collect()}
    total = num_old + sum(sizes.values())
    if total > MAX_IDS:
        raise DataError(
            f"{total:,} {dataset.name}: ids are 32-bit (half the memory of every graph and neighbour table), so "
            f"at most {MAX_IDS:,} fit; split the catalogue or drop {dataset.name} that are never used"
        )
    offsets, before = {}, num_old
    for partition in sorted(sizes):
        offsets[partition] = before
        before += sizes[partition]

    def enumerate_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        next_id: int | None = None
        for batch in batches:
            if batch.num_rows:
                # The column, not the task, says which partition this is: a union renumbers the tasks.
                next_id = offsets[batch.column("partition")[0].as_py()] if next_id is None else next_id
                ids = pa.array(np.arange(next_id, next_id + batch.num_rows), pa.int64())
                next_id += batch.num_rows
                yield pa.RecordBatch.from_arrays([batch.column("key"), ids], ["key", "id"])

    rows = ranged.mapInArrow(enumerate_rows, "key string, id long")
    rows = rows if old is None else old.select("key", "id").union(rows)
    return _Numbered(rows.persist(StorageLevel.MEMORY_AND_DISK), ranged, total, num_old)


def _store_nodes(
    storage: Storage, dataset: schemas.Dataset, lineage: Lineage, events: DataFrame, side: str, other: str,
    numbers: _Numbered, titles: DataFrame | None, rows_per_shard: int,
) -> list[Shard]:  # fmt: skip
    """Write users or items: keys by id, with degree and first sight in the training period only."""
    seen = (
        events.where(F.col("split") == TRAIN)
        .groupBy(F.col(side).alias("id"))
        .agg(F.countDistinct(other).alias("degree"), F.min("timestamp").alias("first_seen"))
    )
    nodes = numbers.rows.join(seen, "id", "left").select(
        "key",
        "id",
        F.coalesce("degree", F.lit(0)).alias("degree"),
        F.coalesce("first_seen", F.lit(-1)).alias("first_seen"),
    )
    if dataset is schemas.ITEMS:
        if titles is None:
            nodes = nodes.withColumn("title", F.lit(None).cast("string"))
        else:
            nodes = nodes.join(titles.select(F.col("item_key").alias("key"), "title"), "key", "left")
            nodes = nodes.select("key", "id", "degree", "first_seen", "title")

    def finish(_: int, group: pa.Table) -> pa.Table:
        return group.sort_by("id").cast(dataset.arrow)

    num_shards = count_shards(numbers.count, rows_per_shard)
    return write_shards(
        nodes, numbers.count, num_shards, storage, dataset, lineage, finish, f"ingest: write {dataset.name}"
    )


def _store_content(
    spark: SparkSession, storage: Storage, lineage: Lineage, catalogue: Manifest | None, items: _Numbered,
    rows_per_shard: int,
) -> None:  # fmt: skip
    """Write the content columns by item id; an item without content has nulls."""
    num_shards = count_shards(items.count, rows_per_shard)
    if catalogue is None:
        rows, columns = items.rows.select("id"), pa.schema([])
    else:
        stored_columns = read_shard(storage, catalogue, 0).schema
        columns = pa.schema([field for field in stored_columns if field.name not in ("item_key", "title", "position")])
        wanted = ["item_key", "position", *columns.names]
        listed = _first_of_each_key(read_dataset(spark, storage, catalogue, wanted))
        rows = (
            items.rows.withColumnRenamed("key", "item_key")
            .join(listed, "item_key", "left")
            .drop("item_key", "position")
        )
    schema = pa.schema([pa.field("id", pa.uint32()), *columns])

    def finish(_: int, group: pa.Table) -> pa.Table:
        return group.sort_by("id").select(schema.names).cast(schema)

    stored = write_shards(
        rows, items.count, num_shards, storage, schemas.CONTENT, lineage, finish, "ingest: write content"
    )
    commit(storage, schemas.CONTENT, stored, lineage, {"columns": columns.names})


# ------------------------------------------------------------------------------------------------ split


def _split(events: DataFrame, split: Split, seed: int) -> tuple[DataFrame, dict[str, Any]]:
    """Mark every event as train, validation or test, and say how."""
    if split.kind == "temporal":
        validation_from, test_from = _moments(events, split)
        column = F.when(F.col("timestamp") >= test_from, TEST).when(F.col("timestamp") >= validation_from, VALIDATION)
        report = {"split": "temporal", "validation_from": validation_from, "test_from": test_from}
        return events.withColumn("split", column.otherwise(TRAIN)), report
    if split.kind == "leave_last_out":
        latest = Window.partitionBy("user_id").orderBy(F.desc("timestamp"), F.desc("position"))
        size = F.count(F.lit(1)).over(Window.partitionBy("user_id"))
        held = int(split.validation + split.test)
        place = F.row_number().over(latest)
        column = (
            F.when((size <= held) | (place > held), TRAIN).when(place <= int(split.test), TEST).otherwise(VALIDATION)
        )
        return events.withColumn("split", column), {"split": "leave_last_out"}
    draw = F.pmod(F.xxhash64(F.lit(seed), "position"), F.lit(1 << 30)) / F.lit(float(1 << 30))
    column = F.when(draw < split.test, TEST).when(draw < split.test + split.validation, VALIDATION).otherwise(TRAIN)
    return events.withColumn("split", column), {"split": "random"}


def _moments(events: DataFrame, split: Split) -> tuple[int, int]:
    """The two moments that cut off the last shares of events, to 1/65536 of the time span, from a histogram."""
    with progress("ingest: find the split", 1, events.sparkSession):
        first, last = events.agg(F.min("timestamp"), F.max("timestamp")).collect()[0]
        width = max(1, -(-(last - first + 1) // _BUCKETS))
        bucket = F.floor((F.col("timestamp") - first) / width).cast("long").alias("bucket")
        histogram = sorted((row["bucket"], row["count"]) for row in events.groupBy(bucket).count().collect())
    if len(histogram) < 2:
        raise DataError(
            f"all interactions have the timestamp {first}: a temporal split needs time; check "
            "task.data.interactions.timestamp, or set task.split.kind to leave_last_out or random"
        )
    starts = [first + width * place for place, _ in histogram]
    counts = np.array([count for _, count in histogram])
    return closest_moment(starts, counts, split.validation + split.test), closest_moment(starts, counts, split.test)


def closest_moment(starts: Sequence[int], counts: NDArray[np.integer], share: float) -> int:
    """The start of a bucket such that the events from it on are closest to the share; never the first bucket's.

    Where many events carry one timestamp, as in data dated by year, the share is met only roughly, but there is always
    something to learn from and something to measure on.
    """
    from_here_on = counts.sum() - np.cumsum(counts)[:-1]
    return int(starts[1 + int(np.abs(from_here_on - share * counts.sum()).argmin())])


def _interactions(_: int, group: pa.Table) -> pa.Table:
    ordered = group.sort_by([("user_id", "ascending"), ("timestamp", "ascending"), ("position", "ascending")])
    return ordered.select(schemas.INTERACTIONS.arrow.names).cast(schemas.INTERACTIONS.arrow)
