"""One step, one epoch, one run: pairs and neighbourhoods to a trained network.

Reads FEATURES, NEIGHBOURS, PAIRS, QUESTIONS and HARD_NEGATIVES; writes MODEL: model.safetensors, model.json and
history.json. Killed and started again it goes on from its last checkpoint and ends, on CPU, with the same bytes. Memory
per rank: the model, its optimizer, a copy of both while a checkpoint is written, and the prefetched batches.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from model import checkpoint
from model.catalogue import Examiner, NotFiniteError, embed_all, nearest
from model.distributed import Group
from model.lineage import WEIGHTS, check_fits
from model.loader import Loader, Position
from model.loss import choose, training_loss
from model.monitor import Monitor
from model.pinsage import PinSage
from model.transfer import Batch
from pipeline.contracts import config, schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage, Manifest, begin, commit, open_manifest, read_file, write_file
from pipeline.contracts.errors import DataError
from pipeline.contracts.sharding import stage_seed
from pipeline.contracts.storage import Storage

CHECKED_STEPS = 20
"""On a GPU the loss is looked at once in so many steps: to look is to wait for the device."""
EXPLODED = 1000.0
"""A loss so many times the first step's has left all sense."""
logger = logging.getLogger(__name__)


@dataclass
class Progressed:
    """How far training is, and what was found on the way.

    loss_sum is this epoch's, first_loss the first step's. mined_with are the weights that the mined negatives in use
    were found with; best those of the best measurement, if they are wanted.
    """

    position: Position = field(default_factory=lambda: Position(1, 0))
    loss_sum: float = 0.0
    first_loss: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    mined_with: dict[str, Tensor] | None = None
    best: dict[str, Any] | None = None
    without_better: int = 0


def train(storage: Storage, settings: Settings, lineage: Lineage, group: Group) -> None:
    """Train to the end from wherever the last checkpoint left off, and commit the model.

    Every rank calls it. Raises DataError if the datasets do not fit or the loss is no longer a number, SettingsError
    if there is a checkpoint of other settings.
    """
    resources = settings.resources.training
    loader = Loader(storage, settings, group.rank, group.world_size, group.device)
    trainer = Trainer(settings, loader, group)
    saved = group.from_first(checkpoint.read(storage) if group.is_first else None)
    keeper = checkpoint.Keeper(storage, lineage, resources.keep_checkpoints)
    state = checkpoint.decode(saved, lineage)
    if state is None and settings.task.training.previous is not None:
        trainer.begin_with(_earlier_weights(storage, settings))
    trainer.load(state)
    keeper.kept = [(name, metric) for name, metric in (state or {"kept": []})["kept"]]
    last_saved, is_due = time.monotonic(), False
    first = trainer.done.position
    with Monitor(storage, settings, loader, first, shown=group.is_first) as monitor:
        try:
            for position, batch in trainer.batches():
                if position == first and group.world_size > 1:
                    trainer.rehearse(batch)
                trainer.step(position, batch)
                metric = None
                ends_epoch = loader.ends_epoch(position)
                if ends_epoch:
                    line = trainer.end_epoch(position.epoch)
                    metric = line.get(settings.task.training.validation.metric)
                    monitor.epoch(line)
                else:
                    monitor.step(position, trainer.loss)
                is_due |= ends_epoch or (position.step + 1) % resources.checkpoint_every_steps == 0
                is_due |= time.monotonic() - last_saved > 60 * resources.checkpoint_every_minutes
                if is_due and trainer.is_settled and group.is_first and trainer.is_finite():
                    keeper.save(loader.number(trainer.done.position), trainer.state(), metric)
                    last_saved, is_due = time.monotonic(), False
        finally:
            keeper.close()
    if group.is_first:
        _commit_model(storage, settings, lineage, trainer)
        checkpoint.delete(storage)


class Trainer:
    """The network, its optimizer and how far they are."""

    def __init__(self, settings: Settings, loader: Loader, group: Group) -> None:
        self.settings, self.group, self.loader = settings.task.training, group, loader
        self.model = PinSage(loader.num_features, settings.task.model, settings.task.seed, loader.num_items)
        self.model.set_statistics(*loader.statistics())
        self.model.to(group.device)
        self.network = group.wrap(self.model)
        optimizer = torch.optim.SGD if self.settings.optimizer == "sgd" else torch.optim.Adam
        self.optimizer: torch.optim.Optimizer = optimizer(self.model.parameters(), lr=self.settings.learning_rate)
        self.done = Progressed()
        self.loss = math.nan
        self._unseen: list[Tensor] = []
        wanted = self.settings.validation
        self.examiner = Examiner(
            loader, wanted.full_catalogue, wanted.sample, stage_seed(settings.task.seed, schemas.TRAIN.name)
        )
        self._check(wanted)
        if group.is_first:
            self._warn(settings.task.model)

    def _warn(self, model: config.Model) -> None:
        """Say what will surprise later."""
        if model.item_dimensions:
            logger.warning(
                "task.model.item_dimensions is %d: items that are new after this training have none of what is learned "
                "for each item, and are embedded by the rest alone", model.item_dimensions,
            )  # fmt: skip
        if self.settings.precision == "bfloat16" and self.group.device.type == "cpu" and emulates_bfloat16():
            logger.warning(
                "task.training.precision is bfloat16, which this processor has not in hardware: a step takes several "
                "times as long as with float32"
            )

    def _check(self, wanted: config.Validation) -> None:
        """DataError where the settings ask for what the data cannot give."""
        needs = [name for name, asked in (("patience", wanted.patience), ("keep", wanted.keep == "best")) if asked]
        if needs and not (wanted.every_epochs and len(self.examiner)):
            why = "every_epochs is 0" if not wanted.every_epochs else "there are no validation events: see task.split"
            raise DataError(f"task.training.validation.{needs[0]} needs measurements, but {why}")
        if any(row.mined for row in self.settings.curriculum) and self.loader.num_items > wanted.full_catalogue:
            raise DataError(
                f"mined negatives need the whole catalogue embedded: {self.loader.num_items} items are more than "
                f"task.training.validation.full_catalogue, {wanted.full_catalogue}; raise it, or use hard or hardest"
            )

    def batches(self) -> Iterator[tuple[Position, Batch]]:
        """What is left to train on, with negatives mined anew where they are due; ends early when it is enough."""
        start, stop = self.done.position, Position(self.settings.epochs + 1, 0)
        while start < stop and not self.is_enough():
            self._mine(start)
            until = self._mined_until(start, stop)
            for position, batch in self.loader.batches(start, until):
                yield position, batch
                if self.is_enough():
                    return
            start = until

    def rehearse(self, batch: Batch) -> None:
        """One backward pass for nothing.

        After its first, DDP lays out its buckets anew, and what three or more ranks sum depends on the layout: a
        resumed run must have the unbroken one's from its first step on.
        """
        self._loss(batch).backward()

    def _loss(self, batch: Batch) -> Tensor:
        device = self.group.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            embeddings = self.network(batch.features, batch.ids, batch.index, batch.weights, batch.sizes)
        vectors = choose(embeddings, batch.members, self.group.gather, batch.row.in_batch)
        return training_loss(vectors, batch.members, self.settings, batch.row.hardest)

    def step(self, position: Position, batch: Batch) -> None:
        """One update."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        loss.backward()
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate(self.settings, position, self.loader.steps_per_epoch)
        self._unseen.append(loss.detach())
        if self.group.device.type == "cpu" or len(self._unseen) == CHECKED_STEPS:
            self._look(position)
        self.optimizer.step()
        self.done.position = Position(position.epoch, position.step + 1)

    def _look(self, position: Position) -> None:
        """Take the losses since the last look; DataError if training has diverged, before anything of it is saved."""
        if not self._unseen:
            return
        values = self.group.means(torch.stack(self._unseen))
        first = position.step + 1 - len(values)
        self._unseen.clear()
        for step, value in enumerate(values, start=first):
            if self.done.first_loss is None:
                self.done.first_loss = value
            limit = EXPLODED * max(abs(self.done.first_loss), 1e-3)
            if not math.isfinite(value) or value > limit:
                began = f"; it began at {self.done.first_loss:.4g}" if math.isfinite(self.done.first_loss) else ""
                raise self._diverged(f"the loss is {value} at epoch {position.epoch} step {step}{began}")
            self.done.loss_sum += value
            self.loss = value

    def _diverged(self, what: str) -> DataError:
        return DataError(
            f"{what}: training has diverged; lower task.training.learning_rate (now {self.settings.learning_rate}) or "
            f"lengthen task.training.warmup_epochs (now {self.settings.warmup_epochs}), and look for outliers in "
            "features; then begin anew with `pinsage train --force`"
        )

    @property
    def is_settled(self) -> bool:
        """Whether every loss was looked at: what is not a number must never be saved."""
        return not self._unseen

    def is_finite(self) -> bool:
        """Whether all weights are numbers, as the last step has left them."""
        return all(bool(torch.isfinite(value).all()) for value in self.model.state_dict().values())

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Close the epoch, and ask how good the network is if it is time to; returns its line of the history."""
        steps, wanted = self.loader.steps_per_epoch, self.settings.validation
        self._look(Position(epoch, steps - 1))
        line: dict[str, Any] = {
            "epoch": epoch, "loss": self.done.loss_sum / steps, "pairs": steps * self.loader.global_batch
        }  # fmt: skip
        is_last = epoch == self.settings.epochs
        if not self.is_finite():
            raise self._diverged(f"weights are not finite after epoch {epoch}")
        if len(self.examiner) and wanted.every_epochs and (is_last or epoch % wanted.every_epochs == 0):
            try:
                line |= self.examiner.ask(self.model, self.group)
            except NotFiniteError:
                raise self._diverged(f"embeddings are not finite after epoch {epoch}") from None
            if self.done.best is None or line[wanted.metric] > self.done.best["metric"]:
                self.done.best = {"epoch": epoch, "metric": line[wanted.metric]}
                self.done.best |= {"weights": self._weights()} if wanted.keep == "best" else {}
                self.done.without_better = 0
            else:
                self.done.without_better += 1
        self.done.position, self.done.loss_sum = Position(epoch + 1, 0), 0.0
        self.done.history = [*self.done.history, line]
        return line

    def is_enough(self) -> bool:
        """Whether so many measurements brought nothing better that training ends early."""
        return 0 < self.settings.validation.patience <= self.done.without_better

    # -------------------------------------------------------------------------------------------- mined negatives

    def _mined_until(self, start: Position, stop: Position) -> Position:
        """The step before which negatives must be mined again, or stop."""
        every, position = self.settings.mining.every_steps, start
        if not any(row.mined for row in self.settings.curriculum):
            return stop
        while position < stop:
            after = Position(position.epoch + 1, 0)
            if self.loader.row(position.epoch).mined:
                due = Position(position.epoch, (position.step // every + 1) * every)
                return due if due.step < self.loader.steps_per_epoch else after
            position = after
            if position < stop and self.loader.row(position.epoch).mined:
                return position
        return stop

    def _mine(self, position: Position) -> None:
        """Have the network, as it is, find the hard negatives of the steps to come, if they are to have any.

        A run resumed between two findings finds them with the weights of then.
        """
        if not self.loader.row(position.epoch).mined:
            return
        settings = self.settings.mining
        if position.step % settings.every_steps == 0 or self.done.mined_with is None:
            self.done.mined_with = self._weights()
        now = self._weights()
        self.model.load_state_dict(self.done.mined_with)
        vectors = embed_all(self.model, self.loader, self.group)
        self.model.load_state_dict(now)
        self.loader.mined = nearest(vectors, *settings.ranks, self.group)

    # -------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """All that training needs to go on; random numbers come from the position, so it holds no generator."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: value for name, value in vars(self.done).items() if name != "position"},
            "position": list(self.done.position),
            "global_batch": self.loader.global_batch,
        }

    def begin_with(self, weights: bytes) -> None:
        """Start from a model's weights and feature statistics; items it did not know keep their own first vectors."""
        mine = self.model.state_dict()
        for name, value in safetensors.torch.load(weights).items():
            mine[name][: len(value)] = value.to(mine[name].device)
        if self.group.is_first:
            logger.info("starting from the model of %s", self.settings.previous)

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a state; None is the beginning."""
        if state is None:
            return
        if state["global_batch"] != self.loader.global_batch:
            raise DataError(
                f"the checkpoint was made with batches of {state['global_batch']} pairs, {self.group.world_size} ranks "
                f"share {self.loader.global_batch}; use a number of ranks that divides task.training.batch_size, or "
                "give the checkpoint up with `pinsage train --force`"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        fields = {name: state[name] for name in vars(self.done)}
        self.done = Progressed(**{**fields, "position": Position(*state["position"])})
        if self.group.is_first:
            logger.info("going on from the checkpoint at epoch %d step %d", *self.done.position)

    def _weights(self) -> dict[str, Tensor]:
        """A copy of the weights as they are."""
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def result(self) -> dict[str, Tensor]:
        """The weights that become the model."""
        best = self.done.best
        return best["weights"] if best is not None and "weights" in best else self.model.state_dict()


def emulates_bfloat16() -> bool:
    """Whether this processor is known to have no matrix products of bfloat16."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.13
    return not any(found.get(name, True) for name in ("amx_bf16", "avx512_bf16"))


def learning_rate(settings: config.Training, position: Position, steps_per_epoch: int) -> float:
    """Linear warm-up to the peak, then exponential decay, both step by step (paper, section 3.4)."""
    passed = position.epoch - 1 + (position.step + 1) / steps_per_epoch
    if passed < settings.warmup_epochs:
        return settings.learning_rate * passed / settings.warmup_epochs
    return float(settings.learning_rate * settings.decay_per_epoch ** (passed - settings.warmup_epochs))


def _earlier_weights(storage: Storage, settings: Settings) -> bytes:
    """The earlier model that training starts from. Raises DataError if it does not fit."""
    earlier = Storage(str(settings.task.training.previous))
    check_fits(storage, earlier, settings)
    return read_file(earlier, open_manifest(earlier, schemas.MODEL), WEIGHTS)


def _commit_model(storage: Storage, settings: Settings, lineage: Lineage, trainer: Trainer) -> Manifest:
    features = trainer.loader.manifests[schemas.FEATURES.name]
    description = {
        "num_features": trainer.loader.num_features,
        "num_items": trainer.loader.num_items,
        "model": settings.task.model.model_dump(mode="json"),
        "columns": features.metadata.get("columns", []),
    }
    weights = {name: tensor.cpu().contiguous() for name, tensor in trainer.result().items()}
    files = {
        "model.safetensors": safetensors.torch.save(weights),
        "model.json": _json(description),
        "history.json": _json(trainer.done.history),
    }
    begin(storage, schemas.MODEL)
    name = schemas.MODEL.name
    shards = [write_file(storage, name, file, data, lineage) for file, data in files.items()]
    metadata: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in trainer.model.parameters())}
    if trainer.done.best is not None:
        metadata["best"] = {key: value for key, value in trainer.done.best.items() if key != "weights"}
    return commit(storage, schemas.MODEL, shards, lineage, metadata)


def _json(tree: object) -> bytes:
    return json.dumps(tree, indent=1, sort_keys=True).encode()
