"""The losses against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.loss import Scores, max_margin, score, softmax

NO_HARD = torch.zeros(2, 0)
SCORES = Scores(torch.tensor([0.9, 0.2]), torch.tensor([[0.5, 0.85], [0.15, 0.4]]), NO_HARD)


def test_max_margin_worked_by_hand() -> None:
    # max(0, negative - positive + 0.1): row 0 has 0 and 0.05, row 1 has 0.05 and 0.3
    assert max_margin(SCORES, 0.1).item() == pytest.approx((0 + 0.05 + 0.05 + 0.3) / 4)


def test_hard_negatives_have_a_mean_of_their_own() -> None:
    hard = SCORES._replace(hard=torch.tensor([[1.0], [0.0]]))
    # row 0: 1 - 0.9 + 0.1 = 0.2; row 1: 0 - 0.2 + 0.1 < 0
    assert max_margin(hard, 0.1).item() == pytest.approx(0.1 + 0.2 / 2)
    drowned = hard._replace(shared=torch.zeros(2, 500))
    assert max_margin(drowned, 0.1).item() == pytest.approx(0.1)


def test_softmax_worked_by_hand() -> None:
    rows = [math.log(1 + math.exp(-0.8) + math.exp(-0.1)), math.log(1 + math.exp(-0.1) + math.exp(0.4))]
    assert softmax(SCORES, temperature=0.5).item() == pytest.approx(sum(rows) / 2)


def embeddings() -> Tensor:
    return torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]], requires_grad=True)


def test_scores_are_inner_products() -> None:
    scores = score(embeddings(), *numbers([0, 3], [1, 2], [3, 0]), torch.tensor([[2], [1]], dtype=torch.int32))
    torch.testing.assert_close(scores.positive, torch.tensor([0.8, 0.8]))
    torch.testing.assert_close(scores.shared, torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]))
    torch.testing.assert_close(scores.hard, torch.tensor([[0.6], [0.6]]))


def test_accidental_hits_and_missing_hard_negatives_cost_nothing() -> None:
    vectors = embeddings()
    scores = score(vectors, *numbers([0], [1], [0, 1, 1]), torch.tensor([[1, -1]], dtype=torch.int32))
    for loss in (max_margin(scores, 5.0), softmax(scores, 0.1)):
        (gradient,) = torch.autograd.grad(loss, vectors, retain_graph=True)
        assert loss.item() == 0
        assert not gradient.any()


def test_no_hard_negatives_at_all_is_fine() -> None:
    scores = score(embeddings(), *numbers([0], [1], [2]), torch.zeros(1, 0, dtype=torch.int32))
    assert max_margin(scores, 0.1).item() == 0
    assert scores.hard.shape == (1, 0)


def numbers(query: list[int], positive: list[int], negatives: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Lists as positions of embeddings."""
    first, second, third = (torch.tensor(row, dtype=torch.int32) for row in (query, positive, negatives))
    return first, second, third
