"""What a GPU computes, it computes as the CPU does: batches, gradients, resumed training, NCCL, exported layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from model import distributed, trainer
from model.checkpoint import Keeper
from model.distributed import Group
from model.export import load_exported
from model.layers import importance_pool
from model.lineage import lineage as training_lineage
from model.loader import Loader, Position
from model.trainer import Trainer
from pipeline.contracts import schemas
from pipeline.contracts.config import TrainingResources
from pipeline.contracts.datasets import is_up_to_date, open_manifest, read_file
from pipeline.inference.sums import add_rows, quantum
from tests.model.conftest import Run, plant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="torch sees no GPU: unproved here are batches, gradients, resuming, NCCL and exported layers on one",
    ),
]
MakeRun = Callable[..., Run]
FILES = ("model.safetensors", "model.json")
CPU, GPU = Group(), Group(device=torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """Made ready as jobs/train.py does it."""
    with distributed.start(TrainingResources(device="cuda", threads=1)):
        yield


def near(found: Tensor | None, expected: Tensor | None, tolerance: float) -> bool:
    """Whether the largest difference is small beside the largest value, which is not 0."""
    assert found is not None
    assert expected is not None
    here, there = found.detach().cpu(), expected.detach().cpu()
    most = float(there.abs().max())
    return most > 0 and float((here - there).abs().max()) <= tolerance * most


@pytest.mark.parametrize("num_kept", [0, 60, 1000])
def test_batches_on_the_gpu_are_those_on_the_cpu(make_run: MakeRun, num_kept: int) -> None:
    """All are held there to the end, while the memory they came from is used again and again."""
    kept = num_kept * plant()["features"][0].nbytes
    run = make_run(resources={"device_features": kept or None, "workers": 4, "prefetch": 8})
    here = Loader(run.storage, run.settings)
    there = Loader(run.storage, run.settings, device=GPU.device)
    found = list(there.batches(Position(1, 0), Position(4, 0)))
    assert len(found) == 3 * there.steps_per_epoch
    for position, batch in found:
        expected = here.batch(*position)
        expected = expected if here.carrier.kept is None else here.carrier.kept.whole(expected)
        values, others = (vars(each) | each.members._asdict() for each in (batch, expected))
        for name, value in values.items():
            if isinstance(value, Tensor):
                assert value.device == GPU.device
                assert torch.equal(value.cpu(), others[name]), (position, name)


@pytest.mark.parametrize("pooling", ["importance", "mean", "max", "attention"])
@pytest.mark.parametrize("loss", ["max_margin", "softmax"])
def test_embeddings_and_gradients_on_the_gpu_are_those_on_the_cpu(make_run: MakeRun, pooling: str, loss: str) -> None:
    run = make_run(model={"pooling": pooling}, training={"loss": loss})
    found = []
    for group in (CPU, GPU):
        loader = Loader(run.storage, run.settings, device=group.device)
        network = Trainer(run.settings, loader, group)
        position, batch = next(loader.batches(Position(2, 1), Position(3, 0)))
        assert not torch.backends.cuda.matmul.allow_tf32
        embeddings = network.model(batch.features, batch.ids, batch.index, batch.weights, batch.sizes)
        network.step(position, batch)
        found.append((embeddings, {name: each.grad for name, each in network.model.named_parameters()}))
    (expected, gradients), (embeddings, others) = found
    assert near(embeddings, expected, 1e-4)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert near(others[name], gradient, 1e-4), name


def test_a_hub_in_every_list_gets_the_gradient_of_all() -> None:
    """One source in 20 000 lists, beside others in a few, in none, and padding."""
    random = np.random.default_rng(3)
    index = torch.from_numpy(random.integers(1, 5000, (20_000, 8), np.int32))
    weights = torch.from_numpy(random.random((20_000, 8), np.float32))
    index[:, 0] = 0
    weights[random.random((20_000, 8)) < 0.2] = 0
    weights[:100] = 0
    sources = torch.from_numpy(random.standard_normal((5100, 24), np.float32))
    outer = torch.from_numpy(random.standard_normal((20_000, 24), np.float32))
    found = []
    for device, kind in (("cpu", torch.float64), ("cuda", torch.float32)):
        projected = sources.to(device, kind).requires_grad_()
        pooled = importance_pool(projected, index.to(device), weights.to(device, kind))
        (pooled * outer.to(device, kind)).sum().backward()
        found.append((pooled, projected.grad))
    (expected, gradient), (pooled, other) = found
    assert near(pooled, expected, 1e-5)
    assert near(other, gradient, 1e-5)


class InterruptError(Exception):
    """Stands for a kill: nothing after it is done."""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_on_the_gpu_goes_on_from_its_checkpoint(
    make_run: MakeRun, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the same bytes, as sums on a GPU have no fixed order."""
    changes: dict[str, Any] = {
        "training": {"precision": precision}, "resources": {"checkpoint_every_steps": 4, "device": "cuda"}
    }  # fmt: skip

    def train(run: Run) -> dict[str, Tensor]:
        lineage = training_lineage(run.storage, run.settings, world_size=1)
        trainer.train(run.storage, run.settings, lineage, GPU)
        assert is_up_to_date(run.storage, schemas.TRAIN, lineage)
        return safetensors.torch.load(read_file(run.storage, open_manifest(run.storage, schemas.MODEL), FILES[0]))

    expected, run, save = train(make_run(**changes, name="unbroken")), make_run(**changes, name="broken"), Keeper.save

    def save_and_stop(*state: Any) -> None:
        save(*state)
        raise InterruptError

    monkeypatch.setattr(Keeper, "save", save_and_stop)
    with pytest.raises(InterruptError):
        train(run)
    monkeypatch.setattr(Keeper, "save", save)
    found = train(run)
    for name, weights in expected.items():
        assert near(found[name], weights, 1e-3 if precision == "float32" else 3e-2), name


def test_torchrun_trains_on_the_gpu(make_run: MakeRun) -> None:
    run = make_run(resources={"device": "cuda"})
    command = [sys.executable, "-m", "jobs.launch", "--standalone", "--nproc-per-node=1", "--module", "jobs.train"]
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, "--settings", str(run.file)], cwd=root, env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert is_up_to_date(run.storage, schemas.TRAIN, training_lineage(run.storage, run.settings, world_size=1))


def test_nccl_carries_gradients_rows_and_decisions(make_run: MakeRun, tmp_path: Path) -> None:
    """By a rank that is alone and takes itself for one of two: what one GPU can show of NCCL."""
    run = make_run()
    loader = Loader(run.storage, run.settings, device=GPU.device)
    position, batch = next(loader.batches(Position(1, 0), Position(2, 0)))
    alone = Trainer(run.settings, loader, GPU)
    alone.step(position, batch)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        wrapped = Trainer(run.settings, loader, GPU)
        wrapped.network = Group(0, 2, GPU.device).wrap(wrapped.model)
        assert isinstance(wrapped.network, torch.nn.parallel.DistributedDataParallel)
        wrapped.step(position, batch)
        assert Group(0, 2, GPU.device).from_first(b"state") == b"state"
        assert Group(0, 2, GPU.device).means(torch.tensor([2.0, 6.0], device=GPU.device)) == [1.0, 3.0]
        rows = torch.randn(4, 3, device=GPU.device, requires_grad=True)
        gathered = distributed._Gather.apply(rows, 0, 1)
        (gathered * 3).sum().backward()
        assert torch.equal(gathered, rows)
        assert rows.grad is not None
        assert torch.equal(rows.grad, torch.full_like(rows, 3.0))
    finally:
        dist.destroy_process_group()
    for one, other in zip(alone.model.parameters(), wrapped.model.parameters(), strict=True):
        assert near(other, one, 1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_exported_layers_on_the_gpu_are_those_on_the_cpu(make_run: MakeRun, precision: str, tolerance: float) -> None:
    run = make_run(model={"pooling": "attention"}, training={"epochs": 1})
    trainer.train(run.storage, run.settings, training_lineage(run.storage, run.settings, 1), CPU)
    manifest = open_manifest(run.storage, schemas.MODEL)
    weights, described = (read_file(run.storage, manifest, name) for name in FILES)
    here, there = (load_exported(weights, json.loads(described)) for _ in range(2))
    there.set_place(precision, lambda: "cuda")
    features = plant()["features"].astype(np.float16)
    hidden = here.standardise(features, np.arange(len(features)))
    calls: list[tuple[Any, ...]] = [("standardise", features, np.arange(len(features)))]
    for layer in range(here.num_layers):
        projected = here.project(layer, hidden)
        calls += [("project", layer, hidden), ("combine", layer, hidden, projected)]
        hidden = here.combine(layer, hidden, projected)
    calls.append(("head", hidden))
    for name, *arguments in calls:
        found, expected = (getattr(network, name)(*arguments) for network in (there, here))
        assert found.dtype == np.float32
        assert near(torch.from_numpy(found), torch.from_numpy(expected), tolerance), (name, precision)


def test_a_layer_is_held_and_summed_on_the_gpu_as_by_the_pipeline(make_run: MakeRun) -> None:
    run = make_run(training={"epochs": 1})
    trainer.train(run.storage, run.settings, training_lineage(run.storage, run.settings, 1), CPU)
    manifest = open_manifest(run.storage, schemas.MODEL)
    weights, described = (read_file(run.storage, manifest, name) for name in FILES)
    network = load_exported(weights, json.loads(described))
    network.set_place("float32", lambda: "cuda")
    random, unit = np.random.default_rng(1), quantum(1, "float16")
    parts = [random.random((size, 64)).astype(np.float16) for size in (100_000, 1, 0, 30_000)]
    rows = np.concatenate(parts)
    index = random.integers(0, len(rows), (5000, 50))
    shares = random.dirichlet(np.ones(50), 5000).astype(np.float32)
    expected = np.zeros((5000, 64), np.int32)
    add_rows(rows, np.arange(5001) * 50, index.reshape(-1), shares.reshape(-1), unit, expected)
    held = network.hold(parts)
    assert held is not None
    assert held.device.type == "cuda"
    np.testing.assert_array_equal(network.fetch(network.sum_held(held, index, shares, unit)), expected)
    del held
    free = torch.cuda.mem_get_info()[0]
    vast = np.broadcast_to(np.zeros(1, np.float16), (free // 2, 1))
    assert network.hold([vast]) is None, "it has no room"
