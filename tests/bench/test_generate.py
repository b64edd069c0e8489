"""The scale generator: its bytes, its keys and the shape of its graphs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from infra.bench.generate import ITEM, USER, Catalogue, degrees, graph, keys, topics, write

SMALL = Catalogue(items=3000, users=400, edges=20_000, seed=5, shard_edges=4000)


def _digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    write(SMALL, tmp_path / "one", workers=1, weights=True, features=4)
    write(SMALL, tmp_path / "three", workers=3, weights=True, features=4)
    assert len(_digests(tmp_path / "one")) == 5 + 1 + 1
    assert _digests(tmp_path / "one") == _digests(tmp_path / "three")


def test_interactions_are_the_edges_asked_for_without_repeats(tmp_path: Path) -> None:
    report = write(SMALL, tmp_path, workers=1, string_keys=True, weights=True)
    table = pq.read_table(tmp_path / "interactions")
    assert report["rows"] == table.num_rows == SMALL.edges
    frame = table.to_pandas()
    assert not frame.duplicated(["user", "item"]).any()
    assert frame["user"].nunique() == SMALL.users
    assert frame["user"].str.fullmatch("u[0-9a-f]{10}").all()
    assert frame["item"].str.fullmatch("i[0-9a-f]{10}").all()
    assert frame["timestamp"].between(1_672_531_200, 1_735_689_600).all()
    assert set(frame["event"]) == {"view", "save", "buy"}


def test_string_keys_spell_the_integer_keys(tmp_path: Path) -> None:
    write(SMALL, tmp_path / "numbers", workers=1)
    write(SMALL, tmp_path / "strings", workers=1, string_keys=True)
    numbers, strings = (pq.read_table(tmp_path / name / "interactions").to_pandas() for name in ("numbers", "strings"))
    assert (numbers["item"].map("i{:010x}".format) == strings["item"]).all()
    assert (numbers["timestamp"] == strings["timestamp"]).all()


def test_an_output_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "interactions").mkdir()
    (tmp_path / "interactions" / "part-00000.parquet").touch()
    with pytest.raises(ValueError, match="is not empty"):
        write(SMALL, tmp_path)


def test_more_edges_than_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="a quarter at most"):
        Catalogue(items=10, users=10, edges=26)


def test_keys_are_40_bit_numbers_that_never_meet() -> None:
    numbers = np.concatenate([np.arange(200_000), np.arange(2**32 - 1000, 2**32)])
    found = keys(numbers, ITEM, seed=1)
    assert len(np.unique(found)) == len(numbers)
    assert found.min() >= 0
    assert 2**39 < found.max() < 2**40
    assert abs(np.corrcoef(numbers[:200_000], found[:200_000])[0, 1]) < 0.02
    assert not np.array_equal(found, keys(numbers, USER, seed=1))
    assert not np.array_equal(found, keys(numbers, ITEM, seed=2))


def test_degrees_sum_to_the_edges_however_they_are_cut() -> None:
    for shard_edges in (700, 4000, 10**9):
        lengths = np.concatenate(list(degrees(Catalogue(3000, 400, 20_000, 5, shard_edges))))
        assert lengths.sum() == 20_000
        assert lengths.min() >= 1
    assert np.concatenate(list(degrees(Catalogue(100, 50, 20)))).sum() == 20, "fewer edges than users"


def test_degrees_are_skewed_as_the_model_says() -> None:
    found = graph(60_000, 18_000, 1_026_000, seed=3)
    items, users = np.diff(found.item_indptr), np.diff(found.user_indptr)
    assert np.median(users) == pytest.approx(37, abs=2)
    assert np.percentile(users, 99) == pytest.approx(317, rel=0.1)
    assert np.median(items) == pytest.approx(11, abs=2)
    assert np.percentile(items, 99) == pytest.approx(100, rel=0.2)
    assert items.max() > 20 * np.percentile(items, 99), "no hubs"


def test_a_graph_in_memory_has_every_edge_in_both_directions_and_none_twice() -> None:
    found = graph(2000, 300, 15_000, seed=4)
    of_items = np.repeat(np.arange(2000), np.diff(found.item_indptr)) << 32 | found.item_users
    of_users = np.repeat(np.arange(300), np.diff(found.user_indptr)) | found.user_items.astype(np.int64) << 32
    assert len(np.unique(of_items)) == 15_000
    assert np.array_equal(np.sort(of_users), of_items), "and items' users ascend"


def test_communities_are_in_interactions_and_in_content(tmp_path: Path) -> None:
    catalogue = Catalogue(items=20_000, users=300, edges=12_000, seed=6)
    write(catalogue, tmp_path, workers=1, features=32)
    items = pq.read_table(tmp_path / "items")
    topic_of = dict(zip(items["item"].to_pylist(), items["topic"].to_pylist(), strict=True))
    content = np.stack(items["content"].to_numpy()).astype(np.float32)
    of = items["topic"].to_numpy()
    near = (content[:-1] * content[1:]).sum(axis=1)[of[:-1] == of[1:]].mean()
    assert near == pytest.approx(0.36, abs=0.05), "two vectors at a cosine of 0.6 to one centre"
    assert abs((content[:10_000] * content[10_000:]).sum(axis=1).mean()) < 0.1
    frame = pq.read_table(tmp_path / "interactions").to_pandas()
    commonest = frame["item"].map(topic_of).groupby(frame["user"]).agg(lambda found: found.value_counts().iloc[0])
    assert commonest.sum() / len(frame) > 0.6


def test_cells_are_planted_within_topics(tmp_path: Path) -> None:
    catalogue = Catalogue(items=8192, users=400, edges=8000, seed=7, cell_items=64)
    assert (catalogue.num_topics, catalogue.num_cells) == (16, 8)
    write(catalogue, tmp_path / "cells", workers=1)
    write(replace(catalogue, cell_items=0), tmp_path / "none", workers=1)
    place_of = dict(zip(keys(np.arange(8192), ITEM, 7).tolist(), range(8192), strict=True))
    shares = {}
    for name in ("cells", "none"):
        frame = pq.read_table(tmp_path / name / "interactions").to_pandas()
        places = frame["item"].map(place_of)
        own = places // 512 == (places // 512).groupby(frame["user"]).transform(lambda found: found.mode()[0])
        cells = (places % 512 % 8)[own]
        shares[name] = (cells == cells.groupby(frame["user"][own]).transform(lambda found: found.mode()[0])).mean()
    assert shares["cells"] > 0.65, "three quarters, less what would have been repeats of a cell's popular items"
    assert shares["none"] < 0.4


def test_topics_cut_the_places_evenly() -> None:
    found = np.bincount(topics(np.arange(1003), 1003, 10))
    assert found.tolist() == [100, 100, 100, 101, 100, 100, 101, 100, 100, 101]
