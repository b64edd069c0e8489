"""Measure what `pinsage plan` calculates with, on this machine, in about a minute: `pinsage plan --calibrate`.

Every rate is the processor time, on one core while the others are busy, of the functions that the stages themselves
call, on made-up events with communities and hubs; only disks, and what Spark adds, are taken by the clock. Random reads
are measured on two sizes of graph, memory-mapped as in a run. Memory: about 2 GB. Disk: about 1 GB in the temporary
folder, removed afterwards.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.optimize import nnls

from pipeline import clusters, event_kernel, graph_kernel, keys, sources
from pipeline.contracts import schemas
from pipeline.contracts.config import InteractionsSource
from pipeline.contracts.datasets import (
    Lineage,
    Shard,
    arrow_to_lists,
    arrow_to_vectors,
    commit,
    lists_to_arrow,
    read_shard,
    vectors_to_arrow,
    write_shard,
)
from pipeline.contracts.replica import map_lists, map_vectors
from pipeline.contracts.storage import Storage
from pipeline.exact_kernel import Rows, compose, exact_neighbours, prefix_lengths
from pipeline.exchange import gather, write_blocks
from pipeline.neighbourhoods import neighbour_rows
from pipeline.pairs import consecutive_pairs
from pipeline.plan import REFERENCE_BYTES, Rates
from pipeline.shipping import first_entries
from pipeline.walk_kernel import BipartiteGraph, degree_ranks, visit_counts, walk_ends, walks_per_hop

Measured = dict[str, float]
Say = Callable[[str], None]
_LINEAGE = Lineage("calibrate", {}, {})
_TOP = 50
_EVENTS = pa.schema(
    [("user_id", pa.uint32()), ("item_id", pa.uint32()), ("timestamp", pa.int64()), ("weight", pa.float32())]
)
_EDGES = pa.schema([("user", pa.uint32()), ("item", pa.uint32())])


def calibrate(say: Say = lambda _: None, size: float = 1.0, busy_cores: int = 0) -> Rates:
    """All rates of this machine, while so many other cores read memory at random, as they do in a run.

    size shrinks what is measured on: below 1 for tests, whose rates mean little.
    """
    rows, found = max(20_000, int(1_000_000 * size)), Measured()
    with tempfile.TemporaryDirectory(prefix="pinsage-calibrate-") as name, _busy(busy_cores):
        folder = Path(name)
        storage = Storage(str(folder / "run"))
        events = _events(rows)
        parts: list[tuple[str, Callable[[], Measured]]] = [
            ("disk", lambda: _disk(folder, max(1 << 20, int(size * (512 << 20))))),
            ("ingest", lambda: {**_files(folder, events), **_keys(events, size), **_shards(storage, events)}),
            ("exchange", lambda: _exchange(storage, events)),
            ("graph", lambda: _graph_stage(storage, folder, events)),
            ("vectors", lambda: {**_vectors(storage, folder, size), **_torch(size)}),
            ("walks", lambda: _walks(storage, folder, size)),
            ("Spark", _spark),  # last, when all that its worker loads has been compiled
        ]
        for label, measure in parts:
            started = time.perf_counter()
            found |= measure()
            say(f"calibrate: {label} measured in {time.perf_counter() - started:.1f} s")
            gc.collect()
    return Rates.of({rate.name: float(f"{found[rate.name]:.4g}") for rate in fields(Rates)}, "the calibration")


@contextmanager
def _busy(cores: int) -> Iterator[None]:
    """Processes that gather from 64 MiB each until the block ends; each ends by itself after five minutes."""
    code = (
        "import numpy, time\nend = time.time() + 300\ntable = numpy.zeros(1 << 24, numpy.float32)\n"
        "places = numpy.random.default_rng(0).integers(0, 1 << 24, 1 << 20)\n"
        "while time.time() < end: table[places].sum()"
    )
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(cores)]
    try:
        yield
    finally:
        for other in others:
            other.terminate()
            other.wait()


def _seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Processor time of work, the median of some calls after one that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return max(statistics.median(taken), 1e-7)


def _peak(work: Callable[[], Any]) -> int:
    """Bytes by which this process grows while it works; 0 where the system does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0

    def bytes_of(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

    before = bytes_of("VmRSS")
    work()
    return max(0, bytes_of("VmHWM") - before)


# ------------------------------------------------------------------------------------------------ made-up data


@dataclass(frozen=True)
class _Events:
    """Events by user: users lie together, in no order of ids."""

    users: NDArray[np.uint32]
    items: NDArray[np.uint32]
    times: NDArray[np.int64]
    num_users: int
    num_items: int

    @property
    def table(self) -> pa.Table:
        """As ingest sends them."""
        return pa.table([self.users, self.items, self.times, np.ones(len(self.users), np.float32)], schema=_EVENTS)


def _events(rows: int) -> _Events:
    """100 events a user and 20 an item: most in the user's topic of a thousand items, others anywhere, hubs first."""
    num_users, num_items = max(20, rows // 100), max(100, rows // 20)
    random = np.random.default_rng(0)
    shares = random.lognormal(0.0, 0.93, num_users)
    lengths = np.maximum(1, np.floor(shares / shares.sum() * rows)).astype(np.int64)
    users = np.repeat(random.permutation(num_users).astype(np.uint32), lengths)
    topics = np.repeat(random.integers(0, max(1, num_items // 1024), num_users), lengths)
    near = np.floor(1024 * random.random(len(users), np.float32) ** 2.5).astype(np.int64)
    far = np.floor(num_items * random.random(len(users), np.float32) ** 3).astype(np.int64)
    places = np.where(random.random(len(users), np.float32) < 0.85, 1024 * topics + near, far)
    names = random.permutation(num_items).astype(np.uint32)
    items = names[np.minimum(places, num_items - 1)]
    return _Events(users, items, random.integers(1_600_000_000, 1_700_000_000, len(users)), num_users, num_items)


def _edges(events: _Events) -> tuple[graph_kernel.Rows, graph_kernel.Rows]:
    """Rows of users, shuffled, and of items, by the graph stage's own functions."""
    order = np.argsort(events.users, kind="stable")
    none = np.zeros(0, np.int64)
    columns = graph_kernel.Events(
        events.users[order], events.items[order], none, np.ones(len(order), np.float32), np.zeros(len(order), np.uint8)
    )
    rows = graph_kernel.merge_events(columns, 0, events.num_users, events.num_items, False, 0.0)[0]
    owners = np.repeat(np.arange(events.num_users, dtype=np.uint32), rows.degrees)
    back = graph_kernel.collect_rows(rows.ids, (owners, np.zeros(0), none), 0, events.num_items)
    graph_kernel.shuffle_rows(rows, 0, 1)
    return rows, back


def _mapped(folder: Path, name: str, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    found = []
    for number, array in enumerate(arrays):
        np.save(folder / f"{name}-{number}.npy", array)
        found.append(np.load(folder / f"{name}-{number}.npy", mmap_mode="r"))
    return found


# ------------------------------------------------------------------------------------------------ machine and Spark


def _disk(folder: Path, size: int) -> Measured:
    block, path = np.random.default_rng(0).bytes(1 << 20), folder / "disk"
    started = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(size >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass
    read = time.perf_counter() - started
    path.unlink()
    return {"disk_write_mbs": size / 1e6 / max(written, 1e-6), "disk_read_mbs": size / 1e6 / max(read, 1e-6)}


def _spark() -> Measured:
    """In a process of its own: a session of this one's would have to be shared or stopped."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "jobs.calibrate"], cwd=root, env={**os.environ, "PYTHONPATH": path}, check=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    found: Measured = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure_spark() -> Measured:
    from pipeline.contracts.config import SparkResources
    from pipeline.session import session
    from pipeline.spark import run_tasks

    started = time.perf_counter()
    spark = session(SparkResources(master="local[1]", driver_memory="1g"), "calibrate")
    session_seconds = time.perf_counter() - started

    def first(_: dict[str, Any]) -> dict[str, Any]:
        import pipeline.ingest  # noqa: F401
        from jobs import calibrate

        rows, back = calibrate._edges(calibrate._events(2_000))
        graph = calibrate._graph(rows, back)
        exact_neighbours(graph, np.arange(10), 5, 100)
        return {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}

    def timed(count: int) -> float:
        started = time.perf_counter()
        run_tasks(spark, [{}] * count, lambda task: task, "calibrate")
        return time.perf_counter() - started

    try:
        started = time.perf_counter()
        worker = run_tasks(spark, [{}], first, "calibrate")[0]["rss"] / 1024
        worker_seconds = time.perf_counter() - started
        step = min(timed(1) for _ in range(3))
        task = (min(timed(21) for _ in range(2)) - step) / 20
    finally:
        spark.stop()
    return {
        "session_seconds": session_seconds, "worker_seconds": worker_seconds, "step_seconds": step,
        "task_seconds": max(task, 1e-4), "worker_mib": worker,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ ingest


def _files(folder: Path, events: _Events) -> Measured:
    path, count = folder / "events.parquet", len(events.users)
    table = pa.table({"user": events.users * np.int64(7919), "item": events.items * np.int64(7919), "at": events.times})
    pq.write_table(
        table, path, compression="zstd", use_dictionary=["user"],
        column_encoding={"item": "DELTA_BINARY_PACKED", "at": "DELTA_BINARY_PACKED"},
    )  # fmt: skip
    source = InteractionsSource(paths=(str(path),), user="user", item="item", timestamp="at")
    task = sources.plan_interactions(source, count)[0]

    def read() -> Any:
        return sources.read_interactions(task, source, ["user", "item"])

    return {"read_event_ns": 1e9 * _seconds(read) / count, "raw_event_bytes": path.stat().st_size / count}


def _keys(events: _Events, size: float) -> Measured:
    items = pa.array(events.items.astype(np.int64))
    hashing = _seconds(lambda: keys.distinct(keys.hashed(items)))
    found = []
    for count in (max(1000, int(1_000_000 * size)), max(2000, int(32_000_000 * size))):
        hashes = np.sort(keys.hashed(pa.array(np.arange(count))).hashes)
        table = keys.KeyTable(hashes, None, None)
        indexing = _seconds(partial(keys.KeyTable, hashes, None, None), 1) / count
        wanted = keys.Keys(np.random.default_rng(1).permutation(hashes[:: max(1, count // 500_000)]))
        found.append((8.0 * count, 1e9 * _seconds(partial(table.find, wanted)) / len(wanted)))
    rates = _doublings(*found[0], *found[1])
    hashed = 1e9 * _seconds(lambda: keys.hashed(items)) / len(items)
    return {
        "hash_key_ns": 1e9 * hashing / len(items), "find_key_ns": rates[0] + hashed, "find_key_ns_doubling": rates[1],
        "index_key_ns": 1e9 * indexing,
    }  # fmt: skip


def _doublings(small: float, fast: float, large: float, slow: float) -> tuple[float, float]:
    """A rate at REFERENCE_BYTES and for each doubling beyond, from the rates at two sizes."""
    beyond = np.log2(max(large, 2.0 * REFERENCE_BYTES) / max(small, REFERENCE_BYTES))
    per_doubling = max(0.0, slow - fast) / float(beyond)
    return fast, per_doubling


def _ordered(events: _Events) -> pa.Table:
    """What ingest does with a shard's events before it stores them."""
    order = event_kernel.user_order(events.users, events.times)
    columns: dict[str, Any] = {name: events.table.column(name).to_numpy()[order] for name in _EVENTS.names}
    columns["split"] = event_kernel.split_by_time(columns["timestamp"], 1_685_000_000, 1_690_000_000)
    learns = np.flatnonzero(columns["split"] == schemas.TRAIN_SPLIT)
    users, items, times = (columns[name][learns] for name in ("user_id", "item_id", "timestamp"))
    event_kernel.degrees(users, items, times, 0, events.num_users)
    return pa.table(columns)


def _shards(storage: Storage, events: _Events) -> Measured:
    count, table = len(events.users), _ordered(events)
    ordering = _seconds(lambda: _ordered(events))
    shard = write_shard(storage, schemas.INTERACTIONS, 0, table, _LINEAGE)
    storing = _seconds(lambda: write_shard(storage, schemas.INTERACTIONS, 0, table, _LINEAGE))
    manifest = commit(storage, schemas.INTERACTIONS, [shard], _LINEAGE)
    columns = ["user_id", "item_id", "weight", "split", "timestamp"]
    loading = _seconds(lambda: read_shard(storage, manifest, 0, columns))
    pairing = _seconds(lambda: write_shard(storage, schemas.PAIRS, 0, consecutive_pairs(table, 1, 0), _LINEAGE))
    nodes = min(count, 100_000)
    numbers = np.random.default_rng(2).permutation(nodes)

    def name_nodes() -> Shard:
        text = pa.array(numbers * np.int64(7919)).take(pa.array(np.argsort(numbers, kind="stable"))).cast(pa.string())
        ids, zeros = pa.array(np.arange(nodes), pa.uint32()), np.zeros(nodes, np.int64)
        columns = [text, ids, numbers.astype(np.int64), zeros, pa.nulls(nodes, pa.string())]
        return write_shard(storage, schemas.ITEMS, 0, pa.table(columns, schema=schemas.ITEMS.arrow), _LINEAGE)

    named = commit(storage, schemas.ITEMS, [name_nodes()], _LINEAGE)
    loaded = _seconds(lambda: read_shard(storage, named, 0, ["degree"]))

    def whole() -> None:
        write_shard(storage, schemas.INTERACTIONS, 0, _ordered(events), _LINEAGE)

    peak = _peak(whole)
    return {
        "load_node_ns": 1e9 * loaded / nodes,
        "order_event_ns": 1e9 * ordering / count, "store_event_ns": 1e9 * storing / count,
        "load_event_ns": 1e9 * loading / count, "stored_event_bytes": shard.bytes / count,
        "pair_event_ns": 1e9 * pairing / count, "store_node_ns": 1e9 * _seconds(name_nodes) / nodes,
        "event_task_bytes": peak / count,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ exchange and graph


def _exchange(storage: Storage, events: _Events) -> Measured:
    found: Measured = {}
    few, many = 8, 1024
    count = len(events.users)
    cases = {
        "event": events.table,
        "key": pa.table({"hash": keys.hashed(pa.array(events.items.astype(np.int64))).hashes}),
    }
    cost = {}
    for name, table in cases.items():
        for number in (few, many):
            to = (np.arange(count) * number // count).astype(np.uint16) if name == "key" else events.users % number
            cost[name, number] = _sent_and_read(storage, table, to, number)
    for place, part in enumerate(("encode", "decode")):
        beyond = cost["event", many][place] - cost["event", few][place]
        found[f"{part}_block_us"] = max(0.1, 1e6 * beyond / (many - few))
    for name in cases:
        blocks = [few * found[f"{part}_block_us"] / 1e6 for part in ("encode", "decode")]
        sending, reading = (max(1e-9, c - b) for c, b in zip(cost[name, few], blocks, strict=True))
        if name == "event":
            found |= {"send_event_ns": 1e9 * sending / count, "gather_event_ns": 1e9 * reading / count}
        else:
            found[f"send_{name}_ns"] = 1e9 * (sending + reading) / count
    return found


def _sent_and_read(
    storage: Storage, table: pa.Table, destinations: NDArray[np.integer], number: int
) -> tuple[float, float]:
    """Processor seconds of sending a table in one file, and of reading all its blocks."""
    sending = _seconds(lambda: write_blocks(storage, "sent", 0, table, destinations, number, _LINEAGE), 2)
    shard = write_blocks(storage, "sent", 0, table, destinations, number, _LINEAGE)
    manifest = commit(storage, "sent", [shard], _LINEAGE, {"destinations": number})

    def read() -> None:
        for destination in range(number):
            gather(storage, manifest, destination, table.schema)

    return sending, _seconds(read, 2)


def _graph_stage(storage: Storage, folder: Path, events: _Events) -> Measured:
    order = np.argsort(events.users, kind="stable")
    size, none, shards = len(order), np.zeros(0, np.int64), 16
    columns = graph_kernel.Events(
        events.users[order], events.items[order], events.times[order], np.ones(size, np.float32),
        np.zeros(size, np.uint8),
    )  # fmt: skip

    def merge() -> tuple[graph_kernel.Rows, tuple[Any, Any, Any]]:
        rows = graph_kernel.merge_events(columns, 0, events.num_users, events.num_items, False, 0.0)[0]
        rows = graph_kernel.limit_rows(rows, 0, 1, 5000)[0]
        sent = graph_kernel.to_shards(rows, 0, events.num_items, shards)
        graph_kernel.shuffle_rows(rows, 0, 1)
        return rows, sent

    rows, (owners, edges, to) = merge()
    count = len(rows.ids)
    sending, reading = _sent_and_read(storage, pa.table([owners, edges.ids], schema=_EDGES), to, shards)
    arguments = (edges.ids, (owners, np.zeros(0), none), 0, events.num_items)
    back = graph_kernel.collect_rows(*arguments)

    def store(found: graph_kernel.Rows) -> Any:
        ids, empty = pa.array(np.arange(len(found.indptr) - 1), pa.uint32()), np.zeros_like(found.indptr)
        lists = [lists_to_arrow(found.indptr, found.ids), lists_to_arrow(empty, np.zeros(0, np.uint32))]
        table = pa.table([ids, *lists], schema=schemas.ITEM_USERS.arrow)
        return write_shard(storage, schemas.ITEM_USERS, 0, table, _LINEAGE)

    storing = (_seconds(lambda: store(rows)) + _seconds(lambda: store(back))) / 2
    peak = _peak(lambda: store(merge()[0]))
    sizes = [store(found).bytes for found in (rows, back)]
    manifest = commit(storage, schemas.ITEM_USERS, [store(back)], _LINEAGE)
    caches = iter(range(100))

    def copy() -> None:
        cache = str(folder / f"cache-{next(caches)}")
        for column in ("neighbours", "shares"):
            map_lists(storage, manifest, column, cache)

    copying = _seconds(copy, 2)
    taken = np.random.default_rng(3).permutation(len(rows.indptr) - 1)
    column = lists_to_arrow(rows.indptr, rows.ids)
    column = pa.chunked_array([column])
    cutting = _seconds(lambda: first_entries(column, taken, np.diff(rows.indptr)[taken]))
    labels, ids = np.arange(events.num_users, dtype=np.uint32), np.arange(events.num_items, dtype=np.uint32)
    labelling = _seconds(lambda: clusters._commonest(back.indptr, back.ids, labels, ids))
    loading = _seconds(lambda: arrow_to_lists(read_shard(storage, manifest, 0, ["neighbours"]).column("neighbours")))
    return {
        "label_edge_ns": 1e9 * (labelling + loading) / count,
        "merge_edge_ns": 1e9 * _seconds(merge) / count, "send_edge_ns": 1e9 * (sending + reading) / count,
        "collect_edge_ns": 1e9 * _seconds(lambda: graph_kernel.collect_rows(*arguments)) / count,
        "store_edge_ns": 1e9 * storing / count, "stored_edge_bytes": sum(sizes) / 2 / count,
        "copy_edge_ns": 1e9 * copying / count, "ship_entry_ns": 1e9 * (cutting + sending + reading) / count,
        "edge_task_bytes": peak / count,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ walks


def _graph(rows: graph_kernel.Rows, back: graph_kernel.Rows) -> BipartiteGraph:
    none = np.zeros(0, np.uint32)
    ranks = degree_ranks(back.indptr)
    return BipartiteGraph(back.indptr, back.ids, none, rows.indptr, rows.ids, none, ranks)


def _graphs(folder: Path, size: float) -> Iterator[BipartiteGraph]:
    """A graph that fits the cache, nearly, and one that does not; both mapped."""
    for name, edges in (("small", 1_000_000), ("large", 40_000_000)):
        rows, back = _edges(_events(max(20_000, int(edges * size))))
        arrays = _mapped(folder, name, [back.indptr, back.ids, rows.indptr, rows.ids])
        none = np.zeros(0, np.uint32)
        yield BipartiteGraph(arrays[0], arrays[1], none, arrays[2], arrays[3], none, np.zeros(0, np.uint8))


def _walks(storage: Storage, folder: Path, size: float) -> Measured:
    reads: list[tuple[list[float], float]] = []
    hops, visits, bytes_of, found = [], [], [], Measured()
    per_hop = walks_per_hop(200, 3, 0.5)
    for place, graph in enumerate(_graphs(folder, size)):
        degrees = np.diff(graph.item_indptr)
        chosen = np.random.default_rng(4).permutation(np.flatnonzero(degrees))[: max(500, int(20_000 * size))]
        chosen = chosen[np.argsort(degrees[chosen], kind="stable")]
        bytes_of.append(8.0 * (len(graph.item_users) + len(graph.item_indptr) + len(graph.user_indptr)))
        for group in np.array_split(chosen, 5):
            group = np.random.default_rng(5).permutation(group)
            for budget in (256, 1024, 4096):
                seconds = _seconds(partial(exact_neighbours, graph, group, _TOP, budget), 2)
                users, entries = _read_of(graph, group, budget)
                reads.append(([len(group), users * (place == 0), users * (place == 1), entries], seconds))
        walkers = np.random.default_rng(6).permutation(chosen)[: max(200, len(chosen) // 4)]
        steps = len(walkers) * int(per_hop.sum())
        hops.append(1e9 * _seconds(partial(walk_ends, graph, walkers, per_hop, 1), 2) / steps)
        visits.append(1e9 * _seconds(partial(visit_counts, graph, walkers, per_hop, _TOP, 1), 2) / steps)
        if place == 0:
            found |= _stored_rows(storage, graph, chosen)
    item, fast, slow, entry = _fitted(reads)
    user = _doublings(bytes_of[0], fast, bytes_of[1], slow)
    hop = _doublings(bytes_of[0], hops[0], bytes_of[1], hops[1])
    return {
        **found, **_compose(size), "exact_item_us": 1e6 * item, "exact_user_ns": 1e9 * user[0],
        "exact_user_ns_doubling": 1e9 * user[1], "exact_entry_ns": 1e9 * entry, "walk_hop_ns": hop[0],
        "walk_hop_ns_doubling": hop[1], "walk_visit_ns": max(0.1, visits[0] - hops[0]),
    }  # fmt: skip


def _fitted(measured: Sequence[tuple[list[float], float]]) -> list[float]:
    """Non-negative costs of each kind of work, from amounts of each and seconds; relative errors count."""
    amounts = np.array([amount for amount, _ in measured], np.float64)
    seconds = np.array([second for _, second in measured])
    return [float(cost) for cost in nnls(amounts / seconds[:, None], np.ones(len(seconds)))[0]]


def _read_of(graph: BipartiteGraph, items: NDArray[np.int64], budget: int) -> tuple[float, float]:
    """Users and entries that exact_neighbours reads of these items."""
    levels = prefix_lengths(graph, items, budget)[0]
    degrees = np.diff(graph.user_indptr)
    users = entries = 0
    for item, level in zip(items.tolist(), levels.tolist(), strict=True):
        met = graph.item_users[graph.item_indptr[item] : graph.item_indptr[item + 1]][:budget]
        users += min(len(met), 1024)
        entries += min(budget, int(np.minimum(degrees[met], level).sum()))
    return users, entries


def _stored_rows(storage: Storage, graph: BipartiteGraph, items: NDArray[np.int64]) -> Measured:
    rows = exact_neighbours(graph, items, _TOP, 2048)
    count = int(rows[2].sum())

    def store() -> Any:
        table = neighbour_rows(items, [rows])
        return write_shard(storage, schemas.NEIGHBOURS, 0, table, _LINEAGE)

    return {"store_neighbour_ns": 1e9 * _seconds(store) / count, "neighbour_bytes": store().bytes / count}


def _compose(size: float) -> Measured:
    measured: list[tuple[list[float], float]] = []
    bytes_of = []
    for place, count in enumerate((max(2_000, int(100_000 * size)), max(4_000, int(600_000 * size)))):
        random = np.random.default_rng(7)
        names = random.permutation(count).astype(np.uint32)
        near = np.arange(count)[:, None] // 512 * 512 + random.integers(0, 512, (count, _TOP))
        ids = np.empty((count, _TOP), np.uint32)
        ids[names] = names[np.minimum(near, count - 1)]
        weights = np.broadcast_to((np.arange(_TOP, 0, -1) / 1275.0).astype(np.float32), ids.shape).reshape(-1).copy()
        rows = Rows(np.arange(count + 1, dtype=np.int64) * _TOP, ids.reshape(-1), weights)
        bytes_of.append(8.0 * count * _TOP)
        items = random.integers(0, count, max(200, int(2_000 * size)))
        ranks = np.zeros(count, np.uint8)
        for number, width in ((2, 50), (8, 10), (8, 50), (32, 10), (32, 50)):
            seconds = _seconds(partial(compose, rows, items, number, width, 0.5, _TOP, item_ranks=ranks), 2)
            read = len(items) * number
            measured.append(([len(items), read * (place == 0), read * (place == 1), read * width], seconds))
    item, fast, slow, entry = _fitted(measured)
    row = _doublings(bytes_of[0], fast, bytes_of[1], slow)
    return {
        "compose_item_us": 1e6 * item, "compose_row_ns": 1e9 * row[0], "compose_row_ns_doubling": 1e9 * row[1],
        "compose_entry_ns": 1e9 * entry,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ vectors


def _vectors(storage: Storage, folder: Path, size: float) -> Measured:
    rows, width = max(500, int(30_000 * size)), 128
    matrix = np.random.default_rng(8).standard_normal((rows, width), np.float32)
    table = pa.table({"id": pa.array(np.arange(rows), pa.uint32()), "vector": vectors_to_arrow(matrix)})
    manifest = commit(storage, "vectors", [write_shard(storage, "vectors", 0, table, _LINEAGE)], _LINEAGE)
    caches = iter(range(100))
    values = rows * width
    storing = _seconds(lambda: write_shard(storage, "vectors", 0, table, _LINEAGE))
    loading = _seconds(lambda: arrow_to_vectors(read_shard(storage, manifest, 0).column("vector")))
    copying = _seconds(lambda: map_vectors(storage, manifest, "vector", str(folder / f"vectors-{next(caches)}")))
    return {
        "store_value_ns": 1e9 * storing / values, "load_value_ns": 1e9 * loading / values,
        "copy_value_ns": 1e9 * copying / values,
    }  # fmt: skip


def _torch(size: float) -> Measured:
    import torch

    from model.layers import importance_pool

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        random, hidden = np.random.default_rng(9), 256
        table = torch.from_numpy(random.standard_normal((max(1000, int(200_000 * size)), hidden), np.float32))
        index = torch.from_numpy(random.integers(0, len(table), (max(100, int(4_000 * size)), _TOP)))
        weights = torch.full(index.shape, 1.0 / _TOP)
        values = index.numel() * hidden
        with torch.no_grad():
            pooling = _seconds(lambda: importance_pool(table, index, weights))
            left, right = table[:1000], table[:hidden].T.contiguous()
            product = _seconds(lambda: left @ right)
        learned = table.clone().requires_grad_()

        def learn() -> None:
            learned.grad = None
            importance_pool(learned, index, weights).sum().backward()

        training = _seconds(learn, 2)
        flops = 2.0 * left.shape[0] * hidden * hidden
    finally:
        torch.set_num_threads(threads)
    return {
        "pool_value_ns": 1e9 * pooling / values, "train_value_ns": 1e9 * training / values,
        "gemm_gflops": flops / product / 1e9,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(_measure_spark()))
