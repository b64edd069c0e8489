"""The loader: every pair once per epoch, the same global batches for any number of ranks, any position at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.loader import Loader, Position, curriculum_row
from model.transfer import Batch, commonest
from pipeline.contracts import schemas
from pipeline.contracts.config import CurriculumRow
from pipeline.contracts.datasets import Lineage, commit, open_manifest
from pipeline.contracts.errors import DataError
from tests.model.conftest import Run, plant

MakeRun = Callable[..., Run]


def test_every_pair_comes_once_per_epoch_in_another_order(make_run: MakeRun) -> None:
    planted = plant()
    run = make_run(training={"batch_size": 100})
    loader = Loader(run.storage, run.settings)
    epochs = []
    for epoch in (1, 2):
        steps = [loader.examples(epoch, step) for step in range(loader.steps_per_epoch)]
        epochs.append([pair for step in steps for pair in zip(step.query, step.positive, strict=True)])
        assert sorted(epochs[-1]) == sorted(zip(planted["query"], planted["positive"], strict=True))
    assert epochs[0] != epochs[1]


def test_the_tail_that_fills_no_batch_is_left_out(make_run: MakeRun) -> None:
    run = make_run(training={"batch_size": 300})
    assert Loader(run.storage, run.settings).steps_per_epoch == 3


@pytest.mark.parametrize(("length", "num_pairs"), [(8, 1000), (7, 1000), (64, 960)])
def test_pairs_that_are_stored_together_stay_together_if_asked_for(
    make_run: MakeRun, length: int, num_pairs: int
) -> None:
    numbers = np.arange(num_pairs)
    run = make_run(
        training={"batch_size": 320, "consecutive_pairs": length}, query=numbers // 240, positive=numbers % 240
    )
    loader = Loader(run.storage, run.settings)
    epochs = []
    for epoch in range(1, 6):
        steps = [loader.examples(epoch, step) for step in range(loader.steps_per_epoch)]
        epochs.append(np.concatenate([step.query.astype(np.int64) * 240 + step.positive for step in steps]))
        breaks = np.flatnonzero(np.diff(epochs[-1]) != 1)
        num_runs = -(-len(epochs[-1]) // length)
        assert 0.8 * num_runs <= len(breaks) + 1 <= num_runs + 1, "one is cut, some meet by chance"
        assert len(np.unique(epochs[-1])) > len(epochs[-1]) - length
    assert len({int(epoch[0]) % length for epoch in epochs}) > 1, "runs begin elsewhere in every epoch"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_slices_make_the_global_batch(make_run: MakeRun, world_size: int) -> None:
    run = make_run()
    alone = Loader(run.storage, run.settings).examples(2, 3)
    ranks = [Loader(run.storage, run.settings, rank, world_size).examples(2, 3) for rank in range(world_size)]
    for name in ("query", "positive", "hard"):
        joined = np.concatenate([getattr(rank, name) for rank in ranks])
        np.testing.assert_array_equal(joined, getattr(alone, name))
        assert len({len(getattr(rank, name)) for rank in ranks}) == 1
    for rank in ranks:
        for name in ("all_query", "all_positive"):
            np.testing.assert_array_equal(getattr(rank, name), getattr(alone, name))
        np.testing.assert_array_equal(rank.shared, np.concatenate([each.drawn for each in ranks]))
        np.testing.assert_array_equal(rank.shared[rank.shared >= 0], alone.shared)


def test_a_batch_has_equal_shares_and_no_more_pairs_than_there_are(make_run: MakeRun) -> None:
    run = make_run(training={"batch_size": 5000})
    assert [Loader(run.storage, run.settings, 0, n).global_batch for n in (1, 2, 3)] == [1000, 1000, 999]


def test_hard_negatives_are_drawn_from_the_querys_own_list(make_run: MakeRun) -> None:
    hard = [[item] if item % 3 else [] for item in range(240)]
    run = make_run(hard=hard)
    examples = Loader(run.storage, run.settings).examples(2, 0)
    expected = np.where(examples.query % 3, examples.query.astype(np.int64), -1)
    np.testing.assert_array_equal(examples.hard, np.stack([expected, expected], axis=1))
    assert Loader(run.storage, run.settings).examples(1, 0).hard.shape == (96, 0)


def test_catalogue_without_any_hard_negatives_or_neighbours(make_run: MakeRun) -> None:
    empty: list[list[int]] = [[]] * 240
    run = make_run(hard=empty, neighbours=empty, weights=empty)
    batch = Loader(run.storage, run.settings).batch(2, 0)
    assert (batch.members.hard_id == -1).all()
    assert batch.index.shape == (batch.sizes[1], 0)
    assert batch.sizes[0] == batch.sizes[2]


def test_members_of_a_batch_are_the_examples_items_and_features(make_run: MakeRun) -> None:
    run = make_run()
    loader = Loader(run.storage, run.settings)
    examples, batch = loader.examples(2, 1), loader.batch(2, 1)
    features = plant()["features"]
    members = batch.members
    for places, ids, told in (
        (members.query, examples.query, members.query_id),
        (members.positive, examples.positive, members.positive_id),
        (members.drawn, examples.drawn, members.shared_id),
        (members.hard, examples.hard, members.hard_id),
    ):
        np.testing.assert_array_equal(batch.features[places.long()], features[ids])
        np.testing.assert_array_equal(told, ids)
        assert places.max() < batch.sizes[-1]


@pytest.mark.parametrize("world_size", [1, 3])
def test_negatives_from_the_batch_are_all_ranks_positives(make_run: MakeRun, world_size: int) -> None:
    run = make_run(training={"curriculum": [{"from_epoch": 1, "uniform": 40, "in_batch": True}]})
    alone = Loader(run.storage, run.settings).examples(1, 0)
    found = Loader(run.storage, run.settings, world_size - 1, world_size).examples(1, 0)
    assert sorted(found.shared[found.shared >= 0]) == sorted(np.concatenate([alone.drawn, alone.positive]))
    assert len(found.shared) % world_size == 0


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_popular_negatives_are_drawn_by_a_power_of_how_often_items_are_positives(
    make_run: MakeRun, exponent: float
) -> None:
    positive = np.repeat([3, 8, 200], [16, 4, 1])
    rows = [{"from_epoch": 1, "uniform": 0, "popular": 30_000}]
    training = {"curriculum": rows, "popularity_exponent": exponent}
    run = make_run(training=training, query=np.zeros(21, int), positive=positive)
    loader = Loader(run.storage, run.settings)
    drawn = loader.examples(1, 0).drawn
    weights = np.array([16, 4, 1]) ** exponent
    shares = [float((drawn == item).mean()) for item in (3, 8, 200)]
    assert shares == pytest.approx((weights / weights.sum()).tolist(), abs=0.01)
    # log_q says how often each was to be expected, by how often it would be if all were uniform
    expected = np.log(weights / weights.sum() * 240)
    np.testing.assert_allclose(loader.log_q(loader.row(1), np.array([3, 8, 200])), expected, rtol=1e-5)


def test_log_q_counts_uniform_draws_and_the_batchs_positives(make_run: MakeRun) -> None:
    positive = np.repeat([3, 8], [75, 25])
    run = make_run(
        training={"curriculum": [{"from_epoch": 1, "uniform": 24, "in_batch": True}], "batch_size": 100},
        query=np.zeros(100, int), positive=positive,
    )  # fmt: skip
    loader = Loader(run.storage, run.settings)
    expected = np.array([24 / 240 + 75, 24 / 240 + 25, 24 / 240]) * 240 / 124
    np.testing.assert_allclose(loader.log_q(loader.row(1), np.array([3, 8, 9])), np.log(expected), rtol=1e-5)
    uniform = make_run(name="uniform")
    loader = Loader(uniform.storage, uniform.settings)
    assert not loader.log_q(loader.row(1), np.array([3, 8])).any()


COLUMNS = [
    {"name": "content", "kind": "vector", "start": 0, "stop": 15},
    {"name": "degree", "kind": "degree", "start": 15, "stop": 16},
]


def test_items_shown_as_new_have_no_neighbours_and_no_degree_for_any_rank(make_run: MakeRun) -> None:
    run = make_run(training={"neighbour_dropout": 0.3}, columns=COLUMNS)
    loaders = [Loader(run.storage, run.settings, rank, 2) for rank in range(2)]
    shown: dict[int, bool] = {}
    for loader in loaders:
        batch, features = loader.batch(1, 0), plant()["features"]
        ids = torch.cat([batch.members.query_id, batch.members.positive_id])
        rows = torch.cat([batch.members.query, batch.members.positive]).long()
        is_new = batch.features[rows, 15] == 0
        assert (batch.weights[rows].sum(1) == 0).equal(is_new)
        assert batch.ids[rows].equal(torch.where(is_new, -1, ids))
        np.testing.assert_array_equal(batch.features[rows, :15], features[ids, :15])
        for item, new in zip(ids.tolist(), is_new.tolist(), strict=True):
            assert shown.setdefault(item, new) == new
    assert 0.15 < np.mean(list(shown.values())) < 0.45
    assert not (loaders[0].batch(1, 1).features[:, 15] == 0).equal(loaders[0].batch(1, 0).features[:, 15] == 0)


def test_hidden_content_is_the_mean_and_the_neighbours_stay(make_run: MakeRun) -> None:
    run = make_run(training={"content_dropout": 0.3}, columns=COLUMNS)
    loader, features = Loader(run.storage, run.settings), plant()["features"]
    batch = loader.batch(1, 0)
    silent = (batch.features[: batch.sizes[-1], :15] == torch.from_numpy(features[:, :15].mean(0))).all(1)
    assert 0.15 < silent.float().mean() < 0.45
    assert (batch.weights[: batch.sizes[-1]].sum(1) > 0.9).all()
    assert (batch.features[: batch.sizes[-1], 15] != 0).all()


def test_mined_negatives_are_drawn_from_what_was_mined(make_run: MakeRun) -> None:
    run = make_run(training={"curriculum": [{"from_epoch": 1, "uniform": 40, "hard": 1, "mined": 2}]})
    loader = Loader(run.storage, run.settings)
    with pytest.raises(ValueError, match="before any were mined"):
        loader.examples(1, 0)
    loader.mined = np.stack([np.arange(240) + 1000, np.arange(240) + 2000], axis=1).astype(np.int32)
    examples = loader.examples(1, 0)
    assert examples.hard.shape == (96, 3)
    assert ((examples.hard[:, 1:] - examples.query[:, None].astype(np.int64)) % 1000 == 0).all()
    assert set(np.unique(examples.hard[:, 1:] // 1000)) == {1, 2}


def test_a_pair_of_another_rank_is_hidden_too(make_run: MakeRun) -> None:
    """Items 0 and 1 know only each other; wherever their pair falls in the global batch, no rank sees the edge."""
    run = make_run(neighbours=[[1], [0], [0]] + [[2]] * 237, weights=[[1.0]] * 240, query=[0] * 96, positive=[1] * 96)
    loader = Loader(run.storage, run.settings, rank=1, world_size=2)
    examples = loader.examples(1, 0)
    blocks = loader.blocks(np.arange(3, dtype=np.uint32), examples.all_query, examples.all_positive)
    assert blocks.weights[:3].tolist() == [[0.0], [0.0], [1.0]]


def test_batches_ahead_equal_batches_asked_for_and_start_anywhere(make_run: MakeRun) -> None:
    run = make_run(training={"epochs": 2, "batch_size": 200})
    loader = Loader(run.storage, run.settings)
    found = list(loader.batches(Position(1, 3), Position(3, 0)))
    assert [position for position, _ in found] == [(1, 3), (1, 4), *((2, step) for step in range(5))]
    for position, batch in found:
        assert equal(batch, loader.batch(*position))
    assert list(loader.batches(Position(3, 0), Position(3, 0))) == []


def test_an_error_while_preparing_reaches_the_trainer(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    loader = Loader(run.storage, run.settings)

    def fail(*position: int) -> Batch:
        raise DataError(f"no batch at {position}")

    monkeypatch.setattr(loader, "batch", fail)
    with pytest.raises(DataError, match=r"no batch at \(1, 0\)"):
        list(loader.batches(Position(1, 0), Position(2, 0)))


def test_the_last_curriculum_row_that_has_begun_counts() -> None:
    rows = tuple(CurriculumRow(from_epoch=epoch, hard=epoch) for epoch in (1, 3, 4))
    assert [curriculum_row(rows, epoch).hard for epoch in range(1, 7)] == [1, 1, 3, 4, 4, 4]


@pytest.mark.parametrize(("workers", "prefetch"), [(3, 4), (2, 1)])
def test_several_threads_prepare_the_same_batches_in_order(make_run: MakeRun, workers: int, prefetch: int) -> None:
    run = make_run(resources={"workers": workers, "prefetch": prefetch})
    loader = Loader(run.storage, run.settings)
    found = list(loader.batches(Position(1, 0), Position(2, 0)))
    assert [position for position, _ in found] == [(1, step) for step in range(10)]
    assert all(equal(batch, loader.batch(*position)) for position, batch in found)


@pytest.mark.parametrize("num_kept", [0.5, 60, 1000])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_features_kept_on_the_device_make_the_same_batches(make_run: MakeRun, num_kept: float, dropout: float) -> None:
    training = {"neighbour_dropout": dropout, "content_dropout": dropout}
    kept_bytes = int(num_kept * plant()["features"][0].nbytes)
    run = make_run(training=training, resources={"device_features": kept_bytes}, columns=COLUMNS)
    loader = Loader(run.storage, run.settings)
    plain = make_run(training=training, columns=COLUMNS)
    assert len(loader.carrier.kept or ()) == min(int(num_kept), 240)
    sent = [len(loader.batch(1, step).features) for step in range(10)]
    batches = [batch for _, batch in loader.batches(Position(1, 0), Position(2, 0))]
    others = Loader(plain.storage, plain.settings).batches(Position(1, 0), Position(2, 0))
    assert all(equal(batch, other) for batch, (_, other) in zip(batches, others, strict=True))
    assert all(count < batch.sizes[0] for count, batch in zip(sent, batches, strict=True)) == (num_kept >= 1)


@pytest.mark.parametrize(("num_layers", "fan_outs"), [(2, [2, 5]), (2, [5, 5]), (3, [1, 2, 4]), (1, None)])
def test_lists_sent_hop_after_hop_fill_up_to_the_same_batch(
    make_run: MakeRun, num_layers: int, fan_outs: list[int] | None
) -> None:
    """As a GPU gets them."""
    run = make_run(model={"num_layers": num_layers, "fan_outs": fan_outs})
    loader = Loader(run.storage, run.settings)
    batch, seeds = loader.batch(1, 0), np.array([5, 3, 8], np.uint32)
    blocks = loader.blocks(seeds, seeds[:1], seeds[1:2])
    index, weights = (
        torch.from_numpy(np.concatenate([getattr(hop, name).reshape(-1) for hop in blocks.hops]))
        for name in ("index", "weights")
    )
    widths = tuple(hop.index.shape[1] for hop in blocks.hops)
    sent = replace(batch, sizes=blocks.sizes, index=index, weights=weights, widths=widths)
    assert len(widths) == num_layers
    assert sent.filled_up().widths == ()
    assert torch.equal(sent.filled_up().index, torch.from_numpy(blocks.index))
    assert torch.equal(sent.filled_up().weights, torch.from_numpy(blocks.weights))


def test_the_commonest_neighbours_are_counted() -> None:
    neighbours = np.repeat(np.array([4, 0, 2, 7], np.uint32), [5, 3, 9, 1])
    assert commonest(neighbours, 8, 2).tolist() == [2, 4]
    assert commonest(neighbours, 8, 100).tolist() == [0, 2, 4, 7], "no more than there are"
    assert commonest(neighbours[:0], 8, 3).tolist() == []


@pytest.mark.parametrize(
    ("datasets", "world_size", "message"),
    [
        ({"query": [], "positive": []}, 1, "0 training pairs for 1 ranks, expected at least one each"),
        ({"query": [1], "positive": [2]}, 2, "1 training pairs for 2 ranks"),
        ({"hard": [[1]] * 7}, 1, "datasets of different catalogues.*'hard_negatives': 7"),
    ],
)
def test_what_cannot_be_trained_on_is_named(
    make_run: MakeRun, datasets: dict[str, Any], world_size: int, message: str
) -> None:
    run = make_run(**datasets)
    with pytest.raises(DataError, match=message):
        Loader(run.storage, run.settings, 0, world_size)


def test_features_without_statistics_are_named(make_run: MakeRun) -> None:
    run = make_run()
    features = open_manifest(run.storage, schemas.FEATURES)
    commit(run.storage, schemas.FEATURES, features.shards, Lineage("test", {}, {}), {"mean": [0.0] * 16})
    with pytest.raises(DataError, match=r"lacks the std of the 16 features.*pinsage features --force"):
        Loader(run.storage, run.settings).statistics()


def equal(first: Batch, second: Batch) -> bool:
    """Whether two batches hold the same numbers."""
    pairs = [(getattr(first, name), getattr(second, name)) for name in ("features", "ids", "index", "weights")]
    return first.sizes == second.sizes and all(
        torch.equal(one, other) for one, other in [*pairs, *zip(first.members, second.members, strict=True)]
    )
