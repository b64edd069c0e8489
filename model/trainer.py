"""One step, one epoch, one run: pairs and neighbourhoods to a trained network.

Reads FEATURES, NEIGHBOURS, PAIRS and HARD_NEGATIVES; writes MODEL: model.safetensors, model.json and history.json.
Killed and started again it goes on from its last checkpoint and ends, on CPU, with the same bytes. Memory per rank: the
model, its optimizer and the prefetched batches.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from model import checkpoint
from model.distributed import Group
from model.loader import Batch, Loader, Position
from model.loss import score, training_loss
from model.pinsage import PinSage
from pipeline.contracts import config, schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage, Manifest, begin, commit, trace, write_file
from pipeline.contracts.errors import DataError
from pipeline.contracts.storage import Storage

logger = logging.getLogger(__name__)


def lineage(storage: Storage, settings: Settings, world_size: int) -> Lineage:
    """What the model depends on now; the number of ranks counts, as sums of floats depend on it."""
    return trace(storage, schemas.TRAIN, settings, {"world_size": str(world_size)})


@dataclass
class Progressed:
    """How far training is: the next step to do, the losses of the finished epochs, the sum of this epoch's."""

    position: Position = field(default_factory=lambda: Position(1, 0))
    loss_sum: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def train(storage: Storage, settings: Settings, lineage: Lineage, group: Group) -> None:
    """Train to the end from wherever the last checkpoint left off, and commit the model.

    Every rank calls it. Raises DataError if the datasets do not fit or the loss is no longer a number.
    """
    loader = Loader(storage, settings, group.rank, group.world_size)
    trainer = Trainer(settings, loader, group)
    saved = group.from_first(checkpoint.read(storage) if group.is_first else None)
    trainer.load(checkpoint.decode(saved, lineage.fingerprint))
    every = settings.resources.training.checkpoint_every_steps
    start, epochs = trainer.done.position, settings.task.training.epochs
    with _Display(settings.task.training, loader, start, shown=group.is_first) as display:
        for position, batch in loader.batches(start, epochs, group.device):
            if position == start and group.world_size > 1:
                trainer.rehearse(batch)
            display.step(position, trainer.step(position, batch))
            ends_epoch = position.step + 1 == loader.steps_per_epoch
            if ends_epoch:
                display.epoch(trainer.end_epoch(position.epoch))
            if group.is_first and (ends_epoch or (position.step + 1) % every == 0):
                checkpoint.save(storage, lineage.fingerprint, trainer.state())
    if group.is_first:
        _commit_model(storage, settings, lineage, trainer)


class Trainer:
    """The network, its optimizer and how far they are."""

    def __init__(self, settings: Settings, loader: Loader, group: Group) -> None:
        self.settings, self.group, self.loader = settings.task.training, group, loader
        self.model = PinSage(loader.num_features, settings.task.model, settings.task.seed)
        self.model.set_statistics(*loader.statistics())
        self.model.to(group.device)
        self.network = group.wrap(self.model)
        optimizer = torch.optim.SGD if self.settings.optimizer == "sgd" else torch.optim.Adam
        self.optimizer: torch.optim.Optimizer = optimizer(self.model.parameters(), lr=self.settings.learning_rate)
        self.done = Progressed()

    def rehearse(self, batch: Batch) -> None:
        """One backward pass for nothing.

        After its first, DDP lays out its buckets anew, and what three or more ranks sum depends on the layout: a
        resumed run must have the unbroken one's from its first step on.
        """
        self._loss(batch).backward()

    def _loss(self, batch: Batch) -> Tensor:
        embeddings = self.network(batch.features, batch.index, batch.weights, batch.sizes)
        scores = score(embeddings, batch.query, batch.positive, batch.negatives, batch.hard)
        return training_loss(scores, self.settings)

    def step(self, position: Position, batch: Batch) -> float:
        """One update; returns the loss of the global batch."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        value = self.group.mean(loss)
        if not math.isfinite(value):
            raise DataError(
                f"the loss is {value} at epoch {position.epoch} step {position.step}: training has diverged; "
                f"lower task.training.learning_rate (now {self.settings.learning_rate}) or lengthen "
                f"task.training.warmup_epochs (now {self.settings.warmup_epochs}), and look for outliers in features"
            )
        loss.backward()
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate(self.settings, position, self.loader.steps_per_epoch)
        self.optimizer.step()
        self.done.position = Position(position.epoch, position.step + 1)
        self.done.loss_sum += value
        return value

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Close the epoch; returns its line of the history."""
        steps = self.loader.steps_per_epoch
        line = {"epoch": epoch, "loss": self.done.loss_sum / steps, "pairs": steps * self.loader.global_batch}
        self.done = Progressed(Position(epoch + 1, 0), 0.0, [*self.done.history, line])
        return line

    def state(self) -> dict[str, Any]:
        """All that training needs to go on; random numbers come from the position, so it holds no generator."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": list(self.done.position),
            "loss_sum": self.done.loss_sum,
            "history": self.done.history,
        }

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a state; None is the beginning."""
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = Progressed(Position(*state["position"]), state["loss_sum"], state["history"])
        if self.group.is_first:
            logger.info("going on from the checkpoint at epoch %d step %d", *self.done.position)


def learning_rate(settings: config.Training, position: Position, steps_per_epoch: int) -> float:
    """Linear warm-up to the peak, then exponential decay, both step by step (paper, section 3.4)."""
    passed = position.epoch - 1 + (position.step + 1) / steps_per_epoch
    if passed < settings.warmup_epochs:
        return settings.learning_rate * passed / settings.warmup_epochs
    return float(settings.learning_rate * settings.decay_per_epoch ** (passed - settings.warmup_epochs))


def _commit_model(storage: Storage, settings: Settings, lineage: Lineage, trainer: Trainer) -> Manifest:
    features = trainer.loader.manifests[schemas.FEATURES.name]
    description = {
        "num_features": trainer.loader.num_features,
        "model": settings.task.model.model_dump(mode="json"),
        "columns": features.metadata.get("columns", []),
    }
    weights = {name: tensor.cpu().contiguous() for name, tensor in trainer.model.state_dict().items()}
    files = {
        "model.safetensors": safetensors.torch.save(weights),
        "model.json": _json(description),
        "history.json": _json(trainer.done.history),
    }
    begin(storage, schemas.MODEL)
    name = schemas.MODEL.name
    shards = [write_file(storage, name, file, data, lineage) for file, data in files.items()]
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return commit(storage, schemas.MODEL, shards, lineage, {"parameters": parameters})


def _json(tree: object) -> bytes:
    return json.dumps(tree, indent=1, sort_keys=True).encode()


class _Display:
    """What the first rank shows: a bar on a terminal, elsewhere one line per epoch."""

    def __init__(self, settings: config.Training, loader: Loader, start: Position, shown: bool) -> None:
        self.loader, self.epochs = loader, settings.epochs
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
        steps = loader.steps_per_epoch
        self.task = self.bar.add_task(
            "training",
            total=settings.epochs * steps,
            completed=(start.epoch - 1) * steps + start.step,
            rate=0.0,
            loss=0.0,
            waiting=0.0,
        )
        self._restart()

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def step(self, position: Position, loss: float) -> None:
        """One more step."""
        self.steps += 1
        rate, waiting = self._speed()
        self.bar.update(self.task, advance=1, rate=rate, waiting=waiting, loss=loss)

    def epoch(self, line: dict[str, float]) -> None:
        """One more epoch."""
        rate, waiting = self._speed()
        self.bar.console.print(
            f"training: epoch {line['epoch']}/{self.epochs}  loss {line['loss']:.4f}  "
            f"{rate:,.0f} pairs/s  waiting {waiting:.0%}"
        )
        self._restart()

    def _restart(self) -> None:
        self.steps, self.began, self.waited_before = 0, time.perf_counter(), self.loader.waited_seconds

    def _speed(self) -> tuple[float, float]:
        """Pairs per second in this epoch, and the share of its time spent waiting for data."""
        seconds = time.perf_counter() - self.began
        waited = self.loader.waited_seconds - self.waited_before
        return self.steps * self.loader.global_batch / seconds, waited / seconds
