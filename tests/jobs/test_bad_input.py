"""Bad input at the command line: exit code 1, what is wrong and where, what to do, and no traceback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.contracts import schemas
from pipeline.contracts.datasets import open_manifest, read_table
from pipeline.contracts.storage import Storage
from tests.jobs.conftest import Outcome, Shop


def assert_refused(outcome: Outcome, *expected: str) -> None:
    """Exit code 1, all these words, and one message of ours instead of a traceback."""
    assert outcome.exit_code == 1, outcome.text
    assert "Traceback" not in outcome.text, outcome.text
    assert outcome.text.count("error:") == 1, outcome.text
    for words in expected:
        assert words in outcome.text, f"{words!r} is not in:\n{outcome.text}"


def change_table(path: Path, change: Callable[[dict[str, list[Any]]], object], **types: pa.DataType) -> None:
    """Rewrite a Parquet file with a change made to its columns, as lists."""
    columns = pq.read_table(path).to_pydict()
    change(columns)
    pq.write_table(pa.table({name: pa.array(rows, types.get(name)) for name, rows in columns.items()}), path)


def with_vectors(tree: dict[str, Any]) -> None:
    """A third content column, `look`, of vectors."""
    tree["task"]["data"]["items"]["columns"].append({"name": "look", "kind": "vector"})


# ------------------------------------------------------------------------------------------------ settings


def test_a_missing_settings_file_is_named_with_the_command_that_writes_one(new_shop: Shop) -> None:
    new_shop.settings_file.unlink()
    assert_refused(
        new_shop.pinsage("ingest"), f"cannot read the settings file {new_shop.settings_file}", "`pinsage init DATA`"
    )


def test_an_unknown_setting_is_refused_with_the_nearest_name(new_shop: Shop) -> None:
    new_shop.configure(lambda tree: tree["task"]["walks"].update(num_neighbors=3))
    outcome = new_shop.pinsage("run")
    assert_refused(
        outcome, str(new_shop.settings_file), "task.walks.num_neighbors: unknown", "did you mean num_neighbours?"
    )
    assert not new_shop.run.exists()


def test_an_impossible_value_is_refused_with_what_is_possible(new_shop: Shop) -> None:
    outcome = new_shop.pinsage("walks", "--set", "task.walks.restart_probability=1.5", "--set", "task.split.kind=never")
    assert_refused(
        outcome, "task.walks.restart_probability: Input should be less than 1, found 1.5",
        "task.split.kind: Input should be 'temporal', 'leave_last_out' or 'random', found 'never'",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the user's files


def test_a_file_that_is_not_there_is_named_with_its_setting(new_shop: Shop) -> None:
    (new_shop.folder / "items.parquet").unlink()
    assert_refused(new_shop.pinsage("ingest"), f"{new_shop.folder}/items.parquet", "correct task.data.items.paths")


def test_a_missing_column_is_named_with_the_nearest_that_is_there(new_shop: Shop) -> None:
    new_shop.configure(lambda tree: tree["task"]["data"]["interactions"].update(user="baskets"))
    outcome = new_shop.pinsage("ingest")
    assert_refused(
        outcome, "interactions.parquet", "no column 'baskets', which task.data.interactions.user names",
        "found basket, product, when", "nearest name is 'basket'",
    )  # fmt: skip
    assert new_shop.made() == set()


def test_a_column_of_a_wrong_type_is_named_with_an_example(new_shop: Shop) -> None:
    change_table(new_shop.folder / "items.parquet", lambda t: t.update(price=["cheap"] * len(t["price"])))
    assert_refused(
        new_shop.pinsage("ingest"), "items.parquet", "column price is text such as 'cheap'", "task.data.items.columns"
    )


def test_keys_that_are_no_keys_are_named(new_shop: Shop) -> None:
    change_table(new_shop.folder / "interactions.parquet", lambda t: t.update(product=[0.5] * len(t["product"])))
    assert_refused(
        new_shop.pinsage("ingest"), "interactions.parquet", "column product is double such as 0.5",
        "correct task.data.interactions.item",
    )  # fmt: skip


def test_timestamps_in_milliseconds_are_recognised_and_the_setting_named(new_shop: Shop) -> None:
    change_table(new_shop.folder / "interactions.parquet", lambda t: t.update(when=[1000 * v for v in t["when"]]))
    assert_refused(
        new_shop.pinsage("ingest"), "interactions.parquet", "column when",
        "set task.data.interactions.timestamp_unit: milliseconds",
    )  # fmt: skip
    assert new_shop.made() == set()


def test_an_empty_file_is_named(new_shop: Shop) -> None:
    (new_shop.folder / "interactions.parquet").write_bytes(b"")
    assert_refused(new_shop.pinsage("ingest"), "interactions.parquet: the file is empty (0 bytes)", "paths")


def test_a_file_without_rows_is_named(new_shop: Shop) -> None:
    change_table(new_shop.folder / "interactions.parquet", lambda t: t.update({name: [] for name in t}))
    assert_refused(new_shop.pinsage("ingest"), "interactions.parquet: the file has a header but no rows", "paths")


@pytest.mark.parametrize("kept", [0.3, 0.99])
def test_a_truncated_parquet_file_is_named(new_shop: Shop, kept: float) -> None:
    path = new_shop.folder / "interactions.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert_refused(
        new_shop.pinsage("ingest"), "interactions.parquet: cannot be opened as Parquet", "cut off", "write it again"
    )


def test_a_parquet_file_with_a_hole_in_its_pages_is_named(new_shop: Shop) -> None:
    """Its footer is sound, so only the task that reads the rows can find out."""
    path = new_shop.folder / "interactions.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:40] + bytes(400) + data[440:])
    assert_refused(new_shop.pinsage("ingest"), "interactions.parquet: cannot be read", "damaged", "write it again")
    assert new_shop.made() == set()


# ------------------------------------------------------------------------------------------------ bad rows


def test_null_keys_fail_the_run_when_they_are_more_than_the_share(new_shop: Shop) -> None:
    change_table(
        new_shop.folder / "interactions.parquet", lambda t: t["basket"].__setitem__(slice(7, 107), [None] * 100)
    )
    outcome = new_shop.pinsage("ingest")
    assert_refused(
        outcome, "100 of 1,440 rows of interactions are bad, more than task.data.max_quarantined_share (1.00%) allows",
        "interactions.parquet row 7: user key is null", "mend the files or raise the share",
        f"all of them, with reasons: {new_shop.run}/quarantine",
    )  # fmt: skip
    assert new_shop.made() == {"quarantine"}, "only what explains the failure is published"
    storage = Storage(str(new_shop.run))
    assert read_table(storage, open_manifest(storage, schemas.QUARANTINE)).num_rows == 100


def test_duplicate_item_keys_fail_the_run_when_they_are_more_than_the_share(new_shop: Shop) -> None:
    change_table(
        new_shop.folder / "items.parquet", lambda t: t.update({name: [*rows, *rows[:20]] for name, rows in t.items()})
    )
    assert_refused(
        new_shop.pinsage("ingest"), "20 of 93 rows of items are bad",
        "items.parquet row 73: item key 'g0-00' is already in row 0 of", "keys must be unique",
    )  # fmt: skip
    assert new_shop.made() == {"quarantine"}


def test_features_that_are_no_numbers_or_of_another_length_fail_the_run_by_row_and_key(new_shop: Shop) -> None:
    def spoil(items: dict[str, list[Any]]) -> None:
        items["look"] = [[1.0, 2.0] for _ in items["product"]]
        items["look"][10] = [1.0, 2.0, 3.0]
        items["look"][11] = [float("nan"), 2.0]
        items["price"][12] = float("inf")

    change_table(new_shop.folder / "items.parquet", spoil)
    new_shop.configure(with_vectors)
    outcome = new_shop.pinsage("ingest", "--set", "task.data.max_quarantined_share=0.001")
    assert_refused(
        outcome, "3 of 73 rows of items are bad",
        "items.parquet row 10: look of item 'g0-10' has 3 numbers, expected 2",
        "items.parquet row 11: look of item 'g0-11' holds NaN, infinity or null, expected 2 finite numbers",
        "items.parquet row 12: price of item 'g1-00' is inf, not a finite number",
    )  # fmt: skip


def test_bad_rows_below_the_share_are_set_aside_with_their_reasons_and_unknown_items_are_counted(
    new_shop: Shop,
) -> None:
    def spoil_events(events: dict[str, list[Any]]) -> None:
        events["basket"][3] = None
        events["product"][4] = None
        events["product"][5:8] = ["stranger", "stranger", "other"]

    def spoil_items(items: dict[str, list[Any]]) -> None:
        for rows in items.values():
            rows.append(rows[0])
        items["look"] = [[1.0, 2.0] for _ in items["product"]]
        items["look"][1] = [1.0]

    change_table(new_shop.folder / "interactions.parquet", spoil_events)
    change_table(new_shop.folder / "items.parquet", spoil_items)
    new_shop.configure(with_vectors)
    outcome = new_shop.pinsage("ingest", "--set", "task.data.max_quarantined_share=0.1")
    assert outcome.exit_code == 0, outcome.text
    assert "set aside as bad: 2 interactions, 2 items" in outcome.text
    assert "interactions are of 3 items that the catalogue lacks, such as 'g0-01'" in outcome.text
    storage = Storage(str(new_shop.run))
    found = read_table(storage, open_manifest(storage, schemas.QUARANTINE)).to_pylist()
    assert [
        (row["source"].rsplit("/", 1)[-1], row["row"], row["reason"].split(" is ")[0].split(" has ")[0])
        for row in found
    ] == [
        ("interactions.parquet", 3, "user key"),
        ("interactions.parquet", 4, "item key"),
        ("items.parquet", 1, "look of item 'g0-01'"),
        ("items.parquet", 73, "item key 'g0-00'"),
    ]
    counted = open_manifest(storage, schemas.INTERACTIONS).metadata
    sold = pq.read_table(new_shop.folder / "interactions.parquet")["product"].to_pylist()
    assert (counted["unknown_items"], counted["events_of_unknown_items"]) == (3, 3 + sold.count("g0-01"))
    assert counted["unknown_item_examples"] == ["g0-01", "stranger", "other"], "an item set aside is unknown, too"
    items = read_table(storage, open_manifest(storage, schemas.ITEMS))
    assert "stranger" not in items.column("key").to_pylist()


def test_a_catalogue_that_no_interaction_knows_is_refused_with_keys_of_both_sides(new_shop: Shop) -> None:
    change_table(new_shop.folder / "items.parquet", lambda t: t.update(product=[f"sku {key}" for key in t["product"]]))
    outcome = new_shop.pinsage("ingest")
    assert_refused(
        outcome, "no interaction names an item of the catalogue: interactions have keys such as ['g",
        "the catalogue has ['sku ", "check task.data.items.key and task.data.interactions.item",
    )  # fmt: skip
    assert not new_shop.made() & {"interactions", "users", "items", "content"}


# ------------------------------------------------------------------------------------------------ the run's folder


def test_a_stage_whose_input_is_missing_names_the_stage_to_run(new_shop: Shop) -> None:
    assert_refused(new_shop.pinsage("walks"), "has no item_users yet", "run `pinsage graph` to build it")


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_shard_changed_after_its_manifest_is_named_with_a_command_that_mends_it(
    shop: Shop, how: str, number: int
) -> None:
    """The first shard is read on the driver too, for its schema; the others only inside Spark's own plan."""
    shard = shop.run / "interactions" / f"part-{number:05d}.parquet"
    shard.unlink() if how == "gone" else shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    outcome = shop.pinsage("graph", "--force")
    said = "is in the manifest but not there" if how == "gone" else "was changed after its manifest was written"
    assert_refused(outcome, f"{shard} {said}", "run `pinsage ingest --force` to build it again")
    assert not shop.made() & {"item_users", "user_items"}


def test_a_run_of_another_schema_version_is_refused_with_a_way_out(shop: Shop) -> None:
    manifest = shop.run / "items" / "_manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 99}))
    for command in ("graph", "status"):
        assert_refused(
            shop.pinsage(command), f"{manifest} has schema version 99", "this code reads version 1",
            "choose another resources.run",
        )  # fmt: skip


@pytest.mark.parametrize("place", ["run", "run/below"])
def test_a_file_in_the_way_of_the_run_is_named(new_shop: Shop, place: str) -> None:
    new_shop.run.write_text("not a folder")
    outcome = new_shop.pinsage("ingest", "--set", f"resources.run={new_shop.folder}/{place}")
    assert_refused(outcome, f"cannot write {new_shop.run}", "a file stands where a folder is needed", "resources.run")


def test_a_folder_without_the_right_to_write_is_named() -> None:
    """Root may write everywhere, so root tries as nobody, in a folder that nobody can reach."""
    with tempfile.TemporaryDirectory() as folder:
        shop, user = Shop(Path(folder)), os.geteuid()
        shop.configure()
        shop.run.mkdir(mode=0o555)
        shop.folder.chmod(0o755)
        try:
            os.seteuid(user or 65534)
            outcome = shop.pinsage("ingest")
        finally:
            os.seteuid(user)
    assert_refused(
        outcome, f"cannot write {shop.run}", "Permission denied", "the right to write there, or choose another"
    )


# ------------------------------------------------------------------------------------------------ disks and ports


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with these options for the length of a test."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount: what a full or read-only disk does is unproved")
    mounted: list[Path] = []

    def mount_tmpfs(options: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount here ({done.stderr.strip()}): what a full or read-only disk does is unproved")
        mounted.append(folder)
        return folder

    yield mount_tmpfs
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def test_a_disk_that_fills_up_is_named_and_the_stage_is_not_published(
    new_shop: Shop, mount: Callable[[str], Path]
) -> None:
    disk = mount("size=20k")
    outcome = new_shop.pinsage("ingest", "--set", f"resources.run={disk}")
    assert_refused(
        outcome, f"cannot write {disk}/ingest/", "No space left on device", "make room or move resources.run"
    )
    assert not list(disk.glob("*/_manifest.json"))
    assert not list(disk.rglob("*.tmp"))


def test_a_full_disk_under_the_cache_is_named(shop: Shop, mount: Callable[[str], Path]) -> None:
    disk = mount("size=16k")
    outcome = shop.pinsage("walks", "--set", f"resources.cache={disk}")
    assert_refused(
        outcome, f"cannot keep a local copy of item_users in {disk}", "make room there or set resources.cache"
    )
    assert "neighbours" not in shop.made()


def test_a_read_only_disk_is_named_before_any_work(new_shop: Shop, mount: Callable[[str], Path]) -> None:
    disk = mount("size=16k,ro")
    outcome = new_shop.pinsage("ingest", "--set", f"resources.run={disk}/run")
    assert_refused(
        outcome, f"{disk}/run", "Read-only file system", "the right to write there, or choose another folder"
    )


@pytest.mark.parametrize("setting", ["resources.spark.driver_port", "resources.training.master_port"])
def test_a_port_that_is_taken_is_named_before_any_work(new_shop: Shop, setting: str) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        outcome = new_shop.pinsage("run", "--set", f"{setting}={port}")
    assert_refused(
        outcome, f"{setting}: port {port} cannot be opened (Address already in use)", "or 0 for any free one"
    )
    assert new_shop.made() == set()


# ------------------------------------------------------------------------------------------------ as a process


def in_a_process_of_its_own(shop: Shop, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`pinsage ingest`, with a Spark that it starts itself."""
    command = [sys.executable, "-m", "jobs.cli", "ingest", "--settings", str(shop.settings_file), *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_master_that_spark_cannot_use_is_named(new_shop: Shop) -> None:
    finished = in_a_process_of_its_own(new_shop, "--set", "resources.spark.master=local[x]")
    outcome = Outcome(finished.returncode, finished.stdout + finished.stderr)
    assert_refused(outcome, "Spark did not start on local[x]: Could not parse Master URL", "resources.spark.master")


def test_a_person_sees_our_message_and_nothing_of_spark(new_shop: Shop) -> None:
    """A mistake that only a Spark task finds, in a process of its own: no Java log, no stack trace."""
    change_table(new_shop.folder / "interactions.parquet", lambda t: t.update(when=[1000 * v for v in t["when"]]))
    finished = in_a_process_of_its_own(new_shop)
    assert finished.returncode == 1
    lines = [line for line in (finished.stdout + finished.stderr).splitlines() if line.strip()]
    unavoidable = "WARNING: Using incubator modules: jdk.incubator.vector"  # of the JVM itself
    said = [line for line in lines if line != unavoidable]
    assert said[-1].startswith("error: ")
    assert "set task.data.interactions.timestamp_unit: milliseconds" in said[-1]
    assert all(line.startswith("ingest: ") for line in said[:-1]), finished.stderr
