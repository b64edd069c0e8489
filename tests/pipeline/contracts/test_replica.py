"""Replicas: a host's copy is what the shards hold, made once, whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.contracts import replica
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    commit,
    lists_to_arrow,
    read_shard,
    vectors_to_arrow,
    write_shard,
)
from pipeline.contracts.errors import DataError, StorageError
from pipeline.contracts.replica import map_lists, map_rows, map_values, map_vectors, padded
from pipeline.contracts.rows import describe_rows, write_rows
from pipeline.contracts.storage import Storage

LINEAGE = Lineage("test", {}, {})
LENGTHS = [0, 3, 1, 0, 0, 2, 4]
Usage = namedtuple("Usage", "total used free")


def store(storage: Storage, cuts: tuple[int, ...] = (3, 3), first: int = 0) -> Manifest:
    """Seven rows of a number, a vector and a list, in shards cut before these rows; numbers begin at first."""
    shards = []
    for number, rows in enumerate(np.split(np.arange(7), cuts)):
        lengths = np.array(LENGTHS)[rows]
        values = np.concatenate([np.arange(first + row, first + row + LENGTHS[row]) for row in [*rows, 0]])
        table = pa.table(
            {
                "degree": pa.array(first + rows, pa.int64()),
                "vector": vectors_to_arrow(np.outer(first + rows, [1.0, 0.5]).astype(np.float32).reshape(-1, 2)),
                "ids": lists_to_arrow(np.concatenate([[0], np.cumsum(lengths)]), values.astype(np.uint32)),
            }
        )
        shards.append(write_shard(storage, "things", number, table, LINEAGE))
    return commit(storage, "things", shards, LINEAGE)


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """An empty folder for copies."""
    return str(tmp_path / "cache")


def folders(cache: str, column: str) -> list[Path]:
    return sorted(path for path in Path(cache).glob(f"*/*/*-{column}") if path.is_dir())


@pytest.mark.parametrize("cuts", [(), (3, 3), (1, 2, 3, 4, 5, 6)])
def test_the_copy_is_what_the_shards_hold_however_they_are_cut(
    storage: Storage, cache: str, cuts: tuple[int, ...]
) -> None:
    manifest = store(storage, cuts)
    degrees = map_values(storage, manifest, "degree", cache)
    vectors = map_vectors(storage, manifest, "vector", cache)
    indptr, ids = map_lists(storage, manifest, "ids", cache)
    np.testing.assert_array_equal(degrees, np.arange(7))
    np.testing.assert_array_equal(vectors, np.outer(np.arange(7), [1.0, 0.5]))
    np.testing.assert_array_equal(np.diff(indptr), LENGTHS)
    assert [ids[indptr[row] : indptr[row + 1]].tolist() for row in (1, 5)] == [[1, 2, 3], [5, 6]]
    kinds = [str(array.dtype) for array in (degrees, vectors, indptr, ids)]
    assert kinds == ["int64", "float32", "int64", "uint32"]
    assert all(isinstance(array, np.memmap) for array in (degrees, vectors, indptr, ids))
    with pytest.raises(ValueError, match="read-only"):
        vectors[0, 0] = 1


def test_a_dataset_without_rows_has_a_copy_too(storage: Storage, cache: str) -> None:
    table = pa.table(
        {
            "vector": vectors_to_arrow(np.zeros((0, 3), np.float32)),
            "ids": lists_to_arrow(np.zeros(1, int), np.zeros(0, np.uint32)),
        }
    )
    manifest = commit(storage, "things", [write_shard(storage, "things", 0, table, LINEAGE)], LINEAGE)
    assert map_vectors(storage, manifest, "vector", cache).shape == (0, 3)
    indptr, ids = map_lists(storage, manifest, "ids", cache)
    assert (indptr.tolist(), ids.shape) == ([0], (0,))


def _map(url: str, manifest: Manifest, cache: str, barrier: Any, counter: Any) -> None:
    """What one of two processes does: wait for the other, then ask for the copy."""
    original = replica._copy

    def counted(*arguments: Any) -> None:
        with counter.get_lock():
            counter.value += 1
        original(*arguments)

    setattr(replica, "_copy", counted)  # noqa: B010 (in this process alone)
    barrier.wait()
    found = map_values(Storage(url), manifest, "degree", cache)
    os._exit(0 if found.tolist() == list(range(7)) else 1)


def test_processes_that_ask_at_once_make_one_copy(storage: Storage, cache: str) -> None:
    manifest, context = store(storage), multiprocessing.get_context("fork")
    barrier, counter = context.Barrier(3), context.Value("i", 0)
    arguments = (storage.url, manifest, cache, barrier, counter)
    processes = [context.Process(target=_map, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.value == 1
    assert len(folders(cache, "degree")) == 1


def test_a_copy_that_broke_off_is_made_again(storage: Storage, cache: str) -> None:
    manifest = store(storage)
    map_values(storage, manifest, "degree", cache)
    [folder] = folders(cache, "degree")
    (folder / "done.json").unlink()
    (folder / "values.npy").write_bytes(b"half")
    assert map_values(storage, manifest, "degree", cache).tolist() == list(range(7))


@pytest.mark.parametrize("kept", [1, 2])
def test_a_copy_that_was_killed_goes_on_at_the_next_shard(
    storage: Storage, cache: str, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """A kill, unlike an error, clears nothing; half of a shard may have been written."""
    manifest = store(storage)
    read: list[int] = []
    die_at = kept

    def counted(storage: Storage, manifest: Manifest, number: int, columns: Any = None) -> Any:
        read.append(number)
        if number == die_at:
            raise KeyboardInterrupt
        return read_shard(storage, manifest, number, columns)

    monkeypatch.setattr(replica, "read_shard", counted)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            map_lists(storage, manifest, "ids", cache)
    [folder] = folders(cache, "ids")
    with open(folder / "values.npy", "ab") as file:
        file.write(b"half a shard")
    read.clear()
    die_at = -1
    indptr, ids = map_lists(storage, manifest, "ids", cache)
    assert read == list(range(kept, 3))
    np.testing.assert_array_equal(np.diff(indptr), LENGTHS)
    assert ids.tolist() == [1, 2, 3, 2, 5, 6, 6, 7, 8, 9]
    assert {path.name for path in folder.iterdir()} == {"values.npy", "indptr.npy", "done.json"}


@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_of_a_copy_that_a_crash_of_the_machine_broke_off_nothing_is_taken_that_was_not_written(
    storage: Storage, cache: str, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """What was noted as written may not have been on the disk."""
    manifest = store(storage)

    def broken(storage: Storage, manifest: Manifest, number: int, columns: Any = None) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return read_shard(storage, manifest, number, columns)

    with monkeypatch.context() as patch:
        patch.setattr(replica, "read_shard", broken)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            map_values(storage, manifest, "degree", cache)
    [folder] = folders(cache, "degree")
    size = (folder / "values.npy").stat().st_size
    (folder / "values.npy").write_bytes(bytes(size if damage == "zeros" else size - 9))
    for _ in range(2):
        assert map_values(storage, manifest, "degree", cache).tolist() == list(range(7))


@pytest.mark.parametrize("name", ["values", "indptr"])
def test_a_copy_that_was_changed_is_made_again(storage: Storage, cache: str, name: str) -> None:
    manifest = store(storage)
    before = [array.tolist() for array in map_lists(storage, manifest, "ids", cache)]
    [folder] = folders(cache, "ids")
    with open(folder / f"{name}.npy", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"x")
    assert [array.tolist() for array in map_lists(storage, manifest, "ids", cache)] == before


def test_a_copy_that_was_only_touched_is_kept(storage: Storage, cache: str) -> None:
    manifest = store(storage)
    map_values(storage, manifest, "degree", cache)
    [folder] = folders(cache, "degree")
    os.utime(folder / "values.npy")
    storage.delete("things")
    for _ in range(2):
        assert map_values(storage, manifest, "degree", cache).tolist() == list(range(7))


def test_a_second_reader_copies_nothing(storage: Storage, cache: str) -> None:
    manifest = store(storage)
    map_values(storage, manifest, "degree", cache)
    storage.delete("things")
    assert map_values(storage, manifest, "degree", cache).tolist() == list(range(7))


def test_a_new_version_takes_the_place_of_the_old_copy_of_the_same_column_alone(storage: Storage, cache: str) -> None:
    old = store(storage)
    opened = map_values(storage, old, "degree", cache)
    map_vectors(storage, old, "vector", cache)
    new = store(storage, first=100)
    assert map_values(storage, new, "degree", cache).tolist() == list(range(100, 107))
    assert [len(folders(cache, column)) for column in ("degree", "vector")] == [1, 1]
    assert opened.tolist() == list(range(7)), "who has the old copy open keeps reading it"


def test_two_runs_share_a_cache_without_sharing_copies(tmp_path: Path, cache: str) -> None:
    one, two = Storage(str(tmp_path / "one")), Storage(str(tmp_path / "two"))
    first, second = store(one), store(two, first=50)
    for _ in range(2):
        assert map_values(one, first, "degree", cache)[0] == 0
        assert map_values(two, second, "degree", cache)[0] == 50
    assert len(folders(cache, "degree")) == 2


def test_columns_whose_names_end_alike_do_not_disturb_each_other(storage: Storage, cache: str) -> None:
    table = pa.table({"degree": [1, 2], "mean-degree": [3, 4]})
    manifest = commit(storage, "things", [write_shard(storage, "things", 0, table, LINEAGE)], LINEAGE)
    map_values(storage, manifest, "mean-degree", cache)
    map_values(storage, manifest, "degree", cache)
    assert len(list(Path(cache).glob("*/*/*/done.json"))) == 2


def test_a_changed_shard_is_never_copied(storage: Storage, cache: str) -> None:
    manifest = store(storage)
    storage.write_bytes("things/part-00001.parquet", b"other")
    with pytest.raises(DataError, match=r"things/part-00001\.parquet was changed after its manifest"):
        map_values(storage, manifest, "degree", cache)
    store(storage)
    assert map_values(storage, manifest, "degree", cache).tolist() == list(range(7))


def test_a_full_disk_is_explained_and_leaves_no_copy(
    storage: Storage, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = store(storage)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 30, 1 << 30, 1000))
        with pytest.raises(StorageError) as caught:
            map_vectors(storage, manifest, "vector", cache)
    assert "cannot keep a local copy of things in" in str(caught.value)
    assert "1,000 are free; make room there or set resources.cache" in str(caught.value)
    assert not list(Path(cache).rglob("values.*")), "what was copied so far makes the disk no fuller"
    assert map_vectors(storage, manifest, "vector", cache).shape == (7, 2)


def test_a_file_in_the_way_of_the_cache_is_explained(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot keep a local copy of things in .*set resources\.cache"):
        map_values(storage, store(storage), "degree", str(tmp_path / "file"))


@given(lists=st.lists(st.lists(st.integers(1, 99), max_size=5), min_size=1, max_size=6), width=st.integers(1, 6))
def test_padding_cuts_long_lists_and_fills_short_ones(lists: list[list[int]], width: int) -> None:
    indptr = np.cumsum([0, *(len(row) for row in lists)])
    values = np.array([value for row in lists for value in row], dtype=np.uint32)
    rows: NDArray[np.int64] = np.arange(len(lists))[::-1]
    expected = [(lists[row] + [0] * width)[:width] for row in rows]
    assert padded(indptr, values, rows, width, np.uint32).tolist() == expected


def age(path: Path, days: float) -> None:
    """Make a file or folder look last touched so long ago."""
    moment = time.time() - days * 24 * 3600
    os.utime(path, (moment, moment))


def test_copies_that_nobody_used_for_two_weeks_go_when_a_new_one_is_made(tmp_path: Path, cache: str) -> None:
    runs = [Storage(str(tmp_path / name)) for name in ("unused", "used", "recent", "broken off")]
    manifests, copies = [store(run) for run in runs], []
    for run, manifest in zip(runs, manifests, strict=True):
        map_values(run, manifest, "degree", cache)
        copies += [folder for folder in folders(cache, "degree") if folder not in copies]
    unused, used, recent, broken_off = copies
    for folder, days in ((unused, 15), (used, 15), (recent, 13)):
        age(folder / "done.json", days)
    (broken_off / "done.json").unlink()
    age(broken_off, 15)
    map_values(runs[1], manifests[1], "degree", cache)
    mine = Path(cache, "mine", "things", f"{'0' * 24}-degree")
    mine.mkdir(parents=True)
    age(mine, 15)
    new = Storage(str(tmp_path / "new"))
    map_values(new, store(new), "degree", cache)
    assert [folder.exists() for folder in (*copies, mine)] == [False, True, True, False, True]


def rows_of_night(night: int, matrix: NDArray[Any]) -> tuple[Storage, Manifest]:
    """The same raw rows in a run of its own, which is on no disk of this machine."""
    storage = Storage(f"memory://{uuid.uuid4()}/night-{night}")
    shards = [write_rows(storage, "layers/hidden", 0, matrix, LINEAGE)]
    return storage, commit(storage, "layers/hidden", shards, LINEAGE, {**describe_rows("float32", 2), "night": night})


def test_what_stays_from_night_to_night_is_copied_once(cache: str) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(3, 2)
    for night in range(3):
        np.testing.assert_array_equal(map_rows(*rows_of_night(night, matrix), cache, stays=True).rows, matrix)
    assert len(folders(cache, "base")) == 1
    np.testing.assert_array_equal(map_rows(*rows_of_night(4, matrix + 1), cache, stays=True).rows, matrix + 1)
    assert len(folders(cache, "base")) == 2


def test_what_passes_between_steps_is_let_go_of_after_some_hours(cache: str) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(3, 2)
    map_rows(*rows_of_night(0, matrix), cache)
    [first] = folders(cache, "rows")
    age(first / "done.json", 0.3)
    storage, manifest = rows_of_night(1, matrix)
    map_rows(storage, manifest, cache)
    [second] = folders(cache, "rows")
    assert first != second
    replica.forget(storage, "layers", cache)
    assert not folders(cache, "rows")


def test_copies_that_were_not_used_for_longest_make_room(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [Storage(str(tmp_path / str(hours))) for hours in (3, 5, 4, 0)]
    copies: list[Path] = []
    for run in runs:
        map_values(run, store(run), "degree", cache)
        copies += [folder for folder in folders(cache, "degree") if folder not in copies]
    for copy, run in zip(copies, runs, strict=True):
        age(copy / "done.json", int(Path(run.url).name) / 24)
    enough, free = 2, (1 << 20) - 100

    def usage(path: Path) -> Usage:
        return Usage(1 << 40, 0, 1 << 30 if sum(not copy.exists() for copy in copies) >= enough else free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    new = Storage(str(tmp_path / "new"))
    map_values(new, store(new), "degree", cache)
    assert [copy.exists() for copy in copies] == [True, False, False, True]
    enough, free = 4, 1000
    other = Storage(str(tmp_path / "other"))
    with pytest.raises(StorageError, match="1,000 are free"):
        map_values(other, store(other), "degree", cache)
    assert copies[0].exists(), "that it goes would be of no use"
    free = (1 << 20) - 100
    with pytest.raises(StorageError, match="1,048,476 are free"):
        map_values(other, store(other), "degree", cache)
    assert [copies[0].exists(), copies[3].exists()] == [False, True], "one was used a moment ago"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty temporary folder for the whole process."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("mode", [None, 0o777])
def test_the_default_cache_is_closed_to_other_users(storage: Storage, temporary: Path, mode: int | None) -> None:
    if mode is not None:
        (temporary / f"pinsage-{os.getuid()}").mkdir()
        (temporary / f"pinsage-{os.getuid()}").chmod(mode)
    map_values(storage, store(storage), "degree", None)
    [folder] = temporary.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_default_cache_that_another_user_made_is_refused(
    storage: Storage, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = os.getuid() + 1
    (temporary / f"pinsage-{uid}").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: uid)
    with pytest.raises(StorageError, match=rf"pinsage-{uid} belongs to another user; set resources\.cache"):
        map_values(storage, store(storage), "degree", None)
    assert not list(temporary.glob("*/*"))
