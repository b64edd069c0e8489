"""What benchmarks share: the machine in words, times taken in alternation, exact PageRank, and quality against it."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pipeline.walk_kernel import BipartiteGraph

Found = tuple[NDArray[np.uint32], NDArray[Any], NDArray[np.int64]]  # ids and scores [B, T], lengths [B]
LANES = 16  # queries that power iteration carries together


class Seconds(NamedTuple):
    """Of each round: by the clock, and of the processor, all threads together."""

    wall: NDArray[np.float64]
    processor: NDArray[np.float64]


def machine() -> dict[str, Any]:
    """What a figure is worthless without: when, on what, with which versions, and what else was running."""
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    packages = ("numpy", "numba", "dgl", "torch", "faiss-cpu", "graph-walker")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": num_cores(),
        "memory_gib": round(memory[0] / 2**20, 1) if memory else None,
        "huge_pages": "".join(_lines("/sys/kernel/mm/transparent_hugepage/enabled")).strip(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "load": load(),
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> list[float]:
    """Load average of the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def alternate(cases: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Seconds]:
    """Times of every case in every round, all cases in turn, after one call of each that is not counted.

    On a shared machine a neighbour's load then falls on all alike: compare medians, or ratios within a round. What runs
    on one core is told best by the processor's time, which does not pass while another process has the core.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(rounds):
        for name, case in cases.items():
            wall, processor = time.perf_counter(), time.process_time()
            case()
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {name: Seconds(*np.array(values).T) for name, values in times.items()}


def in_threads(work: Callable[[NDArray[Any]], Any], items: NDArray[Any], threads: int) -> list[Any]:
    """work on `items` cut into pieces, in that many threads: for compiled functions, which run without the lock."""
    if threads == 1:
        return [work(items)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, np.array_split(items, 4 * threads)))


def gather(arrays: Iterable[NDArray[Any]], num_reads: int) -> int:
    """num_reads independent reads at random places of each array; returns their sum.

    They overlap as far as the core allows: their time is what a read of a walk's step costs at the least, if all
    places are alike. (Walks visit popular rows more often, which caches notice.)
    """
    return sum(int(_gather(array, np.int64(num_reads))) for array in arrays)


@numba.njit(cache=True, nogil=True)
def _gather(array: Any, num_reads: Any) -> Any:
    size, total = np.uint64(len(array)), np.int64(0)
    for k in range(num_reads):
        value = (np.uint64(k) + np.uint64(88172645463325252)) * np.uint64(0xD1342543DE82EF95)
        value = (value ^ (value >> np.uint64(32))) * np.uint64(0xD1342543DE82EF95)
        total += np.int64(array[((value >> np.uint64(32)) * size) >> np.uint64(32)])
    return total


@dataclass(frozen=True)
class Exact:
    """Exact personalised PageRank of some items: every item's score, and the items of the T highest, best first."""

    items: NDArray[np.int64]  # [B]
    scores: NDArray[np.float32]  # [B, N], 0 for the item itself
    top: NDArray[np.uint32]  # [B, T]
    lengths: NDArray[np.int64]  # [B]: how many of top have any score


def exact_ppr(
    graph: BipartiteGraph,
    items: NDArray[np.int64],
    num_neighbours: int,
    restart_probability: float = 0.5,
    max_hops: int = 14,
    threads: int | None = None,
) -> Exact:
    """Expected visits of a walk by power iteration, weighted if the graph is; 14 hops at 0.5 leave out 1 in 16 000.

    Holds [B, N] float32, both matrices (8 bytes an edge and direction), and 200 bytes an item for each thread.
    """
    num_items, num_users = len(graph.item_indptr) - 1, len(graph.user_indptr) - 1
    to_users = _received(graph.item_indptr, graph.item_users, graph.item_shares, num_users)
    to_items = _received(graph.user_indptr, graph.user_items, graph.user_shares, num_items)
    scores = np.zeros((len(items), num_items), np.float32)

    def spread(first: int) -> None:
        group = items[first : first + LANES]
        here = np.zeros((num_items, len(group)), np.float32)
        total = np.zeros_like(here)
        here[group, np.arange(len(group))] = 1.0
        for hop in range(max_hops):
            here = to_items @ (to_users @ here)
            total += np.float32((1.0 - restart_probability) ** hop) * here
        scores[first : first + len(group)] = total.T

    with ThreadPoolExecutor(threads or num_cores()) as pool:
        list(pool.map(spread, range(0, len(items), LANES)))
    scores[np.arange(len(items)), items] = 0.0
    width = min(num_neighbours, num_items)
    top = np.empty((len(items), width), np.uint32)
    for row in range(len(items)):
        best = np.argpartition(-scores[row], width - 1)[:width]
        top[row] = best[np.lexsort((best, -scores[row, best]))]
    lengths = (np.take_along_axis(scores, top.astype(np.int64), axis=1) > 0).sum(axis=1)
    return Exact(items, scores, top, lengths)


def _received(
    indptr: NDArray[np.int64], ids: NDArray[np.uint32], shares: NDArray[np.uint32], num_columns: int
) -> sparse.csr_matrix:
    """What each column receives of each row's mass, as a matrix [columns, rows]; shares as BipartiteGraph has them."""
    degrees = np.diff(indptr)
    if len(shares):
        before = np.concatenate([[-1], shares[:-1].astype(np.int64)])
        before[indptr[:-1][degrees > 0]] = -1
        parts = ((shares - before) / 2.0**32).astype(np.float32)
    else:
        parts = np.repeat(1.0 / np.maximum(degrees, 1), degrees).astype(np.float32)
    return sparse.csr_matrix((parts, ids.astype(np.int64), indptr), (len(degrees), num_columns)).T.tocsr()


def quality(found: Found, exact: Exact) -> dict[str, NDArray[np.float64]]:
    """Each query's found neighbours against the exact top T.

    overlap: the share of the exact top that was found. mass: the exact scores of the found, by those of the exact top.
    l1: the sum of absolute differences between the two sets' weights, each normalised to 1, so from 0 to 2. Queries
    without any exact neighbour are nan.
    """
    ids, weights, lengths = found
    results = {name: np.full(len(ids), np.nan) for name in ("overlap", "mass", "l1")}
    for row in range(len(ids)):
        top = exact.top[row, : exact.lengths[row]]
        if not len(top):
            continue
        kept = ids[row, : lengths[row]][: len(top)]
        best, got = exact.scores[row, top].astype(np.float64), weights[row, : len(kept)].astype(np.float64)
        results["overlap"][row] = np.isin(top, kept).mean()
        results["mass"][row] = exact.scores[row, kept].sum(dtype=np.float64) / best.sum()
        union, place = np.unique(np.concatenate([top, kept]), return_inverse=True)
        signed = np.concatenate([best / best.sum(), -got / max(got.sum(), 1e-300)])
        results["l1"][row] = np.abs(np.bincount(place, signed, len(union))).sum()
    return results
