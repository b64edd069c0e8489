"""Sets as bits, and the largest of a layer, against the slow and obvious way."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.contracts.rows import Table
from pipeline.inference.members import Members, places_of
from pipeline.inference.sums import largest_of, top_of


def test_rows_with_any_of_a_set_are_found() -> None:
    random = np.random.default_rng(1)
    chosen = np.unique(random.integers(0, 1000, 40)).astype(np.uint32)
    lists = random.integers(0, 1000, (300, 9)).astype(np.uint32)
    expected = np.array([bool(set(row) & set(chosen.tolist())) for row in lists.tolist()])
    members, places = Members.of(chosen, 1000), random.permutation(300)
    assert members.rows_with(lists, places).tolist() == expected[places].tolist()
    assert 0 < expected.sum() < 300
    assert members.rows_with(lists, places[:0]).shape == (0,)


def test_the_places_of_members_are_found_and_of_no_others() -> None:
    random = np.random.default_rng(3)
    chosen = np.unique(random.integers(0, 1000, 400)).astype(np.uint32)
    ids, weights = random.integers(0, 1000, 280), random.integers(0, 2, 280).astype(np.float32)
    members, inside = Members.of(chosen, 1000), np.isin(ids, chosen)
    for given, expected in ((None, inside), (weights, inside & (weights > 0))):
        places, slots = members.find(ids, given)
        assert places.tolist() == np.flatnonzero(expected).tolist()
        np.testing.assert_array_equal(chosen[slots], ids[places])
        assert 0 < len(places) < len(ids)
    assert Members.of(chosen[:0], 1000).find(ids)[0].shape == (0,)
    everyone = np.arange(1000, dtype=np.uint32)
    assert Members.of(everyone, 1000).find(everyone)[1].tolist() == everyone.tolist()


@pytest.mark.parametrize("sizes", [[300], [7, 1, 92, 3000, 0, 40], [5] * 4000], ids=["one", "uneven", "many"])
def test_places_in_a_table_are_those_that_it_names_itself(sizes: list[int]) -> None:
    random = np.random.default_rng(5)
    firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    starts = np.concatenate([[0], np.cumsum(-(-np.array(sizes) // 64) * 64)[:-1]])
    table = Table(np.zeros((int(starts[-1]) + sizes[-1], 1), np.float16), firsts, starts)
    ids = random.integers(0, sum(sizes), (50, 9))
    assert places_of(table, ids, np.ones(ids.shape, np.float32)).tolist() == table.places(ids).tolist()
    beyond = np.array([sum(sizes) + 10_000, 3])
    assert places_of(table, beyond, np.array([0, 1], np.float32)).tolist() == [0, table.places(beyond[1:])[0]]


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
