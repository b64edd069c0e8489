"""Training: it learns what is planted, resumes bit for bit, and its gradients do not depend on the number of ranks."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from model import checkpoint, trainer
from model.checkpoint import Keeper
from model.distributed import Group
from model.lineage import _check_ids
from model.lineage import lineage as training_lineage
from model.loader import Loader, Position
from model.loss import choose, training_loss
from model.monitor import EVENTS, LOG, Monitor
from model.pinsage import PinSage
from model.trainer import Trainer, learning_rate
from pipeline.contracts import config, schemas
from pipeline.contracts.datasets import Lineage, commit, find_manifest, is_up_to_date, open_manifest, read_file
from pipeline.contracts.errors import DataError, SettingsError
from pipeline.contracts.storage import Storage
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
    lineage = training_lineage(run.storage, run.settings, world_size=1)
    trainer.train(run.storage, run.settings, lineage, Group())
    assert is_up_to_date(run.storage, schemas.TRAIN, lineage)
    manifest = open_manifest(run.storage, schemas.MODEL)
    assert {shard.name for shard in manifest.shards} == set(FILES)
    return {file: read_file(run.storage, manifest, file) for file in FILES}


def purity(run: Run, weights: bytes | None) -> float:
    """Share of items' ten nearest that are of their group; None: the network as initialised."""
    loader = Loader(run.storage, run.settings)
    model = PinSage(loader.num_features, run.settings.task.model, run.settings.task.seed, loader.num_items)
    model.set_statistics(*loader.statistics())
    if weights is not None:
        model.load_state_dict(safetensors.torch.load(weights))
    nobody = np.zeros(0, np.uint32)
    blocks = loader.blocks(np.arange(loader.num_items, dtype=np.uint32), nobody, nobody)
    ids = torch.from_numpy(blocks.ids.astype(np.int64))
    tensors = torch.from_numpy(loader._features[blocks.ids]), ids, torch.from_numpy(blocks.index)
    with torch.no_grad():
        z = model(*tensors, torch.from_numpy(blocks.weights), blocks.sizes)
    nearest = (z @ z.T).fill_diagonal_(-torch.inf).topk(10, dim=1).indices.numpy()
    return float((run.groups[nearest] == run.groups[:, None]).mean())


@pytest.mark.parametrize(
    ("training", "model"),
    [
        ({}, {}),
        ({"loss": "softmax"}, {}),
        ({"loss": "bpr"}, {}),
        ({"loss": "cross_entropy"}, {}),
        ({"loss": "softmax", "curriculum": [{"from_epoch": 1, "uniform": 20, "popular": 20, "in_batch": True}]}, {}),
        ({"curriculum": [{"from_epoch": 1, "uniform": 40, "hardest": 3}]}, {}),
        ({"precision": "bfloat16"}, {}),
        ({}, {"pooling": "attention", "residual": True, "head_input": "all"}),
        ({"neighbour_dropout": 0.1}, {"item_dimensions": 4}),
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
    asked = {"questions": 150, "candidates": 240, "full_catalogue": True}
    assert all(line["pairs"] == 960 and asked.items() <= line.items() for line in history)
    assert history[2]["mrr"] > history[0]["mrr"]
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


MINED = [{"from_epoch": 1, "uniform": 40}, {"from_epoch": 2, "uniform": 40, "in_batch": True, "mined": 2}]


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "adam", "neighbour_dropout": 0.2},
        {"optimizer": "sgd", "validation": {"keep": "best"}},
        {"curriculum": MINED, "mining": {"every_steps": 4, "ranks": [3, 20]}},
    ],
    ids=["adam", "sgd", "mined"],
)
def test_training_resumed_at_any_checkpoint_ends_with_the_same_bytes(
    make_run: MakeRun, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {"training": training, "resources": {"checkpoint_every_steps": 3}}
    expected = train(make_run(**changes, name="unbroken"))
    run = make_run(**changes, name="broken")
    save = Keeper.save
    for survives in np.random.default_rng().integers(1, 4, 4):
        left = iter(range(int(survives) - 1))

        def save_and_stop(*state: Any, left: Any = left) -> None:
            save(*state)
            if next(left, None) is None:
                raise InterruptError

        monkeypatch.setattr(Keeper, "save", save_and_stop)
        with pytest.raises(InterruptError):
            train(run)
    monkeypatch.setattr(Keeper, "save", save)
    with caplog.at_level(logging.INFO):
        assert train(run) == expected, f"after {caplog.text}"
    assert "going on from the checkpoint" in caplog.text
    assert checkpoint.read(run.storage) is None


def test_a_checkpoint_of_other_settings_is_refused_until_forced(make_run: MakeRun) -> None:
    run = make_run()
    expected = train(run)
    keeper = Keeper(run.storage, training_lineage(run.storage, make_run(training={"epochs": 9}).settings, 1), 1)
    keeper.save(1, {"position": [2, 3]})
    keeper.close()
    with pytest.raises(SettingsError, match=r"epoch 2 step 3 of other settings: task.training.epochs was 9 and is 3"):
        train(run)
    checkpoint.delete(run.storage)
    assert train(run) == expected


def test_training_stops_when_nothing_gets_better_and_the_best_is_kept(make_run: MakeRun) -> None:
    """A rate that only harms: the first measurement stays the best."""
    run = make_run(
        training={
            "epochs": 9, "learning_rate": 0.02, "warmup_epochs": 0,
            "validation": {"patience": 2, "keep": "best"},
        }
    )  # fmt: skip
    history = json.loads(train(run)["history.json"])
    best = max(range(len(history)), key=lambda place: history[place]["mrr"])
    assert len(history) == min(9, best + 3)
    metadata = open_manifest(run.storage, schemas.MODEL).metadata
    assert metadata["best"] == {"epoch": best + 1, "metric": history[best]["mrr"]}
    weights = safetensors.torch.load(read_file(run.storage, open_manifest(run.storage, schemas.MODEL), FILES[0]))
    loader = Loader(run.storage, run.settings)
    judged = Trainer(run.settings, loader, Group())
    judged.model.load_state_dict(weights)
    assert judged.examiner.ask(judged.model, Group())["mrr"] == history[best]["mrr"]


@pytest.mark.parametrize(
    ("training", "questions", "message"),
    [
        (
            {"validation": {"patience": 1, "every_epochs": 0}},
            None,
            "patience needs measurements, but every_epochs is 0",
        ),
        ({"validation": {"keep": "best"}}, ([], [], []), "keep needs .* but there are no validation events"),
        (
            {"curriculum": MINED, "validation": {"full_catalogue": 100}},
            None,
            "240 items are more than .*catalogue, 100",
        ),
    ],
)
def test_what_the_data_cannot_give_is_refused(
    make_run: MakeRun, training: dict[str, Any], questions: Any, message: str
) -> None:
    run = make_run(training=training, **({} if questions is None else {"questions": questions}))
    with pytest.raises(DataError, match=message):
        train(run)


def test_without_questions_training_goes_on_unmeasured(make_run: MakeRun) -> None:
    assert all("mrr" not in line for line in json.loads(train(make_run(questions=([], [], [])))["history.json"]))


def test_a_loss_that_explodes_stops_training_before_it_is_saved(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(resources={"checkpoint_every_steps": 1})
    loss_of = Trainer._loss
    steps = iter(range(100))
    monkeypatch.setattr(Trainer, "_loss", lambda self, batch: loss_of(self, batch) * (1e6 if next(steps) == 5 else 1))
    with pytest.raises(DataError, match=r"the loss is \d+\.\d+ at epoch 1 step 5; it began at .* train --force`"):
        train(run)
    state = checkpoint.decode(checkpoint.read(run.storage), training_lineage(run.storage, run.settings, 1))
    assert state is not None
    assert state["position"] == [1, 5]


def test_the_log_has_a_line_per_epoch_and_survives_a_restart(make_run: MakeRun) -> None:
    run = make_run(resources={"tensorboard": True})
    train(run)
    lines = [json.loads(line) for line in run.storage.read_bytes(LOG).decode().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 10), (2, 10), (3, 10)]
    assert all({"loss", "mrr", "pairs_per_s", "waiting", "copying", "time"} <= set(line) for line in lines)
    loader = Loader(run.storage, run.settings)
    with Monitor(run.storage, run.settings, loader, Position(2, 0), shown=True) as monitor:
        monitor.epoch({"epoch": 2, "loss": 0.25})
    lines = [json.loads(line) for line in run.storage.read_bytes(LOG).decode().splitlines()]
    assert [(line["epoch"], line["loss"]) for line in lines][1:] == [(2, 0.25)]
    files = run.storage.names(EVENTS)
    assert files
    assert b"mrr" in run.storage.read_bytes(f"{EVENTS}/{files[0]}")


class Together:
    """Ranks as threads of one process, each waiting for the others where a group would communicate."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.rows = threading.Barrier(ranks), [torch.zeros(0)] * ranks

    def gather(self, rank: int, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' rows, the others' as they are: what gradients flow back across is tested with real processes."""
        self.rows[rank] = rows
        self.barrier.wait()
        return torch.cat(self.rows)


@pytest.mark.parametrize("loss", ["max_margin", "softmax", "bpr", "cross_entropy"])
@pytest.mark.parametrize(("world_size", "hardest"), [(2, 2), (3, 0)])
def test_the_mean_of_the_ranks_gradients_is_that_of_one_process(
    make_run: MakeRun, loss: str, world_size: int, hardest: int
) -> None:
    row = {"from_epoch": 1, "uniform": 41, "in_batch": True, "hard": 2, "hardest": hardest}
    run = make_run(training={"loss": loss, "curriculum": [row]})

    def losses(ranks: int) -> tuple[torch.Tensor, list[torch.nn.Parameter]]:
        together, model = Together(ranks), Trainer(run.settings, Loader(run.storage, run.settings), Group()).model

        def one(rank: int) -> torch.Tensor:
            batch = Loader(run.storage, run.settings, rank, ranks).batch(2, 1)
            z = model(batch.features, batch.ids, batch.index, batch.weights, batch.sizes)
            vectors = choose(z, batch.members, lambda rows: together.gather(rank, rows), in_batch=True)
            return training_loss(vectors, batch.members, run.settings.task.training, hardest)

        with ThreadPoolExecutor(ranks) as threads:
            return torch.stack(list(threads.map(one, range(ranks)))).mean(), list(model.parameters())

    alone, shared = losses(1), losses(world_size)
    torch.testing.assert_close(shared[0], alone[0])
    for found, expected in zip(torch.autograd.grad(*shared), torch.autograd.grad(*alone), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_divergence_stops_training_and_names_the_step(make_run: MakeRun) -> None:
    run = make_run(training={"optimizer": "sgd", "learning_rate": 1e30}, model={"normalise_output": False})
    with pytest.raises(DataError, match=r"loss is (nan|inf) at epoch 1 step \d.*learning_rate \(now 1e\+30\)"):
        train(run)


@pytest.mark.parametrize("epochs", [1, 2])
def test_what_diverges_in_an_epochs_last_step_is_neither_measured_nor_kept(make_run: MakeRun, epochs: int) -> None:
    """Embeddings that are no numbers would have every target first, and be the best that there ever was."""
    training = {
        "optimizer": "sgd", "learning_rate": 1e30, "warmup_epochs": 0, "epochs": epochs, "batch_size": 1000,
        "validation": {"keep": "best"},
    }  # fmt: skip
    run = make_run(training=training, model={"normalise_output": False})
    assert Loader(run.storage, run.settings).steps_per_epoch == 1
    with pytest.raises(DataError, match=r"(embeddings|weights) are not finite after epoch 1: training has diverged"):
        train(run)
    assert find_manifest(run.storage, schemas.MODEL) is None
    assert not [name for name in run.storage.names(schemas.TRAINING) if name.startswith("step")]


def test_vectors_that_were_learned_by_id_are_not_given_to_other_items(tmp_path: Path) -> None:
    ours, theirs = Storage(str(tmp_path / "ours")), Storage(str(tmp_path / "theirs"))
    before = commit(theirs, schemas.ITEMS, [], Lineage("ingest", {}, {}), {"version": 1})
    commit(ours, schemas.ITEMS, [], Lineage("ingest", {}, {"previous items": before.content}), {"version": 2})
    _check_ids(ours, theirs, "begin anew")
    commit(ours, schemas.ITEMS, [], Lineage("ingest", {}, {}), {"version": 2})
    with pytest.raises(
        DataError, match=r"has numbered its items anew; set task.data.previous to the same run, or begin"
    ):
        _check_ids(ours, theirs, "begin anew")


@pytest.mark.parametrize("in_hardware", [True, False])
def test_who_trains_in_bfloat16_without_the_hardware_is_told(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, in_hardware: bool
) -> None:
    found = {"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": in_hardware}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    run = make_run(training={"precision": "bfloat16"})
    Trainer(run.settings, Loader(run.storage, run.settings), Group())
    assert ("not in hardware" in caplog.text) != in_hardware


def test_the_rate_warms_up_linearly_then_decays_step_by_step() -> None:
    settings = config.Training(learning_rate=0.1, warmup_epochs=1, decay_per_epoch=0.25)
    rates = [learning_rate(settings, Position(epoch, step), 2) for epoch in (1, 2, 3) for step in (0, 1)]
    assert rates == pytest.approx([0.05, 0.1, 0.05, 0.025, 0.0125, 0.00625])
    no_warmup = config.Training(learning_rate=0.1, warmup_epochs=0, decay_per_epoch=1)
    assert learning_rate(no_warmup, Position(1, 0), 2) == 0.1


def test_lineage_depends_on_the_ranks_and_on_what_training_reads(make_run: MakeRun) -> None:
    run, other = make_run(), make_run(name="other", query=[1] * 100, positive=[2] * 100)
    prints = [training_lineage(r.storage, r.settings, n).fingerprint for r, n in ((run, 1), (run, 2), (other, 1))]
    assert len(set(prints)) == 3
