"""Ingest: ids, splits, unknown items, quarantine; the same bytes for any number of partitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from pipeline import event_kernel, ingest
from pipeline.contracts import schemas
from pipeline.contracts.config import Settings, parse_settings
from pipeline.contracts.datasets import Manifest, open_manifest, read_table, trace
from pipeline.contracts.errors import DataError
from pipeline.contracts.storage import Storage
from tests.synthetic import shop_settings, write_shop


def ingested(spark: SparkSession, storage: Storage, settings: Settings) -> Manifest:
    lineage = trace(storage, schemas.INGEST, settings, ingest.inputs(settings.task.data))
    ingest.run(spark, storage, settings, lineage)
    return open_manifest(storage, schemas.INTERACTIONS)


def shop(tmp_path: Path, storage: Storage, **task: Any) -> dict[str, Any]:
    write_shop(tmp_path / "data", num_users=60)
    return shop_settings(tmp_path / "data", Path(storage.url), **task)


def keys_of(storage: Storage, dataset: schemas.Dataset) -> list[str]:
    found: list[str] = read_table(storage, open_manifest(storage, dataset)).column("key").to_pylist()
    return found


def test_every_event_is_stored_once_under_its_keys(spark: SparkSession, storage: Storage, tmp_path: Path) -> None:
    settings = parse_settings(shop(tmp_path, storage))
    stored = read_table(storage, ingested(spark, storage, settings))
    users, items = keys_of(storage, schemas.USERS), keys_of(storage, schemas.ITEMS)
    found = {(users[row["user_id"]], items[row["item_id"]], row["timestamp"]) for row in stored.to_pylist()}
    raw = pq.read_table(tmp_path / "data" / "interactions.parquet").to_pylist()
    assert found == {(row["basket"], row["product"], row["when"]) for row in raw}
    assert len(stored) == len(raw)
    assert len(set(users)) == len(users)
    assert sorted(items) == sorted(pq.read_table(tmp_path / "data" / "items.parquet").column("product").to_pylist())


def test_shuffle_partitions_change_no_byte(spark: SparkSession, storage: Storage, tmp_path: Path) -> None:
    settings = parse_settings(shop(tmp_path, storage))
    contents = []
    for partitions in ("1", "3", "7"):
        spark.conf.set("spark.sql.shuffle.partitions", partitions)
        ingested(spark, storage, settings)
        contents.append([open_manifest(storage, dataset).content for dataset in schemas.INGEST.writes])
    spark.conf.set("spark.sql.shuffle.partitions", "3")
    assert contents[0] == contents[1] == contents[2]


def test_a_temporal_split_is_one_moment_for_everybody(spark: SparkSession, storage: Storage, tmp_path: Path) -> None:
    settings = parse_settings(shop(tmp_path, storage, split={"validation": 0.1, "test": 0.2}))
    stored = read_table(storage, ingested(spark, storage, settings))
    times, splits = stored.column("timestamp").to_numpy(), stored.column("split").to_numpy()
    assert times[splits == 0].max() < times[splits == 1].min()
    assert times[splits == 1].max() < times[splits == 2].min()
    assert np.mean(splits == 2) == pytest.approx(0.2, abs=0.02)
    assert np.mean(splits == 1) == pytest.approx(0.1, abs=0.02)


def test_leave_last_out_holds_out_every_users_last_events(
    spark: SparkSession, storage: Storage, tmp_path: Path
) -> None:
    split = {"kind": "leave_last_out", "validation": 1, "test": 2}
    stored = read_table(storage, ingested(spark, storage, parse_settings(shop(tmp_path, storage, split=split))))
    users, splits = stored.column("user_id").to_numpy(), stored.column("split").to_numpy()
    for user in np.unique(users):
        assert splits[users == user].tolist() == [0] * 3 + [1] + [2] * 2


def test_ids_are_kept_from_an_earlier_run_and_new_keys_appended(
    spark: SparkSession, storage: Storage, tmp_path: Path
) -> None:
    tree = shop(tmp_path, storage)
    ingested(spark, storage, parse_settings(tree))
    before = keys_of(storage, schemas.ITEMS)
    catalogue = pq.read_table(tmp_path / "data" / "items.parquet").to_pylist()
    changed = [row for row in catalogue if row["product"] != "lonely"]
    changed += [{"product": "aaa first in the alphabet", "name": "new thing", "price": 2.0}]
    pq.write_table(pa.Table.from_pylist(changed), tmp_path / "data" / "items.parquet")
    tonight = Storage(str(tmp_path / "tonight"))
    tree["resources"]["run"] = tonight.url
    tree["task"]["data"]["previous"] = storage.url
    ingested(spark, tonight, parse_settings(tree))
    after = keys_of(tonight, schemas.ITEMS)
    assert after[: len(before)] == before
    assert after[len(before) :] == ["aaa first in the alphabet"]
    content = read_table(tonight, open_manifest(tonight, schemas.CONTENT)).to_pylist()
    assert content[before.index("lonely")]["content_name"] is None


def test_events_of_unknown_items_are_counted_and_dropped_or_kept(
    spark: SparkSession, storage: Storage, tmp_path: Path
) -> None:
    tree = shop(tmp_path, storage)
    catalogue = pq.read_table(tmp_path / "data" / "items.parquet")
    known = [key != "g0-01" for key in catalogue.column("product").to_pylist()]
    pq.write_table(catalogue.filter(pa.array(known)), tmp_path / "data" / "items.parquet")
    raw = pq.read_table(tmp_path / "data" / "interactions.parquet").column("product").to_pylist()
    manifest = ingested(spark, storage, parse_settings(tree))
    assert manifest.metadata["unknown_items"] == 1
    assert manifest.metadata["events_of_unknown_items"] == raw.count("g0-01")
    assert manifest.metadata["unknown_item_examples"] == ["g0-01"]
    assert manifest.num_rows == len(raw) - raw.count("g0-01")
    tree["task"]["data"]["unknown_items"] = "add"
    assert ingested(spark, storage, parse_settings(tree)).num_rows == len(raw)
    assert "g0-01" in keys_of(storage, schemas.ITEMS)


def test_without_a_catalogue_items_are_those_of_the_interactions(
    spark: SparkSession, storage: Storage, tmp_path: Path
) -> None:
    tree = shop(tmp_path, storage)
    tree["task"]["data"]["items"] = None
    ingested(spark, storage, parse_settings(tree))
    raw = pq.read_table(tmp_path / "data" / "interactions.parquet").column("product").to_pylist()
    assert sorted(keys_of(storage, schemas.ITEMS)) == sorted(set(raw))


def test_an_interrupted_ingest_says_the_same_of_events_that_weigh_nothing(
    spark: SparkSession, storage: Storage, tmp_path: Path
) -> None:
    """Their number is kept with the pieces already read, so a restart builds the same manifests."""
    tree = shop(tmp_path, storage)
    path = tmp_path / "data" / "interactions.parquet"
    table = pq.read_table(path)
    kinds = ["view" if row % 5 == 0 else "buy" for row in range(len(table))]
    pq.write_table(table.append_column("kind", pa.array(kinds)), path)
    tree["task"]["data"]["interactions"] |= {"event": "kind", "event_weights": {"view": 0.0, "buy": 1.0}}
    settings = parse_settings(tree)
    whole = ingested(spark, storage, settings)
    assert whole.metadata["weightless"] == kinds.count("view")
    assert whole.metadata["read"] == len(table)

    again = Storage(str(tmp_path / "again"))
    lineage = trace(again, schemas.INGEST, settings, ingest.inputs(settings.task.data))
    work = ingest._Work(spark, again, lineage, settings)
    ingest._read_catalogue(work)
    ingest._read_events(work)
    assert ingested(spark, again, settings).content == whole.content


def test_a_bad_catalogue_is_not_hidden_behind_many_interactions(
    spark: SparkSession, storage: Storage, tmp_path: Path
) -> None:
    tree = shop(tmp_path, storage)
    path = tmp_path / "data" / "items.parquet"
    items = pq.read_table(path).to_pydict()
    items["price"][:3] = [float("inf")] * 3
    pq.write_table(pa.table(items), path)
    with pytest.raises(DataError, match=r"3 of 73 rows of items are bad(?s:.*)g0-00"):
        ingested(spark, storage, parse_settings(tree))


def test_a_bad_night_leaves_the_former_datasets_standing(spark: SparkSession, storage: Storage, tmp_path: Path) -> None:
    tree = shop(tmp_path, storage)
    before = ingested(spark, storage, parse_settings(tree))
    path = tmp_path / "data" / "interactions.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["when"]), path)
    with pytest.raises(DataError, match="when"):
        ingested(spark, storage, parse_settings(tree))
    assert open_manifest(storage, schemas.INTERACTIONS).content == before.content


def test_a_split_of_coarsely_dated_events_comes_as_close_as_it_can() -> None:
    """By hand: 60, 25 and 15 of 100 events in three years."""
    years, counts = [2000, 2001, 2002], np.array([60, 25, 15])
    assert event_kernel.closest_moment(years, counts, 0.1) == 2002
    assert event_kernel.closest_moment(years, counts, 0.35) == 2001
    assert event_kernel.closest_moment(years, counts, 0.9) == 2001, "the first year is always learned from"
    assert event_kernel.closest_moment(years, counts, 0.001) == 2002, "the last is always measured on"


def test_interactions_of_one_moment_cannot_be_split_by_time(
    spark: SparkSession, storage: Storage, tmp_path: Path
) -> None:
    tree = shop(tmp_path, storage)
    path = tmp_path / "data" / "interactions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "when", pa.array([5] * len(table))), path)
    with pytest.raises(DataError, match=r"all interactions have the timestamp 5(?s:.*)leave_last_out"):
        ingested(spark, storage, parse_settings(tree))
