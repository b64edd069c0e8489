"""Thirty simulated nights of a real shop, five of them planted bad; and nights under random faults.

    python -m infra.bench.nights                  # thirty weeks of the bundled Online Retail data, a night each
    python -m infra.bench.nights --faults 200     # first undisturbed, then with faults, beside a reader that polls

Every night is `pinsage nightly` in a process of its own: what a scheduler starts. Data comes in real order of time, a
week's file a night. Bad nights: half of a week's events missing; the catalogue's texts and prices gone; a model that
learned nothing; a week dated a year ahead; last week's file delivered again as this week's. They are to be refused, and
the others not; the night after has the right data again.

Faults come at random moments, several a night: kill -9 of the driver, of a Spark worker, of a training rank, of the
publisher as its release's record appears; a full disk; a shard changed or gone; a lock of another clock. After each the
same command is typed again until the night ends. A reader opens the live release all the time: it must be whole, of one
run, its scores those of its embeddings. In the end every release must have the bytes of the undisturbed nights'.

The last line is one JSON object: faults, broken_releases, lost_runs, and what else was counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
REFUSED, OUT_OF_TIME = 3, 4
KINDS = ("driver", "worker", "rank", "publisher", "disk", "shard", "missing", "clock")
_LONGEST_SECONDS = 900


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
        began = time.monotonic()
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


# ------------------------------------------------------------------------------------------------ faults


class Faults:
    """What goes wrong, drawn by seed; each kind does its harm to the night that is running, or lies broken off."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.random = world, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.ballast = world.site / ".ballast"
        self.can_fill = os.path.ismount(world.site.parent)

    def strike(self, running: subprocess.Popen[bytes], night: int, longest: float) -> None:
        """One fault, at a random moment of the next seconds, unless the night ends before."""
        kinds = [kind for kind in KINDS if kind != "disk" or self.can_fill]
        kind = kinds[sum(self.done.values()) % len(kinds)]
        if kind == "publisher":
            record = self.world.site / "releases" / f"{self.world.date(night)}.json"
            if not self._wait(running, _LONGEST_SECONDS, record.exists):
                return
        elif self._wait(running, self.random.uniform(0.5, longest), lambda: False) is None:
            return
        if kind == "worker":
            harmed = self._kill(running, "pyspark.daemon")
        elif kind == "rank":
            harmed = self._wait(running, 60, lambda: self._kill(running, "jobs.train")) is True
        elif kind == "disk":
            harmed = self._fill(running)
        else:
            _kill_group(running)
            harmed = True
            if kind in ("shard", "missing"):
                harmed = self._damage(night, kind)
            elif kind == "clock":
                self._jump()
        self.done[kind if harmed else "driver"] += 1

    def _wait(self, running: subprocess.Popen[bytes], seconds: float, until: Any) -> bool | None:
        """True once until holds, False after so many seconds, None if the night ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if until():
                return True
            if running.poll() is not None:
                return None
            time.sleep(0.02)
        return False

    def _kill(self, running: subprocess.Popen[bytes], what: str) -> bool:
        """kill -9 one process of the night whose command names it."""
        found = [pid for pid, line in _children(running.pid) if what in line]
        if not found:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.random.choice(found), signal.SIGKILL)
        return True

    def _fill(self, running: subprocess.Popen[bytes]) -> bool:
        """Take all room for some seconds."""
        free = shutil.disk_usage(self.world.site).free
        with open(self.ballast, "wb") as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, free - 4096))
        self._wait(running, self.random.uniform(1, 10), lambda: False)
        self.ballast.unlink()
        return True

    def _damage(self, night: int, kind: str) -> bool:
        """Change or delete a file of a finished dataset of tonight's run."""
        run = self.world.site / "runs" / self.world.date(night)
        if released(self.world, run.name):
            return False  # a release is not ours to mend: its readers are told, see the tests of releases
        files = [f for m in run.glob("*/_manifest.json") for f in m.parent.iterdir() if f.is_file() and f != m]
        if not files:
            return False
        file = self.random.choice(sorted(files))
        if kind == "missing":
            file.unlink()
            return True
        data = bytearray(file.read_bytes())
        if data:
            data[self.random.randrange(len(data))] ^= 0xFF
        file.write_bytes(data or b"x")
        return True

    def _jump(self) -> None:
        """The lock as a host left it whose clock is a day ahead or behind."""
        path = self.world.site / "lock.json"
        with suppress(FileNotFoundError):
            lock = json.loads(path.read_text())
            ahead = self.random.choice([-DAY, DAY])
            path.write_text(json.dumps({**lock, "beat_at": lock["beat_at"] + ahead, "taken_at": 0.0}))


def _children(pid: int) -> list[tuple[int, str]]:
    """All processes below one, and their command lines."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    below, found = {pid}, []
    for own, parent, *line in sorted(rows, key=lambda row: int(row[0])):
        if int(parent) in below:
            below.add(int(own))
            found.append((int(own), line[0] if line else ""))
    return found


def _kill_group(running: subprocess.Popen[bytes]) -> None:
    """kill -9 of the driver alone: what it started must notice by itself."""
    running.send_signal(signal.SIGKILL)
    running.wait()


def run_faulty(world: World, faults: int, log: Path, seed: int) -> tuple[list[dict[str, Any]], Faults]:
    """Every night with its share of the faults, typed again until it ends."""
    harm, found, each = Faults(world, seed), [], -(-faults // world.nights)
    for night in range(world.nights):
        world.deliver(night)
        began, tries, struck = time.monotonic(), 0, sum(harm.done.values())
        code = -1
        while code not in (0, REFUSED) and tries < each + 12:
            tries += 1
            with log.open("ab") as stream:
                stream.write(f"\n=== {world.date(night)} try {tries}\n".encode())
                running = subprocess.Popen(
                    world.command(night), env=environment(), cwd=ROOT, stdout=stream, stderr=stream
                )
                if sum(harm.done.values()) - struck < each:
                    harm.strike(running, night, longest=25.0)
                try:
                    code = running.wait(_LONGEST_SECONDS)
                except subprocess.TimeoutExpired:
                    _kill_group(running)
        told = summary(world, night)
        found.append(
            {
                "night": world.date(night), "code": code, "status": told.get("status"), "tries": tries,
                "datasets": released(world, world.date(night)), "seconds": round(time.monotonic() - began, 1),
            }
        )  # fmt: skip
        line = found[-1]
        print(
            f"{line['night']}  {line['status'] or 'no summary':10} {line['seconds']:6.1f} s  {tries} tries, "
            f"{sum(harm.done.values())} faults so far: {dict(harm.done)}",
            flush=True,
        )
    return found, harm


# ------------------------------------------------------------------------------------------------ the reader


def read_for_ever(site: str, out: Path) -> None:
    """Open the live release again and again; a line of JSON for every look, with what was wrong."""
    from pipeline.contracts.errors import PipelineError

    rng = np.random.default_rng(0)
    with out.open("a") as file:
        while True:
            try:
                problem, release = look(site, rng)
            except PipelineError as error:
                problem, release = ("" if "no live release yet" in str(error) else repr(error)), ""
            except Exception as error:
                problem, release = repr(error), ""
            file.write(json.dumps({"release": release, "problem": problem}) + "\n")
            file.flush()
            time.sleep(0.25)


def look(site: str, rng: np.random.Generator) -> tuple[str, str]:
    """What is wrong with the live release, and its id: scores of a search must be products of its own embeddings."""
    from pipeline.releases.reading import Releases

    with Releases(site).open() as release:
        rows = rng.integers(release.record.num_items, size=2)
        keys = release.index.keys.keys(rows)
        vectors = np.stack([release.index.vector(key) for key in keys])
        found, scores = release.index.search(vectors, 3)
        for vector, others, told in zip(vectors, found, scores, strict=True):
            own = [float(vector @ release.index.vector(other)) for other in others]
            if not np.allclose(own, told, atol=0.02):
                return f"scores {told} of {others}, products {own}", release.id
        if release.record.datasets["model"] != release.space_id:
            return "the space is not its model's", release.id
        return "", release.id


@contextmanager
def reader(site: Path, out: Path) -> Iterator[None]:
    """A reader that polls while the block runs."""
    polling = subprocess.Popen(
        [sys.executable, "-m", "infra.bench.nights", "--reader", str(site), "--log", str(out)],
        env=environment(),
        cwd=ROOT,
    )
    try:
        yield
    finally:
        polling.kill()
        polling.wait()


# ------------------------------------------------------------------------------------------------ main


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A disk of its own at folder, if this user may mount one, so that it can be filled; else the folder as it is."""
    folder.mkdir(parents=True)
    size = f"size={megabytes}m"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        print("the disk is not filled: this user may mount none", flush=True)
    try:
        yield
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "-l", folder], check=False)


def run(nights: int, items: int, faults: int, seed: int, keep: Path | None) -> dict[str, Any]:
    """Measure, print, and return what the last line says."""
    about = measure.machine()
    print("\n".join(f"{name:12} {value}" for name, value in about.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-nights-") as temporary:
        folder = keep or Path(temporary)
        plain = World(folder / "plain", folder / "plain" / "site", nights, items)
        plain.write()
        bad = {} if faults else {night: kind for night, kind in BAD.items() if night < nights}
        undisturbed = run_nights(plain, bad, folder / "nights.log", seed)
        results: dict[str, Any] = {"undisturbed": count_nights(undisturbed), "machine": about}
        if not faults:
            return {**results["undisturbed"], "machine": about}
        with small_disk(folder / "disk", 2000):
            harmed = World(folder / "harmed", folder / "disk" / "site", nights, items)
            harmed.write()
            harmed.site.mkdir()
            with reader(harmed.site, folder / "reads.jsonl"):
                found, harm = run_faulty(harmed, faults, folder / "faults.log", seed)
        reads = [json.loads(line) for line in (folder / "reads.jsonl").read_text().splitlines()]
        broken = [read["problem"] for read in reads if read["problem"]]
        for problem, times in Counter(broken).most_common(10):
            print(f"broken, {times} times: {problem}")
        lost = [line["night"] for line in found if line["status"] != "published"]
        pairs = list(zip(undisturbed, found, strict=True))
        differ = [one["night"] for one, other in pairs if one["datasets"] != other["datasets"]]
        return results | {
            "faults": sum(harm.done.values()), "kinds": dict(harm.done), "broken_releases": len(broken),
            "reads": len(reads), "releases_read": len({read["release"] for read in reads if read["release"]}),
            "lost_runs": len(lost), "nights": nights, "different_from_undisturbed": differ,
            "tries": sum(line["tries"] for line in found),
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=30)
    parser.add_argument("--items", type=int, default=0, help="only the commonest so many products; 0: all")
    parser.add_argument("--faults", type=int, default=0, help="so many random faults over the nights; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.reader:
        read_for_ever(given.reader, given.log)
        return
    print(json.dumps(run(given.nights, given.items, given.faults, given.seed, given.keep), default=float))


if __name__ == "__main__":
    main()
