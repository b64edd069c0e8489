"""Weighted sums of rows against one number after the other, and their packing."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.inference.sums import add_rows, packed, scaled, unpacked


@pytest.mark.parametrize("width", [1, 7, 16, 33, 128])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_sums_are_those_of_products_rounded_one_by_one(dtype: str, width: int) -> None:
    random, unit = np.random.default_rng(1), 2.0**-18
    rows = (3 * random.random((300, width))).astype(dtype)
    indptr = np.concatenate([[0], np.cumsum(random.integers(0, 9, 40))])
    places = random.integers(0, 300, indptr[-1])
    weights = (random.random(len(places)) / 9).astype(np.float32)
    weights[random.random(len(places)) < 0.3] = 0
    expected = np.full((40, width), 5, np.int32)
    for row in range(40):
        for at in range(indptr[row], indptr[row + 1]):
            products = weights[at] * np.float32(1 / unit) * rows[places[at]].astype(np.float32)
            expected[row] += (products + np.float32(0.5)).astype(np.int32)
    found = np.full((40, width), 5, np.int32)
    add_rows(rows, indptr, places, weights, unit, found)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("dtype", "width"), [("float16", 3), ("float32", 4)])
def test_packed_sums_take_the_bytes_that_they_have(dtype: str, width: int) -> None:
    largest = (1 << 23 if dtype == "float16" else 1 << 31) - 1
    sums = np.random.default_rng(2).integers(0, largest, (50, 9), dtype=np.int64).astype(np.int32)
    sums[0, 0] = largest
    data = packed(sums, dtype)
    assert data.shape == (50, 9 * width)
    assert data.dtype == np.dtype(np.uint8)
    np.testing.assert_array_equal(unpacked(data, dtype), sums)


def test_scaled_sums_are_rounded_once() -> None:
    sums = np.array([[0, 1, (1 << 24) + 1, (1 << 30) - 1]], np.int32)
    assert scaled(sums, 2.0**-20).tolist() == (sums * 2.0**-20).astype(np.float32).tolist()
