"""Training pairs, and every item's hard negatives.

Reads INTERACTIONS, ITEMS and the graph; writes PAIRS (items that one user touched one after the other in the training
period) and HARD_NEGATIVES (items drawn from a range of PPR ranks: near, but not nearest). One shard per task; nothing
is shuffled, as interactions are stored in the users' order.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark.sql import SparkSession

from pipeline.contracts import schemas
from pipeline.contracts.config import Pairs, Settings
from pipeline.contracts.datasets import Lineage, begin, commit, lists_to_arrow, open_manifest, read_shard
from pipeline.contracts.errors import DataError
from pipeline.contracts.sharding import count_shards, shard_bounds, stage_seed
from pipeline.contracts.storage import Storage
from pipeline.spark import make_shards
from pipeline.walk_kernel import BipartiteGraph, visit_counts, walks_per_hop

_BLOCK = 1024
"""Items walked at once when ranking for hard negatives: bounds memory to this many rows of ranks."""


def run(spark: SparkSession, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Write the pairs, then the hard negatives."""
    for dataset in schemas.PAIRS_STAGE.writes:
        begin(storage, dataset)
    pairs_settings = settings.task.pairs
    interactions = open_manifest(storage, schemas.INTERACTIONS)

    def pair(shard: int) -> pa.Table:
        rows = read_shard(storage, interactions, shard)
        return consecutive_pairs(rows, pairs_settings.window, pairs_settings.max_gap_seconds)

    num_shards = len(interactions.shards)
    shards = make_shards(spark, storage, schemas.PAIRS, lineage, num_shards, pair, "pairs: training pairs")
    num_pairs = sum(shard.rows for shard in shards)
    if not num_pairs:
        raise DataError(
            "there is no training pair: no user has two different items within task.pairs.max_gap_seconds in the "
            "training period; give interactions with longer histories, or another column as user"
        )
    commit(storage, schemas.PAIRS, shards, lineage, {"pairs": num_pairs})
    _store_hard_negatives(spark, storage, settings, lineage)


def consecutive_pairs(interactions: pa.Table, window: int, max_gap_seconds: int) -> pa.Table:
    """Every training event with each of the user's next `window` ones, unless it is the same item or too late.

    interactions must hold whole users in their order of events. max_gap_seconds 0 means no limit.
    """
    training = interactions.filter(pc.equal(interactions.column("split"), schemas.TRAIN_SPLIT))
    users, items, times = (training.column(name).to_numpy() for name in ("user_id", "item_id", "timestamp"))
    queries, positives, moments = [], [], []
    for distance in range(1, window + 1):
        first, second = slice(None, -distance), slice(distance, None)
        kept = (users[first] == users[second]) & (items[first] != items[second])
        if max_gap_seconds:
            kept &= times[second] - times[first] <= max_gap_seconds
        queries.append(items[first][kept])
        positives.append(items[second][kept])
        moments.append(times[second][kept])
    columns = [np.concatenate(part) for part in (queries, positives, moments)]
    return pa.table(columns, names=schemas.PAIRS.arrow.names).cast(schemas.PAIRS.arrow)


def rank_range(pairs: Pairs, num_neighbours: int, num_items: int) -> tuple[int, int]:
    """First rank and one past the last to draw hard negatives from; ranks count from 0."""
    if pairs.hard_negative_ranks is not None:
        return pairs.hard_negative_ranks[0] - 1, pairs.hard_negative_ranks[1]
    last = min(5000, max(num_items // 10, 2 * num_neighbours))
    return min(num_neighbours, last // 2), last


def hard_negatives(
    graph: BipartiteGraph, start: int, stop: int, ranks: tuple[int, int], per_hop: NDArray[np.int64], count: int,
    seed: int, weighted: bool,
) -> pa.Table:  # fmt: skip
    """HARD_NEGATIVES rows of items [start, stop): up to count items drawn without replacement from the PPR ranks.

    An item that its walks do not reach that deep has those that exist; the draws depend on seed and item alone.
    """
    rows: list[NDArray[np.uint32]] = []
    low, high = ranks
    for block in range(start, stop, _BLOCK):
        items = np.arange(block, min(block + _BLOCK, stop))
        ids, _, lengths = visit_counts(graph, items, per_hop, high, seed, weighted)
        for place, item in enumerate(items):
            candidates = ids[place, low : lengths[place]]
            if len(candidates) > count:
                generator = np.random.default_rng([seed, int(item)])
                candidates = generator.choice(candidates, count, replace=False)
            rows.append(np.sort(candidates))
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    values = np.concatenate(rows) if rows else np.zeros(0, np.uint32)
    return pa.table(
        {"id": pa.array(np.arange(start, stop), pa.uint32()), "negatives": lists_to_arrow(indptr, values)},
        schema=schemas.HARD_NEGATIVES.arrow,
    )


def _store_hard_negatives(spark: SparkSession, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    num_items = open_manifest(storage, schemas.ITEM_USERS).num_rows
    # A stream of their own: with the walks stage's seed the first walks would be those that made the neighbours.
    cache, seed = settings.resources.cache, stage_seed(settings.task.seed, schemas.PAIRS_STAGE.name)
    walks, pairs = settings.task.walks, settings.task.pairs
    num_shards = count_shards(num_items, settings.resources.rows_per_shard)
    ranks = rank_range(pairs, walks.num_neighbours, num_items)
    count = pairs.num_hard_negatives
    per_hop = walks_per_hop(pairs.num_walks if count else 0, walks.max_hops, walks.restart_probability)

    def make(shard: int) -> pa.Table:
        graph = BipartiteGraph.open(storage, cache)
        bounds = shard_bounds(num_items, num_shards, shard)
        return hard_negatives(graph, *bounds, ranks, per_hop, count, seed, walks.weighted)

    shards = make_shards(spark, storage, schemas.HARD_NEGATIVES, lineage, num_shards, make, "pairs: hard negatives")
    metadata = {"first_rank": ranks[0] + 1, "last_rank": ranks[1], "negatives_per_item": count}
    commit(storage, schemas.HARD_NEGATIVES, shards, lineage, metadata)
