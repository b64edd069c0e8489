"""What two nights differ in, against the slow and obvious way."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.contracts.datasets import lists_to_arrow
from pipeline.inference.comparing import as_bits, rows_with, same_lists, same_vectors
from pipeline.inference.sums import largest_of


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_are_the_same_if_all_their_bits_are(dtype: type) -> None:
    now: np.ndarray = np.random.default_rng(0).random((5, 7)).astype(dtype)
    then = now.copy()
    then[1, 6] += 1
    now[2], then[2] = 0.0, -0.0
    now[3], then[3] = np.nan, np.nan
    assert same_vectors(now, then).tolist() == [True, False, False, True, True]
    assert not same_vectors(now, then[:, :6]).any()
    assert same_vectors(now[:, :0], then[:, :0]).all()


def lists(rows: list[list[int]], weights: list[list[float]]) -> pa.Table:
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    flat = [np.array([value for row in values for value in row]) for values in (rows, weights)]
    return pa.table(
        {
            "neighbours": lists_to_arrow(indptr, flat[0].astype(np.uint32)),
            "weights": lists_to_arrow(indptr, flat[1].astype(np.float32)),
        }
    )


def test_lists_are_the_same_if_ids_and_weights_are() -> None:
    now = lists([[1, 2], [3], [], [4, 5], [6]], [[0.5, 0.5], [1], [], [0.9, 0.1], [1]])
    then = lists([[1, 2], [3, 4], [], [4, 6], [6]], [[0.5, 0.5], [0.5, 0.5], [], [0.9, 0.1], [0.5]])
    assert same_lists(now, then).tolist() == [True, False, True, False, False]


def test_rows_with_any_of_a_set_are_found() -> None:
    random = np.random.default_rng(1)
    chosen = np.unique(random.integers(0, 1000, 40)).astype(np.uint32)
    lengths = random.integers(0, 9, 300)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(0, 1000, indptr[-1]).astype(np.uint32)
    expected = [bool(np.isin(ids[indptr[row] : indptr[row + 1]], chosen).any()) for row in range(300)]
    assert rows_with(as_bits(chosen, 1000), indptr, ids).tolist() == expected
    assert 0 < sum(expected) < 300


def test_the_largest_half_is_found_by_its_bits() -> None:
    rows = np.random.default_rng(2).normal(size=(50, 9)).astype(np.float16)
    assert largest_of(rows) == float(rows.astype(np.float32).max())
    assert largest_of(-np.abs(rows)) == 0
    assert largest_of(rows[:0]) == 0
    assert largest_of(rows.astype(np.float32)) == float(rows.astype(np.float32).max())
