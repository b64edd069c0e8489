"""Rows to keys and back, from however many parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.ann import keys
from pipeline.contracts.errors import DataError


def make_table(folder: Path, sizes: list[int]) -> keys.KeyTable:
    first, parts = 0, []
    for number, size in enumerate(sizes):
        column = pa.chunked_array([pa.array([f"é{row}" for row in range(first, first + size)], pa.string())])
        part = folder / f"part-{number}"
        part.write_bytes(keys.encode_part(column, first))
        parts.append(part)
        first += size
    keys.write_tables(parts, folder / "keys.arrow", folder / "lookup.arrow")
    return keys.KeyTable(folder / "keys.arrow", folder / "lookup.arrow")


@pytest.mark.parametrize("sizes", [[1000], [1, 0, 998, 1], [300, 0, 0, 700]])
def test_every_key_leads_to_its_row_and_back(tmp_path: Path, sizes: list[int]) -> None:
    table = make_table(tmp_path, sizes)
    assert len(table) == 1000
    rows = np.random.default_rng(1).permutation(1000)
    named = table.keys(rows)
    assert named == [f"é{row}" for row in rows]
    np.testing.assert_array_equal(table.rows([*named, "nobody", ""]), [*rows, -1, -1])


def test_keys_that_share_a_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "hash_keys", lambda given: np.array([len(key) % 2 for key in given], np.uint64))
    table = make_table(tmp_path, [20, 30])
    np.testing.assert_array_equal(table.rows([f"é{row}" for row in range(50)]), np.arange(50))
    assert table.rows(["other"]).tolist() == [-1]


def test_an_unknown_key_names_near_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no item has the key 'é12x' among 50; did you mean é12"):
        make_table(tmp_path, [20, 30]).known_rows(["é3", "é12x"])
