"""What is asked of embeddings item to item: of every held-out event, which item follows the one touched before it.

The evaluation and the gate ask about test events, the trainer about validation events; all leave out what the user has
seen. Numpy in, numpy out; a task reads one shard's users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import schemas
from pipeline.contracts.datasets import Manifest, read_shard
from pipeline.contracts.storage import Storage
from pipeline.ranking import Ints, Questions

BLOCK_QUERIES = 2500
"""Queries of one Spark task: enough to share a pass over the catalogue, few enough to spread and to retry."""


@dataclass(frozen=True)
class Events:
    """Whole users' events, in the order of users and time."""

    user: Ints
    item: Ints
    timestamp: Ints
    split: Ints

    def ordered(self, order: Ints) -> Events:
        """The same events in another order."""
        return Events(self.user[order], self.item[order], self.timestamp[order], self.split[order])

    def starts(self) -> Ints:
        """For every row, the first row of its user."""
        first = np.flatnonzero(np.diff(self.user, prepend=-1))
        return np.repeat(first, np.diff(first, append=len(self.user)))

    def is_new(self) -> NDArray[np.bool_]:
        """For every row, whether its user touches the item for the first time there."""
        order = np.lexsort((self.item, self.user))
        user, item = self.user[order], self.item[order]
        result = np.zeros(len(order), dtype=bool)
        result[order] = (np.diff(user, prepend=-1) != 0) | (np.diff(item, prepend=-1) != 0)
        return result


def item_to_item(
    events: Events, chosen: Ints | None = None, split: int = schemas.TEST_SPLIT
) -> tuple[dict[str, int], Questions, Ints]:
    """Counts, one question per askable event of the split (the chosen ones of them, ascending), and their users."""
    rows, starts, new = np.arange(len(events.user)), events.starts(), events.is_new()
    test, later = events.split == split, rows > starts
    asked = np.flatnonzero(test & later & new)
    counts = {
        "test_events": int(test.sum()),
        "without_earlier_item": int((test & ~later).sum()),
        "target_seen_before": int((test & later & ~new).sum()),
        "queries": len(asked),
    }
    asked = asked if chosen is None else asked[chosen]
    before: Ints = np.cumsum(new) - new
    lengths: Ints = before[asked] - before[starts[asked]]
    places, seen_indptr = ragged(before[starts[asked]], lengths)
    numbers = np.arange(len(asked) + 1)
    queries = events.item[asked - 1]
    questions = Questions(
        numbers, queries, np.ones(len(asked)), seen_indptr, events.item[new][places], numbers[:-1], events.item[asked]
    )
    return counts, questions, events.user[asked]


def ragged(starts: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    """The places start, start + 1, ... of every slice, one after the other, and their row pointers."""
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], lengths), indptr


# ------------------------------------------------------------------------------------------------ reading


def read_events(storage: Storage, manifest: Manifest, shard: int) -> Events:
    """All events of the users whose first event lies in this shard: neighbouring shards complete them."""
    columns = ["user_id", "item_id", "timestamp", "split"]

    def read(number: int) -> list[Ints]:
        table = read_shard(storage, manifest, number, columns)
        return [table.column(name).to_numpy().astype(np.int64) for name in columns]

    parts = [read(shard)]
    earlier = next((number for number in reversed(range(shard)) if manifest.shards[number].rows), None)
    if earlier is not None and len(parts[0][0]):
        before = read_shard(storage, manifest, earlier, ["user_id"]).column("user_id")
        own = parts[0][0] != before[len(before) - 1].as_py()
        parts = [[array[own] for array in parts[0]]]
    for number in range(shard + 1, len(manifest.shards)):
        if not len(parts[0][0]):
            break
        following = read(number)
        own = following[0] == parts[0][0][-1]
        parts.append([array[own] for array in following])
        if not own.all():
            break
    return Events(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def sample_blocks(
    queries: Sequence[int], limit: int, seed: Sequence[int], block: int = BLOCK_QUERIES
) -> list[dict[str, Any]]:
    """Tasks over at most limit queries, drawn evenly from those of all shards: for each shard, which of its own."""
    total = sum(queries)
    chosen = np.arange(total)
    if total > limit:
        chosen = np.sort(np.random.default_rng(seed).choice(total, limit, replace=False))
    ends = np.cumsum(queries)
    tasks = []
    for part in np.split(chosen, range(block, len(chosen), block)) if len(chosen) else []:
        shards = np.searchsorted(ends, part, side="right")
        local = part - (ends - queries)[shards]
        tasks.append({"parts": [{"shard": int(s), "chosen": local[shards == s].tolist()} for s in np.unique(shards)]})
    return tasks
