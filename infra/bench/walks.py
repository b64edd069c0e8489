"""Neighbourhoods a second, and how good they are, against DGL's sampler: `python -m infra.bench.walks`, in 5 minutes.

Everyone gets the same graph, the same walks (200 an item, up to 3 hops, stop probability 0.5 after each), the same 50
neighbours and the same machine in turn. Times are medians of the rounds: the processor's for what runs on one thread,
by the clock for what runs on all cores. The last line printed is one JSON object.

A step of a walk is two dependent random reads: a row's offsets, then the neighbour. The floor of its time is therefore
twice a gather: an independent read at a random place of one of the graph's four arrays, averaged over the four.
Quality is against exact personalised PageRank by power iteration (restart 0.5) on a sample of queries.

A peer that is not installed (DGL, graph-walker) is left out, and its figures are null.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

os.environ.setdefault("DGLBACKEND", "pytorch")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a team that spins where a core is taken waits for ever

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from infra.bench import generate, measure
from pipeline.exact_kernel import ONE, Rows, compose, exact_neighbours
from pipeline.walk_kernel import BipartiteGraph, visit_counts, walk_ends, walks_per_hop

WALKS, HOPS, RESTART, NEIGHBOURS, BUDGET, OWN = 200, 3, 0.5, 50, 2048, 200
READS, DGL_BATCH = 2_000_000, 1024
ALL_CORES, STEPS, WALKER = ", all cores", "walks, steps alone", "graph-walker, walks alone"
DGL_WALKS = (200, 800, 3200, 6400, 12800, 25600, 51200)
LOADED = ": others were running, who take caches and bandwidth too: trust the overlaps, repeat the times"
KEYS = (
    "items_per_s_vs_dgl_1core", "items_per_s_vs_dgl_all", "items_per_s_vs_dgl_equal_overlap", "step_ns_vs_gather_ns",
    "overlap_walks", "overlap_exact", "mass_exact", "overlap_dgl",
)  # fmt: skip


class Dgl:
    """DGL's PinSAGESampler on our graph, with 32-bit ids, which are faster there. ImportError where it is missing."""

    def __init__(self, graph: BipartiteGraph) -> None:
        import dgl
        import torch

        self.dgl, self.torch = dgl, torch
        items = np.repeat(np.arange(len(graph.item_indptr) - 1, dtype=np.int32), np.diff(graph.item_indptr))
        by, to = torch.from_numpy(items), torch.from_numpy(graph.item_users.view(np.int32))
        sizes = {"item": len(graph.item_indptr) - 1, "user": len(graph.user_indptr) - 1}
        edges = {("item", "by", "user"): (by, to), ("user", "of", "item"): (to, by)}
        self.graph = dgl.heterograph(edges, sizes, idtype=torch.int32).formats("csr")
        self.graph.create_formats_()
        self.pools = ThreadpoolController()

    def sampler(self, num_walks: int, num_neighbours: int = NEIGHBOURS) -> Any:
        metapath = [("item", "by", "user"), ("user", "of", "item")]
        return self.dgl.sampling.RandomWalkNeighborSampler(
            self.graph, HOPS, RESTART, num_walks, num_neighbours, metapath=metapath
        )

    def neighbours(self, items: NDArray[np.int64], num_walks: int, threads: int) -> None:
        sampler = self.sampler(num_walks)
        batch = max(1, DGL_BATCH * WALKS // num_walks)  # its memory grows with the walks of a call
        with self.pools.limit(limits=threads):
            for first in range(0, len(items), batch):
                sampler(self.torch.from_numpy(items[first : first + batch].astype(np.int32)))

    def walk(self, items: NDArray[np.int64]) -> None:
        """The walks alone."""
        probability = self.torch.zeros(2 * HOPS)
        probability[2::2] = RESTART
        with self.pools.limit(limits=1):
            for first in range(0, len(items), DGL_BATCH):
                seeds = np.repeat(items[first : first + DGL_BATCH], WALKS).astype(np.int32)
                self.dgl.sampling.random_walk(
                    self.graph, self.torch.from_numpy(seeds), metapath=["by", "of"] * HOPS, restart_prob=probability
                )

    def found(self, items: NDArray[np.int64], num_walks: int) -> measure.Found:
        """Rows as ours. DGL counts returns to the item itself: one more is asked for, and the item taken out."""
        ids, counts, lengths = _empty(len(items))
        for row, item in enumerate(items):
            result = self.sampler(num_walks, NEIGHBOURS + 1)(self.torch.tensor([item], dtype=self.torch.int32))
            sources, visits = result.edges()[0].numpy(), result.edata["weights"].numpy()
            order = np.argsort(-visits, kind="stable")
            order = order[sources[order] != item][:NEIGHBOURS]
            lengths[row] = len(order)
            ids[row, : len(order)], counts[row, : len(order)] = sources[order], visits[order]
        return ids, counts, lengths


class GraphWalker:
    """The package graph-walker: walks only, on the bipartite graph as one. ImportError where it is missing."""

    STEPS = 4  # its walks have one length for all: 4 steps, where ours have 3.5 on average

    def __init__(self, graph: BipartiteGraph) -> None:
        self.walk_from = import_module("_walker").random_walks
        num_items = len(graph.item_indptr) - 1
        offsets = [graph.item_indptr, graph.item_indptr[-1] + graph.user_indptr[1:]]
        self.indptr = np.concatenate(offsets).astype(np.uint32)
        self.ids = np.concatenate([graph.item_users + np.uint32(num_items), graph.user_items])
        degrees = np.diff(self.indptr)
        self.chances = np.repeat(1.0 / np.maximum(degrees, 1), degrees).astype(np.float32)
        self.pools = ThreadpoolController()

    def walk(self, items: NDArray[np.int64]) -> None:
        with self.pools.limit(limits=1):
            self.walk_from(self.indptr, self.ids, self.chances, items.astype(np.uint32), WALKS, self.STEPS + 1)


def _empty(size: int) -> measure.Found:
    return np.zeros((size, NEIGHBOURS), np.uint32), np.zeros((size, NEIGHBOURS)), np.zeros(size, np.int64)


def _try(make: Callable[[BipartiteGraph], Any], graph: BipartiteGraph, name: str) -> Any:
    try:
        return make(graph)
    except (ImportError, OSError) as error:  # OSError: DGL's library does not load beside this torch
        print(f"{name} left out: {error}")
        return None


def all_rows(graph: BipartiteGraph, threads: int) -> Rows:
    """Every item's exact row, weights summing to at most 1: what compose reads."""
    items = np.arange(len(graph.item_indptr) - 1)
    parts = measure.in_threads(lambda some: exact_neighbours(graph, some, NEIGHBOURS, BUDGET), items, threads)
    ids, scores, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
    kept = np.arange(NEIGHBOURS) < lengths[:, None]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return Rows(indptr, ids[kept], (scores[kept] / ONE).astype(np.float32))


def at_equal_overlap(curve: list[tuple[float, float]], overlap: float) -> tuple[float, bool]:
    """Seconds an item at which the curve [(overlap, seconds), ...] reaches overlap; and whether it does.

    Between two points overlap is taken as linear in log seconds. Beyond the last point its time is a lower bound.
    """
    for (low, fast), (high, slow) in itertools.pairwise(curve):
        if low < overlap <= high:
            part = (overlap - low) / (high - low)
            return math.exp(math.log(fast) + part * math.log(slow / fast)), True
    return (curve[0][1], True) if overlap <= curve[0][0] else (curve[-1][1], False)


@dataclass(frozen=True)
class Bench:
    """Who is measured on what."""

    graph: BipartiteGraph
    rows: Rows
    dgl: Dgl | None
    walker: GraphWalker | None
    seed: int


@dataclass(frozen=True)
class Case:
    """Something to time: work on num_items items; steps an item where it is walking alone."""

    work: Callable[[], Any]
    num_items: int
    threads: int = 1
    steps: int = 0


def speed_cases(bench: Bench, items: NDArray[np.int64], cores: int) -> dict[str, Case]:
    """Every contender on the items; an eighth of them for the slower peers."""
    graph, seed, per_hop = bench.graph, bench.seed, walks_per_hop(WALKS, HOPS, RESTART)
    few, steps = items[: max(1, len(items) // 8)], 2 * int(per_hop.sum())

    def walks(some: NDArray[np.int64]) -> Any:
        return visit_counts(graph, some, per_hop, NEIGHBOURS, seed)

    def exact(some: NDArray[np.int64]) -> Any:
        return exact_neighbours(graph, some, NEIGHBOURS, BUDGET)

    cases = {}
    for threads in sorted({1, cores}):
        name = ALL_CORES if threads > 1 else ""
        cases["walks" + name] = Case(partial(measure.in_threads, walks, items, threads), len(items), threads)
        cases["exact" + name] = Case(partial(measure.in_threads, exact, items, threads), len(items), threads)
        if bench.dgl:
            cases["DGL sampler" + name] = Case(partial(bench.dgl.neighbours, few, WALKS, threads), len(few), threads)
    cases[f"exact, {OWN} wide, + 16 x 50"] = Case(partial(_compose, bench, items, OWN), len(items))
    cases[STEPS] = Case(partial(walk_ends, graph, items, per_hop, seed), len(items), steps=steps)
    if bench.dgl:
        cases["DGL random_walk alone"] = Case(partial(bench.dgl.walk, few), len(few), steps=steps)
    if bench.walker:
        cases[WALKER] = Case(partial(bench.walker.walk, few), len(few), steps=WALKS * GraphWalker.STEPS)
    return cases


def measure_speed(cases: dict[str, Case], arrays: list[NDArray[Any]], rounds: int) -> dict[str, NDArray[np.float64]]:
    """Seconds an item of each case in each round, and of a "gather"; printed as medians.

    On one thread the processor's, with more by the clock.
    """
    timed = {name: case.work for name, case in cases.items()} | {"gather": partial(measure.gather, arrays, READS)}
    seconds = measure.alternate(timed, rounds)
    each = {
        name: (seconds[name].wall if case.threads > 1 else seconds[name].processor) / case.num_items
        for name, case in cases.items()
    }
    print(f"\n{'speed':32}{'threads':>8}{'us/item':>12}{'items/s':>12}{'ns/step':>10}   medians of {rounds} rounds")
    for name, case in cases.items():
        median = float(np.median(each[name]))
        step = f"{median / case.steps * 1e9:10.1f}" if case.steps else ""
        print(f"{name:32}{case.threads:8}{median * 1e6:12.1f}{1 / median:12,.0f}{step}")
    return each | {"gather": seconds["gather"].processor / (len(arrays) * READS)}


def measure_quality(bench: Bench, sample: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Overlap, mass and L1 error of each contender at several sizes, printed; error is the overlap's standard error."""
    graph, seed = bench.graph, bench.seed
    exact = measure.exact_ppr(graph, sample, NEIGHBOURS, RESTART)
    tried: dict[str, Callable[[], measure.Found]] = {}
    for num_walks in (WALKS, 8 * WALKS, 32 * WALKS):
        per_hop = walks_per_hop(num_walks, HOPS, RESTART)
        tried[f"walks {num_walks}"] = partial(visit_counts, graph, sample, per_hop, NEIGHBOURS, seed)
    for budget in (BUDGET // 4, BUDGET, 4 * BUDGET):
        tried[f"exact {budget}"] = partial(exact_neighbours, graph, sample, NEIGHBOURS, budget)
    for own in (NEIGHBOURS, OWN):
        tried[f"exact {BUDGET}, {own} wide, + 16 x 50"] = partial(_compose, bench, sample, own)
    if bench.dgl:
        tried |= {f"DGL {num_walks}": partial(bench.dgl.found, sample, num_walks) for num_walks in DGL_WALKS}
    print(f"\n{'quality':32}{'overlap':>16}{'mass':>12}{'L1':>10}   means of {len(sample)} queries")
    scores = {}
    for name, find in tried.items():
        each = measure.quality(find(), exact)
        mean = {score: float(np.nanmean(values)) for score, values in each.items()}
        mean["error"] = float(np.nanstd(each["overlap"]) / math.sqrt(len(sample)))
        overlap = f"{mean['overlap']:.3f} +-{mean['error']:.3f}"
        print(f"{name:32}{overlap:>16}{mean['mass']:12.3f}{mean['l1']:10.2f}", flush=True)
        scores[name] = mean
    return scores


def time_of_equal_overlap(
    dgl: Dgl, sample: NDArray[np.int64], first: float, scores: dict[str, dict[str, float]]
) -> tuple[float, bool]:
    """Seconds an item in which one thread of DGL reaches the overlap of exact, and whether it does; first: at WALKS."""
    few = sample[:16]
    others = {str(walks): partial(dgl.neighbours, few, walks, 1) for walks in DGL_WALKS[1:]}
    seconds = [first, *(times.processor.min() / len(few) for times in measure.alternate(others, 2).values())]
    overlap = scores[f"exact {BUDGET}"]["overlap"]
    curve = [(scores[f"DGL {walks}"]["overlap"], spent) for walks, spent in zip(DGL_WALKS, seconds, strict=True)]
    equal, reached = at_equal_overlap(curve, overlap)
    times = ", ".join(f"{walks} walks {spent * 1e6:,.0f}" for walks, spent in zip(DGL_WALKS, seconds, strict=True))
    print(f"\nDGL, us/item on one thread: {times}")
    print(f"it reaches the overlap of exact, {overlap:.3f}, in {equal * 1e6:,.0f}{'' if reached else ' or more'}")
    return equal, reached


def run(items: int, users: int, edges: int, queries: int, rounds: int, batch: int, seed: int) -> dict[str, Any]:
    """Measure, print the tables, and return what the last line says."""
    about = measure.machine()
    print("\n".join(f"{name:12} {value}" for name, value in about.items()), flush=True)
    graph = generate.graph(items, users, edges, seed)
    arrays: list[NDArray[Any]] = [graph.item_indptr, graph.item_users, graph.user_indptr, graph.user_items]
    mebibytes = sum(array.nbytes for array in arrays) / 2**20
    print(
        f"{'graph':12} {items:,} items, {users:,} users, {edges:,} edges; {mebibytes:,.0f} MiB, seed {seed}", flush=True
    )
    cores = measure.num_cores()
    bench = Bench(
        graph, all_rows(graph, cores), _try(Dgl, graph, "DGL"), _try(GraphWalker, graph, "graph-walker"), seed
    )
    random = np.random.default_rng(seed)
    cases = speed_cases(bench, random.choice(items, min(batch, items), replace=False), cores)
    each = measure_speed(cases, arrays, rounds)
    step_ns, gather_ns = each[STEPS] / cases[STEPS].steps * 1e9, each["gather"] * 1e9
    ratio = float(np.median(step_ns / (2 * gather_ns)))
    print(f"a gather takes {np.median(gather_ns):.2f} ns, a step at least 2 gathers: it takes {ratio:.2f} times that")

    sample = random.choice(np.flatnonzero(np.diff(graph.item_indptr)), min(queries, items // 2), replace=False)
    scores = measure_quality(bench, sample)
    results: dict[str, Any] = dict.fromkeys(KEYS)
    results |= {
        "step_ns_vs_gather_ns": ratio,
        "overlap_walks": scores[f"walks {WALKS}"]["overlap"],
        "overlap_exact": scores[f"exact {BUDGET}"]["overlap"],
        "mass_exact": scores[f"exact {BUDGET}"]["mass"],
        "exact_time_vs_walks": float(np.median(each["exact"] / each["walks"])),
        "step_ns": float(np.median(step_ns)),
        "gather_ns": float(np.median(gather_ns)),
    }
    if bench.dgl:
        every = ALL_CORES if cores > 1 else ""
        equal, reached = time_of_equal_overlap(bench.dgl, sample, float(np.median(each["DGL sampler"])), scores)
        results |= {
            "items_per_s_vs_dgl_1core": float(np.median(each["DGL sampler"] / each["walks"])),
            "items_per_s_vs_dgl_all": float(np.median(each["DGL sampler" + every] / each["walks" + every])),
            "items_per_s_vs_dgl_equal_overlap": equal / float(np.median(each["exact"])),
            "equal_overlap_is_a_lower_bound": not reached,
            "overlap_dgl": scores[f"DGL {WALKS}"]["overlap"],
        }
    if bench.walker:
        results["step_ns_graph_walker"] = float(np.median(each[WALKER])) / cases[WALKER].steps * 1e9
    after = measure.load()
    quiet = about["load"][0] < 1.0 and after[0] < cores + 0.5
    print(f"load average {about['load']} before, {after} after" + ("" if quiet else LOADED) + "\n")
    return results | {
        "us_per_item": {name: float(np.median(each[name])) * 1e6 for name in cases},
        "quality": scores,
        "graph": {"items": items, "users": users, "edges": edges, "seed": seed},
        "quiet": quiet,
        "machine": about | {"load_after": after},
    }


def _compose(bench: Bench, items: NDArray[np.int64], own: int) -> measure.Found:
    """The own first of the first hop, and 50 each of the rows of the first 16 of them; the 50 best of the sum."""
    nearest = exact_neighbours(bench.graph, items, own, BUDGET)
    return compose(bench.rows, items, 16, 50, RESTART, NEIGHBOURS, bench.graph.item_ranks, own=nearest)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a small graph and fewer rounds: half a minute, for a look"
    )
    parser.add_argument("--items", type=int)
    parser.add_argument("--users", type=int)
    parser.add_argument("--edges", type=int)
    parser.add_argument("--queries", type=int, help="items whose exact PageRank is computed")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--batch", type=int, help="items in one timed call; an eighth of them for the slower peers")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    sizes: dict[str, int] = {
        "items": 1_000_000,
        "users": 300_000,
        "edges": 17_100_000,
        "queries": 64,
        "rounds": 7,
        "batch": 32_768,
    }
    if given.quick:
        sizes = {"items": 100_000, "users": 30_000, "edges": 1_710_000, "queries": 32, "rounds": 3, "batch": 8_192}
    sizes |= {name: value for name, value in vars(given).items() if name in sizes and value}
    results = run(**sizes, seed=given.seed)
    print(json.dumps(results, default=float))


if __name__ == "__main__":
    main()
