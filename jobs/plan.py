"""`pinsage plan`: what a run of a given size will take on given hosts, as a table; nothing is started.

    pinsage plan --items 2e9 --users 1e9 --edges 18e9 --hosts 20 --memory 512G --cores 64 --disk 8T
    pinsage plan --calibrate

The second measures this machine's rates (see `calibrate`) and keeps them; without it those shipped are used.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from jobs.stage import OverrideOption, exit_codes
from pipeline.contracts.config import load_settings
from pipeline.contracts.errors import SettingsError
from pipeline.contracts.host import physical_memory
from pipeline.plan import SHIPPED, Cluster, Plan, Rates, Scale, Task, make_plan

PANEL = "Setting up"
_DAY, _HOUR, _MINUTE = 86_400, 3_600, 60


def plan_command(
    items: Annotated[str | None, typer.Option(help="Items: 2e9 and 2_000_000 are numbers too.")] = None,
    users: Annotated[str | None, typer.Option(help="Users, boards, baskets: whatever groups items.")] = None,
    edges: Annotated[str | None, typer.Option(help="Interactions, each of another user and item.")] = None,
    hosts: Annotated[int, typer.Option(help="Hosts, all alike.")] = 1,
    memory: Annotated[str | None, typer.Option(help="Memory of a host, as 512G. Default: this machine's.")] = None,
    cores: Annotated[int | None, typer.Option(help="Cores of a host. Default: this machine's.")] = None,
    disk: Annotated[str | None, typer.Option(help="Free disk of a host, as 8T. Default: this machine's.")] = None,
    network: Annotated[float, typer.Option(help="Network of a host, in Gbit/s.")] = 25.0,
    neighbours: Annotated[int | None, typer.Option(help="T, instead of task.walks.num_neighbours.")] = None,
    dimensions: Annotated[int | None, typer.Option(help="d, instead of task.model.output_dimensions.")] = None,
    content: Annotated[int, typer.Option(help="Numbers in an item's content vector.")] = 128,
    weighted: Annotated[bool, typer.Option("--weighted", help="As task.graph.weighted.")] = False,
    settings: Annotated[str | None, typer.Option("--settings", "-s", help="Settings to plan with.")] = None,
    override: OverrideOption = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine first; a minute.")] = False,
    constants: Annotated[
        Path | None, typer.Option(help="Where measured rates are kept. Default: in your cache folder.")
    ] = None,
    rates: Annotated[bool, typer.Option("--rates", help="Also print every rate.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict time, memory, disk and network of every stage for a size of data, and whether it fits."""
    with exit_codes():
        path = constants or default_constants()
        if calibrate:
            _calibrate(path)
        known, source = load_rates(path, constants is not None)
        given = {"items": items, "users": users, "edges": edges}
        if not any(given.values()) and (calibrate or rates):
            _print_rates(known, source)
            return
        missing = [f"--{name}" for name, value in given.items() if value is None]
        if missing:
            example = "pinsage plan --items 1e6 --users 1e5 --edges 2e7"
            raise SettingsError(f"{', '.join(missing)}: not given; for example: {example}")
        scale = Scale(**{name: _count(name, value or "") for name, value in given.items()})
        cluster = Cluster(
            hosts, _own_cores() if cores is None else cores, _size("memory", memory, physical_memory),
            _size("disk", disk, _own_disk), network * 1e9,
        )  # fmt: skip
        task = _task(scale, cluster, settings, override or [], neighbours, dimensions, content, weighted)
        plan = make_plan(scale, cluster, known, task)
        if as_json:
            print(json.dumps({**asdict(plan), "rates": asdict(known), "rates_from": source}, indent=1))
            return
        if rates:
            _print_rates(known, source)
        print_plan(plan, source)


def _task(
    scale: Scale, cluster: Cluster, settings: str | None, overrides: list[str], neighbours: int | None,
    dimensions: int | None, content: int, weighted: bool,
) -> Task:  # fmt: skip
    """What the settings file says, or defaults with larger shards where there would be too many."""
    if overrides and settings is None:
        raise SettingsError("--set changes a settings file: give --settings too")
    for name, value in (("neighbours", neighbours), ("dimensions", dimensions), ("content", content)):
        if value is not None and value < 1:
            raise SettingsError(f"--{name} is {value}, expected at least 1")
    task = Task(content_values=content).widened(scale, cluster)
    if settings is not None:
        task = Task.of(load_settings(settings, overrides), content)
    return task.changed(neighbours, dimensions, weighted)


# ------------------------------------------------------------------------------------------------ rates


def default_constants() -> Path:
    """Where measured rates are kept for this user."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "pinsage" / "rates.json"


def load_rates(path: Path, must_exist: bool) -> tuple[Rates, str]:
    """The rates measured here, or the shipped ones, and words for which they are. Raises SettingsError."""
    if not path.exists() and not must_exist:
        return Rates(), SHIPPED
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Rates.of(found["rates"], str(path)), f"measured on {found['machine']}, {found['date']}: {path}"
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}; `pinsage plan --calibrate` makes it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} is no file of rates ({error!r}); `pinsage plan --calibrate` makes one") from None


def _calibrate(path: Path) -> None:
    from jobs.calibrate import calibrate

    watched = Console(stderr=True, highlight=False)
    load = os.getloadavg()[0]
    if load > 0.5 * _own_cores():
        watched.print(f"calibrate: others use this machine (load {load:.1f}, {_own_cores()} cores): rates will be slow")
    measured = calibrate(lambda text: watched.print(text, soft_wrap=True), busy_cores=_own_cores() - 1)
    today = datetime.date.today().isoformat()
    machine = f"{platform.node()}, {_own_cores()} cores, load {load:.1f}"
    tree = {"date": today, "machine": machine, "rates": asdict(measured)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}; give --constants another place") from None
    watched.print(f"calibrate: wrote {path}", soft_wrap=True)


# ------------------------------------------------------------------------------------------------ numbers


def _count(name: str, text: str) -> int:
    try:
        value = float(text.replace("_", "").replace(",", ""))
        if value != int(value):
            raise ValueError
        return int(value)
    except (ValueError, OverflowError):
        raise SettingsError(f"--{name} is {text!r}, expected a whole number such as 1000000 or 1e6") from None


def _size(name: str, text: str | None, default: Any) -> int:
    """Bytes: G and GB are 10^9, GiB 2^30; a bare number counts GB."""
    if text is None:
        return int(default())
    try:
        return int(TypeAdapter(ByteSize).validate_python(f"{text}GB" if text.replace(".", "", 1).isdigit() else text))
    except ValidationError:
        raise SettingsError(f"--{name} is {text!r}, expected a size such as 512G or 24GiB") from None


def _own_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _own_disk() -> int:
    return shutil.disk_usage(tempfile.gettempdir()).free


# ------------------------------------------------------------------------------------------------ printing


def print_plan(plan: Plan, source: str) -> None:
    """The plan as a table for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    scale, cluster = plan.scale, plan.cluster
    console.print(
        f"{scale.items:,} items, {scale.users:,} users, {scale.edges:,} interactions, {plan.training_edges:,} to "
        f"train; {cluster.hosts} x {cluster.cores} cores, {_bytes(cluster.memory_bytes)} memory, "
        f"{_bytes(cluster.disk_bytes)} disk, {cluster.network_bits / 1e9:g} Gbit/s",
        soft_wrap=True,
    )
    console.print(f"strategy {plan.strategy}: {plan.reason}", soft_wrap=True)
    console.print(
        f"resources.rows_per_shard {plan.rows_per_shard:,}, resources.events_per_shard {plan.events_per_shard:,}",
        soft_wrap=True,
    )
    table = Table("stage", "time", "core-time", "binds", "memory/host", "disk/host", "copies/host", "exchanged")
    for column in (1, 2, 4, 5, 6, 7):
        table.columns[column].justify = "right"
    for stage in plan.stages:
        table.add_row(
            stage.name, _time(stage.seconds), _time(stage.core_seconds), stage.binds, _bytes(stage.memory_bytes),
            _bytes(stage.disk_bytes / cluster.hosts), _bytes(stage.local_bytes), _bytes(stage.shuffle_bytes),
        )  # fmt: skip
    console.print(table)
    console.print("disk/host: its part of the run's folder, your files included; copies/host: local, beside it.")
    if not plan.problems:
        console.print("[green]fits[/]: memory and disk of every host")
    for problem in plan.problems:
        console.print(f"[red]does not fit[/]: {problem}", soft_wrap=True)
    console.print(f"rates {source}", soft_wrap=True)


def _print_rates(known: Rates, source: str) -> None:
    table = Table("rate", "value", "unit", "meaning")
    table.columns[1].justify = "right"
    for rate in fields(Rates):
        value = getattr(known, rate.name)
        table.add_row(rate.name, f"{value:,.4g}", rate.metadata["unit"], rate.metadata["meaning"])
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    console.print(table)
    console.print(f"rates {source}", soft_wrap=True)


def _time(seconds: float) -> str:
    """Three figures, in the largest unit that is reached."""
    for size, unit in ((365 * _DAY, "years"), (_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.3g} s"


def _bytes(size: float) -> str:
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= factor:
            return f"{size / factor:,.3g} {unit}" if size < 1000 * factor else f"{size / factor:,.0f} {unit}"
    return f"{size / 1e6:.1g} MB" if size else "-"
