"""Training: it learns what is planted, resumes bit for bit, and its gradients do not depend on the number of ranks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from model import checkpoint, trainer
from model.distributed import Group
from model.loader import Loader, Position
from model.loss import score, training_loss
from model.pinsage import PinSage
from model.trainer import Trainer, learning_rate
from pipeline.contracts import config, schemas
from pipeline.contracts.datasets import is_up_to_date, open_manifest, read_file
from pipeline.contracts.errors import DataError
from tests.model.conftest import Run

MakeRun = Callable[..., Run]
FILES = ("model.safetensors", "model.json", "history.json")


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    """One thread, as the runs' settings say: sums of floats depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(run: Run) -> dict[str, bytes]:
    """Train and return the model's files."""
    lineage = trainer.lineage(run.storage, run.settings, world_size=1)
    trainer.train(run.storage, run.settings, lineage, Group())
    assert is_up_to_date(run.storage, schemas.TRAIN, lineage)
    manifest = open_manifest(run.storage, schemas.MODEL)
    assert {shard.name for shard in manifest.shards} == set(FILES)
    return {file: read_file(run.storage, manifest, file) for file in FILES}


def purity(run: Run, weights: bytes | None) -> float:
    """Share of items' ten nearest that are of their group; None: the network as initialised."""
    loader = Loader(run.storage, run.settings)
    model = PinSage(loader.num_features, run.settings.task.model, run.settings.task.seed)
    model.set_statistics(*loader.statistics())
    if weights is not None:
        model.load_state_dict(safetensors.torch.load(weights))
    nobody = np.zeros(0, np.uint32)
    blocks = loader.blocks(np.arange(loader.num_items, dtype=np.uint32), nobody, nobody)
    tensors = torch.from_numpy(loader._features[blocks.ids]), torch.from_numpy(blocks.index)
    with torch.no_grad():
        z = model(*tensors, torch.from_numpy(blocks.weights), blocks.sizes)
    nearest = (z @ z.T).fill_diagonal_(-torch.inf).topk(10, dim=1).indices.numpy()
    return float((run.groups[nearest] == run.groups[:, None]).mean())


@pytest.mark.parametrize(
    ("training", "model"),
    [
        ({}, {}),
        ({"loss": "softmax"}, {}),
        ({"optimizer": "sgd", "learning_rate": 1.0}, {}),
        ({}, {"num_layers": 1}),
        ({}, {"normalise_output": False}),
    ],
)
def test_the_planted_structure_is_learned(make_run: MakeRun, training: dict[str, Any], model: dict[str, Any]) -> None:
    run = make_run(training={"epochs": 6, **training}, model=model)
    untrained, trained = purity(run, None), purity(run, train(run)["model.safetensors"])
    assert untrained < 0.6
    assert trained > 0.95


def test_content_alone_cannot_find_what_only_neighbours_show(make_run: MakeRun) -> None:
    run = make_run(training={"epochs": 6}, model={"num_layers": 0})
    assert purity(run, train(run)["model.safetensors"]) < 0.35


def test_the_loss_falls_and_the_history_has_a_line_per_epoch(make_run: MakeRun) -> None:
    history = json.loads(train(make_run())["history.json"])
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert all(line["pairs"] == 960 and set(line) == {"epoch", "pairs", "loss"} for line in history)
    assert history[2]["loss"] < history[1]["loss"] / 1.2


def test_items_without_neighbours_train_as_any_other(make_run: MakeRun) -> None:
    empty: list[list[int]] = [[]] * 240
    weights = safetensors.torch.load(train(make_run(neighbours=empty, weights=empty, hard=empty))["model.safetensors"])
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_fewer_pairs_than_a_batch_are_one_step(make_run: MakeRun) -> None:
    history = json.loads(train(make_run(query=[3], positive=[4]))["history.json"])
    assert [line["pairs"] for line in history] == [1, 1, 1]


class InterruptError(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_resumed_at_any_checkpoint_ends_with_the_same_bytes(
    make_run: MakeRun, optimizer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {"training": {"optimizer": optimizer}, "resources": {"checkpoint_every_steps": 3}}
    expected = train(make_run(**changes, name="unbroken"))
    run = make_run(**changes, name="broken")
    save = checkpoint.save
    for survives in np.random.default_rng().integers(1, 4, 4):
        left = iter(range(int(survives) - 1))

        def save_and_stop(*state: Any, left: Any = left) -> None:
            save(*state)
            if next(left, None) is None:
                raise InterruptError

        monkeypatch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(InterruptError):
            train(run)
    monkeypatch.setattr(checkpoint, "save", save)
    with caplog.at_level(logging.INFO):
        assert train(run) == expected, f"after {caplog.text}"
    assert "going on from the checkpoint" in caplog.text
    assert checkpoint.read(run.storage) is None


def test_a_checkpoint_of_other_settings_is_not_resumed_from(make_run: MakeRun) -> None:
    run = make_run()
    expected = train(run)
    checkpoint.save(run.storage, "another lineage", {"position": [99, 0]})
    assert train(run) == expected


@pytest.mark.parametrize("loss", ["max_margin", "softmax"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_mean_of_the_ranks_gradients_is_that_of_one_process(make_run: MakeRun, loss: str, world_size: int) -> None:
    run = make_run(training={"loss": loss})

    def gradients(rank: int, ranks: int) -> list[torch.Tensor]:
        loader = Loader(run.storage, run.settings, rank, ranks)
        model = Trainer(run.settings, loader, Group()).model
        batch = loader.batch(2, 1)
        z = model(batch.features, batch.index, batch.weights, batch.sizes)
        scores = score(z, batch.query, batch.positive, batch.negatives, batch.hard)
        return list(torch.autograd.grad(training_loss(scores, run.settings.task.training), list(model.parameters())))

    ranks = [gradients(rank, world_size) for rank in range(world_size)]
    for alone, *shares in zip(gradients(0, 1), *ranks, strict=True):
        torch.testing.assert_close(torch.stack(shares).mean(0), alone, rtol=1e-4, atol=1e-7)


def test_divergence_stops_training_and_names_the_step(make_run: MakeRun) -> None:
    run = make_run(training={"optimizer": "sgd", "learning_rate": 1e30}, model={"normalise_output": False})
    with pytest.raises(DataError, match=r"loss is (nan|inf) at epoch 1 step \d.*learning_rate \(now 1e\+30\)"):
        train(run)


def test_the_rate_warms_up_linearly_then_decays_step_by_step() -> None:
    settings = config.Training(learning_rate=0.1, warmup_epochs=1, decay_per_epoch=0.25)
    rates = [learning_rate(settings, Position(epoch, step), 2) for epoch in (1, 2, 3) for step in (0, 1)]
    assert rates == pytest.approx([0.05, 0.1, 0.05, 0.025, 0.0125, 0.00625])
    no_warmup = config.Training(learning_rate=0.1, warmup_epochs=0, decay_per_epoch=1)
    assert learning_rate(no_warmup, Position(1, 0), 2) == 0.1


def test_lineage_depends_on_the_ranks_and_on_what_training_reads(make_run: MakeRun) -> None:
    run, other = make_run(), make_run(name="other", query=[1] * 100, positive=[2] * 100)
    prints = [trainer.lineage(r.storage, r.settings, n).fingerprint for r, n in ((run, 1), (run, 2), (other, 1))]
    assert len(set(prints)) == 3
