"""The convolution against dense matrices in float64, and both message-passing backends against each other."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from model.layers import Convolution, importance_pool, importance_pool_dgl, transpose_lists
from pipeline.contracts import config
from pipeline.contracts.errors import ResourceError

HAS_DGL = importlib.util.find_spec("dgl") is not None
needs_dgl = pytest.mark.skipif(not HAS_DGL, reason="DGL is not installed: the equality of the backends went unproved")


def random_block(seed: int, sources: int = 7, rows: int = 4, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 messages [U, 3], and lists with repeated entries, padding and one row without neighbours."""
    generator = np.random.default_rng(seed)
    weights = generator.random((rows, width)) * (generator.random((rows, width)) < 0.6)
    weights[1] = 0
    projected = torch.tensor(generator.normal(size=(sources, 3)), requires_grad=True)
    index = torch.tensor(generator.integers(0, sources, (rows, width)), dtype=torch.int32)
    return projected, index, torch.tensor(weights)


def dense(index: Tensor, weights: Tensor, num_sources: int) -> Tensor:
    """The lists as a matrix [B, U], entry by entry."""
    matrix = torch.zeros(len(index), num_sources, dtype=weights.dtype)
    for b, (row, row_weights) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
        for source, weight in zip(row, row_weights, strict=True):
            matrix[b, source] += weight
    return matrix


@pytest.mark.parametrize("seed", range(5))
def test_pool_is_a_dense_product_forward_and_backward(seed: int) -> None:
    projected, index, weights = random_block(seed)
    matrix = dense(index, weights, len(projected))
    pooled = importance_pool(projected, index, weights)
    torch.testing.assert_close(pooled, matrix @ projected)
    assert (pooled[1] == 0).all()
    upstream = torch.randn(pooled.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (gradient,) = torch.autograd.grad(pooled, projected, upstream)
    torch.testing.assert_close(gradient, matrix.T @ upstream)


def test_pool_passes_gradcheck() -> None:
    projected, index, weights = random_block(1)
    assert torch.autograd.gradcheck(lambda values: importance_pool(values, index, weights), projected)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (4, 5)])
def test_pool_of_nothing_is_zero_with_zero_gradients(shape: tuple[int, int]) -> None:
    projected = torch.ones(7, 3, requires_grad=True)
    pooled = importance_pool(projected, torch.zeros(shape, dtype=torch.int32), torch.zeros(shape))
    assert pooled.shape == (shape[0], 3)
    assert not pooled.any()
    (gradient,) = torch.autograd.grad(pooled.sum(), projected)
    assert gradient.shape == (7, 3)
    assert not gradient.any()


def test_transposed_lists_worked_by_hand() -> None:
    index = torch.tensor([[2, 0, 0], [2, 1, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.7, 0.3, 0.0], [0.6, 0.4, 0.0]])
    offsets, destinations, values = transpose_lists(index, weights, num_sources=4)
    assert offsets.tolist() == [0, 1, 2, 4, 4]
    assert destinations.tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(values, torch.tensor([0.3, 0.4, 0.7, 0.6]))


@needs_dgl
@pytest.mark.parametrize("seed", range(3))
def test_torch_and_dgl_agree_in_outputs_and_gradients(seed: int) -> None:
    projected, index, weights = random_block(seed)
    results = []
    for pool in (importance_pool, importance_pool_dgl):
        pooled = pool(projected, index, weights)
        results.append((pooled, *torch.autograd.grad(pooled.square().sum(), projected)))
    for torch_result, dgl_result in zip(*results, strict=True):
        torch.testing.assert_close(torch_result, dgl_result)


@needs_dgl
def test_convolutions_of_both_backends_agree_in_every_parameter_gradient() -> None:
    _, index, weights = random_block(2)
    gradients = []
    for backend in ("torch", "dgl"):
        convolution = seeded(Convolution(3, small(backend)))
        convolution(torch.linspace(-1, 1, 21, dtype=torch.float64).view(7, 3), index, weights)[:, 0].sum().backward()
        gradients.append([parameter.grad for parameter in convolution.parameters()])
    torch.testing.assert_close(*gradients)


def test_missing_dgl_names_the_setting_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dgl", None)
    with pytest.raises(ResourceError, match=r"task\.model\.message_passing is dgl.*set it to torch"):
        importance_pool_dgl(*random_block(0))


@pytest.mark.parametrize("seed", range(3))
def test_convolution_equals_the_papers_formula_forward_and_backward(seed: int) -> None:
    _, index, weights = random_block(seed)
    h = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    convolution = seeded(Convolution(3, small()))
    Q, q, W, w = convolution.Q.weight, convolution.Q.bias, convolution.W.weight, convolution.W.bias
    messages = (h @ Q.T + q).clamp(min=0)
    combined = torch.cat([h[:4], dense(index, weights, 7) @ messages], dim=1)
    z = (combined @ W.T + w).clamp(min=0)
    expected = z / z.square().sum(1, keepdim=True).sqrt()
    found = convolution(h, index, weights)
    torch.testing.assert_close(found, expected)
    inputs = [h, *convolution.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found[:, 0].sum(), inputs), torch.autograd.grad(expected[:, 0].sum(), inputs)
    )


def test_a_dead_row_stays_zero_and_its_gradients_finite() -> None:
    convolution = seeded(Convolution(3, small()))
    torch.nn.init.constant_(convolution.W.bias, -100)
    h = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    output = convolution(h, torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.float64))
    output.sum().backward()
    assert not output.any()
    assert h.grad is not None
    assert h.grad.isfinite().all()


def small(backend: str = "torch") -> config.Model:
    """6 wide inside, 4 outside."""
    return config.Model.model_validate({"hidden_dimensions": 6, "output_dimensions": 4, "message_passing": backend})


def seeded(convolution: Convolution) -> Convolution:
    """The same float64 weights at every call, positive bias so that no row dies."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in convolution.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.3)
    return convolution.double()
