"""Where the arithmetic of training and adding is done: FAISS on the CPU, or on the GPUs that faiss-gpu sees.

A GPU trains the centroids and finds every vector's list among all of them; codes are made and kept by the CPU, so any
IVF factory profits. Unproved where no GPU was at hand: the tests of this file's GPU lines are skipped there.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.contracts.errors import ResourceError

Floats = NDArray[np.float32]


def uses_gpu(device: str) -> bool:
    """Whether resources.index.device means a GPU here. Raises ResourceError if it must and there is none."""
    found = int(getattr(faiss, "get_num_gpus", lambda: 0)())
    if device == "cuda" and not found:
        raise ResourceError(
            "resources.index.device is cuda, and faiss sees no GPU here; install faiss-gpu (see README) or set cpu"
        )
    return device != "cpu" and found > 0


def kmeans(points: Floats, number: int, seed: int, gpu: bool = False, iterations: int = 10) -> Floats:
    """Centroids [number, d], of length 1, of points [n, d] by inner products; the same for the same threads."""
    trained: Any = faiss.Kmeans(
        points.shape[1], number, niter=iterations, seed=seed, spherical=True, gpu=gpu,
        min_points_per_centroid=1, max_points_per_centroid=10**9,
    )  # fmt: skip
    trained.train(points)
    centroids: Floats = trained.centroids
    return centroids


class ListFinder:
    """The nearest list of every vector, by the index's own quantizer or, on GPUs, by comparing all centroids."""

    def __init__(self, lists: faiss.IndexIVF, gpu: bool) -> None:
        self.lists = lists
        self._on_gpu: Any = None
        if gpu:
            flat = faiss.IndexFlat(lists.d, lists.metric_type)
            flat.add(centroids_of(lists))
            self._on_gpu = faiss.index_cpu_to_all_gpus(flat)

    def find(self, vectors: Floats) -> NDArray[np.int64]:
        """List of each of the vectors [n, d]."""
        searched = self.lists.quantizer if self._on_gpu is None else self._on_gpu
        found: NDArray[np.int64] = searched.search(vectors, 1)[1][:, 0]
        return found


def centroids_of(lists: faiss.IndexIVF) -> Floats:
    """All centroids [nlist, d]."""
    found: Floats = lists.quantizer.reconstruct_n(0, lists.nlist)
    return found
