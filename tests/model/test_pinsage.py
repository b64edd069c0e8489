"""The network against the paper's formulas on the whole graph, as dense matrices in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.layers import Convolution
from model.minibatch import NeighbourTable, build_blocks, hide, reach
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
        shares = np.sort(generator.dirichlet(np.ones(len(chosen))))[::-1] if len(chosen) else np.zeros(0)
        matrix[item, chosen] = shares
        lengths.append(len(chosen))
        neighbours.append(chosen)
        weights.append(shares)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    table = NeighbourTable.of(
        indptr, np.concatenate(neighbours).astype(np.uint32), np.concatenate(weights).astype(np.float32)
    )
    return table, matrix.astype(np.float64)


def oracle(model: PinSage, chosen: config.Model, features: Tensor, matrix: Tensor) -> Tensor:
    """Every item's embedding: each layer over the whole catalogue, by dense matrices."""
    h = ((features - model.mean) / model.std).clamp(-10, 10)
    outputs: list[Tensor] = []
    for number, layer in enumerate(model.convolutions):
        assert isinstance(layer, Convolution)
        shares = matrix.clone()
        if chosen.fan_outs is not None:
            for row in shares:
                row[row.argsort(descending=True, stable=True)[chosen.fan_outs[number] :]] = 0
        messages = torch.relu(h @ layer.Q.weight.T + layer.Q.bias)
        if chosen.pooling == "mean":
            shares = (shares > 0).double()
        if layer.attention is not None:
            shares = shares * torch.exp((messages @ layer.attention.weight.T)[:, 0].clamp(-5, 5))
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-300)
        pooled = shares @ messages
        if chosen.pooling == "max":
            rows = [messages[row > 0] for row in shares]
            pooled = torch.stack([row.max(0).values if len(row) else row.new_zeros(row.shape[1]) for row in rows])
        z = torch.relu(torch.cat([h, pooled], 1) @ layer.W.weight.T + layer.W.bias)
        if chosen.residual:
            z = z + (h if h.shape[1] == z.shape[1] else h @ layer.skip.weight.T)  # type: ignore[union-attr,operator]
        h = z / z.norm(dim=1, keepdim=True).clamp(min=1e-6)
        outputs.insert(0, h)
    if chosen.head_input == "all" and outputs:
        h = torch.cat(outputs, 1)
    embeddings = torch.relu(h @ model.G1.weight.T + model.G1.bias) @ model.G2.weight.T
    return embeddings / embeddings.norm(dim=1, keepdim=True).clamp(min=1e-6) if chosen.normalise_output else embeddings


@pytest.mark.parametrize(
    ("num_layers", "others"),
    [
        *((number, {"normalise_output": normalise}) for number in (0, 1, 2, 3) for normalise in (True, False)),
        (2, {"pooling": "mean"}),
        (2, {"pooling": "max"}),
        (2, {"pooling": "attention"}),
        (2, {"residual": True}),
        (3, {"head_input": "all"}),
        (2, {"fan_outs": (1, 3)}),
        (3, {"fan_outs": (2, 1, 4)}),
        (2, {"pooling": "attention", "residual": True, "head_input": "all", "fan_outs": (3, 2)}),
    ],
)
def test_minibatch_embeddings_and_gradients_equal_the_dense_oracle(num_layers: int, others: dict[str, Any]) -> None:
    table, matrix = random_graph()
    chosen = settings(num_layers, **others)
    model = PinSage(NUM_FEATURES, chosen, seed=4).double()
    for name, parameter in model.named_parameters():
        if "attention" in name:
            torch.nn.init.uniform_(parameter, -1, 1, generator=torch.Generator().manual_seed(5))
    features = torch.tensor(np.random.default_rng(3).normal(size=(NUM_ITEMS, NUM_FEATURES)))
    seeds = np.array([7, 0, 24, 3], np.uint32)
    hidden = hide(np.array([7], np.uint32), np.array([9], np.uint32))
    matrix[7, 9] = matrix[9, 7] = 0
    sums = matrix.sum(1, keepdims=True)
    matrix = np.divide(matrix, sums, out=np.zeros_like(matrix), where=sums > 0)
    blocks = build_blocks(table, seeds, hidden, reach(num_layers, chosen.fan_outs, table.width))
    weights = torch.from_numpy(blocks.weights).double()
    ids = torch.from_numpy(blocks.ids.astype(np.int64))
    found = model(features[ids], ids, torch.from_numpy(blocks.index), weights, blocks.sizes)
    expected = oracle(model, chosen, features, torch.tensor(matrix))[seeds.astype(np.int64)]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found[:, 0].sum(), parameters),
        torch.autograd.grad(expected[:, 0].sum(), parameters),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"fan_outs": (5,)}, "fan_outs names 1 layers, num_layers is 2"),
        ({"pooling": "max", "message_passing": "dgl"}, "max has no dgl version; set message_passing to torch"),
    ],
)
def test_parts_that_do_not_fit_are_refused(others: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(2, **others)


def test_attention_begins_as_importance_pooling() -> None:
    model = PinSage(NUM_FEATURES, settings(1, pooling="attention"), seed=4)
    plain = PinSage(NUM_FEATURES, settings(1), seed=4)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "attention" not in name})
    features, index = torch.randn(6, NUM_FEATURES), torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.7, 0.3], [1.0, 0.0]])
    inputs = features, torch.arange(6), index, weights, (6, 2)
    torch.testing.assert_close(model(*inputs), plain(*inputs))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_an_embedding_does_not_feel_the_other_end_of_its_hidden_pair(num_layers: int) -> None:
    """0 and 1 are each other's only neighbours: with the pair hidden, no gradient of z_0 reaches the features of 1."""
    indptr, neighbours = np.array([0, 1, 2], np.int64), np.array([1, 0], np.uint32)
    table = NeighbourTable.of(indptr, neighbours, np.ones(2, np.float32))
    model = PinSage(NUM_FEATURES, settings(num_layers), seed=1)
    ends = np.array([0], np.uint32), np.array([1], np.uint32)
    felt = []
    for hidden in (hide(*ends), hide(*(end[:0] for end in ends))):
        blocks = build_blocks(table, np.array([0, 1], np.uint32), hidden, [1] * num_layers)
        features = torch.linspace(-1, 1, 2 * NUM_FEATURES).view(2, -1).requires_grad_()
        index, weights = torch.from_numpy(blocks.index), torch.from_numpy(blocks.weights)
        model(features, torch.arange(2), index, weights, blocks.sizes)[0].square().matmul(torch.arange(6.0)).backward()
        assert features.grad is not None
        felt.append(bool(features.grad[1].any()))
    assert felt == [False, True]


def test_features_are_standardised_and_cut_and_constant_ones_pass() -> None:
    model = PinSage(3, settings(0))
    model.set_statistics([1.0, 5.0, 0.0], [2.0, 0.0, 1e-3])
    half = torch.tensor([[3.0, 5.0, 1.0]], dtype=torch.float16)
    assert model.standardise(half, torch.zeros(1)).tolist() == [[1.0, 0.0, 10.0]]


def test_an_item_without_a_learned_vector_has_zeros_for_it() -> None:
    model = PinSage(3, settings(1, item_dimensions=2), seed=1, num_items=4)
    assert model.items is not None
    h = model.standardise(torch.ones(4, 3), torch.tensor([3, -1, 4, 0]))
    assert h.shape == (4, 5)
    torch.testing.assert_close(
        h[:, 3:], torch.stack([model.items.weight[3], *torch.zeros(2, 2), model.items.weight[0]])
    )
    h.sum().backward()
    assert model.items.weight.grad is not None
    assert model.items.weight.grad.any(1).tolist() == [True, False, False, True]


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
        lengths = PinSage(3, settings(0, normalise_output=normalise))(features, torch.arange(4), *empty, (4,)).norm(
            dim=1
        )
        assert torch.allclose(lengths, torch.ones(4)) == normalise
