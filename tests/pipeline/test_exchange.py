"""Rows arrive at their destinations whole, in order, and in few bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark import SparkContext

from pipeline.contracts.datasets import Lineage, find_manifest
from pipeline.contracts.errors import DataError
from pipeline.contracts.storage import Storage
from pipeline.exchange import decode_block, destination_rows, encode_block, gather, scatter

IDS = pa.list_(pa.uint32())
SCHEMA = pa.schema(
    [("key", pa.string()), ("id", pa.uint32()), ("time", pa.int64()), ("weight", pa.float32()), ("ids", IDS)]
)
LINEAGE = Lineage("graph", {}, {})


def rows(number: int, count: int = 50) -> tuple[pa.Table, np.ndarray]:
    generator = np.random.default_rng(number)
    ids = generator.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)
    table = pa.table(
        {
            "key": [f"key {value}" for value in ids],
            "id": ids,
            "time": generator.integers(-(10**12), 10**12, count),
            "weight": np.ones(count, np.float32) if number % 2 else generator.random(count, np.float32),
            "ids": pa.array([list(range(number, value % 7)) for value in ids.tolist()], IDS),
        },
        schema=SCHEMA,
    )
    return table, generator.integers(0, 4, count) + (generator.integers(0, 2, count) * 3)


def send(spark: SparkContext, storage: Storage, lineage: Lineage = LINEAGE) -> None:
    scatter(spark, storage, "graph/rows", lineage, 3, lambda number: rows(number), 8, "test: send")


def test_every_row_arrives_once_in_the_order_of_files_and_rows(spark: SparkContext, storage: Storage) -> None:
    send(spark, storage)
    manifest = find_manifest(storage, "graph/rows")
    assert manifest is not None
    assert manifest.num_rows == 150
    for destination in range(8):
        sent = [table.filter(pa.array(places == destination)) for table, places in map(rows, range(3))]
        assert gather(storage, manifest, destination, SCHEMA).equals(pa.concat_tables(sent).combine_chunks())
        parts = [gather(storage, manifest, destination, SCHEMA, part, 2) for part in range(2)]
        assert pa.concat_tables(parts).equals(pa.concat_tables(sent))
    counts = np.bincount(np.concatenate([places for _, places in map(rows, range(3))]), minlength=8)
    assert destination_rows(spark, storage, manifest, "test: count").tolist() == counts.tolist()


def test_a_restart_makes_only_the_files_that_are_missing(spark: SparkContext, storage: Storage) -> None:
    send(spark, storage)
    files = [Path(storage.locate(f"graph/rows/part-{number:05d}.blocks")) for number in range(3)]
    made, stamps = [file.read_bytes() for file in files], [file.stat().st_mtime_ns for file in files]
    send(spark, storage)  # finished: nothing is touched
    assert [file.stat().st_mtime_ns for file in files] == stamps
    send(spark, storage, Lineage("graph", {"changed": 1}, {}))
    assert [file.stat().st_mtime_ns for file in files] != stamps
    assert [file.read_bytes() for file in files] == made


@pytest.mark.parametrize("spoil", [lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:], lambda data: data[:60]])
def test_a_damaged_block_is_named(spark: SparkContext, storage: Storage, spoil) -> None:  # type: ignore[no-untyped-def]
    send(spark, storage)
    file = Path(storage.locate("graph/rows/part-00001.blocks"))
    file.write_bytes(spoil(file.read_bytes()))
    manifest = find_manifest(storage, "graph/rows")
    assert manifest is not None
    with pytest.raises(DataError, match=r"part-00001\.blocks is not as it was written.*pinsage graph --force"):
        gather(storage, manifest, 0, SCHEMA)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["uint8", "int32", "uint32", "int64", "uint64"]).flatmap(
        lambda name: st.tuples(
            st.just(name),
            st.lists(
                st.integers(int(np.iinfo(name).min), int(np.iinfo(name).max)),
                min_size=1,
                max_size=20,
            ),
        )
    )
)
def test_integers_survive_narrowing(column: tuple[str, list[int]]) -> None:
    name, values = column
    table = pa.table({"x": pa.array(values, getattr(pa, name)())})
    assert decode_block(encode_block(table).to_pybytes(), table.schema).equals(table)


def test_narrow_ranges_and_constants_take_few_bytes() -> None:
    count = 10_000
    table = pa.table(
        {
            "near": pa.array(np.arange(count) % 200 + 10**15),
            "same": np.full(count, 2.5, np.float32),
            "far": pa.array(np.arange(count, dtype=np.uint64) << np.uint64(50)),
        }
    )
    block = encode_block(table)
    assert decode_block(block.to_pybytes(), table.schema).equals(table)
    assert len(block) < count * 9 + 2000
