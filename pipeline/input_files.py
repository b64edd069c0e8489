"""The user's files as Arrow tables: Parquet, CSV and JSON lines, whole or in pieces, on any fsspec URL.

What the columns mean is decided in `sources.py`. Parquet is read by row groups; a text file (which may be compressed)
is one piece, so large ones should come as several files. Memory: the wanted columns of one piece.
"""

from __future__ import annotations

import csv as header_csv
import difflib
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.json as jsonl
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.contracts.errors import DataError, PipelineError
from pipeline.contracts.storage import describe_inputs, explain, open_input

ENDINGS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
DELIMITERS = (",", "\t", ";", "|")
PEEK_BYTES = 1 << 20
BLOCK_BYTES = 1 << 24  # of text parsed at once; a line must fit


@dataclass(frozen=True)
class InputFile:
    """One file that was opened and looks sound. row_groups has the rows of each; None for text files.

    integers are the columns whose every value is sure to be an int64 or null: only Parquet can promise that.
    """

    url: str
    format: str
    columns: tuple[str, ...]
    row_groups: tuple[int, ...] | None
    is_empty: bool
    delimiter: str = ","
    integers: tuple[str, ...] = ()
    bytes: int = 0


@dataclass(frozen=True)
class Piece:
    """The wanted columns of one task; rows are row numbers in the file, and malformed the rows no table can hold."""

    table: pa.Table
    rows: NDArray[np.int64]
    malformed: tuple[tuple[int, str, str], ...] = ()


def find_files(paths: Sequence[str], file_format: str, setting: str) -> list[InputFile]:
    """Every file that the paths, globs and folders name, opened and checked, each once, in the order given.

    setting is the dotted name of the settings that led here, for messages. Raises DataError naming what is missing,
    empty, cut off, or of a format that cannot be told.
    """
    found: dict[str, int | None] = {}
    for path in paths:
        for entry in _list(path, setting):
            found.setdefault(entry["url"], entry["bytes"])
    empty = [url for url, size in found.items() if size == 0]
    if empty:
        raise DataError(f"{empty[0]}: the file is empty (0 bytes); write it again or take it out of {setting}.paths")
    with ThreadPoolExecutor(16) as pool:
        files = list(pool.map(lambda url: inspect(url, file_format, setting, found[url] or 0), found))
    if all(file.is_empty for file in files):
        raise DataError(f"{files[0].url}: the file has a header but no rows; correct {setting}.paths")
    return files


def _list(path: str, setting: str) -> list[dict[str, Any]]:
    try:
        return describe_inputs(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; correct {setting}.paths") from None


def inspect(url: str, file_format: str = "auto", setting: str = "the settings", size: int = 0) -> InputFile:
    """Open one file and look at its footer or first lines; size is its bytes if they are known."""
    file_format = tell_format(url, setting) if file_format == "auto" else file_format
    if file_format == "parquet":
        with _explained(url, "opened as Parquet"), open_input(url) as file:
            footer = pq.ParquetFile(file)
            counts = tuple(footer.metadata.row_group(n).num_rows for n in range(footer.metadata.num_row_groups))
            names = tuple(footer.schema_arrow.names)
            integers = tuple(field.name for field in footer.schema_arrow if _fits_int64(field.type))
            return InputFile(url, file_format, names, counts, not sum(counts), ",", integers, size)
    with _explained(url, f"read as {file_format}"):
        head = _head(url)
        delimiter = _delimiter(head) if file_format == "csv" else ","
        table = _parse_head(head, file_format, delimiter)
    return InputFile(url, file_format, tuple(table.column_names), None, not table.num_rows, delimiter, (), size)


def _fits_int64(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_integer(kind) and not pa.types.is_uint64(kind))


def tell_format(url: str, setting: str = "the settings") -> str:
    """The format that the file's ending stands for."""
    name = url.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    for ending, file_format in ENDINGS.items():
        if name.endswith(ending):
            return file_format
    raise DataError(f"{url}: the ending tells no format ({', '.join(ENDINGS)}); set {setting}.format")


def check_columns(file: InputFile, wanted: dict[str, str]) -> None:
    """Raise DataError unless the file has the wanted columns; wanted maps a column to the setting that names it."""
    for column, setting in wanted.items():
        if column not in file.columns:
            nearest = difflib.get_close_matches(column, file.columns, 1, cutoff=0.0)
            hint = f"; the nearest name is {nearest[0]!r}" if nearest else ""
            raise DataError(
                f"{file.url}: there is no column {column!r}, which {setting} names; "
                f"found {', '.join(file.columns)}{hint}. Correct {setting}, or the file"
            )


def peek(file: InputFile, columns: Sequence[str] | None = None) -> pa.Table:
    """The first rows with types as found (CSV: inferred): of Parquet the first non-empty row group, of text 1 MB."""
    with _explained(file.url, "read"):
        if file.row_groups is None:
            table = _parse_head(_head(file.url), file.format, file.delimiter)
            return table.select(columns) if columns is not None else table
        first = next((n for n, rows in enumerate(file.row_groups) if rows), None)
        with open_input(file.url) as stream:
            parquet = pq.ParquetFile(stream)
            if first is None:
                return parquet.schema_arrow.empty_table()
            batches = parquet.iter_batches(10_000, row_groups=[first], columns=columns, use_threads=False)
            return pa.Table.from_batches([next(batches)])


def read_piece(task: dict[str, Any], columns: Sequence[str]) -> Piece:
    """The rows of one planned task; CSV values come as text, and rows with too many or too few of them as malformed."""
    url, names = task["url"], list(dict.fromkeys(columns))
    with _explained(url, "read"):
        if task["format"] == "parquet":
            first, last = task["row_groups"]
            with open_input(url) as stream:
                table = pq.ParquetFile(stream).read_row_groups(range(first, last), columns=names, use_threads=False)
            return Piece(table.select(names), np.arange(table.num_rows, dtype=np.int64) + task["first_row"])
        with open_input(url, "infer") as stream:
            if task["format"] == "csv":
                return _read_csv(stream, names, task["delimiter"])
            return _read_lines(stream, names)


def _read_csv(stream: BinaryIO, names: list[str], delimiter: str) -> Piece:
    malformed: list[tuple[int, str, str]] = []

    def set_aside(row: csv.InvalidRow) -> str:
        found, expected = row.actual_columns, row.expected_columns
        malformed.append((row.number - 2, f"the line has {found} values, expected {expected}", row.text))
        return "skip"

    table = csv.read_csv(
        stream,
        read_options=csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=set_aside),
        convert_options=csv.ConvertOptions(
            include_columns=names,
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    rows = np.arange(table.num_rows + len(malformed), dtype=np.int64)
    return Piece(table, np.delete(rows, [row for row, _, _ in malformed]), tuple(malformed))


def _read_lines(stream: BinaryIO, names: list[str]) -> Piece:
    options = jsonl.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
    table = jsonl.read_json(stream, options)
    dates = [(field.name, pa.string()) for field in table.schema if pa.types.is_timestamp(field.type)]
    if dates:  # guessed from text by Arrow; a key may look like a date too
        stream.seek(0)
        table = jsonl.read_json(stream, options, jsonl.ParseOptions(explicit_schema=pa.schema(dates)))
    for name in names:
        if name not in table.column_names:  # seen among the first rows of another file of the same source, null here
            table = table.append_column(name, pa.nulls(table.num_rows))
    return Piece(table.select(names), np.arange(table.num_rows, dtype=np.int64))


def _head(url: str) -> bytes:
    """Whole lines from the start of a text file: about 1 MB, at least one line after the header if there is one."""
    lines, size = [], 0
    with open_input(url, "infer") as stream:
        for line in stream:
            lines.append(line)
            size += len(line)
            if size > PEEK_BYTES and len(lines) > 1:
                break
    return b"".join(lines)


def _parse_head(head: bytes, file_format: str, delimiter: str) -> pa.Table:
    stream = io.BytesIO(head)
    if file_format == "jsonl":
        return jsonl.read_json(stream, jsonl.ReadOptions(use_threads=False, block_size=max(BLOCK_BYTES, len(head))))
    return csv.read_csv(
        stream,
        read_options=csv.ReadOptions(use_threads=False),
        parse_options=csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=lambda row: "skip"
        ),
    )


def _delimiter(head: bytes) -> str:
    """The sign that splits the header line into the most names."""
    header = head.split(b"\n", 1)[0].decode("utf-8", "replace")
    return max(DELIMITERS, key=lambda sign: len(next(header_csv.reader([header], delimiter=sign), [])))


@contextmanager
def _explained(url: str, verb: str) -> Iterator[None]:
    """Turn what Arrow and the file system say into one DataError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{url}: the file has gone since the run began; put it back and run again") from None
    except PermissionError as error:
        raise DataError(f"{url}: cannot be {verb}: {_first_line(error)}; give this user the right to read it") from None
    except (pa.ArrowException, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{url}: cannot be {verb}: {_first_line(error)}; the file is damaged, cut off or of another format: "
            "write it again, or set its format in the settings"
        ) from None
    except (PipelineError, MemoryError):
        raise
    except Exception as error:  # what object stores raise has no common base
        raise explain(f"read {url}", error) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(". ")
