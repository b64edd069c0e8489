"""Guesses: the settings file that `pinsage init` writes for the usual shapes of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import sources
from pipeline.contracts.config import Settings, load_settings, reference
from pipeline.contracts.errors import DataError
from pipeline.guess import TUNED, guess_settings

NOON = 1_300_000_000
NUM_EVENTS = 300


def guessed(folder: Path, *paths: Path) -> tuple[Settings, str]:
    """The settings that load from what was written, and the text."""
    text = guess_settings(*map(str, paths))
    (folder / "settings.yaml").write_text(text)
    return load_settings(str(folder / "settings.yaml")), text


def write(path: Path, columns: dict[str, Any]) -> Path:
    """The columns as Parquet or CSV."""
    table = pa.table(columns)
    if path.suffix == ".csv":
        csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    return path


def events(**columns: Any) -> dict[str, Any]:
    """Users and items under common names, and more columns."""
    random = np.random.default_rng(0)
    users, items = random.integers(0, 40, NUM_EVENTS), random.integers(0, 20, NUM_EVENTS)
    return {"movie_id": items, "customer_id": [f"c{n}" for n in users], **columns}


def catalogue() -> dict[str, Any]:
    """Twenty things with content of every kind and some that is none."""
    random = np.random.default_rng(1)
    words = ["red", "blue", "lamp", "cup", "tea", "light", "bag", "box"]
    return {
        "movie_id": np.arange(20),
        "title": [" ".join(random.choice(words, 4)) + f" {n}" for n in range(20)],
        "genres": ["|".join(sorted(random.choice(words, 2, replace=False))) for _ in range(20)],
        "maker": [words[n % 3] for n in range(20)],
        "price": [1.0] * 15 + [300.0] * 5,
        "year": [1990 + n % 9 for n in range(20)],
        "vector": [random.normal(size=4).tolist() for _ in range(20)],
        "link": [f"https://example.com/{n}" for n in range(20)],
        "nothing": pa.nulls(20, pa.string()),
    }


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_columns_are_found_by_name_and_read_as_guessed(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"e.{ending}", events(rating=[2.5] * NUM_EVENTS, when=NOON + np.arange(NUM_EVENTS) * 60))
    settings, text = guessed(tmp_path, path)
    source = settings.task.data.interactions
    found = (source.user, source.item, source.timestamp, source.timestamp_unit, source.weight)
    assert found == ("customer_id", "movie_id", "when", "seconds", "rating")
    assert "guessed by its name, such as c" in text
    plan = sources.plan_interactions(source, 1000)
    good, bad, _ = sources.read_interactions(plan[0], source)
    assert (good.num_rows, bad.num_rows) == (NUM_EVENTS, 0)


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        (NOON + np.arange(NUM_EVENTS), "seconds"),
        ((NOON + np.arange(NUM_EVENTS)) * 1000, "milliseconds"),
        ((NOON + np.arange(NUM_EVENTS)) * 10**6, "microseconds"),
        (["2011-03-13T07:06:40Z"] * NUM_EVENTS, "iso"),
        (pa.array([NOON] * NUM_EVENTS, pa.timestamp("s")), "iso"),
        (np.arange(NUM_EVENTS), "order"),
    ],
)
def test_the_unit_of_time_is_found_by_the_values(tmp_path: Path, values: Any, unit: str) -> None:
    settings, _ = guessed(tmp_path, write(tmp_path / "events.parquet", events(timestamp=values)))
    assert settings.task.data.interactions.timestamp_unit == unit
    assert settings.task.split.kind == ("leave_last_out" if unit == "order" else "temporal")
    sources.read_interactions(
        sources.plan_interactions(settings.task.data.interactions, 1000)[0], settings.task.data.interactions
    )


def test_columns_without_telling_names_are_found_by_values_and_the_file_says_so(tmp_path: Path) -> None:
    strange = {"x": [f"p{n % 7}" for n in range(90)], "y": [f"q{n % 5}" for n in range(90)], "z": NOON + np.arange(90)}
    settings, text = guessed(tmp_path, write(tmp_path / "events.parquet", strange))
    source = settings.task.data.interactions
    assert source.timestamp == "z"
    assert {source.user, source.item} == {"x", "y"}
    assert "no name says it" in text
    assert "could also be" in text


def test_event_kinds_are_listed_with_a_weight_each(tmp_path: Path) -> None:
    kinds = ["buy", "view", "view"] * (NUM_EVENTS // 3)
    path = write(tmp_path / "events.csv", events(event_type=kinds, timestamp=NOON + np.arange(NUM_EVENTS)))
    source = guessed(tmp_path, path)[0].task.data.interactions
    assert source.event == "event_type"
    assert source.event_weights == {"buy": 1.0, "view": 1.0}


def test_every_kind_of_content_is_found_and_what_is_none_is_left_out_with_the_reason(tmp_path: Path) -> None:
    interactions = write(tmp_path / "events.parquet", events(timestamp=NOON + np.arange(NUM_EVENTS)))
    items = write(tmp_path / "items.parquet", catalogue())
    settings, text = guessed(tmp_path, interactions, items)
    source = settings.task.data.items
    assert source is not None
    assert (source.key, source.title) == ("movie_id", "title")
    found = {column.name: (column.kind, column.log, column.separator) for column in source.columns}
    assert found == {
        "title": ("text", False, None),
        "genres": ("categorical", False, "|"),
        "maker": ("categorical", False, None),
        "price": ("numeric", True, None),
        "year": ("numeric", False, None),
        "vector": ("vector", False, None),
    }
    assert "left out: link" in text
    assert "left out: nothing" in text
    good, bad = sources.read_items(sources.plan_items(source, 1000)[0], source)
    assert (good.num_rows, bad.num_rows) == (20, 0)


def test_the_two_files_may_come_in_either_order_or_the_catalogue_alone(tmp_path: Path) -> None:
    interactions = write(tmp_path / "a.parquet", events(timestamp=NOON + np.arange(NUM_EVENTS)))
    items = write(tmp_path / "b.parquet", catalogue())
    assert guessed(tmp_path, items, interactions)[0].task.data == guessed(tmp_path, interactions, items)[0].task.data
    settings, text = guessed(tmp_path, items)
    assert settings.task.data.items is not None
    assert settings.task.data.interactions.user == "CHANGE_ME"
    assert "not given" in text


def test_data_without_a_time_says_what_to_do(tmp_path: Path) -> None:
    settings, text = guessed(tmp_path, write(tmp_path / "events.csv", events()))
    assert settings.task.data.interactions.timestamp == "CHANGE_ME"
    assert "no column looks like a time" in text


def test_every_tuned_setting_is_written_with_its_explanation(tmp_path: Path) -> None:
    assert set(TUNED) <= {name for name, _, _, _ in reference()}
    _, text = guessed(tmp_path, write(tmp_path / "events.csv", events(timestamp=NOON + np.arange(NUM_EVENTS))))
    tree = yaml.safe_load(text)
    for name in TUNED:
        node = tree
        for part in name.split("."):
            node = node[part]
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.lstrip().startswith(("#", "- ")) and not line.endswith(":"):
            assert lines[number - 1].lstrip().startswith("#"), f"{line!r} has no explanation"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: there is no such file"):
        guess_settings(str(tmp_path / "none.csv"))
