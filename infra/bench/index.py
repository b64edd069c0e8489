"""The index against autofaiss and against plain FAISS by hand: build time, and queries a second at equal recall.

    python -m infra.bench.index [--quick] [--vectors N] [--autofaiss PYTHON]

Everyone gets the same vectors, the same memory (bytes per vector) and all cores. Ours is `pipeline.index` through Spark
with two executor threads, reading checksummed Parquet; autofaiss reads the same vectors as .npy files, in a process of
its own, whose Python is given as it needs an older numpy than ours; by hand is FAISS's IVF,Flat, trained and filled in
one process. Every index is then searched by this process, on one thread, told in processor time, in alternation; its
recall is that of 1 000 queries that nobody saw before.

Memory: the index under test and a block of vectors. Disk: twice the vectors and all indexes, below --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infra.bench import measure
from infra.bench.scale import tree_usage
from pipeline.ann import recall
from pipeline.ann.choice import count_lists
from pipeline.ann.parts import list_sizes, omp_threads, split
from pipeline.ann.recall import Exact
from pipeline.ann.searching import Search, k_factors, parameters, widths
from pipeline.contracts import datasets
from pipeline.contracts.config import Settings, parse_settings
from pipeline.contracts.datasets import Lineage
from pipeline.contracts.schemas import EMBEDDINGS, INDEX_LOG, INDEX_STAGE
from pipeline.contracts.storage import Storage

Floats = NDArray[np.float32]
BLOCK = 100_000
QUERIES, K, TARGET = 1000, 10, 0.95
INTRINSIC, CENTRES = 40, 20_000
AUTOFAISS = """
import json, sys, time
from autofaiss import build_index
folder, index, memory, cores = sys.argv[1:5]
started = time.monotonic()
build_index(
    folder, index_path=index, index_infos_path=index + ".json", metric_type="ip", nb_cores=int(cores),
    max_index_memory_usage=memory, current_memory_available=sys.argv[5], min_nearest_neighbors_to_retrieve=10,
)
print(json.dumps({"seconds": time.monotonic() - started}))
"""


# ------------------------------------------------------------------------------------------------ vectors


def blocks(number: int, width: int, kind: str, seed: int) -> Iterator[Floats]:
    """Vectors of one kind, block by block, from the seed and the block alone.

    clustered: unit vectors of 40 intrinsic dimensions around 20 000 centres, of uneven sizes; uniform: in all
    directions; duplicates: nine tenths are copies of a thousand of the clustered.
    """
    shape = np.random.default_rng([seed, 0])
    centres = shape.normal(size=(CENTRES, INTRINSIC)).astype(np.float32)
    embed = (shape.normal(size=(INTRINSIC, width)) / INTRINSIC**0.5).astype(np.float32)
    chances = 1.0 / np.arange(10, CENTRES + 10)
    chances /= chances.sum()
    for start in range(0, number, BLOCK):
        rng = np.random.default_rng([seed, 1, start])
        size = min(BLOCK, number - start)
        if kind == "uniform":
            yield _unit(rng.standard_normal((size, width), np.float32))
            continue
        inner = centres[rng.choice(CENTRES, size, p=chances)] + 0.7 * rng.standard_normal((size, INTRINSIC), np.float32)
        vectors = _unit(inner @ embed + 0.05 * rng.standard_normal((size, width), np.float32))
        if kind == "duplicates":
            some = _unit(centres[:1000] @ embed)
            copied = rng.random(size) < 0.9
            vectors[copied] = some[rng.integers(len(some), size=int(copied.sum()))]
        yield vectors


def _unit(vectors: Floats) -> Floats:
    unit: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def write(folder: Path, number: int, width: int, kind: str, seed: int) -> None:
    """The vectors as a run's embeddings, and as .npy files beside it; kept if they are there."""
    storage = Storage(str(folder / "run"))
    lineage = Lineage("bench", {"number": number, "width": width, "kind": kind, "seed": seed}, {})
    if datasets.finished_manifest(storage, EMBEDDINGS, lineage):
        return
    (folder / "npy").mkdir(parents=True, exist_ok=True)
    shards, start = [], 0
    for place, vectors in enumerate(blocks(number, width, kind, seed)):
        np.save(folder / "npy" / f"{place:05d}.npy", vectors)
        ids = np.arange(start, start + len(vectors))
        table = pa.table(
            {
                "key": pa.array(ids.astype(str), pa.string()), "id": pa.array(ids, pa.uint32()),
                "embedding": datasets.vectors_to_arrow(vectors),
            }
        )  # fmt: skip
        shards.append(datasets.write_shard(storage, EMBEDDINGS, place, table, lineage))
        start += len(vectors)
    datasets.commit(storage, EMBEDDINGS, shards, lineage)


def loaded(folder: Path) -> Iterator[Floats]:
    """The stored vectors, block by block."""
    for path in sorted((folder / "npy").glob("*.npy")):
        yield np.load(path)


# ------------------------------------------------------------------------------------------------ builds


def settings_of(folder: Path, memory: int | None) -> Settings:
    """Ours, with all cores: tasks of one thread side by side, and the driver with all threads when none runs."""
    cores = measure.num_cores()
    data = {"interactions": {"paths": "none.parquet", "user": "u", "item": "i", "timestamp": "t"}}
    resources = {
        "run": str(folder / "run"), "cache": str(folder / "cache"), "index": {"threads": cores},
        "spark": {"master": f"local[{cores}]"},
    }  # fmt: skip
    task = {"data": data, "index": {"memory": memory, "recall_target": TARGET, "k": K}}
    return parse_settings({"task": task, "resources": resources})


def build_ours(folder: Path, memory: int | None) -> None:
    """The stage as a job runs it, Spark's start included."""
    from pipeline import index
    from pipeline.session import session

    settings = settings_of(folder, memory)
    storage = Storage(settings.resources.run)
    started = time.monotonic()
    spark = session(settings.resources.spark, "bench")
    index.run(spark, storage, settings, datasets.trace(storage, INDEX_STAGE, settings))
    spark.stop()
    print(json.dumps({"seconds": time.monotonic() - started}))


def build_by_hand(folder: Path, target: Path) -> None:
    """What FAISS's wiki says to type: IVF,Flat with about 4 sqrt(N) lists, trained on 50 vectors for each."""
    started = time.monotonic()
    paths = sorted((folder / "npy").glob("*.npy"))
    number = sum(len(np.load(path, mmap_mode="r")) for path in paths)
    nlist = count_lists(number, number)
    share = min(1.0, 50 * nlist / number)
    sample = np.concatenate([block[: int(len(block) * share)] for block in loaded(folder)])
    index = faiss.index_factory(sample.shape[1], f"IVF{nlist},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(sample)
    for block in loaded(folder):
        index.add(block)
    faiss.write_index(index, str(target))
    print(json.dumps({"seconds": time.monotonic() - started}))


@dataclass(frozen=True)
class Built:
    """An index on disk and what it took: seconds by the clock, of the processor, and the load when it began."""

    file: Path
    seconds: float
    core_seconds: float
    load: float


def in_process(name: str, command: list[str], file: Path) -> Built | None:
    """Run a build alone, unless a kept folder has it; None, with its last words, if it fails."""
    note = file.parent / f"{name.replace(' ', '-')}.json"
    if file.exists() and note.exists():
        return Built(file, **json.loads(note.read_text()))
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.getcwd()}
    load, used = os.getloadavg()[0], dict[str, float]()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(process.communicate)
        while not said.done():
            tree_usage(process.pid, used)  # Spark's workers are nobody's children in the end
            time.sleep(0.5)
    output, errors = said.result()
    if process.returncode or not file.exists():
        print(f"{name} left out: {(errors or output).strip()[-400:]}", flush=True)
        return None
    seconds, spent = json.loads(output.strip().splitlines()[-1])["seconds"], sum(used.values())
    print(f"{name:12} built in {seconds:7.1f} s ({spent:.0f} core-s), {file.stat().st_size:,} bytes; load {load:.1f}")
    sys.stdout.flush()
    note.write_text(json.dumps({"seconds": seconds, "core_seconds": spent, "load": load}))
    return Built(file, seconds, spent, load)


# ------------------------------------------------------------------------------------------------ search


@dataclass(frozen=True)
class Contender:
    """An opened index, the narrowest search that reaches the target, and its recall."""

    index: faiss.Index
    search: Search
    recall: float


def fresh_queries(width: int, kind: str, seed: int) -> Floats:
    """Vectors of the same kind that are no item and were shown to nobody."""
    generated = next(blocks(BLOCK, width, kind, seed + 1_000_000)) if kind == "uniform" else None
    if generated is None:  # the same centres, other draws
        generated = _others(width, kind, seed)
    return np.ascontiguousarray(generated[:QUERIES])


def _others(width: int, kind: str, seed: int) -> Floats:
    shape = np.random.default_rng([seed, 0])
    centres = shape.normal(size=(CENTRES, INTRINSIC)).astype(np.float32)
    embed = (shape.normal(size=(INTRINSIC, width)) / INTRINSIC**0.5).astype(np.float32)
    chances = 1.0 / np.arange(10, CENTRES + 10)
    rng = np.random.default_rng([seed, 2])
    picked = centres[rng.choice(CENTRES, QUERIES, p=chances / chances.sum())]
    inner = picked + 0.7 * rng.standard_normal((QUERIES, INTRINSIC), np.float32)
    return _unit(inner @ embed + 0.05 * rng.standard_normal((QUERIES, width), np.float32))


def exact(folder: Path, queries: Floats) -> Exact:
    """True neighbours of the queries."""
    nobody = np.full(len(queries), -1)

    def parts() -> Iterator[Exact]:
        first = 0
        for block in loaded(folder):
            yield recall.exact_neighbours(queries, nobody, block, first, recall.depth(K))
            first += len(block)

    return recall.merge_exact(parts())


def narrowest(index: faiss.Index, queries: Floats, truth: Exact) -> Contender:
    """For each k_factor the narrowest search that reaches the target, to a sixteenth; of those the fastest.

    If none reaches it: what finds most.
    """
    nobody = np.full(len(queries), -1)
    name, values = widths(index)
    enough: list[Contender] = []
    short: list[Contender] = []

    def attempt(width: int, factor: int) -> Contender:
        search: Search = ({name: width} if name else {}) | ({"k_factor": factor} if factor else {})
        share = float(recall.hits(index, queries, nobody, truth, K, search).mean())
        return Contender(index, search, share)

    for factor in k_factors(index) or (0,):
        low = 0
        for width in values:
            tried = attempt(width, factor)
            if tried.recall >= TARGET:
                enough.append(_narrowed(partial(attempt, factor=factor), low, width, tried))
                break
            if factor and low and tried.recall - short[-1].recall < 1e-3:
                break  # more lists no longer help: more must be re-ranked
            low = width
            short.append(tried)
    if not enough:
        return max(short, key=lambda tried: tried.recall)
    return min(enough, key=lambda tried: _cost(index, queries, tried.search))


def _narrowed(attempt: Callable[[int], Contender], low: int, high: int, best: Contender) -> Contender:
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        tried = attempt(middle)
        if tried.recall >= TARGET:
            high, best = middle, tried
        else:
            low = middle
    return best


def _cost(index: faiss.Index, queries: Floats, search: Search) -> float:
    """Processor seconds of all queries, the least of three."""
    chosen = parameters(index, search)
    spent = []
    for _ in range(3):
        started = time.process_time()
        index.search(queries, K, params=chosen)
        spent.append(time.process_time() - started)
    return min(spent)


def spark_equals_one(folder: Path) -> bool:
    """Whether the published index is, byte for byte, the trained one filled in this process."""
    published = folder / "run" / "index"
    index = faiss.read_index(str(published / "trained.faiss"))
    for block in loaded(folder):
        index.add(block)
    return bytes(faiss.serialize_index(index).data) == (published / "index.faiss").read_bytes()


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write vectors, build, search; print the tables and return what the last line says."""
    about = measure.machine()
    print("\n".join(f"{name:12} {value}" for name, value in about.items()), flush=True)
    number, width, kind, seed = arguments.vectors, arguments.width, arguments.kind, arguments.seed
    memory = arguments.bytes_per_vector * number
    write(folder, number, width, kind, seed)
    print(f"{'vectors':12} {number:,} {kind} of {width} dimensions, seed {seed}; {memory:,} bytes for the index\n")
    us = [sys.executable, "-m", "infra.bench.index"]
    common = ["--folder", str(folder), "--bytes-per-vector", str(arguments.bytes_per_vector), "--vectors", str(number)]
    jobs: dict[str, tuple[list[str], Path]] = {
        "ours": ([*us, "--build", "ours", *common], folder / "run" / "index" / "index.faiss"),
    }
    if arguments.autofaiss:
        available = f"{int(about['memory_gib'] * 0.7)}G"
        peer = [arguments.autofaiss, "-c", AUTOFAISS, str(folder / "npy"), str(folder / "peer.index"), f"{memory}B"]
        jobs["autofaiss"] = ([*peer, str(measure.num_cores()), available], folder / "peer.index")
    jobs["by hand"] = ([*us, "--build", "hand", *common], folder / "hand.index")
    built = {name: made for name, (command, file) in jobs.items() if (made := in_process(name, command, file))}
    queries = fresh_queries(width, kind, seed)
    truth = exact(folder, queries)
    contenders = {}
    with omp_threads(measure.num_cores()):
        opened = {name: faiss.read_index(str(made.file)) for name, made in built.items()}
        for name, index in opened.items():
            contenders[name] = narrowest(index, queries, truth)
        report = json.loads((folder / "run" / "index" / "recall.json").read_text())
        published = recall.hits(opened["ours"], queries, np.full(QUERIES, -1), truth, K, report["search"]).mean()
    cases: dict[str, Callable[[], Any]] = {
        name: partial(c.index.search, queries, K, params=parameters(c.index, c.search))
        for name, c in contenders.items()
    }
    with omp_threads(1):
        seconds = measure.alternate(cases, arguments.rounds)
    print(f"\n{'index':12}{'search':>34}{'recall@10':>11}{'queries/s':>11}{'build s':>9}{'bytes/vector':>14}")
    for name, contender in contenders.items():
        rate = QUERIES / float(np.median(seconds[name].processor))
        search = ", ".join(f"{key} {value}" for key, value in contender.search.items())
        bytes_each = built[name].file.stat().st_size / number
        print(f"{name:12}{search:>34}{contender.recall:11.4f}{rate:11,.0f}{built[name].seconds:9.1f}{bytes_each:14.1f}")
    print(f"ours as published: {report['factory']} {report['search']}, recall {published:.4f} on fresh queries")
    sizes = list_sizes(opened["ours"])
    clock = json.loads((folder / "run" / INDEX_LOG / "clock.json").read_text())
    print("build:", ", ".join(f"{name} {value:.1f} s" for name, value in clock["seconds"].items()))
    results: dict[str, Any] = dict.fromkeys(("qps_vs_autofaiss", "build_time_vs_autofaiss", "autofaiss_recall"))
    ours = seconds["ours"].processor
    for name in ("autofaiss", "by hand"):
        if name in contenders:
            key = name.replace("by hand", "hand")
            results[f"qps_vs_{key}"] = float(np.median(seconds[name].processor / ours))
            results[f"build_time_vs_{key}"] = built["ours"].seconds / built[name].seconds
            results[f"core_seconds_vs_{key}"] = built["ours"].core_seconds / built[name].core_seconds
            results[f"{key}_recall"] = contenders[name].recall
    results |= {
        "recall_at_10": float(published), "recall_reached": report["reached"], "factory": report["factory"],
        "search": report["search"], "equal_recall": contenders["ours"].recall,
        "largest_list": None if sizes is None else int(sizes.max()),
        "queries_per_second": {n: QUERIES / float(np.median(s.processor)) for n, s in seconds.items()},
        "build_seconds": {name: made.seconds for name, made in built.items()},
        "build_load": {name: made.load for name, made in built.items()},
        "peer": _kind(opened["autofaiss"]) if "autofaiss" in opened else None,
        "vectors": {"number": number, "width": width, "kind": kind, "seed": seed, "memory": memory},
        "quiet": max(made.load for made in built.values()) < 1.5,
        "machine": about | {"load_after": measure.load()},
    }  # fmt: skip
    if arguments.check:
        with omp_threads(1):
            results["spark_equals_one_process"] = spark_equals_one(folder)
    return results


def _kind(index: faiss.Index) -> str:
    return type(split(index)[0]).__name__


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 000 vectors: a minute, for a look")
    parser.add_argument("--vectors", type=int)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--kind", choices=("clustered", "uniform", "duplicates"), default="clustered")
    parser.add_argument("--bytes-per-vector", type=int, default=800, help="the memory that every index may take")
    parser.add_argument("--autofaiss", help="a Python that has autofaiss, or it is left out; see the README beside")
    parser.add_argument("--folder", type=Path, help="where vectors and indexes are kept; else a temporary one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--check", action="store_true", help="also fill the index in one process and compare the bytes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--build", choices=("ours", "hand"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    arguments.vectors = arguments.vectors or (100_000 if arguments.quick else 1_000_000)
    if arguments.build == "ours":
        build_ours(arguments.folder, arguments.bytes_per_vector * arguments.vectors)
    elif arguments.build == "hand":
        build_by_hand(arguments.folder, arguments.folder / "hand.index")
    elif arguments.folder:
        print(json.dumps(run(arguments, arguments.folder), default=float))
    else:
        with tempfile.TemporaryDirectory(prefix="pinsage-bench-") as folder:
            print(json.dumps(run(arguments, Path(folder)), default=float))


if __name__ == "__main__":
    main()
