"""Rows of earlier nights under those of tonight: what lies where, and sums that are renewed against sums made anew."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.contracts.datasets import Lineage, commit
from pipeline.contracts.rows import Table, describe_rows, write_rows
from pipeline.contracts.storage import Storage
from pipeline.inference.earlier import Overlay, Patch
from pipeline.inference.members import Members

LINEAGE = Lineage("inference", {}, {})
WIDTH, KNOWN, ITEMS, LISTED, UNIT = 19, 300, 340, 8, 2.0**-18


def table_of(random: np.random.Generator, size: int) -> Table:
    """Rows of two shards with a gap between them."""
    first = size // 3
    rows = random.random((size + 7, WIDTH)).astype(np.float16)
    return Table(rows, np.array([0, first]), np.array([0, first + 7]))


def patch_of(random: np.random.Generator, ids: NDArray[np.integer]) -> Patch:
    own = np.unique(ids).astype(np.uint32)
    return Patch(own, Members.of(own, ITEMS), table_of(random, len(own)))


def overlays(random: np.random.Generator, with_older: bool) -> tuple[Overlay, Overlay]:
    """As it was before tonight, and as it is: with new items, which the older patch has if there is one."""
    old, new = table_of(random, KNOWN), np.arange(KNOWN, ITEMS)
    chosen = random.choice(KNOWN, 60, replace=False)
    older = (patch_of(random, np.concatenate([random.choice(KNOWN, 80), new])),) if with_older else ()
    tonight = patch_of(random, chosen if with_older else np.concatenate([chosen, new]))
    return Overlay(old, older), Overlay(old, (tonight, *older))


@pytest.mark.parametrize("with_older", [False, True])
def test_a_row_is_the_newest_of_its_item(with_older: bool) -> None:
    _, now = overlays(np.random.default_rng(1), with_older)
    ids = np.random.default_rng(2).permutation(ITEMS)
    for item, row in zip(ids, now.rows(ids), strict=True):
        own = next((patch for patch in now.patches if item in patch.ids), None)
        table, place = (now.old, item) if own is None else (own.table, np.searchsorted(own.ids, item))
        np.testing.assert_array_equal(row, table.rows[table.places(np.array([place]))[0]])


@pytest.mark.parametrize("with_older", [False, True])
def test_sums_are_those_of_rows_and_renewed_ones_are_the_same(with_older: bool) -> None:
    random = np.random.default_rng(3)
    before, now = overlays(random, with_older)
    index = random.integers(0, KNOWN, (200, LISTED))
    weights = (random.dirichlet(np.ones(LISTED), 200) * (random.random((200, LISTED)) < 0.8)).astype(np.float32)
    index[0] = now.patches[0].ids[:LISTED]  # all made again
    stays = random.random(200) < 0.9
    then = index.copy()
    then[~stays] = random.integers(0, KNOWN, (int((~stays).sum()), LISTED))
    asked: list[int] = []

    def former(lists: NDArray[np.integer]) -> NDArray[np.int32]:
        asked.extend(lists.tolist())
        return before.sums(then[lists], weights[lists], UNIT, "sum")

    found = now.renewed(former, stays, index, weights, UNIT)
    np.testing.assert_array_equal(found, now.sums(index, weights, UNIT, "sum"))
    terms = (weights[:, :, None] * np.float32(1 / UNIT)) * now.rows(index.reshape(-1)).reshape(*index.shape, WIDTH)
    np.testing.assert_array_equal(found, (terms + np.float32(0.5)).astype(np.int32).sum(axis=1))
    assert set(asked) <= set(np.flatnonzero(stays).tolist())
    assert 0 not in asked
    assert len(asked) > 100
    assert (found != before.sums(then, weights, UNIT, "sum")).any(axis=1)[asked].sum() > 50


@pytest.mark.parametrize("with_older", [False, True])
@pytest.mark.parametrize("is_in_memory", [False, True])
def test_rows_that_are_taken_off_the_disk_are_those_that_are_mapped(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, with_older: bool, is_in_memory: bool
) -> None:
    random = np.random.default_rng(4)
    _, now = overlays(random, with_older)
    parts = [now.old.rows[now.old.places(np.arange(first, first + 100))] for first in range(0, KNOWN, 100)]
    shards = [write_rows(storage, "layer", number, part, LINEAGE) for number, part in enumerate(parts)]
    manifest = commit(storage, "layer", shards, LINEAGE, describe_rows("float16", WIDTH))
    stored = Overlay(now.old, now.patches, (storage, manifest))
    monkeypatch.setattr(Storage, "is_in_memory", lambda self, path: is_in_memory)
    load, loaded = Storage.load, list[str]()

    def noting(self: Storage, path: str, look: Callable[[memoryview], object]) -> memoryview:
        loaded.append(path)
        return load(self, path, look)

    monkeypatch.setattr(Storage, "load", noting)
    chosen = np.flatnonzero(random.random(ITEMS) < 0.5)
    for ids in (chosen, chosen[chosen > 120], np.arange(KNOWN, ITEMS), chosen[:0]):
        rows = stored.rows_of(ids)
        for part in (slice(None), slice(0, 7), slice(7, 1000)):
            np.testing.assert_array_equal(rows(part), now.rows(ids[part]))
    assert len(loaded) == (0 if is_in_memory else 3 + 2)
