"""Sets as bits, and the largest of a layer, against the slow and obvious way."""

from __future__ import annotations

import numpy as np

from pipeline.inference.members import as_bits, rows_with, slots_of
from pipeline.inference.sums import largest_of, top_of


def test_rows_with_any_of_a_set_are_found() -> None:
    random = np.random.default_rng(1)
    chosen = np.unique(random.integers(0, 1000, 40)).astype(np.uint32)
    lists = random.integers(0, 1000, (300, 9)).astype(np.uint32)
    expected = np.array([bool(set(row) & set(chosen.tolist())) for row in lists.tolist()])
    bits, places = as_bits(chosen, 1000), random.permutation(300)
    assert rows_with(bits, lists, places).tolist() == expected[places].tolist()
    assert 0 < expected.sum() < 300
    assert rows_with(bits, lists, places[:0]).shape == (0,)


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


def test_the_item_with_the_largest_value_is_named() -> None:
    rows = np.random.default_rng(4).random((50, 9)).astype(np.float16)
    rows[31, 4] = 2
    for single in (rows, rows.astype(np.float32)):
        assert top_of(np.arange(100, 150), single) == {"largest": 2.0, "largest_id": 131}
    assert top_of(np.arange(0), rows[:0]) == {"largest": 0.0, "largest_id": -1}
