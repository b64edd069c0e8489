"""The index finds what exact search finds, is the same every time, and refuses what it cannot index."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from pyspark import SparkContext

from jobs.releases import open_index
from pipeline import index
from pipeline.ann import building, recall, training
from pipeline.contracts import datasets
from pipeline.contracts.datasets import Shard
from pipeline.contracts.errors import DataError, SettingsError, StorageError
from pipeline.contracts.schemas import EMBEDDINGS, INDEX, INDEX_LOG, INDEX_PARTS, INDEX_STAGE
from pipeline.contracts.storage import Storage
from pipeline.index import Index
from tests.embeddings import KINDS, LINEAGE, build, clustered, make_settings, uniform, write_embeddings

Usage = namedtuple("Usage", "total used free")
FAST = "IVF64(PQ8x4fs,RFlat),PQ8x4fsr,Refine(SQfp16)"


def recall_of(opened: Index, vectors: np.ndarray, queries: np.ndarray, k: int = 10) -> float:
    """The share of the k best, or what scores as high, of rows that were never drawn for tuning; by brute force."""
    found, _ = opened.search([f"item-{row}" for row in queries], k)
    scores = vectors[queries] @ vectors.T
    scores[np.arange(len(queries)), queries] = -np.inf
    kth = -np.partition(-scores, k - 1, axis=1)[:, k - 1]
    least = kth - 1e-5 * np.abs(kth)
    right = [(scores[q, [int(key[5:]) for key in line]] >= least[q]).sum() for q, line in enumerate(found)]
    return float(np.mean(right)) / k


def never_drawn(num_vectors: int, num_queries: int) -> np.ndarray:
    """Rows that were neither tuned nor measured on, with the settings' seed 0."""
    drawn = training.draw([num_vectors], 10, index.OVERDRAWN * 2 * num_queries, seed=0)
    others = np.setdiff1d(np.arange(num_vectors), drawn.queries[0])
    return others if len(others) else np.arange(num_vectors)  # of 500, searched exactly, all are drawn


def test_a_small_catalogue_is_searched_exactly(spark: SparkContext, storage: Storage) -> None:
    vectors = clustered(500)
    write_embeddings(storage, vectors)
    build(spark, storage)
    opened = Index.open(storage)
    assert opened.recall["recall"] == 1.0
    assert opened.recall["search"] == {}
    keys, scores = opened.search(vectors[:20], 7)
    order = np.argsort(-(vectors[:20] @ vectors.T), axis=1)[:, :7]
    assert keys == [[f"item-{row}" for row in line] for line in order]
    np.testing.assert_allclose(scores, np.take_along_axis(vectors[:20] @ vectors.T, order, axis=1), rtol=1e-5)
    nearest, _ = opened.neighbours("item-3", 6)
    assert nearest == keys[3][1:]
    assert opened.neighbours("item-3", 6, exclude_self=False)[0] == keys[3][:6]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num", [500, 5_000, 50_000])
def test_the_published_search_reaches_the_target_on_queries_never_used(
    spark: SparkContext, storage: Storage, num: int, kind: str
) -> None:
    vectors = KINDS[kind](num)
    write_embeddings(storage, vectors)
    factory, count = ("IVF64,Flat" if num == 5_000 else "auto"), min(300, num // 5)
    build(spark, storage, factory=factory, num_queries=count, resources={"threads": 2})
    opened = Index.open(storage)
    assert opened.recall["reached"]
    assert opened.recall["factory"] == {500: "Flat", 5_000: "IVF64,Flat", 50_000: "IVF1024,Flat"}[num]
    others = never_drawn(num, count)
    queries = np.random.default_rng(9).choice(others, min(500, len(others)), replace=False)
    assert recall_of(opened, vectors, queries) >= 0.95
    if kind == "duplicates":  # the few that have no copies are not hidden by those that have
        same, counts = np.unique(vectors @ np.arange(1, 17), return_counts=True)
        single = others[np.isin((vectors @ np.arange(1, 17))[others], same[counts == 1])][:300]
        assert recall_of(opened, vectors, single) >= 0.93


@pytest.mark.parametrize("factory", [FAST, "IVF64_HNSW32,SQ8"])
def test_compressed_indexes_reach_the_target_by_their_own_means(
    spark: SparkContext, storage: Storage, factory: str
) -> None:
    vectors = clustered(6000)
    write_embeddings(storage, vectors)
    build(spark, storage, factory=factory, recall_target=0.9)
    opened = Index.open(storage)
    assert opened.recall["reached"]
    assert ("k_factor" in opened.recall["search"]) == ("Refine" in factory)
    assert recall_of(opened, vectors, np.arange(0, 6000, 20)) >= 0.9
    page = (Path(storage.url) / INDEX_LOG / "report.html").read_text()
    assert "queries a second" in page
    assert factory in page


@pytest.mark.parametrize("factory", ["auto", "IVF32,Flat", "IVF32_HNSW32,SQ8", FAST])
@pytest.mark.parametrize("num_shards", [1, 7])
def test_the_bytes_do_not_depend_on_how_the_vectors_are_cut(
    spark: SparkContext, tmp_path: Path, factory: str, num_shards: int
) -> None:
    vectors, made = clustered(4000), []
    for shards in (3, num_shards):
        storage = Storage(str(tmp_path / f"run-{shards}"))
        write_embeddings(storage, vectors, num_shards=shards)
        made.append(build(spark, storage, factory=factory))
    for name in ("index.faiss", "trained.faiss", "lookup.arrow", "recall.json"):
        if name == "recall.json":  # of the same content, but for the checksum of nothing that was cut
            reports = [Index.open(Storage(str(tmp_path / f"run-{n}"))).recall for n in (3, num_shards)]
            assert reports[0] == reports[1]
        assert made[0][name] == made[1][name], name


@pytest.mark.parametrize("factory", ["IVF32,Flat", FAST])
def test_parts_made_by_spark_are_what_one_process_makes(spark: SparkContext, storage: Storage, factory: str) -> None:
    vectors = clustered(4000)
    write_embeddings(storage, vectors, num_shards=5)
    build(spark, storage, factory=factory)
    folder = Path(storage.url) / "index"
    alone = faiss.read_index(str(folder / "trained.faiss"))
    alone.add(vectors)
    together = faiss.read_index(str(folder / "index.faiss"))
    np.testing.assert_array_equal(faiss.serialize_index(alone), faiss.serialize_index(together))


def test_an_index_too_large_for_the_drivers_memory_is_merged_on_disk(
    spark: SparkContext, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    vectors, opened = clustered(6000), []
    for name, resources in (("memory", {}), ("disk", {"merge_memory": 1000})):
        storage = Storage(str(tmp_path / name))
        write_embeddings(storage, vectors, num_shards=4)
        files = build(spark, storage, resources, factory="IVF32_HNSW32,SQ8")
        assert ("lists.ivfdata" in files) == (name == "disk")
        opened.append(Index.open(storage))
    moved = tmp_path / "moved"
    (tmp_path / "disk").rename(moved)
    capfd.readouterr()
    opened.append(open_index(make_settings(Storage(str(moved))), None))
    assert capfd.readouterr().out == "", "a command's stdout is for what was asked"
    results = [found.search(vectors[:50], 10) for found in opened]
    assert results[0] == results[1] == results[2]
    assert opened[0].recall["recall"] == opened[1].recall["recall"]
    with pytest.raises(SettingsError, match=r"more than resources.index.merge_memory \(1,000\).*cannot keep this kind"):
        build(spark, Storage(str(moved)), {"merge_memory": 1000}, factory=FAST)


@pytest.mark.parametrize(("factory", "resources"), [("IVF32,Flat", {"merge_memory": 1000}), ("HNSW16", {})])
def test_a_disk_that_cannot_hold_the_index_is_said_before_it_is_merged(
    spark: SparkContext, storage: Storage, monkeypatch: pytest.MonkeyPatch, factory: str, resources: dict[str, int]
) -> None:
    write_embeddings(storage, clustered(2000))
    cache = Path(f"{storage.url}-cache")
    left = cache / "0123456789ab" / "index-parts" / f"{'0' * 24}-merge"  # by a build that was killed long ago
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 30, 1 << 30, 1 << 20))
        wanted = (
            rf"cannot keep the index while it is merged in {cache}.*: about [\d,]+ more bytes are needed and 1,048,576 "
            "are free; make room there or set resources.cache"
        )
        with pytest.raises(StorageError, match=wanted):
            build(spark, storage, resources, factory=factory)
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    merge, folders = faiss.write_index, list[Path]()

    def watched(merged: faiss.Index, target: Any, *more: Any) -> None:
        folders.extend([Path(target).parent] if isinstance(target, str) else [])
        merge(merged, target, *more)

    monkeypatch.setattr(faiss, "write_index", watched)
    build(spark, storage, resources, factory=factory)
    assert cache in folders[0].parents
    assert not folders[0].exists()
    assert not left.exists()


def test_parts_that_lie_elsewhere_are_counted_where_they_are_merged(tmp_path: Path) -> None:
    shard = Shard("x", 0, 1000, "0")
    made = [building.Part(shard, replace(shard, bytes=10), shard)] * 3
    for url, needed in ((str(tmp_path), 2700 + 30), ("memory://far", 2700 + 30 + 3000 + 30)):
        source = building.Source(Storage(url), None, LINEAGE, 1)  # type: ignore[arg-type]
        assert building.merge_bytes(source, made, 2700) == needed


def test_an_index_built_again_in_memory_has_nothing_of_the_lists_merged_on_disk(
    spark: SparkContext, storage: Storage
) -> None:
    write_embeddings(storage, clustered(2000))
    build(spark, storage, {"merge_memory": 1000}, factory="IVF32,Flat")
    lists = Path(storage.locate("index/lists.ivfdata"))
    former = lists.read_bytes()
    files = build(spark, storage, factory="IVF32,Flat")
    assert not lists.exists()
    assert {path.name for path in lists.parent.glob("*.*")} == {*files, datasets.MANIFEST}
    lists.write_bytes(former)  # as a store does that brings back what was removed
    opened = Index.open(storage)
    if Path("/proc/self/maps").exists():
        assert f"{storage.url}/index/index.faiss" in Path("/proc/self/maps").read_text()
    assert opened.neighbours("item-7", 5, exclude_self=False)[0][0] == "item-7"


@pytest.mark.parametrize("moment", ["_add_and_merge", "_measure", "_publish"])
def test_an_interrupted_build_goes_on_and_ends_with_the_same_bytes(
    spark: SparkContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    whole, broken = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "broken"))
    for storage in (whole, broken):
        write_embeddings(storage, clustered(3000))
    expected = build(spark, whole, factory=FAST)
    with monkeypatch.context() as patch:
        patch.setattr(index, moment, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(spark, broken, factory=FAST)
    assert datasets.find_manifest(broken, INDEX) is None
    monkeypatch.setattr(training, "train", None)  # what was trained is not trained again
    if moment != "_add_and_merge":
        monkeypatch.setattr(building, "merge_parts", None)
    assert build(spark, broken, factory=FAST) == expected
    assert broken.names(INDEX_PARTS) == []


@pytest.mark.parametrize("first", [True, False])
def test_a_build_that_goes_on_where_another_device_is_found_takes_nothing_of_the_first(
    spark: SparkContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    vectors, samples = uniform(80_000, width=4), []  # the fewest of which a GPU trains more lists, on another sample
    whole, broken = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "broken"))

    def stop(_: index.Build, sample: np.ndarray) -> None:
        samples.append(sample)
        raise KeyboardInterrupt

    for storage, gpu in ((whole, not first), (broken, first), (broken, not first)):
        if not datasets.find_manifest(storage, EMBEDDINGS):
            write_embeddings(storage, vectors)
        with monkeypatch.context() as patch:
            patch.setattr(index, "uses_gpu", lambda _, gpu=gpu: gpu)
            patch.setattr(index, "_trained", stop)
            with pytest.raises(KeyboardInterrupt):
                build(spark, storage)
    assert len(samples[1]) != len(samples[0])
    np.testing.assert_array_equal(samples[2], samples[0])
    if first:
        assert build(spark, broken) == build(spark, whole)
        settings = make_settings(broken)
        assert datasets.is_up_to_date(broken, INDEX_STAGE, datasets.trace(broken, INDEX_STAGE, settings))


def test_a_killed_task_costs_its_own_part_only(spark: SparkContext, tmp_path: Path) -> None:
    whole, broken = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "broken"))
    for storage in (whole, broken):
        write_embeddings(storage, clustered(3000), num_shards=4)
    expected = build(spark, whole, factory="IVF32,Flat")

    class Deadly(Storage):
        """Ends the process that reads one shard for the second time: after the sample, while parts are made."""

        def read_bytes(self, path: str) -> bytes:
            if path == "embeddings/part-00003.parquet" and self.names("index-parts/_building/part-00000.exact.json"):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read_bytes(path)

        def names(self, path: str) -> list[str]:
            return [path] if Path(self.locate(path)).exists() else []

    class Watched(Deadly):
        """Names as they are, for the driver."""

        names = Storage.names

        def __reduce__(self) -> tuple:
            return Deadly, (self.url,)

    settings = make_settings(broken, factory="IVF32,Flat")
    lineage = datasets.trace(broken, INDEX_STAGE, settings)
    with pytest.raises(Exception, match="Python worker exited unexpectedly"):
        index.run(spark, Watched(broken.url), settings, lineage)
    kept = Path(broken.locate(f"{INDEX_PARTS}/part-00000.faiss"))
    before = kept.stat().st_mtime_ns
    merge_parts = building.merge_parts

    def watched(*given: object) -> object:
        assert kept.stat().st_mtime_ns == before, "what was finished is kept"
        return merge_parts(*given)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "merge_parts", watched)
        assert build(spark, broken, factory="IVF32,Flat") == expected


def test_last_nights_quantizer_serves_while_it_holds(spark: SparkContext, tmp_path: Path) -> None:
    nights = [Storage(str(tmp_path / name)) for name in ("first", "second", "third", "fourth")]
    vectors = clustered(5000)
    for storage, made in zip(
        nights, (vectors, np.vstack([vectors, clustered(300)]), -vectors[:5000], vectors), strict=True
    ):
        write_embeddings(storage, made)
    first = build(spark, nights[0], factory="IVF32,Flat")
    second = build(spark, nights[1], factory="IVF32,Flat", previous=nights[0].url)
    third = build(spark, nights[2], factory="IVF32,Flat", previous=nights[1].url)
    fourth = build(spark, nights[3], factory="IVF32,SQ8", previous=nights[0].url)
    trained = [datasets.open_manifest(storage, INDEX).metadata["trained"] for storage in nights]
    assert second["trained.faiss"] == first["trained.faiss"]
    assert trained[1]["from"] == datasets.open_manifest(nights[0], INDEX).content
    assert third["trained.faiss"] != first["trained.faiss"]
    assert "of its lists grew" in trained[2]["retrained"]
    assert fourth["trained.faiss"] != first["trained.faiss"]
    assert "IVF32,Flat" in trained[3]["retrained"]
    assert all(Index.open(storage).recall["reached"] for storage in nights)


def test_a_former_quantizer_that_misses_the_target_is_given_up(
    spark: SparkContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights = [Storage(str(tmp_path / name)) for name in ("first", "second", "alone")]
    for storage in nights:
        write_embeddings(storage, clustered(3000))
    first = build(spark, nights[0], factory="IVF32,Flat")
    tune, calls = recall.tune, []

    def disappointing(*given: object) -> object:
        calls.append(1)
        search, tried = tune(*given)  # type: ignore[arg-type]
        return ({"nprobe": 1}, tried) if len(calls) == 1 else (search, tried)

    monkeypatch.setattr(recall, "tune", disappointing)
    second = build(spark, nights[1], factory="IVF32,Flat", recall_target=0.999, previous=nights[0].url)
    assert len(calls) == 2
    trained = datasets.open_manifest(nights[1], INDEX).metadata["trained"]
    assert "below the target 0.999" in trained["retrained"]
    assert second["trained.faiss"] == first["trained.faiss"]  # trained anew on the same vectors


@pytest.mark.parametrize("num", [1, 2, 3])
def test_fewer_items_than_k_are_all_found(spark: SparkContext, storage: Storage, num: int) -> None:
    write_embeddings(storage, clustered(num), num_shards=1)
    build(spark, storage)
    opened = Index.open(storage)
    assert opened.recall["recall"] == 1.0
    assert len(opened.search(clustered(1), 10)[0][0]) == num
    assert len(opened.neighbours("item-0", 10)[0]) == num - 1


@pytest.mark.parametrize(("value", "complaint"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "all zeros")])
def test_an_embedding_that_cannot_be_searched_is_named_before_anything_is_trained(
    spark: SparkContext, storage: Storage, monkeypatch: pytest.MonkeyPatch, value: float, complaint: str
) -> None:
    vectors = clustered(30)
    vectors[25] = value
    write_embeddings(storage, vectors, num_shards=3)
    monkeypatch.setattr(training, "train", None)
    with pytest.raises(DataError, match=rf"embeddings shard 2 row 5 \(item item-25\): the embedding is {complaint}"):
        build(spark, storage)


def test_a_corrupted_shard_of_embeddings_is_named(spark: SparkContext, storage: Storage) -> None:
    write_embeddings(storage, clustered(300))
    path = Path(storage.locate(f"{EMBEDDINGS.name}/part-00001.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"part-00001.parquet was changed after its manifest was written"):
        build(spark, storage)


def test_an_empty_catalogue_is_an_error(spark: SparkContext, storage: Storage) -> None:
    write_embeddings(storage, clustered(5)[:0], num_shards=1)
    with pytest.raises(DataError, match="nothing to index"):
        build(spark, storage)


def test_a_budget_that_cannot_hold_the_index_is_refused_before_any_task(storage: Storage) -> None:
    write_embeddings(storage, clustered(3000))
    nobody: SparkContext = None  # type: ignore[assignment]
    with pytest.raises(SettingsError, match=r"Flat takes 192,000 bytes; raise task.index.memory"):
        build(nobody, storage, memory=100_000)
    with pytest.raises(SettingsError, match=r"IVF8,Flat takes about 216,512 bytes .* task.index.memory is 100,000"):
        build(nobody, storage, memory=100_000, factory="IVF8,Flat")


def test_a_factory_that_cannot_be_filtered_is_refused_before_any_task(storage: Storage) -> None:
    write_embeddings(storage, clustered(3000))
    nobody: SparkContext = None  # type: ignore[assignment]
    with pytest.raises(SettingsError, match=r"task.index.factory IVF32,RQ4x4: FAISS cannot filter"):
        build(nobody, storage, factory="IVF32,RQ4x4")
    assert storage.names(INDEX_PARTS) == []


@pytest.mark.parametrize("factory", ["HNSW16", "IVF8,PQ4x4", "PCA8,IVF8,Flat", "IVF8,SQ8", "PQ8x4"])
def test_other_faiss_factories_are_built_and_measured(spark: SparkContext, storage: Storage, factory: str) -> None:
    write_embeddings(storage, clustered(1500))
    build(spark, storage, factory=factory, recall_target=0.9)
    report = Index.open(storage).recall
    assert 0.2 < report["recall"] <= 1.0
    assert report["reached"] == (report["recall"] >= 0.9)


def test_uneven_and_starved_lists_are_said(spark: SparkContext, storage: Storage) -> None:
    vectors = clustered(3000)
    vectors[:2500] = vectors[0] + 1e-4 * clustered(2500)
    write_embeddings(storage, vectors)
    build(spark, storage, factory="IVF128,Flat", train_rows=1000)
    report = Index.open(storage).recall
    assert any("7.8 training vectors per list" in warning for warning in report["warnings"])
    assert report["lists"]["imbalance"] > 1.5
    assert json.loads(json.dumps(report)) == report
