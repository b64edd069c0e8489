"""The plan's arithmetic: against numbers worked by hand, against what the stages compute, and against itself."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from pipeline import neighbourhoods
from pipeline.ann.building import MAX_PARTS
from pipeline.contracts.config import Graph, InferenceResources, Settings, Walks
from pipeline.contracts.datasets import Lineage, Manifest
from pipeline.contracts.errors import SettingsError
from pipeline.exact_kernel import _MAX_USERS
from pipeline.keys import RANGE_ROWS
from pipeline.plan import (
    GIB,
    KEYS_PER_RANGE,
    MAX_INDEX_PARTS,
    MAX_USERS_READ,
    REFERENCE_BYTES,
    SIGMA,
    Cluster,
    Plan,
    Rates,
    Scale,
    Stage,
    Step,
    Task,
    below,
    choose,
    cut_mean,
    distinct,
    graph_bytes,
    make_plan,
    met_mean,
)

LAPTOP = Cluster(hosts=1, cores=2, memory_bytes=24 * GIB, disk_bytes=10**12)
FLEET = Cluster(hosts=20, cores=64, memory_bytes=512 * 10**9, disk_bytes=8 * 10**12)
PAPER = Scale(items=2 * 10**9, users=10**9, edges=18 * 10**9)
FIRST_HOP = Task(walks=Walks(compose="none"))


def of_edges(edges: int) -> Scale:
    return Scale(edges // 20, edges // 100, edges)


def stage(plan: Plan, name: str) -> Stage:
    return next(stage for stage in plan.stages if stage.name == name)


# ------------------------------------------------------------------------------------------------ growth


@pytest.mark.parametrize("cluster", [LAPTOP, FLEET], ids=["laptop", "fleet"])
@pytest.mark.parametrize("estimator", ["exact", "walks"])
@pytest.mark.parametrize("strategy", ["replicate", "shuffle"])
def test_more_of_anything_never_costs_less(cluster: Cluster, estimator: str, strategy: str) -> None:
    task = Task(walks=Walks.model_validate({"estimator": estimator}), strategy=strategy)
    base = Scale(10**6, 2 * 10**5, 2 * 10**7)
    for name in ("items", "users", "edges"):
        former: Plan | None = None
        for factor in (1, 3, 10, 100):
            scale = replace(base, **{name: factor * getattr(base, name)})
            plan = make_plan(scale, cluster, task=task)
            if former is not None:
                for one, other in zip(former.stages, plan.stages, strict=True):
                    if name == "edges" or (name == "items" and one.name in ("features", "inference", "index")):
                        assert other.seconds >= one.seconds, (name, one.name)
                        assert other.core_seconds >= one.core_seconds, (name, one.name)
                        assert other.disk_bytes >= one.disk_bytes, (name, one.name)
                assert plan.graph_bytes >= former.graph_bytes
            former = plan


def test_ten_times_the_data_takes_about_ten_times_as_long_where_work_and_not_starting_counts() -> None:
    small, large = (make_plan(of_edges(edges), LAPTOP, task=FIRST_HOP) for edges in (10**8, 10**9))
    for name in ("ingest", "graph", "walks"):
        ratio = stage(large, name).core_seconds / stage(small, name).core_seconds
        assert 9 < ratio < 25, name


def test_more_cores_and_hosts_are_faster_until_something_else_binds() -> None:
    seconds = [
        make_plan(of_edges(10**9), replace(LAPTOP, cores=cores, hosts=hosts), task=FIRST_HOP).seconds
        for cores, hosts in ((1, 1), (2, 1), (16, 1), (16, 8))
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert stage(make_plan(of_edges(10**9), LAPTOP, task=FIRST_HOP), "walks").binds == "cores"
    slow = make_plan(of_edges(10**9), replace(FLEET, network_bits=1e6), task=FIRST_HOP)
    assert stage(slow, "graph").binds == "network"
    full = make_plan(of_edges(10**9), LAPTOP, replace(Rates(), disk_read_mbs=1.0, disk_write_mbs=1.0), FIRST_HOP)
    assert stage(full, "ingest").binds == "disk"


def test_every_figure_is_a_finite_number_that_is_not_negative() -> None:
    for scale in (Scale(1, 1, 1), Scale(3, 2, 5), PAPER):
        for strategy in ("replicate", "shuffle"):
            plan = make_plan(scale, FLEET, task=Task(strategy=strategy))
            for found in plan.stages:
                figures = [value for value in asdict(found).values() if isinstance(value, (int, float))]
                assert np.isfinite(figures).all()
                assert min(figures) >= 0, found


# ------------------------------------------------------------------------------------------------ by hand


def test_a_step_lasts_as_long_as_what_it_needs_most_of() -> None:
    rates = replace(Rates(), task_seconds=0.5, step_seconds=1.0, disk_read_mbs=100.0, disk_write_mbs=50.0)
    cluster = Cluster(hosts=2, cores=2, memory_bytes=1, disk_bytes=1, network_bits=8e6)
    step = Step(
        "step", tasks=5, core_seconds=50.0, read_bytes=2e8, write_bytes=3e8, shuffle_bytes=4e6, serial_seconds=7
    )
    found = step.seconds(cluster, rates)
    assert found["cores"] == pytest.approx(2 * 10.0 + 2 * 0.5)  # five tasks on four cores are two waves
    assert found["disk"] == pytest.approx((2 + 6) / 2)
    assert found["network"] == pytest.approx(2.0 / 2)  # half of 4 MB leave their host, at 2 MB/s in all
    assert found["one process"] == pytest.approx(8.0)


def test_a_rate_is_in_the_unit_that_it_states() -> None:
    """One rate at a time: a billion events at 1 ns are a second, a million items at 1 us are, too."""
    nothing = Rates(**{rate.name: 1e-12 for rate in fields(Rates)})
    nothing = replace(nothing, disk_read_mbs=1e12, disk_write_mbs=1e12, gemm_gflops=1e12, neighbour_bytes=5.0)
    scale = Scale(items=10**7, users=10**7, edges=10**9)

    def cores(name: str, **rates: float) -> float:
        return stage(make_plan(scale, LAPTOP, replace(nothing, **rates), FIRST_HOP), name).core_seconds

    assert cores("ingest", read_event_ns=1.0) == pytest.approx(2.0, abs=1e-6), "the files are read twice"
    assert cores("ingest", store_event_ns=1.0) == pytest.approx(1.0, abs=1e-6)
    assert cores("ingest", store_node_ns=1000.0) == pytest.approx(20.0, abs=1e-6)
    assert cores("graph", collect_edge_ns=1.0) == pytest.approx(0.85, rel=1e-3), "what trains"
    assert cores("walks", exact_item_us=1.0) == pytest.approx(10.0, abs=1e-6)
    assert cores("walks", store_neighbour_ns=1.0) == pytest.approx(0.5, abs=1e-6)
    assert cores("walks", copy_edge_ns=1.0) == pytest.approx(1.7, rel=1e-3), "both directions"
    assert cores("features", store_value_ns=1.0) == pytest.approx(1.28, abs=1e-6)


def test_random_reads_cost_more_for_each_doubling_of_memory_beyond_the_reference() -> None:
    assert Rates.slowed(10.0, 3.0, REFERENCE_BYTES / 8) == 10.0
    assert Rates.slowed(10.0, 3.0, REFERENCE_BYTES) == 10.0
    assert Rates.slowed(10.0, 3.0, REFERENCE_BYTES * 8) == pytest.approx(19.0)


def test_lognormal_means_are_those_of_draws() -> None:
    random = np.random.default_rng(0)
    draws = 20 * random.lognormal(-(SIGMA**2) / 2, SIGMA, 400_000)
    for limit in (3, 20, 100, 10_000):
        assert cut_mean(20, limit) == pytest.approx(np.minimum(draws, limit).mean(), rel=0.01)
    assert met_mean(20) == pytest.approx((draws * draws).sum() / draws.sum(), rel=0.03)
    assert distinct(1000, 500) == pytest.approx(len(np.unique(random.integers(0, 500, 1000))), rel=0.05)
    assert below(20, 12) == pytest.approx((draws < 12).mean(), abs=0.005)
    assert cut_mean(0, 5) == cut_mean(5, 0) == 0


# ------------------------------------------------------------------------------------------------ as the stages do


@pytest.mark.parametrize("weighted", [False, True])
def test_the_graphs_bytes_are_those_that_the_walks_go_by(weighted: bool) -> None:
    report = {"edges": 1234, "users": 56, "items": 78, "weighted": weighted}
    manifest = Manifest("item_users", 1, (), Lineage("graph", {}, {}), report)
    assert graph_bytes(78, 56, 1234, weighted) == neighbourhoods.graph_bytes(manifest)


def test_numbers_taken_over_from_the_stages_are_theirs() -> None:
    assert MAX_USERS_READ == _MAX_USERS
    assert KEYS_PER_RANGE == RANGE_ROWS
    assert MAX_INDEX_PARTS == MAX_PARTS
    walks = Settings.model_fields["resources"].annotation.model_fields  # type: ignore[union-attr]
    defaults = {name: walks[name].default for name in ("rows_per_shard", "events_per_shard", "threads")}
    assert {name: getattr(Task(), name) for name in defaults} == defaults


def test_the_strategy_changes_where_the_graph_stops_fitting_half_of_the_memory() -> None:
    size = make_plan(of_edges(10**9), LAPTOP).graph_bytes
    enough = make_plan(of_edges(10**9), replace(LAPTOP, memory_bytes=2 * size))
    assert (enough.strategy, enough.graph_bytes) == ("replicate", size)
    short = make_plan(of_edges(10**9), replace(LAPTOP, memory_bytes=2 * size - 2))
    assert short.strategy == "shuffle"
    assert "half of a host's memory" in short.reason
    assert stage(short, "walks").shuffle_bytes > 0
    assert choose(size, replace(LAPTOP, disk_bytes=size - 1))[0] == "shuffle"
    assert choose(size, LAPTOP, host_memory=size - 1)[0] == "shuffle"
    assert choose(size, LAPTOP, wanted="shuffle") == ("shuffle", "as resources.walks.strategy says")


def test_weights_double_the_graphs_edges() -> None:
    plain, weighted = (make_plan(PAPER, FLEET, task=Task(graph=Graph(weighted=w))) for w in (False, True))
    assert weighted.graph_bytes - plain.graph_bytes == 8 * plain.training_edges


def test_the_papers_graph_fits_the_memory_of_one_host_and_its_vectors_do_not() -> None:
    plan = make_plan(PAPER, FLEET, task=Task().widened(PAPER, FLEET))
    assert plan.strategy == "replicate"
    assert 130 < plan.graph_bytes / GIB < 160
    assert not any(problem.startswith("inference") for problem in plan.problems), "partial sums are sent instead"
    gathered = replace(Task(), layers=InferenceResources(reducer="gather")).widened(PAPER, FLEET)
    problems = make_plan(PAPER, FLEET, task=gathered).problems
    assert any(problem.startswith("inference: needs") and "reducer: shuffle" in problem for problem in problems)
    assert not any(problem.startswith(("ingest", "graph")) for problem in plan.problems)


def test_what_does_not_fit_is_said_with_what_to_do() -> None:
    tiny = Cluster(hosts=1, cores=2, memory_bytes=GIB, disk_bytes=10**9)
    plan = make_plan(of_edges(10**8), tiny)
    assert plan.strategy == "shuffle"
    memory = next(problem for problem in plan.problems if problem.startswith("ingest: needs") and "memory" in problem)
    assert "on a host that has 1.00 GiB; lower resources.rows_per_shard" in memory
    assert any("of disk on a host" in problem for problem in plan.problems)
    assert not make_plan(of_edges(10**6), FLEET).problems


def test_shards_grow_so_that_exchanges_do_not() -> None:
    assert Task().widened(of_edges(10**7), LAPTOP) == Task()
    wide = Task().widened(PAPER, FLEET)
    assert wide.rows_per_shard >= PAPER.items / 5120
    narrow = make_plan(PAPER, FLEET, task=Task())
    assert stage(narrow, "ingest").core_seconds > stage(make_plan(PAPER, FLEET, task=wide), "ingest").core_seconds


# ------------------------------------------------------------------------------------------------ rates and mistakes


def test_every_rate_has_a_unit_a_meaning_and_a_value() -> None:
    for rate in fields(Rates):
        assert rate.metadata["unit"], rate.name
        assert rate.metadata["meaning"], rate.name
        assert getattr(Rates(), rate.name) > 0, rate.name


def test_every_rate_counts() -> None:
    """A rate that changes no plan would be measured for nothing."""
    tasks = [
        Task(strategy=strategy, walks=Walks.model_validate({"estimator": estimator}))
        for strategy in ("replicate", "shuffle") for estimator in ("exact", "walks")
    ]  # fmt: skip
    before = [make_plan(of_edges(10**9), FLEET, task=task) for task in tasks]
    for rate in fields(Rates):
        changed = replace(Rates(), **{rate.name: 2 * getattr(Rates(), rate.name)})
        after = [make_plan(of_edges(10**9), FLEET, changed, task) for task in tasks]
        assert after != before, rate.name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "differs in"),
        ({**asdict(Rates()), "task_seconds": -1.0}, "task_seconds is -1.0, expected a number of at least 0"),
        ({**asdict(Rates()), "task_seconds": "fast"}, "task_seconds is 'fast'"),
        ({**asdict(Rates()), "task_seconds": float("nan")}, "task_seconds is nan"),
        ({**asdict(Rates()), "other": 1.0}, "differs in other"),
    ],
)
def test_rates_of_another_version_or_that_are_no_numbers_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Rates.of(values, "rates.json")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 5, 5), "items is 0, expected at least 1"),
        ((5, 5, -1), "edges is -1, expected at least 1"),
        ((5, 5, 26), "26 edges do not fit 5 items x 5 users"),
        ((2**32 + 1, 5, 5), "ids are 32-bit"),
    ],
)
def test_a_size_that_cannot_be_is_refused(numbers: tuple[int, int, int], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Scale(*numbers)


@pytest.mark.parametrize("name", ["hosts", "cores", "memory_bytes", "disk_bytes", "network_bits"])
def test_a_cluster_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="expected more than 0"):
        replace(LAPTOP, **{name: 0})
