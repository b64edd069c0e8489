"""How good the embeddings are on events that nothing has seen, beside the baselines that are easy to forget.

Reads interactions, items, both adjacencies, features, embeddings, and the reports of index and model; writes
evaluation: metrics.json and report.html. Two tasks, both ranking the full catalogue with what the user has seen masked:

item to item: for every test event (u, i) the query is the item that u touched just before, in whichever period, and i
is the target. Events with no earlier item, or whose target u had touched before, cannot be asked and are counted.
user to item: the query is the mean of what u touched in the training period, weighted by recency (an item counts half
after half_life_days; where timestamps are only an order, one step counts as a day); the targets are the test items
that u had not touched.

Ranking runs in Spark tasks over blocks of sampled queries: a task holds the interactions of a shard, a block of scores
and memory-mapped matrices, and passes once over the catalogue per method. Only ranks come back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyspark import SparkContext
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pipeline import ranking, report
from pipeline.contracts import datasets, schemas
from pipeline.contracts.config import Settings
from pipeline.contracts.datasets import Lineage, Manifest
from pipeline.contracts.errors import DataError
from pipeline.contracts.replica import map_lists, map_values, map_vectors
from pipeline.contracts.storage import Storage
from pipeline.questions import Events, item_to_item, read_events, sample_blocks
from pipeline.ranking import Catalogue, Ints, Questions, compare
from pipeline.spark import run_tasks

PINSAGE, POPULARITY, ITEM_KNN, CONTENT_KNN = "PinSage", "popularity", "item-kNN", "content-only kNN"
ITEM_TO_ITEM, USER_TO_ITEM = "item_to_item", "user_to_item"
NEIGHBOURS_SHOWN = 8
HEALTH_SAMPLE = 1000
DAY = 86_400


def run(spark: SparkContext, storage: Storage, settings: Settings, lineage: Lineage) -> None:
    """Rank, sum up, write the numbers and the page."""
    manifests = {dataset.name: datasets.open_manifest(storage, dataset) for dataset in schemas.EVALUATION_STAGE.reads}
    check_rows(manifests)
    datasets.begin(storage, schemas.EVALUATION)
    task = settings.task.evaluation
    order_only = settings.task.data.interactions.timestamp_unit == "order"
    half_life = task.half_life_days * (1 if order_only else DAY)
    source = Source(storage, manifests, settings.resources.cache, settings.resources.threads, half_life)

    shards = [{"shard": number} for number in range(len(manifests["interactions"].shards))]
    counted = run_tasks(spark, shards, partial(count_shard, source=source), "evaluation: test events")
    arguments = (task.cold_degree, task.tail_share, task.examples, settings.task.seed)
    look = partial(survey_catalogue, source=source, arguments=arguments)
    survey = run_tasks(spark, [{}], look, "evaluation: catalogue")[0]
    tasks = {}
    for number, name in enumerate((ITEM_TO_ITEM, USER_TO_ITEM)):
        counts = _add([answer[name] for answer in counted])
        queries = [answer[name]["queries"] for answer in counted]
        blocks = sample_blocks(queries, task.max_events, [settings.task.seed, number])
        label = f"evaluation: {name.replace('_', ' ')}"
        answers = run_tasks(spark, blocks, partial(rank_block, source=source, name=name), label)
        tasks[name] = {"counts": counts, **summarise(answers, task.k, task.bootstrap, settings.task.seed, survey)}

    history = next((shard.name for shard in manifests["model"].shards if shard.name == "history.json"), None)
    metrics = {
        "name": settings.task.name,
        "protocol": protocol(settings),
        "tasks": tasks,
        **survey,
        "index": json.loads(datasets.read_file(storage, manifests["index"], "recall.json")),
        "training": json.loads(datasets.read_file(storage, manifests["model"], history)) if history else None,
        "data": {name: value for name, value in manifests["interactions"].metadata.items() if name != "days"},
        "graph": {side: manifests[name].metadata for side, name in (("users", "user_items"), ("items", "item_users"))},
        "settings": lineage.settings,
        "lineage": {"fingerprint": lineage.fingerprint, "inputs": lineage.inputs, "code": datasets.code_version()},
    }
    text = json.dumps(metrics, indent=1, sort_keys=True, ensure_ascii=False)
    files = {"metrics.json": text, "report.html": report.render(json.loads(text))}
    stored = [datasets.write_file(storage, "evaluation", name, data.encode(), lineage) for name, data in files.items()]
    datasets.commit(storage, schemas.EVALUATION, stored, lineage)


def check_rows(manifests: Mapping[str, Manifest]) -> None:
    """Raise DataError unless everything that is indexed by item id has one row per item."""
    num_items = manifests["items"].num_rows
    for name in ("item_users", "features", "embeddings"):
        if manifests[name].num_rows != num_items:
            raise DataError(
                f"{name} has {manifests[name].num_rows:,} rows and items has {num_items:,}, expected as many; "
                "run `pinsage run`"
            )
    if num_items == 0:
        raise DataError("items is empty: there is nothing to rank; look at task.data.items and run `pinsage ingest`")


def protocol(settings: Settings) -> list[str]:
    """What a reader must know to trust, or to doubt, the numbers."""
    split, evaluation = settings.task.split, settings.task.evaluation
    fair = "" if split.kind == "temporal" else ": it exists for comparison with papers, and is easier than the future"
    unit = "events" if settings.task.data.interactions.timestamp_unit == "order" else "days"
    return [
        f"Split: {split.kind}, {split.test:g} test and {split.validation:g} validation{fair}.",
        "Candidates are the full catalogue; what the user had touched before is masked, and no negatives are sampled.",
        "Rank = 1 + candidates scored higher + half of those scored equal: what random tie-breaking gives on average.",
        "Item to item: the query is the item touched just before; one target per query, so recall@K equals hit-rate@K.",
        "User to item: the query is the mean of the training history, halved in weight every "
        f"{evaluation.half_life_days:g} {unit}.",
        f"Intervals: 95 %, percentile bootstrap over users, {evaluation.bootstrap:,} resamples, shared by all methods.",
        f"Cold: targets with at most {evaluation.cold_degree} training interactions. Tail: the least popular "
        f"{evaluation.tail_share:.0%} of the catalogue.",
    ]


# ------------------------------------------------------------------------------------------------ events to questions


def user_to_item(
    events: Events, half_life: float, chosen: Ints | None = None
) -> tuple[dict[str, int], Questions, Ints]:
    """Counts, one query per user (the chosen ones of them, ascending) with all targets, and the users.

    half_life is in the unit of the timestamps; recency counts from the user's last training event.
    """
    events = events.ordered(np.lexsort((np.arange(len(events.user)), events.split == schemas.TEST_SPLIT, events.user)))
    users, owner = np.unique(events.user, return_inverse=True)
    train, test, new = events.split == schemas.TRAIN_SPLIT, events.split == schemas.TEST_SPLIT, events.is_new()
    kinds = (test, train, test & new)
    has_test, has_history, has_target = (np.bincount(owner[rows], minlength=len(users)) > 0 for rows in kinds)
    asked = np.flatnonzero(has_history & has_target)
    counts = {
        "users_with_test_events": int(has_test.sum()),
        "without_history": int((has_test & ~has_history).sum()),
        "without_new_items": int((has_history & has_test & ~has_target).sum()),
        "queries": len(asked),
    }
    asked = asked if chosen is None else asked[chosen]
    number = np.full(len(users), -1)
    number[asked] = np.arange(len(asked))
    row = number[owner]
    last = np.full(len(users), np.iinfo(np.int64).min)
    np.maximum.at(last, owner[train], events.timestamp[train])
    history, seen, targets = (np.flatnonzero(rows & (row >= 0)) for rows in (train, ~test & new, test & new))
    weights = np.exp2(-(last[owner[history]] - events.timestamp[history]) / half_life)
    weights /= np.bincount(row[history], weights, minlength=len(asked))[row[history]]
    questions = Questions(
        _indptr(row[history], len(asked)),
        events.item[history],
        weights,
        _indptr(row[seen], len(asked)),
        events.item[seen],
        row[targets],
        events.item[targets],
    )
    return counts, questions, users[asked]


def _indptr(rows: Ints, count: int) -> Ints:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]).astype(np.int64)


# ------------------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class Source:
    """Where a Spark task finds its data, and how many threads it may use."""

    storage: Storage
    manifests: Mapping[str, Manifest]
    cache: str | None
    threads: int
    half_life: float

    def values(self, dataset: str, column: str) -> NDArray[Any]:
        """A plain column, memory-mapped."""
        return map_values(self.storage, self.manifests[dataset], column, self.cache)

    def vectors(self, dataset: str, column: str) -> NDArray[Any]:
        """A column of vectors, memory-mapped."""
        return map_vectors(self.storage, self.manifests[dataset], column, self.cache)

    def lists(self, dataset: str) -> tuple[Ints, NDArray[Any]]:
        """A column of neighbours, memory-mapped."""
        return map_lists(self.storage, self.manifests[dataset], "neighbours", self.cache)

    def events(self, shard: int) -> Events:
        """All events of the users whose first event lies in this shard."""
        return read_events(self.storage, self.manifests["interactions"], shard)

    def content(self) -> Catalogue | None:
        """The features that come from content, at length 1: no degree, no missing flags; None if there are none."""
        described = self.manifests["features"].metadata["columns"]
        kept = [range(c["start"], c["stop"]) for c in described if c["kind"] not in ("degree", "missing")]
        if not kept:
            return None
        columns = np.concatenate([np.array(part) for part in kept])
        return Catalogue(self.vectors("features", "features"), columns, normalise=True)


def count_shard(task: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """How many queries of either kind the users of one shard of interactions give."""
    events = source.events(task["shard"])
    nothing = np.zeros(0, dtype=np.int64)
    return {
        ITEM_TO_ITEM: item_to_item(events, nothing)[0],
        USER_TO_ITEM: user_to_item(events, source.half_life, nothing)[0],
    }


def rank_block(task: Mapping[str, Any], source: Source, name: str) -> dict[str, Any]:
    """Ranks of a block of queries under every method, with what the slices need to know of users and targets."""
    parts, users = [], []
    for part in task["parts"]:
        events, chosen = source.events(part["shard"]), np.array(part["chosen"], dtype=np.int64)
        if name == ITEM_TO_ITEM:
            _, questions, asking = item_to_item(events, chosen)
        else:
            _, questions, asking = user_to_item(events, source.half_life, chosen)
        parts.append(questions)
        users.append(asking)
    questions = ranking.join_questions(parts)
    degrees, content = source.values("items", "degree"), source.content()
    with threadpool_limits(source.threads):
        ranks = {
            PINSAGE: ranking.vector_ranks(questions, Catalogue(source.vectors("embeddings", "embedding"))),
            POPULARITY: ranking.popularity_ranks(questions, degrees),
            ITEM_KNN: ranking.cooccurrence_ranks(questions, source.lists("item_users"), source.lists("user_items")),
            **({} if content is None else {CONTENT_KNN: ranking.vector_ranks(questions, content)}),
        }
    return {
        "users": np.concatenate(users).tolist(),
        "candidates": (len(degrees) - np.diff(questions.seen_indptr)).tolist(),
        "rows": questions.rows.tolist(),
        "degrees": degrees[questions.targets].tolist(),
        "ranks": {method: values.tolist() for method, values in ranks.items()},
    }


def survey_catalogue(task: Mapping[str, Any], source: Source, arguments: tuple[int, float, int, int]) -> dict[str, Any]:
    """Sizes, the slices' borders, the embeddings' health and a few items with their nearest neighbours."""
    cold_degree, tail_share, num_examples, seed = arguments
    degrees = np.asarray(source.values("items", "degree"))
    vectors = source.vectors("embeddings", "embedding")
    last = max(0, min(len(degrees), round(tail_share * len(degrees))) - 1)
    tail_degree = int(np.partition(degrees, last)[last]) if tail_share > 0 else -1
    with threadpool_limits(source.threads):
        health = embedding_health(vectors, seed)
        examples = find_examples(source, vectors, degrees, num_examples)
    return {
        "catalogue": {
            "items": len(degrees),
            "users": source.manifests["user_items"].num_rows,
            "events": source.manifests["interactions"].num_rows,
            "edges": int(degrees.sum()),
            "dimensions": vectors.shape[1],
        },
        "slices": {
            "all": {"items": len(degrees), "degree_at_most": None},
            "cold": {"items": int((degrees <= cold_degree).sum()), "degree_at_most": cold_degree},
            "tail": {"items": int((degrees <= tail_degree).sum()), "degree_at_most": tail_degree},
        },
        "embeddings": health,
        "examples": examples,
    }


def embedding_health(vectors: NDArray[np.floating], seed: int) -> dict[str, float]:
    """Norms, how cosines of random pairs spread, and how many different items turn up among nearest neighbours.

    kurtosis is the excess over a normal distribution's. coverage@10 is the share of different items among the ten
    nearest of a sample of items, of the most that there could be: low where a few hubs are near to everything.
    """
    rng = np.random.default_rng([seed, 2])
    catalogue = Catalogue(vectors)
    sample = np.sort(rng.choice(len(vectors), min(HEALTH_SAMPLE, len(vectors)), replace=False))
    norms = np.linalg.norm(catalogue.take(sample), axis=1)
    left, right = rng.integers(len(vectors), size=(2, 20 * HEALTH_SAMPLE))
    left, right = left[left != right], right[left != right]
    unit = Catalogue(vectors, normalise=True)
    cosines = np.einsum("nd,nd->n", unit.take(left), unit.take(right)).astype(np.float64)
    spread = cosines - cosines.mean() if len(cosines) else np.zeros(1)
    variance = float(np.mean(spread**2))
    nearest, _ = ranking.top_k(catalogue.take(sample), catalogue, 10, sample)
    return {
        "mean_norm": float(norms.mean()),
        "norm_deviation": float(norms.std()),
        "mean_cosine": float(cosines.mean()) if len(cosines) else 0.0,
        "cosine_deviation": variance**0.5,
        "cosine_kurtosis": float(np.mean(spread**4)) / variance**2 - 3 if variance > 0 else 0.0,
        "coverage@10": len(np.unique(nearest)) / max(1, min(len(vectors), nearest.size)),
    }


def find_examples(source: Source, vectors: NDArray[np.floating], degrees: Ints, count: int) -> list[dict[str, Any]]:
    """Popular items, from the most popular to the first fifth, with their nearest neighbours by exact search."""
    by_degree = np.argsort(-degrees, kind="stable")
    places = np.geomspace(1, max(1, len(degrees) // 5), count).round().astype(np.int64) - 1
    chosen = by_degree[np.unique(places)]
    catalogue = Catalogue(vectors)
    near, scores = ranking.top_k(catalogue.take(chosen), catalogue, NEIGHBOURS_SHOWN, chosen)
    described = _describe(source, np.unique(np.concatenate([chosen, near.ravel()])))
    return [
        {
            **described[item],
            "neighbours": [
                {**described[other], "score": float(score)}
                for other, score in zip(near[row].tolist(), scores[row], strict=True)
            ],
        }
        for row, item in enumerate(chosen.tolist())
    ]


def _describe(source: Source, ids: Ints) -> dict[int, dict[str, Any]]:
    """key, title and degree of items, reading only the shards they are in."""
    manifest = source.manifests["items"]
    found: dict[int, dict[str, Any]] = {}
    start = 0
    for number, shard in enumerate(manifest.shards):
        here = ids[(ids >= start) & (ids < start + shard.rows)]
        if len(here):
            table = datasets.read_shard(source.storage, manifest, number, ["key", "title", "degree"])
            found.update(zip(here.tolist(), table.take(here - start).to_pylist(), strict=True))
        start += shard.rows
    return found


# ------------------------------------------------------------------------------------------------ summary


def summarise(
    answers: Sequence[Mapping[str, Any]], ks: Sequence[int], resamples: int, seed: int, survey: Mapping[str, Any]
) -> dict[str, Any]:
    """Every slice's counts, every method's metrics with intervals, and PinSage's lead over every baseline."""
    if not answers:
        return {"num_ranked": 0, "slices": {}}
    first = np.cumsum([0, *(len(answer["users"]) for answer in answers)])
    columns = ("users", "candidates", "degrees")
    users, candidates, degrees = (np.concatenate([answer[name] for answer in answers]) for name in columns)
    rows = np.concatenate([np.array(a["rows"]) + start for a, start in zip(answers, first, strict=False)])
    ranks = {name: np.concatenate([a["ranks"][name] for a in answers]) for name in answers[0]["ranks"]}
    slices: dict[str, dict[str, Any]] = {}
    for name, border in survey["slices"].items():
        limit = border["degree_at_most"]
        kept = np.ones(len(rows), dtype=bool) if limit is None else degrees <= limit
        asked, own = np.unique(rows[kept], return_inverse=True)
        counts = {"queries": len(asked), "targets": int(kept.sum()), "users": len(np.unique(users[asked]))}
        slices[name] = {"counts": counts}
        if len(asked):
            slices[name]["counts"]["candidates"] = float(candidates[asked].mean())
            values = {m: ranking.query_metrics(r[kept], own, len(asked), ks) for m, r in ranks.items()}
            slices[name] |= compare(values, users[asked], ranking.metric_names(ks), resamples, seed)
    return {"num_ranked": len(users), "slices": slices}


def _add(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(count[name] for count in counts) for name in counts[0]}
