"""Keys become hashes that keep them apart, and hashes become places, as a dictionary would have it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contracts.errors import DataError
from pipeline.keys import (
    Keys,
    KeyTable,
    commonest,
    concatenated,
    count_ranges,
    counted,
    distinct,
    from_table,
    hashed,
    keys_of,
    range_of,
    table_of,
    united,
)

WORDS = ["", "a", "a\0", "\0", "b", "ab", "ba", "abcdefgh", "abcdefgh\0", "é", "鍵", "🔑" * 3, "x" * 1000, "x" * 1001]


def texts(*values: str) -> Keys:
    return hashed(pa.array(values, pa.string()))


def crowded(values: list[str], bits: int) -> Keys:
    """Keys whose hashes have only so many bits."""
    keys = texts(*values)
    return Keys(keys.hashes >> np.uint64(64 - bits) << np.uint64(64 - bits), keys.checks, keys.texts)


@settings(deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50))
def test_the_hash_of_an_integer_gives_it_back(values: list[int]) -> None:
    keys = hashed(pa.array(values, pa.int64()))
    assert keys.outside.to_pylist() == values
    assert keys.shown.to_pylist() == [str(value) for value in values]
    assert len(np.unique(keys.hashes)) == len(set(values))


def test_texts_of_any_length_and_script_have_hashes_and_checks_of_their_own() -> None:
    keys = texts(*WORDS)
    assert keys.checks is not None
    assert len(np.unique(keys.hashes)) == len(np.unique(keys.checks)) == len(WORDS)
    assert not set((keys.hashes >> np.uint64(32)).tolist()) & set(keys.checks.tolist())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=20), st.integers(0, 19))
def test_a_texts_hash_is_its_own_wherever_it_stands(words: list[str], start: int) -> None:
    whole, part = hashed(pa.chunked_array([words, words])), hashed(pa.array(words).slice(start))
    assert whole.checks is not None
    assert part.checks is not None
    assert whole.hashes[start : len(words)].tolist() == part.hashes.tolist()
    assert whole.checks[start : len(words)].tolist() == part.checks.tolist()
    assert [texts(word).hashes[0] for word in words] == whole.hashes[: len(words)].tolist()


@pytest.mark.parametrize("column", [pa.array(np.arange(1 << 16)), pa.array([f"item {n}" for n in range(1 << 16)])])
def test_hashes_of_counting_keys_are_even_and_apart(column: pa.Array) -> None:
    """Chi-square of the top byte: 255 degrees of freedom, so 400 is out of the question by chance."""
    keys = hashed(column)
    assert len(np.unique(keys.hashes)) == len(column)
    for shift in (56, 0):
        found = np.bincount(((keys.hashes >> np.uint64(shift)) & np.uint64(255)).astype(int), minlength=256)
        assert ((found - 256.0) ** 2 / 256).sum() < 400


def test_keys_survive_their_tables() -> None:
    for keys in (texts(*WORDS), hashed(pa.array([3, -1, 2**62]))):
        for back in (from_table(pa.table(keys.columns)), keys_of(table_of(keys))):
            assert back.hashes.tolist() == keys.hashes.tolist()
            assert back.outside.to_pylist() == keys.outside.to_pylist()


def test_different_keys_of_one_hash_are_refused_wherever_they_meet() -> None:
    words = [f"word {number}" for number in range(20)]
    few = crowded(words, 3)
    for meeting in (distinct, counted):
        with pytest.raises(DataError, match=r"'word \d+' and 'word \d+' are different and have the same 64-bit hash"):
            meeting(few)
    first = few.take(np.array([0]))
    same = np.flatnonzero(few.hashes == few.hashes[0])
    other = few.take(same[same > 0][:1])
    with pytest.raises(DataError, match="same 64-bit hash"):
        united(first, np.zeros(1, np.int64), other)
    with pytest.raises(DataError, match="has the same 64-bit hash as another"):
        KeyTable(first.hashes, first.checks, None).find(other)


def test_the_same_key_twice_is_no_collision() -> None:
    found, counts = counted(texts("b", "a", "b"))
    assert dict(zip(found.outside.to_pylist(), counts.tolist(), strict=True)) == {"a": 1, "b": 2}
    assert found.hashes.tolist() == sorted(found.hashes.tolist())
    found, counts = counted(texts("b", "a", "b"), np.array([5, 1, 6]))
    assert dict(zip(found.outside.to_pylist(), counts.tolist(), strict=True)) == {"a": 1, "b": 11}
    assert sorted(distinct(texts("b", "a", "b")).outside.to_pylist()) == ["a", "b"]
    assert distinct(hashed(pa.array([7, 7, 5]))).shown.to_pylist().__len__() == 2
    assert len(counted(texts())[0]) == 0


def test_united_keys_keep_their_ids_and_say_who_is_there_tonight() -> None:
    both, known, present = united(texts("gone", "stays"), np.array([4, 9]), distinct(texts("stays", "new")))
    found = dict(zip(both.outside.to_pylist(), zip(known.tolist(), present.tolist(), strict=True), strict=True))
    assert found == {"gone": (4, False), "stays": (9, True), "new": (-1, True)}
    assert both.hashes.tolist() == sorted(both.hashes.tolist())


@pytest.mark.parametrize("count", [0, 1, 3, 100, 5000])
@pytest.mark.parametrize("bits", [64, 9])
def test_look_ups_find_what_a_dictionary_finds(count: int, bits: int) -> None:
    """Also where hashes crowd: 5000 of them in 512 values are far from even."""
    generator = np.random.default_rng(count)
    hashes = np.unique(generator.integers(0, 2**64, count, dtype=np.uint64) >> np.uint64(64 - bits))
    hashes <<= np.uint64(64 - bits)
    wanted = np.concatenate([generator.permutation(hashes), generator.integers(0, 2**64, 700, dtype=np.uint64)])
    oracle = {int(value): place for place, value in enumerate(hashes)}
    expected = [oracle.get(int(value), -1) for value in wanted]
    assert KeyTable(hashes, None, None).find(Keys(wanted)).tolist() == expected
    ids = generator.permutation(len(hashes)).astype(np.uint32)
    found = KeyTable(hashes, None, ids).find(Keys(wanted))
    assert found.tolist() == [-1 if place < 0 else int(ids[place]) for place in expected]


def test_the_extreme_hashes_are_found() -> None:
    hashes = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert KeyTable(hashes, None, None).find(Keys(hashes)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("num_ranges", [1, 2, 8])
def test_ranges_in_a_row_are_the_order_of_all(num_ranges: int) -> None:
    keys = hashed(pa.array([f"key {number}" for number in range(500)]))
    places = range_of(keys.hashes, num_ranges)
    assert places.max() == num_ranges - 1
    parts = [distinct(keys.take(np.flatnonzero(places == number))) for number in range(num_ranges)]
    assert concatenated(parts).outside.to_pylist() == distinct(keys).outside.to_pylist()


def test_the_number_of_ranges_is_the_power_of_two_that_holds_them() -> None:
    assert [count_ranges(millions * 1_000_000) for millions in (0, 1, 4, 5, 8, 9, 1000)] == [1, 1, 1, 2, 2, 4, 256]


def test_the_commonest_are_ranked_by_count_then_key() -> None:
    keys, counts = texts("d", "b", "c", "a", "e"), np.array([2, 1, 3, 2, 1])
    assert commonest(keys, counts, 4) == [(3, "c"), (2, "a"), (2, "d"), (1, "b")]
    assert commonest(hashed(pa.array([10, 9])), np.array([1, 1]), 5) == [(1, "10"), (1, "9")]
    assert commonest(texts(), np.zeros(0, np.int64), 5) == []
