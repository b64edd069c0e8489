"""Vectors read and replaced in a shard's bytes, against the shard decoded, and encoded anew."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline.contracts.datasets import (
    Lineage,
    arrow_to_vectors,
    commit,
    encode_table,
    read_rows,
    shard_name,
    vectors_to_arrow,
    write_file,
    write_shard,
)
from pipeline.contracts.storage import Storage
from pipeline.contracts.vectors import find_vectors, is_stored_alike, read_vectors

LINEAGE = Lineage("test", {}, {})


def table_of(vectors: NDArray[Any]) -> pa.Table:
    ids = np.arange(len(vectors))
    keys = pa.array([f"item {i}" for i in ids], pa.string())
    return pa.table({"key": keys, "id": pa.array(ids, pa.uint32()), "embedding": vectors_to_arrow(vectors)})


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 3), (9_000, 64), (3, 100_000), (70_000, 7), (0, 4)])
def test_replaced_vectors_give_the_bytes_of_a_shard_that_has_them(dtype: type, rows: int, width: int) -> None:
    random = np.random.default_rng(rows)
    vectors: NDArray[Any] = random.standard_normal((rows, width)).astype(dtype)
    data = bytes(encode_table(table_of(vectors)))
    found = find_vectors(data, "embedding")
    if rows:
        np.testing.assert_array_equal(found.read(data), vectors)
    chosen = np.flatnonzero(random.random(rows) < 0.3)
    vectors[chosen] = random.standard_normal((len(chosen), width)).astype(dtype)
    copy = bytearray(data)
    found.replace(memoryview(copy), chosen, vectors[chosen])
    assert copy == encode_table(table_of(vectors))
    assert len(chosen) == 0 or copy != data


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_are_read_from_whatever_shards_hold_them(storage: Storage, dtype: type) -> None:
    vectors: NDArray[Any] = np.random.default_rng(0).standard_normal((5_000, 96)).astype(dtype)
    table = table_of(vectors)
    shards = [
        write_shard(storage, "embeddings", 0, table.slice(0, 4_000), LINEAGE),
        write_file(
            storage, "embeddings", shard_name(1), written(table.slice(4_000, 0), compression="zstd"), LINEAGE, 0
        ),
        write_file(
            storage, "embeddings", shard_name(2), written(table.slice(4_000), compression="zstd"), LINEAGE, 1_000
        ),
    ]
    manifest = commit(storage, "embeddings", shards, LINEAGE)
    for start, stop in [(0, 5_000), (3_999, 4_001), (1_000, 1_500), (4_500, 5_000), (5_000, 5_000), (0, 0)]:
        found = read_vectors(storage, manifest, start, stop, "embedding")
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, vectors[start:stop])
        expected = read_rows(storage, manifest, start, stop, ["embedding"]).column("embedding")
        np.testing.assert_array_equal(found, arrow_to_vectors(expected))
    data = bytes(encode_table(table))
    rows = np.array([0, 7, 2_500, 4_999])
    np.testing.assert_array_equal(find_vectors(data, "embedding").take(data, rows), vectors[rows])


def written(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        table, sink, **{"compression": "none", "use_dictionary": False, "write_statistics": False, **options}
    )
    return sink.getvalue()


def test_shards_of_any_other_shape_are_refused() -> None:
    table = table_of(np.ones((50, 4), np.float32))
    assert find_vectors(written(table), "embedding").rows == (0, 50)
    others: list[tuple[str, dict[str, Any]]] = [
        ("compressed", {"compression": "zstd"}),
        ("dictionary", {"use_dictionary": True}),
        ("statistics", {"write_statistics": True}),
        ("in 5 row groups", {"row_group_size": 10}),
        ("type 3", {"data_page_version": "2.0"}),
        ("encoding 9", {"column_encoding": {"embedding.list.element": "BYTE_STREAM_SPLIT"}}),
    ]
    for reason, options in others:
        with pytest.raises(ValueError, match=reason):
            find_vectors(written(table, **options), "embedding")
    with pytest.raises(ValueError, match="is uint32"):
        find_vectors(written(table), "id")
    missing = pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2))
    with pytest.raises(ValueError, match="some null"):
        find_vectors(written(pa.table({"embedding": missing})), "embedding")
    data = written(table)
    with pytest.raises(ValueError, match="expected float32 of 4"):
        find_vectors(data, "embedding").replace(memoryview(bytearray(data)), np.array([1]), np.ones((1, 4), np.float64))


def test_columns_are_stored_alike_where_they_and_only_they_have_the_same_values() -> None:
    keys, random = [f"item {number // 2}" for number in range(300)], np.random.default_rng(1)
    others = [*keys[:299], "item x"]
    tables = [
        pa.table({"key": keys, "id": pa.array(range(300), pa.uint32())}),
        pa.table({"key": keys, "embedding": vectors_to_arrow(random.random((300, 4), np.float32))}),
        pa.table({"key": others, "id": pa.array(range(300), pa.uint32())}),
        pa.table({"key": pa.array(range(300), pa.int64())}),
        pa.table({"name": keys}),
    ]
    first, *rest = map(encode_table, tables)
    assert [is_stored_alike(first, data, "key") for data in rest] == [True, False, False, False]
    assert is_stored_alike(first, first, "id")
    assert not is_stored_alike(first, written(tables[0], row_group_size=100), "key")
