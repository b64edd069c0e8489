"""A shuffle of columns outside the JVM: map tasks write one file each, cut into a block per destination.

Spark schedules the tasks; the rows never become JVM objects. A destination reads its block of every file by byte range.
Integers are stored as the distance from the block's least value in as few bytes as hold it, a constant column as its
value alone. Files lie in the run's storage as a scratch dataset with receipts, so a lost task redoes its own file and a
restarted stage goes on where it was. Memory: one task's rows, or one destination's.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    Shard,
    begin,
    commit,
    finished_manifest,
    finished_shard,
    leave_receipt,
    write_file,
)
from pipeline.contracts.errors import DataError
from pipeline.contracts.schemas import how_to_build
from pipeline.contracts.storage import Storage
from pipeline.spark import Task, run_tasks

_ENTRY = np.dtype([("stop", "<u8"), ("rows", "<u4"), ("crc", "<u4")])
"""One per destination at the end of a file: where its block ends, its rows, and its CRC-32."""
MAX_DESTINATIONS = 1 << 16


def scatter(
    spark: SparkContext,
    storage: Storage,
    name: str,
    lineage: Lineage,
    num_tasks: int,
    make: Callable[[int], tuple[pa.Table, NDArray[np.integer]]],
    num_destinations: int,
    label: str,
) -> Manifest:
    """Store what make(number) returns, rows and the destination of each, for every number below num_tasks.

    Finished files of an interrupted attempt of the same lineage are kept. The scratch dataset `name` is the caller's
    to delete.
    """
    done = finished_manifest(storage, name, lineage)
    if done is not None:
        return done
    begin(storage, name)

    def work(task: Task) -> Task:
        number = task["number"]
        shard = finished_shard(storage, name, blocks_name(number), lineage)
        if shard is None:
            shard = write_blocks(storage, name, number, *make(number), num_destinations, lineage)
        return asdict(shard)

    results = run_tasks(spark, [{"number": number} for number in range(num_tasks)], work, label)
    shards = [Shard(**result) for result in results]
    return commit(storage, name, shards, lineage, {"destinations": num_destinations})


def blocks_name(number: int) -> str:
    """`part-00007.blocks`: by task, never by attempt."""
    return f"part-{number:05d}.blocks"


def write_blocks(
    storage: Storage, name: str, number: int, table: pa.Table, destinations: NDArray[np.integer],
    num_destinations: int, lineage: Lineage,
) -> Shard:  # fmt: skip
    """Store one task's file, with its receipt; the manifest needs `destinations` in its metadata."""
    data = encode_blocks(table, destinations, num_destinations)
    return write_file(storage, name, blocks_name(number), data, lineage, rows=table.num_rows)


def destination_rows(spark: SparkContext, storage: Storage, manifest: Manifest, label: str) -> NDArray[np.int64]:
    """How many rows every destination is sent [destinations]: to cut a hub's work into parts before it starts."""
    number = int(manifest.metadata["destinations"])
    shares = np.array_split(np.arange(len(manifest.shards)), min(len(manifest.shards), 16))

    def work(task: Task) -> Task:
        total = np.zeros(number, np.int64)
        for shard in manifest.shards[task["first"] : task["stop"]]:
            path = f"{manifest.dataset}/{shard.name}"
            footer = storage.read_range(path, shard.bytes - number * _ENTRY.itemsize, shard.bytes)
            if len(footer) < number * _ENTRY.itemsize:
                raise _not_as_written(storage, manifest, shard, ValueError("cut short"))
            total += np.frombuffer(footer, _ENTRY)["rows"]
        return {"rows": total.tolist()}

    tasks = [{"first": int(share[0]), "stop": int(share[-1]) + 1} for share in shares]
    counts = np.array([result["rows"] for result in run_tasks(spark, tasks, work, label)], np.int64)
    total: NDArray[np.int64] = counts.sum(axis=0)
    return total


def gather(
    storage: Storage, manifest: Manifest, destination: int, schema: pa.Schema, part: int = 0, num_parts: int = 1
) -> pa.Table:
    """All rows that were sent to a destination, file after file and in each file's order; or those of one part of it.

    Parts are runs of files. Raises DataError if a block is not what was written.
    """
    files = range(part * len(manifest.shards) // num_parts, (part + 1) * len(manifest.shards) // num_parts)
    tables = list(each_block(storage, manifest, destination, schema, files))
    return pa.concat_tables(tables).combine_chunks() if tables else schema.empty_table()


def each_block(
    storage: Storage, manifest: Manifest, destination: int, schema: pa.Schema, files: Iterable[int] | None = None
) -> Iterator[pa.Table]:
    """What each file has for a destination, one after the other; files that have nothing are passed over."""
    number = int(manifest.metadata["destinations"])
    for file in range(len(manifest.shards)) if files is None else files:
        shard = manifest.shards[file]
        path = f"{manifest.dataset}/{shard.name}"
        footer = shard.bytes - number * _ENTRY.itemsize + destination * _ENTRY.itemsize
        try:
            before = min(destination, 1)
            data = storage.read_range(path, footer - before * _ENTRY.itemsize, footer + _ENTRY.itemsize)
            if len(data) < (before + 1) * _ENTRY.itemsize:
                raise ValueError("cut short")
            entries = np.frombuffer(data, _ENTRY)
            start, stop = int(entries["stop"][0]) if before else 0, int(entries["stop"][-1])
            if start == stop:
                continue
            crc = int(entries["crc"][-1])
            block = storage.read_with(path, lambda found, crc=crc: _checked(found, crc), (start, stop))  # type: ignore[misc]
            table = decode_block(block, schema)
        except (FileNotFoundError, ValueError, pa.ArrowException) as error:
            raise _not_as_written(storage, manifest, shard, error) from None
        yield table


def _checked(block: bytes, crc: int) -> bytes:
    if zlib.crc32(block) != crc:
        raise ValueError("another checksum")
    return block


def _not_as_written(storage: Storage, manifest: Manifest, shard: Shard, error: Exception) -> DataError:
    where = storage.locate(f"{manifest.dataset}/{shard.name}")
    return DataError(f"{where} is not as it was written ({error}); {how_to_build(manifest.dataset, 'again')}")


def stream_blocks(
    storage: Storage, name: str, number: int, blocks: Iterable[tuple[int, pa.Table]], num_destinations: int,
    lineage: Lineage,
) -> Shard:  # fmt: skip
    """As write_blocks, for what one task cannot hold at once: blocks of ascending destinations, each at most once."""
    entries, place, rows, digest = np.zeros(num_destinations, _ENTRY), 0, 0, hashlib.sha256()
    with storage.stream(f"{name}/{blocks_name(number)}") as file:
        for destination, table in blocks:
            block = encode_block(table)
            file.write(block)
            digest.update(block)
            rows += table.num_rows
            place += len(block)
            entries[destination] = (place, table.num_rows, zlib.crc32(block))
        entries["stop"] = np.maximum.accumulate(entries["stop"])
        footer = entries.tobytes()
        file.write(footer)
        digest.update(footer)
    shard = Shard(blocks_name(number), rows, place + len(footer), digest.hexdigest())
    return leave_receipt(storage, name, shard, lineage)


def encode_blocks(table: pa.Table, destinations: NDArray[np.integer], num_destinations: int) -> bytes:
    """A file: the rows of destination 0, 1, ... in their order as compact blocks, then the table of blocks."""
    if num_destinations > MAX_DESTINATIONS:
        raise ValueError(f"{num_destinations} destinations, at most {MAX_DESTINATIONS}")
    places = np.asarray(destinations).astype(np.uint16)
    counts = np.bincount(places, minlength=num_destinations)
    if (places[1:] < places[:-1]).any():
        table = table.take(pa.array(np.argsort(places, kind="stable")))  # radix sort on 16 bits
    table = table.combine_chunks()
    sink, entries, start = io.BytesIO(), np.zeros(num_destinations, _ENTRY), 0
    for destination, count in enumerate(counts.tolist()):
        if count:
            block = encode_block(table.slice(start, count))
            entries["crc"][destination] = zlib.crc32(block)
            entries["rows"][destination] = count
            sink.write(block)
            start += count
        entries["stop"][destination] = sink.tell()
    sink.write(entries.tobytes())
    return sink.getvalue()


def encode_block(table: pa.Table) -> pa.Buffer:
    """Rows as an Arrow stream of narrowed columns; bases and constants are in the fields' metadata."""
    fields, columns = [], []
    for field, column in zip(table.schema, table.columns, strict=True):
        array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
        note = {}
        if (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)) and not array.null_count:
            values = array.to_numpy()
            least, most = values.min(), values.max()
            if least == most and (least != 0 or pa.types.is_integer(field.type)):  # -0.0 equals 0.0
                array, note = pa.nulls(len(values)), {"constant": str(least)}
            elif pa.types.is_integer(field.type):
                width = np.min_scalar_type(int(most) - int(least))
                if width.itemsize < values.itemsize:
                    wide = values.astype(np.uint64) - np.uint64(int(least) & 0xFFFFFFFFFFFFFFFF)
                    array, note = pa.array(wide.astype(width)), {"base": str(least)}
        fields.append(pa.field(field.name, array.type, metadata=note or None))
        columns.append(array)
    sink = pa.BufferOutputStream()
    schema = pa.schema(fields)
    text = any(pa.types.is_string(f.type) or pa.types.is_large_string(f.type) for f in fields)
    options = pa.ipc.IpcWriteOptions(compression="lz4" if text else None)
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return sink.getvalue()


def decode_block(block: bytes, schema: pa.Schema) -> pa.Table:
    """The rows of one block in their original types. Raises ValueError if its columns are others."""
    stored = pa.ipc.open_stream(block).read_all()
    if stored.schema.names != schema.names:
        raise ValueError(f"columns {stored.schema.names}, expected {schema.names}")
    columns = []
    for field, column in zip(schema, stored.columns, strict=True):
        note = stored.schema.field(field.name).metadata or {}
        if not note:
            columns.append(column)
            continue
        dtype = np.dtype(object if pa.types.is_string(field.type) else field.type.to_pandas_dtype()).type
        if b"constant" in note:
            column = pa.array(np.full(len(column), dtype(note[b"constant"].decode())), field.type)
        elif b"base" in note:
            base = np.uint64(int(note[b"base"]) & 0xFFFFFFFFFFFFFFFF)
            column = pa.array((column.to_numpy().astype(np.uint64) + base).astype(dtype), field.type)
        columns.append(column)
    return pa.table(columns, schema=schema)
