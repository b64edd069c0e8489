"""A shard's vectors where its Parquet bytes have them: to read them, or replace some, by copying.

`encode_table` stores vectors as they are, page after page, so a shard of the same rows with some other vectors differs
from this one in exactly those bytes. Nearly all that Parquet costs with vectors is its note of where every list begins:
decoding 1 kB takes ten times as long as copying it, encoding it twenty times. Reads page headers as Parquet's format
lays them down (Thrift's compact protocol, data pages of version 1) and takes nothing for granted: ValueError where a
file is of any other shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.contracts.datasets import Manifest, arrow_to_vectors, decode_table, overlapping, read_stored
from pipeline.contracts.storage import Storage

_DATA_PAGE, _PLAIN = 0, 0
_TYPE, _SIZE, _STORED_SIZE, _PAGE = 1, 2, 3, 5
"""Fields of PageHeader; of DataPageHeader are the number of values and their encoding 1 and 2."""


@dataclass(frozen=True)
class Vectors:
    """A vector column [n, width] in a shard's bytes: the first row of every page, the last one's end, and where."""

    dtype: np.dtype[Any]
    width: int
    rows: tuple[int, ...]
    offsets: tuple[int, ...]

    def pages(self, data: bytes | memoryview) -> list[NDArray[Any]]:
        """The rows of every page [k, width], as views of the data: to be written to, if the data can be."""
        return [
            np.frombuffer(data, self.dtype, (stop - start) * self.width, offset).reshape(-1, self.width)
            for start, stop, offset in zip(self.rows[:-1], self.rows[1:], self.offsets, strict=True)
        ]

    def read(self, data: bytes | memoryview) -> NDArray[Any]:
        """All rows."""
        return np.concatenate([np.zeros((0, self.width), self.dtype), *self.pages(data)])

    def take(self, data: bytes | memoryview, rows: NDArray[np.integer]) -> NDArray[Any]:
        """Some rows, ascending."""
        cuts = np.searchsorted(rows, self.rows)
        parts = zip(self.rows[:-1], cuts[:-1], cuts[1:], self.pages(data), strict=True)
        found = [page[rows[low:high] - start] for start, low, high, page in parts]
        return np.concatenate([np.zeros((0, self.width), self.dtype), *found])

    def replace(self, data: memoryview, rows: NDArray[np.integer], vectors: NDArray[Any]) -> None:
        """Put other vectors [k, width] at some rows [k], ascending, in place. ValueError for another type or width."""
        if vectors.dtype != self.dtype or vectors.shape != (len(rows), self.width):
            raise ValueError(f"vectors {vectors.dtype} {vectors.shape}, expected {self.dtype} of {self.width}")
        cuts = np.searchsorted(rows, self.rows)
        for start, low, high, page in zip(self.rows[:-1], cuts[:-1], cuts[1:], self.pages(data), strict=True):
            page[rows[low:high] - start] = vectors[low:high]


def read_vectors(storage: Storage, manifest: Manifest, start: int, stop: int, column: str) -> NDArray[Any]:
    """The vectors [n, width] of rows [start, stop), as `read_rows` would give them."""
    pieces = [
        vectors_in(read_stored(storage, manifest.dataset, manifest.shards[number]), column)[low:high]
        for number, low, high in overlapping(manifest, start, stop)
    ]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def vectors_in(data: bytes, column: str) -> NDArray[Any]:
    """The vectors [n, width] of a shard's bytes, however it was written."""
    try:
        return find_vectors(data, column).read(data)
    except ValueError:
        return arrow_to_vectors(decode_table(data, [column]).column(column))


def is_stored_alike(one: bytes | memoryview, other: bytes | memoryview, column: str) -> bool:
    """Whether a column is the same bytes in two shards: the same values then, without decoding them."""
    told, pages = [], []
    for data in (one, other):
        metadata = pq.read_metadata(pa.BufferReader(data))
        chunks = [metadata.row_group(0).column(number) for number in range(metadata.num_columns)]
        chunk = next((chunk for chunk in chunks if chunk.path_in_schema == column), None)
        if metadata.num_row_groups != 1 or chunk is None:
            return False
        start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        pages.append(memoryview(data)[start : start + chunk.total_compressed_size])
        kinds = chunk.physical_type, chunk.compression, chunk.encodings, chunk.num_values
        told.append(kinds)
    return told[0] == told[1] and pages[0] == pages[1]


def find_vectors(data: bytes | memoryview, column: str) -> Vectors:
    """Where a vector column is in a shard's bytes. Raises ValueError for what `encode_table` would not have written."""
    file = pq.ParquetFile(pa.BufferReader(data))
    field, metadata = file.schema_arrow.field(column), file.metadata
    if not pa.types.is_fixed_size_list(field.type) or metadata.num_row_groups != 1:
        raise ValueError(f"{column} is {field.type} in {metadata.num_row_groups} row groups")
    group = metadata.row_group(0)
    chunks = [group.column(number) for number in range(group.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
    if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page or chunk.is_stats_set:
        raise ValueError(f"{column} is compressed, of a dictionary or has statistics")
    dtype, width = np.dtype(field.type.value_type.to_pandas_dtype()), int(field.type.list_size)
    rows, offsets, place = [0], [], int(chunk.data_page_offset)
    end = place + int(chunk.total_compressed_size)
    while place < end:
        header, place = _read_struct(data, place)
        size, page = header[_STORED_SIZE], header.get(_PAGE, {})
        if header[_TYPE] != _DATA_PAGE or size != header[_SIZE] or page.get(2) != _PLAIN:
            raise ValueError(f"{column} has a page of type {header[_TYPE]}, encoding {page.get(2)}")
        count, following = page[1], place + size
        for _ in range(2):  # where lists begin, and which values are there
            place += 4 + int.from_bytes(data[place : place + 4], "little")
        if count % width or following - place != count * dtype.itemsize:
            raise ValueError(f"a page of {column} holds {following - place} bytes for {count} values, some null")
        rows.append(rows[-1] + count // width)
        offsets.append(place)
        place = following
    if place != end or rows[-1] != metadata.num_rows:
        raise ValueError(f"the pages of {column} hold {rows[-1]} of {metadata.num_rows} rows")
    return Vectors(dtype, width, tuple(rows), tuple(offsets))


def _read_struct(data: bytes | memoryview, place: int) -> tuple[dict[int, Any], int]:
    """A Thrift struct in the compact protocol, of integers, booleans and structs: by field, and what follows it."""
    found: dict[int, Any] = {}
    field = 0
    while head := data[place]:
        place, kind, step = place + 1, head & 15, head >> 4
        if step:
            field += step
        else:
            field, place = _read_integer(data, place)
        if kind in (1, 2):
            found[field] = kind == 1
        elif kind in (4, 5, 6):
            found[field], place = _read_integer(data, place)
        elif kind == 12:
            found[field], place = _read_struct(data, place)
        else:
            raise ValueError(f"a page header has a field of type {kind}")
    return found, place + 1


def _read_integer(data: bytes | memoryview, place: int) -> tuple[int, int]:
    """A zigzag varint, and what follows it."""
    value = shift = 0
    while True:
        byte = data[place]
        place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return (value >> 1) ^ -(value & 1), place
