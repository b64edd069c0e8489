"""Tasks over shards, by Spark.

Spark schedules, shuffles and retries; bulk data stays outside the JVM: Python tasks read and write whole columnar
shards through `contracts.datasets`. A task is a small dict that says which shard to make; its result is a small dict
that says what was made. Errors that the user can mend travel back as messages, not as Java stack traces.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import pyarrow as pa
from pyspark import SparkContext, TaskContext
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.contracts import errors
from pipeline.contracts.datasets import Lineage, Shard, finished_shard, write_shard
from pipeline.contracts.errors import PipelineError
from pipeline.contracts.interrupts import interrupts_first
from pipeline.contracts.safety import printable
from pipeline.contracts.schemas import Dataset
from pipeline.contracts.storage import Storage

Task = dict[str, Any]
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Of mallopt, in the GNU C library: how much free memory stays, how many arrays are mapped by themselves."""


def assigned_gpu() -> int | None:
    """The number of the GPU that Spark's resource scheduling assigned to this task; None if it assigned none."""
    context = TaskContext.get()
    found = None if context is None else context.resources().get("gpu")
    return None if found is None or not found.addresses else int(found.addresses[0])


def run_tasks(
    spark: SparkContext, tasks: Sequence[Mapping[str, Any]], work: Callable[[Task], Task], label: str
) -> list[Task]:
    """Run work on every task, one Spark task each; results in the order of the tasks.

    Tasks and results are small dicts of JSON values. A PipelineError raised by work is raised here as it was; any other
    exception is retried by Spark first, as it may be a lost machine.
    """
    if not tasks:
        return []
    rows = [(number, json.dumps(task)) for number, task in enumerate(tasks)]
    partitioned = spark.parallelize(rows, len(rows))

    def run(partition: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        _keep_memory()
        _spare_modules()
        for number, text in partition:
            yield number, _guarded(work, json.loads(text))

    with progress(label, len(rows), spark):
        collected = dict(partitioned.mapPartitions(run).collect())
    return [_opened(collected[number]) for number in range(len(rows))]


@lru_cache(maxsize=1)
def _keep_memory() -> None:
    """Let this process reuse what it freed: handed back to the system, every array of a task is zeroed anew.

    A copy of 50 MB took 32 ms in place of 6. The worker stays as large as its largest task was.
    """
    setting = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
        if setting is not None:
            setting(option, value)


_spared = 0
"""How many modules this process had when what they are made of was last spared."""


def _spare_modules() -> None:
    """Take what imports made out of garbage collection: Spark's worker collects all after every task, 30 ms of it.

    Called before a task, when the last one's garbage has just been collected.
    """
    global _spared
    if len(sys.modules) != _spared:
        gc.freeze()
        _spared = len(sys.modules)


def make_shards(
    spark: SparkContext,
    storage: Storage,
    dataset: Dataset | str,
    lineage: Lineage,
    num_shards: int,
    make: Callable[[int], pa.Table],
    label: str,
) -> list[Shard]:
    """Store what make returns for every shard number, one task each, but those an interrupted attempt finished."""

    def work(task: Task) -> Task:
        number = task["shard"]
        shard = finished_shard(storage, dataset, number, lineage)
        return asdict(shard or write_shard(storage, dataset, number, make(number), lineage))

    tasks = [{"shard": number} for number in range(num_shards)]
    return [Shard(**result) for result in run_tasks(spark, tasks, work, label)]


LOG, RUN = "PINSAGE_LOG", "PINSAGE_RUN"
"""Environment variables: `json` for lines that machines read; and the run that they are of, which the jobs set."""


def say(text: str) -> None:
    """One line to the person who watches, `stage: what`; as JSON if the environment asks for it."""
    if os.environ.get(LOG) == "json":
        stage, colon, rest = text.partition(": ")
        line = {"time": time.time(), "run": os.environ.get(RUN, ""), "stage": stage if colon else "", "message": rest}
        print(json.dumps({**line, "message": printable(rest if colon else text)}), file=sys.stderr, flush=True)
        return
    Console(stderr=True, highlight=False).print(printable(text), soft_wrap=True, markup=False)


@contextmanager
def progress(label: str, total: int, spark: SparkContext | None = None) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on a terminal, one closing line elsewhere.

    Given a session, the bar follows the Spark jobs that this thread starts inside the block. Otherwise the block calls
    what it is given with how many more of total are done.
    """
    console = Console(stderr=True)
    started = time.monotonic()
    columns = (
        TextColumn("{task.description:<38}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>9}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task(label, total=total, rate="")

        def advance(done: int) -> None:
            bars.update(bar, advance=done)
            _show_rate(bars, bar, started)

        if spark is None:
            yield advance
        else:
            with interrupts_first(), _following(spark, bars, bar, label, started), _plain_errors(label):
                yield advance
        bars.update(bar, completed=bars.tasks[0].total)
        _show_rate(bars, bar, started)
    if not console.is_terminal:
        console.print(f"{label}: {total:,} in {time.monotonic() - started:.1f} s", highlight=False)


def _show_rate(bars: Progress, bar: TaskID, started: float) -> None:
    bars.update(bar, rate=f"{bars.tasks[0].completed / max(time.monotonic() - started, 1e-3):,.1f}/s")


@contextmanager
def _following(spark: SparkContext, bars: Progress, bar: TaskID, label: str, started: float) -> Iterator[None]:
    """Poll Spark's status for the tasks of the jobs that this thread starts."""
    group = f"{label}-{uuid.uuid4().hex}"
    spark.setJobGroup(group, label)
    over = threading.Event()

    def poll() -> None:
        tracker = spark.statusTracker()
        while not over.wait(0.2):
            infos = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(group)]
            stages = [tracker.getStageInfo(stage) for info in infos if info for stage in info.stageIds]
            done, known = (sum(getattr(s, name) for s in stages if s) for name in ("numCompletedTasks", "numTasks"))
            if known:
                bars.update(bar, completed=done, total=known)
                _show_rate(bars, bar, started)

    watcher = threading.Thread(target=poll, daemon=True)
    if not bars.disable:
        watcher.start()
    try:
        yield
    finally:
        over.set()
        if watcher.is_alive():
            watcher.join()
        spark.setLocalProperty("spark.jobGroup.id", None)  # type: ignore[arg-type]


@contextmanager
def _plain_errors(label: str) -> Iterator[None]:
    """Find what the user can mend inside a Spark failure."""
    try:
        yield
    except Exception as error:
        if "No space left on device" in str(error):
            raise errors.StorageError(
                f"{label}: no space left for Spark's shuffle files; make room, or set resources.spark.conf "
                "spark.local.dir to a larger disk"
            ) from error
        raise


def _guarded(work: Callable[[Task], Task], task: Task) -> str:
    """The result as JSON, or the error that the user can mend: that one must not be retried."""
    try:
        return json.dumps({"ok": work(task)})
    except PipelineError as error:
        return json.dumps({"error": type(error).__name__, "message": str(error)})


def _opened(text: str) -> Task:
    answer = json.loads(text)
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    result: Task = answer["ok"]
    return result
