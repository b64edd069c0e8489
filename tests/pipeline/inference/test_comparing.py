"""What two nights differ in, against the slow and obvious way."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.inference.comparing import as_bits, rows_with, same_vectors, slots_of
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


def test_rows_with_any_of_a_set_are_found() -> None:
    random = np.random.default_rng(1)
    chosen = np.unique(random.integers(0, 1000, 40)).astype(np.uint32)
    lists = random.integers(0, 1000, (300, 9)).astype(np.uint32)
    expected = np.isin(lists, chosen).any(axis=1)
    assert rows_with(as_bits(chosen, 1000), lists).tolist() == expected.tolist()
    assert 0 < expected.sum() < 300
    assert rows_with(as_bits(chosen, 1000), lists[:0]).shape == (0,)


def test_the_places_of_members_are_found_and_of_no_others() -> None:
    random = np.random.default_rng(3)
    members = np.unique(random.integers(0, 1000, 60)).astype(np.uint32)
    ids = random.integers(0, 1000, (40, 7))
    slots = slots_of(as_bits(members, 1000), members, ids)
    assert ((slots >= 0) == np.isin(ids, members)).all()
    np.testing.assert_array_equal(members[slots[slots >= 0]], ids[slots >= 0])
    assert 0 < (slots >= 0).sum() < ids.size
    assert (slots_of(as_bits(members[:0], 1000), members[:0], ids) == -1).all()


def test_the_largest_half_is_found_by_its_bits() -> None:
    rows = np.random.default_rng(2).normal(size=(50, 9)).astype(np.float16)
    assert largest_of(rows) == float(rows.astype(np.float32).max())
    assert largest_of(-np.abs(rows)) == 0
    assert largest_of(rows[:0]) == 0
    assert largest_of(rows.astype(np.float32)) == float(rows.astype(np.float32).max())
