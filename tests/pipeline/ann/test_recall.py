"""Exact neighbours equal a full sort in any parts; recall counts what is missing; the narrowest enough is chosen."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from pipeline.ann import recall, training
from pipeline.ann.recall import Exact, exact_neighbours, hits, merge_exact, tune
from pipeline.ann.searching import MORE_K_FACTORS
from tests.embeddings import clustered, duplicates, uniform


def exact_of(vectors: np.ndarray, queries: np.ndarray, k: int = 10) -> Exact:
    return exact_neighbours(vectors[queries], queries, vectors, 0, recall.depth(k))


def test_exact_neighbours_equal_a_full_sort_in_any_parts() -> None:
    vectors = uniform(90, 5)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    queries = np.array([0, 13, 89])
    for bounds in ([(0, 90)], [(0, 3), (3, 3), (3, 50), (50, 90)]):
        found = merge_exact(exact_neighbours(vectors[queries], queries, vectors[a:b], a, 20) for a, b in bounds)
        np.testing.assert_array_equal(found.ids, np.argsort(-scores[queries], axis=1)[:, :20])
        np.testing.assert_allclose(found.scores, -np.sort(-scores[queries], axis=1)[:, :20], rtol=1e-5)


def test_queries_without_a_copy_come_first_and_only_they_tell() -> None:
    vectors = np.array([[1, 0], [0, 1], [1, 0], [2, 1]], np.float32)
    assert recall.singles_first(vectors).tolist() == [1, 3, 0, 2]
    many = np.vstack([uniform(40, 5), np.repeat(uniform(1, 5, seed=9), 20, axis=0)])
    queries = np.arange(60)
    tells = recall.telling(many, exact_of(many, queries), 10)
    assert tells[:40].all()
    assert tells[40:].sum() == 0 or np.abs(many[:40] @ many[40]).max() > many[40] @ many[40]


def test_fewer_than_wanted_are_padded() -> None:
    vectors = uniform(4, 5)
    found = exact_of(vectors, np.array([2]))
    assert sorted(found.ids[0, :3].tolist()) == [0, 1, 3]
    assert (found.ids[0, 3:] == -1).all()


def test_recall_counts_what_a_hidden_part_of_the_index_cannot_find() -> None:
    vectors = clustered(400)
    half = faiss.IndexIDMap(faiss.IndexFlatIP(16))
    half.add_with_ids(vectors[::2], np.arange(0, 400, 2))
    queries = np.arange(0, 400, 2)
    share = hits(half, vectors[queries], queries, exact_of(vectors, queries), 10, {}).mean()
    nearest = np.argsort(-(vectors @ vectors.T - 9 * np.eye(400)), axis=1)[:, :10]
    assert share == pytest.approx((nearest[queries] % 2 == 0).mean())


def test_copies_stand_for_each_other_however_many_there_are() -> None:
    vectors = duplicates(3000)
    index = training.train(vectors, "IVF16,SQ8", seed=1)
    index.add(vectors)
    queries = np.arange(0, 3000, 10)
    assert hits(index, vectors[queries], queries, exact_of(vectors, queries), 10, {"nprobe": 16}).mean() > 0.95


@pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF64,PQ8x4fs,Refine(SQfp16)"])
def test_the_cheapest_search_that_is_enough_is_taken(factory: str) -> None:
    vectors = clustered(6000)
    index = training.train(vectors, factory, seed=1)
    index.add(vectors)
    queries = np.arange(0, 6000, 10)
    search, tried = tune(index, vectors[queries], queries, exact_of(vectors, queries), 10, 0.97)
    chosen = next(point for point in tried if point["search"] == search)
    assert chosen["low"] >= 0.97
    assert all(point["work"] >= chosen["work"] for point in tried if point["enough"])
    narrower = [
        p for p in tried if p["width"] < chosen["width"] and p["search"].get("k_factor") == search.get("k_factor")
    ]
    assert all(not point["enough"] for point in narrower)
    assert tune(index, vectors[queries], queries, exact_of(vectors, queries), 10, 0.97)[0] == search


def test_where_there_are_no_lists_no_more_is_re_ranked_than_is_enough() -> None:
    vectors = clustered(3000)
    index = training.train(vectors, "SQ4,RFlat", seed=1)
    index.add(vectors)
    queries = np.arange(0, 3000, 5)
    search, tried = tune(index, vectors[queries], queries, exact_of(vectors, queries), 10, 0.97)
    enough = {point["search"]["k_factor"]: point["enough"] for point in tried}
    assert 1 < search["k_factor"] < 64
    assert enough == {factor: factor >= search["k_factor"] for factor in enough}
    assert search["k_factor"] // 2 in enough


def test_a_target_out_of_reach_gives_the_best_there_is() -> None:
    vectors = uniform(2000)
    index = training.train(vectors, "IVF8,PQ4x4", seed=1)
    index.add(vectors)
    queries = np.arange(200)
    search, tried = tune(index, vectors[queries], queries, exact_of(vectors, queries), 10, 0.99)
    assert not any(point["enough"] for point in tried)
    best = max(point["recall"] for point in tried)
    assert next(point for point in tried if point["search"] == search)["recall"] == best


def test_where_codes_tell_little_more_is_re_ranked_until_it_is_enough() -> None:
    """Vectors in all directions, 16 bits for each: of all lists 64 times k are too few."""
    vectors = uniform(8000, 32)
    index = training.train(vectors, "IVF8,PQ4x4fs,Refine(SQfp16)", seed=1)
    index.add(vectors)
    queries = np.arange(0, 8000, 40)
    exact = exact_of(vectors, queries)
    search, tried = tune(index, vectors[queries], queries, exact, 10, 0.9)
    assert not any(point["enough"] for point in tried if point["search"]["k_factor"] <= 64)
    assert search["k_factor"] in MORE_K_FACTORS
    assert next(point for point in tried if point["search"] == search)["enough"]
    assert hits(index, vectors[queries], queries, exact, 10, search).mean() >= 0.9
