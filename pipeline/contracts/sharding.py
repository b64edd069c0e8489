"""Which shard, rank or step owns which rows: pure arithmetic on integers and arrays.

Nothing here reads storage, starts a process or looks at a clock, so every rule of ownership is testable alone. Spark
and torchrun only carry out what these functions say.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_IDS = 2**32
"""Ids are uint32: one more item or user than this does not fit, see DESIGN D2."""


def count_shards(num_rows: int, rows_per_shard: int) -> int:
    """How many shards num_rows rows are stored in: at least 1, so that an empty dataset still has a schema."""
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}, expected at least 1")
    return max(1, -(-num_rows // rows_per_shard))


def shard_bounds(num_rows: int, num_shards: int, shard: int) -> tuple[int, int]:
    """First row and one past the last row of a shard; shards differ by at most one row and cover every row once."""
    if not 0 <= shard < num_shards:
        raise ValueError(f"shard {shard} is not one of {num_shards}")
    return shard * num_rows // num_shards, (shard + 1) * num_rows // num_shards


def shard_of(rows: NDArray[np.integer], num_rows: int, num_shards: int) -> NDArray[np.int64]:
    """The shard that owns each row: the inverse of shard_bounds, for any array of rows in [0, num_rows)."""
    return ((np.asarray(rows, dtype=np.int64) + 1) * num_shards - 1) // max(num_rows, 1)


def rank_bounds(global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """The slice of a global batch that one training rank owns; ranks get equal slices or it is an error."""
    if global_batch % world_size:
        raise ValueError(f"a global batch of {global_batch} cannot be shared equally by {world_size} ranks")
    share = global_batch // world_size
    return rank * share, (rank + 1) * share


def stage_seed(seed: int, stage: str) -> int:
    """A seed of the stage's own, so that two stages that draw for the same item do not draw the same numbers."""
    return int(np.random.SeedSequence([seed, *stage.encode()]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def chances(seed: tuple[int, ...], ids: NDArray[np.integer]) -> NDArray[np.float64]:
    """A number in [0, 1) for every id, by the seed and the id alone: whoever asks gets the same."""
    key = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    values = _mix(_mix(np.asarray(ids, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ key)
    found: NDArray[np.float64] = (values >> np.uint64(11)).astype(np.float64) / (1 << 53)
    return found


def shuffled(positions: NDArray[np.integer], size: int, seed: int) -> NDArray[np.int64]:
    """Where a seeded random permutation of [0, size) sends each position, without storing the permutation.

    A four-round Feistel network over the next even power of two, walked until it lands inside: any position of an
    epoch of a billion pairs is found in constant memory, so a loader resumes anywhere. Source: Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002 (cycle walking).
    """
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1")
    half_bits = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = np.random.SeedSequence(seed).generate_state(4, np.uint64)
    result = np.asarray(positions, dtype=np.uint64).copy()
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        value = result[outside]
        left, right = value >> half_bits, value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        result[outside] = (left << half_bits) | right
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), element by element."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def sample_rows(num_rows: int, most: int, seed: int) -> NDArray[np.int64]:
    """At most `most` of the rows [0, num_rows), ascending: all of them, or one at random from each of equal stretches.

    A fixed stride would miss whatever repeats in step with it.
    """
    count = min(num_rows, most)
    starts = np.arange(count + 1, dtype=np.int64) * num_rows // max(count, 1)
    return np.random.default_rng([seed, count]).integers(starts[:-1], starts[1:], dtype=np.int64)
