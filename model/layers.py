"""One convolution: pool neighbours, concatenate, project, normalise.

A block is two plain tensors: index [B, T] says which source rows a destination pools, weights [B, T] how much of each;
padding has weight 0. The first B source rows are the destinations themselves. No [B, T, m] tensor is ever made.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.contracts import config
from pipeline.contracts.errors import ResourceError

for beginning in ("Sparse CSR tensor support is in beta state", "Sparse invariant checks are implicitly disabled"):
    warnings.filterwarnings("ignore", beginning)

SMALLEST_NORM = 1e-6
"""Shorter rows are divided by this instead of their length: a zero row stays zero and its gradient finite."""
MOST_ATTENTION = 5.0
"""Scores are cut here: one neighbour can weigh 22 000 times another, and float16 holds what is sent."""


def importance_pool(projected: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum each destination's neighbours, weighted by how often walks met them.

    projected is [U, m], index int32 or int64 [B, T] with rows of projected, weights [B, T]; padding weighs 0 and may
    point anywhere in range. Returns [B, m]; a destination without neighbours gets zeros. Weights get no gradient.
    Source: Ying et al. 2018, importance pooling, Algorithm 1.
    """
    pooled: Tensor = _Pool.apply(projected, index, weights)
    return pooled


class _Pool(torch.autograd.Function):
    """Sums over the neighbour lists; backward, sums over the transposed lists."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(index, weights)
        ctx.num_sources = len(projected)
        if not index.shape[1]:
            return projected.new_zeros(len(index), projected.shape[1])
        if index.device.type == "cpu":
            return F.embedding_bag(index, projected, mode="sum", per_sample_weights=weights)
        offsets = torch.arange(0, index.numel() + 1, index.shape[1], dtype=index.dtype, device=index.device)
        return list_sums(projected, offsets, index.flatten(), weights.flatten())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        index, weights = ctx.saved_tensors
        offsets, destinations, values = transpose_lists(index, weights, ctx.num_sources)
        if not len(destinations):
            return gradient.new_zeros(ctx.num_sources, gradient.shape[1]), None, None
        return list_sums(gradient.contiguous(), offsets, destinations, values)[: ctx.num_sources], None, None


def list_sums(rows: Tensor, offsets: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """For list r, the sum of the rows [U, m] that index[offsets[r]:offsets[r + 1]] names, each by its weight [R, m].

    On a GPU as a product with a sparse matrix, whose order of summing is not fixed: embedding_bag reads a list entry by
    entry there, and all wait for a hub's (5.6 ms in place of 0.6 on an H200, where the longest of 455 000 lists had
    15 773 of 1.8 million entries).
    """
    if rows.device.type == "cpu":
        return F.embedding_bag(
            index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )  # fmt: skip
    shape = len(offsets) - 1, len(rows)
    with torch.autocast(rows.device.type, enabled=False):
        return torch.sparse_csr_tensor(offsets, index, weights, shape, check_invariants=False) @ rows


def transpose_lists(index: Tensor, weights: Tensor, num_sources: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every source, who pools it and how much: (offsets [U + 1], destinations, weights), without padding.

    A stable counting sort, so on a CPU sums are always taken in the same order. On a GPU padding is the list of one
    source more: to leave it out, the host would have to wait for the device to count it, with nothing queued behind.
    """
    if index.device.type == "cpu":
        first, second, third = map(torch.from_numpy, _transpose(index.numpy(), weights.numpy(), num_sources))
        return first, second, third
    sources, order = torch.sort(torch.where(weights != 0, index, num_sources).flatten(), stable=True)
    starts = torch.arange(num_sources + 2, device=index.device, dtype=index.dtype)
    offsets = torch.searchsorted(sources, starts, out_int32=index.dtype == torch.int32)
    return offsets, (order // max(1, index.shape[1])).to(index.dtype), weights.flatten()[order]


@njit(nogil=True, cache=True)
def _transpose(
    index: NDArray[Any], weights: NDArray[Any], num_sources: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    offsets = np.zeros(num_sources + 1, index.dtype)
    for b in range(index.shape[0]):
        for t in range(index.shape[1]):
            if weights[b, t] != 0:
                offsets[index[b, t] + 1] += 1
    for source in range(num_sources):
        offsets[source + 1] += offsets[source]
    free = offsets[:-1].copy()
    destinations = np.empty(offsets[-1], index.dtype)
    values = np.empty(offsets[-1], weights.dtype)
    for b in range(index.shape[0]):
        for t in range(index.shape[1]):
            if weights[b, t] != 0:
                place = free[index[b, t]]
                destinations[place] = b
                values[place] = weights[b, t]
                free[index[b, t]] = place + 1
    return offsets, destinations, values


def importance_pool_dgl(projected: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """importance_pool on a DGL block, with the same inputs and result. Raises ResourceError where DGL is missing."""
    os.environ.setdefault("DGLBACKEND", "pytorch")
    try:
        import dgl
    except ImportError as error:
        raise ResourceError(
            f"task.model.message_passing is dgl, but DGL cannot be imported here ({error}); "
            "set it to torch, which gives the same result"
        ) from error
    used = weights != 0
    destinations = used.nonzero()[:, 0].to(index.dtype)
    block = dgl.create_block(
        (index[used], destinations), num_src_nodes=len(projected), num_dst_nodes=len(index), device=index.device
    )
    block.srcdata["message"] = projected
    block.edata["weight"] = weights[used].unsqueeze(1)
    block.update_all(dgl.function.u_mul_e("message", "weight", "weighted"), dgl.function.sum("weighted", "pooled"))
    pooled: Tensor = block.dstdata["pooled"]
    return pooled


SUMS = {"torch": importance_pool, "dgl": importance_pool_dgl}


def max_pool(projected: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The largest message of each destination's neighbours, element by element; zeros where there are none.

    Messages are not negative, so padding may read a row of zeros. Source: Hamilton et al. 2017, pooling aggregator.
    """
    if not index.shape[1]:
        return projected.new_zeros(len(index), projected.shape[1])
    nobody = len(projected)
    padded = torch.cat([projected, projected.new_zeros(1, projected.shape[1])])
    return F.embedding_bag(index.masked_fill(weights == 0, nobody), padded, mode="max")


def evened(weights: Tensor) -> Tensor:
    """The same weight for every neighbour of a row: 1 by their number [B, T]; padding stays 0."""
    used = (weights != 0).to(weights.dtype)
    return used / used.sum(1, keepdim=True).clamp(min=1)


def narrowed(index: Tensor, weights: Tensor, fan_out: int) -> tuple[Tensor, Tensor]:
    """The first fan_out entries of every list, the heaviest as lists are sorted, scaled back to sum 1."""
    index, weights = index[:, :fan_out].contiguous(), weights[:, :fan_out]
    return index, weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def normalise(vectors: Tensor) -> Tensor:
    """Scale rows to length 1; rows shorter than SMALLEST_NORM keep their direction and shrink towards zero."""
    return F.normalize(vectors, dim=-1, eps=SMALLEST_NORM)


class Convolution(nn.Module):
    """Algorithm 1 of the paper: n = pool(ReLU(Q h + q)); z = ReLU(W concat(h, n) + w); z / ||z||.

    carries: what comes in is wider than `inputs`, and goes out again behind the layer's own output, for a head that
    reads all layers.
    """

    def __init__(self, inputs: int, settings: config.Model, fan_out: int | None = None, carries: bool = False) -> None:
        super().__init__()
        hidden, outputs = settings.hidden_dimensions, settings.output_dimensions
        self.Q = nn.Linear(inputs, hidden)
        self.W = nn.Linear(inputs + hidden, outputs)
        self.attention = nn.Linear(hidden, 1, bias=False) if settings.pooling == "attention" else None
        self.skip: nn.Module | None = None
        if settings.residual:
            self.skip = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs, bias=False)
        self.inputs, self.fan_out, self.carries, self.pooling = inputs, fan_out, carries, settings.pooling
        self.sum = SUMS[settings.message_passing]

    def project(self, h: Tensor) -> Tensor:
        """[U, inputs] to the messages that neighbours send: [U, hidden], with attention one column more.

        Attention after Velickovic et al. 2018, where a neighbour's score is LeakyReLU(a h_u + b h_v). Which neighbours
        score highest is then the same for all u (Brody et al. 2022), so only the neighbour's part is kept: its factor
        e_v = exp(b p_v) can be sent along with e_v p_v, and the normalised sum stays a quotient of two plain sums,
        which every reducer of inference can make.
        """
        product = self.Q(h[:, : self.inputs])  # under autocast of fewer bits
        messages = F.relu(product, inplace=True).to(h.dtype)
        if self.attention is None:
            return messages
        factor = self.attention(messages).clamp(-MOST_ATTENTION, MOST_ATTENTION).exp()
        return torch.cat([messages * factor, factor], dim=1)

    def lists(self, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of lists [B, T]: the neighbours that this layer reads, and how much each counts in a sum."""
        if self.fan_out is not None:
            index, weights = narrowed(index, weights, self.fan_out)
        return index, evened(weights) if self.pooling == "mean" else weights

    def pool(self, projected: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """What destinations [B] get from the rows of projected named by their lists [B, T]; zeros from empty lists."""
        index, weights = self.lists(index, weights)
        return max_pool(projected, index, weights) if self.pooling == "max" else self.sum(projected, index, weights)

    def combine(self, h: Tensor, pooled: Tensor) -> Tensor:
        """What destinations [B, inputs] are and what they pooled, to [B, outputs] of length 1."""
        own = h[:, : self.inputs]
        if self.attention is not None:
            pooled = pooled[:, :-1] / pooled[:, -1:].clamp(min=torch.finfo(pooled.dtype).tiny)
        z = F.relu(self.W(torch.cat([own, pooled], dim=1)), inplace=True).to(h.dtype)
        if self.skip is not None:
            z = z + self.skip(own).to(h.dtype)
        z = normalise(z)
        return torch.cat([z, h], dim=1) if self.carries else z

    def forward(self, h: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Sources [U, inputs], the first B of them destinations, to [B, outputs]."""
        return self.combine(h[: len(index)], self.pool(self.project(h), index, weights))
