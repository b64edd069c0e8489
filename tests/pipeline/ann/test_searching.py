"""What a search is told, by what it finds."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from pipeline.ann.choice import coarse
from pipeline.ann.searching import compared, list_parameters, parameters

NLIST, WIDTH = 2048, 16


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    random = np.random.default_rng(0)
    centres = random.standard_normal((400, WIDTH))
    made = centres[random.integers(400, size=20_000)] + 0.1 * random.standard_normal((20_000, WIDTH))
    unit: np.ndarray = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    return unit


def inverted(vectors: np.ndarray, quantizer: faiss.Index) -> faiss.IndexIVFFlat:
    """Lists around every so manyth vector."""
    with_lists = faiss.IndexIVFFlat(quantizer, WIDTH, NLIST, faiss.METRIC_INNER_PRODUCT)
    quantizer.add(vectors[:: len(vectors) // NLIST][:NLIST])
    with_lists.is_trained = True
    with_lists.add(vectors)
    return with_lists


@pytest.mark.parametrize("found_by", ["HNSW32", coarse(WIDTH)])
@pytest.mark.parametrize("nprobe", [16, 64, 512, NLIST])
def test_nearly_all_of_the_nearest_lists_are_found(vectors: np.ndarray, nprobe: int, found_by: str) -> None:
    graph = faiss.index_factory(WIDTH, found_by, faiss.METRIC_INNER_PRODUCT)
    graph.train(vectors)
    flat = faiss.IndexFlatIP(WIDTH)
    by_graph, by_all = inverted(vectors, graph), inverted(vectors, flat)
    queries = vectors[::100]
    found = graph.search(queries, nprobe, params=list_parameters(by_graph, nprobe))[1]
    nearest = flat.search(queries, nprobe)[1]
    hits = [len(set(one) & set(other)) for one, other in zip(found.tolist(), nearest.tolist(), strict=True)]
    assert np.mean(hits) > 0.97 * nprobe
    assert list_parameters(by_all, nprobe) is None
    sizes = np.array([by_graph.invlists.list_size(number) for number in range(NLIST)])
    search = {"nprobe": nprobe}
    assert compared(by_graph, queries, search, sizes) > 0.95 * compared(by_all, queries, search, sizes)
    results = [index.search(queries, 10, params=parameters(index, search))[1] for index in (by_graph, by_all)]
    same = [len(set(one) & set(other)) for one, other in zip(*(r.tolist() for r in results), strict=True)]
    assert np.mean(same) > 9.5
