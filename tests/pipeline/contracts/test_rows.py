"""Raw rows: every way of reading gives what was written."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.contracts import replica, rows
from pipeline.contracts.datasets import Lineage, Manifest, commit
from pipeline.contracts.errors import DataError, StorageError
from pipeline.contracts.replica import map_rows
from pipeline.contracts.rows import describe_rows, is_streamed, read_own_rows, rows_name, take_rows, write_rows
from pipeline.contracts.storage import Storage

LINEAGE = Lineage("test", {}, {})


def store(storage: Storage, cuts: list[int], width: int, dtype: str) -> tuple[Manifest, NDArray[Any]]:
    matrix = (np.arange(cuts[-1] * width) % 2039).reshape(-1, width).astype(dtype)
    parts = np.split(matrix, cuts[:-1])
    shards = [write_rows(storage, "layer", number, part, LINEAGE) for number, part in enumerate(parts)]
    return commit(storage, "layer", shards, LINEAGE, describe_rows(dtype, width)), matrix


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("cuts", "width", "dtype"),
    [
        ([1, 1, 7, 12], 3, "float32"),
        ([3000, 9000, 9001], 33, "float16"),
        ([4096, 8192], 64, "float16"),
        ([5], 1, "float32"),
    ],
)
def test_rows_are_where_the_table_says(
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_place: bool,
    cuts: list[int],
    width: int,
    dtype: str,
) -> None:
    manifest, matrix = store(storage, cuts, width, dtype)
    if not in_place:
        monkeypatch.setattr(replica, "map_in_place", lambda *_: None)
    table = map_rows(storage, manifest, str(tmp_path / "cache"))
    ids = np.random.default_rng(0).integers(0, len(matrix), (50, 4))
    np.testing.assert_array_equal(table.rows[table.places(ids)], matrix[ids])
    np.testing.assert_array_equal(table.rows[table.places(np.arange(len(matrix)))], matrix)
    starts = [0, *cuts]
    for number in range(len(cuts)):
        np.testing.assert_array_equal(
            read_own_rows(storage, manifest, number), matrix[starts[number] : starts[number + 1]]
        )
    assert (tmp_path / "cache").exists() != in_place, "no copy of what is here"


def test_the_mapping_outlives_the_table_and_goes_with_the_last_array(storage: Storage) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(f"{storage.root}/layer/part-")

    manifest, matrix = store(storage, [3000, 6000], 8, "float32")
    part = map_rows(storage, manifest, None).rows[10:20]
    gc.collect()
    np.testing.assert_array_equal(part, matrix[10:20])
    assert mapped() == 2
    del part
    gc.collect()
    assert mapped() == 0


def test_every_shard_begins_where_a_huge_page_may(storage: Storage) -> None:
    manifest, _ = store(storage, [100, 300_000, 300_001], 4, "float16")
    table = map_rows(storage, manifest, None)
    assert table.rows.ctypes.data % (1 << 21) == 0
    assert [place * 8 % (1 << 21) for place in table.first_places.tolist()] == [0, 0, 0]
    assert table.first_places[2] - table.first_places[1] < 300_000 + (1 << 18)


def test_what_would_not_fit_the_address_space_so_begins_at_small_pages(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_MOST_ADDRESSES", 1 << 22)
    manifest, matrix = store(storage, [100, 300, 301], 3, "float16")
    table = map_rows(storage, manifest, None)
    assert [place * 6 % 4096 for place in table.first_places.tolist()] == [0, 0, 0]
    assert table.first_places[-1] * 6 < 1 << 20
    np.testing.assert_array_equal(table.rows[table.places(np.arange(301))], matrix)


def test_a_changed_or_missing_shard_is_named(storage: Storage) -> None:
    manifest, _ = store(storage, [100, 200], 8, "float32")
    path = Path(storage.locate(f"layer/{rows_name(1)}"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StorageError, match=r"part-00001.rows has 3,196 bytes, expected 3,200.*inference --force"):
        map_rows(storage, manifest, None)
    with pytest.raises(DataError, match=r"part-00001.rows was changed"):
        read_own_rows(storage, manifest, 1)
    path.unlink()
    with pytest.raises(StorageError, match=r"part-00001.rows is in the manifest but not there"):
        map_rows(storage, manifest, None)


def test_some_rows_are_taken_off_the_disk_where_memory_has_them_not(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, matrix = store(storage, [100, 70_000, 140_000], 8, "float16")
    ids = np.flatnonzero(np.random.default_rng(3).random(len(matrix)) < 0.3)
    ids = ids[(ids > 120) & (ids < 139_000)]
    assert take_rows(storage, manifest, ids) is None, "what was just written is in memory"
    monkeypatch.setattr(Storage, "is_in_memory", lambda self, path: False)
    np.testing.assert_array_equal(take_rows(storage, manifest, ids), matrix[ids])
    np.testing.assert_array_equal(take_rows(storage, manifest, ids[-1:]), matrix[ids[-1:]])
    assert take_rows(storage, manifest, ids[:0]) is None
    path = Path(storage.locate("layer/part-00002.rows"))
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(StorageError, match=r"part-00002.rows has 1,119,984 bytes, expected 1,120,000.*--force"):
        take_rows(storage, manifest, ids)
    path.unlink()
    with pytest.raises(StorageError, match=r"part-00002.rows is in the manifest but not there.*--force"):
        take_rows(storage, manifest, ids)


@pytest.mark.parametrize(("share", "expected"), [(0.01, False), (0.1, True), (1.0, True)])
def test_many_rows_are_read_together(storage: Storage, share: float, expected: bool) -> None:
    manifest, _ = store(storage, [100], 512, "float16")
    assert is_streamed(manifest, share) == expected
