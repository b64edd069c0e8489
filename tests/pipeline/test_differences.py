"""What features and walks note of their rows, against both nights' rows compared one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.contracts import schemas
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    arrow_to_vectors,
    commit,
    find_manifest,
    lists_to_arrow,
    open_manifest,
    vectors_to_arrow,
    write_shard,
)
from pipeline.contracts.schemas import Dataset
from pipeline.contracts.sharding import shard_bounds
from pipeline.contracts.storage import Storage
from pipeline.differences import Noting, digests_of, find_changed

LINEAGE = Lineage("test", {}, {})
NOTED = f"{schemas.DIFFERENCES}/{schemas.FEATURES.name}"


def features(vectors: np.ndarray, start: int = 0) -> pa.Table:
    ids = pa.array(np.arange(start, start + len(vectors)), pa.uint32())
    return pa.table({"id": ids, "features": vectors_to_arrow(vectors)})


def lists(rows: list[list[int]], weights: list[list[float]]) -> pa.Table:
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    flat = [np.array([value for row in values for value in row]) for values in (rows, weights)]
    return pa.table(
        {
            "id": pa.array(np.arange(len(rows)), pa.uint32()),
            "neighbours": lists_to_arrow(indptr, flat[0].astype(np.uint32)),
            "weights": lists_to_arrow(indptr, flat[1].astype(np.float32)),
        }
    )


@pytest.mark.parametrize(("dtype", "width"), [(np.float16, 384), (np.float16, 7), (np.float32, 5), (np.float16, 2)])
def test_a_digest_is_of_every_bit_of_a_vector(dtype: type, width: int) -> None:
    vectors: np.ndarray = np.random.default_rng(0).random((3, width)).astype(dtype)
    own = digests_of(features(vectors))
    assert len(set(own.tolist())) == 3
    bits = vectors.view(f"u{vectors.itemsize}")
    for column in range(width):
        for bit in (0, 3, 8 * vectors.itemsize - 1):
            changed = vectors.copy()
            changed.view(bits.dtype)[1, column] ^= bits.dtype.type(1 << bit)
            other = digests_of(features(changed))
            assert (other == own).tolist() == [True, False, True]
    assert digests_of(features(vectors[:0])).shape == (0,)


def test_a_digest_is_of_the_ids_their_order_and_the_weights_of_a_list() -> None:
    now = digests_of(lists([[1, 2], [3], [], [4, 5], [6], [7, 8]], [[0.5, 0.5], [1], [], [0.9, 0.1], [1], [0.5, 0.5]]))
    then = digests_of(
        lists([[1, 2], [3, 4], [], [4, 6], [6], [8, 7]], [[0.5, 0.5], [0.5, 0.5], [], [0.9, 0.1], [0.5], [0.5, 0.5]])
    )
    assert (now == then).tolist() == [True, False, True, False, False, False]
    assert len(set(now.tolist())) == 6


class Night:
    """A run's vectors, cut into shards, with what their stage notes of them."""

    def __init__(self, folder: Path, vectors: np.ndarray, num_shards: int, previous: str | None = None) -> None:
        self.storage, self.vectors = Storage(str(folder)), vectors
        noting = Noting(self.storage, schemas.FEATURES, LINEAGE, previous)
        noting.begin()
        shards, noted = [], []
        for shard in range(num_shards):
            start, stop = shard_bounds(len(vectors), num_shards, shard)
            table = features(vectors[start:stop], start)
            shards.append(write_shard(self.storage, schemas.FEATURES, shard, table, LINEAGE))
            noted.append(noting.note(shard, table))
        self.manifest: Manifest = commit(self.storage, schemas.FEATURES, shards, LINEAGE)
        noting.commit(self.manifest, noted)

    def changed_since(self, other: Night, dataset: Dataset = schemas.FEATURES) -> Any:
        return find_changed(self.storage, self.manifest, other.storage, other.manifest, dataset)


@pytest.mark.parametrize("noted", [True, False])
def test_what_changed_is_found_whatever_the_cut(tmp_path: Path, noted: bool) -> None:
    random = np.random.default_rng(1)
    vectors = random.random((1000, 6)).astype(np.float16)
    first = Night(tmp_path / "first", vectors, 3)
    changed = np.sort(random.choice(1000, 40, replace=False))
    later = np.concatenate([vectors, random.random((30, 6)).astype(np.float16)])
    later[changed, 2] += np.float16(1)
    second = Night(tmp_path / "second", later, 4, first.storage.url if noted else None)
    assert (find_manifest(second.storage, NOTED) is not None) == noted
    expected = np.concatenate([changed, np.arange(1000, 1030)])
    find = second.changed_since(first)
    for start, stop in [(0, 1030), (0, 100), (90, 700), (995, 1001), (1000, 1030), (1029, 1030), (700, 700)]:
        rows = find(start, stop)
        own = expected[(expected >= start) & (expected < stop)]
        assert rows.column("id").to_pylist() == own.tolist()
        np.testing.assert_array_equal(arrow_to_vectors(rows.column("features")), later[own])


def test_what_is_noted_of_another_earlier_run_or_of_former_rows_does_not_count(tmp_path: Path) -> None:
    vectors = np.random.default_rng(2).random((100, 3)).astype(np.float32)
    first, other = Night(tmp_path / "first", vectors, 2), Night(tmp_path / "other", vectors + 1, 2)
    later = vectors.copy()
    later[7] = 0
    second = Night(tmp_path / "second", later, 2, other.storage.url)
    assert second.changed_since(first)(0, 100).column("id").to_pylist() == [7]
    first.manifest = commit(first.storage, schemas.FEATURES, first.manifest.shards, LINEAGE, {"made": "anew"})
    assert second.changed_since(first) is None


def test_an_earlier_run_whose_digests_are_damaged_is_not_compared_with(tmp_path: Path) -> None:
    vectors = np.random.default_rng(2).random((100, 3)).astype(np.float32)
    first = Night(tmp_path / "first", vectors, 2)
    damaged = Path(first.storage.locate(f"{NOTED}-digests/part-00001.rows"))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    second = Night(tmp_path / "second", vectors, 2, first.storage.url)
    assert find_manifest(second.storage, NOTED) is None
    assert find_manifest(second.storage, f"{NOTED}-digests") is not None


def test_rows_of_a_night_that_changed_all_are_not_kept_twice(tmp_path: Path) -> None:
    vectors = np.random.default_rng(3).random((100, 3)).astype(np.float32)
    first = Night(tmp_path / "first", vectors, 2)
    later = vectors.copy()
    later[50:76] += 1  # just more than half of one shard
    second = Night(tmp_path / "second", later, 2, first.storage.url)
    assert find_manifest(second.storage, NOTED) is None
    assert second.storage.names(NOTED) == []
    assert second.changed_since(first)(0, 100).column("id").to_pylist() == list(range(50, 76))
    open_manifest(second.storage, f"{NOTED}-digests")
