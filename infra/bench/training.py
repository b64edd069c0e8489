"""Pairs a second of training against DGL's PinSage, and what a pair costs as the catalogue grows.

    python -m infra.bench.training            # 8 minutes on 2 cores; --skip-growth 4, --quick one

Ours is what `pinsage train` runs: Loader with its thread, and Trainer, on a run folder. The peer is DGL's own design
for PinSage: walks from the distinct seeds of every layer of every batch, the edges of its pairs removed, `to_block`,
features, and the same two layers by DGL's message passing; sampling and layers use all cores in turn. Both train the
same network (2 layers, hidden 256, output 128) with the same Adam in float32, on batches of 2048 pairs and 500 shared
negatives, one process, threads = cores. The peer is spared what it can be: 32-bit ids, features ready in float32,
negatives that are not checked against the pairs. Not counted for ours: making the neighbours, once, before training.

Everyone goes in turn, some steps each, after steps that are not counted; ratios are medians over the rounds. Growth is
the cost of a pair in a catalogue of 10 million items by that of 100 000, of the same generator, with features in the
page cache and read once; with task.training.consecutive_pairs 1, the default, and 16. `--device cuda` measures only
training on a GPU: 10 million items, 50 x 10 neighbours, 256 dimensions, all cores but two preparing batches, and where
the device's time goes; rounds are long enough that what was prepared before one is nothing in it (--rounds 3 --steps
100). It takes 20 GB of disk and memory each; TMPDIR says where. With other sizes (--quick, --items, --large) the keys
keep their names, and `sizes` tells.

The last line is one JSON object. A peer that is not installed is left out, and its figures are null.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("DGLBACKEND", "pytorch")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as jobs/train.py sets it

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from infra.bench import generate, measure
from model import distributed
from model.lifetime import ALLOCATOR, choose_allocator
from model.loader import Loader, Position
from model.trainer import Trainer, emulates_bfloat16
from pipeline.contracts import schemas
from pipeline.contracts.config import TrainingResources, parse_settings
from pipeline.contracts.datasets import (
    Lineage,
    Shard,
    commit,
    lists_to_arrow,
    open_manifest,
    vectors_to_arrow,
    write_shard,
)  # fmt: skip
from pipeline.contracts.replica import map_lists, map_vectors
from pipeline.contracts.storage import Storage
from pipeline.exact_kernel import exact_neighbours
from pipeline.walk_kernel import BipartiteGraph

HIDDEN, OUTPUTS, NEGATIVES, MARGIN, LEARNING_RATE = 256, 128, 500, 0.1, 1e-3  # as in the default settings
WALKS, HOPS, RESTART, BUDGET = 200, 3, 0.5, 2048
IN_A_ROW = 16
"""Pairs that are shuffled as one, in the second way that growth is measured."""
WARM_UP = 3
"""Steps before each timed stretch: the loader's thread is then as far ahead as it is at its end."""
SHARD_ITEMS, PAGE_BYTES = 50_000, 4096
KERNELS = 16
"""So many of a device's kernels are shown, by their time."""
LOADED = ": others were running: repeat it"
LINEAGE = Lineage("bench", {}, {})
LISTS = ("neighbours", "weights")
KEYS = (
    "pairs_per_s_vs_dgl_t10", "pairs_per_s_vs_dgl_t50", "pairs_per_s_vs_dgl_layers_t50", "pairs_per_s_bf16_vs_float32",
    "data_wait_share", "growth_100k_to_10m", "growth_in_rows", "growth_from_singles_to_rows", "rows_vs_singles_10m",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """A graph of the generator with as many neighbours and features an item; users and edges as 0.3 and 17 an item."""

    items: int
    neighbours: int
    width: int
    pairs: int
    seed: int

    def graph(self) -> BipartiteGraph:
        return generate.graph(self.items, self.items * 3 // 10, self.items * 17, self.seed)


# ------------------------------------------------------------------------------------------------ the run folder


def write_run(folder: Path, graph: BipartiteGraph, world: World) -> None:
    """Store what training reads: random features, exact neighbours, pairs; no hard negatives and no questions.

    Shards are made by threads, one for every core; each holds what one shard is.
    """
    storage = Storage(str(folder / "run"))
    shards: dict[schemas.Dataset, list[Shard]] = {
        schemas.FEATURES: [], schemas.NEIGHBOURS: [], schemas.HARD_NEGATIVES: [], schemas.PAIRS: [],
        schemas.QUESTIONS: [],
    }  # fmt: skip

    def add(dataset: schemas.Dataset, number: int, **columns: pa.Array) -> None:
        shards[dataset].append(write_shard(storage, dataset, number, pa.table(columns), LINEAGE))

    def empty_lists(count: int) -> pa.Array:
        return lists_to_arrow(np.zeros(count + 1, np.int64), np.zeros(0, np.uint32))

    def write(number: int) -> None:
        items = np.arange(number * SHARD_ITEMS, min((number + 1) * SHARD_ITEMS, world.items))
        ids, random = pa.array(items, pa.uint32()), np.random.default_rng((world.seed, number))
        features = random.integers(-110, 111, (len(items), world.width), np.int8) / np.float16(64)  # deviation 1.0
        neighbours, scores, lengths = exact_neighbours(graph, items, world.neighbours, BUDGET)
        kept = np.arange(world.neighbours) < lengths[:, None]
        weights = (scores / np.maximum(scores.sum(axis=1, keepdims=True), 1)).astype(np.float32)
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        add(schemas.FEATURES, number, id=ids, features=vectors_to_arrow(features))
        columns = (lists_to_arrow(indptr, values[kept]) for values in (neighbours, weights))
        add(schemas.NEIGHBOURS, number, id=ids, **dict(zip(LISTS, columns, strict=True)))
        add(schemas.HARD_NEGATIVES, number, id=ids, negatives=empty_lists(len(items)))

    with ThreadPoolExecutor(measure.num_cores()) as pool:
        list(pool.map(write, range(-(-world.items // SHARD_ITEMS))))
    query, positive = draw_pairs(graph, world.pairs, np.random.default_rng(world.seed))
    nobody, times = pa.array(np.zeros(0, np.uint32)), pa.array(np.zeros(len(query), np.int64))
    add(schemas.PAIRS, 0, query=pa.array(query), positive=pa.array(positive), timestamp=times)
    add(schemas.QUESTIONS, 0, query=nobody, target=nobody, seen=empty_lists(0))
    statistics = {"mean": [0.0] * world.width, "std": [1.0] * world.width, "columns": []}
    for dataset, written in shards.items():
        commit(storage, dataset, written, LINEAGE, statistics if dataset is schemas.FEATURES else None)


def draw_pairs(
    graph: BipartiteGraph, count: int, random: np.random.Generator
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """About so many pairs of consecutive items of whole users, one user after the other, as the stage stores them."""
    order = random.permutation(len(graph.user_indptr) - 1)
    lengths = np.diff(graph.user_indptr)[order]
    order = order[: 1 + int(np.searchsorted(np.cumsum(np.maximum(lengths - 1, 0)), count))]
    rows = [graph.user_items[graph.user_indptr[user] : graph.user_indptr[user + 1]] for user in order.tolist()]
    nothing = [np.zeros(0, np.uint32)]
    return np.concatenate(nothing + [row[:-1] for row in rows]), np.concatenate(nothing + [row[1:] for row in rows])


# ------------------------------------------------------------------------------------------------ who is timed


class Round(NamedTuple):
    """Some steps of one contender, as means of a step: seconds by the clock and of the processor, share of the former
    waiting for data, seconds of the parts, and nodes of the layers, from the features to the seeds."""

    seconds: float
    processor: float
    waiting: float
    parts: dict[str, float]
    nodes: list[float]


class Clock:
    """Seconds by name of what happens under it, in any thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def watch(self, owner: object, method: str, name: str) -> None:
        """Time every call of an object's method."""
        work = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.of(name):
                return work(*arguments, **named)

        setattr(owner, method, timed)

    def means(self) -> dict[str, float]:
        """Seconds of a call."""
        return {name: float(np.mean(seconds)) for name, seconds in self.seconds.items()}


class Ours:
    """Loader and Trainer on a run folder, as model.trainer.train puts them together."""

    def __init__(
        self,
        folder: Path,
        batch: int,
        seed: int,
        model: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        group: distributed.Group | None = None,
        resources: Mapping[str, Any] | None = None,
    ) -> None:
        self.group = group or distributed.Group()
        shape = {"num_layers": 2, "hidden_dimensions": HIDDEN, "output_dimensions": OUTPUTS}
        steps = {
            "loss": "max_margin", "margin": MARGIN, "batch_size": batch, "learning_rate": LEARNING_RATE,
            "curriculum": [{"from_epoch": 1, "uniform": NEGATIVES}],
        }  # fmt: skip
        interactions = {"paths": "none", "user": "user", "item": "item", "timestamp": "time"}
        settings = parse_settings({
            "task": {
                "seed": seed, "data": {"interactions": interactions},
                "model": shape | dict(model or {}), "training": steps | dict(training or {}),
            },
            "resources": {
                "run": str(folder / "run"), "cache": str(folder / "cache"),
                "training": {"threads": measure.num_cores()} | dict(resources or {}),
            },
        })  # fmt: skip
        self.loader = Loader(Storage(settings.resources.run), settings, device=self.group.device)
        self.trainer = Trainer(settings, self.loader, self.group)
        self.batch = self.loader.global_batch
        self.clock, self.position = Clock(), Position(1, 0)
        for method in ("batch", "examples", "blocks", "features"):
            self.clock.watch(self.loader, method, f"loader {method}")
        self.clock.watch(self.trainer, "step", "step")
        self.clock.watch(self.trainer, "_loss", "forward and loss")
        self.clock.watch(self.trainer.optimizer, "step", "optimizer")

    def touch(self) -> None:
        """Map every page of features and neighbours, as the first epoch would."""
        table = self.loader._table
        for array in (self.loader._features, table.indptr, table.neighbours, table.weights):
            array.reshape(-1).view(np.uint8)[::PAGE_BYTES].max()

    def _finish(self) -> None:
        """Wait for what is queued on a GPU."""
        if self.group.device.type == "cuda":
            torch.cuda.synchronize(self.group.device)

    def round(self, num_steps: int) -> Round:
        """The next steps; the loader's thread works ahead to the end and past it, as in a long run."""
        batches = self.loader.batches(self.position, Position(1 << 30, 0))
        for _ in range(WARM_UP):
            self.trainer.step(*next(batches))
        self._finish()
        self.clock.seconds.clear()
        carrier, nodes = self.loader.carrier, []
        waited, copied = carrier.waited_seconds, carrier.copied_seconds
        began, processor = time.perf_counter(), time.process_time()
        for _ in range(num_steps):
            position, batch = next(batches)
            self.trainer.step(position, batch)
            nodes.append(batch.sizes)
        self._finish()
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
        waiting = (carrier.waited_seconds - waited) / seconds
        parts = self.clock.means() | {"copying": (carrier.copied_seconds - copied) / num_steps}
        batches.close()  # type: ignore[attr-defined]
        self.position = self.loader.after(position)
        parts["backward"] = parts.pop("step") - parts["forward and loss"] - parts["optimizer"]
        return Round(seconds / num_steps, processor / num_steps, waiting, parts, np.mean(nodes, axis=0).tolist())


class DglLayer(nn.Module):
    """One convolution on a DGL block: neighbours' messages weighted by visits."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.Q, self.W = nn.Linear(inputs, HIDDEN), nn.Linear(inputs + HIDDEN, OUTPUTS)

    def forward(self, block: Any, h: Tensor) -> Tensor:
        from dgl import function

        with block.local_scope():
            block.srcdata["message"] = F.relu(self.Q(h))
            block.update_all(function.u_mul_e("message", "weights", "m"), function.sum("m", "pooled"))
            block.update_all(function.copy_e("weights", "w"), function.sum("w", "total"))
            pooled = block.dstdata["pooled"] / block.dstdata["total"].clamp(min=1)
            z = F.relu(self.W(torch.cat([h[: block.num_dst_nodes()], pooled], dim=1)))
        return F.normalize(z, dim=1)


class DglNetwork(nn.Module):
    """Two convolutions and the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DglLayer(width), DglLayer(OUTPUTS)])
        self.G1, self.G2 = nn.Linear(OUTPUTS, OUTPUTS), nn.Linear(OUTPUTS, OUTPUTS, bias=False)

    def forward(self, blocks: list[Any], h: Tensor) -> Tensor:
        for layer, block in zip(self.layers, blocks, strict=True):
            h = layer(block, h)
        return F.normalize(self.G2(F.relu(self.G1(h))), dim=1)


class Peer:
    """Training after DGL's example of PinSage. ImportError or OSError where DGL is missing."""

    def __init__(self, graph: BipartiteGraph, world: World, batch: int) -> None:
        import dgl

        torch.manual_seed(world.seed)
        dgl.seed(world.seed)
        random = np.random.default_rng(world.seed)
        owners = np.repeat(np.arange(world.items, dtype=np.int32), np.diff(graph.item_indptr))
        items, users = torch.from_numpy(owners), torch.from_numpy(graph.item_users.view(np.int32))
        sizes = {"item": world.items, "user": len(graph.user_indptr) - 1}
        edges = {("item", "by", "user"): (items, users), ("user", "of", "item"): (users, items)}
        self.graph = dgl.heterograph(edges, sizes, idtype=torch.int32).formats("csr")
        self.graph.create_formats_()
        self.dgl, self.batch, self.num_items, self.clock = dgl, batch, world.items, Clock()
        self.sampler = dgl.sampling.PinSAGESampler(self.graph, "item", "user", HOPS, RESTART, WALKS, world.neighbours)
        query, positive = draw_pairs(graph, world.pairs, random)
        self.pairs = torch.from_numpy(np.stack([query, positive]).view(np.int32))
        self.features = torch.from_numpy(random.standard_normal((world.items, world.width), np.float32))
        self.network = DglNetwork(world.width)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)

    def blocks(self, seeds: Tensor, query: Tensor, positive: Tensor) -> list[Any]:
        """Blocks of both layers, the outer one first; pairs are seen in neither direction."""
        blocks: list[Any] = []
        heads, tails = torch.cat([query, positive]), torch.cat([positive, query])
        for _ in range(2):
            with self.clock.of("sampling"):
                found = self.sampler(seeds)
            with self.clock.of("to_block"):
                found = self.dgl.remove_edges(found, found.edge_ids(heads, tails, return_uv=True)[2])
                block = self.dgl.to_block(found, seeds)
                block.edata["weights"] = found.edata["weights"][block.edata[self.dgl.EID].long()].float().unsqueeze(1)
                seeds = block.srcdata[self.dgl.NID]
            blocks.insert(0, block)
        return blocks

    def step(self) -> list[int]:
        """One update; returns the nodes of the layers."""
        query, positive = self.pairs[:, torch.randint(self.pairs.shape[1], (self.batch,))]
        negative = torch.randint(self.num_items, (NEGATIVES,), dtype=torch.int32)
        seeds, rows = torch.unique(torch.cat([query, positive, negative]), return_inverse=True)
        blocks = self.blocks(seeds, query, positive)
        with self.clock.of("features"):
            features = self.features[blocks[0].srcdata[self.dgl.NID].long()]
        with self.clock.of("forward and loss"):
            z_query, z_positive, z_negative = self.network(blocks, features)[rows].split(
                [self.batch, self.batch, NEGATIVES]
            )
            score = (z_query * z_positive).sum(1, keepdim=True)
            loss = F.relu(z_query @ z_negative.T - score + MARGIN).mean()
        with self.clock.of("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        with self.clock.of("optimizer"):
            self.optimizer.step()
        return [blocks[0].num_src_nodes(), blocks[0].num_dst_nodes(), len(seeds)]

    def round(self, num_steps: int) -> Round:
        """The next steps."""
        self.clock.seconds.clear()
        was = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)  # ours are so as to resume exactly: no reason to slow the peer down
        began, processor = time.perf_counter(), time.process_time()
        nodes = [self.step() for _ in range(num_steps)]
        seconds = (time.perf_counter() - began) / num_steps
        processor = (time.process_time() - processor) / num_steps
        torch.use_deterministic_algorithms(was)
        parts = {name: sum(each) / num_steps for name, each in self.clock.seconds.items()}
        waiting = sum(parts[name] for name in ("sampling", "to_block", "features")) / seconds
        return Round(seconds, processor, waiting, parts, np.mean(nodes, axis=0).tolist())


# ------------------------------------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Case:
    """Someone to time: so many steps a round."""

    round: Callable[[int], Round]
    num_steps: int


def alternate(cases: Mapping[str, Case], rounds: int) -> dict[str, list[Round]]:
    """Every case's rounds, all cases in turn, after a step of each that is not counted."""
    for case in cases.values():
        case.round(1)
    found: dict[str, list[Round]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            found[name].append(case.round(case.num_steps))
    return found


def show(title: str, found: Mapping[str, list[Round]], batch: int) -> dict[str, dict[str, Any]]:
    """Print and return medians: of a step, of its parts, and of its nodes."""
    head = f"\n{title:24}{'pairs/s':>10}{'ms/step':>10}{'cores':>7}{'data':>7}"
    print(f"{head}   medians of {len(next(iter(found.values())))} rounds; parts in ms")
    results: dict[str, dict[str, Any]] = {}
    for name, rounds in found.items():
        seconds, processor, waiting = (float(np.median([each[k] for each in rounds])) for k in range(3))
        parts = {part: float(np.median([each.parts[part] for each in rounds])) * 1e3 for part in rounds[0].parts}
        nodes = [round(float(np.mean(layer))) for layer in zip(*(each.nodes for each in rounds), strict=True)]
        speed = batch / seconds
        times = {"pairs_per_s": speed, "step_ms": seconds * 1e3, "processor_ms": processor * 1e3, "data_share": waiting}
        results[name] = {**times, "nodes": nodes, "ms": parts}
        figures = f"{speed:10,.0f}{seconds * 1e3:10.1f}{processor / seconds:7.2f}{waiting:7.1%}"
        print(f"{name:24}{figures}   nodes {nodes}")
        print(f"{'':24}" + ", ".join(f"{part} {spent:.1f}" for part, spent in parts.items()), flush=True)
    return results


def ratio(slow: list[Round], fast: list[Round]) -> float:
    """How many times faster, as the median over rounds."""
    return float(np.median([a.seconds / b.seconds for a, b in zip(slow, fast, strict=True)]))


def measure_speed(folder: Path, world: World, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """Ours and the peer on the same graph, with 10 and with 50 neighbours."""
    graph, few = world.graph(), max(1, steps // 4)
    cases: dict[str, Case] = {}
    for count in (10, 50):
        here, of = folder / f"t{count}", replace(world, neighbours=count)
        write_run(here, graph, of)
        variants: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"ours": ({}, {})}
        if count == 50:
            variants["ours bf16"] = ({}, {"precision": "bfloat16"})
            variants["ours, dgl layers"] = ({"message_passing": "dgl"}, {})
        try:
            peer: Peer | None = Peer(graph, of, batch)
        except (ImportError, OSError) as error:  # OSError: DGL's library does not load beside this torch
            print(f"DGL left out: {error}")
            peer = None
            variants.pop("ours, dgl layers", None)
        for name, (model, training) in variants.items():
            ours = Ours(here, batch, world.seed, model, training)
            slow = "message_passing" in model or (bool(training) and emulates_bfloat16())
            cases[f"{name} T={count}"] = Case(ours.round, few if slow else steps)
        if peer:
            cases[f"DGL T={count}"] = Case(peer.round, few)
    found = alternate(cases, rounds)
    results: dict[str, Any] = {"speed": show("speed", found, batch)}
    results["pairs_per_s_bf16_vs_float32"] = ratio(found["ours T=50"], found["ours bf16 T=50"])
    results["data_wait_share"] = max(results["speed"][f"ours T={count}"]["data_share"] for count in (10, 50))
    if "DGL T=50" in found:
        for count in (10, 50):
            results[f"pairs_per_s_vs_dgl_t{count}"] = ratio(found[f"DGL T={count}"], found[f"ours T={count}"])
        results["pairs_per_s_vs_dgl_layers_t50"] = ratio(found["ours, dgl layers T=50"], found["ours T=50"])
    return results


def made(folder: Path, world: World) -> Path:
    """A run folder of the world, of which only the graph is ever beside another's, with the copies a loader maps."""
    here, began = folder / f"{world.items}", time.perf_counter()
    graph = world.graph()
    drawn = time.perf_counter()
    write_run(here, graph, world)
    written, storage = time.perf_counter(), Storage(str(here / "run"))
    lists, vectors = (open_manifest(storage, dataset) for dataset in (schemas.NEIGHBOURS, schemas.FEATURES))
    with ThreadPoolExecutor(3) as pool:
        copies: list[Any] = [pool.submit(map_lists, storage, lists, column, str(here / "cache")) for column in LISTS]
        copies.append(pool.submit(map_vectors, storage, vectors, "features", str(here / "cache")))
        for copy in copies:
            copy.result()
    parts = np.diff([began, drawn, written, time.perf_counter()]).round().astype(int).tolist()
    print(f"{world.items:,} items made in {sum(parts)} s: graph {parts[0]}, datasets {parts[1]}, copies {parts[2]}")
    return here


def measure_growth(folder: Path, small: World, large: World, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """The same trainer in a small and in a large catalogue, pairs shuffled one by one and in rows."""
    cases: dict[str, Case] = {}
    for world in (small, large):
        here = made(folder, world)
        for length in (1, IN_A_ROW):
            ours = Ours(here, batch, world.seed, training={"consecutive_pairs": length})
            ours.touch()
            cases[f"{world.items:,} items, {length} in a row"] = Case(ours.round, steps)
    found = alternate(cases, rounds)
    growth = show("growth", found, batch)
    nodes = [np.array(each["nodes"]) for each in growth.values()]
    before, before_rows, after, after_rows = found.values()
    results: dict[str, Any] = {"growth": growth, "growth_of_nodes": (nodes[2] / nodes[0]).round(2).tolist()}
    for key, slow, fast in (
        ("growth_100k_to_10m", after, before),
        ("growth_in_rows", after_rows, before_rows),
        ("growth_from_singles_to_rows", after_rows, before),
        ("rows_vs_singles_10m", after, after_rows),
    ):
        results[key] = ratio(slow, fast)
    print(
        f"a pair costs {results['growth_100k_to_10m']:.2f} times as much, with {results['growth_of_nodes']} times as "
        f"many nodes in the layers; with {IN_A_ROW} in a row in both {results['growth_in_rows']:.2f} times, and in the "
        f"large one alone {results['growth_from_singles_to_rows']:.2f} times"
    )
    return results


def measure_device(
    folder: Path, world: World, batch: int, rounds: int, steps: int, group: distributed.Group
) -> dict[str, Any]:
    """Pairs a second on a device: 50 neighbours a seed and 10 of each of those, 256 dimensions, in both precisions."""
    here, cases = made(folder, world), {}
    model = {"fan_outs": [10, 50], "output_dimensions": 256}
    for name, training, kept in (
        ("float32", {}, None),
        ("bfloat16", {"precision": "bfloat16"}, None),
        ("float32, features kept", {}, "8g"),
        ("bfloat16, features kept", {"precision": "bfloat16"}, "8g"),
    ):
        resources = {"workers": max(1, measure.num_cores() - 2), "prefetch": 16, "device_features": kept}
        ours = Ours(here, batch, world.seed, model, training, group, resources)
        ours.touch()
        cases[name] = Case(ours.round, steps)
    results = show("device", alternate(cases, rounds), batch)
    if group.device.type == "cuda":
        show_kernels(name, cases[name])
        print(f"memory of the device at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    best = max(results.values(), key=lambda each: float(each["pairs_per_s"]))
    return {"device": results, "pairs_per_s_device": best["pairs_per_s"], "device_wait_share": best["data_share"]}


def show_kernels(name: str, case: Case) -> None:
    """Print what the device spends a step of a case on, as its profiler says."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case.round(case.num_steps)
    num_steps, kernels = case.num_steps + WARM_UP, profile.key_averages()
    total = sum(kernel.self_device_time_total for kernel in kernels)
    print(f"\n{name}: {total / num_steps / 1e3:.2f} ms a step of kernels and copies; the longest, ms and calls a step")
    for kernel in sorted(kernels, key=lambda kernel: -kernel.self_device_time_total)[:KERNELS]:
        spent, calls = kernel.self_device_time_total / num_steps / 1e3, kernel.count / num_steps
        print(f"{spent:10.2f}{calls:7.1f}  {kernel.key[:100]}")


def run(
    items: int, large: int, batch: int, rounds: int, steps: int, pairs: int, seed: int, device: str = ""
) -> dict[str, Any]:
    """Measure, print the tables, and return what the last line says; large 0 leaves growth out.

    device: measure only how fast it trains in the large catalogue.
    """
    about, cores = measure.machine(), measure.num_cores()
    if device == "cuda" and torch.cuda.is_available():
        about |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    print("\n".join(f"{name:12} {value}" for name, value in about.items()), flush=True)
    world, results = World(items, 50, OUTPUTS, pairs, seed), dict.fromkeys(KEYS)
    resources = TrainingResources.model_validate({"threads": cores, "device": device or "cpu"})
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder, distributed.start(resources) as group:
        if device:
            where = replace(world, items=large)
            results |= measure_device(Path(folder) / "device", where, batch, rounds, steps, group)
        else:
            results |= measure_speed(Path(folder) / "speed", world, batch, rounds, steps)
        if large and not device:
            small = replace(world, neighbours=10, width=64)
            results |= measure_growth(Path(folder) / "growth", small, replace(small, items=large), batch, rounds, steps)
    after = measure.load()
    quiet = about["load"][0] < 1.0 and after[0] < cores + 1.5  # the loader's thread is one more than the cores
    print(f"load average {about['load']} before, {after} after" + ("" if quiet else LOADED) + "\n")
    return results | {
        "quiet": quiet,
        "sizes": asdict(world) | {"large": large, "batch": batch, "rounds": rounds, "steps": steps},
        "allocator": ALLOCATOR.keys() <= os.environ.keys(),
        "machine": about | {"load_after": after},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small graphs and fewer rounds: for a look")
    parser.add_argument("--skip-growth", action="store_true")
    parser.add_argument("--items", type=int, help="of the graph; 0.3 users and 17 edges each")
    parser.add_argument("--large", type=int, help="items of the catalogue that growth is measured with")
    parser.add_argument("--batch", type=int, help="pairs of a step")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="of a round; a quarter of them where DGL is at work")
    parser.add_argument("--pairs", type=int, help="pairs in store")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="only how fast this trains in the large catalogue")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    sizes = {"items": 100_000, "large": 10_000_000, "batch": 2048, "rounds": 5, "steps": 4, "pairs": 500_000}
    if given.device == "cuda":
        sizes |= {"rounds": 3, "steps": 100}
    if given.quick:
        sizes = {"items": 20_000, "large": 200_000, "batch": 512, "rounds": 2, "steps": 4, "pairs": 50_000}
    sizes |= {name: value for name, value in vars(given).items() if name in sizes and value}
    if given.skip_growth:
        sizes["large"] = 0
    print(json.dumps(run(**sizes, seed=given.seed, device=given.device or ""), default=float))


if __name__ == "__main__":
    choose_allocator()
    main()
