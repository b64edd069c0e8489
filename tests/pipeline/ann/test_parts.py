"""Parts make the whole that one process makes, byte for byte, however they were cut."""

from __future__ import annotations

import itertools

import faiss
import numpy as np
import pytest

from pipeline.ann import parts, training
from tests.embeddings import clustered, duplicates

FACTORIES = (
    "Flat", "SQ8", "IVF16,Flat", "IVF16_HNSW32,SQ8", "IVF16,PQ8x4fs", "IVF16,PQ8x4fs,Refine(SQfp16)",
    "IVF16,PQ4x4,RFlat", "IVF16(PQ8x4fs,RFlat),PQ8x4fsr,Refine(SQfp16)", "IVF16(PQ8x4fs,RFlat),SQ8",
)  # fmt: skip


def part(trained: np.ndarray, vectors: np.ndarray, low: int, high: int) -> faiss.Index:
    index = parts.loosen(faiss.deserialize_index(trained))
    parts.fill(index, vectors[low:high], low, None)
    return faiss.deserialize_index(faiss.serialize_index(index))


@pytest.mark.parametrize("cuts", [[0, 3000], [0, 1, 32, 64, 96, 3000], list(range(0, 3001, 50))])
@pytest.mark.parametrize("factory", FACTORIES)
def test_parts_make_the_whole_byte_for_byte(factory: str, cuts: list[int]) -> None:
    vectors = duplicates(3000)
    trained = training.train(vectors, factory, seed=1)
    stored = faiss.serialize_index(trained)
    assert parts.can_be_merged(trained)
    pieces = (part(stored, vectors, low, high) for low, high in itertools.pairwise(cuts))
    merged = parts.merge(pieces, faiss.deserialize_index(stored))
    trained.add(vectors)
    assert merged.ntotal == 3000
    np.testing.assert_array_equal(faiss.serialize_index(merged), faiss.serialize_index(trained))


@pytest.mark.parametrize("factory", ["HNSW16", "IVF16,RaBitQfs", "PQ8x4fs"])
def test_what_cannot_be_merged_is_known(factory: str) -> None:
    assert not parts.can_be_merged(faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT))


def test_lists_on_disk_are_those_in_memory(tmp_path: object) -> None:
    vectors = clustered(2000)
    stored = faiss.serialize_index(training.train(vectors, "IVF16,SQ8", seed=1))
    assert parts.can_lie_on_disk(faiss.deserialize_index(stored))
    files = []
    for number in range(4):
        files.append(f"{tmp_path}/{number}")
        faiss.write_index(part(stored, vectors, 500 * number, 500 * number + 500), files[-1])
    memory = parts.merge((faiss.read_index(file) for file in files), faiss.deserialize_index(stored))
    disk = parts.merge_on_disk(faiss.deserialize_index(stored), files, f"{tmp_path}/lists.ivfdata")
    np.testing.assert_array_equal(parts.list_sizes(memory), parts.list_sizes(disk))
    for one, other in zip(memory.search(vectors[:50], 5), disk.search(vectors[:50], 5), strict=True):
        np.testing.assert_array_equal(one, other)
    for factory in ("IVF16,PQ8x4fs", "IVF16,SQ8,RFlat", "Flat"):
        assert not parts.can_lie_on_disk(faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT))
