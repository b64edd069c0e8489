"""Kernel of ingest: the user's files to clean, typed Arrow tables, one task at a time.

`plan_*` runs on the driver before work starts: it opens every file, checks its columns and cuts the whole into tasks,
small JSON-able dicts. `read_*` runs in Spark tasks. A wrong column (missing, of a wrong type, another unit of time)
is a DataError at once; a bad row is set aside with its file, row number and reason. Memory: one task's columns.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.contracts.config import FeatureColumn, InteractionsSource, ItemsSource
from pipeline.contracts.datasets import list_offsets, one_array
from pipeline.contracts.errors import DataError
from pipeline.contracts.schemas import QUARANTINE
from pipeline.input_files import COMPRESSIONS, InputFile, Piece, check_columns, find_files, peek, read_piece

FILE_STRIDE = 2**40
"""position = file number * FILE_STRIDE + row number: a total order over all input."""
FIRST_SECOND, LAST_SECOND = -5_364_662_400, 7_258_118_400
"""Years 1800 and 2200. Seconds beyond are really milliseconds; what is before is some system's word for no time."""
_LARGEST_ORDER = 2**62
_EXACT = {pa.float64(): 2**53, pa.float32(): 2**24, pa.float16(): 2**11}
"""Whole numbers below are told apart as floats of that type."""
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6}
CONTENT_PREFIX = "content_"
"""Before the user's names of content columns, so that none can clash with ours."""

INTERACTIONS = "task.data.interactions"
ITEMS = "task.data.items"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$|^[+-]?(inf|infinity|nan)$"
_ROW_BYTES = 16
"""Of the shortest line that is an event: a text file's rows are guessed from above."""
_NAIVE_TIME = r"^\d{4}-\d\d-\d\d([T ]\d\d(:\d\d){0,2})?$"
_ZONED_TIME = r"^\d{4}-\d\d-\d\d[T ]\d\d(:\d\d){0,2} ?(Z|[+-]\d\d(:?\d\d)?)$"
_NO_NUMBER = pa.array(["", "na", "n/a", "nan", "null", "none"])
_ARROW_TYPES = {
    "vector": pa.list_(pa.float32()),
    "numeric": pa.float64(),
    "categorical": pa.list_(pa.string()),
    "text": pa.string(),
}


# ------------------------------------------------------------------------------------------------ planning


def plan_interactions(source: InteractionsSource, rows_per_task: int) -> list[dict[str, Any]]:
    """Check every file and cut the input into tasks of about rows_per_task rows; a row group or text file is never cut.

    No task where there are no paths, as nothing came since an earlier run. Raises DataError naming the file and what is
    wrong with it.
    """
    if not source.paths:
        return []
    wanted = {getattr(source, name): f"{INTERACTIONS}.{name}" for name in _interaction_columns(source)}
    files = find_files(source.paths, source.format, INTERACTIONS)
    for file in files:
        check_columns(file, wanted)
    return _plan(files, rows_per_task)


def plan_items(source: ItemsSource, rows_per_task: int) -> list[dict[str, Any]]:
    """As plan_interactions; the length of every vector column is decided here, as the commonest of the first rows."""
    wanted = {column.name: f"{ITEMS}.columns" for column in source.columns}
    wanted |= {source.title: f"{ITEMS}.title"} if source.title else {}
    wanted |= {source.key: f"{ITEMS}.key"}
    files = find_files(source.paths, source.format, ITEMS)
    for file in files:
        check_columns(file, wanted)
    vectors = [column for column in source.columns if column.kind == "vector"]
    first = next(file for file in files if not file.is_empty)
    widths = {}
    if vectors:
        head = peek(first, [column.name for column in vectors])
        widths = {column.name: _common_width(head[column.name], column, first.url) for column in vectors}
    return [{**task, "widths": widths} for task in _plan(files, rows_per_task)]


def plan_files(files: Sequence[InputFile]) -> list[dict[str, Any]]:
    """One task, as read_piece takes it, for each file."""
    return _plan(files, FILE_STRIDE)


def as_keys(column: pa.ChunkedArray, where: str, file_format: str) -> pa.Array:
    """A column of keys as text, null where there is none; where is its place, for messages."""
    return _as_keys(column, where, INTERACTIONS, file_format)


def file_of(position: int) -> int:
    """The number of the file, in the order of the plan, that a position lies in."""
    return position // FILE_STRIDE


def row_of(position: int) -> int:
    """The row number, from 0, that a position has in its file."""
    return position % FILE_STRIDE


def _plan(files: Sequence[InputFile], rows_per_task: int) -> list[dict[str, Any]]:
    tasks: list[dict[str, Any]] = []
    for number, file in enumerate(files):
        common = {
            "url": file.url, "format": file.format, "delimiter": file.delimiter, "integers": list(file.integers)
        }  # fmt: skip
        if file.row_groups is None:
            packed = 4 if file.url.lower().endswith(COMPRESSIONS) else 1
            guess = {"rows": file.bytes * packed // _ROW_BYTES, "position": number * FILE_STRIDE}
            tasks.append({**common, "row_groups": None, "first_row": 0, **guess})
            continue
        start, first_row, rows = 0, 0, 0
        for group, count in enumerate(file.row_groups):
            if rows and rows + count > rows_per_task:
                tasks.append({**common, "row_groups": [start, group], "first_row": first_row, "rows": rows})
                start, first_row, rows = group, first_row + rows, 0
            rows += count
        if rows:
            end = len(file.row_groups)
            tasks.append({**common, "row_groups": [start, end], "first_row": first_row, "rows": rows})
        for task in tasks:
            task.setdefault("position", number * FILE_STRIDE + task["first_row"])
    return tasks


def _common_width(column: pa.ChunkedArray, feature: FeatureColumn, url: str) -> int:
    lengths = pc.list_value_length(_as_lists(column, feature, url)[0]).drop_null().to_pylist()
    if not any(lengths):
        raise DataError(f"{url}: column {feature.name} has no vector in the first rows; take it out of {ITEMS}.columns")
    return int(min(Counter(lengths).items(), key=lambda item: (-item[1], item[0]))[0])


def _interaction_columns(source: InteractionsSource) -> list[str]:
    return [name for name in ("user", "item", "timestamp", "weight", "event") if getattr(source, name)]


# ------------------------------------------------------------------------------------------------ reading


class _BadRows:
    """Rows to set aside: the first reason found for each."""

    def __init__(self, num_rows: int) -> None:
        self.mask = np.zeros(num_rows, dtype=bool)
        self.reasons: dict[int, str] = {}

    def add(self, mask: NDArray[np.bool_], reason: str | Callable[[int], str]) -> None:
        """Set aside the masked rows; reason is a text or makes one from a row's place in the table."""
        for row in np.flatnonzero(mask & ~self.mask).tolist():
            self.reasons[row] = reason if isinstance(reason, str) else reason(row)
        self.mask |= mask

    def table(self, piece: Piece, url: str) -> pa.Table:
        """As schemas.QUARANTINE, in row order, with what the file could not even hold as a row."""
        places = np.flatnonzero(self.mask)
        values = _without_long_lists(piece.table).take(pa.array(places)).to_pylist()
        lines = [
            (int(piece.rows[place]), self.reasons[place], {name: _shortened(value) for name, value in row.items()})
            for place, row in zip(places.tolist(), values, strict=True)
        ]
        lines += [(row, reason, {"line": _shortened(text)}) for row, reason, text in piece.malformed]
        lines.sort(key=lambda line: line[0])
        return pa.table(
            [
                [url] * len(lines),
                [row for row, _, _ in lines],
                [reason for _, reason, _ in lines],
                [json.dumps(row, ensure_ascii=False) for _, _, row in lines],
            ],
            schema=QUARANTINE.arrow,
        )


def read_interactions(
    task: dict[str, Any], source: InteractionsSource, integers: Collection[str] = ()
) -> tuple[pa.Table, pa.Table, int]:
    """One task's events as (good, bad, number dropped because they weigh 0).

    good has user_key and item_key string, timestamp int64 (seconds since 1970, UTC, or the order), position int64 and
    weight float32 above 0; bad is as schemas.QUARANTINE. The keys of the sides ("user", "item") in integers stay
    int64: the task must promise that they are. Raises DataError for a column that cannot be what it should.
    """
    url = task["url"]
    piece = read_piece(task, [getattr(source, name) for name in _interaction_columns(source)])
    bad = _BadRows(piece.table.num_rows)
    keys = {}
    for side in ("user", "item"):
        name = getattr(source, side)
        where, setting = f"{url}: column {name}", f"{INTERACTIONS}.{side}"
        keys[side] = _as_keys(piece.table[name], where, setting, task["format"], side in integers)
        bad.add(_mask(pc.is_null(keys[side])), f"{side} key is null or empty ({name})")
    timestamps = _read_timestamps(piece.table[source.timestamp], source, url, bad)
    weights = _read_weights(piece.table, source, url, bad)
    zero = weights == 0
    kept = ~bad.mask & ~zero
    good = pa.table(
        {
            "user_key": keys["user"],
            "item_key": keys["item"],
            "timestamp": timestamps,
            "position": piece.rows - task["first_row"] + task["position"],
            "weight": weights,
        }
    )
    good = good if kept.all() else good.filter(pa.array(kept))
    return good, bad.table(piece, url), int((zero & ~bad.mask).sum())


def read_items(task: dict[str, Any], source: ItemsSource, integers: bool = False) -> tuple[pa.Table, pa.Table]:
    """One task's items as (good, bad).

    good has item_key (int64 with integers, else string), title string, position int64, then the content columns in the
    settings' order, as content_schema has them: null where missing, vectors finite and of one length, names of
    categories stripped and never empty. bad is as schemas.QUARANTINE. Duplicate keys are for ingest to find, which sees
    all tasks.
    """
    return clean_items(read_piece(task, item_columns(source)), task, source, integers)


def item_columns(source: ItemsSource) -> list[str]:
    """The columns of the user's items that are read."""
    return [source.key, *([source.title] if source.title else []), *(column.name for column in source.columns)]


def clean_items(
    piece: Piece, task: dict[str, Any], source: ItemsSource, integers: bool = False
) -> tuple[pa.Table, pa.Table]:
    """What read_items makes of rows that were read already; of task the url, for messages, and the vectors' widths."""
    url = task["url"]
    bad = _BadRows(piece.table.num_rows)
    where, text = f"{url}: column {source.key}", task.get("format", "")
    keys = _as_keys(piece.table[source.key], where, f"{ITEMS}.key", text, integers)
    bad.add(_mask(pc.is_null(keys)), f"item key is null or empty ({source.key})")
    good = {
        "item_key": keys,
        "title": pa.nulls(piece.table.num_rows, pa.string()),
        "position": pa.array(piece.rows - task.get("first_row", 0) + task.get("position", 0)),
    }
    if source.title:
        good["title"] = _as_text(piece.table[source.title], f"{url}: column {source.title}", f"{ITEMS}.title")
    for column in source.columns:
        good[CONTENT_PREFIX + column.name] = _read_content(piece.table[column.name], column, task, keys, bad)
    return pa.table(good).filter(pa.array(~bad.mask)), bad.table(piece, url)


def content_schema(source: ItemsSource) -> pa.Schema:
    """The content columns that read_items gives."""
    return pa.schema([pa.field(CONTENT_PREFIX + column.name, _ARROW_TYPES[column.kind]) for column in source.columns])


def _read_timestamps(column: pa.ChunkedArray, source: InteractionsSource, url: str, bad: _BadRows) -> pa.Array:
    """Seconds since 1970 (or the order), null where bad; rows without a sensible time are set aside."""
    name, unit = source.timestamp, source.timestamp_unit
    where, setting = f"{url}: column {name}", f"{INTERACTIONS}.timestamp_unit"
    array = _plain(column)
    missing = _mask(pc.is_null(array))
    if pa.types.is_date(array.type) or pa.types.is_timestamp(array.type):
        seconds = _temporal_seconds(array)
    elif unit == "iso":
        if not _is_text(array.type):
            raise DataError(f"{where} is {array.type}{_such_as(array)}, expected ISO dates; correct {setting}")
        seconds = _iso_seconds(array)
        if seconds.null_count == len(seconds) > missing.sum():
            raise DataError(f"{where} has text{_such_as(array)}, expected ISO 8601 dates; correct {setting}")
    else:
        hint = f"expected {unit}; correct {INTERACTIONS}.timestamp, or set {setting}: iso if these are dates"
        seconds = _check_unit(_as_whole_numbers(array, where, hint), unit, where, setting)
    values = seconds.fill_null(0)
    bad.add(missing, f"timestamp is null ({name})")
    expected = "an ISO 8601 date" if unit == "iso" else f"a time in {unit}"
    bad.add(_mask(pc.is_null(seconds)), lambda row: f"timestamp {_shown(array[row])} is not {expected} ({name})")
    if unit == "order":
        places = values.to_numpy()
        wild = (places > _LARGEST_ORDER) | (places < -_LARGEST_ORDER)
        bad.add(wild, lambda row: f"order {_shown(array[row])} is no place ({name})")
    else:
        late, early = values.to_numpy() > LAST_SECOND, values.to_numpy() < FIRST_SECOND
        bad.add(late, lambda row: f"timestamp {_shown(array[row])} is after the year 2200 ({name})")
        bad.add(early, lambda row: f"timestamp {_shown(array[row])} is before the year 1800 ({name})")
    return values


def _check_unit(values: pa.Array, unit: str, where: str, setting: str) -> pa.Array:
    """Epoch numbers to seconds; DataError if most of them are only sensible in another unit."""
    if unit == "order" or values.null_count == len(values):
        return values
    raw = values.drop_null().to_numpy()
    middle = int(np.partition(raw, len(raw) // 2)[len(raw) // 2])
    likely = next((u for u, size in UNITS.items() if 7e8 < middle / size < LAST_SECOND), None)
    late, early = middle / UNITS[unit] > LAST_SECOND, abs(middle / UNITS[unit]) < 1e8 and unit != "seconds"
    if late or (early and likely):
        found = f"which as {unit} is {'after the year 2200' if late else 'before the year 1974'}"
        remedy = f"these look like {likely}: set {setting}: {likely}" if likely else f"no unit of {setting} fits"
        raise DataError(f"{where} has a median of {middle}, {found}; {remedy}")
    divided = np.floor_divide(values.fill_null(0).to_numpy(), UNITS[unit])
    return pa.array(divided, mask=_mask(pc.is_null(values)))


def _read_weights(table: pa.Table, source: InteractionsSource, url: str, bad: _BadRows) -> NDArray[np.float32]:
    if source.weight:
        column = _plain(table[source.weight])
        setting = f"{INTERACTIONS}.weight"
        values, known = _as_numbers(column, f"{url}: column {source.weight}", f"expected numbers; correct {setting}")
        with np.errstate(over="ignore"):
            weights = values.astype(np.float32)
        wrong = ~known | ~np.isfinite(weights) | (weights < 0)
        reason = f"is not a finite number of at least 0 ({source.weight})"
        bad.add(wrong, lambda row: f"weight {_shown(column[row])} {reason}")
        return np.where(wrong, np.float32(0), weights)
    if source.event:
        where = f"{url}: column {source.event}"
        kinds = _as_text(table[source.event], where, f"{INTERACTIONS}.event")
        places = pc.index_in(kinds, value_set=pa.array(list(source.event_weights), pa.string()))
        wrong = _mask(pc.is_null(places))
        bad.add(wrong, lambda row: f"event {_shown(kinds[row])} is not in event_weights ({source.event})")
        table_of_weights = np.array(list(source.event_weights.values()), dtype=np.float32)
        return np.where(wrong, np.float32(0), table_of_weights[places.fill_null(0).to_numpy()])
    return np.ones(table.num_rows, dtype=np.float32)


def _read_content(
    column: pa.ChunkedArray, feature: FeatureColumn, task: dict[str, Any], keys: pa.Array, bad: _BadRows
) -> pa.Array:
    where = f"{task['url']}: column {feature.name}"
    if feature.kind == "vector":
        return _read_vectors(column, feature, task, keys, bad)
    if feature.kind == "categorical":
        return _as_names(column, feature.separator, where)
    if feature.kind == "text":
        return _as_text(column, where, f"{ITEMS}.columns")
    array = _plain(column)
    values, known = _as_numbers(array, where, f"expected numbers; correct its kind in {ITEMS}.columns")
    missing = _mask(pc.is_null(array)) | _mask(_says_nothing(array)) | np.isnan(np.where(known, values, 0))
    wrong = ~missing & ~(known & np.isfinite(values))
    if feature.log:
        wrong |= ~missing & (values < 0)
    expected = "a finite number of at least 0 (log)" if feature.log else "a finite number"
    bad.add(wrong, lambda row: f"{feature.name} of item {_shown(keys[row])} is {_shown(array[row])}, not {expected}")
    return pa.array(values, mask=missing | wrong)


def _read_vectors(
    column: pa.ChunkedArray, feature: FeatureColumn, task: dict[str, Any], keys: pa.Array, bad: _BadRows
) -> pa.Array:
    """list<float32>, null where missing; a wrong length, a null or a number that is not finite sets the row aside."""
    lists, unreadable = _as_lists(column, feature, task["url"])
    width = task["widths"][feature.name]
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)
    missing = _mask(pc.is_null(lists))
    values = _floats(pc.list_flatten(lists))
    unreal = np.zeros(len(lists), dtype=bool)
    unreal[pc.list_parent_indices(lists).to_numpy()[~np.isfinite(values)]] = True

    def named(row: int) -> str:
        return f"{feature.name} of item {_shown(keys[row])}"

    bad.add(unreadable, lambda row: f"{named(row)} is not a list of numbers")
    bad.add(~missing & (lengths != width), lambda row: f"{named(row)} has {lengths[row]} numbers, expected {width}")
    bad.add(unreal, lambda row: f"{named(row)} holds NaN, infinity or null, expected {width} finite numbers")
    offsets = _offsets(lengths)
    return pa.ListArray.from_arrays(offsets, pa.array(values), type=_ARROW_TYPES["vector"], mask=pa.array(missing))


# ------------------------------------------------------------------------------------------------ columns to types


def _plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array, without dictionary encoding, text as plain string."""
    array = one_array(column)
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    return array.cast(pa.string()) if _is_text(array.type) else array


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_whole_decimal(kind: pa.DataType) -> bool:
    return bool(pa.types.is_decimal(kind) and kind.scale == 0)


def _is_number(kind: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean, pa.types.is_null)
    return any(test(kind) for test in tests)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _as_keys(column: pa.ChunkedArray, where: str, setting: str, file_format: str, integers: bool = False) -> pa.Array:
    """Text or integers as text, null where null or blank; whole numbers that went through floats lose `.0`.

    So does the text of a CSV file whose keys all end so; of other files text is text.
    """
    array = _plain(column)
    kind = array.type
    if integers:
        return array.cast(pa.int64())
    wrong = f"expected text or integers as keys; correct {setting}"
    if pa.types.is_floating(kind):
        wide = pa.float64()
        array = array.cast(wide)
        finite = pc.if_else(pc.is_finite(array), array, pa.scalar(None, wide))
        fractions = finite.filter(pc.not_equal(finite, pc.trunc(finite)))
        if len(fractions):
            raise DataError(f"{where} is {kind}{_such_as(fractions)}, {wrong}")
        large = finite.filter(pc.greater_equal(pc.abs(finite), pa.scalar(_EXACT[kind], wide)))
        if len(large):
            raise DataError(
                f"{where} is {kind}{_such_as(large)}: keys so large have lost digits; write them as text or int64"
            )
        array = finite.cast(pa.int64(), safe=False)
    elif not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind) or _is_whole_decimal(kind)):
        raise DataError(f"{where} is {kind}{_such_as(array)}, {wrong}")
    keys = array.cast(pa.string())
    keys = pc.if_else(pc.equal(pc.utf8_trim_whitespace(keys), ""), pa.scalar(None, pa.string()), keys)
    is_text = file_format == "csv" and keys.null_count < len(keys)
    if not is_text or not pc.all(pc.ends_with(keys, ".0")).as_py():  # nearly always, and cheap to see
        return keys
    floats = pc.all(pc.match_substring_regex(keys, r"^-?\d+\.0$")).as_py()
    return pc.utf8_slice_codeunits(keys, 0, -2) if floats else keys


def _as_text(column: pa.ChunkedArray, where: str, setting: str) -> pa.Array:
    array = _plain(column)
    if pa.types.is_nested(array.type) or pa.types.is_binary(array.type):
        raise DataError(f"{where} is {array.type}{_such_as(array)}, expected text; correct {setting}")
    if pa.types.is_floating(array.type):
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
    return array.cast(pa.string())


def _as_names(column: pa.ChunkedArray, separator: str | None, where: str) -> pa.Array:
    """Each row's names, stripped, without empty ones; null where none is left."""
    array = _plain(column)
    if not _is_list(array.type):
        text = _as_text(array, where, f"{ITEMS}.columns")
        single = pa.ListArray.from_arrays(list_offsets(np.arange(len(text) + 1)), text)
        array = pc.split_pattern(text, separator) if separator else single
    names = pc.utf8_trim_whitespace(_as_text(pc.list_flatten(array), where, f"{ITEMS}.columns"))
    kept = _mask(pc.greater(pc.utf8_length(names), 0).fill_null(False))
    rows = pc.list_parent_indices(array).to_numpy()[kept]
    lengths = np.bincount(rows, minlength=len(array))
    stripped, missing = names.filter(pa.array(kept)), pa.array(lengths == 0)
    return pa.ListArray.from_arrays(_offsets(lengths), stripped, type=_ARROW_TYPES["categorical"], mask=missing)


def _as_lists(column: pa.ChunkedArray, feature: FeatureColumn, url: str) -> tuple[pa.Array, NDArray[np.bool_]]:
    """Lists of numbers, from lists or from text such as `[1, 2]` or `1;2`; and which rows cannot be read so."""
    array = _plain(column)
    wrong = f"{url}: column {feature.name} is {array.type}{_such_as(array)}, expected lists of numbers"
    if _is_text(array.type):
        text = pc.utf8_trim_whitespace(pc.replace_substring_regex(array, r"[\[\]\(\)]", ""))
        words = pc.split_pattern_regex(text, r"[,;\s]+")
        numbers, known = _as_numbers(pc.list_flatten(words), wrong, f"correct its kind in {ITEMS}.columns")
        unreadable = np.zeros(len(array), dtype=bool)
        unreadable[pc.list_parent_indices(words).to_numpy()[~known]] = True
        offsets, mask = _offsets(pc.list_value_length(words).fill_null(0).to_numpy()), pc.is_null(words)
        return pa.ListArray.from_arrays(offsets, pa.array(np.where(known, numbers, 0)), mask=mask), unreadable
    element = array.type.value_type if _is_list(array.type) else pa.string()
    if pa.types.is_null(array.type):
        array = pa.nulls(len(array), _ARROW_TYPES["vector"])
    elif not (pa.types.is_floating(element) or pa.types.is_integer(element) or pa.types.is_null(element)):
        raise DataError(f"{wrong}; correct its kind in {ITEMS}.columns")
    return array, np.zeros(len(array), dtype=bool)


def _offsets(lengths: NDArray[np.integer]) -> pa.Array:
    return list_offsets(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


def _as_numbers(array: pa.Array, where: str, remedy: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Values as float64 and which of them are numbers; DataError if the type, or every single value, is not numeric."""
    if _is_text(array.type):
        text = pc.utf8_trim_whitespace(array)
        numbers = _try_cast(text, pa.float64(), _NUMBER)
        known = _mask(pc.is_valid(numbers))
        if not known.any() and not pc.all(_says_nothing(text)).as_py():
            raise DataError(f"{where} is text{_such_as(array)}; {remedy}")
        return _floats(numbers, np.float64), known
    if not _is_number(array.type):
        raise DataError(f"{where} is {array.type}{_such_as(array)}; {remedy}")
    return _floats(array, np.float64), _mask(pc.is_valid(array))


def _as_whole_numbers(array: pa.Array, where: str, remedy: str) -> pa.Array:
    """int64, rounded down, null where not a finite number that fits."""
    if pa.types.is_integer(array.type) and not pa.types.is_uint64(array.type):
        return array.cast(pa.int64())
    if _is_text(array.type):
        whole = _try_cast(pc.utf8_trim_whitespace(array), pa.int64(), r"^[+-]?\d{1,19}$")
        if whole.null_count == array.null_count:
            return whole
    values, known = _as_numbers(array, where, remedy)
    known = known & (np.abs(np.where(known, values, 0)) < 2.0**62)
    return pa.array(np.floor(np.where(known, values, 0)).astype(np.int64), mask=~known)


def _temporal_seconds(array: pa.Array) -> pa.Array:
    if pa.types.is_date(array.type):
        array = array.cast(pa.timestamp("s"))
    size = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[array.type.unit]
    ticks = array.cast(pa.int64())
    return pa.array(np.floor_divide(ticks.fill_null(0).to_numpy(), size), mask=_mask(pc.is_null(ticks)))


def _iso_seconds(text: pa.Array) -> pa.Array:
    """Dates and times with or without a zone (UTC then); null where it is neither."""
    whole = pc.replace_substring_regex(pc.utf8_trim_whitespace(text), r"(:\d\d)[.,]\d+", r"\1")
    naive = _try_cast(whole, pa.timestamp("s"), _NAIVE_TIME).cast(pa.int64())
    if naive.null_count == text.null_count:
        return naive
    rest = pc.if_else(pc.is_null(naive), whole, pa.scalar(None, pa.string()))
    joined = pc.replace_substring_regex(rest, r" (Z|[+-]\d\d(:?\d\d)?)$", r"\1")
    zoned = _try_cast(joined, pa.timestamp("s", "UTC"), _ZONED_TIME).cast(pa.int64())
    return pc.coalesce(naive, zoned)


def _try_cast(text: pa.Array, kind: pa.DataType, pattern: str) -> pa.Array:
    """Text to another type, null where it cannot be: pattern sorts out most, halving finds the rest (30 February)."""
    try:
        return text.cast(kind)
    except pa.ArrowInvalid:
        pass
    matching = pc.match_substring_regex(text, pattern, ignore_case=True)
    return _cast_by_halves(pc.if_else(matching, text, pa.scalar(None, pa.string())), kind)


def _cast_by_halves(text: pa.Array, kind: pa.DataType) -> pa.Array:
    try:
        return text.cast(kind)
    except pa.ArrowInvalid:
        if len(text) == 1:
            return pa.nulls(1, kind)
    half = len(text) // 2
    return pa.concat_arrays([_cast_by_halves(text[:half], kind), _cast_by_halves(text[half:], kind)])


def _says_nothing(array: pa.Array) -> pa.Array:
    """Which values are null, or a word that means it."""
    if not _is_text(array.type):
        return pc.is_null(array)
    return pc.or_(pc.is_null(array), pc.is_in(pc.utf8_lower(pc.utf8_trim_whitespace(array)), value_set=_NO_NUMBER))


def _floats(array: pa.Array, dtype: type[np.floating] = np.float32) -> NDArray[Any]:
    """Numbers as floats, NaN where null."""
    wide = pa.float64() if dtype is np.float64 else pa.float32()
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    values: NDArray[Any] = array.cast(wide, safe=False).to_numpy(zero_copy_only=False)
    return values


def _mask(array: pa.Array) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = array.to_numpy(zero_copy_only=False)
    return mask


def _without_long_lists(table: pa.Table) -> pa.Table:
    """The first few elements of every list: a whole vector as Python numbers would fill memory and tell no more."""
    for place, field in enumerate(table.schema):
        if _is_list(field.type):
            start = pc.list_slice(table.column(place), 0, 6, return_fixed_size_list=False)
            table = table.set_column(place, field.name, start)
    return table


def _such_as(array: pa.Array) -> str:
    """` such as 'x'`: the first value that is there, or nothing."""
    first = array.drop_null()[:1]
    return f" such as {_shown(first[0])}" if len(first) else ""


def _shown(value: pa.Scalar) -> str:
    return _shortened(repr(value.as_py()))


def _shortened(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
