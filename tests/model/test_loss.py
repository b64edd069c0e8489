"""The losses against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import model.softmax
from model.loss import (
    Members,
    Scores,
    bpr,
    choose,
    cross_entropy,
    max_margin,
    score,
    softmax,
    training_loss,
)
from pipeline.contracts import config

NO_HARD = torch.zeros(2, 0)
ZEROS = torch.zeros(2)
SCORES = Scores(torch.tensor([0.9, 0.2]), torch.tensor([[0.5, 0.85], [0.15, 0.4]]), NO_HARD, ZEROS, ZEROS)
ALL = (
    lambda scores: max_margin(scores, 5.0),
    lambda scores: softmax(scores, 0.1),
    lambda scores: bpr(scores, 0.1),
)


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


def test_what_is_drawn_twice_as_often_weighs_half_in_a_corrected_softmax() -> None:
    twice = SCORES._replace(shared_log_q=torch.tensor([math.log(2), 0.0]))
    rows = [math.log(1 + math.exp(-0.8) / 2 + math.exp(-0.1)), math.log(1 + math.exp(-0.1) / 2 + math.exp(0.4))]
    assert softmax(twice, 0.5).item() == pytest.approx(sum(rows) / 2)
    assert softmax(twice, 0.5, corrected=False).item() == pytest.approx(softmax(SCORES, 0.5).item())
    popular = SCORES._replace(positive_log_q=torch.tensor([math.log(2), math.log(2)]))
    rows = [math.log(1 + 2 * math.exp(-0.8) + 2 * math.exp(-0.1)), math.log(1 + 2 * math.exp(-0.1) + 2 * math.exp(0.4))]
    assert softmax(popular, 0.5).item() == pytest.approx(sum(rows) / 2)


def test_a_corrected_sample_estimates_the_softmax_over_everything() -> None:
    """Negatives drawn by popularity, corrected, pull the gradient where the full softmax pulls it; uncorrected not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=generator)
    chances = torch.softmax(torch.randn(50, generator=generator), 0)
    full = torch.logsumexp(logits, 0).item()
    found = {True: 0.0, False: 0.0}
    for _ in range(200):
        drawn = torch.multinomial(chances, 2000, replacement=True, generator=generator)
        log_q = torch.log(chances[drawn] * 50)
        for corrected in found:
            values = logits[drawn] - (log_q if corrected else 0)
            found[corrected] += (torch.logsumexp(values, 0) - math.log(2000 / 50)).item() / 200
    assert found[True] == pytest.approx(full, abs=0.05)
    assert abs(found[False] - full) > 0.1


def test_bpr_worked_by_hand() -> None:
    values = [math.log(1 + math.exp(x)) for x in (-0.8, -0.1, -0.1, 0.4)]
    assert bpr(SCORES, 0.5).item() == pytest.approx(sum(values) / 4)
    hard = SCORES._replace(hard=torch.tensor([[0.9], [0.2]]))
    assert bpr(hard, 0.5).item() == pytest.approx(sum(values) / 4 + math.log(2))


def test_cross_entropy_worked_by_hand() -> None:
    positives = sum(math.log(1 + math.exp(-2 * x)) for x in (0.9, 0.2)) / 2
    negatives = sum(math.log(1 + math.exp(2 * x)) for x in (0.5, 0.85, 0.15, 0.4)) / 4
    assert cross_entropy(SCORES, 0.5).item() == pytest.approx(positives + negatives)


def embeddings() -> Tensor:
    return torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]], requires_grad=True)


def members(
    query: list[int], positive: list[int], drawn: list[int], hard: list[list[int]], in_batch: bool = False
) -> Members:
    """Members of embeddings whose ids are ten times their rows; -1 is nobody."""
    rows = [torch.tensor(row, dtype=torch.int32) for row in (query, positive, [max(d, 0) for d in drawn])]
    hard_rows = torch.tensor(hard, dtype=torch.int32).reshape(len(query), -1)
    shared = torch.tensor(drawn + (positive if in_batch else []))
    candidates = torch.arange(len(shared))

    def ids(numbers: Tensor) -> Tensor:
        return torch.where(numbers < 0, -1, 10 * numbers.long())

    log_q = torch.zeros(len(query)), torch.zeros(len(shared))
    own = ids(rows[0]), ids(rows[1])
    return Members(
        rows[0], rows[1], rows[2], hard_rows.clamp(min=0), *own, candidates, ids(shared), ids(hard_rows), *log_q
    )


def same(rows: Tensor) -> Tensor:
    """What one rank alone gathers."""
    return rows


def scores_of(vectors: Tensor, chosen: Members, in_batch: bool = False, hardest: int = 0) -> Scores:
    """Scores of a batch of one rank alone."""
    return score(choose(vectors, chosen, same, in_batch), chosen, hardest)


def test_scores_are_inner_products() -> None:
    scores = scores_of(embeddings(), members([0, 3], [1, 2], [3, 0], [[2], [1]]))
    torch.testing.assert_close(scores.positive, torch.tensor([0.8, 0.8]))
    torch.testing.assert_close(scores.shared, torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]))
    torch.testing.assert_close(scores.hard, torch.tensor([[0.6], [0.6]]))


def test_the_batchs_other_positives_are_negatives_and_its_own_is_not() -> None:
    scores = scores_of(embeddings(), members([0, 3], [1, 2], [3], [[], []], in_batch=True), in_batch=True)
    expected = torch.tensor([[0.0, -torch.inf, 0.6], [-torch.inf, 0.6, -torch.inf]])
    torch.testing.assert_close(scores.shared, expected)


def test_the_hardest_shared_negatives_count_again() -> None:
    scores = scores_of(embeddings(), members([0], [3], [1, 2, 0, 3], [[2]]), hardest=1)
    torch.testing.assert_close(scores.hard, torch.tensor([[0.6, 0.8]]))
    assert scores_of(embeddings(), members([0], [3], [1], [[]]), hardest=5).hard.shape == (1, 1)


@pytest.mark.parametrize("loss", ALL)
def test_accidental_hits_and_missing_negatives_cost_nothing(loss: object) -> None:
    vectors = embeddings()
    scores = scores_of(vectors, members([0], [1], [0, 1, 1], [[1, -1]]), hardest=2)
    found = loss(scores)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(found, vectors)
    assert found.item() == 0
    assert not gradient.any()


def test_what_ranks_embed_only_to_have_equal_shares_is_no_candidate() -> None:
    chosen = members([0], [1], [2], [[]])._replace(shared_row=torch.tensor([1]))
    gathered = torch.tensor([[9.0, 9.0], [0.6, 0.8]])
    vectors = choose(embeddings(), chosen, lambda rows: gathered, in_batch=False)
    torch.testing.assert_close(score(vectors, chosen).shared, torch.tensor([[0.6]]))


def test_no_hard_negatives_at_all_is_fine() -> None:
    scores = scores_of(embeddings(), members([0], [1], [2], [[]]))
    assert max_margin(scores, 0.1).item() == 0
    assert scores.hard.shape == (1, 0)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("num_hard", [0, 3])
@pytest.mark.parametrize("block", [1, 60, 1 << 20])
def test_softmax_in_blocks_equals_softmax_of_all_scores(
    monkeypatch: pytest.MonkeyPatch, corrected: bool, num_hard: int, block: int
) -> None:
    """Forward and gradients, with accidental hits, nobodies among the hard ones, and an uneven last block."""
    monkeypatch.setattr(model.softmax, "BLOCK_SCORES", block)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 12, (count,), generator=generator).tolist() for count in (7, 7, 20)]
    hard = torch.randint(-1, 12, (7, num_hard), generator=generator).tolist()
    chosen = members(rows[0], rows[1], rows[2], hard, in_batch=True)
    log_q = [torch.randn(count, generator=generator, dtype=torch.float64) for count in (7, 27)]
    chosen = chosen._replace(positive_log_q=log_q[0], shared_log_q=log_q[1])
    embedded = torch.randn(12, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    settings = config.Training(loss="softmax", temperature=0.3, correct_sampling=corrected)
    vectors = choose(embedded, chosen, same, in_batch=True)
    found, expected = training_loss(vectors, chosen, settings), softmax(score(vectors, chosen), 0.3, corrected)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(2 * loss, embedded, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(training_loss(vectors, chosen, settings), expected)
