"""The evaluation's kernel: ranks of targets in the full catalogue, and metrics with intervals. Numpy in, numpy out.

A question asks for the rank of one target among all items, for a query that is a weighted mean of items; what the
query's user has seen is no candidate. The rank is 1 + the number of candidates scored higher + half of those scored
equal: the expected rank under random tie-breaking, so that a method earns nothing by scoring many items alike. Scores
are made in blocks of bounded size and only counted; no [questions, items] matrix exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
TIE = 1e-6
"""Scores this close, relative to their scale, are equal: float32 sums in another order differ by less."""
COLUMNS = 8192
"""Items scored at a time."""
BLOCK_BYTES = 8 << 20
"""Bytes of a block of scores: about a core's share of the last-level cache, where the counting reads it."""


@dataclass(frozen=True)
class Questions:
    """What to rank.

    Query r is the mean of items[indptr[r]:indptr[r + 1]] with those weights, which sum to 1. Its user has seen
    seen[seen_indptr[r]:seen_indptr[r + 1]], distinct. Question e asks query rows[e] for targets[e], never a seen one;
    rows ascend.
    """

    indptr: Ints
    items: Ints
    weights: Floats
    seen_indptr: Ints
    seen: Ints
    rows: Ints
    targets: Ints

    @property
    def num_queries(self) -> int:
        """Queries, each with at least one question."""
        return len(self.indptr) - 1


def join_questions(parts: Sequence[Questions]) -> Questions:
    """Questions about other queries, put behind each other."""

    def offsets(name: str) -> Ints:
        lengths = [np.diff(getattr(part, name)) for part in parts]
        return np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)

    first = np.cumsum([0, *(part.num_queries for part in parts)])
    return Questions(
        offsets("indptr"),
        np.concatenate([part.items for part in parts]),
        np.concatenate([part.weights for part in parts]),
        offsets("seen_indptr"),
        np.concatenate([part.seen for part in parts]),
        np.concatenate([part.rows + start for part, start in zip(parts, first, strict=False)]),
        np.concatenate([part.targets for part in parts]),
    )


@dataclass(frozen=True)
class Catalogue:
    """Item vectors as a method sees them: some columns of a (memory-mapped) matrix, scaled to length 1 or not."""

    vectors: NDArray[np.floating]
    columns: Ints | None = None
    normalise: bool = False

    def take(self, rows: slice | Ints) -> NDArray[np.float32]:
        """float32 [number of rows, width]; a vector of zeros stays one."""
        chosen = np.asarray(self.vectors[rows])
        chosen = np.ascontiguousarray(chosen if self.columns is None else chosen[:, self.columns], dtype=np.float32)
        if self.normalise:
            norms = np.sqrt(np.einsum("nd,nd->n", chosen, chosen))
            chosen /= np.where(norms > 0, norms, 1)[:, None]
        return chosen

    def __len__(self) -> int:
        return len(self.vectors)


# ------------------------------------------------------------------------------------------------ ranks


def vector_ranks(questions: Questions, catalogue: Catalogue, block_bytes: int = BLOCK_BYTES) -> Floats:
    """Rank of every target by the inner product of its vector with the query's."""
    lines, queries = _query_vectors(questions, catalogue)
    row_lines = lines[questions.rows]
    thresholds, tolerances = _pair_scores(queries, row_lines, catalogue, questions.targets)
    counts = np.zeros((2, len(questions.rows)), dtype=np.int64)
    order = np.argsort(row_lines, kind="stable")
    num_rows = max(1, block_bytes // (4 * COLUMNS))
    for column in range(0, len(catalogue), COLUMNS):
        chunk = catalogue.take(slice(column, column + COLUMNS)).T
        for first in range(0, len(queries), num_rows):
            scores = queries[first : first + num_rows] @ chunk
            here = order[slice(*np.searchsorted(row_lines, [first, first + num_rows], sorter=order))]
            _count(scores, row_lines - first, column, here, *_arrays(questions), thresholds, tolerances, counts)
    return _ranks(counts)


def popularity_ranks(questions: Questions, degrees: NDArray[np.integer]) -> Floats:
    """Rank of every target by degree, the same list for everybody."""
    scores = degrees.astype(np.float64)[None]
    thresholds = scores[0, questions.targets]
    counts = np.zeros((2, len(questions.rows)), dtype=np.int64)
    everything, lines = np.arange(len(questions.rows)), np.zeros(len(questions.rows), dtype=np.int64)
    _count(scores, lines, 0, everything, *_arrays(questions), thresholds, np.zeros_like(thresholds), counts)
    return _ranks(counts)


def cooccurrence_ranks(
    questions: Questions, item_users: tuple[Ints, NDArray[Any]], user_items: tuple[Ints, NDArray[Any]]
) -> Floats:
    """Rank of every target by item-kNN: the query's items' cosines of co-occurrence with it, weighted and summed.

    The cosine of items i and j is (users of both) / sqrt(users of i x users of j). Both adjacencies are (indptr, ids)
    and transposes of each other. One row of scores is held at a time: a query costs the edges within two hops, never
    more than all of them.
    """
    item_indptr, users, user_indptr, items = (np.asarray(array) for array in (*item_users, *user_items))
    inverse = 1 / np.sqrt(np.maximum(np.diff(item_indptr), 1))
    counts = np.zeros((2, len(questions.rows)), dtype=np.int64)
    mass = np.zeros(len(user_indptr) - 1)
    scores = np.zeros((1, len(inverse)))
    thresholds, tolerances = np.zeros((2, len(questions.rows)))
    lines = np.zeros(len(questions.rows), dtype=np.int64)
    borders = np.searchsorted(questions.rows, np.arange(questions.num_queries + 1))
    single = len(questions.items) == questions.num_queries
    previous = None
    for row in np.argsort(questions.items, kind="stable") if single else range(questions.num_queries):
        own = slice(questions.indptr[row], questions.indptr[row + 1])
        if not single or previous != questions.items[own][0]:
            scores[0] = 0
            history = questions.items[own], questions.weights[own]
            _two_hops(*history, item_indptr, users, user_indptr, items, inverse, mass, scores[0])
            previous = questions.items[own][0]
        here = np.arange(borders[row], borders[row + 1])
        thresholds[here] = scores[0, questions.targets[here]]
        tolerances[here] = TIE * thresholds[here]
        _count(scores, lines, 0, here, *_arrays(questions), thresholds, tolerances, counts)
    return _ranks(counts)


def top_k(
    queries: NDArray[np.float32], catalogue: Catalogue, k: int, excluded: Ints
) -> tuple[Ints, NDArray[np.float32]]:
    """Ids and scores of the k items of highest inner product, by exact search, without query q's item excluded[q]."""
    k = min(k, len(catalogue) - 1)
    if k < 1:
        return np.zeros((len(queries), 0), dtype=np.int64), np.zeros((len(queries), 0), dtype=np.float32)
    ids = np.zeros((len(queries), 0), dtype=np.int64)
    best = np.zeros((len(queries), 0), dtype=np.float32)
    for column in range(0, len(catalogue), COLUMNS):
        scores = queries @ catalogue.take(slice(column, column + COLUMNS)).T
        inside = np.flatnonzero((excluded >= column) & (excluded < column + scores.shape[1]))
        scores[inside, excluded[inside] - column] = -np.inf
        width = min(k, scores.shape[1])
        kept = np.argpartition(-scores, width - 1, axis=1)[:, :width]
        best = np.concatenate([best, np.take_along_axis(scores, kept, axis=1)], axis=1)
        ids = np.concatenate([ids, kept + column], axis=1)
        kept = np.lexsort((ids, -best), axis=1)[:, :k]
        best, ids = np.take_along_axis(best, kept, axis=1), np.take_along_axis(ids, kept, axis=1)
    return ids, best


def _ranks(counts: Ints) -> Floats:
    ranks: Floats = 1 + counts[0] + counts[1] / 2
    return ranks


def _arrays(questions: Questions) -> tuple[Ints, Ints, Ints, Ints]:
    return questions.rows, questions.targets, questions.seen_indptr, questions.seen


def _query_vectors(questions: Questions, catalogue: Catalogue) -> tuple[Ints, NDArray[np.float32]]:
    """The vector of each query as (line of each query, vectors): queries that are one item share that item's line."""
    if len(questions.items) == questions.num_queries:
        items, lines = np.unique(questions.items, return_inverse=True)
        return lines.astype(np.int64), catalogue.take(items)
    width = catalogue.take(slice(0, 1)).shape[1]
    queries = np.zeros((questions.num_queries, width), dtype=np.float32)
    for row in range(questions.num_queries):
        own = slice(questions.indptr[row], questions.indptr[row + 1])
        queries[row] = questions.weights[own] @ catalogue.take(questions.items[own])
    return np.arange(questions.num_queries), queries


def _pair_scores(
    queries: NDArray[np.float32], lines: Ints, catalogue: Catalogue, targets: Ints
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Score of each question's target, and how far from it still counts as equal."""
    scores, tolerances = np.empty(len(lines), dtype=np.float32), np.empty(len(lines), dtype=np.float32)
    for start in range(0, len(lines), COLUMNS):
        block = slice(start, start + COLUMNS)
        left, right = queries[lines[block]], catalogue.take(targets[block])
        scores[block] = np.einsum("ed,ed->e", left, right)
        tolerances[block] = TIE * np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return scores, tolerances


@numba.njit(cache=True, nogil=True)
def _count(
    scores: Any,
    lines: Any,
    first_item: int,
    questions: Any,
    rows: Any,
    targets: Any,
    seen_indptr: Any,
    seen: Any,
    thresholds: Any,
    tolerances: Any,
    counts: Any,
) -> None:
    """Add to counts[0] and counts[1] how many candidates in scores are above, and equal to, each question's target.

    scores is [lines, items from first_item on]; question e reads lines[e]. The target and what was seen are counted
    with the others and taken back by the same comparison, so they can never be ranked above.
    """
    width = scores.shape[1]
    for e in questions:
        line = scores[lines[e]]
        high, low = thresholds[e] + tolerances[e], thresholds[e] - tolerances[e]
        above, at_least = 0, 0
        for column in range(width):
            above += line[column] > high
            at_least += line[column] >= low
        for place in range(seen_indptr[rows[e]] - 1, seen_indptr[rows[e] + 1]):
            item = targets[e] if place < seen_indptr[rows[e]] else seen[place]
            column = item - first_item
            if 0 <= column < width:
                above -= line[column] > high
                at_least -= line[column] >= low
        counts[0, e] += above
        counts[1, e] += at_least - above


@numba.njit(cache=True, nogil=True)
def _two_hops(
    items: Any,
    weights: Any,
    item_indptr: Any,
    item_users: Any,
    user_indptr: Any,
    user_items: Any,
    inverse: Any,
    mass: Any,
    scores: Any,
) -> None:
    """Add to scores the items' weights sent to their users and from there to the users' items; mass is left at 0."""
    reached = 0
    for item in items:
        reached += item_indptr[item + 1] - item_indptr[item]
    users = np.empty(reached, dtype=np.int64)
    reached = 0
    for place in range(len(items)):
        item = items[place]
        for edge in range(item_indptr[item], item_indptr[item + 1]):
            user = item_users[edge]
            if mass[user] == 0:
                users[reached] = user
                reached += 1
            mass[user] += weights[place] * inverse[item]
    for user in users[:reached]:
        for edge in range(user_indptr[user], user_indptr[user + 1]):
            scores[user_items[edge]] += mass[user]
        mass[user] = 0
    for item in range(len(scores)):
        scores[item] *= inverse[item]


# ------------------------------------------------------------------------------------------------ metrics


def metric_names(ks: Sequence[int]) -> list[str]:
    """Names of the columns of query_metrics."""
    return ["mrr", *(f"{metric}@{k}" for k in ks for metric in ("hit_rate", "recall", "ndcg"))]


def query_metrics(ranks: Floats, queries: Ints, num_queries: int, ks: Sequence[int]) -> Floats:
    """[num_queries, metrics] of queries with one or several targets; queries[e] owns ranks[e].

    hit_rate: any target within K; recall: share of targets within K; ndcg: discounted gain over that of an ideal list;
    mrr: one over the best rank. With one target per query recall equals hit_rate.
    """

    def total(values: NDArray[Any]) -> NDArray[Any]:
        return np.bincount(queries, weights=values, minlength=num_queries)

    targets = np.bincount(queries, minlength=num_queries)
    best = np.full(num_queries, np.inf)
    np.minimum.at(best, queries, ranks)
    columns = [1 / best]
    discounts = np.concatenate([[0], np.cumsum(1 / np.log2(np.arange(2, max(ks) + 2)))])
    for k in ks:
        inside = ranks <= k
        columns.append((best <= k).astype(np.float64))
        columns.append(total(inside) / targets)
        columns.append(total(np.where(inside, 1 / np.log2(1 + ranks), 0)) / discounts[np.minimum(targets, k)])
    return np.stack(columns, axis=1)


def bootstrap_means(values: Floats, users: NDArray[np.integer], resamples: int, seed: int) -> Floats:
    """Means of values [queries, columns] in resamples of the users with replacement: [resamples, columns].

    A user brings all of their queries along, as these are not independent. Columns share the resamples, so the
    difference of two columns is a paired one. Memory: about 16 MB and [users, columns].
    """
    _, owner = np.unique(users, return_inverse=True)
    num_users = int(owner.max()) + 1
    counts = np.bincount(owner).astype(np.float64)
    sums = np.stack([np.bincount(owner, weights=column) for column in values.T], axis=1)
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    step = max(1, (1 << 20) // num_users)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        draws = rng.integers(num_users, size=(size, num_users)) + np.arange(size)[:, None] * num_users
        times = np.bincount(draws.ravel(), minlength=size * num_users).reshape(size, num_users).astype(np.float64)
        means[start : start + size] = (times @ sums) / (times @ counts)[:, None]
    return means


def compare(
    values: Mapping[str, Floats], users: Ints, names: Sequence[str], resamples: int, seed: int
) -> dict[str, Any]:
    """Means and 95 % intervals of each method's metrics, and of the first method's lead over each of the others.

    values is [queries, metrics] per method. Intervals are None where all queries are of one user.
    """
    methods = list(values)
    stacked = np.stack(list(values.values()), axis=1)
    means = stacked.mean(axis=0)
    known = len(np.unique(users)) > 1
    shape = (resamples, *means.shape)
    samples = bootstrap_means(stacked.reshape(len(users), -1), users, resamples, seed).reshape(shape)

    def interval(mean: float, drawn: Floats) -> dict[str, float | None]:
        low, high = np.percentile(drawn, [2.5, 97.5]).tolist() if known else (None, None)
        return {"mean": float(mean), "low": low, "high": high}

    leads = ("mrr", "hit_rate@10" if "hit_rate@10" in names else names[1])
    return {
        "methods": {
            method: {name: interval(means[m, n], samples[:, m, n]) for n, name in enumerate(names)}
            for m, method in enumerate(methods)
        },
        "leads": {
            method: {
                name: interval(means[0, n] - means[m, n], samples[:, 0, n] - samples[:, m, n])
                for n, name in enumerate(names)
                if name in leads
            }
            for m, method in enumerate(methods)
            if m > 0
        },
    }
