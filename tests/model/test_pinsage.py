"""The network against the paper's formulas on the whole graph, as dense matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.layers import Convolution
from model.minibatch import NeighbourTable, build_blocks, hide
from model.pinsage import PinSage
from pipeline.contracts import config

NUM_ITEMS, NUM_FEATURES = 30, 5


def settings(num_layers: int, **others: object) -> config.Model:
    return config.Model.model_validate(
        {"num_layers": num_layers, "hidden_dimensions": 8, "output_dimensions": 6, **others}
    )


def random_graph() -> tuple[NeighbourTable, NDArray[np.float64]]:
    """Lists of 0 to 4 neighbours, as a table and as a matrix [N, N]."""
    generator = np.random.default_rng(2)
    matrix = np.zeros((NUM_ITEMS, NUM_ITEMS), np.float32)
    lengths, neighbours, weights = [], [], []
    for item in range(NUM_ITEMS):
        chosen = generator.choice(NUM_ITEMS, item % 5, replace=False)
        shares = generator.dirichlet(np.ones(len(chosen))) if len(chosen) else np.zeros(0)
        matrix[item, chosen] = shares
        lengths.append(len(chosen))
        neighbours.append(chosen)
        weights.append(shares)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    table = NeighbourTable.of(
        indptr, np.concatenate(neighbours).astype(np.uint32), np.concatenate(weights).astype(np.float32)
    )
    return table, matrix.astype(np.float64)


def oracle(model: PinSage, features: Tensor, matrix: Tensor) -> Tensor:
    """Every item's embedding: each layer over the whole catalogue, no mini-batch."""
    h = ((features - model.mean) / model.std).clamp(-10, 10)
    for layer in model.convolutions:
        assert isinstance(layer, Convolution)
        pooled = matrix @ torch.relu(h @ layer.Q.weight.T + layer.Q.bias)
        z = torch.relu(torch.cat([h, pooled], 1) @ layer.W.weight.T + layer.W.bias)
        h = z / z.norm(dim=1, keepdim=True).clamp(min=1e-6)
    embeddings = torch.relu(h @ model.G1.weight.T + model.G1.bias) @ model.G2.weight.T
    return embeddings / embeddings.norm(dim=1, keepdim=True).clamp(min=1e-6) if model.normalise_output else embeddings


@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
@pytest.mark.parametrize("normalise", [True, False])
def test_minibatch_embeddings_and_gradients_equal_the_dense_oracle(num_layers: int, normalise: bool) -> None:
    table, matrix = random_graph()
    model = PinSage(NUM_FEATURES, settings(num_layers, normalise_output=normalise), seed=4).double()
    features = torch.tensor(np.random.default_rng(3).normal(size=(NUM_ITEMS, NUM_FEATURES)))
    seeds = np.array([7, 0, 24, 3], np.uint32)
    hidden = hide(np.array([7], np.uint32), np.array([9], np.uint32))
    matrix[7, 9] = matrix[9, 7] = 0
    sums = matrix.sum(1, keepdims=True)
    matrix = np.divide(matrix, sums, out=np.zeros_like(matrix), where=sums > 0)
    blocks = build_blocks(table, seeds, hidden, num_layers)
    weights = torch.from_numpy(blocks.weights).double()
    found = model(features[blocks.ids.astype(np.int64)], torch.from_numpy(blocks.index), weights, blocks.sizes)
    expected = oracle(model, features, torch.tensor(matrix))[seeds.astype(np.int64)]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found[:, 0].sum(), parameters),
        torch.autograd.grad(expected[:, 0].sum(), parameters),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("num_layers", [1, 2])
def test_an_embedding_does_not_feel_the_other_end_of_its_hidden_pair(num_layers: int) -> None:
    """0 and 1 are each other's only neighbours: with the pair hidden, no gradient of z_0 reaches the features of 1."""
    indptr, neighbours = np.array([0, 1, 2], np.int64), np.array([1, 0], np.uint32)
    table = NeighbourTable.of(indptr, neighbours, np.ones(2, np.float32))
    model = PinSage(NUM_FEATURES, settings(num_layers), seed=1)
    ends = np.array([0], np.uint32), np.array([1], np.uint32)
    felt = []
    for hidden in (hide(*ends), hide(*(end[:0] for end in ends))):
        blocks = build_blocks(table, np.array([0, 1], np.uint32), hidden, num_layers)
        features = torch.linspace(-1, 1, 2 * NUM_FEATURES).view(2, -1).requires_grad_()
        index, weights = torch.from_numpy(blocks.index), torch.from_numpy(blocks.weights)
        model(features, index, weights, blocks.sizes)[0].square().matmul(torch.arange(6.0)).backward()
        assert features.grad is not None
        felt.append(bool(features.grad[1].any()))
    assert felt == [False, True]


def test_features_are_standardised_and_cut_and_constant_ones_pass() -> None:
    model = PinSage(3, settings(0))
    model.set_statistics([1.0, 5.0, 0.0], [2.0, 0.0, 1e-3])
    half = torch.tensor([[3.0, 5.0, 1.0]], dtype=torch.float16)
    assert model.standardise(half).tolist() == [[1.0, 0.0, 10.0]]


def test_weights_come_from_the_seed_alone() -> None:
    states = []
    for seed, noise in ((1, 0), (1, 1), (2, 0)):
        torch.manual_seed(noise)
        states.append(PinSage(3, settings(1), seed).state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
    assert not torch.equal(states[0]["G1.weight"], states[2]["G1.weight"])


def test_embeddings_have_length_one_exactly_when_asked() -> None:
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    empty = torch.zeros(0, 0, dtype=torch.int32), torch.zeros(0, 0)
    for normalise in (True, False):
        lengths = PinSage(3, settings(0, normalise_output=normalise))(features, *empty, (4,)).norm(dim=1)
        assert torch.allclose(lengths, torch.ones(4)) == normalise
