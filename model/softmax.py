"""Sampled softmax without a matrix of all scores: blocks of queries that stay in cache, gradients in the same pass.

A batch of 4 096 pairs with its own positives as negatives has 19 million scores; as plain tensor operations each of a
dozen steps would read and write them all. Here a block of queries is scored, normalised and turned into its part of
the gradients before the next. Memory: two blocks of BLOCK_SCORES, and the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK_SCORES = 1 << 22
"""Scores made at once."""


def blocked_softmax(
    query: Tensor,
    shared: Tensor,
    own: Tensor,
    shift: Tensor,
    temperature: float,
    own_ids: tuple[Tensor, Tensor],
    shared_id: Tensor,
) -> Tensor:
    """Mean of -log of own[:, 0]'s share among exp(own) and exp(query . shared / temperature - shift), query by query.

    query is [b, d], own [b, 1 + H], shared [C, d], shift [C]. Shared ones whose id is one of a query's own_ids, [b]
    each, are left out. Gradients go to query, shared and own.
    """
    loss: Tensor = _Softmax.apply(query, shared, own, shift, temperature, *own_ids, shared_id)
    return loss


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        shared: Tensor,
        own: Tensor,
        shift: Tensor,
        temperature: float,
        first_id: Tensor,
        second_id: Tensor,
        shared_id: Tensor,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad[:3])
        gradients = [torch.zeros_like(tensor) for tensor in (query, shared, own)] if wanted else []
        total, count = own.new_zeros(()), len(query)
        rows = max(1, BLOCK_SCORES // max(1, len(shared)))
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            scores = torch.addmm(-shift, query[part], shared.T, alpha=1 / temperature)
            hits = (first_id[part, None] == shared_id).logical_or_(second_id[part, None] == shared_id)
            scores.masked_fill_(hits, -torch.inf)
            most = torch.maximum(own[part].amax(1, keepdim=True), scores.amax(1, keepdim=True))
            scores.sub_(most).exp_()
            shares = (own[part] - most).exp_()
            sums = scores.sum(1, keepdim=True) + shares.sum(1, keepdim=True)
            total += (sums.log() + most - own[part, :1]).sum()
            if wanted:
                scale = 1 / (count * sums)
                scores.mul_(scale / temperature)
                torch.mm(scores, shared, out=gradients[0][part])
                gradients[1].addmm_(scores.T, query[part])
                torch.mul(shares, scale, out=gradients[2][part])
        if wanted:
            gradients[2][:, 0] -= 1 / count
        ctx.save_for_backward(*gradients)
        return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = gradients
        return (*(gradient * scale for gradient in ctx.saved_tensors), None, None, None, None, None)
