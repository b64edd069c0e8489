"""The benchmark against DGL, at a size that only proves that it runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from infra.bench import walks
from infra.bench.generate import graph
from infra.bench.walks import DGL_WALKS, KEYS, at_equal_overlap
from pipeline.walk_kernel import visit_counts, walks_per_hop


def test_the_last_line_has_every_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walks, "DGL_WALKS", DGL_WALKS[:2])
    arguments = "--quick --items 2000 --users 600 --edges 30000 --queries 8 --rounds 1 --batch 64"
    walks.main(arguments.split())
    printed = capsys.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    missing = [key for key in KEYS if last[key] is None]
    assert missing == ([] if "DGL left out" not in printed else [key for key in KEYS if "dgl" in key])
    assert 0 < last["overlap_walks"] < last["overlap_exact"] <= 1
    assert last["step_ns_vs_gather_ns"] == pytest.approx(last["step_ns"] / (2 * last["gather_ns"]), rel=1e-6)


def test_dgl_finds_what_our_walks_find() -> None:
    found = graph(300, 60, 2000, seed=2)
    try:
        dgl = walks.Dgl(found)
    except (ImportError, OSError) as error:
        pytest.skip(f"DGL does not load, so the comparison is unproved: {error}")
    dgl.dgl.seed(0)
    items = np.arange(20)
    ids, counts, lengths = dgl.found(items, 20_000)
    ours, visits, sizes = visit_counts(found, items, walks_per_hop(20_000, 3, 0.5), 299, 1)
    assert (lengths == 50).all()
    for row in range(len(items)):
        assert items[row] not in ids[row]
        expected = dict(zip(ours[row, : sizes[row]].tolist(), visits[row].tolist(), strict=False))
        for other, count in zip(ids[row].tolist(), counts[row].tolist(), strict=True):
            assert abs(count - expected[other]) < 5 * (count + expected[other]) ** 0.5, (
                "more than 5 standard deviations"
            )


def test_equal_overlap_is_read_off_the_curve() -> None:
    curve = [(0.2, 1.0), (0.4, 4.0), (0.8, 16.0)]
    for overlap, seconds, reached in [(0.1, 1.0, True), (0.3, 2.0, True), (0.8, 16.0, True), (0.9, 16.0, False)]:
        found, there = at_equal_overlap(curve, overlap)
        assert found == pytest.approx(seconds)
        assert there is reached
