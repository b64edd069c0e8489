"""Datasets: the manifest is the dataset; receipts let a restart go on; what changed since is refused by name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from pipeline.contracts import datasets, schemas
from pipeline.contracts.config import Settings, parse_settings
from pipeline.contracts.datasets import (
    MANIFEST,
    RECEIPTS,
    Lineage,
    Manifest,
    arrow_to_lists,
    arrow_to_vectors,
    begin,
    check_sources,
    commit,
    encode_table,
    find_manifest,
    finished_shard,
    is_up_to_date,
    leave_receipt,
    lists_to_arrow,
    open_manifest,
    put_large_file,
    read_file,
    read_rows,
    read_shard,
    read_table,
    shard_name,
    trace,
    vectors_to_arrow,
    write_file,
    write_shard,
)
from pipeline.contracts.errors import DataError
from pipeline.contracts.schemas import SCHEMA_VERSION
from pipeline.contracts.storage import Storage

LINEAGE = Lineage("walks", {"task.seed": 0}, {"items": "abc"})
OTHER = Lineage("walks", {"task.seed": 1}, {"items": "abc"})


def store(storage: Storage, sizes: list[int], name: str = "things", lineage: Lineage = LINEAGE) -> Manifest:
    """Rows 0, 1, 2 … in shards of these sizes."""
    first, shards = 0, []
    for number, size in enumerate(sizes):
        table = pa.table(
            {"id": pa.array(range(first, first + size), pa.int64()), "twice": [2.0 * r for r in range(size)]}
        )
        shards.append(write_shard(storage, name, number, table, lineage))
        first += size
    return commit(storage, name, shards, lineage, {"note": "hello"})


def settings() -> Settings:
    source = {"paths": "e", "user": "u", "item": "i", "timestamp": "t"}
    return parse_settings({"task": {"data": {"interactions": source}}, "resources": {"run": "r"}})


# ------------------------------------------------------------------------------------------------ manifests


def test_a_dataset_without_its_manifest_does_not_exist(storage: Storage) -> None:
    write_shard(storage, "things", 0, pa.table({"id": [1]}), LINEAGE)
    assert find_manifest(storage, "things") is None
    with pytest.raises(DataError, match="has no things yet"):
        open_manifest(storage, "things")


def test_a_missing_dataset_names_the_stage_that_builds_it(storage: Storage) -> None:
    with pytest.raises(DataError, match=r"has no neighbours yet; run `pinsage walks` to build it"):
        open_manifest(storage, schemas.NEIGHBOURS)
    for scratch, stage in (
        ("layers/output-1", "inference"),
        ("ingest/events", "ingest"),
        ("embeddings/x", "inference"),
    ):
        with pytest.raises(DataError, match=rf"run `pinsage {stage}` to build it"):
            open_manifest(storage, scratch)


def test_a_manifest_comes_back_as_it_was_committed(storage: Storage) -> None:
    manifest = store(storage, [3, 2])
    found = open_manifest(storage, "things")
    assert found == manifest
    assert (found.num_rows, found.metadata, found.lineage) == (5, {"note": "hello"}, LINEAGE)
    assert found.num_bytes == sum(len(storage.read_bytes(f"things/{shard.name}")) for shard in found.shards)
    assert json.loads(storage.read_bytes(f"things/{MANIFEST}"))["content"] == found.content


def test_beginning_again_withdraws_the_dataset(storage: Storage) -> None:
    store(storage, [3])
    begin(storage, "things")
    assert find_manifest(storage, "things") is None
    begin(storage, "never made")


def clutter(storage: Storage) -> None:
    """Leave what earlier attempts leave."""
    store(storage, [2, 2, 2])
    begin(storage, "things")
    storage.write_bytes("things/checkpoint.pt", b"state")
    write_file(storage, "things", "old.bin", b"of a kind that is no longer written", LINEAGE)
    Path(storage.locate(f"things/.part-00000.parquet.{'0' * 32}.tmp")).write_bytes(b"half")


def files(storage: Storage) -> list[str]:
    return sorted(path.name for path in Path(storage.locate("things")).iterdir())


def test_a_commit_sweeps_out_what_earlier_attempts_left(storage: Storage) -> None:
    clutter(storage)
    store(storage, [6])
    assert files(storage) == [MANIFEST, "part-00000.parquet"]


def test_a_commit_leaves_alone_what_no_stage_writes(storage: Storage) -> None:
    mine = ["clicks.parquet", "part-2024.parquet.csv", "part-a.parquet", "notes.tmp", "deep"]
    for name in mine:
        storage.write_bytes(f"things/{name}" + "/file" * (name == "deep"), b"the user's own")
    store(storage, [6])
    assert files(storage) == sorted([MANIFEST, "part-00000.parquet", *mine])


@pytest.mark.parametrize("survives", range(8))
def test_a_commit_killed_anywhere_and_repeated_leaves_nothing_behind(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    clutter(storage)
    left = iter(range(survives))

    def killed(action: str) -> Callable[..., None]:
        original = getattr(Storage, action)

        def act(*arguments: Any) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            original(*arguments)

        return act

    shards = [write_shard(storage, "things", 0, pa.table({"id": [1]}), LINEAGE)]
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        for action in ("write_bytes", "delete"):
            patch.setattr(Storage, action, killed(action))
        commit(storage, "things", shards, LINEAGE)
    if find_manifest(storage, "things") is None:
        commit(storage, "things", shards, LINEAGE)
    assert [name for name in files(storage) if name != RECEIPTS] == [MANIFEST, "part-00000.parquet"]


def test_receipts_beside_a_manifest_are_not_gone_on_with(storage: Storage) -> None:
    """A commit killed after its manifest leaves them; a forced run must build again all the same."""
    manifest = store(storage, [2])
    leave_receipt(storage, "things", manifest.shards[0], LINEAGE)
    begin(storage, "things")
    assert finished_shard(storage, "things", 0, LINEAGE) is None


def test_a_shard_of_another_schema_is_refused_before_it_is_stored(storage: Storage) -> None:
    with pytest.raises(DataError, match=r"pairs shard 3: columns are \['query'\], expected .*`pinsage pairs --force`"):
        write_shard(storage, schemas.PAIRS, 3, pa.table({"query": [1]}), LINEAGE)
    assert storage.names("pairs") == []


def test_a_manifest_of_another_schema_version_is_refused_with_a_way_out(storage: Storage) -> None:
    store(storage, [1])
    tree = json.loads(storage.read_bytes(f"things/{MANIFEST}"))
    storage.write_bytes(f"things/{MANIFEST}", json.dumps({**tree, "schema_version": SCHEMA_VERSION + 1}).encode())
    expected = (
        rf"things/{MANIFEST} has schema version {SCHEMA_VERSION + 1}, this code reads version {SCHEMA_VERSION}; choose"
    )
    with pytest.raises(DataError, match=expected):
        open_manifest(storage, "things")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"7", b'{"schema_version": 1}', b"\xff\xfe"])
def test_a_broken_manifest_is_refused_with_a_way_out(storage: Storage, text: bytes) -> None:
    storage.write_bytes(f"things/{MANIFEST}", text)
    with pytest.raises(DataError, match=r"is not a manifest .*delete the folder .*things and run again"):
        find_manifest(storage, "things")


# ------------------------------------------------------------------------------------------------ lineage


def test_the_content_hash_does_not_depend_on_when_or_why(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    before = store(storage, [3, 2])
    monkeypatch.setattr(time, "time", lambda: 1e9)
    after = store(storage, [3, 2], lineage=OTHER)
    assert before.created_at != after.created_at
    assert before.content == after.content


def test_the_content_hash_depends_on_rows_cuts_name_and_metadata(storage: Storage) -> None:
    first = store(storage, [3, 2]).content
    others = [store(storage, [2, 3]).content, store(storage, [3, 1]).content, store(storage, [3, 2], "twins").content]
    manifest = store(storage, [3, 2])
    others.append(commit(storage, "things", manifest.shards, LINEAGE, {"note": "bye"}).content)
    assert len({first, *others}) == 5


def test_a_stage_is_up_to_date_only_when_all_it_writes_is_of_its_lineage(storage: Storage) -> None:
    assert not is_up_to_date(storage, schemas.PAIRS_STAGE, LINEAGE)
    for dataset in (schemas.PAIRS, schemas.QUESTIONS):
        commit(storage, dataset, [], LINEAGE)
        assert not is_up_to_date(storage, schemas.PAIRS_STAGE, LINEAGE)
    commit(storage, schemas.HARD_NEGATIVES, [], LINEAGE)
    assert is_up_to_date(storage, schemas.PAIRS_STAGE, LINEAGE)
    assert not is_up_to_date(storage, schemas.PAIRS_STAGE, OTHER)


def test_a_lineage_follows_the_contents_of_what_is_read(storage: Storage) -> None:
    for dataset in schemas.WALKS.reads:
        commit(storage, dataset, [], OTHER)
    before = trace(storage, schemas.WALKS, settings())
    commit(storage, schemas.ITEM_USERS, [], LINEAGE)
    assert trace(storage, schemas.WALKS, settings()) == before
    commit(storage, schemas.ITEM_USERS, [], LINEAGE, {"changed": 1})
    assert trace(storage, schemas.WALKS, settings()).fingerprint != before.fingerprint


def test_a_lineage_survives_being_stored(storage: Storage) -> None:
    """Tuples in settings become lists in JSON: the fingerprint must not notice."""
    for dataset in (dataset for stage in schemas.STAGES for dataset in stage.writes):
        commit(storage, dataset, [], OTHER)
    for stage in schemas.STAGES:
        lineage = trace(storage, stage, settings(), {"file": "1 byte"})
        commit(storage, "any", [], lineage)
        assert open_manifest(storage, "any").lineage.fingerprint == lineage.fingerprint


# ------------------------------------------------------------------------------------------------ receipts


def test_a_finished_shard_is_known_to_a_restart_of_the_same_lineage_only(storage: Storage) -> None:
    shard = write_shard(storage, "things", 3, pa.table({"id": [1, 2]}), LINEAGE)
    assert finished_shard(storage, "things", 3, LINEAGE) == shard
    assert finished_shard(storage, "things", 3, OTHER) is None
    assert finished_shard(storage, "things", 4, LINEAGE) is None


def test_a_shard_of_another_version_of_the_code_is_made_again(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(storage, "things", 0, pa.table({"id": [1]}), LINEAGE)
    monkeypatch.setattr(datasets, "code_version", lambda: "another")
    assert finished_shard(storage, "things", 0, LINEAGE) is None


@pytest.mark.parametrize("damage", [b"", b"other bytes", None])
def test_a_shard_that_is_not_what_its_receipt_says_is_made_again(storage: Storage, damage: bytes | None) -> None:
    write_shard(storage, "things", 0, pa.table({"id": [1, 2]}), LINEAGE)
    if damage is None:
        storage.delete("things/part-00000.parquet")
    else:
        storage.write_bytes("things/part-00000.parquet", damage)
    assert finished_shard(storage, "things", 0, LINEAGE) is None


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b'{"fingerprint": 3}'])
def test_a_broken_receipt_is_no_receipt(storage: Storage, text: bytes) -> None:
    write_shard(storage, "things", 0, pa.table({"id": [1]}), LINEAGE)
    storage.write_bytes(f"things/{RECEIPTS}/part-00000.parquet.json", text)
    assert finished_shard(storage, "things", 0, LINEAGE) is None


def test_a_commit_clears_the_receipts(storage: Storage) -> None:
    store(storage, [2])
    assert finished_shard(storage, "things", 0, LINEAGE) is None
    assert RECEIPTS not in storage.names("things")


# ------------------------------------------------------------------------------------------------ reading


def spoil(storage: Storage, path: str, how: str) -> None:
    """Do to a stored file what accidents do."""
    data = storage.read_bytes(path)
    if how == "gone":
        storage.delete(path)
    elif how == "cut off":
        storage.write_bytes(path, data[: len(data) // 2])
    elif how == "empty":
        storage.write_bytes(path, b"")
    else:
        middle = len(data) // 2
        storage.write_bytes(path, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("gone", "is in the manifest but not there"),
        ("cut off", "was changed after its manifest was written"),
        ("empty", "was changed after its manifest was written: it has 0 bytes, expected"),
        ("one bit", "was changed after its manifest was written"),
    ],
)
def test_a_shard_that_changed_is_refused_by_file_with_a_command_that_helps(
    storage: Storage, how: str, expected: str
) -> None:
    manifest = store(storage, [3, 3], "neighbours")
    spoil(storage, "neighbours/part-00001.parquet", how)
    assert read_shard(storage, manifest, 0).num_rows == 3
    with pytest.raises(DataError) as caught:
        read_shard(storage, manifest, 1)
    assert f"{storage.locate('neighbours/part-00001.parquet')} {expected}" in str(caught.value)
    assert "run `pinsage walks --force` to build it again" in str(caught.value)


def test_a_file_of_a_dataset_is_checked_as_shards_are(storage: Storage) -> None:
    manifest = commit(storage, "model", [write_file(storage, "model", "model.json", b"{}", LINEAGE)], LINEAGE)
    assert read_file(storage, manifest, "model.json") == b"{}"
    with pytest.raises(DataError, match="model has no file other"):
        read_file(storage, manifest, "other")
    storage.write_bytes("model/model.json", b"[]")
    with pytest.raises(DataError, match=r"model/model.json was changed .*`pinsage train --force`"):
        read_file(storage, manifest, "model.json")


def test_a_large_file_gets_the_checksum_of_its_bytes(storage: Storage, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(5_000_000)
    (tmp_path / "large").write_bytes(data)
    shard = put_large_file(storage, "index", "index.faiss", tmp_path / "large", LINEAGE)
    assert shard == write_file(storage, "index", "index.faiss", data, LINEAGE)
    assert finished_shard(storage, "index", "index.faiss", LINEAGE) == shard


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    bounds=st.tuples(st.integers(0, 25), st.integers(0, 25)),
)
def test_rows_are_found_across_the_borders_of_shards(sizes: list[int], bounds: tuple[int, int]) -> None:
    storage = Storage("memory://rows")
    manifest = store(storage, sizes)
    start, stop = (min(bound, sum(sizes)) for bound in bounds)
    rows = read_rows(storage, manifest, start, stop, ["id"])
    assert rows.column("id").to_pylist() == list(range(start, stop))
    assert rows.column_names == ["id"]
    assert read_table(storage, manifest).column("id").to_pylist() == list(range(sum(sizes)))


def test_shards_are_in_order_however_many_there_are(storage: Storage) -> None:
    assert [shard_name(number) for number in (7, 99_999)] == ["part-00007.parquet", "part-99999.parquet"]
    shards = [
        write_shard(storage, "things", number, pa.table({"id": [number]}), LINEAGE) for number in (100_000, 2, 99_999)
    ]
    manifest = commit(storage, "things", shards, LINEAGE)
    assert read_table(storage, manifest).column("id").to_pylist() == [2, 99_999, 100_000]


# ------------------------------------------------------------------------------------------------ bytes


@given(cut=st.integers(0, 6))
def test_the_same_table_is_the_same_bytes_however_it_was_put_together(cut: int) -> None:
    table = pa.table(
        {
            "key": ["b", "a", None, "dd", "", "e"],
            "ids": pa.array(
                [[1], [], [2, 3], [4], [], [5]], pa.list_(pa.field("element", pa.uint32(), nullable=False))
            ),
        }
    )
    pieces = pa.concat_tables([table.slice(0, cut), table.slice(cut)]).replace_schema_metadata({"from": "elsewhere"})
    assert encode_table(pieces) == encode_table(table)


floats = st.floats(-1e3, 1e3, width=16)


@given(
    matrix=npst.arrays(np.float32, st.tuples(st.integers(0, 6), st.integers(1, 5)), elements=floats),
    cut=st.integers(0, 6),
)
def test_vectors_come_back_from_storage_as_they_were(matrix: NDArray[np.float32], cut: int) -> None:
    storage = Storage("memory://vectors")
    for kind in (np.float32, np.float16):
        rows: NDArray[np.floating] = matrix.astype(kind)
        column = pa.chunked_array([vectors_to_arrow(rows[:cut]), vectors_to_arrow(rows[cut:])])
        shard = write_shard(storage, "vectors", 0, pa.table({"vector": column}), LINEAGE)
        back = arrow_to_vectors(read_shard(storage, commit(storage, "vectors", [shard], LINEAGE), 0).column("vector"))
        assert back.dtype == kind
        np.testing.assert_array_equal(back, rows)
        np.testing.assert_array_equal(arrow_to_vectors(vectors_to_arrow(rows)[1:]), rows[1:])


@given(lists=st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=4), max_size=6), cut=st.integers(0, 6))
def test_lists_come_back_from_storage_as_they_were(lists: list[list[int]], cut: int) -> None:
    storage = Storage("memory://lists")
    indptr = np.cumsum([0, *(len(row) for row in lists)])
    values = np.array([value for row in lists for value in row], dtype=np.uint32)
    column = lists_to_arrow(indptr, values)
    assert column.to_pylist() == lists
    chunked = pa.chunked_array([column.slice(0, cut), column.slice(cut)])
    shard = write_shard(storage, "lists", 0, pa.table({"ids": chunked}), LINEAGE)
    stored = read_shard(storage, commit(storage, "lists", [shard], LINEAGE), 0).column("ids")
    for found in (stored, chunked, column):
        starts, back = arrow_to_lists(found)
        np.testing.assert_array_equal(starts, indptr)
        np.testing.assert_array_equal(back, values)
        assert back.dtype == np.uint32


def test_lists_too_long_for_arrow_to_count_are_refused_with_what_to_lower() -> None:
    with pytest.raises(DataError, match=r"2,147,483,648 entries.*lower resources\.rows_per_shard or resources\.events"):
        lists_to_arrow(np.array([0, 2**31]), np.zeros(0, np.uint32))


def test_what_is_of_another_ingest_is_named_however_far_off(storage: Storage) -> None:
    """Single stages take what lies there: neighbours of a graph of former items have their ids, and mean others."""

    def made(dataset: schemas.Dataset, version: int, *sources: schemas.Dataset) -> None:
        inputs = {source.name: open_manifest(storage, source).content for source in sources}
        commit(storage, dataset, [], Lineage("stage", {}, inputs), {"version": version})

    made(schemas.ITEMS, 1)
    for dataset in (schemas.ITEM_USERS, schemas.USER_ITEMS):
        made(dataset, 1, schemas.ITEMS)
    made(schemas.NEIGHBOURS, 1, schemas.ITEM_USERS, schemas.USER_ITEMS)
    check_sources(storage, schemas.NEIGHBOURS)
    made(schemas.ITEMS, 2)
    with pytest.raises(DataError, match=r"item_users was made of another items than .*; run `pinsage graph` to build"):
        check_sources(storage, schemas.NEIGHBOURS)
    for dataset in (schemas.ITEM_USERS, schemas.USER_ITEMS):
        made(dataset, 2, schemas.ITEMS)
    with pytest.raises(DataError, match=r"neighbours was made of another item_users than .*; run `pinsage walks` to"):
        check_sources(storage, schemas.NEIGHBOURS)
    made(schemas.NEIGHBOURS, 2, schemas.ITEM_USERS, schemas.USER_ITEMS)
    check_sources(storage, schemas.NEIGHBOURS)
