"""Nights under random faults, beside a reader that polls: nothing broken is ever live, and every night ends.

    python -m infra.bench.chaos --faults 200      # first undisturbed, then with faults

The nights are those of `infra.bench.nights`, of the commonest products. Faults come at random moments, several a night:
kill -9 of the driver, of a Spark worker, of a training rank, of the publisher as its release's record appears; a full
disk; a shard changed or gone; a lock of another clock. After each the same command is typed again until the night ends.
A reader opens the live release all the time: it must be whole, of one run, its scores those of its embeddings. In the
end every release must have the bytes of the undisturbed nights'. The disk is filled where this user may mount one.
Last, some nights with their site at s3://, a real HTTP endpoint behind a proxy that fails: 500s, resets, silence, short
bodies, old listings. They must end with the same bytes too.

The last line is one JSON object: faults, broken_releases, lost_runs, and what else was counted.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from infra.bench import measure
from infra.bench.faults import ENVIRONMENT, FaultyProxy, moto_server
from infra.bench.nights import DAY, ROOT, World, count_nights, environment, released, run_nights, summary

REFUSED = 3
ENDED = ("published", "refused")
CHILDREN = {"worker": "pyspark.daemon", "rank": "jobs.train"}
"""Kinds of faults that kill a process of the night, by what its command line says."""
RATES = {
    "500": 0.01, "503": 0.01, "reset": 0.01, "truncated": 0.01, "cut": 0.01, "slow": 0.01, "hang": 0.002, "stale": 0.1,
}  # fmt: skip
"""Of the requests to the object store."""
WAITS = "waits"
_WAIT_FOR = ("no live release yet", "No space left on device")
"""Of what a reader is told: before the first release there is none, and on a full disk it cannot take its lease."""
MEAN_SECONDS = 6.0
"""From one fault to the next; nights of this size take 25 s on a quiet machine."""
_LONGEST_SECONDS = 900


class Faults:
    """What goes wrong, drawn by seed; each kind does its harm to the night that is running, or lies broken off."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.random = world, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.ballast = world.site / ".ballast"
        self.can_fill = os.path.ismount(world.site.parent)

    def strike(self, running: subprocess.Popen[bytes], night: int, is_last: bool) -> None:
        """One fault, at a random moment, unless the night ends before; a night's last one meets the publisher."""
        if is_last:
            record = self.world.site / "releases" / f"{self.world.date(night)}.json"
            if self._wait(running, _LONGEST_SECONDS, record.exists):
                _kill(running)
                self.done["publisher"] += 1
            return
        if self._wait(running, min(self.random.expovariate(1 / MEAN_SECONDS), 60), lambda: False) is None:
            return
        kind = min(self._possible(running), key=lambda kind: (self.done[kind], self.random.random()))
        if kind in CHILDREN:
            harmed = self._kill_child(running, CHILDREN[kind])
        elif kind == "disk":
            harmed = self._fill(running)
        else:
            _kill(running)
            harmed = kind == "driver" or (self._jump() if kind == "clock" else self._damage(night, kind))
            kind, harmed = (kind if harmed else "driver"), True
        self.done[kind] += harmed

    def _possible(self, running: subprocess.Popen[bytes]) -> list[str]:
        """Kinds of which there is something to harm now."""
        lines = [line for _, line in _children(running.pid)]
        there = [kind for kind, what in CHILDREN.items() if any(what in line for line in lines)]
        return [*there, *(["disk"] if self.can_fill else []), "driver", "shard", "missing", "clock"]

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

    def _kill_child(self, running: subprocess.Popen[bytes], what: str) -> bool:
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

    def _jump(self) -> bool:
        """The lock as a host left it whose clock is a day ahead or behind."""
        path = self.world.site / "lock.json"
        if not path.exists():
            return False
        lock = json.loads(path.read_text())
        ahead = self.random.choice([-DAY, DAY])
        path.write_text(json.dumps({**lock, "beat_at": lock["beat_at"] + ahead, "taken_at": 0.0}))
        return True


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


def _kill(running: subprocess.Popen[bytes]) -> None:
    """kill -9 of the driver alone: what it started must notice by itself."""
    running.send_signal(signal.SIGKILL)
    running.wait()


def run_faulty(world: World, faults: int, log: Path, seed: int) -> tuple[list[dict[str, Any]], Faults]:
    """Every night with its share of the faults, typed again until it ends."""
    harm, found = Faults(world, seed), []
    for night in range(world.nights):
        world.deliver(night)
        began, tries, due = time.monotonic(), 0, -(-faults * (night + 1) // world.nights)
        code, most = -1, due - sum(harm.done.values()) + 12
        while code not in (0, REFUSED) and tries < most:
            tries += 1
            with log.open("ab") as stream:
                stream.write(f"\n=== {world.date(night)} try {tries}\n".encode())
                running = subprocess.Popen(
                    world.command(night), env=environment(), cwd=ROOT, stdout=stream, stderr=stream
                )
                while running.poll() is None and sum(harm.done.values()) < due:
                    harm.strike(running, night, is_last=sum(harm.done.values()) + 1 == due)
                try:
                    code = running.wait(_LONGEST_SECONDS)
                except subprocess.TimeoutExpired:
                    _kill(running)
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


def run_on_s3(world: World, log: Path, seed: int) -> tuple[list[dict[str, Any]], FaultyProxy]:
    """Every night with its site on an object store that fails."""
    world.settings.write_text(world.settings.read_text().replace(str(world.site), "s3://bucket/site"))
    found = []
    with moto_server() as upstream, FaultyProxy(upstream, seed=seed, rates=RATES) as proxy:
        keys = {"key": ENVIRONMENT["AWS_ACCESS_KEY_ID"], "secret": ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]}
        store = fsspec.filesystem("s3", endpoint_url=upstream, use_listings_cache=False, **keys)
        store.mkdir("bucket")
        surroundings = {**environment(), **ENVIRONMENT, "AWS_ENDPOINT_URL": proxy.url}
        for night in range(world.nights):
            world.deliver(night)
            code, tries = -1, 0
            while code not in (0, REFUSED) and tries < 6:
                tries += 1
                with log.open("ab") as stream:
                    code = subprocess.run(
                        world.command(night), env=surroundings, cwd=ROOT, stdout=stream, stderr=stream, check=False
                    ).returncode
            date = world.date(night)
            told = json.loads(store.cat_file(f"bucket/site/nights/{date}.json"))
            datasets = {}
            if code == 0:
                datasets = json.loads(store.cat_file(f"bucket/site/releases/{date}.json"))["datasets"]
            found.append({"night": date, "status": told["status"], "tries": tries, "datasets": datasets})
            print(f"s3 {date}  {told['status']}  {tries} tries  {dict(proxy.caused)}", flush=True)
    return found, proxy


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
                problem, release = (WAITS if any(word in str(error) for word in _WAIT_FOR) else repr(error)), ""
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
        [sys.executable, "-m", "infra.bench.chaos", "--reader", str(site), "--log", str(out)],
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


def run(nights: int, items: int, faults: int, on_s3: int, seed: int, folder: Path) -> dict[str, Any]:
    """Measure, print, and return what the last line says."""
    plain = World(folder / "plain", folder / "plain" / "site", nights, items)
    if not plain.settings.exists():
        plain.write()
    undisturbed = run_nights(plain, {}, folder / "nights.log", seed)
    with small_disk(folder / "disk", 2000):
        harmed = World(folder / "harmed", folder / "disk" / "site", nights, items)
        harmed.write()
        harmed.site.mkdir()
        with reader(harmed.site, folder / "reads.jsonl"):
            found, harm = run_faulty(harmed, faults, folder / "faults.log", seed)
    remote = World(folder / "remote", folder / "remote" / "site", on_s3, items)
    remote.write()
    stored, proxy = run_on_s3(remote, folder / "s3.log", seed)
    found_there = list(zip(undisturbed, stored, strict=False))
    reads = [json.loads(line) for line in (folder / "reads.jsonl").read_text().splitlines()]
    broken = [read["problem"] for read in reads if read["problem"] not in ("", WAITS)]
    for problem, times in Counter(broken).most_common(10):
        print(f"broken, {times} times: {problem}")
    pairs = list(zip(undisturbed, found, strict=True))
    return {
        "undisturbed": count_nights(undisturbed), "faults": sum(harm.done.values()), "kinds": dict(harm.done),
        "broken_releases": len(broken), "reads": len(reads),
        "reads_that_had_to_wait": sum(read["problem"] == WAITS for read in reads),
        "releases_read": len({read["release"] for read in reads if read["release"]}),
        "lost_runs": sum(line["status"] not in ENDED for line in found), "nights": nights,
        "different_from_undisturbed": [one["night"] for one, other in pairs if is_other(one, other)],
        "tries": sum(line["tries"] for line in found), "s3_nights": on_s3, "s3_faults": sum(proxy.caused.values()),
        "s3_requests": sum(proxy.counts.values()), "s3_kinds": dict(proxy.caused),
        "s3_lost_runs": sum(line["status"] not in ENDED for line in stored),
        "s3_tries": sum(line["tries"] for line in stored),
        "s3_different": [one["night"] for one, other in found_there if is_other(one, other)],
    }  # fmt: skip


def is_other(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two nights ended otherwise, or with another byte."""
    return bool(one["status"] != other["status"] or one["datasets"] != other["datasets"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="random faults, spread over the nights")
    parser.add_argument("--nights", type=int, default=20)
    parser.add_argument("--on-s3", type=int, default=3, help="nights on the failing object store")
    parser.add_argument("--items", type=int, default=400, help="only the commonest so many products; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.reader:
        read_for_ever(given.reader, given.log)
        return
    about = measure.machine()
    print("\n".join(f"{name:12} {value}" for name, value in about.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-chaos-") as temporary:
        results = run(given.nights, given.items, given.faults, given.on_s3, given.seed, given.keep or Path(temporary))
    print(json.dumps({**results, "machine": about}, default=float))


if __name__ == "__main__":
    main()
