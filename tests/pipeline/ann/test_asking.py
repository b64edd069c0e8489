"""Whatever a filter leaves and however many are wanted: each query gets all it is due, and nearly the best of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from pipeline.ann import asking, recall, training
from pipeline.ann.keys import KeyTable, encode_part, write_tables
from pipeline.ann.reader import Index
from pipeline.ann.searching import parameters
from pipeline.contracts import datasets
from pipeline.contracts.schemas import EMBEDDINGS
from pipeline.contracts.storage import Storage
from tests.embeddings import clustered, write_embeddings

NUM, TARGET = 20_000, 0.95
FACTORIES = ("IVF256,Flat", "IVF256,PQ8x4fsr,Refine(SQfp16)")
QUERIES = np.random.default_rng(7).choice(NUM, 100, replace=False)


def built(folder: Path, vectors: NDArray[np.float32], factory: str) -> Index:
    """An index of the vectors and its embeddings, tuned as the stage does it, without Spark."""
    storage = Storage(str(folder / "run"))
    write_embeddings(storage, vectors)
    index = training.train(vectors, factory, seed=0)
    index.add(vectors)
    ids = np.random.default_rng(0).choice(len(vectors), 300, replace=False)
    exact = recall.exact_neighbours(vectors[ids], ids, vectors, 0, recall.depth(10))
    search, _ = recall.tune(index, vectors[ids], ids, exact, 10, TARGET)
    (folder / "part").write_bytes(encode_part(pa.chunked_array([named(np.arange(len(vectors)))], pa.string()), 0))
    write_tables([folder / "part"], folder / "keys", folder / "lookup")
    report = {"search": search, "k": 10, "target": TARGET}
    table = KeyTable(folder / "keys", folder / "lookup")
    return Index(storage, index, table, datasets.find_manifest(storage, EMBEDDINGS), report)


def named(rows: NDArray[np.int64]) -> list[str]:
    """The keys of rows."""
    return [f"item-{row}" for row in rows]


def full_and_right(found: list[list[str]], queries: NDArray[np.float32], left: NDArray[np.int64], k: int) -> float:
    """The share of the k best of the rows that are left, by brute force; all must be k, each once, and among those."""
    vectors = clustered(NUM)
    assert all(len(set(line)) == k for line in found)
    assert set().union(*found) <= set(named(left))
    scores = queries @ vectors[left].T
    kth = -np.partition(-scores, k - 1, axis=1)[:, k - 1]
    rows = np.array([[int(key[5:]) for key in line] for line in found])
    return float((np.einsum("qd,qkd->qk", queries, vectors[rows]) >= kth[:, None] - 1e-5).mean())


@pytest.fixture(scope="module", params=FACTORIES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Twenty thousand clustered vectors."""
    return built(tmp_path_factory.mktemp("run"), clustered(NUM), request.param)


def test_an_ordinary_search_is_the_tuned_one_and_no_wider(opened: Index) -> None:
    vectors = clustered(NUM)[QUERIES]
    scores, rows = opened.faiss_index.search(
        vectors, 10, params=parameters(opened.faiss_index, opened.recall["search"])
    )
    assert opened.search(vectors, 10) == ([named(line) for line in rows], scores.tolist())


def test_only_one_cluster_is_allowed_and_queries_come_from_all(opened: Index) -> None:
    vectors = clustered(NUM)
    centre = np.random.default_rng(1).normal(size=(50, 16))[3]
    category = np.sort(np.argsort(-(vectors @ centre))[:400])
    found, _ = opened.search(vectors[QUERIES], 10, allow=named(category))
    assert full_and_right(found, vectors[QUERIES], category, 10) >= TARGET - 0.02


@pytest.mark.parametrize("count", [400, 7000])
def test_only_what_lies_on_the_other_side_is_allowed(opened: Index, count: int) -> None:
    vectors = clustered(NUM)
    order = np.argsort(vectors @ vectors[0])
    queries, far = vectors[order[-50:]], np.sort(order[:count])
    found, _ = opened.search(queries, 10, allow=named(far))
    assert full_and_right(found, queries, far, 10) >= TARGET - 0.02


@pytest.mark.parametrize("count", [50, 200, 1000])
def test_all_that_is_near_is_denied(opened: Index, count: int) -> None:
    vectors, shares = clustered(NUM), []
    for row in QUERIES[:40]:
        left = np.argsort(-(vectors @ vectors[row]))[count:]
        near = np.setdiff1d(np.arange(NUM), left)
        found, _ = opened.search(vectors[[row]], 10, deny=named(near))
        shares.append(full_and_right(found, vectors[[row]], left, 10))
    assert np.mean(shares) >= TARGET - 0.02


@pytest.mark.parametrize("k", [30, 500])
def test_many_more_neighbours_than_the_search_was_tuned_for(opened: Index, k: int) -> None:
    vectors = clustered(NUM)
    found, scores = opened.search(vectors[QUERIES], k)
    assert full_and_right(found, vectors[QUERIES], np.arange(NUM), k) >= TARGET - 0.02
    assert all(line == sorted(line, reverse=True) for line in scores)


def test_all_items_are_found_where_more_than_all_are_wanted(opened: Index) -> None:
    vectors, everything = clustered(NUM), set(named(np.arange(NUM)))
    assert set(opened.search(vectors[:1], 10**12)[0][0]) == everything
    assert set(opened.search(["item-5"], NUM)[0][0]) == everything - {"item-5"}
    assert set(opened.search(["item-5"], NUM, deny=["item-5", "item-9"])[0][0]) == everything - {"item-5", "item-9"}
    assert set(opened.search(["item-5"], NUM, exclude_self=False)[0][0]) == everything


def test_an_item_is_its_own_neighbour_only_where_it_may_be(opened: Index) -> None:
    few = ["item-5", "item-11000", "item-19999"]
    assert sorted(opened.search(["item-5"], 10, allow=few)[0][0]) == few[1:]
    assert sorted(opened.search(["item-5"], 2, allow=few)[0][0]) == few[1:]
    assert opened.search(["item-5"], 10, allow=few, exclude_self=False)[0][0][0] == "item-5"
    assert opened.search(["item-5"], 10, allow=few[:1]) == ([[]], [[]])
    assert opened.search(["item-5"], 10, allow=few[:1], exclude_self=False)[0] == [few[:1]]
    assert opened.search(["item-5", "item-6"], 1, allow=few[:1])[0] == [[], few[:1]]
    assert opened.search(["item-5"], 10, allow=few, deny=few) == ([[]], [[]])


def test_blocks_and_calls_of_any_size_give_the_same(opened: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, keys = clustered(NUM)[QUERIES], named(QUERIES)
    allowed, near = named(np.arange(0, NUM, 3)), opened.search(keys[:1], 300)[0][0]

    def results() -> list[object]:
        return [
            opened.search(keys, 40), opened.search(keys, allow=allowed), opened.search(keys, deny=near),
            opened.search(keys, deny=near[:20]), opened.search(vectors.astype(np.float16), 40),
        ]  # fmt: skip

    whole = results()
    monkeypatch.setattr("pipeline.ann.reader.BATCH", 7)
    monkeypatch.setattr(asking, "CANDIDATES", 300)
    assert results() == whole
    assert opened.search(vectors.astype(np.float16).astype(np.float32), 40) == whole[-1]


def test_few_that_are_denied_are_dropped_with_the_result_of_telling_faiss(
    opened: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, denied = named(QUERIES), named(np.arange(0, NUM, 100))
    dropped = opened.search(keys, 10, deny=[*denied, *denied])[0]
    monkeypatch.setattr(asking, "FEW_DENIED", 0)
    told = opened.search(keys, 10, deny=denied)[0]
    assert not {key for line in dropped for key in line} & set(denied)
    assert np.mean([len(set(one) & set(other)) for one, other in zip(dropped, told, strict=True)]) > 9


@pytest.mark.parametrize("factory", ["PQ8x4", "PQ8x4fs", "PQ8x4fs,RFlat", "SQ8"])
def test_kinds_that_faiss_cannot_filter_are_filtered_too(tmp_path: Path, factory: str) -> None:
    vectors = clustered(2000)
    opened = built(tmp_path, vectors, factory)
    order = [int(key[5:]) for key in opened.search(vectors[:1], 2000)[0][0]]
    allowed = np.arange(0, 2000, 5)
    best = [row for row in order if row % 5 == 0]
    assert opened.search(vectors[:1], 400, allow=named(allowed))[0][0] == named(np.array(best))
    assert set(opened.search(vectors[:1], 500, allow=named(allowed))[0][0]) == set(named(allowed))
    near = named(np.array(order[:1000]))
    assert set(opened.search(vectors[:1], 1000, deny=near)[0][0]) == set(named(np.array(order[1000:])))
    assert opened.search(vectors[:1], 10, allow=near, deny=near[1:])[0] == [near[:1]]
