"""Sources: what good files give, and what every kind of bad file or row says."""

from __future__ import annotations

import gzip
import json
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import sources
from pipeline.contracts.config import InteractionsSource, ItemsSource
from pipeline.contracts.errors import DataError, StorageError
from pipeline.contracts.schemas import QUARANTINE

NOON = 1_300_000_000
EVENTS: dict[str, list[Any]] = {"user": ["u1", "u2", "u1"], "item": [7, 8, 9], "time": [NOON, NOON + 1, NOON + 2]}


def write(path: Path, columns: dict[str, Any], row_group_size: int | None = None) -> Path:
    """The columns as a file of the format that the name stands for."""
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=row_group_size)
        return path
    if path.name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        return path
    lines = [",".join(table.column_names)]
    lines += [",".join("" if v is None else str(v) for v in row.values()) for row in table.to_pylist()]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(*paths: Path | str, rows_per_task: int = 1000, **changes: Any) -> tuple[pa.Table, pa.Table, int]:
    """Plan and read interactions; the columns are user, item and time unless changed."""
    given = {"paths": [str(path) for path in paths], "user": "user", "item": "item", "timestamp": "time"}
    source = InteractionsSource.model_validate({**given, **changes})
    parts = [sources.read_interactions(task, source) for task in sources.plan_interactions(source, rows_per_task)]
    good, bad = (pa.concat_tables([part[place] for part in parts]) for place in (0, 1))
    return good, bad, sum(part[2] for part in parts)


def read_items(*paths: Path, columns: list[dict[str, Any]] | None = None, **changes: Any) -> tuple[pa.Table, pa.Table]:
    """Plan and read items keyed by `item`."""
    given = {"paths": [str(path) for path in paths], "key": "item", "columns": columns or []}
    source = ItemsSource.model_validate({**given, **changes})
    parts = [sources.read_items(json.loads(json.dumps(task)), source) for task in sources.plan_items(source, 1000)]
    good, bad = (pa.concat_tables([part[place] for part in parts]) for place in (0, 1))
    kinds = {
        "vector": pa.list_(pa.float32()), "numeric": pa.float64(), "categorical": pa.list_(pa.string()),
        "text": pa.string(),
    }  # fmt: skip
    assert good.schema.names[3:] == [f"content_{column.name}" for column in source.columns]
    assert good.schema.types[3:] == [kinds[column.kind] for column in source.columns]
    return good, bad


def reasons(bad: pa.Table) -> list[tuple[int, str]]:
    """Row numbers and reasons of a quarantine table, checked to have its schema."""
    assert bad.schema.equals(QUARANTINE.arrow)
    for row in bad.to_pylist():
        assert row["source"].startswith("file://")
        json.loads(row["values"])
    return list(zip(bad["row"].to_pylist(), bad["reason"].to_pylist(), strict=True))


# ------------------------------------------------------------------------------------------------ good input


@pytest.mark.parametrize("ending", ["parquet", "csv", "csv.gz", "jsonl"])
def test_every_format_gives_the_same_events(tmp_path: Path, ending: str) -> None:
    good, bad, dropped = read(write(tmp_path / f"events.{ending}", EVENTS))
    assert good.to_pydict() == {
        "user_key": ["u1", "u2", "u1"],
        "item_key": ["7", "8", "9"],
        "timestamp": [NOON, NOON + 1, NOON + 2],
        "position": [0, 1, 2],
        "weight": [1.0, 1.0, 1.0],
    }
    assert good.schema.types == [pa.string(), pa.string(), pa.int64(), pa.int64(), pa.float32()]
    assert (bad.num_rows, dropped) == (0, 0)


def test_row_groups_and_files_become_tasks_with_positions_in_their_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", EVENTS, row_group_size=1)
    source = InteractionsSource(paths=(str(tmp_path / "*.parquet"),), user="user", item="item", timestamp="time")
    plan = sources.plan_interactions(source, 2)
    assert [task["row_groups"] for task in plan] == [[0, 2], [2, 3]] * 2
    positions = [p for task in plan for p in sources.read_interactions(task, source)[0]["position"].to_pylist()]
    assert positions == [0, 1, 2, 2**40, 2**40 + 1, 2**40 + 2]
    assert (sources.file_of(positions[-1]), sources.row_of(positions[-1])) == (1, 2)


def test_a_folder_and_a_file_in_it_are_read_once(tmp_path: Path) -> None:
    path = write(tmp_path / "events.parquet", EVENTS)
    (tmp_path / "_SUCCESS").write_text("")
    assert read(tmp_path, path)[0].num_rows == 3


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2, 3], pa.uint16()),
        pa.array(["1", "2", "3"], pa.large_string()),
        pa.array(["1", "2", "3"]).dictionary_encode(),
        pa.array([1.0, 2.0, 3.0]),
        pa.array(np.array([1, 2, 3], np.float16)),
    ],
)
def test_keys_of_any_text_or_integer_type_become_the_same_text(tmp_path: Path, column: pa.Array) -> None:
    good, _, _ = read(write(tmp_path / "events.parquet", {**EVENTS, "item": column}))
    assert good["item_key"].to_pylist() == ["1", "2", "3"]


def test_text_that_ends_like_a_float_is_a_key_of_its_own_but_in_csv(tmp_path: Path) -> None:
    """Where text is all there is, whole files of it went through floats; elsewhere it would depend on the row group."""
    column = pa.array(["1.0", "2.0", "3.0"])
    for ending, expected in (("parquet", ["1.0", "2.0", "3.0"]), ("csv", ["1", "2", "3"])):
        good, _, _ = read(write(tmp_path / f"events.{ending}", {**EVENTS, "item": column}))
        assert good["item_key"].to_pylist() == expected
    mixed, _, _ = read(write(tmp_path / "mixed.csv", {**EVENTS, "item": pa.array(["1.0", "2.0", "3.1"])}))
    assert mixed["item_key"].to_pylist() == ["1.0", "2.0", "3.1"]


@pytest.mark.parametrize(("kind", "largest"), [(pa.float64(), 2**53), (pa.float32(), 2**24)])
def test_keys_that_are_too_large_for_their_floats_are_refused(tmp_path: Path, kind: pa.DataType, largest: int) -> None:
    """JSON's numbers are floats as soon as one fits no int64; two users would be one."""
    small = {**EVENTS, "user": pa.array([largest - 1, 1 - largest, 3], pa.float64()).cast(kind)}
    assert read(write(tmp_path / "small.parquet", small))[0]["user_key"].to_pylist() == [
        str(largest - 1), str(1 - largest), "3",
    ]  # fmt: skip
    large = {**EVENTS, "user": pa.array([5, -largest, 3], pa.float64()).cast(kind)}
    with pytest.raises(DataError, match=r"column user is (float|double) such as -.*: keys so large have lost digits"):
        read(write(tmp_path / "large.parquet", large))
    lines = [json.dumps({"user": user, "item": 1, "time": NOON}) for user in (2**63 + 5, 7 * 10**18 + 1)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="keys so large have lost digits"):
        read(str(tmp_path / "events.jsonl"))


@pytest.mark.parametrize(
    ("unit", "bad", "reason"),
    [
        ("seconds", -62_135_596_800, "timestamp -62135596800 is before the year 1800 (time)"),
        ("milliseconds", -(2**63), "timestamp -9223372036854775808 is before the year 1800 (time)"),
        ("seconds", -(2**63), "timestamp -9223372036854775808 is before the year 1800 (time)"),
        ("order", -(2**63), "order -9223372036854775808 is no place (time)"),
    ],
)
def test_what_stands_for_no_time_is_set_aside(tmp_path: Path, unit: str, bad: int, reason: str) -> None:
    """One such would stretch the split by time over two thousand years."""
    size = 1000 if unit == "milliseconds" else 1
    times = [NOON * size, bad, (NOON + 2) * size]
    good, set_aside, _ = read(write(tmp_path / "events.parquet", {**EVENTS, "time": times}), timestamp_unit=unit)
    assert good["timestamp"].to_pylist() == [NOON, NOON + 2]
    assert reasons(set_aside) == [(1, reason)]


@pytest.mark.parametrize(
    ("unit", "values"),
    [
        ("seconds", [NOON, NOON + 60]),
        ("seconds", [NOON + 0.9, NOON + 60.0]),
        ("seconds", [str(NOON), f"{NOON + 60}.5"]),
        ("milliseconds", [NOON * 1000 + 999, (NOON + 60) * 1000]),
        ("microseconds", [NOON * 10**6, (NOON + 60) * 10**6]),
        ("iso", ["2011-03-13T07:06:40", "2011-03-13 07:07:40.25"]),
        ("iso", ["2011-03-13T07:06:40Z", "2011-03-13T09:07:40+02:00"]),
        ("iso", ["2011-03-13 07:06:40 Z", "2011-03-13 02:07:40 -05:00"]),
        ("iso", ["2011-03-13 09:06:40 +0200", "2011-03-13 09:07:40 +02"]),
        ("iso", ["2011-03-13T07:06:40", "2011-03-13T07:07:40.123456789Z"]),
        ("iso", [datetime(2011, 3, 13, 7, 6, 40), datetime(2011, 3, 13, 7, 7, 40)]),
        ("iso", [datetime(2011, 3, 13, 7, m, 40, tzinfo=timezone.utc) for m in (6, 7)]),
        ("order", [NOON, NOON + 60]),
    ],
)
def test_times_of_every_unit_become_seconds(tmp_path: Path, unit: str, values: list[Any]) -> None:
    path = write(tmp_path / "events.parquet", {"user": ["a", "a"], "item": [1, 2], "time": values})
    assert read(path, timestamp_unit=unit)[0]["timestamp"].to_pylist() == [NOON, NOON + 60]


def test_dates_are_midnight_and_times_before_1970_round_down(tmp_path: Path) -> None:
    days = {"user": ["a", "a"], "item": [1, 2], "time": [date(1970, 1, 2), date(1969, 12, 31)]}
    assert read(write(tmp_path / "d.parquet", days))[0]["timestamp"].to_pylist() == [86400, -86400]
    halves = {**days, "time": pa.array([-500, 1500], pa.timestamp("ms"))}
    assert read(write(tmp_path / "h.parquet", halves))[0]["timestamp"].to_pylist() == [-1, 1]


def test_weights_and_event_kinds_weigh_and_zeros_are_counted_out(tmp_path: Path) -> None:
    path = write(tmp_path / "events.csv", {**EVENTS, "stars": [2.5, 0, 4], "kind": ["buy", "view", "view"]})
    good, bad, dropped = read(path, weight="stars")
    assert (good["weight"].to_pylist(), bad.num_rows, dropped) == ([2.5, 4.0], 0, 1)
    good, bad, dropped = read(path, event="kind", event_weights={"buy": 3, "view": 0})
    assert (good["weight"].to_pylist(), bad.num_rows, dropped) == ([3.0], 0, 2)


def test_items_come_typed_whatever_they_are_stored_as(tmp_path: Path) -> None:
    columns = [
        {"name": "title", "kind": "text"},
        {"name": "price", "kind": "numeric"},
        {"name": "genres", "kind": "categorical", "separator": "|"},
        {"name": "brand", "kind": "categorical"},
        {"name": "vector", "kind": "vector"},
    ]
    expected = {
        "item_key": ["1", "2"],
        "title": ["lamp", None],
        "position": [0, 1],
        "content_title": ["lamp", None],
        "content_price": [2.5, None],
        "content_genres": [["a", "b"], None],
        "content_brand": [["x"], None],
        "content_vector": [[0.5, 1.0], [2.0, 3.0]],
    }
    stored: dict[str, Any] = {
        "item": [1, 2],
        "title": ["lamp", None],
        "price": [2.5, None],
        "genres": ["a| b ||", " "],
        "brand": ["x", None],
    }
    half = pa.array([[0.5, 1.0], [2.0, 3.0]], pa.list_(pa.float16(), 2))
    files = [
        write(tmp_path / "i.parquet", {**stored, "vector": half}),
        write(tmp_path / "i.jsonl", {**stored, "vector": [[0.5, 1], [2, 3]]}),
        write(tmp_path / "s.csv", {**stored, "vector": ["0.5;1", "[2 3]"]}),
    ]
    for file in files:
        good, bad = read_items(file, columns=columns, title="title")
        assert good.to_pydict() == expected
        assert bad.num_rows == 0


def test_names_may_come_as_lists_and_missing_numbers_as_words(tmp_path: Path) -> None:
    stored = {"item": ["a", "b", "c"], "tags": [["x", " "], [], None], "price": ["n/a", "1e3", "NaN"]}
    columns = [{"name": "tags", "kind": "categorical"}, {"name": "price", "kind": "numeric"}]
    good, bad = read_items(write(tmp_path / "items.parquet", stored), columns=columns)
    assert good["content_tags"].to_pylist() == [["x"], None, None]
    assert good["content_price"].to_pylist() == [None, 1000.0, None]
    assert bad.num_rows == 0


def test_csv_is_read_with_its_own_delimiter_quotes_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_bytes(b'\xef\xbb\xbfuser;item;time\n"a;b";"x\ny";1300000000\n')
    good, bad, _ = read(path)
    assert good.select(["user_key", "item_key"]).to_pylist() == [{"user_key": "a;b", "item_key": "x\ny"}]
    assert bad.num_rows == 0


def test_keys_that_look_like_dates_in_json_stay_as_they_were_written(tmp_path: Path) -> None:
    path = write(tmp_path / "events.jsonl", {**EVENTS, "item": ["2011-01-01", "x", "y"]})
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert read(path)[0]["item_key"].to_pylist() == ["2011-01-01"]


# ------------------------------------------------------------------------------------------------ bad rows


def test_bad_events_are_set_aside_with_file_row_and_reason(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {
        "user": ["a", None, "  ", "a", "a", "a", "a", "a", "a", "a"],
        "item": ["x", "x", "x", "", "x", "x", "x", "x", "x", "x"],
        "time": [NOON] * 4 + [None, "soon", NOON, NOON, NOON, 99_999_999_999],
        "stars": [1, 1, 1, 1, 1, 1, -1, "many", "NaN", 1],
    }
    columns = {name: [None if v is None else str(v) for v in values] for name, values in columns.items()}
    good, bad, _ = read(write(tmp_path / "events.csv", columns), weight="stars")
    assert good["position"].to_pylist() == [0]
    found = dict(reasons(bad))
    assert list(found) == list(range(1, 10))
    assert all("user key is null or empty (user)" in found[row] for row in (1, 2))
    assert "item key is null or empty (item)" in found[3]
    assert "timestamp is null (time)" in found[4]
    assert "timestamp 'soon' is not a time in seconds (time)" in found[5]
    for row, value in ((6, "-1"), (7, "many"), (8, "NaN")):
        assert f"weight '{value}' is not a finite number of at least 0 (stars)" in found[row]
    assert "after the year 2200" in found[9]
    assert json.loads(bad["values"][4].as_py())["time"] == "soon"


def test_unknown_event_kinds_and_impossible_dates_are_set_aside(tmp_path: Path) -> None:
    columns = {
        "user": ["a"] * 4,
        "item": ["x"] * 4,
        "time": ["2011-01-01", "2011-02-30", "2011-01-02", "01/02/2011"],
        "kind": ["buy", "buy", "look", None],
    }
    path = write(tmp_path / "events.parquet", columns)
    good, bad, _ = read(path, timestamp_unit="iso", event="kind", event_weights={"buy": 1})
    assert good.num_rows == 1
    assert [row for row, _ in reasons(bad)] == [1, 2, 3]
    assert "'2011-02-30' is not an ISO 8601 date" in reasons(bad)[0][1]
    assert "event 'look' is not in event_weights (kind)" in reasons(bad)[1][1]


def test_csv_lines_of_another_length_are_set_aside_under_their_own_number(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_text(f"user,item,time\na,x,{NOON}\na,x\na,y,{NOON},9\na,,{NOON}\na,z,{NOON}\n")
    good, bad, _ = read(path)
    assert good["position"].to_pylist() == [0, 4]
    found = reasons(bad)
    assert [row for row, _ in found] == [1, 2, 3]
    assert "has 2 values, expected 3" in found[0][1]
    assert "has 4 values, expected 3" in found[1][1]


def test_bad_items_are_set_aside_with_key_and_reason(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    columns = {
        "item": ["a", None, "c", "d", "e", "f", "g"],
        "price": [1.0, 1.0, inf, nan, 1.0, 1.0, -2.0],
        "vector": [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], None, [1.0, nan], [1.0, 2.0, 3.0], [1.0, 2.0]],
    }
    features: list[dict[str, Any]] = [
        {"name": "price", "kind": "numeric", "log": True},
        {"name": "vector", "kind": "vector"},
    ]
    good, bad = read_items(write(tmp_path / "items.parquet", columns), columns=features)
    assert good["item_key"].to_pylist() == ["a", "d"]
    assert good["content_price"].to_pylist() == [1.0, None]
    assert good["content_vector"].to_pylist() == [[1.0, 2.0], None]
    assert reasons(bad) == [
        (1, "item key is null or empty (item)"),
        (2, "price of item 'c' is inf, not a finite number of at least 0 (log)"),
        (4, "vector of item 'e' holds NaN, infinity or null, expected 2 finite numbers"),
        (5, "vector of item 'f' has 3 numbers, expected 2"),
        (6, "price of item 'g' is -2.0, not a finite number of at least 0 (log)"),
    ]


def test_text_vectors_with_words_in_them_are_set_aside(tmp_path: Path) -> None:
    columns = {"item": ["a", "b", "c"], "v": ["1;2", "1;x", None]}
    good, bad = read_items(write(tmp_path / "items.csv", columns), columns=[{"name": "v", "kind": "vector"}])
    assert good["content_v"].to_pylist() == [[1.0, 2.0], None]
    assert reasons(bad) == [(1, "v of item 'b' is not a list of numbers")]


def test_the_expected_vector_length_holds_for_every_file(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", {"item": ["a", "b"], "v": [[1.0, 2.0], [1.0, 2.0]]})
    other = write(tmp_path / "b.parquet", {"item": ["c"], "v": [[1.0]]})
    good, bad = read_items(first, other, columns=[{"name": "v", "kind": "vector"}])
    assert good.num_rows == 2
    assert reasons(bad) == [(0, "v of item 'c' has 1 numbers, expected 2")]
    assert bad["source"][0].as_py().endswith("b.parquet")


# ------------------------------------------------------------------------------------------------ bad files


def refused(*parts: str) -> Any:
    """The next block raises DataError with all of these parts in its message."""
    return pytest.raises(DataError, match="(?s)" + "".join(f"(?=.*{part})" for part in parts))


def test_a_missing_column_is_named_with_those_found_and_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "events.parquet", {**EVENTS})
    with refused(
        r"events\.parquet", "'users'", r"interactions\.user", "found user, item, time", "nearest name is 'user'"
    ):
        read(path, user="users")
    with refused(r"items\.csv", "'item'", r"task\.data\.items\.key", "found key"):
        read_items(write(tmp_path / "items.csv", {"key": ["a"], "title": ["x"]}))


def test_a_column_missing_from_a_later_file_is_found_before_work_starts(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.parquet", EVENTS), write(tmp_path / "b.csv", {"user": [1], "item": [2]})]
    source = InteractionsSource(paths=tuple(map(str, paths)), user="user", item="item", timestamp="time")
    with refused(r"b\.csv", "'time'"):
        sources.plan_interactions(source, 10)


@pytest.mark.parametrize("ending", ["parquet", "csv", "csv.gz", "jsonl"])
def test_an_empty_file_is_refused_by_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"events.{ending}"
    path.write_bytes(b"")
    with refused(rf"events\.{ending}", "empty", r"interactions\.paths"):
        read(path)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_files_without_a_row_are_refused_but_one_empty_part_is_not(tmp_path: Path, ending: str) -> None:
    nothing = {"user": pa.array([], pa.string()), "item": pa.array([], pa.int64()), "time": pa.array([], pa.int64())}
    empty = write(tmp_path / f"empty.{ending}", nothing)
    with refused(rf"empty\.{ending}", "no rows"):
        read(empty)
    assert read(empty, write(tmp_path / f"full.{ending}", EVENTS))[0].num_rows == 3


def test_a_file_that_is_not_there_or_of_no_known_format_is_refused(tmp_path: Path) -> None:
    with refused(r"nothing\.csv", "no such file", r"interactions\.paths"):
        read(tmp_path / "nothing.csv")
    (tmp_path / "events.dat").write_text("user,item,time\na,b,1\n")
    with refused(r"events\.dat", "ending", r"interactions\.format"):
        read(tmp_path / "events.dat")
    assert read(tmp_path / "events.dat", format="csv")[0].num_rows == 1


def test_a_parquet_file_cut_off_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "events.parquet", EVENTS)
    whole = path.read_bytes()
    for size in (3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with refused(r"events\.parquet", "cannot be opened as Parquet", "cut off", "write it again"):
            read(path)


def test_parquet_data_damaged_after_the_footer_was_read_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "events.parquet", {**EVENTS, "user": [f"user {n}" for n in range(3)]})
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    with refused(r"events\.parquet", "cannot be read", "damaged"):
        read(path)


def test_a_file_that_goes_after_planning_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "events.parquet", EVENTS)
    source = InteractionsSource(paths=(str(path),), user="user", item="item", timestamp="time")
    plan = sources.plan_interactions(source, 10)
    path.unlink()
    with refused(r"events\.parquet", "gone", "run again"):
        sources.read_interactions(plan[0], source)


def test_damaged_text_files_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "events.csv.gz", {**EVENTS, "note": ["x" * 99] * 3})
    path.write_bytes(path.read_bytes()[:-12])
    with refused(r"events\.csv\.gz", "cannot be read", "damaged"):
        read(path)
    (tmp_path / "events.jsonl").write_text('{"user": 1, "item": 2, "time": 3}\n{"user": 1, "it')
    with refused(r"events\.jsonl", "cannot be read"):
        read(tmp_path / "events.jsonl")
    (tmp_path / "latin.csv").write_bytes(b"user,item,time\n\xe9,b,1\n")
    with refused(r"latin\.csv", "UTF"):
        read(tmp_path / "latin.csv")


# ------------------------------------------------------------------------------------------------ wrong columns


@pytest.mark.parametrize(
    ("changed", "setting"),
    [
        ({"user": [["a"], ["b"], ["c"]]}, "interactions.user"),
        ({"item": [1.5, 2.0, 3.0]}, "interactions.item"),
        ({"item": [True, False, True]}, "interactions.item"),
        ({"item": [date(2011, 1, 1)] * 3}, "interactions.item"),
        ({"time": [["x"]] * 3}, "interactions.timestamp"),
        ({"time": ["2011-01-01"] * 3}, "timestamp_unit: iso"),
        ({"stars": ["good"] * 3}, "interactions.weight"),
        ({"stars": [[1.0]] * 3}, "interactions.weight"),
    ],
)
def test_a_column_of_a_wrong_type_is_refused_with_its_setting(
    tmp_path: Path, changed: dict[str, Any], setting: str
) -> None:
    path = write(tmp_path / "events.parquet", {**EVENTS, "stars": [1, 2, 3], **changed})
    with refused(r"events\.parquet", f"column {next(iter(changed))}", "such as", setting.replace(".", r"\.")):
        read(path, weight="stars")


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (["words", "more"], "vector"),
        ([[["a"]], [["b"]]], "vector"),
        (["cheap", "dear"], "numeric"),
        ([[1], [2]], "numeric"),
        ([["a"], ["b"]], "text"),
        ([{"a": 1}, {"a": 2}], "categorical"),
    ],
)
def test_content_that_cannot_be_of_its_kind_is_refused(tmp_path: Path, column: list[Any], kind: str) -> None:
    path = write(tmp_path / "items.parquet", {"item": [1, 2], "x": column})
    with refused(r"items\.parquet", "column x", "such as", r"task\.data\.items\.columns"):
        read_items(path, columns=[{"name": "x", "kind": kind}])


@pytest.mark.parametrize(
    ("factor", "unit", "remedy"),
    [
        (1000, "seconds", "set task.data.interactions.timestamp_unit: milliseconds"),
        (10**6, "seconds", "set task.data.interactions.timestamp_unit: microseconds"),
        (10**6, "milliseconds", "set task.data.interactions.timestamp_unit: microseconds"),
        (1, "milliseconds", "set task.data.interactions.timestamp_unit: seconds"),
        (10**9, "seconds", "no unit of task.data.interactions.timestamp_unit fits"),
    ],
)
def test_times_in_another_unit_are_refused_with_the_setting_to_change(
    tmp_path: Path, factor: int, unit: str, remedy: str
) -> None:
    path = write(tmp_path / "events.csv", {**EVENTS, "time": [(NOON + n) * factor for n in range(3)]})
    with refused(r"events\.csv", "column time", remedy.replace(".", r"\.")):
        read(path, timestamp_unit=unit)


def test_numbers_where_dates_are_expected_are_refused(tmp_path: Path) -> None:
    with refused(r"events\.parquet", "column time is int64 such as 1300000000", "timestamp_unit"):
        read(write(tmp_path / "events.parquet", EVENTS), timestamp_unit="iso")
    with refused(r"events\.csv", "text such as '1300000000'", "ISO 8601", "timestamp_unit"):
        read(write(tmp_path / "events.csv", EVENTS), timestamp_unit="iso")


def test_an_object_stores_own_error_is_a_message_not_a_stack_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LibraryError(Exception):
        """Stands for botocore's and gcsfs's own errors, which are no OSError."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise LibraryError("no credentials")

    path = write(tmp_path / "events.parquet", EVENTS)
    monkeypatch.setattr(fsspec, "open", refuse)
    with pytest.raises(StorageError, match=r"cannot read file://.*events\.parquet: LibraryError: no credentials"):
        read(path)


def test_a_path_of_an_unknown_protocol_is_a_message() -> None:
    with pytest.raises(StorageError, match=r"cannot list nosuch://bucket/a\.csv: .*check the address"):
        read("nosuch://bucket/a.csv")
