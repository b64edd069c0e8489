"""The whole catalogue: as mini-batches embed it, ranked and searched as slow code does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from model import catalogue
from model.catalogue import Examiner, embed_all, embed_some, nearest, target_ranks
from model.distributed import Group
from model.loader import Loader
from model.trainer import Trainer
from tests.model.conftest import Run

MakeRun = Callable[..., Run]


@pytest.mark.parametrize("num_layers", [0, 2])
def test_all_at_once_equals_some_by_mini_batches(
    make_run: MakeRun, num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "CHUNK", 50)
    monkeypatch.setattr(catalogue, "SEEDS", 17)
    run = make_run(model={"num_layers": num_layers, "pooling": "attention"})
    loader = Loader(run.storage, run.settings)
    model = Trainer(run.settings, loader, Group()).model
    everything = embed_all(model, loader, Group())
    assert everything.shape == (240, 16)
    some = np.array([5, 200, 5, 0, 239] * 10, np.uint32)
    torch.testing.assert_close(embed_some(model, loader, Group(), some), everything[some.astype(np.int64)])


def test_ranks_are_those_of_a_sort() -> None:
    generator = np.random.default_rng(0)
    queries, items = (torch.tensor(generator.integers(-2, 3, (n, 3)).astype(np.float32)) for n in (600, 40))
    targets = generator.integers(0, 40, 600)
    seen = [np.setdiff1d(generator.integers(0, 40, generator.integers(0, 9)), [target]) for target in targets]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in seen])])
    found = target_ranks(queries, items, targets, indptr, np.concatenate(seen))
    for k, (target, row) in enumerate(zip(targets, seen, strict=True)):
        scores = (items @ queries[k]).numpy()
        others = np.setdiff1d(np.arange(40), [*row, target])
        above, equal = (scores[others] > scores[target]).sum(), (scores[others] == scores[target]).sum()
        assert found[k] == 1 + above + equal / 2


def test_items_seen_that_are_no_candidates_are_passed_over() -> None:
    items = torch.eye(3)
    ranks = target_ranks(torch.tensor([[1.0, 2.0, 3.0]]), items, np.array([0]), np.array([0, 2]), np.array([-1, 2]))
    assert ranks.tolist() == [2.0]


def test_a_large_catalogue_is_sampled_and_says_so(make_run: MakeRun) -> None:
    run = make_run()
    loader = Loader(run.storage, run.settings)
    model = Trainer(run.settings, loader, Group()).model
    whole = Examiner(loader, full_catalogue=240, sample=30, seed=1).ask(model, Group())
    sampled = Examiner(loader, full_catalogue=239, sample=30, seed=1)
    found = sampled.ask(model, Group())
    assert whole["full_catalogue"]
    assert not found["full_catalogue"]
    assert whole["candidates"] == 240
    assert sampled.candidates is not None
    assert found["candidates"] == len(sampled.candidates) < 240
    assert set(sampled.target.tolist()) <= set(sampled.candidates.tolist())
    assert found["mrr"] > whole["mrr"]
    everything = Examiner(loader, full_catalogue=239, sample=5000, seed=1).ask(model, Group())
    assert everything["candidates"] == 240
    assert everything["mrr"] == pytest.approx(whole["mrr"], abs=1e-6)


@pytest.mark.parametrize("flat", [True, False])
def test_nearest_items_are_those_of_a_sort(flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "FLAT_ITEMS", 10_000 if flat else 10)
    vectors = torch.nn.functional.normalize(torch.randn(900, 8, generator=torch.Generator().manual_seed(0)))
    found = nearest(vectors, 2, 20, Group())
    scores = (vectors @ vectors.T).fill_diagonal_(-torch.inf)
    expected = scores.argsort(dim=1, descending=True)[:, 1:20].numpy()
    assert found.shape == (900, 19)
    assert (found != np.arange(900)[:, None]).all()
    overlap = np.mean([len(np.intersect1d(a, b)) / 19 for a, b in zip(found, expected, strict=True)])
    assert overlap == 1 if flat else overlap > 0.5


def test_ranks_beyond_the_catalogue_are_nobody() -> None:
    found = nearest(torch.eye(4), 1, 6, Group())
    assert (np.sort(found[:, :3], axis=1) == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]).all()
    assert (found[:, 3:] == -1).all()
