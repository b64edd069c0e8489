"""Two nights' vectors in one space: the orthogonal matrix that turns one set of vectors closest to another.

Two trainings give spaces that differ at least by a rotation, so vectors of different nights are not comparable as they
are. A run that has `gate/alignment.npy` can be read in the space that its verdict names as `aligned_to`:

    matrix = read_alignment(run)                  # None: the vectors are in their own space
    comparable = vectors if matrix is None else vectors @ matrix

Inner products within a night stay as they are. Source: Schoenemann 1966, the orthogonal Procrustes problem.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts.datasets import find_manifest, read_file
from pipeline.contracts.schemas import GATE
from pipeline.contracts.storage import Storage

ALIGNMENT = "alignment.npy"
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Alignment:
    """matrix [d, d] turns tonight's vectors; cosine is what it reaches on items that it was not fitted to."""

    matrix: NDArray[np.float64]
    cosine: float


def fit(now: Floats, then: Floats) -> Alignment:
    """Vectors [n, d] of the same items: every second one is fitted, and the others measure the fit."""
    product = now[::2].astype(np.float64).T @ then[::2].astype(np.float64)
    left, _, right = np.linalg.svd(product)
    matrix = left @ right
    held = slice(1, None, 2) if len(now) > 1 else slice(None)
    return Alignment(matrix, mean_cosine(now[held] @ matrix, then[held]))


def mean_cosine(one: Floats, other: Floats) -> float:
    """Of vectors row by row; a vector of zeros is like nothing."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    products = np.einsum("nd,nd->n", one, other, dtype=np.float64)
    return float(np.mean(np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1), 0.0)))


def read_alignment(run: str | Storage) -> NDArray[np.float64] | None:
    """The matrix of a run that was judged with task.gate.align, None where there is none."""
    storage = Storage(run) if isinstance(run, str) else run
    manifest = find_manifest(storage, GATE)
    if manifest is None or all(shard.name != ALIGNMENT for shard in manifest.shards):
        return None
    matrix: NDArray[np.float64] = np.load(io.BytesIO(read_file(storage, manifest, ALIGNMENT)), allow_pickle=False)
    return matrix


def dump_alignment(matrix: NDArray[np.float64]) -> bytes:
    """As read_alignment reads it."""
    file = io.BytesIO()
    np.save(file, matrix, allow_pickle=False)
    return file.getvalue()
