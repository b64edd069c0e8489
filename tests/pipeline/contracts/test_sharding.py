"""Ownership is arithmetic: every row, rank slice and shuffled position belongs to exactly one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.contracts.sharding import count_shards, rank_bounds, shard_bounds, shard_of, shuffled

rows_and_shards = given(num_rows=st.integers(0, 5000), num_shards=st.integers(1, 200))


@rows_and_shards
@example(num_rows=0, num_shards=7)
@example(num_rows=1, num_shards=7)
def test_every_row_is_in_exactly_one_shard_and_shards_differ_by_at_most_one_row(num_rows: int, num_shards: int) -> None:
    bounds = [shard_bounds(num_rows, num_shards, shard) for shard in range(num_shards)]
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(num_rows))
    sizes = {stop - start for start, stop in bounds}
    assert max(sizes) - min(sizes) <= 1


@rows_and_shards
def test_shard_of_inverts_shard_bounds(num_rows: int, num_shards: int) -> None:
    owners = shard_of(np.arange(num_rows), num_rows, num_shards)
    expected = [
        shard for shard in range(num_shards) for _ in range(*shard_bounds(num_rows, num_shards, shard))
    ]  # fmt: skip
    assert owners.tolist() == expected


@given(num_rows=st.integers(2**31, 2**32), num_shards=st.integers(1, 100_000), data=st.data())
def test_shard_of_inverts_shard_bounds_for_the_largest_ids(num_rows: int, num_shards: int, data: st.DataObject) -> None:
    shard = data.draw(st.integers(0, num_shards - 1))
    start, stop = shard_bounds(num_rows, num_shards, shard)
    edges = np.array([start, stop - 1], dtype=np.uint32)
    assert shard_of(edges, num_rows, num_shards).tolist() == [shard, shard]


@given(num_rows=st.integers(0, 10**12), rows_per_shard=st.integers(1, 10**9))
def test_no_shard_is_larger_than_asked_for_and_an_empty_dataset_has_one(num_rows: int, rows_per_shard: int) -> None:
    num_shards = count_shards(num_rows, rows_per_shard)
    assert num_shards >= 1
    assert num_shards * rows_per_shard >= num_rows
    assert num_shards == 1 or (num_shards - 1) * rows_per_shard < num_rows


@given(share=st.integers(0, 300), world_size=st.integers(1, 64))
def test_the_slices_of_the_ranks_partition_the_batch_equally(share: int, world_size: int) -> None:
    batch = share * world_size
    slices = [rank_bounds(batch, rank, world_size) for rank in range(world_size)]
    assert [row for start, stop in slices for row in range(start, stop)] == list(range(batch))
    assert {stop - start for start, stop in slices} == {share}


def test_a_batch_that_ranks_cannot_share_equally_is_refused() -> None:
    with pytest.raises(ValueError, match="10 cannot be shared equally by 3"):
        rank_bounds(10, 0, 3)


def test_a_shard_outside_the_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="shard 3 is not one of 3"):
        shard_bounds(10, 3, 3)
    with pytest.raises(ValueError, match="rows_per_shard is 0"):
        count_shards(10, 0)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63))
@example(size=1, seed=0)
@example(size=2, seed=0)
def test_shuffled_is_a_permutation_for_any_size_and_seed(size: int, seed: int) -> None:
    assert sorted(shuffled(np.arange(size), size, seed).tolist()) == list(range(size))


@given(size=st.integers(50, 3000), seed=st.integers(0, 2**40), other=st.integers(0, 2**40))
def test_seeds_shuffle_differently_and_a_seed_always_alike(size: int, seed: int, other: int) -> None:
    positions = np.arange(size)
    order = shuffled(positions, size, seed)
    assert (order == shuffled(positions, size, seed)).all()
    assert seed == other or (order != shuffled(positions, size, other)).any()


@given(size=st.integers(10**6, 10**10), seed=st.integers(0, 2**40))
def test_any_stretch_of_a_huge_permutation_is_found_alone_and_stays_inside(size: int, seed: int) -> None:
    stretch = np.arange(size - 100, size)
    together = shuffled(stretch, size, seed)
    assert ((together >= 0) & (together < size)).all()
    assert len(set(together.tolist())) == 100
    assert together[40:60].tolist() == shuffled(stretch[40:60], size, seed).tolist()


def test_shuffling_leaves_no_visible_order() -> None:
    size = 100_000
    order = shuffled(np.arange(size), size, 7)
    correlation = np.corrcoef(np.arange(size), order)[0, 1]
    fixed_points = int((order == np.arange(size)).sum())
    followers = int((np.diff(order) == 1).sum())
    assert abs(correlation) < 0.02  # six standard deviations of an independent order
    assert fixed_points < 12  # Poisson with mean 1, as is the next
    assert followers < 12


def test_shuffling_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="size is 0"):
        shuffled(np.arange(0), 0, 1)
