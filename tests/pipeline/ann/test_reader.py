"""An index is opened from anywhere, filtered, shared by threads, and refuses what is not what was published."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from filelock import FileLock, Timeout
from pyspark import SparkContext

from pipeline.ann.keys import KeyTable
from pipeline.contracts import datasets, replica
from pipeline.contracts.errors import DataError, StorageError
from pipeline.contracts.schemas import ITEMS
from pipeline.contracts.storage import Storage
from pipeline.index import Index
from tests.embeddings import LINEAGE, build, clustered, write_embeddings

Usage = namedtuple("Usage", "total used free")
FACTORIES = ("Flat", "IVF32,Flat", "IVF32,PQ8x4fs,Refine(SQfp16)")


@pytest.fixture(scope="module")
def runs(spark: SparkContext, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Runs of 2 000 clustered vectors, by factory."""
    folders = {}
    for factory in FACTORIES:
        storage = Storage(str(tmp_path_factory.mktemp("runs") / "run"))
        write_embeddings(storage, clustered(2000))
        build(spark, storage, factory=factory)
        folders[factory] = storage.url
    return folders


@pytest.fixture
def memory(runs: dict[str, str]) -> Iterator[str]:
    """The IVF run on a file system that cannot be mapped."""
    filesystem = fsspec.filesystem("memory")
    for path in Path(runs["IVF32,Flat"]).rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"/far/{path.relative_to(runs['IVF32,Flat'])}", path.read_bytes())
    yield "memory://far"
    filesystem.rm("/far", recursive=True)


@pytest.fixture(scope="module")
def on_disk(spark: SparkContext, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run whose lists were merged into a file of their own."""
    storage = Storage(str(tmp_path_factory.mktemp("runs") / "disk"))
    write_embeddings(storage, clustered(2000))
    build(spark, storage, {"merge_memory": 1000}, factory="IVF32,Flat")
    return storage.url


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what a process maps is read from Linux's /proc")
@pytest.mark.parametrize("kind", [*FACTORIES, "on disk"])
def test_a_reader_needs_no_right_to_write_what_it_maps(runs: dict[str, str], on_disk: str, kind: str) -> None:
    opened = Index.open(on_disk if kind == "on disk" else runs[kind])
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if opened.storage.url in line]
    assert any(line[-1].endswith("lists.ivfdata" if kind == "on disk" else "index.faiss") for line in maps)
    assert {line[1][:2] for line in maps} == {"r-"}
    assert opened.search(clustered(2000)[:1], 10)[0][0][0] == "item-0"


@pytest.mark.parametrize("factory", FACTORIES)
def test_filters_leave_exactly_what_they_say(runs: dict[str, str], factory: str) -> None:
    opened = Index.open(runs[factory])
    vectors = clustered(2000)
    plain, _ = opened.search(["item-5", "item-6"], 10)
    assert all(len(line) == 10 for line in plain)
    assert "item-5" not in plain[0]
    denied, _ = opened.search(["item-5", "item-6"], 10, deny=plain[0])
    assert not set(denied[0]) & set(plain[0])
    few = [f"item-{row}" for row in range(0, 2000, 500)]
    allowed, scores = opened.search(vectors[5:6], 10, allow=few)
    order = np.argsort(-(vectors[::500] @ vectors[5]))
    assert allowed[0] == [few[place] for place in order]
    np.testing.assert_allclose(scores[0], (vectors[::500] @ vectors[5])[order], atol=2e-3)
    assert opened.search(vectors[5:6], 10, allow=few, deny=few[1:])[0] == [few[:1]]
    assert opened.search(vectors[5:6], 10, allow=[])[0] == [[]]


def test_threads_that_share_an_index_get_what_one_gets(runs: dict[str, str]) -> None:
    opened, vectors = Index.open(runs["IVF32,Flat"]), clustered(2000)
    blocks = np.array_split(vectors, 40)
    expected = [opened.search(block, 5, deny=["item-1"]) for block in blocks]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(opened.search, block, 5, None, ["item-1"]) for block in blocks]
        others = [pool.submit(opened.search, block, 7, ["item-3", "item-4"]) for block in blocks]
        assert [job.result() for job in jobs] == expected
        assert all(len(line) == 2 for job in others for line in job.result()[0])


def test_queries_in_many_batches_come_back_in_order(runs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened, vectors = Index.open(runs["Flat"]), clustered(2000)
    whole = opened.search(vectors[:50], 4)
    monkeypatch.setattr("pipeline.ann.reader.BATCH", 7)
    assert opened.search(vectors[:50], 4) == whole
    assert opened.search(np.zeros((0, 16), np.float32), 4) == ([], [])


def test_a_remote_index_is_copied_once_and_gives_the_same(runs: dict[str, str], memory: str, tmp_path: Path) -> None:
    far = Index.open(memory, cache=str(tmp_path))
    assert far.search(["item-8"], 10) == Index.open(runs["IVF32,Flat"]).search(["item-8"], 10)
    copies = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.faiss")}
    assert len(copies) == 1
    Index.open(memory, cache=str(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.faiss")} == copies


def copies_in(cache: Path) -> list[str]:
    return sorted(path.name[:24] for path in cache.glob("*/index/*-files"))


def test_a_copy_in_daily_use_is_kept_and_one_that_nobody_opens_goes(
    memory: str, storage: Storage, tmp_path: Path
) -> None:
    cache, long_ago = tmp_path / "cache", time.time() - 15 * 24 * 3600
    opened = Index.open(memory, cache=str(cache))
    write_items(storage, ["one"], [])  # another dataset of another run, whose copy makes room
    for used in (True, False):
        [folder] = cache.glob("*/index/*-files")
        os.utime(folder, (long_ago, long_ago))
        if used:
            Index.open(memory, cache=str(cache))
        replica.map_values(storage, datasets.open_manifest(storage, ITEMS), "degree" if used else "id", str(cache))
        assert len(copies_in(cache)) == used
    assert len(opened.search(["item-8"], 10)[0][0]) == 10  # who has it open keeps reading it


def test_a_new_index_of_the_run_takes_the_place_of_the_old_copy(
    spark: SparkContext, memory: str, runs: dict[str, str], tmp_path: Path
) -> None:
    old = Index.open(memory, cache=str(tmp_path))
    found = old.search(["item-8"], 10)
    before = copies_in(tmp_path)
    for path in Path(runs["Flat"]).rglob("*"):
        if path.is_file():
            fsspec.filesystem("memory").pipe_file(f"/far/{path.relative_to(runs['Flat'])}", path.read_bytes())
    assert Index.open(memory, cache=str(tmp_path)).recall["factory"] == "Flat"
    assert len(copies_in(tmp_path)) == 1
    assert copies_in(tmp_path) != before
    assert old.search(["item-8"], 10) == found


def test_a_cache_that_cannot_hold_the_index_says_so_and_keeps_no_part(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    refused = r"cannot keep a local copy of the index in .*; make room there or set resources.cache"
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file of this process may grow larger
    try:
        with pytest.raises(StorageError, match=refused):
            Index.open(memory, cache=str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not list(tmp_path.rglob("*.tmp"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 30, 1 << 30, 1000))
        with pytest.raises(StorageError, match=refused.replace(".*", ".* more bytes are needed and 1,000 are free")):
            Index.open(memory, cache=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=refused):
        Index.open(memory, cache=str(tmp_path / "file"))
    assert len(Index.open(memory, cache=str(tmp_path)).search(["item-8"], 10)[0][0]) == 10


def test_a_file_that_is_gone_is_named(memory: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").rm("/far/index/keys.arrow")
    with pytest.raises(DataError, match=r"keys.arrow is in the manifest but not there"):
        Index.open(memory, cache=str(tmp_path))


def test_nobody_removes_a_copy_before_it_is_open(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def opening(*files: Path) -> KeyTable:
        [lock] = tmp_path.rglob("files.lock")
        with pytest.raises(Timeout):
            FileLock(lock).acquire(timeout=0)
        tried.append(lock)
        return KeyTable(*files)

    monkeypatch.setattr("pipeline.ann.reader.KeyTable", opening)
    Index.open(memory, cache=str(tmp_path))
    with FileLock(tried[0], timeout=0):
        pass


def test_a_changed_file_is_not_opened(memory: str, tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    data = bytearray(filesystem.cat_file("/far/index/index.faiss"))
    data[-9] ^= 1
    filesystem.pipe_file("/far/index/index.faiss", bytes(data))
    with pytest.raises(DataError, match=r"index.faiss was changed after its manifest was written"):
        Index.open(memory, cache=str(tmp_path))
    filesystem.pipe_file("/far/index/index.faiss", bytes(data[:-1]))
    with pytest.raises(DataError, match=r"index.faiss has .* bytes, expected"):
        Index.open(memory, cache=str(tmp_path), verify=False)


def test_an_index_without_embeddings_beside_it_takes_vectors_only(memory: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").rm("/far/embeddings", recursive=True)
    opened = Index.open(memory, cache=str(tmp_path))
    assert opened.search(clustered(2000)[:3], 2)[0][1][0] == "item-1"
    with pytest.raises(DataError, match="no embeddings beside its index"):
        opened.search(["item-1"], 2)


def test_an_unknown_key_is_an_error_that_names_near_ones(runs: dict[str, str]) -> None:
    opened = Index.open(runs["Flat"])
    with pytest.raises(DataError, match="no item has the key 'item-2x' among 2,000; did you mean item-2"):
        opened.neighbours("item-2x", 3)
    with pytest.raises(DataError, match="the first are item-0, item-1, item-2"):
        opened.neighbours("?", 3)
    with pytest.raises(DataError, match="no item has the key 'item-x'"):
        opened.search(clustered(1), 3, deny=["item-1", "item-x"])
    with pytest.raises(DataError, match=r"expected \[any number, 16\]"):
        opened.search(np.ones((2, 3)), 5)
    with pytest.raises(DataError, match="queries is the text 'item-1'"):
        opened.search("item-1", 5)


def test_keys_may_be_integers_and_any_of_the_usual_sequences(spark: SparkContext, storage: Storage) -> None:
    write_embeddings(storage, clustered(300), prefix="")
    build(spark, storage)
    opened = Index.open(storage)
    expected = opened.search(["5", "17"], 3, deny=["1", "2"])
    assert opened.search([5, np.int64(17)], 3, deny={1, 2}) == expected
    assert opened.search(np.array([5, 17], np.uint32), 3, deny=np.array([1, 2])) == expected
    assert opened.search(np.array(["5", "17"]), 3, deny=np.array(["1", "2"])) == expected
    assert opened.search(np.array(["5", 17], object), 3, deny=("1", 2)) == expected
    assert opened.search([5], 3, deny=np.array([], np.int64)) == opened.search([5], 3)
    assert opened.search([5], 3, allow=np.array([], np.int64)) == ([[]], [[]])
    assert opened.neighbours(5, 3) == opened.neighbours("5", 3)
    np.testing.assert_array_equal(opened.vector(5), clustered(300)[5])


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"queries": ["item-1", 2.0]}, r"queries: key 1 is 2.0 of type float, expected text or an integer"),
        ({"queries": [[1.0] * 16]}, r"queries: key 0 is \[1.0, .* of type list"),
        ({"queries": ["item-1"], "deny": [True]}, r"deny: key 0 is True of type bool"),
        ({"queries": ["item-1"], "allow": [b"item-2"]}, r"allow: key 0 is b'item-2' of type bytes"),
        ({"queries": ["item-1"], "deny": "item-2"}, r"deny is the text 'item-2', expected a list of keys"),
        ({"queries": ["item-1"], "deny": np.array([["item-2"]])}, r"deny is an array \[1, 1\]"),
        ({"queries": np.ones(16)}, r"vectors are \[16\] of float64, expected \[any number, 16\]"),
        ({"queries": np.full((2, 16), "x")}, r"vectors are \[2, 16\] of <U1, expected"),
        ({"queries": np.ones((2, 16), complex)}, r"vectors are \[2, 16\] of complex128"),
    ],
)
def test_what_is_neither_keys_nor_vectors_is_named(runs: dict[str, str], given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        Index.open(runs["Flat"]).search(**given)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, 0.0])
@pytest.mark.filterwarnings("error")
def test_a_vector_that_cannot_be_searched_for_is_named_before_any_search(
    runs: dict[str, str], monkeypatch: pytest.MonkeyPatch, kind: type, value: float
) -> None:
    opened = Index.open(runs["IVF32,Flat"])
    vectors: np.ndarray = clustered(2000)[:30].astype(kind)
    with np.errstate(over="ignore"):
        vectors[17] = 0.0 if value == 0.0 else vectors[17]
        vectors[17, 3] = np.float64(value).astype(kind)
    monkeypatch.setattr("pipeline.ann.reader.BATCH", 7)
    monkeypatch.setattr("pipeline.ann.reader.ask", None)
    with pytest.raises(DataError, match=f"vectors row 17 is {'all zeros' if value == 0.0 else 'not finite'}"):
        opened.search(vectors, 3)


def write_items(storage: Storage, keys: list[str], cuts: list[int]) -> None:
    """Items of these keys, every third without a title, in shards cut before these rows."""
    shards = []
    for number, rows in enumerate(np.split(np.arange(len(keys)), cuts)):
        names = pa.array([None if row % 3 == 0 else f"title of {keys[row]}" for row in rows], pa.string())
        numbers = pa.array(np.zeros(len(rows)), pa.int64())
        columns = [
            pa.array([keys[row] for row in rows], pa.string()),
            pa.array(rows, pa.uint32()),
            *[numbers] * 2,
            names,
        ]
        table = pa.table(columns, names=["key", "id", "degree", "first_seen", "title"])
        shards.append(datasets.write_shard(storage, ITEMS, number, table, LINEAGE))
    datasets.commit(storage, ITEMS, shards, LINEAGE)


def test_titles_are_those_of_the_items_whose_keys_they_have(spark: SparkContext, storage: Storage) -> None:
    keys = [f"item-{row}" for row in range(300)]
    write_embeddings(storage, clustered(300))
    build(spark, storage)
    opened = Index.open(storage)
    assert opened.titles(["item-7"]) == [""]
    write_items(storage, keys, [7, 7, 200])
    expected = [f"title of {key}" if row % 3 else "" for row, key in enumerate(keys)]
    assert opened.titles(keys) == expected
    assert opened.titles(["item-200", "unknown", "item-7"]) == [expected[200], "", expected[7]]
    Path(storage.locate("items/part-00003.parquet")).unlink()
    assert opened.titles(["item-199", "item-5"]) == [expected[199], expected[5]]  # no shard but theirs is read
    write_items(storage, ["new", *keys[:-200]], [50])  # a later ingest: ids mean others
    assert opened.titles(["item-0", "item-99", "item-299"]) == ["", "", ""]


def test_an_index_of_older_embeddings_is_not_opened(spark: SparkContext, storage: Storage) -> None:
    write_embeddings(storage, clustered(30))
    build(spark, storage)
    write_embeddings(storage, clustered(30, seed=2))
    with pytest.raises(DataError, match="built from other embeddings"):
        Index.open(storage)
