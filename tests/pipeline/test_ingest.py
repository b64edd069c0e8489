"""Ingest: ids, splits, unknown items, quarantine; the same bytes for any number of partitions."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
from pyspark import SparkContext

from pipeline import ingest, keys, steps
from pipeline import spark as spark_module
from pipeline.contracts import schemas
from pipeline.contracts.config import Settings, parse_settings
from pipeline.contracts.datasets import Manifest, find_manifest, open_manifest, read_table, trace
from pipeline.contracts.errors import DataError
from pipeline.contracts.storage import Storage
from tests.synthetic import shop_settings, write_shop


def ingested(spark: SparkContext, storage: Storage, settings: Settings) -> Manifest:
    lineage = trace(storage, schemas.INGEST, settings, ingest.inputs(settings.task.data))
    ingest.run(spark, storage, settings, lineage)
    return open_manifest(storage, schemas.INTERACTIONS)


def shop(tmp_path: Path, storage: Storage, **task: Any) -> dict[str, Any]:
    write_shop(tmp_path / "data", num_users=60)
    return shop_settings(tmp_path / "data", Path(storage.url), **task)


def keys_of(storage: Storage, dataset: schemas.Dataset) -> list[str]:
    found: list[str] = read_table(storage, open_manifest(storage, dataset)).column("key").to_pylist()
    return found


def test_every_event_is_stored_once_under_its_keys(spark: SparkContext, storage: Storage, tmp_path: Path) -> None:
    settings = parse_settings(shop(tmp_path, storage))
    stored = read_table(storage, ingested(spark, storage, settings))
    users, items = keys_of(storage, schemas.USERS), keys_of(storage, schemas.ITEMS)
    found = {(users[row["user_id"]], items[row["item_id"]], row["timestamp"]) for row in stored.to_pylist()}
    raw = pq.read_table(tmp_path / "data" / "interactions.parquet").to_pylist()
    assert found == {(row["basket"], row["product"], row["when"]) for row in raw}
    assert len(stored) == len(raw)
    assert len(set(users)) == len(users)
    assert sorted(items) == sorted(pq.read_table(tmp_path / "data" / "items.parquet").column("product").to_pylist())


@pytest.mark.parametrize("kind", ["temporal", "random"])
def test_neither_row_groups_nor_ranges_of_hashes_change_a_byte(
    spark: SparkContext, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The same rows in one piece, in three and in seven; keys sorted in 1, 8 and 32 ranges."""
    settings = parse_settings(shop(tmp_path, storage, split={"kind": kind, "validation": 0.1, "test": 0.2}))
    contents = []
    for group_rows, range_rows in ((1000, 10**6), (480, 60), (60, 15)):
        monkeypatch.setattr(keys, "RANGE_ROWS", range_rows)
        for file, rows in (("interactions", group_rows), ("items", group_rows // 10)):
            path = tmp_path / "data" / f"{file}.parquet"
            pq.write_table(pq.read_table(path), path, row_group_size=rows)
        ingested(spark, storage, settings)
        contents.append([open_manifest(storage, dataset).content for dataset in schemas.INGEST.writes])
    assert contents[0] == contents[1] == contents[2]


def test_the_size_of_shards_changes_no_row(spark: SparkContext, storage: Storage, tmp_path: Path) -> None:
    tree = shop(tmp_path, storage)
    tables = []
    for size in (1000, 120, 50):
        tree["resources"] |= {"events_per_shard": size, "rows_per_shard": max(7, size // 10)}
        ingested(spark, storage, parse_settings(tree))
        stored = [open_manifest(storage, dataset) for dataset in schemas.INGEST.writes[:4]]
        tables.append([read_table(storage, manifest) for manifest in stored])
    assert len(stored[0].shards) == 8
    assert tables[0] == tables[1] == tables[2]


def test_degrees_and_first_sights_are_those_of_the_training_period(
    spark: SparkContext, storage: Storage, tmp_path: Path
) -> None:
    tree = shop(tmp_path, storage)
    path = tmp_path / "data" / "interactions.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(0, 100)]), path)  # edges that occur twice
    tree["resources"]["events_per_shard"] = 100
    stored = read_table(storage, ingested(spark, storage, parse_settings(tree))).to_pandas()
    training = stored[stored["split"] == 0]
    for dataset, side, other in ((schemas.USERS, "user_id", "item_id"), (schemas.ITEMS, "item_id", "user_id")):
        nodes = read_table(storage, open_manifest(storage, dataset)).to_pandas()
        assert nodes["id"].tolist() == list(range(len(nodes)))
        groups = training.groupby(side)
        expected = groups[other].nunique().reindex(nodes["id"], fill_value=0)
        assert nodes["degree"].tolist() == expected.tolist()
        assert nodes["first_seen"].tolist() == groups["timestamp"].min().reindex(nodes["id"], fill_value=-1).tolist()


def test_events_of_one_user_and_moment_stay_in_the_order_of_the_input(
    spark: SparkContext, storage: Storage, tmp_path: Path
) -> None:
    tree = shop(tmp_path, storage, split={"kind": "leave_last_out", "validation": 1, "test": 1})
    tree["task"]["data"] |= {"items": None}
    rows: dict[str, list[Any]] = {
        "basket": ["b", "a"] * 50,
        "product": [f"p{number:02d}" for number in range(100)],
        "when": [5] * 100,
    }
    pq.write_table(pa.table(rows), tmp_path / "data" / "interactions.parquet", row_group_size=30)
    stored = read_table(storage, ingested(spark, storage, parse_settings(tree))).to_pydict()
    users, items = keys_of(storage, schemas.USERS), keys_of(storage, schemas.ITEMS)
    for name, products in (("a", rows["product"][1::2]), ("b", rows["product"][::2])):
        own = [place for place, user in enumerate(stored["user_id"]) if users[user] == name]
        assert [items[stored["item_id"][place]] for place in own] == products
        assert [stored["split"][place] for place in own] == [0] * 48 + [1, 2]


def whole_keys(tmp_path: Path, layout: str) -> list[str]:
    """The shop's data with numbers as keys, stored as integers, as text, or as both; the files' names."""
    folder = tmp_path / layout
    folder.mkdir()
    for file, columns in (("interactions", ("basket", "product")), ("items", ("product",))):
        table = pq.read_table(tmp_path / "data" / f"{file}.parquet")
        for name in columns:
            numbers = [zlib.crc32(key.encode()) - 2**31 for key in table[name].to_pylist()]
            values = pa.array(numbers, pa.int64())
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, values if layout != "text" else values.cast(pa.string()))
        if layout == "both" and file == "interactions":
            pq.write_table(table.slice(0, 200), folder / "interactions.parquet")
            csv.write_csv(table.slice(200), folder / "more.csv")
        else:
            pq.write_table(table, folder / f"{file}.parquet")
    return [str(folder / name) for name in ("interactions.parquet", *(["more.csv"] if layout == "both" else []))]


def test_keys_mean_the_same_whether_files_hold_integers_or_text(
    spark: SparkContext, storage: Storage, tmp_path: Path
) -> None:
    """Integers are hashed as such where all files have them, so their ids are others; the keys are the same."""
    tree, found = shop(tmp_path, storage), []
    for layout in ("integers", "text", "both"):
        tree["task"]["data"]["interactions"]["paths"] = whole_keys(tmp_path, layout)
        tree["task"]["data"]["items"]["paths"] = str(tmp_path / layout / "items.parquet")
        stored = read_table(storage, ingested(spark, storage, parse_settings(tree))).to_pydict()
        assert open_manifest(storage, schemas.ITEMS).metadata["integer_keys"] == (layout == "integers")
        users, items = keys_of(storage, schemas.USERS), keys_of(storage, schemas.ITEMS)
        columns = [stored[name] for name in ("user_id", "item_id", "timestamp", "split")]
        events = {(users[u], items[i], when, split) for u, i, when, split in zip(*columns, strict=True)}
        nodes = read_table(storage, open_manifest(storage, schemas.ITEMS)).drop_columns(["id"]).to_pylist()
        found.append((events, sorted(nodes, key=lambda node: node["key"])))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == 360


def test_integer_ids_are_kept_when_the_next_night_has_text(
    spark: SparkContext, storage: Storage, tmp_path: Path
) -> None:
    """Three nights: integers, integers with new keys, text."""
    tree = shop(tmp_path, storage)
    tree["task"]["data"]["items"] = None
    path, before = tmp_path / "data" / "interactions.parquet", list[str]()
    for night, (last, kind) in enumerate(((50, pa.int64()), (80, pa.int64()), (90, pa.string()))):
        numbers = pa.array(range(last))
        rows = {"basket": pc.divide(numbers, 4).cast(kind), "product": numbers.cast(kind), "when": numbers}
        pq.write_table(pa.table(rows), path)
        tonight = Storage(str(tmp_path / f"night-{night}"))
        tree["resources"]["run"] = tonight.url
        ingested(spark, tonight, parse_settings(tree))
        after = keys_of(tonight, schemas.ITEMS)
        assert after[: len(before)] == before
        assert sorted(map(int, after)) == list(range(last))
        manifest = open_manifest(tonight, schemas.ITEMS)
        assert manifest.metadata["new"] == last - len(before)
        assert manifest.metadata["integer_keys"] == (night < 2)
        tree["task"]["data"]["previous"], before = tonight.url, after


def test_of_a_repeated_catalogue_key_the_first_row_counts(
    spark: SparkContext, storage: Storage, tmp_path: Path
) -> None:
    tree = shop(tmp_path, storage)
    path = tmp_path / "data" / "items.parquet"
    catalogue = pq.read_table(path)
    again = catalogue.slice(3, 2).set_column(1, "name", pa.array(["another", "one"]))
    pq.write_table(pa.concat_tables([catalogue, again, again]), path, row_group_size=10)
    tree["task"]["data"]["max_quarantined_share"] = 0.1
    manifest = ingested(spark, storage, parse_settings(tree))
    assert manifest.metadata["bad_items"] == 4
    titles = dict(zip(catalogue["product"].to_pylist(), catalogue["name"].to_pylist(), strict=True))
    stored = read_table(storage, open_manifest(storage, schemas.ITEMS)).to_pylist()
    assert {row["key"]: row["title"] for row in stored} == titles
    content = read_table(storage, open_manifest(storage, schemas.CONTENT)).to_pylist()
    assert [row["content_name"] for row in content] == [row["title"] for row in stored]
    bad = read_table(storage, open_manifest(storage, schemas.QUARANTINE)).to_pylist()
    assert [row["row"] for row in bad] == [73, 74, 75, 76]
    assert all("is already in row" in row["reason"] for row in bad)


def test_killed_after_any_step_a_run_goes_on_and_ends_with_the_same_bytes(
    spark: SparkContext, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every attempt is cut short at the next step: first before its outputs are committed, then after."""
    tree = shop(tmp_path, storage)
    tree["resources"]["events_per_shard"] = 100
    settings = parse_settings(tree)
    ingested(spark, storage, settings)
    whole = [open_manifest(storage, dataset).content for dataset in schemas.INGEST.writes]
    storage = Storage(str(tmp_path / "again"))
    work_through, begun, attempts = spark_module.run_tasks, list[str](), 0

    def run_tasks(spark: SparkContext, tasks: Any, work: Any, label: str) -> Any:
        done = work_through(spark, tasks, work, label)
        if label not in begun:
            begun.append(label)
            raise KeyboardInterrupt
        return done

    def run_step(*arguments: Any) -> Any:
        reports, name = steps.run_step(*arguments), arguments[3]
        if name not in begun:
            begun.append(name)
            raise KeyboardInterrupt
        return reports

    monkeypatch.setattr(steps, "run_tasks", run_tasks)
    monkeypatch.setattr(ingest, "run_step", run_step)
    while True:
        attempts += 1
        try:
            ingested(spark, storage, settings)
            break
        except KeyboardInterrupt:
            continue
    assert attempts == len(begun) + 1 == 2 * 12 + 1
    assert [open_manifest(storage, dataset).content for dataset in schemas.INGEST.writes] == whole
    assert "ingest" not in storage.names("")


def test_a_file_that_changes_between_its_two_readings_is_an_error(
    spark: SparkContext, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = shop(tmp_path, storage)
    path = tmp_path / "data" / "interactions.parquet"
    raw, place = pq.read_table(path), ingest._place

    for changed in (raw.slice(0, 100), raw.set_column(1, "product", pa.array(["g0-00"] * len(raw)))):

        def spoil(*arguments: Any, rows: pa.Table = changed) -> None:
            place(*arguments)
            pq.write_table(rows, path)

        monkeypatch.setattr(ingest, "_place", spoil)
        with pytest.raises(DataError, match="changed while it was being read"):
            ingested(spark, storage, parse_settings(tree))
        assert find_manifest(storage, schemas.INTERACTIONS) is None
        pq.write_table(raw, path)


def test_more_ids_than_32_bits_hold_are_refused() -> None:
    ingest.check_ids(2**32, schemas.ITEMS)
    with pytest.raises(DataError, match=r"4,294,967,297 items: ids are 32-bit(?s:.*)at most 4,294,967,296 fit"):
        ingest.check_ids(2**32 + 1, schemas.ITEMS)


def test_a_temporal_split_is_one_moment_for_everybody(spark: SparkContext, storage: Storage, tmp_path: Path) -> None:
    settings = parse_settings(shop(tmp_path, storage, split={"validation": 0.1, "test": 0.2}))
    stored = read_table(storage, ingested(spark, storage, settings))
    times, splits = stored.column("timestamp").to_numpy(), stored.column("split").to_numpy()
    assert times[splits == 0].max() < times[splits == 1].min()
    assert times[splits == 1].max() < times[splits == 2].min()
    assert np.mean(splits == 2) == pytest.approx(0.2, abs=0.02)
    assert np.mean(splits == 1) == pytest.approx(0.1, abs=0.02)


def test_leave_last_out_holds_out_every_users_last_events(
    spark: SparkContext, storage: Storage, tmp_path: Path
) -> None:
    split = {"kind": "leave_last_out", "validation": 1, "test": 2}
    stored = read_table(storage, ingested(spark, storage, parse_settings(shop(tmp_path, storage, split=split))))
    users, splits = stored.column("user_id").to_numpy(), stored.column("split").to_numpy()
    for user in np.unique(users):
        assert splits[users == user].tolist() == [0] * 3 + [1] + [2] * 2


def test_ids_are_kept_from_an_earlier_run_and_new_keys_appended(
    spark: SparkContext, storage: Storage, tmp_path: Path
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
    assert open_manifest(tonight, schemas.ITEMS).metadata["present"] == len(before)


@pytest.mark.parametrize("with_catalogue", [True, False])
def test_what_came_since_is_added_as_if_all_were_read(
    spark: SparkContext, tmp_path: Path, with_catalogue: bool
) -> None:
    """Late events and new users among it, or nothing at all; afterwards the files of before are not needed."""
    write_shop(tmp_path / "data", num_users=60)
    path = tmp_path / "data" / "interactions.parquet"
    rows = pq.read_table(path)
    late = np.random.default_rng(3).random(rows.num_rows) < 0.2
    before, more = (str(tmp_path / "data" / f"{name}.parquet") for name in ("before", "more"))
    pq.write_table(rows.filter(pa.array(~late)), before)
    pq.write_table(rows.filter(pa.array(late)), more)

    def made(name: str, paths: list[str], **data: Any) -> Storage:
        tree = shop_settings(tmp_path / "data", tmp_path / name)
        tree["task"]["data"] |= data if with_catalogue else {**data, "items": None}
        tree["task"]["data"]["interactions"]["paths"] = paths
        ingested(spark, Storage(str(tmp_path / name)), parse_settings(tree))
        return Storage(str(tmp_path / name))

    first = made("first", [before])
    whole = made("whole", [before, more], previous=first.url)
    Path(before).unlink()
    added = made("added", [more], previous=first.url, append=True)
    for dataset in (schemas.INTERACTIONS, schemas.USERS, schemas.ITEMS, schemas.CONTENT):
        one, other = (open_manifest(storage, dataset) for storage in (whole, added))
        assert [shard.sha256 for shard in one.shards] == [shard.sha256 for shard in other.shards], dataset.name
    told, expected = (open_manifest(storage, schemas.INTERACTIONS).metadata for storage in (added, whole))
    assert told == {**expected, "kept": int((~late).sum())}
    same = made("same", [], previous=added.url, append=True)
    for dataset in (schemas.INTERACTIONS, schemas.USERS, schemas.ITEMS, schemas.CONTENT):
        one, other = (open_manifest(storage, dataset) for storage in (added, same))
        assert [shard.sha256 for shard in one.shards] == [shard.sha256 for shard in other.shards], dataset.name
    assert open_manifest(same, schemas.INTERACTIONS).metadata == {**told, "kept": rows.num_rows}


def test_repeated_events_are_dropped_where_that_is_wanted(spark: SparkContext, tmp_path: Path) -> None:
    """Those of the same user, item and moment, also if they came another night."""
    write_shop(tmp_path / "data", num_users=60)
    path = str(tmp_path / "data" / "interactions.parquet")
    rows = pq.read_table(path)
    again = str(tmp_path / "data" / "again.parquet")
    pq.write_table(rows.slice(0, 100), again)
    found = []
    for name, paths, data in (
        ("once", [path], {}),
        ("first", [path, again], {"drop_repeats": True}),
        ("added", [again], {"drop_repeats": True, "append": True, "previous": str(tmp_path / "once")}),
    ):
        tree = shop_settings(tmp_path / "data", tmp_path / name)
        tree["task"]["data"] |= data
        tree["task"]["data"]["interactions"]["paths"] = paths
        found.append(ingested(spark, Storage(str(tmp_path / name)), parse_settings(tree)))
    assert [manifest.num_rows for manifest in found] == [rows.num_rows] * 3
    assert [manifest.metadata["repeats_dropped"] for manifest in found] == [0, 100, 100]


def test_every_day_is_counted_however_many_shards_it_lies_in(
    spark: SparkContext, storage: Storage, tmp_path: Path
) -> None:
    tree = shop(tmp_path, storage)
    path = tmp_path / "data" / "interactions.parquet"
    table = pq.read_table(path)
    times = table.column("when").to_numpy()
    copied = table.filter(pa.array(times // 86_400 == times[-1] // 86_400))
    renamed = pa.array([f"later {basket}" for basket in copied.column("basket").to_pylist()])
    moved = copied.set_column(0, "basket", renamed).set_column(
        2, "when", pa.array(copied["when"].to_numpy() - 8_640_000)
    )
    pq.write_table(pa.concat_tables([table, table.slice(0, 100), moved]), path)
    found = []
    for size in (5000, 100):
        tree["resources"]["events_per_shard"] = size
        metadata = ingested(spark, storage, parse_settings(tree)).metadata
        found.append(metadata["days"]["rows"])
    assert found[0] == found[1]
    rows = read_table(storage, open_manifest(storage, schemas.INTERACTIONS)).to_pandas()
    rows["day"] = rows["timestamp"] // 86_400
    by_day = rows.groupby("day")
    assert [row[:2] for row in found[0]] == [[day, len(group)] for day, group in by_day]
    assert [row[2] for row in found[0]] == by_day["user_id"].nunique().tolist()
    repeated = rows.duplicated(["user_id", "item_id", "timestamp"]).groupby(rows["day"]).sum()
    assert [row[3] for row in found[0]] == repeated.tolist()
    assert repeated.sum() == 100
    digests = [row[4] for row in found[0]]
    assert metadata["first"] == rows["timestamp"].min()
    assert metadata["last"] == rows["timestamp"].max()
    assert digests[0] == digests[-1]  # the last day, once more a hundred days before, of other baskets
    assert len(set(digests)) == len(digests) - 1


def test_events_of_unknown_items_are_counted_and_dropped_or_kept(
    spark: SparkContext, storage: Storage, tmp_path: Path
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
    spark: SparkContext, storage: Storage, tmp_path: Path
) -> None:
    tree = shop(tmp_path, storage)
    tree["task"]["data"]["items"] = None
    ingested(spark, storage, parse_settings(tree))
    raw = pq.read_table(tmp_path / "data" / "interactions.parquet").column("product").to_pylist()
    assert sorted(keys_of(storage, schemas.ITEMS)) == sorted(set(raw))


def test_an_interrupted_ingest_says_the_same_of_events_that_weigh_nothing(
    spark: SparkContext, storage: Storage, tmp_path: Path
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
    spark: SparkContext, storage: Storage, tmp_path: Path
) -> None:
    tree = shop(tmp_path, storage)
    path = tmp_path / "data" / "items.parquet"
    items = pq.read_table(path).to_pydict()
    items["price"][:3] = [float("inf")] * 3
    pq.write_table(pa.table(items), path)
    with pytest.raises(DataError, match=r"3 of 73 rows of items are bad(?s:.*)g0-00"):
        ingested(spark, storage, parse_settings(tree))


def test_a_bad_night_leaves_the_former_datasets_standing(spark: SparkContext, storage: Storage, tmp_path: Path) -> None:
    tree = shop(tmp_path, storage)
    before = ingested(spark, storage, parse_settings(tree))
    path = tmp_path / "data" / "interactions.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["when"]), path)
    with pytest.raises(DataError, match="when"):
        ingested(spark, storage, parse_settings(tree))
    assert open_manifest(storage, schemas.INTERACTIONS).content == before.content


def test_interactions_of_one_moment_cannot_be_split_by_time(
    spark: SparkContext, storage: Storage, tmp_path: Path
) -> None:
    tree = shop(tmp_path, storage)
    path = tmp_path / "data" / "interactions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "when", pa.array([5] * len(table))), path)
    with pytest.raises(DataError, match=r"all interactions have the timestamp 5(?s:.*)leave_last_out"):
        ingested(spark, storage, parse_settings(tree))
