"""The ranking losses, on scores: how like its positive and its negatives a query's embedding is.

Accidental hits, a negative that is the row's own query or positive, score minus infinity: they cost nothing and get
no gradient. Every loss is a mean over rows, so the mean over equal ranks is the loss of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.softmax import blocked_softmax
from pipeline.contracts import config


class Members(NamedTuple):
    """Who is who in one rank's part of a batch, b pairs: as rows of the rank's embeddings, and as ids.

    The shared negatives of all ranks are C candidates, of which each rank embeds its n: `drawn`, and with in_batch its
    positives. A hard negative's id of -1 is nobody. log_q is the logarithm of how often an item is expected among the
    candidates, by how often it would be if all were uniform.
    """

    query: Tensor  # [b] rows
    positive: Tensor  # [b]
    drawn: Tensor  # [n]
    hard: Tensor  # [b, H]
    query_id: Tensor  # [b] ids
    positive_id: Tensor  # [b]
    shared_row: Tensor  # [C] rows of what the ranks gathered: not all, where their shares could not be equal
    shared_id: Tensor  # [C]
    hard_id: Tensor  # [b, H]
    positive_log_q: Tensor  # [b]
    shared_log_q: Tensor  # [C]


class Scores(NamedTuple):
    """Inner products of b queries: positive [b], shared negatives [b, C], own hard negatives [b, H]; and log_q."""

    positive: Tensor
    shared: Tensor
    hard: Tensor
    positive_log_q: Tensor
    shared_log_q: Tensor


class Vectors(NamedTuple):
    """Embeddings of b queries, their positives [b, d], the shared negatives [C, d], and hard ones [b, H, d]."""

    query: Tensor
    positive: Tensor
    shared: Tensor
    hard: Tensor


def choose(embeddings: Tensor, members: Members, gather: Callable[[Tensor], Tensor], in_batch: bool) -> Vectors:
    """The members of a batch, from the embeddings [S, d] of its seeds, of which each item is one.

    gather puts what the ranks embed of the shared negatives one behind the other.
    """
    query = embeddings.index_select(0, members.query)
    positive = embeddings.index_select(0, members.positive)
    mine = embeddings.index_select(0, members.drawn)
    shared = gather(torch.cat([mine, positive]) if in_batch else mine)
    if len(shared) != len(members.shared_row):
        shared = shared.index_select(0, members.shared_row)
    hard = embeddings.index_select(0, members.hard.flatten()).view(*members.hard.shape, embeddings.shape[1])
    return Vectors(query, positive, shared, hard)


def score(vectors: Vectors, members: Members, hardest: int = 0) -> Scores:
    """Scores of a batch; the `hardest` of the shared negatives count again as hard ones of the query."""
    shared = _masked(vectors.query @ vectors.shared.T, members.shared_id, members)
    positive, hard = _own_scores(vectors, members)
    if hardest:
        hard = torch.cat([hard, shared.topk(min(hardest, shared.shape[1]), dim=1).values], dim=1)
    return Scores(positive, shared, hard, members.positive_log_q, members.shared_log_q)


def _own_scores(vectors: Vectors, members: Members) -> tuple[Tensor, Tensor]:
    """Of every query with its positive [b], and with its hard negatives [b, H]."""
    hard = torch.einsum("bd,bhd->bh", vectors.query, vectors.hard)
    return (vectors.query * vectors.positive).sum(1), _masked(hard, members.hard_id, members)


def _masked(values: Tensor, ids: Tensor, members: Members) -> Tensor:
    own = torch.stack([members.query_id, members.positive_id])[:, :, None]
    return values.masked_fill((ids == own).any(0) | (ids < 0), -torch.inf)


def max_margin(scores: Scores, margin: float) -> Tensor:
    """Mean over pairs of max(0, z_q.z_n - z_q.z_i + margin), for the shared and for the hard negatives.

    The paper adds up to 6 hard negatives to 500 uniform ones and does not say how they are weighed. Here each kind has
    its own mean and the means are added: in one mean over all, 6 hard negatives would have 1.2 % of the weight.
    Online Retail, 4 epochs of 60 steps, 4000 validation events: MRR 0.184 so, 0.177 in one mean, 0.178 without any.
    Source: Ying et al. 2018, equation 1.
    """
    floor = scores.positive[:, None] - margin
    return _means(F.relu(scores.shared - floor), F.relu(scores.hard - floor))


def softmax(scores: Scores, temperature: float, corrected: bool = True) -> Tensor:
    """Cross-entropy of the positive among itself and all negatives: hard ones weigh by their score.

    corrected: logits of the positive and the shared negatives lose log_q (Bengio and Senecal 2008; for negatives from
    the batch, Yi et al. 2019). Hard negatives belong to their query and are not a sample of anything.
    """
    positive, shared = scores.positive[:, None] / temperature, scores.shared / temperature
    if corrected:
        positive, shared = positive - scores.positive_log_q[:, None], shared - scores.shared_log_q
    logits = torch.cat([positive, shared, scores.hard / temperature], dim=1)
    return (torch.logsumexp(logits, dim=1) - logits[:, 0]).mean()


def bpr(scores: Scores, temperature: float) -> Tensor:
    """Mean of -log sigmoid(positive - negative), shared and hard ones in means of their own (Rendle et al. 2009)."""
    floor = scores.positive[:, None]
    return _means(*(F.softplus((values - floor) / temperature) for values in (scores.shared, scores.hard)))


def cross_entropy(scores: Scores, temperature: float) -> Tensor:
    """-log sigmoid(positive) - log sigmoid(-negative): every kind of negative weighs as much as the positives.

    Source: Hamilton et al. 2017, equation 1, which leaves that weight open; the paper's mean-pooling-xent.
    """
    negatives = (F.softplus(values / temperature) for values in (scores.shared, scores.hard))
    return F.softplus(-scores.positive / temperature).mean() + _means(*negatives)


def _means(shared: Tensor, hard: Tensor) -> Tensor:
    return shared.mean() + hard.mean() if hard.shape[1] else shared.mean()


def training_loss(vectors: Vectors, members: Members, settings: config.Training, hardest: int = 0) -> Tensor:
    """The loss that the settings name."""
    if settings.loss == "softmax" and not hardest:
        return _softmax_of(vectors, members, settings.temperature, settings.correct_sampling)
    scores = score(vectors, members, hardest)
    if settings.loss == "softmax":
        return softmax(scores, settings.temperature, settings.correct_sampling)
    if settings.loss == "bpr":
        return bpr(scores, settings.temperature)
    if settings.loss == "cross_entropy":
        return cross_entropy(scores, settings.temperature)
    return max_margin(scores, settings.margin)


def _softmax_of(vectors: Vectors, members: Members, temperature: float, corrected: bool) -> Tensor:
    """`softmax` of the vectors' scores, without making them all at once."""
    positive, hard = _own_scores(vectors, members)
    positive, shift = positive / temperature, torch.zeros_like(vectors.shared[:, 0])
    if corrected:
        positive, shift = positive - members.positive_log_q, members.shared_log_q
    own = torch.cat([positive[:, None], hard / temperature], dim=1)
    ids = members.query_id, members.positive_id
    return blocked_softmax(vectors.query, vectors.shared, own, shift, temperature, ids, members.shared_id)
