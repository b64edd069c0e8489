"""Raw events to embeddings and index through the real command; again, killed at random moments; and on bad storage."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from infra.bench.faults import ENVIRONMENT, FaultyProxy, moto_server
from pipeline.contracts import schemas
from pipeline.contracts.datasets import arrow_to_lists, arrow_to_vectors, open_manifest, read_table
from pipeline.contracts.storage import Storage
from tests.runs import command, differences, environment, make_shop, pinsage

KILLS = 5
KEY, SECRET = ENVIRONMENT["AWS_ACCESS_KEY_ID"], ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shop, its settings and a finished run."""
    folder = tmp_path_factory.mktemp("shop")
    settings = make_shop(folder, training={"epochs": 30, "batch_size": 64, "loss": "softmax", "learning_rate": 0.003})
    started = time.monotonic()
    pinsage("run", "--settings", str(settings))
    (folder / "seconds").write_text(str(time.monotonic() - started))
    return folder


def test_the_planted_groups_are_found_and_cold_items_too(shop: Path) -> None:
    metrics = json.loads((shop / "run" / "evaluation" / "metrics.json").read_text())
    slices = metrics["tasks"]["item_to_item"]["slices"]
    everything, cold = slices["all"]["methods"], slices["cold"]["methods"]
    assert everything["PinSage"]["mrr"]["mean"] > 2 * everything["popularity"]["mrr"]["mean"]
    chance = 10 / 73
    others = [cold[name]["hit_rate@10"]["mean"] for name in ("popularity", "item-kNN")]
    assert cold["PinSage"]["hit_rate@10"]["mean"] > max(1.5 * chance, *others)


def test_every_item_of_the_catalogue_has_an_embedding_and_an_index_entry(shop: Path) -> None:
    storage = Storage(str(shop / "run"))
    embeddings = read_table(storage, open_manifest(storage, schemas.EMBEDDINGS))
    keys = pq.read_table(shop / "data" / "items.parquet").column("product").to_pylist()
    assert sorted(embeddings.column("key").to_pylist()) == sorted(keys)
    vectors = arrow_to_vectors(embeddings.column("embedding"))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    shown = pinsage("query", "g3-02", "-k", "5", "--settings", str(shop / "shop.yaml")).stdout
    assert shown.count("g3-") >= 4


def test_nothing_dated_after_the_split_reaches_graph_features_or_pairs(shop: Path) -> None:
    storage = Storage(str(shop / "run"))
    manifest = open_manifest(storage, schemas.INTERACTIONS)
    first_held_out = min(manifest.metadata["validation_from"], manifest.metadata["test_from"])
    events = read_table(storage, manifest)
    users, items, times = (events.column(name).to_numpy() for name in ("user_id", "item_id", "timestamp"))
    known = set(zip(users[times < first_held_out].tolist(), items[times < first_held_out].tolist(), strict=True))
    graph = read_table(storage, open_manifest(storage, schemas.USER_ITEMS))
    indptr, neighbours = arrow_to_lists(graph.column("neighbours"))
    edges = set(zip(np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)).tolist(), neighbours.tolist(), strict=True))
    assert edges == known
    pairs = read_table(storage, open_manifest(storage, schemas.PAIRS))
    assert pairs.column("timestamp").to_numpy().max() < first_held_out
    degrees = read_table(storage, open_manifest(storage, schemas.ITEMS)).column("degree").to_numpy()
    np.testing.assert_array_equal(degrees, np.bincount([item for _, item in known], minlength=len(degrees)))
    stored = open_manifest(storage, schemas.FEATURES)
    column = next(c for c in stored.metadata["columns"] if c["kind"] == "degree")
    features = arrow_to_vectors(read_table(storage, stored).column("features"))
    np.testing.assert_allclose(features[:, column["start"]], np.log1p(degrees), rtol=1e-5)


def test_the_second_run_does_nothing_and_a_changed_setting_rebuilds_what_depends_on_it(shop: Path) -> None:
    settings = str(shop / "shop.yaml")
    again = pinsage("run", "--settings", settings).stderr
    assert again.count("up to date") == len(schemas.STAGES)
    changed = pinsage("status", "--settings", settings, "--set", "task.index.k=5").stdout
    states = {name: line for line in changed.splitlines() for name in ("embeddings", "index") if f" {name} " in line}
    assert "ready" in states["embeddings"]
    assert "changed" in states["index"]


def test_killed_at_random_moments_a_run_ends_with_the_same_bytes(shop: Path, tmp_path: Path) -> None:
    """SIGKILL to the driver or to a trainer, five times, then run to the end."""
    settings, run = str(shop / "shop.yaml"), tmp_path / "run"
    seconds = float((shop / "seconds").read_text())
    chooser = random.Random(20261121)
    changes = (f"resources.run={run}", "resources.training.max_restarts=0")
    arguments = ("run", "--settings", settings, *(word for change in changes for word in ("--set", change)))
    kills = 0
    while kills < KILLS:
        process = subprocess.Popen(
            command(*arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=chooser.uniform(0.1, 0.6) * seconds)
            shutil.rmtree(run)  # it ended before its moment came: begin again
        except subprocess.TimeoutExpired:
            trainers = _descendants(process.pid, "jobs.train")
            os.kill(chooser.choice(trainers) if trainers and chooser.random() < 0.7 else process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    pinsage(*arguments)
    assert differences(shop / "run", run) == []
    shutil.rmtree(run)


@pytest.mark.slow
def test_on_object_storage_that_fails_a_run_ends_with_the_same_bytes(shop: Path, tmp_path: Path) -> None:
    """Data, settings and run at s3://; of some 1 400 requests one in twenty meets a fault, of listings one in five."""
    rates = {"500": 0.01, "503": 0.01, "reset": 0.01, "truncated": 0.01, "cut": 0.015, "slow": 0.01, "hang": 0.002}
    with moto_server() as upstream, FaultyProxy(upstream, seed=20261127, rates={**rates, "stale": 0.15}) as proxy:
        store = fsspec.filesystem(
            "s3", endpoint_url=upstream, key=KEY, secret=SECRET, use_listings_cache=False, skip_instance_cache=True
        )
        store.mkdir("bucket")
        for name in ("interactions.parquet", "items.parquet"):
            store.put_file(str(shop / "data" / name), f"bucket/data/{name}")
        tree = (shop / "shop.yaml").read_text().replace(f"{shop}/data", "s3://bucket/data")
        tree = tree.replace(f"{shop}/run", "s3://bucket/run").replace(f"{shop}/cache", f"{tmp_path}/cache")
        store.pipe_file("bucket/shop.yaml", tree.encode())
        settings = ("--settings", "s3://bucket/shop.yaml")
        surroundings = {**ENVIRONMENT, "AWS_ENDPOINT_URL": proxy.url}
        told = pinsage("run", *settings, surroundings=surroundings)
        shown = pinsage("query", "g3-02", "-k", "5", *settings, surroundings=surroundings)
        store.get("bucket/run/", f"{tmp_path}/run/", recursive=True)
    assert {*rates, "stale"} - set(proxy.caused) <= {"hang"}, "every fault happened; of those that wait, perhaps none"
    assert differences(shop / "run", tmp_path / "run") == []
    assert shown.stdout == pinsage("query", "g3-02", "-k", "5", "--settings", str(shop / "shop.yaml")).stdout
    for text in (told.stdout, told.stderr, *(file.read_bytes().decode("latin1") for file in tmp_path.rglob("*.*"))):
        assert SECRET not in text
        assert KEY not in text


def _descendants(pid: int, named: str) -> list[int]:
    """Process ids below pid whose command line has the name."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status, line = (entry / "status").read_text(), (entry / "cmdline").read_bytes().decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parent = next(int(row.split()[1]) for row in status.splitlines() if row.startswith("PPid:"))
            parents[int(entry.name)] = (parent, line)
    found, frontier = [], {pid}
    while frontier:
        frontier = {child for child, (parent, _) in parents.items() if parent in frontier}
        found += [child for child in frontier if named in parents[child][1] and "jobs.launch" not in parents[child][1]]
    return found
