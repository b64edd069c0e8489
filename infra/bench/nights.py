"""Thirty simulated nights of a real shop, five of them planted bad; and what a night costs that has little new.

    python -m infra.bench.nights                  # thirty weeks of the bundled Online Retail data, a night each
    python -m infra.bench.nights --cost           # a night with 1 % new events against a night from nothing

Every night is `pinsage nightly` in a process of its own: what a scheduler starts. Data comes in real order of time, a
week's file a night. Bad nights: half of a week's events missing; the catalogue's texts and prices gone; a model that
learned nothing; a week dated a year ahead; last week's file delivered again as this week's. They are to be refused, and
the others not; the night after has the right data again.

`--cost` takes the demo's own settings and all its data: a night of 99 % of the events, one that adds the last 1 %, and,
on a site of its own, one of everything from nothing; seconds of the second by those of the third, and both's quality.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from infra.bench import measure

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "infra" / "demo"
DAY = 86_400
FIRST, START = datetime.date(2010, 12, 1), datetime.date(2011, 4, 3)
"""The shop's second year; the first night is that of START, a Sunday, and has all before it."""
BAD = {6: "half the data", 11: "no content", 16: "a model that learned nothing", 21: "a year ahead", 26: "last week"}


@dataclass(frozen=True)
class World:
    """A folder with the shop's files, its settings, and a site."""

    folder: Path
    site: Path
    nights: int
    items: int

    @property
    def settings(self) -> Path:
        return self.folder / "pinsage.yaml"

    def date(self, night: int) -> str:
        """The last day of a night's data."""
        return (START + datetime.timedelta(days=7 * night)).isoformat()

    def week(self, night: int) -> pa.Table:
        """The events of a night: a week's; the first has all before."""
        last = _moment(START + datetime.timedelta(days=7 * night + 1))
        first = last - 7 * DAY if night else _moment(FIRST)
        moments = self.events.column("timestamp")
        return self.events.filter(pc.and_(pc.greater_equal(moments, first), pc.less(moments, last)))

    @property
    def events(self) -> pa.Table:
        """All events of the shop's commonest items."""
        return pq.read_table(self.folder / "all.parquet")

    def write(self) -> None:
        """The settings, the catalogue, and all events to cut weeks from."""
        events, items = pq.read_table(DEMO / "interactions.parquet"), pq.read_table(DEMO / "items.parquet")
        if self.items:
            counts = events.column("item_key").value_counts()
            order = np.argsort(-counts.field("counts").to_numpy(), kind="stable")[: self.items]
            kept = counts.field("values").take(pa.array(order))
            events = events.filter(pc.is_in(events.column("item_key"), kept))
            items = items.filter(pc.is_in(items.column("item_key"), kept))
        (self.folder / "events").mkdir(parents=True)
        pq.write_table(events, self.folder / "all.parquet")
        pq.write_table(items, self.folder / "items.parquet")
        tree = yaml.safe_load((ROOT / "infra" / "settings" / "online-retail.yaml").read_text())
        task = tree["task"]
        task["data"]["interactions"]["paths"] = "events/*.parquet"
        task["data"]["items"]["paths"] = "items.parquet"
        task["training"] |= {"epochs": 2}
        task |= {
            "features": {"text_dimensions": 64}, "model": {"hidden_dimensions": 64, "output_dimensions": 64},
            "walks": {"num_neighbours": 20}, "evaluation": {"max_events": 5000, "bootstrap": 300, "examples": 0},
        }  # fmt: skip
        tree["resources"] = {
            "site": str(self.site), "cache": str(self.folder / "cache"), "rows_per_shard": 5000,
            "events_per_shard": 500_000, "spark": {"master": "local[2,3]", "driver_memory": "1g"},
            "releases": {"keep_count": 3, "keep_days": 0.0},
        }  # fmt: skip
        self.settings.write_text(yaml.safe_dump(tree, sort_keys=False))

    def deliver(self, night: int, bad: str = "", seed: int = 0) -> list[str]:
        """Put a night's files where the pipeline finds them, spoilt in a way; more arguments for the command."""
        week, name = self.week(night), f"{self.date(night)}.parquet"
        pq.write_table(pq.read_table(DEMO / "items.parquet").filter(self._listed()), self.folder / "items.parquet")
        if bad == "half the data":
            week = week.filter(pa.array(np.random.default_rng(seed).random(week.num_rows) < 0.5))
        elif bad == "a year ahead":
            week = week.set_column(2, "timestamp", pc.add(week.column("timestamp"), 365 * DAY))
        elif bad == "last week":
            week = self.week(night - 1)
        elif bad == "no content":
            items = pq.read_table(self.folder / "items.parquet")
            items = items.set_column(1, "title", pa.array([""] * len(items)))
            items = items.set_column(2, "price", pa.array([0.0] * len(items), items.schema.field("price").type))
            pq.write_table(items, self.folder / "items.parquet")
        pq.write_table(week, self.folder / "events" / name)
        return ["--set", "task.training.learning_rate=1e-12"] if bad == "a model that learned nothing" else []

    def _listed(self) -> pa.Array:
        items = pq.read_table(DEMO / "items.parquet").column("item_key")
        return pc.is_in(items, pc.unique(self.events.column("item_key")))

    def command(self, night: int, more: Sequence[str] = ()) -> list[str]:
        """`pinsage nightly` for a night."""
        arguments = ["nightly", "--settings", str(self.settings), "--night", self.date(night), *more]
        return [sys.executable, "-m", "jobs.cli", *arguments]


def _moment(day: datetime.date) -> int:
    return int(datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.timezone.utc).timestamp())


def environment() -> dict[str, str]:
    """Of every command: the project's code, no colours."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "PYTHONUNBUFFERED": "1"}


def size_of(folder: Path) -> int:
    """Bytes below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ------------------------------------------------------------------------------------------------ undisturbed nights


def run_nights(world: World, bad: dict[int, str], log: Path, seed: int) -> list[dict[str, Any]]:
    """Every night once, a bad one's data mended the night after; what became of each."""
    found: list[dict[str, Any]] = []
    for night in range(world.nights):
        if night - 1 in bad:
            world.deliver(night - 1)
        more = world.deliver(night, bad.get(night, ""), seed)
        began, code = time.monotonic(), 0
        if not summary(world, night):  # in a folder that was kept, what has ended is taken as it is
            with log.open("ab") as stream:
                code = subprocess.run(
                    world.command(night, more), env=environment(), cwd=ROOT, stdout=stream, stderr=stream, check=False
                ).returncode
        told = summary(world, night)
        blocked = [check["name"] for check in told.get("checks", []) if check["verdict"] == "block"]
        found.append(
            {
                "night": world.date(night), "bad": bad.get(night, ""), "code": code, "status": told.get("status"),
                "blocked": blocked, "seconds": round(time.monotonic() - began, 1),
                "training": told.get("training", {}).get("plan"), "site_bytes": size_of(world.site),
                "datasets": released(world, world.date(night)), "mrr": (told.get("tonight") or {}).get("mrr"),
            }
        )  # fmt: skip
        line = found[-1]
        print(
            f"{line['night']}  {line['status'] or 'no summary':10} {line['seconds']:6.1f} s  {line['training'] or '':8}"
            f"{line['site_bytes'] / 1e6:7.0f} MB  MRR {line['mrr'] or 0:.3f}  {line['bad']}"
            f"{' <- ' + ', '.join(blocked) if blocked else ''}",
            flush=True,
        )
    return found


def summary(world: World, night: int) -> dict[str, Any]:
    """What the night says of itself; nothing if it says nothing."""
    try:
        told: dict[str, Any] = json.loads((world.site / "nights" / f"{world.date(night)}.json").read_text())
    except FileNotFoundError:
        return {}
    return told


def released(world: World, release: str) -> dict[str, str]:
    """Content hashes of a release's datasets; nothing if there is none."""
    try:
        found: dict[str, str] = json.loads((world.site / "releases" / f"{release}.json").read_text())["datasets"]
    except FileNotFoundError:
        return {}
    return found


def count_nights(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many ended how, and whether that was right."""
    ended = [line for line in found if line["status"] in ("published", "refused")]
    sizes = [line["site_bytes"] for line in found]
    return {
        "nights": len(found), "ended": len(ended),
        "published": sum(line["status"] == "published" for line in found),
        "bad_refused": sum(line["status"] == "refused" for line in found if line["bad"]),
        "bad_published": sum(line["status"] == "published" for line in found if line["bad"]),
        "good_refused": sum(line["status"] == "refused" for line in found if not line["bad"]),
        "largest_site_mb": round(max(sizes) / 1e6), "last_site_mb": round(sizes[-1] / 1e6),
        "seconds_by_plan": {
            plan: round(float(np.median([line["seconds"] for line in found if line["training"] == plan])), 1)
            for plan in sorted({line["training"] for line in found if line["training"]})
        },
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ cost


def measure_cost(folder: Path) -> dict[str, Any]:
    """A night that adds one event in a hundred, by a night of all of them from nothing."""
    events = pq.read_table(DEMO / "interactions.parquet").sort_by("timestamp")
    cut = round(0.99 * events.num_rows)
    before = datetime.datetime.fromtimestamp(events.column("timestamp")[cut - 1].as_py(), datetime.timezone.utc)
    first, last = before.date().isoformat(), "2011-12-09"
    parts = {first: events.slice(0, cut), last: events.slice(cut)}
    seconds, metrics = {}, {}
    for site, nights in (("grown", [first, last]), ("whole", [last])):
        home = folder / site
        (home / "events").mkdir(parents=True)
        shutil.copy(DEMO / "items.parquet", home)
        tree = yaml.safe_load((ROOT / "infra" / "settings" / "online-retail.yaml").read_text())
        tree["task"]["data"]["interactions"]["paths"] = "events/*.parquet"
        tree["task"]["data"]["items"]["paths"] = "items.parquet"
        del tree["resources"]["run"]
        tree["resources"] |= {"site": "site", "cache": str(home / "cache")}
        (home / "pinsage.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        if site == "whole":
            pq.write_table(parts[first], home / "events" / f"{first}.parquet")
        for night in nights:
            pq.write_table(parts[night], home / "events" / f"{night}.parquet")
            command = [sys.executable, "-m", "jobs.cli", "nightly", "--settings", str(home / "pinsage.yaml")]
            began = time.monotonic()
            with (folder / "cost.log").open("ab") as stream:
                subprocess.run([*command, "--night", night], env=environment(), cwd=ROOT, stdout=stream, check=True)
            seconds[f"{site} {night}"] = time.monotonic() - began
            told = json.loads((home / "site" / "nights" / f"{night}.json").read_text())
            by_stage = {stage["stage"]: round(stage["seconds"], 1) for stage in told["stages"]}
            print(
                f"{site} {night}: {seconds[f'{site} {night}']:.1f} s, {told['training']['plan']}; {by_stage}",
                flush=True,
            )
        found = json.loads((home / "site" / "runs" / last / "evaluation" / "metrics.json").read_text())
        metrics[site] = found["tasks"]["item_to_item"]["slices"]["all"]["methods"]["PinSage"]
    for name in ("mrr", "hit_rate@10"):
        one, other = (metrics[site][name] for site in ("grown", "whole"))
        whole = f"{other['mean']:.4f} from nothing, {other['low']:.4f} to {other['high']:.4f}"
        print(f"{name}: {one['mean']:.4f} grown, {whole}")
    ratio = seconds[f"grown {last}"] / seconds[f"whole {last}"]
    return {"incremental_night_vs_full": ratio, "seconds": seconds, "quality": metrics}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=30)
    parser.add_argument("--items", type=int, default=0, help="only the commonest so many products; 0: all")
    parser.add_argument("--cost", action="store_true", help="only what a night with 1 %% new events costs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    given = parser.parse_args(arguments)
    about = measure.machine()
    print("\n".join(f"{name:12} {value}" for name, value in about.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-nights-") as temporary:
        folder = given.keep or Path(temporary)
        if given.cost:
            results = measure_cost(folder)
        else:
            world = World(folder / "plain", folder / "plain" / "site", given.nights, given.items)
            world.write()
            bad = {night: kind for night, kind in BAD.items() if night < given.nights}
            results = count_nights(run_nights(world, bad, folder / "nights.log", given.seed))
    print(json.dumps({**results, "machine": about}, default=float))


if __name__ == "__main__":
    main()
