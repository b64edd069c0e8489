"""The exported layers give, layer by layer over the catalogue, what mini-batches give."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model import trainer
from model.distributed import Group
from model.export import Exported, load_exported
from model.lineage import lineage as training_lineage
from model.loader import Loader
from model.trainer import Trainer
from pipeline.contracts import schemas
from pipeline.contracts.datasets import open_manifest, read_file
from pipeline.contracts.errors import ResourceError
from pipeline.contracts.replica import padded
from pipeline.inference.sums import add_rows, quantum, scaled
from tests.model.conftest import Run, plant

Array = NDArray[Any]


def exported(run: Run) -> Exported:
    """Train, and load what inference loads."""
    trainer.train(run.storage, run.settings, training_lineage(run.storage, run.settings, 1), Group())
    manifest = open_manifest(run.storage, schemas.MODEL)
    files = [read_file(run.storage, manifest, name) for name in ("model.safetensors", "model.json")]
    return load_exported(files[0], json.loads(files[1]))


def pooled(network: Exported, layer: int, projected: Array, index: Array, weights: Array) -> Array:
    """What a reducer makes of a layer: plain sums, or the largest."""
    index, weights = network.lists(layer, index, weights)
    rows = projected[index] * (weights != 0)[..., None]
    if network.reduction == "max":
        return np.asarray(rows.max(1), np.float32)
    return np.asarray((weights[..., None] * rows).sum(1), np.float32)


@pytest.mark.parametrize(
    ("num_layers", "others"),
    [
        *((number, {}) for number in (0, 1, 2)),
        *((2, {"pooling": pooling}) for pooling in ("mean", "max", "attention")),
        (2, {"fan_outs": (2, 4), "residual": True}),
        (3, {"head_input": "all", "pooling": "attention"}),
        *((number, {"item_dimensions": 5}) for number in (0, 2)),
    ],
)
def test_layer_by_layer_equals_mini_batches(
    make_run: Callable[..., Run], num_layers: int, others: dict[str, Any]
) -> None:
    planted = plant()
    neighbours = [list(row)[: item % 7] for item, row in enumerate(planted["neighbours"])]
    weights = [np.arange(len(row), 0, -1) / max(1, len(row) * (len(row) + 1) / 2) for row in neighbours]
    model = {"num_layers": num_layers, **others}
    run = make_run(model=model, training={"epochs": 1}, neighbours=neighbours, weights=weights)
    network = exported(run)
    assert network.num_layers == num_layers
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in neighbours])])
    rows = np.arange(240)
    index = padded(indptr, np.concatenate(neighbours).astype(np.int64), rows, 6, np.int64)
    shares = padded(indptr, np.concatenate(weights), rows, 6, np.float32)
    h = network.standardise(planted["features"], rows)
    for layer in range(num_layers):
        h = network.combine(layer, h, pooled(network, layer, network.project(layer, h), index, shares))
    embeddings = network.head(h)
    assert embeddings.shape == (240, 16)
    assert embeddings.dtype == np.float32

    loader = Loader(run.storage, run.settings)
    trained = Trainer(run.settings, loader, Group()).model
    trained.load_state_dict(network._model.state_dict())
    nobody = np.zeros(0, np.uint32)
    for seeds in np.array_split(np.random.default_rng(0).permutation(240).astype(np.uint32), 7):
        blocks = loader.blocks(seeds, nobody, nobody)
        features, index_tensor = torch.from_numpy(planted["features"][blocks.ids]), torch.from_numpy(blocks.index)
        with torch.no_grad():
            z = trained(
                features,
                torch.from_numpy(blocks.ids.astype(np.int64)),
                index_tensor,
                torch.from_numpy(blocks.weights),
                blocks.sizes,
            )
        np.testing.assert_allclose(embeddings[seeds], z.numpy(), atol=2e-6)


def test_a_pickled_model_computes_the_same(make_run: Callable[..., Run]) -> None:
    network = exported(make_run(training={"epochs": 1}))
    features = plant()["features"][:5]
    before = network.standardise(features, np.arange(5))
    network.set_threads(1)
    copy = pickle.loads(pickle.dumps(network))
    np.testing.assert_array_equal(copy.standardise(features, np.arange(5)), before)
    assert len(pickle.dumps(network)) < 2 * len(network._weights)


def test_bfloat16_products_are_near_those_of_float32(make_run: Callable[..., Run]) -> None:
    network = exported(make_run(training={"epochs": 1}))
    hidden = network.standardise(plant()["features"][:50], np.arange(50))
    full = network.project(0, hidden)
    network.set_place("bfloat16", _cpu)
    half = pickle.loads(pickle.dumps(network)).project(0, hidden)
    assert half.dtype == np.float32
    assert not np.array_equal(half, full)
    assert np.abs(half - full).max() < 0.02 * np.abs(full).max()


def _cpu() -> str:
    return "cpu"


def test_a_device_that_is_not_there_is_named_at_the_first_call(make_run: Callable[..., Run]) -> None:
    network = exported(make_run(training={"epochs": 1}))
    network.set_place("float32", _seventh_gpu)
    copy = pickle.loads(pickle.dumps(network))
    with pytest.raises(ResourceError, match=r"cuda:7 is wanted.*resources\.inference\.device: cpu"):
        copy.project(0, np.zeros((1, 3), np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sums_of_held_rows_are_those_of_the_pipeline_to_the_last_bit(make_run: Callable[..., Run], dtype: Any) -> None:
    network, random, unit = exported(make_run()), np.random.default_rng(1), quantum(1, np.dtype(dtype).name)
    rows = random.random((300, 33)).astype(dtype)
    index, weights = random.integers(0, 300, (40, 7)), random.dirichlet(np.ones(7), 40).astype(np.float32)
    weights[3], weights[5, 2:] = 0, 0
    expected = np.zeros((40, 33), np.int32)
    add_rows(rows, np.arange(41) * 7, index.reshape(-1), weights.reshape(-1), unit, expected)
    found = network.sum_held(torch.from_numpy(rows), index, weights, unit)
    np.testing.assert_array_equal(network.fetch(found), expected)
    padded_sums = network.scale_held(found, unit).numpy()
    assert padded_sums.shape == (network.block, 33)
    np.testing.assert_array_equal(padded_sums[:40], scaled(expected, unit))
    assert not padded_sums[40:].any()
    assert network.hold([rows]) is None, "no GPU makes the products"


def _seventh_gpu() -> str:
    return "cuda:7"


def test_a_process_builds_a_network_once_however_often_it_is_unpickled(make_run: Callable[..., Run]) -> None:
    network = exported(make_run())
    one, other = (pickle.loads(pickle.dumps(network)) for _ in range(2))
    assert one._model is other._model
    weights = bytearray(network._weights)
    weights[-1] ^= 1
    changed = Exported(bytes(weights), network._description)
    assert changed._model is not one._model
