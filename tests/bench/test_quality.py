"""The study of neighbourhoods: its graphs, its figures and its pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.bench import quality
from infra.bench.quality import build_graph, main, read_graphs


def test_weights_become_running_shares_in_both_directions() -> None:
    users, items = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 0, 1, 2])
    weights = np.array([1.0, 3.0, 2.0, 1.0, 1.0])
    graph = build_graph(users, items, weights)
    assert graph.item_users.tolist() == [0, 1, 0, 1, 1]
    assert np.round((graph.item_shares + 1.0) / 2**32, 6).tolist() == [0.333333, 1, 0.75, 1, 1]
    for user, expected in enumerate([{0: 0.25, 1: 0.75}, {0: 0.5, 1: 0.25, 2: 0.25}]):
        row = slice(graph.user_indptr[user], graph.user_indptr[user + 1])
        parts = np.diff(graph.user_shares[row] + 1.0, prepend=0.0) / 2**32
        assert dict(zip(graph.user_items[row].tolist(), parts.tolist(), strict=True)) == pytest.approx(expected)


def test_repeats_add_up_and_quantities_make_a_second_graph(tmp_path: Path) -> None:
    keys = {"user_key": ["u", "u", "v", "u"], "item_key": ["a", "b", "a", "a"], "quantity": [1, 4, 1, 3]}
    pq.write_table(pa.table(keys), tmp_path / "interactions.parquet")
    (name, plain), (other, weighted) = read_graphs(tmp_path)
    assert (name, other) == (tmp_path.name, tmp_path.name + ", weighted")
    assert len(plain.item_users) == 3
    assert len(plain.item_shares) == 0
    assert (weighted.item_shares[0] + 1.0) / 2**32 == pytest.approx(3 / 4), "1 + log2(4) against 1"


def test_a_study_prints_writes_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the pictures are unproved: pip install -e '.[bench]'")
    monkeypatch.setattr(quality, "NUM_TIMED", 20)
    monkeypatch.setattr(quality, "ROUNDS", 1)
    random = np.random.default_rng(0)
    keys = {"user_key": random.integers(0, 200, 4000), "item_key": random.integers(0, 500, 4000)}
    (tmp_path / "random").mkdir()
    pq.write_table(pa.table(keys), tmp_path / "random" / "interactions.parquet")
    main(["--out", str(tmp_path / "out"), "--data", str(tmp_path), "--queries", "20", "--items", "1000"])
    graphs = json.loads((tmp_path / "out" / "quality.json").read_text())["graphs"]
    assert list(graphs) == ["generator", "random"]
    point = graphs["random"]["methods"]["exact 8192"]
    assert 0.8 < point["overlap"] <= 1
    assert len(point["by_degree"]["mass"]) == 10
    assert len(list((tmp_path / "out").glob("*.png"))) == 6
