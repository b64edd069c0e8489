"""What a run of a given size will cost, before anything is started: time, memory, disk and network of every stage.

Pure arithmetic: sizes, a cluster and measured rates in, a plan out. A stage is the steps that its module takes; a step
is so many tasks of so much work, and lasts as long as what it needs most of: cores, disks or network. Rates are what
`jobs/calibrate.py` measures by running the stages' own functions; nothing is fitted to whole runs.

Degrees are taken as lognormal on both sides, the median at two thirds of the mean, and events as in no order. Not
counted: what Spark does on its own, stragglers, and other programs on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pipeline.contracts.config import (
    Compact,
    Features,
    Graph,
    Index,
    IndexResources,
    Inference,
    InferenceResources,
    Model,
    Pairs,
    Settings,
    Split,
    Training,
    Walks,
    WalksResources,
)
from pipeline.contracts.errors import SettingsError
from pipeline.contracts.sharding import MAX_IDS, count_shards

GIB = 1 << 30
REFERENCE_BYTES = 1 << 26
"""Rates of random reads hold for this much memory; a doubling adds what `_doubling` rates say."""
MAX_INDEX_PARTS = 256
"""An index is added to by at most so many tasks."""
_CODE, _FIND_COMPARED = 1 / 60, 100
"""While a vector's list is found among many: what a centroid's code costs of comparing it whole, and how many are."""
SIGMA = 0.93
"""Of the lognormal degrees: the median is exp(-SIGMA ** 2 / 2) = 0.65 of the mean."""
HUB_REFERENCES = 2.5
"""Share of all neighbours that are among the most referenced items, by the root of these items' share: measured on the
generator's graphs, 28 % for 1 % of the items, 54 % for 5 %."""
CLUSTERED_SHARDS = 8.4
"""Shards among 50 neighbours of an item when items are laid out by label propagation: measured so at 256 shards."""
WIRE_BYTES = {"float32": 4, "float16": 3}
"""As inference.sums: bytes of a partial sum."""
KEYS_PER_RANGE = 4_000_000
"""As keys.RANGE_ROWS: keys that one task of ingest sorts."""
MAX_USERS_READ = 1024
"""As exact_kernel: users of an item that are read."""


# ------------------------------------------------------------------------------------------------ what is planned


@dataclass(frozen=True)
class Scale:
    """How much there is: items, users, and interactions of one user and item each."""

    items: int
    users: int
    edges: int

    def __post_init__(self) -> None:
        for name in ("items", "users", "edges"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name):,}, expected at least 1")
        for name in ("items", "users"):
            if getattr(self, name) > MAX_IDS:
                raise SettingsError(f"{name} is {getattr(self, name):,}; ids are 32-bit, so at most {MAX_IDS:,} fit")
        if self.edges > self.items * self.users:
            raise SettingsError(
                f"{self.edges:,} edges do not fit {self.items:,} items x {self.users:,} users: give fewer"
            )


@dataclass(frozen=True)
class Cluster:
    """Hosts that are alike: cores, bytes of memory and of disk, and the network's speed in bits a second of each."""

    hosts: int
    cores: int
    memory_bytes: int
    disk_bytes: int
    network_bits: float = 25e9

    def __post_init__(self) -> None:
        for name in ("hosts", "cores", "memory_bytes", "disk_bytes", "network_bits"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name.split('_')[0]} is {getattr(self, name)}, expected more than 0")

    @property
    def all_cores(self) -> int:
        """Tasks that run at once."""
        return self.hosts * self.cores


@dataclass(frozen=True)
class Task:
    """The settings that cost depends on; the defaults are those of the settings file."""

    split: Split = field(default_factory=Split)
    graph: Graph = field(default_factory=Graph)
    features: Features = field(default_factory=Features)
    walks: Walks = field(default_factory=Walks)
    pairs: Pairs = field(default_factory=Pairs)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    inference: Inference = field(default_factory=Inference)
    index: Index = field(default_factory=Index)
    compact: Compact = field(default_factory=Compact)
    content_values: int = 128
    strategy: str = "auto"
    cluster_rounds: int = WalksResources().cluster_rounds
    host_memory: int | None = None
    layers: InferenceResources = field(default_factory=InferenceResources)
    merge_memory: int = int(IndexResources().merge_memory)
    rows_per_shard: int = 100_000
    events_per_shard: int = 1_000_000
    threads: int = 1
    driver_bytes: int = 2 * GIB

    @classmethod
    def of(cls, settings: Settings, content_values: int = 128) -> Task:
        """The same of a settings file, which does not say how long content vectors are."""
        task, resources = settings.task, settings.resources
        memory = resources.walks.host_memory
        return cls(
            task.split, task.graph, task.features, task.walks, task.pairs, task.model, task.training, task.inference,
            task.index, task.compact, content_values, strategy=resources.walks.strategy,
            cluster_rounds=resources.walks.cluster_rounds, host_memory=memory and int(memory),
            layers=resources.inference, merge_memory=int(resources.index.merge_memory),
            rows_per_shard=resources.rows_per_shard, events_per_shard=resources.events_per_shard,
            threads=resources.threads,
        )  # fmt: skip

    def changed(self, neighbours: int | None, dimensions: int | None, weighted: bool) -> Task:
        """With another T, another d (and m = 2 d, as in the paper), or weights."""
        walks, model, graph = self.walks, self.model, self.graph
        if neighbours:
            walks = walks.model_copy(update={"num_neighbours": neighbours})
        if dimensions:
            model = model.model_copy(update={"output_dimensions": dimensions, "hidden_dimensions": 2 * dimensions})
        if weighted:
            graph = graph.model_copy(update={"weighted": True})
        return replace(self, walks=walks, model=model, graph=graph)

    def widened(self, scale: Scale, cluster: Cluster) -> Task:
        """With shards so large that there are at most 2000 of a kind, or 4 per core: exchanges cost their number
        squared."""
        most = max(2000, 4 * cluster.all_cores)
        rows, events = (
            -(-count // (100_000 * most)) * 100_000 for count in (max(scale.items, scale.users), scale.edges)
        )
        return replace(
            self, rows_per_shard=max(self.rows_per_shard, rows), events_per_shard=max(self.events_per_shard, events)
        )


# ------------------------------------------------------------------------------------------------ what was measured


def _rate(value: float, unit: str, meaning: str) -> Any:
    return field(default=value, metadata={"unit": unit, "meaning": meaning})


@dataclass(frozen=True)
class Rates:
    """What the pipeline's own functions take, on one core; the defaults were measured on the machine of SHIPPED."""

    session_seconds: float = _rate(9.452, "s", "a command until Spark runs its first task")
    worker_seconds: float = _rate(4.046, "s", "a Python worker until it has imported a stage and its kernels")
    step_seconds: float = _rate(0.1788, "s", "a step of tasks: planning, collecting, manifests")
    task_seconds: float = _rate(0.1039, "s", "a task: scheduling, receipts")
    encode_block_us: float = _rate(132.8, "us/block", "exchange: writing one block, whatever its rows")
    decode_block_us: float = _rate(186.5, "us/block", "exchange: finding and reading one block, whatever its rows")
    disk_write_mbs: float = _rate(284.3, "MB/s", "sequential writes of one host's disk, reached the disk")
    disk_read_mbs: float = _rate(428.0, "MB/s", "sequential reads of one host's disk")
    read_event_ns: float = _rate(50.05, "ns/event", "ingest: raw Parquet to checked columns")
    hash_key_ns: float = _rate(16.83, "ns/key", "ingest: hash, sort and thin out keys")
    find_key_ns: float = _rate(28.65, "ns/key", "ingest: look a key up in a table of 64 MiB")
    find_key_ns_doubling: float = _rate(18.24, "ns/key", "ingest: the same, for each doubling of the table")
    index_key_ns: float = _rate(3.211, "ns/key", "ingest: index a host's table of keys, in every worker")
    send_key_ns: float = _rate(35.36, "ns/key", "exchange: keys to blocks, and back")
    send_event_ns: float = _rate(57.08, "ns/event", "exchange: events to blocks")
    gather_event_ns: float = _rate(8.534, "ns/event", "exchange: blocks to events")
    order_event_ns: float = _rate(161.8, "ns/event", "ingest: order by user and time, split, count degrees")
    store_event_ns: float = _rate(69.07, "ns/event", "ingest: a shard of interactions to checked Parquet")
    store_node_ns: float = _rate(331.8, "ns/node", "ingest: a shard of users or items from their keys to Parquet")
    load_node_ns: float = _rate(21.01, "ns/node", "graph: a number of users or items from Parquet")
    load_event_ns: float = _rate(35.15, "ns/event", "graph, pairs: interactions from Parquet")
    merge_edge_ns: float = _rate(43.9, "ns/edge", "graph: events to users' rows, shuffled, and to their items' shards")
    send_edge_ns: float = _rate(28.96, "ns/edge", "exchange: edges to blocks, and back")
    collect_edge_ns: float = _rate(3.146, "ns/edge", "graph: edges to items' rows")
    store_edge_ns: float = _rate(28.05, "ns/edge", "graph: rows of edges to checked Parquet")
    copy_edge_ns: float = _rate(
        33.95, "ns/edge", "walks: a direction of the graph to a host's copy; one process a host"
    )
    exact_item_us: float = _rate(7.065, "us/item", "exact: an item, whatever it reads")
    exact_user_ns: float = _rate(26.47, "ns/user", "exact: a user's list found, in a graph of 64 MiB")
    exact_user_ns_doubling: float = _rate(204.3, "ns/user", "exact: the same, for each doubling of the graph")
    exact_entry_ns: float = _rate(2.447, "ns/entry", "exact: an entry read, summed and ranked")
    compose_item_us: float = _rate(3.533, "us/item", "composing: an item, whatever it reads")
    compose_row_ns: float = _rate(104.4, "ns/row", "composing: a neighbour's row found, in a table of 64 MiB")
    compose_row_ns_doubling: float = _rate(78.98, "ns/row", "composing: the same, for each doubling of the table")
    compose_entry_ns: float = _rate(7.417, "ns/entry", "composing: an entry read, summed and ranked")
    walk_hop_ns: float = _rate(5.963, "ns/hop", "walks: item, user, item, in a graph of 64 MiB")
    walk_hop_ns_doubling: float = _rate(8.532, "ns/hop", "walks: the same, for each doubling of the graph")
    walk_visit_ns: float = _rate(14.73, "ns/visit", "walks: a visit counted and ranked")
    ship_entry_ns: float = _rate(33.25, "ns/entry", "shuffle: a list's entry cut out, sent and read")
    label_edge_ns: float = _rate(34.96, "ns/edge", "shuffle: a half round of laying out items that share users")
    store_neighbour_ns: float = _rate(60.64, "ns/neighbour", "walks: weights, and a shard of neighbours to Parquet")
    neighbour_bytes: float = _rate(4.579, "B/neighbour", "a stored neighbour and weight")
    pair_event_ns: float = _rate(72.33, "ns/event", "pairs: consecutive events to pairs, and to Parquet")
    store_value_ns: float = _rate(23.03, "ns/value", "vectors to checked Parquet, a float32 number of them")
    load_value_ns: float = _rate(25.81, "ns/value", "vectors from Parquet, a float32 number of them")
    copy_value_ns: float = _rate(23.32, "ns/value", "vectors to a host's copy; one process a host")
    pool_value_ns: float = _rate(0.5021, "ns/value", "inference: a number of a neighbour's vector gathered and summed")
    train_value_ns: float = _rate(2.612, "ns/value", "train: the same, and back")
    gemm_gflops: float = _rate(128.4, "GFLOP/s", "matrix products in float32")
    worker_mib: float = _rate(299.9, "MiB/core", "a Python worker with the pipeline's packages")
    event_task_bytes: float = _rate(67.24, "B/event", "ingest: memory of a task at its peak")
    edge_task_bytes: float = _rate(24.98, "B/edge", "graph: memory of a task at its peak")
    raw_event_bytes: float = _rate(7.414, "B/event", "the user's Parquet files, as the generator writes them")
    stored_event_bytes: float = _rate(5.579, "B/event", "interactions as stored")
    stored_edge_bytes: float = _rate(2.008, "B/edge", "the graph as stored, each direction")

    @classmethod
    def of(cls, values: Mapping[str, float], where: str) -> Rates:
        """From calibrated values; raises SettingsError for one that is missing, unknown or not above 0."""
        names = {rate.name for rate in fields(cls)}
        if set(values) != names:
            different = ", ".join(sorted(names ^ set(values)))
            raise SettingsError(
                f"{where} is of another version (differs in {different}); run `pinsage plan --calibrate`"
            )
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise SettingsError(f"{where}: {name} is {value!r}, expected a number of at least 0")
        return cls(**values)

    @staticmethod
    def slowed(nanoseconds: float, per_doubling: float, num_bytes: float) -> float:
        """A random read's time in so much memory; in less than the reference it is what it is there."""
        return nanoseconds + per_doubling * max(0.0, math.log2(max(num_bytes, 1) / REFERENCE_BYTES))


SHIPPED = (
    "shipped with this version: measured by `pinsage plan --calibrate` on 2 virtual cores of a shared Sapphire "
    "Rapids, 2026-11-21; calibrate on your machine to have yours"
)


# ------------------------------------------------------------------------------------------------ what comes out


@dataclass(frozen=True)
class Step:
    """Some tasks alike. Core-seconds are those of all tasks; serial seconds are one process's, while others wait.

    Bytes are of all hosts together: read and written on disk (exchanged and copied ones included), sent between tasks
    or hosts, and held in the run's storage until the stage ends (None: what is sent).
    """

    name: str
    tasks: int
    core_seconds: float
    read_bytes: float = 0.0
    write_bytes: float = 0.0
    shuffle_bytes: float = 0.0
    serial_seconds: float = 0.0
    task_bytes: float = 0.0
    scratch_bytes: float | None = None

    def seconds(self, cluster: Cluster, rates: Rates) -> dict[str, float]:
        """What cores, disks and network need, each for itself, and what nothing shortens."""
        waves = -(-self.tasks // cluster.all_cores)
        disk = self.read_bytes / rates.disk_read_mbs + self.write_bytes / rates.disk_write_mbs
        sent = self.shuffle_bytes * (cluster.hosts - 1) / cluster.hosts
        return {
            "cores": waves * self.core_seconds / self.tasks + waves * rates.task_seconds,
            "disk": disk / (1e6 * cluster.hosts),
            "network": 8 * sent / (cluster.network_bits * cluster.hosts),
            "one process": self.serial_seconds + rates.step_seconds,
        }


@dataclass(frozen=True)
class Stage:
    """A stage's cost on the cluster.

    memory_bytes are of the host that needs most: its tasks, what they share, and the driver if that is larger.
    disk_bytes are what the run's storage holds while the stage runs, local_bytes what each host copies beside it.
    """

    name: str
    seconds: float
    core_seconds: float
    memory_bytes: float
    disk_bytes: float
    local_bytes: float
    shuffle_bytes: float
    binds: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Plan:
    """All stages, the sizes that decide, and what does not fit."""

    scale: Scale
    cluster: Cluster
    rows_per_shard: int
    events_per_shard: int
    training_edges: int
    graph_bytes: int
    strategy: str
    reason: str
    stages: tuple[Stage, ...]
    problems: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """All stages one after the other."""
        return sum(stage.seconds for stage in self.stages)


# ------------------------------------------------------------------------------------------------ arithmetic


def graph_bytes(items: int, users: int, edges: int, weighted: bool = False) -> int:
    """Both directions memory-mapped: ids, shares if weighted, row pointers. As neighbourhoods.graph_bytes."""
    return edges * (16 if weighted else 8) + 8 * (items + users + 2)


def choose(size: int, cluster: Cluster, host_memory: int | None = None, wanted: str = "auto") -> tuple[str, str]:
    """The strategy that neighbourhoods.choose takes, and why."""
    if wanted != "auto":
        return wanted, "as resources.walks.strategy says"
    memory = host_memory or cluster.memory_bytes // 2
    given = "resources.walks.host_memory" if host_memory else "half of a host's memory"
    if size > memory:
        return "shuffle", f"the graph takes {_gib(size)} and {given} is {_gib(memory)}"
    if size > cluster.disk_bytes:
        return "shuffle", f"the graph takes {_gib(size)} and a host's disk has {_gib(cluster.disk_bytes)}"
    return "replicate", f"the graph takes {_gib(size)} of every host's {_gib(memory)}"


def cut_mean(mean: float, limit: float) -> float:
    """The mean of min(X, limit) of a lognormal X of that mean and SIGMA."""
    if mean <= 0 or limit <= 0:
        return 0.0
    place = (math.log(limit / mean) + SIGMA**2 / 2) / SIGMA
    return mean * _normal(place - SIGMA) + limit * (1 - _normal(place))


def below(mean: float, limit: float) -> float:
    """The share of a lognormal X of that mean and SIGMA that is below limit."""
    return _normal((math.log(limit / mean) + SIGMA**2 / 2) / SIGMA) if mean > 0 < limit else 1.0


def met_mean(mean: float, limit: float = math.inf) -> float:
    """The mean degree of the user of a random edge, of at most limit: large ones are met more often."""
    return mean * math.exp(SIGMA**2) if limit == math.inf else cut_mean(mean * math.exp(SIGMA**2), limit)


def distinct(draws: float, of: float) -> float:
    """How many different ones there are among so many draws of so many."""
    return of * -math.expm1(-draws / of)


def _normal(place: float) -> float:
    return 0.5 * math.erfc(-place / math.sqrt(2))


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size < 10 * GIB else f"{size / GIB:,.0f} GiB"


# ------------------------------------------------------------------------------------------------ the stages


def make_plan(scale: Scale, cluster: Cluster, rates: Rates | None = None, task: Task | None = None) -> Plan:
    """The plan of a whole run, with shards as large as the settings say."""
    return _Planner(scale, cluster, rates or Rates(), task or Task()).plan()


class _Planner:
    """The stages' steps, in the order of their modules; names as theirs."""

    def __init__(self, scale: Scale, cluster: Cluster, rates: Rates, task: Task) -> None:
        self.scale, self.cluster, self.rates, self.task = scale, cluster, rates, task
        held = task.split.validation + task.split.test
        share = 1 - held if task.split.kind != "leave_last_out" else max(0.0, 1 - held * scale.users / scale.edges)
        mean = scale.edges / scale.users
        kept = cut_mean(mean, task.graph.max_user_degree) / mean if task.graph.max_user_degree else 1.0
        self.edges = max(1, round(scale.edges * share * kept))
        self.graph_bytes = graph_bytes(scale.items, scale.users, self.edges, task.graph.has_weights)
        self.strategy, self.reason = choose(self.graph_bytes, cluster, task.host_memory, task.strategy)
        self.pieces = count_shards(scale.edges, task.events_per_shard)
        self.event_shards = min(self.pieces, scale.users)
        self.item_shards, self.user_shards = (
            count_shards(count, task.rows_per_shard) for count in (scale.items, scale.users)
        )
        self.ids_bytes = (scale.items + scale.users) * 8.0
        edge_bytes = rates.stored_edge_bytes + (4 if task.graph.has_weights else 0)
        self.stored = {
            "raw": scale.edges * rates.raw_event_bytes,
            "interactions": scale.edges * rates.stored_event_bytes,
            "nodes": 18.0 * (scale.items + scale.users),
            "graph": 2 * self.edges * edge_bytes + self.ids_bytes / 2,
            "neighbours": scale.items * task.walks.num_neighbours * rates.neighbour_bytes,
            "features": self._vectors(task.content_values, 2 if task.features.dtype == "float16" else 4),
            "pairs": 14.0 * self.edges * task.pairs.window,
            "hard negatives": 4.0 * scale.items * task.pairs.num_hard_negatives,
            "embeddings": self._vectors(task.model.output_dimensions, 2 if task.inference.dtype == "float16" else 4),
        }  # fmt: skip

    def plan(self) -> Plan:
        """All stages, and what does not fit."""
        stages = (
            self._stage("ingest", self._ingest(), ("raw",), ("interactions", "nodes"), shared=self.ids_bytes),
            self._stage("graph", self._graph(), ("raw", "interactions", "nodes"), ("graph",)),
            self._stage("features", self._features(), ("raw", "interactions", "nodes", "graph"), ("features",)),
            self._walks(), self._pairs(), self._train(), self._inference(),
            *([self._compact()] if self.task.compact.int8 or self.task.compact.dimensions else []), self._index(),
        )  # fmt: skip
        task = self.task
        return Plan(
            self.scale, self.cluster, task.rows_per_shard, task.events_per_shard, self.edges, self.graph_bytes,
            self.strategy, self.reason, stages, tuple(self._problems(stages)),
        )  # fmt: skip

    def _stage(
        self, name: str, steps: Iterable[Step], before: tuple[str, ...], made: tuple[str, ...] = (),
        shared: float = 0.0, local: float | None = None, driver: float = 0.0,
    ) -> Stage:  # fmt: skip
        """shared is memory of a host that its tasks map together, local a host's copies on disk."""
        rates, cluster, steps = self.rates, self.cluster, tuple(steps)
        needs = [step.seconds(cluster, rates) for step in steps]
        start = rates.session_seconds + rates.worker_seconds
        longest = [max(need["cores"], need["disk"], need["network"]) for need in needs]
        seconds = start + sum(longest) + sum(need["one process"] for need in needs)
        parts = dict.fromkeys(("cores", "disk", "network", "one process", "start"), 0.0)
        for need, most in zip(needs, longest, strict=True):
            parts[next(part for part in ("cores", "disk", "network") if need[part] == most)] += most
            parts["one process"] += need["one process"]
        parts["start"] = start
        busy = min(cluster.cores, max(1, -(-max((step.tasks for step in steps), default=1) // cluster.hosts)))
        worker = rates.worker_mib * 2**20 + max((step.task_bytes for step in steps), default=0)
        memory = max(self.task.driver_bytes + busy * worker + shared, driver)
        written = sum(self.stored[part] for part in before + made)
        held = (step.shuffle_bytes if step.scratch_bytes is None else step.scratch_bytes for step in steps)
        spent = sum(step.core_seconds + step.serial_seconds for step in steps)
        return Stage(
            name, seconds, spent, memory, written + max(held, default=0.0), shared if local is None else local,
            sum(step.shuffle_bytes for step in steps),
            max(parts, key=lambda part: parts[part]), steps,
        )  # fmt: skip

    def _vectors(self, width: int, value_bytes: int) -> float:
        return 0.93 * self.scale.items * width * value_bytes

    def _blocks(self, sources: int, destinations: int, rows: float) -> float:
        """Core-seconds of an exchange's blocks beside those of its rows."""
        number = min(float(sources) * destinations, rows)
        return number * (self.rates.encode_block_us + self.rates.decode_block_us) / 1e6

    # -------------------------------------------------------------------------------------- ingest and graph

    def _ingest(self) -> Iterable[Step]:
        rates, scale, events = self.rates, self.scale, float(self.scale.edges)
        pieces, per_piece = self.pieces, events / self.pieces
        ranges = 1 << max(0, -(-scale.edges // KEYS_PER_RANGE) - 1).bit_length()
        memory = rates.event_task_bytes * per_piece
        keys = {side: pieces * distinct(per_piece, count) for side, count in self._sides}
        listed = sum(keys.values())
        yield Step(
            "read interactions", pieces,
            1e-9 * (events * (rates.read_event_ns + 2 * rates.hash_key_ns) + listed * rates.send_key_ns)
            + self._blocks(pieces, 2 * ranges, listed),
            read_bytes=self.stored["raw"], write_bytes=8 * listed, shuffle_bytes=8 * listed, task_bytes=memory,
        )  # fmt: skip
        for side, count in self._sides:
            yield Step(
                f"number {side}", ranges, 1e-9 * keys[side] * rates.hash_key_ns, read_bytes=8 * keys[side],
                write_bytes=8.0 * count, task_bytes=60 * keys[side] / ranges,
            )  # fmt: skip
        for side, count in self._sides:
            shards = count_shards(count, self.task.rows_per_shard)
            yield Step(
                f"place {side}", ranges,
                1e-9 * count * (rates.send_key_ns + rates.hash_key_ns) + self._blocks(ranges, shards, count),
                read_bytes=8.0 * count, write_bytes=12.0 * count, shuffle_bytes=12.0 * count,
                task_bytes=60 * count / ranges,
            )  # fmt: skip
        nodes = float(scale.items + scale.users)
        finding = sum(self._found(8.0 * count) for _, count in self._sides)
        busy = min(self.cluster.all_cores, pieces)
        yield Step(
            "number interactions", pieces,
            1e-9 * (events * (rates.read_event_ns + finding + rates.send_event_ns) + busy * nodes * rates.index_key_ns)
            + self._blocks(pieces, self.event_shards, events),
            read_bytes=self.stored["raw"], write_bytes=12 * events, shuffle_bytes=12 * events,
            serial_seconds=1e-9 * nodes * 2 * rates.copy_edge_ns, task_bytes=memory,
        )  # fmt: skip
        degrees = self.event_shards * distinct(events / self.event_shards, scale.items)
        yield Step(
            "write interactions", self.event_shards,
            1e-9 * events * (rates.gather_event_ns + rates.order_event_ns + rates.store_event_ns)
            + 1e-9 * degrees * rates.send_key_ns + self._blocks(self.event_shards, self.item_shards, degrees),
            read_bytes=12 * events, write_bytes=self.stored["interactions"] + 12 * degrees,
            shuffle_bytes=12 * degrees, task_bytes=memory,
        )  # fmt: skip
        for side, count in self._sides:
            more = degrees if side == "items" else 0.0
            yield Step(
                f"write {side}", count_shards(count, self.task.rows_per_shard),
                1e-9 * (count * rates.store_node_ns + more * rates.hash_key_ns), read_bytes=12.0 * count + 12 * more,
                write_bytes=18.0 * count, task_bytes=200.0 * min(count, self.task.rows_per_shard),
            )  # fmt: skip

    @property
    def _sides(self) -> tuple[tuple[str, int], tuple[str, int]]:
        return ("users", self.scale.users), ("items", self.scale.items)

    def _found(self, table_bytes: float) -> float:
        return self.rates.slowed(self.rates.find_key_ns, self.rates.find_key_ns_doubling, table_bytes)

    def _graph(self) -> Iterable[Step]:
        rates, events, edges = self.rates, float(self.scale.edges), float(self.edges)
        parts, weighted = self.event_shards, self.task.graph.has_weights
        sent = edges * (24.0 if weighted else 7.0)
        yield Step(
            "users, edges to items", parts,
            1e-9 * (events * rates.load_event_ns + edges * (rates.merge_edge_ns + rates.send_edge_ns))
            + 1e-9 * edges * rates.store_edge_ns * (2 if weighted else 1)
            + self._blocks(parts, self.item_shards, edges),
            read_bytes=self.stored["interactions"], write_bytes=self.stored["graph"] / 2 + sent, shuffle_bytes=sent,
            task_bytes=rates.edge_task_bytes * events / parts,
        )  # fmt: skip
        yield Step(
            "items", self.item_shards,
            1e-9 * edges * (rates.collect_edge_ns + rates.store_edge_ns * (2 if weighted else 1)), read_bytes=sent,
            write_bytes=self.stored["graph"] / 2, task_bytes=rates.edge_task_bytes * edges / self.item_shards,
        )  # fmt: skip
        nodes = self.scale.items + self.scale.users
        shards = self.item_shards + self.user_shards
        yield Step("degrees", shards, 1e-9 * nodes * rates.load_node_ns, read_bytes=self.stored["nodes"])

    # -------------------------------------------------------------------------------------- walks and pairs

    @property
    def _degree(self) -> float:
        return self.edges / self.scale.items

    def _read(self) -> tuple[float, float]:
        """Users and list entries that the exact estimator reads of a mean item."""
        budget = self.task.walks.entry_budget
        met = met_mean(self.edges / self.scale.users, self.task.graph.max_user_degree or math.inf)
        return cut_mean(self._degree, min(MAX_USERS_READ, budget)), cut_mean(self._degree * met, budget)

    def _exact_us(self, held_bytes: float) -> float:
        rates, (users, entries) = self.rates, self._read()
        user = rates.slowed(rates.exact_user_ns, rates.exact_user_ns_doubling, held_bytes)
        return rates.exact_item_us + 1e-3 * (users * user + entries * rates.exact_entry_ns)

    def _composed_us(self, rows: int, width: int, table_bytes: float) -> float:
        rates = self.rates
        row = rates.slowed(rates.compose_row_ns, rates.compose_row_ns_doubling, table_bytes)
        return rates.compose_item_us + 1e-3 * rows * (row + width * rates.compose_entry_ns)

    def _shipped(self) -> tuple[float, float]:
        """List entries that all shards of items together are sent, and in how many lists."""
        users, entries = self._read()
        per_shard = self.scale.items / self.item_shards * users
        lists = distinct(per_shard, self.scale.users)
        return self.item_shards * min(lists * entries / max(users, 1e-9), self.edges), self.item_shards * lists

    def _copied_graph(self) -> Step:
        """The first task of a host makes its copy, while the others wait; pairs finds those of walks."""
        hosts, stored = self.cluster.hosts, self.stored["graph"]
        return Step(
            "copy of the graph", hosts, 0.0, read_bytes=hosts * stored, write_bytes=float(hosts * self.graph_bytes),
            shuffle_bytes=hosts * stored, serial_seconds=1e-9 * 2 * self.edges * self.rates.copy_edge_ns,
            scratch_bytes=0.0,
        )  # fmt: skip

    def _first_hop(self, items: float, width: int, label: str) -> Iterable[Step]:
        """Reading the first hop of so many items, and what brings the lists to them."""
        rates, shards = self.rates, self.item_shards
        if self.strategy == "replicate":
            held = float(self.graph_bytes)
            if label == "walks":
                yield self._copied_graph()
        else:
            yield from self._lay_out()
            entries, lists = self._shipped()
            held = 4 * entries / shards
            sources = max(self.user_shards, entries / (1 << 26))
            yield Step(
                "users' lists", max(shards, self.user_shards),
                1e-9 * (entries * rates.ship_entry_ns + lists * 3 * rates.send_event_ns)
                + 2 * self._blocks(shards, int(sources), lists),
                read_bytes=4 * entries + 12 * lists, write_bytes=4 * entries + 12 * lists,
                shuffle_bytes=4 * entries + 12 * lists, task_bytes=8 * entries / shards,
            )  # fmt: skip
        stored = items * width * rates.neighbour_bytes
        yield Step(
            "first hop", shards, 1e-6 * items * self._exact_us(held) + 1e-9 * items * width * rates.store_neighbour_ns,
            write_bytes=stored, task_bytes=40.0 * width * self.scale.items / shards + (held * 2 if held < 1e9 else 0),
        )  # fmt: skip

    def _lay_out(self) -> Iterable[Step]:
        """Items that share users onto the same shards, and their rows with them."""
        rates, edges, items, shards = self.rates, float(self.edges), float(self.scale.items), self.item_shards
        rounds = 2 * self.task.cluster_rounds
        size = 4 * edges + 12 * items
        yield Step(
            "lay items out", max(shards, self.user_shards),
            1e-9 * rounds * edges * rates.label_edge_ns + 1e-9 * edges * rates.ship_entry_ns
            + 3e-9 * items * rates.send_edge_ns + 3 * self._blocks(shards, shards, items),
            read_bytes=rounds * self.stored["graph"] / 2 + size, write_bytes=size, shuffle_bytes=size,
            task_bytes=rates.edge_task_bytes * edges / shards,
        )  # fmt: skip

    def _composing(self, items: float, rows: int, width: int, top: int) -> Iterable[Step]:
        """Adding the rows of the nearest items, and what brings those to them."""
        rates, shards, table = self.rates, self.item_shards, 8.0 * self.scale.items * width
        if self.strategy == "replicate":
            yield Step(
                "copy of the rows", self.cluster.hosts, 0.0, read_bytes=self.cluster.hosts * table,
                write_bytes=self.cluster.hosts * table, shuffle_bytes=self.cluster.hosts * table, scratch_bytes=table,
                serial_seconds=1e-9 * 2 * self.scale.items * width * rates.copy_edge_ns,
            )  # fmt: skip
        else:
            others = shards * distinct(self.scale.items / shards * rows, self.scale.items)
            table = 8.0 * width * others / shards
            yield Step(
                "rows", shards, 1e-9 * others * width * 2 * rates.ship_entry_ns + self._blocks(shards, shards, others),
                read_bytes=8 * width * others, write_bytes=8 * width * others, shuffle_bytes=8 * width * others,
                task_bytes=2 * table,
            )  # fmt: skip
        yield Step(
            "compose", shards,
            1e-6 * items * self._composed_us(rows, width, table) + 1e-9 * items * top * rates.store_neighbour_ns,
            read_bytes=items * width * rates.neighbour_bytes, write_bytes=items * top * rates.neighbour_bytes,
            task_bytes=40.0 * top * self.scale.items / shards,
        )  # fmt: skip

    def _filling(self) -> Iterable[Step]:
        """A second hop for the items whose first reaches less than T: replicated, its rows are read from the graph."""
        walks, rates, items, shards = self.task.walks, self.rates, float(self.scale.items), self.item_shards
        met = met_mean(self.edges / self.scale.users, self.task.graph.max_user_degree or math.inf)
        short = items * below(self._degree * met, walks.num_neighbours)
        row = float(8 * walks.num_neighbours)
        others = shards * distinct(short / shards * walks.compose_rows, items)
        adding = 1e-6 * short * self._composed_us(walks.compose_rows, walks.num_neighbours, row * others / shards)
        if self.strategy == "replicate":
            reading = 1e-6 * others * self._exact_us(float(self.graph_bytes))
            yield Step("second hop of short rows", shards, adding + reading)
            return
        yield Step(
            "second hop of short rows", shards,
            adding + 1e-9 * others * walks.num_neighbours * 2 * rates.ship_entry_ns
            + 1e-9 * items * walks.num_neighbours * rates.store_neighbour_ns + self._blocks(shards, shards, others),
            read_bytes=row * (others + items), write_bytes=row * others + self.stored["neighbours"],
            shuffle_bytes=row * others, task_bytes=2 * row * others / shards,
        )  # fmt: skip

    def _walks(self) -> Stage:
        walks, items = self.task.walks, float(self.scale.items)
        steps: list[Step] = []
        local = shared = float(self.graph_bytes)
        if self.strategy == "shuffle":  # an item's degree and home, a user's degree
            local = shared = 5.0 * items + 4.0 * self.scale.users
        if walks.estimator == "walks":
            steps += self._visits()
        else:
            steps += self._first_hop(items, walks.num_neighbours, "walks")
            if walks.compose == "all":
                steps += self._composing(items, walks.compose_rows, walks.num_neighbours, walks.num_neighbours)
                if self.strategy == "replicate":
                    local += 8.0 * items * (walks.num_neighbours + 1)
                    shared = max(shared, local - self.graph_bytes)
            elif walks.compose == "short":
                steps += self._filling()
        made = ("neighbours",)
        return self._stage(
            "walks", steps, ("raw", "interactions", "nodes", "features", "graph"), made, shared=shared, local=local
        )

    def _visits(self) -> Iterable[Step]:
        walks, rates, items = self.task.walks, self.rates, float(self.scale.items)
        alive = sum((1 - walks.restart_probability) ** hop for hop in range(walks.max_hops))
        hops = walks.num_walks * alive
        hop = rates.slowed(rates.walk_hop_ns, rates.walk_hop_ns_doubling, self.graph_bytes)
        counting = 1e-9 * items * (hops * rates.walk_visit_ns + walks.num_neighbours * rates.store_neighbour_ns)
        size = items * walks.num_neighbours * rates.neighbour_bytes
        if self.strategy == "replicate":
            yield self._copied_graph()
            yield Step(
                "walks", self.item_shards, 1e-9 * items * hops * hop + counting, write_bytes=size,
                task_bytes=40.0 * walks.num_neighbours * items / self.item_shards,
            )  # fmt: skip
            return
        moves = 2 * items * hops
        yield Step(
            "walkers move", self.item_shards,
            1e-9 * moves * (hop / 2 + rates.send_event_ns + rates.gather_event_ns)
            + 2 * walks.max_hops * self._blocks(self.item_shards, self.user_shards, moves) + counting,
            read_bytes=10 * moves, write_bytes=10 * moves + size, shuffle_bytes=10 * moves,
            task_bytes=40 * hops * items / self.item_shards / 8,
        )  # fmt: skip

    def _pairs(self) -> Stage:
        pairs, rates, items, events = self.task.pairs, self.rates, float(self.scale.items), float(self.scale.edges)
        steps = [
            Step(
                "training pairs", self.event_shards, 1e-9 * events * (rates.load_event_ns + rates.pair_event_ns),
                read_bytes=self.stored["interactions"], write_bytes=self.stored["pairs"],
                task_bytes=2 * rates.edge_task_bytes * events / self.event_shards,
            )
        ]  # fmt: skip
        local = shared = 0.0
        if pairs.num_hard_negatives:
            ranked = min(5000, max(self.scale.items // 10, 2 * self.task.walks.num_neighbours))
            top = pairs.hard_negative_ranks[1] if pairs.hard_negative_ranks else ranked
            steps += self._first_hop(items, pairs.compose_width, "pairs")
            ranking = list(self._composing(items, pairs.compose_rows, pairs.compose_width, 0))
            again = 1e-6 * items * self._exact_us(float(self.graph_bytes)) + 1e-9 * items * top * rates.compose_entry_ns
            memory = 12.0 * 1024 * top * 3
            last = replace(ranking[-1], name="hard negatives", write_bytes=self.stored["hard negatives"])
            last = replace(last, core_seconds=last.core_seconds + again, task_bytes=last.task_bytes + memory)
            steps += [*ranking[:-1], last]
            if self.strategy == "replicate":
                local = self.graph_bytes + 8.0 * items * (pairs.compose_width + 1)
                shared = local
        before = ("raw", "interactions", "nodes", "features", "graph", "neighbours")
        return self._stage("pairs", steps, before, ("pairs", "hard negatives"), shared=shared, local=local)

    # -------------------------------------------------------------------------------------- vectors

    def _features(self) -> Iterable[Step]:
        rates, values = self.rates, float(self.scale.items) * self.task.content_values
        yield Step(
            "encode items", self.item_shards, 1e-9 * values * (2 * rates.load_value_ns + rates.store_value_ns),
            read_bytes=4 * values, write_bytes=self.stored["features"],
            task_bytes=30.0 * values / self.item_shards,
        )  # fmt: skip

    def _train(self) -> Stage:
        """One epoch: batches to blocks, each node of a layer computed once, forward and back."""
        task, rates = self.task, self.rates
        model, top = task.model, task.walks.num_neighbours
        pairs = float(max(1, self.edges - self.scale.users) * task.pairs.window)
        batch = min(float(task.training.batch_size), pairs)
        row = task.training.curriculum[0]
        nodes = [min(float(self.scale.items), batch * (2 + row.hard) + row.uniform)]
        for _ in range(model.num_layers):
            nodes.append(min(nodes[-1] * (top + 1), distinct(nodes[-1] * (top + 1), self.scale.items)))
        flops = 6 * nodes[0] * 2 * model.output_dimensions**2 + 6 * batch * row.uniform * model.output_dimensions
        values, width = 0.0, task.content_values
        for layer in range(model.num_layers):
            inputs, outputs = nodes[model.num_layers - layer], nodes[model.num_layers - layer - 1]
            hidden, out = model.hidden_dimensions, model.output_dimensions
            flops += 6 * (inputs * width * hidden + outputs * (width + hidden) * out)
            values += outputs * top * hidden
            width = out
        per_batch = flops / (rates.gemm_gflops * 1e9) + 1e-9 * values * rates.train_value_ns
        batches = max(1.0, pairs // batch)
        local = self.stored["features"] / 0.93 + 8.0 * self.scale.items * (top + 1) + 20 * pairs
        memory = task.driver_bytes + nodes[-1] * 40.0 * task.content_values
        step = Step("one epoch", self.cluster.all_cores, batches * per_batch, read_bytes=local)
        before = (
            "raw", "interactions", "nodes", "features", "graph", "neighbours", "pairs", "hard negatives"
        )  # fmt: skip
        return self._stage("train, an epoch", [step], before, local=local, driver=memory)

    def _inference(self) -> Stage:
        """Every layer once; its messages on every host, or partial sums of them between shards."""
        task, rates, items, shards = self.task, self.rates, float(self.scale.items), self.item_shards
        model, top, hosts = task.model, task.walks.num_neighbours, self.cluster.hosts
        width, hidden, out = task.content_values, model.hidden_dimensions, model.output_dimensions
        size = 2 if task.inference.layer_dtype == "float16" else 4
        gflop, layer_bytes = 1e-9 / rates.gemm_gflops, size * items * hidden
        half = task.layers.host_memory or self.cluster.memory_bytes / 2
        gathers = not model.num_layers or task.layers.reducer == "gather"
        gathers |= task.layers.reducer == "auto" and layer_bytes <= half
        rows = items / shards
        memory = 12.0 * rows * max(width, out) + size * rows * hidden + 16.0 * top * rows
        steps = [] if gathers else [*self._edges(), self._sent("content to shards", items, width, 2)]
        moved = 1e-9 * (width * rates.load_value_ns + hidden * rates.store_value_ns)
        first = items * (2 * width * hidden * gflop + moved)
        if model.num_layers:
            steps.append(
                Step(
                    "project layer 1", shards, first, read_bytes=2 * items * width, write_bytes=layer_bytes,
                    task_bytes=memory,
                )
            )  # fmt: skip
        for layer in range(1, model.num_layers + 1):
            last = layer == model.num_layers
            after = 4 * out * out if last else 2 * out * hidden
            made = out + (0 if last else hidden)
            pooling = 1e-9 * top * hidden * rates.pool_value_ns
            if gathers:
                copies = hosts * layer_bytes if hosts > 1 else 0.0
                read, shuffled, held = copies + layer_bytes, copies, 0.0
            else:
                steps.append(self._partial_sums(layer, hidden, size, pooling))
                read = shuffled = steps[-1].write_bytes
                held, pooling = 4.0 * rows * hidden, 1e-9 * hidden * self._partial_rows() * rates.load_value_ns
            steps.append(
                Step(
                    f"combine layer {layer}", shards,
                    items * ((2 * (width + hidden) * out + after) * gflop + pooling)
                    + 1e-9 * items * (width * rates.load_value_ns + made * rates.store_value_ns),
                    read_bytes=read + size * items * width + self.stored["neighbours"],
                    write_bytes=size * items * made + (shuffled if gathers else 0.0),
                    shuffle_bytes=shuffled if gathers else 0.0,
                    scratch_bytes=2 * layer_bytes, task_bytes=memory + held,
                )
            )  # fmt: skip
            width = out
        if not gathers:
            steps.append(self._sent("embeddings in order", items, out, 4))
        before = ("raw", "interactions", "nodes", "features", "graph", "neighbours", "pairs", "hard negatives")
        held = layer_bytes if model.num_layers and gathers else self._hubs() * items * hidden * size
        copies = held if hosts > 1 or not gathers else 0.0
        return self._stage("inference", steps, before, ("embeddings",), shared=held, local=copies)

    def _hubs(self) -> float:
        return float(self.task.layers.hub_share)

    def _partial_rows(self) -> float:
        """Sums that a layer sends, for each item: shards among its neighbours that are no hubs."""
        others = self.task.walks.num_neighbours * (1 - min(0.9, HUB_REFERENCES * self._hubs() ** 0.5))
        apart = self.item_shards * -math.expm1(-others / self.item_shards)
        return min(apart, CLUSTERED_SHARDS) if self.task.layers.cluster_rounds else apart

    def _edges(self) -> Iterable[Step]:
        """Where every neighbour's message has to go: once per neighbour table."""
        rates, items, shards = self.rates, float(self.scale.items), self.item_shards
        edges = items * self.task.walks.num_neighbours
        rounds = 2 * self.task.layers.cluster_rounds
        size = 12 * edges
        yield Step(
            "edges", shards,
            1e-9 * edges * (rounds * rates.label_edge_ns + 4 * rates.ship_entry_ns)
            + 4 * self._blocks(shards, shards, items),
            read_bytes=(rounds + 3) * self.stored["neighbours"] + size, write_bytes=self.stored["neighbours"] + size,
            shuffle_bytes=self.stored["neighbours"] + size, task_bytes=40.0 * edges / shards,
        )  # fmt: skip

    def _partial_sums(self, layer: int, hidden: int, size: int, pooling: float) -> Step:
        """What every shard of sources adds to every shard of destinations, and the hubs' messages to all hosts."""
        items, shards = float(self.scale.items), self.item_shards
        rows = items * self._partial_rows()
        sent = rows * (WIRE_BYTES["float16" if size == 2 else "float32"] * hidden + 4)
        hubs = self.cluster.hosts * self._hubs() * items * hidden * size
        return Step(
            f"partial sums {layer}", shards,
            items * pooling + 1e-9 * rows * hidden * self.rates.store_value_ns + self._blocks(shards, shards, rows),
            read_bytes=size * items * hidden + 12 * items * self.task.walks.num_neighbours, write_bytes=sent + hubs,
            shuffle_bytes=sent + hubs, scratch_bytes=sent,
            task_bytes=4.0 * items / shards * hidden + 8.0 * hidden * rows / shards**2,
        )  # fmt: skip

    def _sent(self, name: str, items: float, width: int, size: int) -> Step:
        """Vectors to their shards."""
        rates, shards, sent = self.rates, self.item_shards, size * items * width
        seconds = 1e-9 * items * width * (rates.load_value_ns + rates.store_value_ns)
        return Step(
            name, shards, 2 * seconds + self._blocks(shards, shards, items), read_bytes=2 * sent, write_bytes=2 * sent,
            shuffle_bytes=sent, task_bytes=4 * sent / shards,
        )  # fmt: skip

    def _compact(self) -> Stage:
        """Every form that is wanted, from the embeddings."""
        task, rates, items = self.task, self.rates, float(self.scale.items)
        width, stored = task.model.output_dimensions, self.stored["embeddings"]
        values = width * task.compact.int8 + 2 * sum(task.compact.dimensions)
        each = 1e-9 * (width * rates.load_value_ns + values * rates.store_value_ns)
        turning = 2e-9 * width * sum(task.compact.dimensions) / rates.gemm_gflops
        steps = [
            Step("sample", self.item_shards, 1e-9 * items * width * rates.load_value_ns, read_bytes=stored),
            Step(
                "forms", self.item_shards, items * (each + turning), read_bytes=stored, write_bytes=items * values,
                task_bytes=items / self.item_shards * (12.0 * width + values),
            ),
        ]  # fmt: skip
        return self._stage("compact", steps, tuple(self.stored))

    def _index(self) -> Stage:
        """Trained by the driver; added to by tasks, each a part of all shards; merged by the driver."""
        from pipeline.ann.choice import MANY_LISTS, check_given, choose, coarse, count_lists
        from pipeline.ann.training import SAMPLE_SHARDS, sample_size

        task, rates, items = self.task, self.rates, self.scale.items
        width, given = task.model.output_dimensions, task.index
        if given.factory == "auto":
            choice = choose(items, width, given.memory, given.recall_target, given.train_rows, False, task.merge_memory)
        else:
            choice = check_given(given.factory, items, width, given.memory)
        lists = count_lists(items, given.train_rows)
        sample = sample_size(items, lists, given.train_rows)
        shards, parts = self.item_shards, min(self.item_shards, MAX_INDEX_PARTS)
        sampled = min(shards, SAMPLE_SHARDS)
        stored, queries = self.stored["embeddings"], 2 * given.num_queries
        groups = round(lists**0.5)
        compared = sample * lists if lists < MANY_LISTS else sample * lists / groups + 256 * groups**2
        training = 10 * 2 * width * compared / (rates.gemm_gflops * 1e9 * task.threads)
        finding = 2e-9 * width * lists / rates.gemm_gflops
        if lists >= MANY_LISTS:
            finding = 1e-9 * (_FIND_COMPARED + _CODE * lists) * width * rates.pool_value_ns
        each = finding + 2e-9 * width * queries / rates.gemm_gflops + 1e-9 * width * rates.load_value_ns
        in_memory = choice.bytes <= task.merge_memory
        steps = [
            Step("sample", sampled, 1e-9 * items * sampled / shards * width * rates.load_value_ns,
                 read_bytes=stored * sampled / shards, write_bytes=4.0 * sample * width),
            Step("train", 1, 0.0, serial_seconds=training + 1e-9 * sample * width * rates.copy_value_ns),
            Step("add, search exactly", parts, items * each, read_bytes=stored, write_bytes=choice.bytes,
                 task_bytes=2.2 * choice.bytes / parts + 4.0 * width * items / shards, scratch_bytes=choice.bytes),
            Step("merge", 1, 0.0, serial_seconds=2e-6 * choice.bytes / rates.disk_write_mbs),
        ]  # fmt: skip
        driver = 2.2 * 4.0 * sample * width + (2.2 * choice.bytes if in_memory else 0.0)
        local = 2.0 * choice.bytes
        short = choice.factory.replace(f"({coarse(width)})", "")  # what finds a list goes without saying
        return self._stage(f"index, {short}", steps, tuple(self.stored), local=local, driver=driver)

    # -------------------------------------------------------------------------------------- does it fit

    def _problems(self, stages: Iterable[Stage]) -> Iterable[str]:
        memory, room = self.cluster.memory_bytes, self.cluster.disk_bytes
        for stage in stages:
            disk = stage.disk_bytes / self.cluster.hosts + stage.local_bytes
            for kind, needed, there in (("memory", stage.memory_bytes, memory), ("disk", disk, room)):
                if needed > there:
                    advice = _ADVICE.get(f"{stage.name.split(',')[0]} {kind}", _ADVICE[kind])
                    copies = f" ({_gib(stage.local_bytes)} for copies)" if kind == "disk" and stage.local_bytes else ""
                    what = f"{_gib(needed)} of {kind}{copies}"
                    yield f"{stage.name}: needs {what} on a host that has {_gib(there)}; {advice}"


_ADVICE = {
    "memory": "lower resources.rows_per_shard and resources.events_per_shard, or run fewer tasks on a host",
    "disk": "add disks or hosts, or keep resources.run in an object store",
    "walks memory": "set resources.walks.strategy: shuffle, task.walks.compose: none, or larger hosts",
    "walks disk": "set resources.walks.strategy: shuffle, task.walks.compose: none, or larger disks",
    "pairs memory": "set resources.walks.strategy: shuffle, or smaller task.pairs.compose_width, or none: "
    "task.pairs.num_hard_negatives: 0",
    "pairs disk": "set resources.walks.strategy: shuffle, or smaller task.pairs.compose_width, or none: "
    "task.pairs.num_hard_negatives: 0",
    "inference memory": "set resources.inference.reducer: shuffle, task.inference.layer_dtype: float16, a smaller "
    "resources.rows_per_shard, or take larger hosts",
    "inference disk": "set task.inference.layer_dtype: float16, resources.inference.cluster_rounds above 0, a smaller "
    "task.model.hidden_dimensions, or take larger disks",
    "index memory": "the driver trains, and merges what resources.index.merge_memory allows, in memory; lower that, or "
    "task.index.train_rows",
    "index disk": "the driver holds the index's parts and the whole; set task.index.memory, or take larger disks",
}
