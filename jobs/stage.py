"""How a job runs a stage: settings, lineage, session, run, exit code.

`spark-submit jobs/walks.py --settings FILE` and `pinsage walks --settings FILE` both end here. A stage whose outputs
were made from the same settings and inputs is skipped; errors that the user can mend are one message and exit code 1.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer
from pyspark import SparkContext
from rich.console import Console
from rich.markup import escape

from jobs.interrupts import held_back
from model.lifetime import PARENT
from model.lineage import adopt
from model.lineage import lineage as training_lineage
from pipeline.contracts import schemas
from pipeline.contracts.config import Settings, dump_settings, load_settings
from pipeline.contracts.datasets import RECEIPTS, Lineage, begin, code_version, find_manifest, is_up_to_date, trace
from pipeline.contracts.errors import PipelineError, ResourceError
from pipeline.contracts.interrupts import interrupts_first
from pipeline.contracts.schemas import RESOLVED, Stage
from pipeline.contracts.storage import Storage
from pipeline.inference.ways import sweep
from pipeline.session import check_port, is_forked_ahead, is_running, launch, session, stop
from pipeline.spark import RUN, say

console = Console(stderr=True, highlight=False)

NETWORK = ("safetensors.torch", "model.pinsage")
"""What workers import to run the network: two seconds of each, or once before they are forked."""

SettingsOption = Annotated[
    str, typer.Option("--settings", "-s", envvar="PINSAGE_SETTINGS", help="Settings file: a path or any fsspec URL.")
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Override a setting: dotted.key=value, for example task.walks.num_walks=500. Repeatable."
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Build again even if nothing changed.")]


def main(name: str) -> None:
    """Run one stage as a job of its own: what spark-submit calls."""
    typer.run(stage_command(stage_named(name)))


def stage_command(stage: Stage) -> Callable[..., None]:
    """The command that runs the stage, with its help."""

    def command(
        settings: SettingsOption = "pinsage.yaml", override: OverrideOption = None, force: ForceOption = False
    ) -> None:
        with exit_codes():
            run_stages([stage], load_settings(settings, override or ()), force=force)

    reads = ", ".join(dataset.name for dataset in stage.reads) or "your files"
    writes = ", ".join(dataset.name for dataset in stage.writes)
    command.__doc__ = f"{stage.meaning[0].upper()}{stage.meaning[1:]}.\n\nReads {reads}; writes {writes}."
    return command


def stage_named(name: str) -> Stage:
    """The stage of that name."""
    return next(stage for stage in schemas.STAGES if stage.name == name)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn errors that the user can mend into one message and exit code 1, an interrupt into 130."""
    try:
        with interrupts_first():
            yield
    except PipelineError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from the last finished shard", soft_wrap=True)
        raise SystemExit(130) from None


def run_stages(stages: Sequence[Stage], settings: Settings, force: bool = False) -> list[str]:
    """Run the stages in order, skipping what is up to date; returns the names of those that ran.

    Everything that can be checked without work is checked first: the run's folder can be written, ports are free.
    """
    storage = Storage(settings.resources.run)
    storage.check_writable()
    if settings.resources.spark.driver_port:
        check_port(settings.resources.spark.driver_port, "resources.spark.driver_port")
    if schemas.TRAIN in stages and settings.resources.training.master_port:
        check_port(settings.resources.training.master_port, "resources.training.master_port")
    storage.write_bytes(RESOLVED, dump_settings(settings).encode())
    os.environ[RUN] = storage.url
    ran, spark = [], _LazySession(settings)
    try:
        for stage in stages:
            if is_not_needed(stage, settings):
                say(f"{stage.name}: not needed, as the model is that of {settings.task.training.previous}")
                continue
            lineage = lineage_of(storage, stage, settings)
            if force:
                _forget(storage, stage)
            elif is_up_to_date(storage, stage, lineage):
                say(f"{stage.name}: up to date")
                if stage is schemas.INFERENCE:
                    sweep(storage, lineage)
                continue
            started = time.monotonic()
            say(f"{stage.name}: {stage.meaning}")
            if stage is schemas.TRAIN and settings.task.training.epochs:
                _train(settings, force)
            elif stage is schemas.TRAIN:
                adopt(storage, settings, lineage)
            else:
                imports = NETWORK if stage is schemas.INFERENCE else ()
                is_ahead = is_forked_ahead()
                if not is_ahead:
                    launch(settings.resources.spark, imports)  # while the stage is imported
                run = _runner(stage)
                if is_ahead:
                    launch(settings.resources.spark, imports)  # with workers that have it then
                run(spark(imports), storage, settings, lineage)
            ran.append(stage.name)
            seconds = time.monotonic() - started
            measured = json.dumps(measure(storage, stage, seconds), indent=1).encode()
            storage.write_bytes(f"{schemas.METRICS}/{stage.name}.json", measured)
            say(f"{stage.name}: done in {seconds:.1f} s")
    finally:
        spark.stop()
    return ran


def lineage_of(storage: Storage, stage: Stage, settings: Settings) -> Lineage:
    """What the stage's outputs depend on now.

    A model that is there counts as made by as many ranks as it was: the user's own torchrun may have started others
    than resources.training.ranks says.
    """
    if stage is schemas.TRAIN:
        model = find_manifest(storage, schemas.MODEL)
        ranks = settings.resources.training.ranks
        return training_lineage(storage, settings, ranks if model is None else int(model.lineage.inputs["world_size"]))
    return trace(storage, stage, settings, _own_inputs(stage, settings))


def _own_inputs(stage: Stage, settings: Settings) -> dict[str, str] | None:
    """What the stage reads that is not of its run; the stages are imported here, as what they need takes a while."""
    if stage is schemas.INGEST:
        from pipeline import ingest

        return ingest.inputs(settings.task.data)
    if stage is schemas.FEATURES_STAGE:
        from pipeline import features

        return features.inputs(settings.task.features)
    return None


def measure(storage: Storage, stage: Stage, seconds: float) -> dict[str, Any]:
    """What a stage took and made: `metrics/STAGE.json` of the run."""
    made = {dataset.name: find_manifest(storage, dataset) for dataset in stage.writes}
    return {
        "stage": stage.name, "run": storage.url, "ended_at": time.time(), "seconds": round(seconds, 3),
        "host": socket.gethostname(), "code_version": code_version(),
        "datasets": {name: {"rows": m.num_rows, "bytes": m.num_bytes} for name, m in made.items() if m is not None},
    }  # fmt: skip


def is_not_needed(stage: Stage, settings: Settings) -> bool:
    """Whether nothing would read what the stage makes: pairs, where an earlier run's model is taken as it is."""
    return stage is schemas.PAIRS_STAGE and settings.task.training.epochs == 0


def import_stages() -> None:
    """Import what runs the stages, for who has to wait for Spark in any case."""
    for stage in schemas.STAGES:
        if stage is not schemas.TRAIN:
            _runner(stage)


def _runner(stage: Stage) -> Callable[[SparkContext, Storage, Settings, Lineage], None]:
    if stage is schemas.INFERENCE:
        from jobs.inference import run_inference

        return run_inference
    run: Callable[[SparkContext, Storage, Settings, Lineage], None] = import_module(f"pipeline.{stage.name}").run
    return run


def _forget(storage: Storage, stage: Stage) -> None:
    """Leave nothing of the stage's former attempts to go on from."""
    for dataset in stage.writes:
        begin(storage, dataset)
        storage.delete(f"{dataset.name}/{RECEIPTS}")
    for folder, owner in schemas.SCRATCH.items():
        if owner == stage.name:
            storage.delete(folder)


def _train(settings: Settings, force: bool) -> None:
    """Train in processes of their own, as a cluster would: torchrun starts the ranks on this host."""
    training = settings.resources.training
    meeting = ["--standalone"]
    if training.master_port:
        meeting = ["--nnodes=1", "--master-addr=127.0.0.1", f"--master-port={training.master_port}"]
    resolved = f"{settings.resources.run.rstrip('/')}/{RESOLVED}"
    command = [
        sys.executable,
        "-m",
        "jobs.launch",
        *meeting,
        f"--nproc-per-node={training.ranks}",
        f"--max-restarts={training.max_restarts}",
        "--module",
        "jobs.train",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(training.threads), PARENT: str(os.getpid())}
    arguments = ["--settings", resolved, *(["--force"] if force else [])]
    with held_back():
        process = subprocess.Popen([*command, *arguments], env=environment)
    with process:
        try:
            process.wait()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ResourceError(f"training ended with exit code {process.returncode}; its message is above")


@contextmanager
def spark_session(settings: Settings, imports: Sequence[str] = ()) -> Iterator[SparkContext]:
    """Spark while the block runs, for all that is run in it; a session that was there before is left running."""
    held = _LazySession(settings)
    try:
        yield held(imports)
    finally:
        held.stop()


class _LazySession:
    """Spark, started when the first stage needs it; a session that was there before is used, and left running."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._spark: SparkContext | None = None
        self._found = is_running()

    def __call__(self, imports: Sequence[str] = ()) -> SparkContext:
        if self._spark is None:
            self._spark = session(self._settings.resources.spark, self._settings.task.name, imports)
        return self._spark

    def stop(self) -> None:
        """Stop Spark if it was started here."""
        if self._spark is not None and not self._found:
            stop(self._spark)
