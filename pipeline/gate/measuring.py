"""What the gate measures of two runs: Spark tasks over blocks of questions, of items and of shards.

Ids are stable from night to night where task.data.previous names an earlier run of the chain, so row r of both runs is
one item as long as both have it: the first `common` ids. `count_alike` makes sure of it. Both runs are asked tonight's
test events of items that both know, and rank the same candidates, those they share: an item that the live release never
saw says nothing of what its readers would lose. Memory of a task: as the evaluation's; on the driver ranks and sums.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark import SparkContext
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pipeline import ranking
from pipeline.contracts import datasets, schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Manifest, arrow_to_vectors, open_manifest, read_rows, read_shard
from pipeline.contracts.replica import map_values, map_vectors
from pipeline.contracts.sharding import sample_rows
from pipeline.contracts.storage import Storage
from pipeline.questions import Events, item_to_item, read_events, sample_blocks
from pipeline.ranking import Catalogue, Ints, Questions
from pipeline.spark import Task, run_tasks

SAMPLED_SHARDS = 64
"""Of a larger dataset, evenly spread shards are surveyed."""
ALIGNED_SHARDS, ALIGNED_ROWS = 16, 20_000
"""The driver reads at most so many shards, one at a time, for so many pairs of vectors."""
BLOCK_ITEMS = 500
NEAREST = 10
_DATASETS = (
    schemas.INTERACTIONS, schemas.ITEMS, schemas.ITEM_USERS, schemas.FEATURES, schemas.MODEL, schemas.EMBEDDINGS,
    schemas.INDEX, schemas.EVALUATION,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run: its storage and the manifests that the gate looks at. Goes along to tasks."""

    storage: Storage
    manifests: Mapping[str, Manifest]
    cache: str | None
    threads: int

    @classmethod
    def open(cls, storage: Storage, settings: Settings) -> Run:
        """Raises DataError, naming the stage to run, if a dataset is missing."""
        found = {dataset.name: open_manifest(storage, dataset) for dataset in _DATASETS}
        return cls(storage, found, settings.resources.cache, settings.resources.threads)

    def __getitem__(self, dataset: str) -> Manifest:
        return self.manifests[dataset]

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.storage.url.rstrip("/").rpartition("/")[2]

    @property
    def space_id(self) -> str:
        """Which model's space the embeddings are in: vectors of different ones cannot be compared."""
        return self["model"].content

    def tree(self, dataset: str, file: str) -> Any:
        """A JSON file of a dataset."""
        return json.loads(datasets.read_file(self.storage, self[dataset], file))

    def vectors(self) -> NDArray[Any]:
        """The embeddings, memory-mapped."""
        return map_vectors(self.storage, self["embeddings"], "embedding", self.cache)


# ------------------------------------------------------------------------------------------------ items


def count_alike(spark: SparkContext, tonight: Run, live: Run, seed: int) -> tuple[int, float]:
    """How many ids both runs have, and the share of sampled ones that stand for the same key in both."""
    shards = live["items"].shards
    bounds = np.cumsum([0, *(shard.rows for shard in shards)])

    def compare(task: Task) -> Task:
        keys = read_shard(live.storage, live["items"], task["shard"], ["key"]).column("key")
        stop = min(task["start"] + len(keys), tonight["items"].num_rows)
        if stop <= task["start"]:
            return {"compared": 0, "same": 0}
        now = read_rows(tonight.storage, tonight["items"], task["start"], stop, ["key"]).column("key")
        same = pc.sum(pc.equal(now, keys.slice(0, len(now)))).as_py() or 0
        return {"compared": len(now), "same": same}

    chosen = sample_rows(len(shards), SAMPLED_SHARDS, seed).tolist()
    tasks = [{"shard": number, "start": int(bounds[number])} for number in chosen]
    found = run_tasks(spark, tasks, compare, "gate: are the ids the same")
    compared = sum(answer["compared"] for answer in found)
    common = min(tonight["items"].num_rows, live["items"].num_rows)
    return common, sum(answer["same"] for answer in found) / max(1, compared)


def survey(spark: SparkContext, run: Run, dataset: str, column: str, seed: int) -> dict[str, Any]:
    """Vectors of sampled shards: rows, zeros and not_finite ones, mean length, spread, constant of all columns.

    spread is the variance as a share of the mean squared length. Of features only the content's columns count; missing
    has the share of items by column of the content. total is the rows of the whole dataset.
    """
    manifest = run[dataset]
    described = manifest.metadata.get("columns", [])
    kept = [range(c["start"], c["stop"]) for c in described if c["kind"] not in ("degree", "missing")]
    columns = np.concatenate([np.array(part) for part in kept]) if kept else None
    missing = manifest.metadata.get("missing", {})
    shares = {name: count / max(1, manifest.num_rows) for name, count in missing.items()}
    if described and columns is None:
        return {"columns": 0, "missing": shares}

    def look(task: Task) -> Task:
        vectors = arrow_to_vectors(read_shard(run.storage, manifest, task["shard"], [column]).column(column))
        chosen = (vectors if columns is None else vectors[:, columns]).astype(np.float64)
        finite = np.isfinite(chosen).all(axis=1)
        good = chosen[finite]
        squares = np.einsum("nd,nd->n", good, good)
        return {
            "rows": len(chosen), "not_finite": int((~finite).sum()), "zeros": int((squares == 0).sum()),
            "norms": float(np.sqrt(squares).sum()), "squares": float(squares.sum()),
            "columns": [take(axis=0).tolist() for take in (good.sum, good.min, good.max)] if len(good) else [],
        }  # fmt: skip

    tasks = [{"shard": number} for number in sample_rows(len(manifest.shards), SAMPLED_SHARDS, seed).tolist()]
    return {"total": manifest.num_rows, "missing": shares, **_summed(run_tasks(spark, tasks, look, f"gate: {dataset}"))}


def _summed(parts: Sequence[Task]) -> dict[str, Any]:
    total = {name: sum(part[name] for part in parts) for name in ("rows", "not_finite", "zeros", "norms", "squares")}
    good = max(1, total["rows"] - total["not_finite"])
    columns = [np.array(part["columns"]) for part in parts if part["columns"]] or [np.zeros((3, 1))]
    centre = np.sum([part[0] for part in columns], axis=0) / good
    least, most = np.min([part[1] for part in columns], axis=0), np.max([part[2] for part in columns], axis=0)
    square = total["squares"] / good
    return {
        "rows": total["rows"], "not_finite": total["not_finite"], "zeros": total["zeros"],
        "norm": total["norms"] / good, "spread": 1 - float(centre @ centre) / square if square > 0 else 0.0,
        "columns": len(centre), "constant": int((most - least < 1e-9).sum()),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ quality


def _asked(run: Run, shard: int, common: int, since: int) -> tuple[Events, Ints, dict[str, int]]:
    """A shard's users' events, and which of their questions both runs can be asked.

    Test events before since are not: the live release may have learned from them.
    """
    events = read_events(run.storage, run["interactions"], shard)
    tested = events.split == schemas.TEST_SPLIT
    late = np.where(tested & (events.timestamp < since), schemas.VALIDATION_SPLIT, events.split)
    events = Events(events.user, events.item, events.timestamp, late)
    _, questions, _ = item_to_item(events)
    known = np.flatnonzero((questions.items < common) & (questions.targets < common))
    counts = {"test_events": int(tested.sum()), "askable": len(questions.targets), "known_to_both": len(known)}
    return events, known, counts


def compare_quality(spark: SparkContext, tonight: Run, live: Run, common: int, settings: Settings) -> dict[str, Any]:
    """counts of events, and by slice the number of `questions` and what ranking.compare says of tonight and live.

    all: every question, the interval by users. cold: of targets without edges, whose query has edges in both runs or in
    none, so that what is compared is the target's embedding and not that its neighbour in the catalogue has moved on;
    the interval by targets, as a few new items may be all that is asked for, and `targets` says how many they are.
    """
    task, seed = settings.task.evaluation, settings.task.seed
    since = int(live["interactions"].metadata.get("validation_from", np.iinfo(np.int64).min))

    def count(part: Task) -> Task:
        return dict(_asked(tonight, part["shard"], common, since)[2])

    shards: list[Task] = [{"shard": number} for number in range(len(tonight["interactions"].shards))]
    counted = run_tasks(spark, shards, count, "gate: test events")
    blocks = sample_blocks([answer["known_to_both"] for answer in counted], task.max_events, [seed, 3])
    work = partial(
        rank_block, tonight=tonight, live=live, common=common, since=since, cold_degree=task.cold_degree
    )  # fmt: skip
    answers = run_tasks(spark, blocks, work, "gate: tonight and live")
    counts = {name: sum(answer[name] for answer in counted) for name in ("test_events", "askable", "known_to_both")}
    if not answers:
        return {"counts": counts, "slices": {}}
    users, targets, is_cold, now, then = (
        np.concatenate([answer[name] for answer in answers])
        for name in ("users", "targets", "is_cold", "tonight", "live")
    )
    slices: dict[str, Any] = {}
    for name, kept, owners in (("all", np.ones(len(now), np.bool_), users), ("cold", is_cold, targets)):
        size = int(kept.sum())
        slices[name] = {"questions": size, "targets": len(np.unique(targets[kept]))}
        if size:
            own = np.arange(size)
            values = {
                run: ranking.query_metrics(ranks[kept], own, size, [NEAREST])
                for run, ranks in (("tonight", now), ("live", then))
            }
            slices[name] |= ranking.compare(values, owners[kept], ranking.metric_names([NEAREST]), task.bootstrap, seed)
    return {"counts": counts, "slices": slices}


def rank_block(
    task: Mapping[str, Any], tonight: Run, live: Run, common: int, since: int, cold_degree: int
) -> dict[str, Any]:
    """Ranks of a block of questions in both runs, who asks for what, and which are of the cold slice."""
    parts: list[Questions] = []
    users: list[Ints] = []
    for part in task["parts"]:
        events, known, _ = _asked(tonight, part["shard"], common, since)
        _, questions, asking = item_to_item(events, known[np.array(part["chosen"], dtype=np.int64)])
        parts.append(questions)
        users.append(asking)
    questions = ranking.join_questions(parts)
    cold, was_cold = (
        np.asarray(map_values(run.storage, run["items"], "degree", run.cache))[:common] <= cold_degree
        for run in (tonight, live)
    )
    queries = questions.items[questions.indptr[questions.rows]]
    is_cold = cold[questions.targets] & was_cold[questions.targets] & (cold[queries] == was_cold[queries])
    with threadpool_limits(tonight.threads):
        ranks = {
            name: ranking.vector_ranks(questions, Catalogue(run.vectors()[:common])).tolist()
            for name, run in (("tonight", tonight), ("live", live))
        }
    asked = {"users": np.concatenate(users).tolist(), "targets": questions.targets.tolist()}
    return {**asked, "is_cold": is_cold.tolist(), **ranks}


# ------------------------------------------------------------------------------------------------ movement


def measure_churn(spark: SparkContext, tonight: Run, live: Run, common: int, settings: Settings) -> float:
    """Share of the nearest items, by exact search among common ones, that the live release does not have."""
    sample = sample_rows(common, settings.task.gate.sample, settings.task.seed)

    def compare(task: Task) -> Task:
        items = np.array(task["items"], dtype=np.int64)
        with threadpool_limits(tonight.threads):
            nearest = []
            for run in (tonight, live):
                catalogue = Catalogue(run.vectors()[:common])
                nearest.append(ranking.top_k(catalogue.take(items), catalogue, NEAREST, items)[0])
        shared = sum(len(np.intersect1d(one, other)) for one, other in zip(*nearest, strict=True))
        return {"shared": int(shared), "all": nearest[0].size}

    blocks = np.split(sample, range(BLOCK_ITEMS, len(sample), BLOCK_ITEMS))
    found = run_tasks(spark, [{"items": block.tolist()} for block in blocks], compare, "gate: neighbours")
    shared, whole = (sum(int(answer[name]) for answer in found) for name in ("shared", "all"))
    return 1 - shared / max(1, whole)


def paired_vectors(tonight: Run, live: Run, common: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Embeddings [n, width] of the same sampled items in both runs."""
    bounds = np.cumsum([0, *(shard.rows for shard in live["embeddings"].shards)])
    shards = sample_rows(len(bounds) - 1, ALIGNED_SHARDS, seed).tolist()
    pairs: tuple[list[NDArray[Any]], list[NDArray[Any]]] = ([], [])
    for shard in shards:
        start, stop = int(bounds[shard]), min(int(bounds[shard + 1]), common)
        if start >= stop:
            continue
        rows = sample_rows(stop - start, max(1, ALIGNED_ROWS // len(shards)), seed)
        for run, kept in zip((tonight, live), pairs, strict=True):
            column = read_rows(run.storage, run["embeddings"], start, stop, ["embedding"]).column("embedding")
            kept.append(arrow_to_vectors(column)[rows].astype(np.float32))
    return np.concatenate(pairs[0]), np.concatenate(pairs[1])
