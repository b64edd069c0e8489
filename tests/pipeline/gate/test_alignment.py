"""The rotation between two spaces: found where it was planted, measured on items that it was not fitted to."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.contracts import datasets
from pipeline.contracts.datasets import Lineage
from pipeline.contracts.schemas import GATE
from pipeline.contracts.storage import Storage
from pipeline.gate import alignment

LINEAGE = Lineage("test", {}, {})


def vectors(num: int = 400, width: int = 8, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, width)).astype(np.float32)


def rotation(width: int = 8) -> np.ndarray:
    return np.asarray(np.linalg.qr(np.random.default_rng(2).normal(size=(width, width)))[0])


def test_a_planted_rotation_is_found() -> None:
    then = vectors()
    now = (then @ rotation().T).astype(np.float32)
    found = alignment.fit(now, then)
    np.testing.assert_allclose(found.matrix, rotation(), atol=1e-5)
    assert found.cosine == pytest.approx(1, abs=1e-6)


def test_the_fit_is_not_measured_on_what_was_fitted() -> None:
    found = alignment.fit(vectors(40, 32, 3), vectors(40, 32, 4))
    fitted = alignment.mean_cosine(vectors(40, 32, 3)[::2] @ found.matrix, vectors(40, 32, 4)[::2])
    assert fitted > 0.5
    assert abs(found.cosine) < 0.15


def test_inner_products_of_one_night_do_not_change() -> None:
    now = vectors()
    turned = now @ alignment.fit(now, vectors(seed=5)).matrix
    np.testing.assert_allclose(turned @ turned.T, now @ now.T, atol=1e-4)


def test_zeros_are_like_nothing() -> None:
    assert alignment.mean_cosine(np.array([[1.0, 0], [0, 0]]), np.array([[2.0, 0], [1, 1]])) == 0.5


def test_a_run_gives_back_its_matrix_or_says_that_it_has_none(storage: Storage) -> None:
    assert alignment.read_alignment(storage) is None
    datasets.commit(storage, GATE, [datasets.write_file(storage, "gate", "verdict.json", b"{}", LINEAGE)], LINEAGE)
    assert alignment.read_alignment(storage) is None
    shard = datasets.write_file(storage, "gate", alignment.ALIGNMENT, alignment.dump_alignment(rotation()), LINEAGE)
    datasets.commit(storage, GATE, [shard], LINEAGE)
    np.testing.assert_array_equal(alignment.read_alignment(storage.url), rotation())
