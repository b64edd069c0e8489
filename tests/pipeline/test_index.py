"""The index finds what exact search finds, is the same every time, and refuses what it cannot index."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from pipeline import index
from pipeline.contracts import datasets
from pipeline.contracts.config import Settings, parse_settings
from pipeline.contracts.datasets import Lineage
from pipeline.contracts.errors import DataError, SettingsError
from pipeline.contracts.schemas import EMBEDDINGS, INDEX, INDEX_STAGE
from pipeline.contracts.storage import Storage
from pipeline.index import Index

LINEAGE = Lineage("test", {}, {})


def make_settings(storage: Storage, **changes: object) -> Settings:
    data = {"interactions": {"paths": "x.parquet", "user": "u", "item": "i", "timestamp": "t"}}
    resources = {"run": storage.url, "cache": f"{storage.url}-cache"}
    return parse_settings({"task": {"data": data, "index": {"num_queries": 200, **changes}}, "resources": resources})


def write_embeddings(storage: Storage, vectors: np.ndarray, num_shards: int = 3) -> None:
    keys, ids = (
        pa.array([f"item-{i}" for i in range(len(vectors))], pa.string()),
        pa.array(np.arange(len(vectors)), pa.uint32()),
    )
    table = pa.table({"key": keys, "id": ids, "embedding": datasets.vectors_to_arrow(vectors)})
    size = -(-len(vectors) // num_shards)
    shards = [
        datasets.write_shard(storage, EMBEDDINGS, number, table.slice(number * size, size), LINEAGE)
        for number in range(num_shards)
    ]
    datasets.commit(storage, EMBEDDINGS, shards, LINEAGE)


def build(spark: SparkSession, storage: Storage, **changes: object) -> bytes:
    settings = make_settings(storage, **changes)
    index.run(spark, storage, settings, datasets.trace(storage, INDEX_STAGE, settings))
    return datasets.read_file(storage, datasets.open_manifest(storage, INDEX), "index.faiss")


def clustered(num: int, width: int = 16, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(50, width))[rng.integers(50, size=num)] + 0.4 * rng.normal(size=(num, width))
    unit: np.ndarray = (vectors / np.linalg.norm(vectors, axis=1)[:, None]).astype(np.float32)
    return unit


def test_a_small_catalogue_is_searched_exactly(spark: SparkSession, storage: Storage) -> None:
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


def test_nprobe_is_raised_until_other_queries_reach_the_target(spark: SparkSession, storage: Storage) -> None:
    vectors = clustered(6000)
    write_embeddings(storage, vectors)
    build(spark, storage, factory="IVF64,Flat", recall_target=0.97)
    opened = Index.open(storage)
    nprobe = opened.recall["search"]["nprobe"]
    assert 1 < nprobe < 64
    assert faiss.extract_index_ivf(opened.faiss_index).nprobe == nprobe
    curve = [(point["width"], point["recall"]) for point in opened.recall["curve"]]
    assert [width for width, _ in curve] == [2**power for power in range(len(curve))]
    assert curve[-1][1] >= 0.97 > curve[0][1]
    assert opened.recall["reached"]
    found, _ = opened.faiss_index.search(vectors[-300:], 10)
    exact = -np.sort(-(vectors[-300:] @ vectors.T), axis=1)[:, :10]
    assert np.mean(found >= exact[:, -1:] - 1e-5) >= 0.97


@pytest.mark.parametrize("kind", ["uniform", "duplicates", "half precision"])
def test_recall_target_holds_for_awkward_vectors(kind: str) -> None:
    vectors = np.random.default_rng(2).normal(size=(3000, 12)).astype(np.float32)
    if kind == "duplicates":
        vectors = vectors[np.random.default_rng(3).integers(40, size=3000)]
    if kind == "half precision":
        vectors = vectors.astype(np.float16)
    built = index.train(vectors, "IVF32,Flat", 2000, seed=1)
    built.add(vectors.astype(np.float32))
    report = index.measure(built, vectors, [(0, 1700), (1700, 1700), (1700, 3000)], 10, 300, 0.95, seed=1)
    assert report["reached"]
    assert report["recall"] >= 0.95


def test_exact_kth_scores_equal_a_full_sort() -> None:
    vectors = np.random.default_rng(4).normal(size=(90, 5)).astype(np.float32)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    queries = np.array([0, 13, 89])
    for bounds in ([(0, 90)], [(0, 3), (3, 50), (50, 90)]):
        found = index.exact_kth_scores(vectors, bounds, queries, 10)
        np.testing.assert_allclose(found, -np.sort(-scores[queries], axis=1)[:, 9], rtol=1e-5)


def test_recall_counts_what_a_hidden_part_of_the_index_cannot_find() -> None:
    vectors = clustered(400)
    half = faiss.IndexIDMap(faiss.IndexFlatIP(16))
    half.add_with_ids(vectors[::2], np.arange(0, 400, 2))
    queries = np.arange(0, 400, 2)
    exact = index.exact_kth_scores(vectors, [(0, 400)], queries, 10)
    hits, _ = index.recall(half, vectors, queries, exact, 10)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    expected = np.mean(np.argsort(-scores[queries], axis=1)[:, :10] % 2 == 0, axis=1)
    assert hits.tolist() == expected.tolist()


def test_the_same_embeddings_give_the_same_bytes(spark: SparkSession, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        storage = Storage(str(tmp_path / name))
        write_embeddings(storage, clustered(3000))
        files.append(build(spark, storage, factory="IVF32,Flat"))
    assert files[0] == files[1]


def test_an_interrupted_build_ends_with_the_bytes_of_an_unbroken_one(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, broken = Storage(str(tmp_path / "unbroken")), Storage(str(tmp_path / "broken"))
    for storage in (unbroken, broken):
        write_embeddings(storage, clustered(3000))
    build(spark, unbroken, factory="IVF32,Flat")
    for moment in ("train", "measure", "_store_keys"):
        with monkeypatch.context() as patch:
            patch.setattr(index, moment, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                build(spark, broken, factory="IVF32,Flat")
        assert datasets.find_manifest(broken, INDEX) is None
    monkeypatch.setattr(index, "train", None)  # the finished index is not built again
    build(spark, broken, factory="IVF32,Flat")
    contents = [datasets.open_manifest(storage, INDEX) for storage in (unbroken, broken)]
    assert contents[0].content == contents[1].content
    assert {shard.name for shard in contents[0].shards} == {"index.faiss", "keys.parquet", "recall.json"}


def test_auto_is_flat_for_few_and_lists_that_can_be_trained_for_many() -> None:
    assert index.choose_factory(20_000, 500_000) == "Flat"
    assert index.choose_factory(158_357, 500_000) == "IVF1592,Flat"
    for num_vectors, train_rows in ((20_001, 500_000), (10**9, 500_000), (50_000, 1000)):
        nlist = int(index.choose_factory(num_vectors, train_rows)[3:].split(",")[0])
        assert nlist * index.POINTS_PER_CENTROID <= min(num_vectors, train_rows)
    assert index.choose_factory(10**6, 50) == "Flat"


@pytest.mark.parametrize("num", [1, 2, 3])
def test_fewer_items_than_k_are_all_found(spark: SparkSession, storage: Storage, num: int) -> None:
    write_embeddings(storage, clustered(num), num_shards=1)
    build(spark, storage)
    opened = Index.open(storage)
    assert opened.recall["recall"] == 1.0
    assert len(opened.search(clustered(1), 10)[0][0]) == num
    assert len(opened.neighbours("item-0", 10)[0]) == num - 1


@pytest.mark.parametrize(("value", "complaint"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "all zeros")])
def test_an_embedding_that_cannot_be_searched_is_named(
    spark: SparkSession, storage: Storage, value: float, complaint: str
) -> None:
    vectors = clustered(30)
    vectors[25] = value
    write_embeddings(storage, vectors, num_shards=3)
    with pytest.raises(DataError, match=rf"embeddings shard 2 row 5 \(item item-25\): the embedding is {complaint}"):
        build(spark, storage)


def test_an_empty_catalogue_is_an_error(spark: SparkSession, storage: Storage) -> None:
    write_embeddings(storage, clustered(5)[:0], num_shards=1)
    with pytest.raises(DataError, match="nothing to index"):
        build(spark, storage)


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("IVF400,Flat", "has 400 lists, and there are 300 vectors"),
        ("IVFfour", "does not build it for 16 dimensions"),
        ("PQ5", "does not build it for 16 dimensions"),
        ("PQ4x10", "cannot train it on 300 vectors"),
    ],
)
def test_a_factory_that_cannot_work_is_refused(factory: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        index.train(clustered(300), factory, 1000, seed=1)


@pytest.mark.parametrize("factory", ["HNSW16", "IVF8,PQ4x4", "PCA8,IVF8,Flat", "IVF8,SQ8"])
def test_other_faiss_factories_are_built_and_measured(spark: SparkSession, storage: Storage, factory: str) -> None:
    write_embeddings(storage, clustered(1500))
    build(spark, storage, factory=factory, recall_target=0.9)
    report = Index.open(storage).recall
    assert 0.2 < report["recall"] <= 1.0
    assert report["reached"] == (report["recall"] >= 0.9)


def test_an_unknown_key_is_an_error_that_names_near_ones(spark: SparkSession, storage: Storage) -> None:
    write_embeddings(storage, clustered(30))
    build(spark, storage)
    opened = Index.open(storage)
    with pytest.raises(DataError, match="no item has the key 'item-2x' among 30; did you mean item-2"):
        opened.neighbours("item-2x", 3)
    with pytest.raises(DataError, match="the first are item-0, item-1, item-2"):
        opened.neighbours("?", 3)
    with pytest.raises(DataError, match=r"expected \[any number, 16\]"):
        opened.search(np.ones((2, 3)), 5)


def test_an_index_of_older_embeddings_is_not_opened(spark: SparkSession, storage: Storage) -> None:
    write_embeddings(storage, clustered(30))
    build(spark, storage)
    write_embeddings(storage, clustered(30, seed=2))
    with pytest.raises(DataError, match="built from other embeddings"):
        Index.open(storage)
