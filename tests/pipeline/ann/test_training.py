"""Samples are the same however the vectors are cut; centroids are as many as asked; a former quantizer is judged."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from pipeline.ann import training
from pipeline.ann.devices import kmeans
from pipeline.contracts.errors import SettingsError
from tests.embeddings import clustered, duplicates


def all_rows(shard_rows: list[int], size: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = training.draw(shard_rows, size, queries, seed=5)
    firsts = np.concatenate([[0], np.cumsum(shard_rows)])
    parts = [
        np.concatenate([rows + firsts[shard] for shard, rows in zip(drawn.shards, lists, strict=True)])
        for lists in (drawn.train, drawn.queries)
    ]
    return parts[0], parts[1]


@pytest.mark.parametrize("shard_rows", [[400, 0, 600], [1] * 200 + [800], [333, 334, 333]])
def test_the_sample_does_not_depend_on_the_cuts(shard_rows: list[int]) -> None:
    one, other = all_rows([1000], 100, 60), all_rows(shard_rows, 100, 60)
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first, second)
    assert len(np.unique(one[1])) == 60
    assert np.diff(one[0]).max() <= 11


def test_of_many_shards_only_some_are_read() -> None:
    drawn = training.draw([10] * 5000, 1000, 50, seed=1)
    assert len(drawn.shards) <= training.SAMPLE_SHARDS
    assert sum(map(len, drawn.train)) == 1000
    assert drawn.shards[-1] > 4900


def test_more_is_not_drawn_than_there_is() -> None:
    train, queries = all_rows([3, 2], 100, 60)
    assert train.tolist() == [0, 1, 2, 3, 4]
    assert sorted(queries.tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("IVF400,Flat", "has 400 lists, and there are 300 vectors"),
        ("PQ4x10", "cannot train it on 300 vectors"),
        ("IVF8,PQ4x10", "cannot train it on 300 vectors"),
    ],
)
def test_a_factory_that_cannot_be_trained_is_refused(factory: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        training.train(clustered(300), factory, seed=1)


def test_training_twice_gives_the_same_bytes() -> None:
    made = [faiss.serialize_index(training.train(clustered(3000), "IVF32_HNSW32,SQ8", seed=1)) for _ in range(2)]
    np.testing.assert_array_equal(made[0], made[1])
    other = faiss.serialize_index(training.train(clustered(3000), "IVF32_HNSW32,SQ8", seed=2))
    assert len(other) != len(made[0]) or (other != made[0]).any()


@pytest.mark.parametrize("vectors", [clustered(4000), duplicates(4000)], ids=["clustered", "duplicates"])
def test_two_levels_give_as_many_centroids_and_nearly_as_near(vectors: np.ndarray) -> None:
    two = training.two_levels(vectors, 200, seed=1)
    one = kmeans(vectors, 200, 1)
    assert two.shape == one.shape
    near = [float((vectors @ centroids.T).max(axis=1).mean()) for centroids in (one, two)]
    assert near[1] >= near[0] - 0.02


def test_polishing_moves_centroids_to_the_mean_of_what_is_nearest() -> None:
    vectors = clustered(4000)
    far = -vectors.mean(axis=0, keepdims=True)  # nearest to nobody
    far /= np.linalg.norm(far)
    centroids = np.concatenate([training.two_levels(vectors, 100, seed=1), far])
    found = training.polished(centroids, vectors)
    owner = (vectors @ centroids.T).argmax(axis=1)
    expected = np.stack(
        [vectors[owner == k].mean(axis=0) if (owner == k).any() else c for k, c in enumerate(centroids)]
    )
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert (np.abs(found - expected).max(axis=1) < 1e-5).mean() > 0.97  # codes miss few
    np.testing.assert_allclose(found[-1], far[0], atol=1e-6)
    np.testing.assert_array_equal(found, training.polished(centroids, vectors))


def test_shares_sum_up_and_exceed_no_size() -> None:
    for sizes in ([5, 0, 1, 300], [1, 1, 1], [0, 0, 9]):
        for number in (1, 3, 5):
            counts = np.array(sizes)
            if number > counts.sum() or number < (counts > 0).sum():
                continue
            shares = training._shares(counts, number)
            assert shares.sum() == number
            assert (shares <= counts).all()


def test_a_quantizer_is_given_up_for_other_vectors_and_kept_for_more_of_the_same() -> None:
    index = training.train(clustered(3000), "IVF32,Flat", seed=1)
    then = training.condition(index, clustered(3000))
    assert training.still_holds(training.condition(index, clustered(5000)), then) is None
    assert training.still_holds(training.condition(index, clustered(3000, seed=8)), then) is not None
    assert training.still_holds(then, {}) is not None


def test_spread_is_one_for_equal_lists_and_their_number_for_one_full_list() -> None:
    assert training.spread(np.array([7, 7, 7, 7])) == 1.0
    assert training.spread(np.array([28, 0, 0, 0])) == 4.0
