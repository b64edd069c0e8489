"""Raw interactions to neighbours at any size on one machine: time, memory and bytes of every stage.

    python -m infra.bench.generate --items 50000000 --users 10000000 --edges 1000200000 --out DATA
    python -m infra.bench.scale --data DATA --run RUN --cache CACHE

Runs `pinsage ingest`, `graph` and `walks` (T = 50) as a user would, on `--cores` cores, and reads the memory of the
whole process tree twice a second from /proc: the proportional share of every page, so that what processes share counts
once, and of it the part that is not file cache. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from infra.bench.measure import machine
from pipeline.contracts.datasets import open_manifest
from pipeline.contracts.storage import Storage

STAGES = ("ingest", "graph", "walks")
DATASETS = {
    "ingest": ("interactions", "users", "items"),
    "graph": ("item_users", "user_items"),
    "walks": ("neighbours",),
}

_TICKS = os.sysconf("SC_CLK_TCK")


def settings(data: Path, run: Path, cache: Path, cores: int, rows: int, events: int) -> Path:
    """Write the settings file of the run and return its path; nearly all events are kept for training."""
    tree: dict[str, Any] = {
        "task": {
            "name": "scale",
            "data": {
                "interactions": {
                    "paths": str(data / "interactions" / "*.parquet"),
                    "user": "user",
                    "item": "item",
                    "timestamp": "timestamp",
                },
            },
            "split": {"validation": 0.0, "test": 0.0001},
            "walks": {"num_neighbours": 50},
        },
        "resources": {
            "run": str(run),
            "cache": str(cache),
            "rows_per_shard": rows,
            "events_per_shard": events,
            "spark": {
                "master": f"local[{cores}]",
                "driver_memory": "2g",
                "conf": {"spark.local.dir": str(run / "spark")},
            },
        },
    }
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def measured(command: list[str], folders: list[Path]) -> dict[str, float]:
    """Run a command: wall and core seconds, the process tree's peak memory, and the folders' peak size, in GiB."""
    started = time.monotonic()
    process = subprocess.Popen(command)
    peak = {"memory_gib": 0.0, "private_gib": 0.0, "disk_gib": 0.0}
    looked = 0.0
    used: dict[str, float] = {}
    while process.poll() is None:
        total, private = tree_usage(process.pid, used)
        peak["memory_gib"] = max(peak["memory_gib"], total / 2**30)
        peak["private_gib"] = max(peak["private_gib"], private / 2**30)
        if time.monotonic() - looked > 5:
            looked = time.monotonic()
            peak["disk_gib"] = max(peak["disk_gib"], sum(map(folder_bytes, folders)) / 2**30)
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return {"seconds": time.monotonic() - started, "core_seconds": sum(used.values()), **peak}


def tree_usage(root: int, used: dict[str, float]) -> tuple[int, int]:
    """Bytes of the process and all below it: every page by its proportional share, and the anonymous part of that.

    Notes in `used` the core seconds that each process has used so far.
    """
    children: dict[int, list[int]] = {}
    seconds: dict[int, tuple[str, float]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            seconds[int(entry.name)] = (f"{entry.name} {fields[19]}", (int(fields[11]) + int(fields[12])) / _TICKS)
    total = private = 0
    waiting = [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:] if line.endswith("kB")}
        total += sizes.get("Pss", 0)
        private += sizes.get("Pss_Anon", 0)
        if process in seconds:
            name, spent = seconds[process]
            used[name] = spent
    return total, private


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder that are there while it looks."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except OSError:
                continue
    return total


def main() -> None:
    """Run the stages one after the other and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that infra.bench.generate wrote")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run; removed first unless --keep")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the local copy of the graph")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rows-per-shard", type=int, default=500_000)
    parser.add_argument("--events-per-shard", type=int, default=8_000_000)
    parser.add_argument("--keep", action="store_true", help="go on with what the run's folder holds")
    parser.add_argument("--set", action="append", default=[], help="a setting: dotted.key=value")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    options = parser.parse_args()
    if not options.keep:
        for folder in (options.run, options.cache):
            shutil.rmtree(folder, ignore_errors=True)
    file = settings(
        options.data, options.run, options.cache, options.cores, options.rows_per_shard, options.events_per_shard
    )  # fmt: skip
    print(json.dumps(machine(), indent=1), flush=True)
    given = [word for override in options.set for word in ("--set", override)]
    found: dict[str, Any] = {"raw_gib": folder_bytes(options.data / "interactions") / 2**30}
    for stage in options.stages:
        command = [sys.executable, "-m", "jobs.cli", stage, "--settings", str(file), *given]
        report = measured(command, [options.run, options.cache])
        manifests = [open_manifest(Storage(str(options.run)), name) for name in DATASETS[stage]]
        report["stored_gib"] = sum(manifest.num_bytes for manifest in manifests) / 2**30
        found[stage] = {name: round(value, 3) for name, value in report.items()}
        print(f"{stage}: " + ", ".join(f"{name} {value:,.2f}" for name, value in report.items()), flush=True)
    graph = open_manifest(Storage(str(options.run)), "item_users").metadata
    found |= {name: graph[name] for name in ("items", "users", "edges")}
    if "walks" in found:
        found["walks_core_us_per_item"] = round(found["walks"]["core_seconds"] / graph["items"] * 1e6, 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
