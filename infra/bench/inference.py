"""Items a second of inference against k-hop mini-batches, against the machine's own limit, and at ten times the size.

    python -m infra.bench.inference              # 1 million items; --quick for a look
    python -m infra.bench.inference --large 10000000 --nights 5000000      # growth too, and nights of that many items

What runs is `pinsage inference` on a run folder, in processes of its own: T = 50 neighbours by the exact kernel on a
graph of the generator, 384 features, two layers of 512 and 256, float16 between them, random weights. Its cost is all
of the command's: Spark's start, reading, checking, writing, both cores. The naive way embeds batches of seeds by blocks
of their 2-hop neighbourhoods, T = 50 at both layers, in DGL's message passing (or, without DGL, this project's own
layers), and is timed on a few batches. The roofline is what the same machine needs for a block's matrix products by
torch and for its 2 x 50 random rows by torch's embedding_bag, both cores at work, and nothing else, at every size.
`shuffle` runs on the smallest catalogue: seconds, and bytes sent per item, beside what `pinsage plan` says. Last, on a
catalogue of planted communities, one item in a hundred changes, whole communities at a time, and a run goes on from the
kept layers of the one before: its core-seconds, and those of noting which of tonight's features and lists differ, by
those of a whole run; and the same bytes.

The last line is one JSON object. A peer that is not installed is left out, and its figures are null.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DGLBACKEND", "pytorch")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
import yaml
from numpy.typing import NDArray

from infra.bench import generate, measure
from infra.bench.scale import measured
from model.minibatch import NeighbourTable, build_blocks, hide
from model.pinsage import PinSage
from pipeline.contracts import schemas
from pipeline.contracts.config import Model
from pipeline.contracts.datasets import (
    Lineage,
    Shard,
    commit,
    lists_to_arrow,
    open_manifest,
    vectors_to_arrow,
    write_file,
    write_shard,
)
from pipeline.contracts.sharding import count_shards, shard_bounds
from pipeline.contracts.storage import Storage
from pipeline.differences import Noting
from pipeline.exact_kernel import exact_neighbours

NEIGHBOURS, WIDTH, HIDDEN, OUTPUTS, BUDGET = 50, 384, 512, 256, 1024
LINEAGE = Lineage("bench", {}, {})
ROWS_PER_SHARD = 50_000
COMMUNITY, OUTSIDE = 500, 200
"""Items of a planted community; of so many neighbours one is from anywhere."""
CHANGED = 0.01
KEYS = (
    "items_per_s_per_core", "items_per_s_vs_khop", "vs_roofline", "vs_roofline_large", "growth_1m_to_10m",
    "shuffle_vs_gather", "shuffled_bytes_per_item", "incremental_vs_full",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the run folder


def network_settings() -> Model:
    """Two layers of the sizes above."""
    return Model(num_layers=2, hidden_dimensions=HIDDEN, output_dimensions=OUTPUTS)


def write_run(
    folder: Path, items: int, seed: int, communities: bool = False, changed: NDArray[np.int64] | None = None,
    previous: Path | None = None,
) -> float:  # fmt: skip
    """Store what inference reads; features are random, ids in no order. Returns core-seconds of noting what differs.

    Neighbours are those of a generated graph or, with communities, mostly of an item's own community. Of the items in
    `changed` every first one gets other features, every second one another list.
    """
    storage, random = Storage(str(folder / "run")), np.random.default_rng(seed)
    url = None if previous is None else str(previous / "run")
    notings = {d: Noting(storage, d, LINEAGE, url) for d in (schemas.FEATURES, schemas.NEIGHBOURS)}
    noted: dict[schemas.Dataset, list[dict[str, Any]]] = {dataset: [] for dataset in notings}
    spent = 0.0
    places = random.permutation(items)
    numbers = np.argsort(places).astype(np.uint32)
    find: Callable[..., tuple[NDArray[Any], ...]] = partial(planted_neighbours, items=items, seed=seed)
    if not communities:
        graph = generate.graph(items, items * 3 // 10, items * 17, seed)
        find = partial(exact_neighbours, graph, num_neighbours=NEIGHBOURS, entry_budget=BUDGET)
    shards: dict[schemas.Dataset, list[Shard]] = {schemas.ITEMS: [], schemas.FEATURES: [], schemas.NEIGHBOURS: []}
    count = count_shards(items, ROWS_PER_SHARD)
    for shard in range(count):
        start, stop = shard_bounds(items, count, shard)
        rows = np.arange(start, stop)
        ids = pa.array(rows, pa.uint32())
        found = measure.in_threads(find, places[rows], measure.num_cores())
        neighbours, scores, lengths = (np.concatenate(column) for column in zip(*found, strict=True))
        neighbours = numbers[neighbours]
        features = random.integers(-110, 111, (len(rows), WIDTH), np.int8) / np.float16(64)
        if changed is not None:
            own = changed[(changed >= start) & (changed < stop)] - start
            features[own[::2]] *= np.float16(-1)
            neighbours[own[1::2], -1] = rows[own[1::2]]
        kept = np.arange(NEIGHBOURS) < lengths[:, None]
        weights = (scores / np.maximum(scores.sum(axis=1, keepdims=True), 1)).astype(np.float32)
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        nothing = pa.array(np.zeros(len(rows), np.int64))
        columns: dict[schemas.Dataset, list[pa.Array]] = {
            schemas.ITEMS: [
                pa.array([f"i{row}" for row in rows]), ids, nothing, nothing, pa.nulls(len(rows), pa.string()),
            ],
            schemas.FEATURES: [ids, vectors_to_arrow(features)],
            schemas.NEIGHBOURS: [
                ids, lists_to_arrow(indptr, neighbours[kept]), lists_to_arrow(indptr, weights[kept]),
            ],
        }  # fmt: skip
        for dataset, arrays in columns.items():
            table = pa.table(arrays, names=[column.name for column in dataset.columns or ()])
            shards[dataset].append(write_shard(storage, dataset, shard, table, LINEAGE))
            began = time.process_time()
            if dataset in notings:
                noted[dataset].append(notings[dataset].note(shard, table))
            spent += time.process_time() - began
    for dataset, written in shards.items():
        told = {"num_neighbours": NEIGHBOURS} if dataset is schemas.NEIGHBOURS else {}
        whole = commit(storage, dataset, written, LINEAGE, told)
        if dataset in notings:
            notings[dataset].commit(whole, noted[dataset])
    write_model(storage, items, seed)
    return spent


def planted_neighbours(
    places: NDArray[np.int64], items: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """As exact_neighbours: of COMMUNITY items in a row, and one in OUTSIDE from anywhere."""
    random = np.random.default_rng([seed, int(places[0])])
    shape = (len(places), NEIGHBOURS)
    first = places // COMMUNITY * COMMUNITY
    near = first[:, None] + random.integers(0, COMMUNITY, shape)
    found = np.where(random.random(shape) < 1 / OUTSIDE, random.integers(0, items, shape), near) % items
    scores = np.sort(random.integers(1, 1 << 20, shape), axis=1)[:, ::-1]
    return found, scores, np.full(len(places), NEIGHBOURS)


def write_model(storage: Storage, items: int, seed: int) -> None:
    """An untrained network in the place of a trained one."""
    model = PinSage(WIDTH, network_settings(), seed)
    model.set_statistics([0.0] * WIDTH, [1.0] * WIDTH)
    description = {"num_features": WIDTH, "num_items": items, "model": network_settings().model_dump(mode="json")}
    files = {
        "model.safetensors": safetensors.torch.save(dict(model.state_dict())),
        "model.json": json.dumps(description).encode(),
    }
    shards = [write_file(storage, schemas.MODEL.name, name, data, LINEAGE) for name, data in files.items()]
    commit(storage, schemas.MODEL, shards, LINEAGE)


def settings_file(folder: Path) -> Path:
    """Settings as a user would have them."""
    tree = {
        "task": {
            "data": {"interactions": {"paths": "none", "user": "user", "item": "item", "timestamp": "time"}},
            "model": {"hidden_dimensions": HIDDEN, "output_dimensions": OUTPUTS},
            "inference": {"layer_dtype": "float16"},
        },
        "resources": {
            "run": str(folder / "run"), "cache": str(folder / "cache"), "rows_per_shard": ROWS_PER_SHARD,
            "spark": {"master": f"local[{measure.num_cores()}]"},
        },
    }  # fmt: skip
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def embed(folder: Path, *overrides: str) -> dict[str, float]:
    """Run the stage as a command of its own; what it took."""
    given = [word for override in overrides for word in ("--set", override)]
    command = [
        sys.executable,
        "-m",
        "jobs.cli",
        "inference",
        "--settings",
        str(settings_file(folder)),
        "--force",
        *given,
    ]
    return measured(command, [folder])


def measure_incremental(folder: Path, items: int, seed: int) -> dict[str, Any]:
    """One in a hundred items changed, whole communities at a time, on top of a run that kept its layers.

    What a run costs depends on what the system still has in memory of the files that it reads. It is run as tonight's
    whole run would be, right after last night's, and twice more after a whole run, the last time with most of them in
    memory; the median counts.
    """
    last, tonight = folder / "last-night", folder / "tonight"
    for here in (last, tonight):
        here.mkdir(parents=True)
    places = np.random.default_rng(seed).permutation(items)
    communities = np.random.default_rng(seed + 1).permutation(-(-items // COMMUNITY))
    chosen = communities[: max(1, round(CHANGED * items / COMMUNITY))]
    changed = np.flatnonzero(np.isin(places // COMMUNITY, chosen))
    write_run(last, items, seed, communities=True)
    noting = write_run(tonight, items, seed, communities=True, changed=changed, previous=last)
    full = embed(last, "resources.inference.keep_layers=true", "resources.inference.reducer=gather")
    previous = f"task.data.previous={last / 'run'}"
    some = embed(tonight, previous)
    keeping = embed(tonight, previous, "resources.inference.keep_layers=true")
    made = open_manifest(Storage(str(tonight / "run")), schemas.EMBEDDINGS)
    whole = embed(tonight, "resources.inference.reducer=gather")
    again = open_manifest(Storage(str(tonight / "run")), schemas.EMBEDDINGS)
    assert [shard.sha256 for shard in made.shards] == [shard.sha256 for shard in again.shards]
    runs = [some, *(embed(tonight, previous) for _ in range(2))]
    remade = made.metadata["remade"]
    costs = [took["core_seconds"] for took in runs]
    share = (float(np.median(costs)) + noting) / whole["core_seconds"]
    print(
        f"incremental: {len(changed):,} items changed; {remade}; {some['seconds']:.1f} s against "
        f"{whole['seconds']:.1f}, {', '.join(f'{cost:.1f}' for cost in costs)} core-seconds and {noting:.1f} of noting "
        f"against {whole['core_seconds']:.0f}: {share:.3f}; the same bytes; {keeping['core_seconds']:.0f} with its "
        "layers kept",
        flush=True,
    )
    found = {
        "incremental_vs_full": share,
        "incremental": runs,
        "incremental_keeping": keeping,
        "whole": whole,
        "kept": full,
        "remade": remade,
    }
    return found | {"noting_core_seconds": noting}


# ------------------------------------------------------------------------------------------------ peers


def khop_seconds_per_item(folder: Path, items: int, batch: int, batches: int, seed: int) -> tuple[str, float]:
    """Core-seconds of embedding an item by the blocks of its 2-hop neighbourhood, on all cores."""
    storage = Storage(str(folder / "run"))
    table, features = read_tables(storage)
    model = PinSage(WIDTH, network_settings(), seed).eval()
    random, nobody = np.random.default_rng(seed), np.zeros(0, np.uint32)
    try:
        os.environ["DGLBACKEND"] = "pytorch"
        import dgl  # noqa: F401

        name = "dgl"
    except (ImportError, OSError):
        name = "torch"
    model = PinSage(WIDTH, network_settings().model_copy(update={"message_passing": name}), seed).eval()

    def one() -> None:
        seeds = np.unique(random.integers(0, items, batch)).astype(np.uint32)
        blocks = build_blocks(table, seeds, hide(nobody, nobody), (NEIGHBOURS, NEIGHBOURS))
        arrays = (features[blocks.ids], blocks.ids.astype(np.int64), blocks.index, blocks.weights)
        with torch.no_grad():
            model(*map(torch.from_numpy, arrays), blocks.sizes)

    one()
    began = time.process_time()
    for _ in range(batches):
        one()
    return name, (time.process_time() - began) / (batch * batches)


def read_tables(storage: Storage) -> tuple[NeighbourTable, NDArray[Any]]:
    """Neighbours and features in memory."""
    from pipeline.contracts.datasets import arrow_to_lists, arrow_to_vectors, read_shard

    lists, features = [], []
    neighbours, content = open_manifest(storage, schemas.NEIGHBOURS), open_manifest(storage, schemas.FEATURES)
    for shard in range(len(neighbours.shards)):
        table = read_shard(storage, neighbours, shard)
        lists.append((*arrow_to_lists(table.column("neighbours")), arrow_to_lists(table.column("weights"))[1]))
        features.append(arrow_to_vectors(read_shard(storage, content, shard, ["features"]).column("features")))
    lengths = np.concatenate([np.diff(part[0]) for part in lists])
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    ids, weights = (np.concatenate([part[k] for part in lists]) for k in (1, 2))
    return NeighbourTable.of(indptr, ids, weights), np.concatenate(features)


def roofline_seconds_per_item(items: int) -> dict[str, float]:
    """Core-seconds of an item's matrix products and of its random rows, every core busy with its own."""
    cores, rows = measure.num_cores(), 1024
    shapes = [(WIDTH, HIDDEN), (WIDTH + HIDDEN, OUTPUTS), (OUTPUTS, HIDDEN), (OUTPUTS + HIDDEN, OUTPUTS)]
    shapes += [(OUTPUTS, OUTPUTS)] * 2
    layer = torch.empty(items, HIDDEN, dtype=torch.float16)
    for part in layer.split(1 << 18):
        part.copy_(torch.rand(len(part), HIDDEN))

    def products(_: int) -> float:
        torch.set_num_threads(1)  # a setting of the thread that calls
        pairs = [(torch.rand(rows, before), torch.rand(after, before)) for before, after in shapes]
        return best(lambda: [torch.nn.functional.linear(a, b) for a, b in pairs]) / rows

    def gathers(core: int) -> float:
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(core)
        index = torch.randint(0, items, (rows, NEIGHBOURS), generator=generator, dtype=torch.int32)
        weights = torch.full(index.shape, 1.0 / NEIGHBOURS).half()
        bag = partial(torch.nn.functional.embedding_bag, mode="sum", per_sample_weights=weights)
        return 2 * best(lambda: bag(index, layer)) / rows

    with ThreadPoolExecutor(cores) as pool:
        works = (("gemm", products), ("rows", gathers))
        return {name: float(np.mean(list(pool.map(work, range(cores))))) for name, work in works}


def best(work: Any, rounds: int = 15) -> float:
    """Median processor seconds of a call in this thread."""
    spent = []
    for _ in range(rounds):
        began = time.thread_time()
        work()
        spent.append(time.thread_time() - began)
    return float(np.median(spent[2:]))


# ------------------------------------------------------------------------------------------------ what is measured


def planned_bytes(folder: Path, items: int) -> float:
    """What `pinsage plan` says that a layer's partial sums take, per item."""
    command = [
        sys.executable, "-m", "jobs.cli", "plan", "--items", str(items), "--users", str(items // 2), "--edges",
        str(9 * items), "--hosts", "20", "--memory", "512G", "--cores", "64", "--disk", "8T", "--json", "--settings",
        str(settings_file(folder)), "--set", "resources.inference.reducer=shuffle",
    ]  # fmt: skip
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    stage = next(stage for stage in json.loads(printed)["stages"] if stage["name"] == "inference")
    step = next(step for step in stage["steps"] if step["name"] == "partial sums 1")
    return float(step["shuffle_bytes"]) / items


def run(items: int, large: int, nights: int, batch: int, batches: int, seed: int, folder: Path) -> dict[str, Any]:
    """Measure, print, and return what the last line says; large 0 leaves growth out, nights 0 the incremental run."""
    about, results = measure.machine(), dict.fromkeys(KEYS)
    print("\n".join(f"{name:12} {value}" for name, value in about.items()), flush=True)
    costs: dict[int, float] = {}
    for size in filter(None, (items, large)):
        here, began = folder / str(size), time.perf_counter()
        here.mkdir(parents=True)
        write_run(here, size, seed)
        print(f"\n{size:,} items made in {time.perf_counter() - began:.0f} s", flush=True)
        took = embed(here, "resources.inference.reducer=gather")
        costs[size] = took["core_seconds"] / size
        results[f"gather {size}"] = took
        print(
            f"gather: {took['seconds']:.1f} s, {1e6 * costs[size]:.1f} core-us an item, "
            f"{size / took['core_seconds']:,.0f} items/s a core; peak {took['memory_gib']:.1f} GiB, "
            f"{took['private_gib']:.1f} of it private",
            flush=True,
        )
        if size == items:
            results |= measure_peers(here, size, batch, batches, seed, costs[size], took["seconds"])
        shutil.rmtree(here)
        limit = roofline_seconds_per_item(size)
        ratio = costs[size] / sum(limit.values())
        print(
            f"roofline: {1e6 * limit['gemm']:.1f} core-us of products and {1e6 * limit['rows']:.1f} of rows; "
            f"gather takes {ratio:.2f} times that",
            flush=True,
        )
        results |= {"vs_roofline" if size == items else "vs_roofline_large": ratio, f"roofline {size}": limit}
    if nights:
        results |= measure_incremental(folder / "nights", nights, seed)
    results["items_per_s_per_core"] = 1 / costs[items]
    if large:
        results["growth_1m_to_10m"] = costs[large] / costs[items]
    after = measure.load()
    print(f"load average {about['load']} before, {after} after\n")
    sizes = {"items": items, "large": large, "nights": nights, "batch": batch, "batches": batches}
    return results | {"sizes": sizes, "machine": about | {"load_after": after}}


def measure_peers(
    here: Path, items: int, batch: int, batches: int, seed: int, cost: float, seconds: float
) -> dict[str, Any]:
    """The naive way, and the other reducer, on one run folder."""
    name, naive = khop_seconds_per_item(here, items, batch, batches, seed)
    print(
        f"k-hop mini-batches of {batch} ({name}): {1e6 * naive:,.0f} core-us an item, {naive / cost:.1f} times",
        flush=True,
    )
    took = embed(here, "resources.inference.reducer=shuffle")
    storage = Storage(str(here / "run"))
    reports = open_manifest(storage, f"{schemas.EXCHANGE}/step-edges").metadata["reports"]
    rows, edges, hubs = (sum(report[key] for report in reports) for key in ("partial_rows", "edges", "hub_edges"))
    sent = rows * (3 * HIDDEN + 4) / items
    print(
        f"shuffle: {took['seconds']:.1f} s, {took['core_seconds'] / items * 1e6:.1f} core-us an item; of "
        f"{edges / items:.1f} edges an item {hubs / items:.1f} lead to hubs, the rest make {rows / items:.1f} partial "
        f"sums in {len(reports)} shards: {sent:,.0f} bytes an item and layer",
        flush=True,
    )
    return {
        "items_per_s_vs_khop": naive / cost, "khop": name, "shuffle": took,
        "shuffle_vs_gather": took["seconds"] / seconds, "shuffled_bytes_per_item": sent,
        "partial_rows_per_item": rows / items, "planned_bytes_per_item_2b": planned_bytes(here, 2_000_000_000),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 000 items: for a look")
    parser.add_argument("--items", type=int)
    parser.add_argument("--large", type=int, help="items of the catalogue that growth is measured with; 0 is none")
    parser.add_argument("--nights", type=int, help="items of the catalogue that goes on from a night before; 0 is none")
    parser.add_argument("--batch", type=int, default=1024, help="seeds of a k-hop mini-batch")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where runs are made: needs 8 GB of disk for a million items")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    items, large = given.items or (100_000 if given.quick else 1_000_000), given.large or 0
    nights = items if given.nights is None else given.nights
    with tempfile.TemporaryDirectory(prefix="bench-inference-", dir=given.folder) as folder:
        found = run(items, large, nights, given.batch, given.batches, given.seed, Path(folder))
        print(json.dumps(found, default=float))


if __name__ == "__main__":
    main()
