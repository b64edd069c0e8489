"""What one watches while training runs: a bar on a terminal, else a line per epoch; a log and events for TensorBoard.

`training/log.jsonl` in the run has one JSON object per line, `training/tensorboard` the events; both are stored anew
from time to time, as object stores cannot append, and neither stops training if it cannot be written. Nothing here
changes what is learned.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.loader import Loader, Position
from pipeline.contracts import schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.errors import ResourceError, StorageError
from pipeline.contracts.storage import Storage

LOG = f"{schemas.TRAINING}/log.jsonl"
EVENTS = f"{schemas.TRAINING}/tensorboard"
LOGGED_STEPS = 50
STORED_SECONDS = 30.0
logger = logging.getLogger(__name__)


class Monitor:
    """Watches one training run; only the first rank shows and stores anything."""

    def __init__(self, storage: Storage, settings: Settings, loader: Loader, start: Position, shown: bool) -> None:
        self.storage, self.loader, self.epochs = storage, loader, settings.task.training.epochs
        self.shown = shown
        console = Console(quiet=not shown, highlight=False)
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.0f} pairs/s"),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("waiting {task.fields[waiting]:.0%}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        total = self.epochs * loader.steps_per_epoch
        self.task = self.bar.add_task(
            "training", total=total, completed=loader.number(start), rate=0.0, loss=0.0, waiting=0.0
        )
        self._lines = self._earlier_lines(start) if shown else []
        self._stored = time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="pinsage-events-")
        self._events = (
            _event_writer(self._folder.name, loader.number(start))
            if shown and settings.resources.training.tensorboard
            else None
        )
        self._restart()

    def __enter__(self) -> Monitor:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        self._store()
        if self._events is not None:
            self._events.close()
        self._folder.cleanup()

    def step(self, position: Position, loss: float) -> None:
        """One more step."""
        self.steps += 1
        if not self.shown:
            return
        speed = self._speed()
        self.bar.update(self.task, advance=1, rate=speed["pairs_per_s"], waiting=speed["waiting"], loss=loss)
        if (position.step + 1) % LOGGED_STEPS == 0:
            self._log(position.epoch, position.step + 1, {"loss": loss, **speed})

    def epoch(self, line: dict[str, Any]) -> None:
        """One more step, the last of its epoch."""
        self.steps += 1
        if not self.shown:
            return
        speed = self._speed()
        self.bar.update(self.task, advance=1, rate=speed["pairs_per_s"], waiting=speed["waiting"], loss=line["loss"])
        text = (
            f"training: epoch {line['epoch']}/{self.epochs}  loss {line['loss']:.4f}  "
            f"{speed['pairs_per_s']:,.0f} pairs/s  waiting {speed['waiting']:.0%}  copying {speed['copying']:.0%}"
        )
        if "mrr" in line:
            among = "all" if line["full_catalogue"] else "a sample of"
            text += (
                f"  validation: hit-rate@10 {line['hit_rate@10']:.4f}  MRR {line['mrr']:.4f} "
                f"({line['questions']:,} questions, {among} {line['candidates']:,} items)"
            )
        self.bar.console.print(text, soft_wrap=True)
        self._log(line["epoch"], self.loader.steps_per_epoch, {**line, **speed})
        self._store()
        self._restart()

    def _restart(self) -> None:
        self.steps, self.began = 0, time.perf_counter()
        self.before = self.loader.carrier.waited_seconds, self.loader.carrier.copied_seconds

    def _speed(self) -> dict[str, float]:
        """Pairs per second in this epoch, and the shares of its time that its device waited and that were copying."""
        seconds, carrier = time.perf_counter() - self.began, self.loader.carrier
        waited, copied = (
            now - then for now, then in zip((carrier.waited_seconds, carrier.copied_seconds), self.before, strict=True)
        )
        rate = self.steps * self.loader.global_batch / seconds
        return {"pairs_per_s": rate, "waiting": waited / seconds, "copying": copied / seconds}

    # -------------------------------------------------------------------------------------------- log and events

    def _earlier_lines(self, start: Position) -> list[str]:
        """What the log says of the steps before this one, if this run goes on from a checkpoint."""
        if not self.loader.number(start):
            return []
        try:
            return self.storage.read_with(LOG, lambda data: _lines_until(data, start))
        except FileNotFoundError:
            return []

    def _log(self, epoch: int, step: int, values: dict[str, Any]) -> None:
        """A line of the log; step counts the steps done in that epoch."""
        entry = {"time": round(time.time(), 1), **values, "epoch": epoch, "step": step}
        self._lines.append(json.dumps(entry))
        if self._events is not None:
            number = (epoch - 1) * self.loader.steps_per_epoch + step
            for name, value in values.items():
                if isinstance(value, float):
                    self._events.add_scalar(name.replace("@", "_at_"), value, number)
        if time.monotonic() - self._stored > STORED_SECONDS:
            self._store()

    def _store(self) -> None:
        if not self._lines:
            return
        self._stored = time.monotonic()
        try:
            self.storage.write_bytes(LOG, "".join(f"{line}\n" for line in self._lines).encode())
            if self._events is not None:
                self._events.flush()
                for file in sorted(Path(self._folder.name).iterdir()):
                    self.storage.put_file(file, f"{EVENTS}/{file.name}")
        except StorageError as error:
            logger.warning("the log is not stored: %s; training goes on", error)


def _lines_until(data: bytes, start: Position) -> list[str]:
    lines = data.decode().splitlines()
    places = [Position(found["epoch"], found["step"]) for found in map(json.loads, lines)]
    return [line for line, place in zip(lines, places, strict=True) if place <= start]


def _event_writer(folder: str, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]
    except ImportError:
        raise ResourceError(
            "resources.training.tensorboard needs tensorboardX: pip install 'pinsage-pipeline[tensorboard]', or set "
            "it to false; training/log.jsonl is written either way"
        ) from None
    return SummaryWriter(folder, filename_suffix=f".from-step-{step}")
