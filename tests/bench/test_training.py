"""The training benchmark, at a size that only proves that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.bench import training
from infra.bench.training import KEYS, World, draw_pairs

ROOT = Path(__file__).resolve().parents[2]


def test_the_last_line_has_every_key() -> None:
    sizes = "--items 600 --large 1200 --batch 64 --rounds 1 --steps 1 --pairs 2000"
    command = [sys.executable, "-m", "infra.bench.training", *sizes.split()]
    printed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    last = json.loads(printed.splitlines()[-1])
    assert last["allocator"]
    missing = [key for key in KEYS if last[key] is None]
    assert 0 <= last["data_wait_share"] < 1
    assert all(last[key] > 0 for key in KEYS if key not in (*missing, "data_wait_share"))
    for name, found in (last["speed"] | last["growth"]).items():
        assert found["pairs_per_s"] > 0, name
        assert all(spent > 0 for spent in found["ms"].values()), name
        assert found["nodes"] == sorted(found["nodes"], reverse=True), "layers shrink towards the seeds"
    if "DGL left out" in printed:
        assert missing == [key for key in KEYS if "dgl" in key]
        pytest.skip("DGL does not load, so the comparison with it is unproved")
    assert missing == []


def test_both_members_of_a_pair_are_of_one_user() -> None:
    graph = World(items=300, neighbours=5, width=4, pairs=0, seed=1).graph()
    owners: dict[int, set[int]] = {}
    for user, (start, stop) in enumerate(zip(graph.user_indptr[:-1], graph.user_indptr[1:], strict=True)):
        for item in graph.user_items[start:stop].tolist():
            owners.setdefault(item, set()).add(user)
    query, positive = draw_pairs(graph, 500, np.random.default_rng(0))
    assert (query != positive).all()
    assert all(owners[a] & owners[b] for a, b in zip(query.tolist(), positive.tolist(), strict=True))


def test_no_block_of_the_peer_shows_a_pair() -> None:
    world = World(items=300, neighbours=20, width=4, pairs=500, seed=1)
    try:
        peer = training.Peer(world.graph(), world, 32)
    except (ImportError, OSError) as error:
        pytest.skip(f"DGL does not load, so its blocks are unproved: {error}")
    query, positive = peer.pairs[:, :32]
    hidden = {pair for a, b in zip(query.tolist(), positive.tolist(), strict=True) for pair in ((a, b), (b, a))}
    seeds = torch.unique(torch.cat([query, positive]))
    shown, inner = set(), 0
    for block in peer.blocks(seeds, query, positive):
        source, destination = (ids.long() for ids in block.edges())
        names = block.srcdata[peer.dgl.NID]
        edges = zip(names[source].tolist(), names[destination].tolist(), strict=True)
        shown |= set(edges)
        inner += block.num_edges()
    assert inner > 0
    assert not shown & hidden


def test_a_device_is_measured_alone(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--large 800 --batch 64 --rounds 1 --steps 1 --pairs 2000 --device cpu"
    training.main(sizes.split())
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["pairs_per_s_device"] > 0
    assert 0 <= last["device_wait_share"] < 1
    assert list(last["device"]) == [name + kept for kept in ("", ", features kept") for name in ("float32", "bfloat16")]
