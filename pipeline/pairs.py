"""Training pairs, every query's hard negatives, and what the trainer is asked while it trains.

Reads INTERACTIONS, ITEMS and the graph; writes PAIRS (items that one user touched one after the other in the training
period), QUESTIONS (validation events: the item before and the item itself) and HARD_NEGATIVES (items drawn from a range
of PPR ranks: near, but not nearest; empty for items that are no query). One shard per task; pairs need no shuffle, as
interactions are stored in the users' order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark import SparkContext

from pipeline.contracts import schemas
from pipeline.contracts.config import Pairs, Settings
from pipeline.contracts.datasets import (
    Lineage,
    Manifest,
    check_sources,
    lists_to_arrow,
    open_manifest,
    read_shard,
)
from pipeline.contracts.errors import DataError
from pipeline.contracts.sharding import chances, stage_seed
from pipeline.contracts.storage import Storage
from pipeline.exchange import gather, scatter
from pipeline.neighbourhoods import Neighbourhoods, blocks, choose
from pipeline.questions import Events, item_to_item, ragged
from pipeline.spark import Task
from pipeline.steps import Output, Report, run_step

_SCRATCH = f"{schemas.PAIRS_STAGE.name}-ranking"
MAX_QUESTIONS = 1 << 20
"""Of one user, for the purpose of drawing: questions beyond are drawn all or none."""
_BLOCK = 1024
"""Queries ranked at once: bounds memory to this many rows of ranks."""
_QUERIES = pa.schema([("query", pa.uint32())])
_NONE = np.zeros(0, np.uint32)


def run(spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Write the pairs and the questions, then the hard negatives."""
    for dataset in schemas.PAIRS_STAGE.reads:
        check_sources(storage, dataset)
    _store_pairs(spark, storage, settings, lineage)
    _store_hard_negatives(spark, storage, settings, lineage)


def _store_pairs(spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    wanted, interactions = settings.task.pairs, open_manifest(storage, schemas.INTERACTIONS)
    seed = stage_seed(settings.task.seed, schemas.QUESTIONS.name)
    share = min(1.0, wanted.questions / max(1, int(interactions.metadata.get("validation", wanted.questions))))

    def make(task: Task) -> tuple[Sequence[pa.Table], Report]:
        rows = read_shard(storage, interactions, task["shard"])
        pairs = consecutive_pairs(rows, wanted.window, wanted.max_gap_seconds)
        return (pairs, validation_questions(rows, share, seed)), {"pairs": pairs.num_rows}

    def describe(reports: list[Report]) -> dict[str, int]:
        num_pairs = sum(report["pairs"] for report in reports)
        if not num_pairs:
            raise DataError(
                "there is no training pair: no user has two different items within task.pairs.max_gap_seconds in the "
                "training period; give interactions with longer histories, or another column as user"
            )
        return {"pairs": num_pairs}

    tasks = [{"shard": shard} for shard in range(len(interactions.shards))]
    outputs = Output(schemas.PAIRS, describe=describe), Output(schemas.QUESTIONS)
    run_step(spark, storage, lineage, f"{_SCRATCH}/events", tasks, outputs, make, "pairs: pairs and questions")


def validation_questions(interactions: pa.Table, share: float, seed: int) -> pa.Table:
    """A share of the validation events of whole users: query, target, and what is no candidate.

    An event that a user begins with, or that repeats an item, cannot be asked about. Which are drawn depends on the
    seed, the user and the event's place among the user's, not on the shard.
    """
    columns = (interactions.column(name).to_numpy() for name in ("user_id", "item_id", "timestamp", "split"))
    events = Events(*(column.astype(np.int64) for column in columns))
    _, questions, users = item_to_item(events, split=schemas.VALIDATION_SPLIT)
    nth = np.arange(len(users)) - np.searchsorted(users, users)  # the questions are in the order of users
    asked = np.flatnonzero(chances((seed,), users * MAX_QUESTIONS + np.minimum(nth, MAX_QUESTIONS - 1)) < share)
    places, indptr = ragged(questions.seen_indptr[asked], np.diff(questions.seen_indptr)[asked])
    seen = lists_to_arrow(indptr, questions.seen[places].astype(np.uint32))
    ids = (pa.array(values[asked], pa.uint32()) for values in (questions.items, questions.targets))
    return pa.table([*ids, seen], schema=schemas.QUESTIONS.arrow)


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


def drawn(
    ids: NDArray[np.uint32], lengths: NDArray[np.int64], items: NDArray[np.int64], first: int, count: int, seed: int
) -> list[NDArray[np.uint32]]:
    """Of each item's ranked items [B, high], up to count drawn without replacement from rank first on, sorted.

    An item whose ranking does not reach that deep has those that exist; the draws depend on seed and item alone.
    """
    rows = []
    for place, item in enumerate(items.tolist()):
        candidates = ids[place, first : lengths[place]]
        if len(candidates) > count:
            candidates = np.random.default_rng([seed, item]).choice(candidates, count, replace=False)
        rows.append(np.sort(candidates))
    return rows


def _store_hard_negatives(spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Rank by composing every query's whole first hop with rows of its nearest items; draw from the ranks."""
    pairs, seed = settings.task.pairs, stage_seed(settings.task.seed, schemas.PAIRS_STAGE.name)
    near = Neighbourhoods(
        spark, storage, settings, lineage, _SCRATCH,
        choose(storage, settings.resources).strategy,
    )  # fmt: skip
    first, high = rank_range(pairs, settings.task.walks.num_neighbours, near.num_items)
    count, items_of = pairs.num_hard_negatives, near.items_of()
    asked = _queries(spark, storage, near)
    hop = composed = None
    if count:
        hop = near.first_hop()
        composed = near.composed(near.store_rows(pairs.compose_width), pairs.compose_rows, pairs.compose_width)

    def make(shard: int) -> pa.Table:
        items = items_of(shard)
        rows = [_NONE] * len(items)
        if hop is not None and composed is not None:
            nearest, compose = hop(shard), composed(shard)
            queries = np.unique(gather(storage, asked, shard, _QUERIES).column("query").to_numpy()).astype(np.int64)
            for block in blocks(queries, _BLOCK):
                ids, _, lengths = compose(block, high, nearest(block, high))
                places = np.searchsorted(items, block).tolist()
                for place, row in zip(places, drawn(ids, lengths, block, first, count, seed), strict=True):
                    rows[place] = row
        indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        lists = lists_to_arrow(indptr, np.concatenate([_NONE, *rows]))
        return pa.table([pa.array(items, pa.uint32()), lists], schema=schemas.HARD_NEGATIVES.arrow)

    metadata = {"first_rank": first + 1, "last_rank": high, "negatives_per_item": count}
    near.store(schemas.HARD_NEGATIVES, make, "pairs: hard negatives", metadata)
    near.clean()


def _queries(spark: SparkContext, storage: Storage, near: Neighbourhoods) -> Manifest:
    """The queries of all pairs, at the shards of items that own them."""
    pairs = open_manifest(storage, schemas.PAIRS)
    owner, num_shards = near.owner(), near.num_shards

    def make(shard: int) -> tuple[pa.Table, NDArray[np.integer]]:
        queries = np.unique(read_shard(storage, pairs, shard, ["query"]).column("query").to_numpy())
        return pa.table({"query": queries}, schema=_QUERIES), owner(queries)

    name = near.scratch("queries")
    return scatter(spark, storage, name, near.attempt, len(pairs.shards), make, num_shards, "pairs: queries")
