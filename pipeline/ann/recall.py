"""How much of what exact search finds an index finds, and the narrowest search that finds enough.

Exact neighbours are found part by part, where the vectors are, and merged here: a query keeps its k nearest and some
more, so that ties can be seen. A found item counts if it scores as high as the exact k-th, so duplicates stand for each
other. Queries are items, whose own entry is left out. Memory: queries, and a few dozen neighbours each.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.ann.devices import Floats
from pipeline.ann.parts import list_sizes
from pipeline.ann.searching import Search, compared, k_factors, more_k_factors, parameters, widths

MORE = 22
"""Neighbours kept beyond the k-th: more ties than that are recognised by the index giving them the same score."""
RERANK_COST = 90
"""Re-ranking one candidate, a read at a random place, costs as much as comparing so many codes in a row."""
FEWEST = 30
"""Queries that an interval can be made of."""
LIST_COST = 130
"""Finding and opening a list costs as much as comparing so many codes, which take 2.2 ns each."""
_SLACK = 1e-5


@dataclass(frozen=True)
class Exact:
    """True neighbours of some queries: ids [Q, T] (-1: none) and inner products [Q, T], best first."""

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]

    def rows(self, chosen: NDArray[np.int64]) -> Exact:
        """The neighbours of some of the queries."""
        return Exact(self.ids[chosen], self.scores[chosen])


def singles_first(queries: Floats) -> NDArray[np.int64]:
    """An order of queries [Q] drawn at random: first those that no other drawn one is a copy of; else as given."""
    _, place, times = np.unique(queries, axis=0, return_inverse=True, return_counts=True)
    return np.argsort(times[place.reshape(-1)] > 1, kind="stable")


def telling(queries: Floats, exact: Exact, k: int) -> NDArray[np.bool_]:
    """Which queries [Q] say something of an index: not those whose k nearest are all copies of themselves.

    Copies lie in one list, so any search finds them; where most items are copies, they would hide how the others fare.
    If fewer than FEWEST others are left, all count.
    """
    own = np.einsum("qd,qd->q", queries, queries)
    alike = np.abs(exact.scores[:, :k] - own[:, None]) <= _SLACK * np.maximum(own, 1e-30)[:, None]
    others = ~alike.all(axis=1)
    return others if others.sum() >= FEWEST else np.ones(len(queries), bool)


def depth(k: int) -> int:
    """How many true neighbours of a query are kept."""
    return k + MORE


def exact_neighbours(queries: Floats, query_ids: NDArray[np.int64], vectors: Floats, first: int, depth: int) -> Exact:
    """The nearest of the vectors, which are rows [first, first + n), to every query but the query itself."""
    width = min(depth + 1, len(vectors))
    if width == 0:
        return Exact(np.full((len(queries), depth), -1), np.full((len(queries), depth), -np.inf, np.float32))
    scores, rows = faiss.knn(queries, vectors, width, metric=faiss.METRIC_INNER_PRODUCT)
    ids = rows.astype(np.int64) + first
    own = ids == query_ids[:, None]
    ids[own], scores[own] = -1, -np.inf
    return _best(ids, scores, depth)


def merge_exact(parts: Iterable[Exact]) -> Exact:
    """The nearest of all parts; in memory: two parts."""
    merged: Exact | None = None
    for part in parts:
        if merged is not None:
            ids, scores = np.hstack([merged.ids, part.ids]), np.hstack([merged.scores, part.scores])
            part = _best(ids, scores, merged.ids.shape[1])
        merged = part
    assert merged is not None, "at least one part"
    return merged


def hits(
    index: faiss.Index, queries: Floats, query_ids: NDArray[np.int64], exact: Exact, k: int, search: Search
) -> NDArray[np.float64]:
    """Each query's share of its true k nearest that the index finds."""
    chosen = parameters(index, search)
    scores, found = index.search(queries, min(k + 1, index.ntotal), params=chosen)
    others = (found >= 0) & (found != query_ids[:, None])
    others &= np.cumsum(others, axis=1) <= k
    kth = exact.scores[:, k - 1]
    good = exact.scores >= (kth - _SLACK * np.maximum(np.abs(kth), 1e-30))[:, None]
    good &= exact.ids >= 0
    right = ((found[:, :, None] == exact.ids[:, None, :]) & good[:, None, :]).any(axis=2)
    for row in np.flatnonzero(good.all(axis=1) & (others & ~right).any(axis=1)):
        alike = _score_of(index, queries[row], exact.ids[row], search)
        if alike is not None:
            right[row] |= np.abs(scores[row] - alike) <= 1e-6 * max(abs(alike), 1e-30)
    share: NDArray[np.float64] = (others & right).sum(axis=1) / k
    return share


def tune(
    index: faiss.Index, queries: Floats, query_ids: NDArray[np.int64], exact: Exact, k: int, target: float
) -> tuple[Search, list[dict[str, Any]]]:
    """The cheapest search whose recall@k has the lower end of its 95 % interval at target or above; all that was tried.

    Work is counted in vectors compared, never by the clock: equal runs choose alike. Most is re-ranked at first, with
    nprobe doubled until it is enough, then narrowed between the last two; then half as much is re-ranked, and so on,
    from that nprobe on, as long as it costs less. If nothing reaches the target, more is re-ranked of all lists, and
    nprobe narrowed then; if that does not help: what finds most.
    """
    name, values = widths(index)
    tuner = _Tuner(index, queries, query_ids, exact, k, target, name, list_sizes(index))
    best: dict[str, Any] | None = None
    for factor in reversed(k_factors(index) or (0,)):
        before, found = 0, None
        for width in values:
            if best is not None and width and 2 * width <= best["width"]:
                before = width  # with more re-ranked it was not enough
                continue
            point = tuner.plan(width, factor)
            if best is not None and point["work"] >= best["work"]:
                break
            if tuner.attempt(point)["enough"]:
                found = tuner.narrow(before, point)
                break
            before = width
        if found is None or (best is not None and found["work"] >= best["work"]):
            break
        best = found
    for factor in more_k_factors(index) if best is None else ():
        point = tuner.attempt(tuner.plan(values[-1], factor))
        if point["enough"]:
            best = tuner.narrow(0, point)
            break
    if best is None:
        best = max(tuner.tried, key=lambda point: (point["recall"], -point["work"]))
    return best["search"], tuner.tried


@dataclass
class _Tuner:
    """Tries searches of one index on one set of queries, and remembers them."""

    index: faiss.Index
    queries: Floats
    query_ids: NDArray[np.int64]
    exact: Exact
    k: int
    target: float
    name: str
    sizes: NDArray[np.int64] | None
    tried: list[dict[str, Any]] = field(default_factory=list)

    def plan(self, width: int, factor: int) -> dict[str, Any]:
        """A search and what it would cost."""
        search = ({self.name: width} if self.name else {}) | ({"k_factor": factor} if factor else {})
        seen = compared(self.index, self.queries, search, self.sizes)
        work = seen + RERANK_COST * factor * (self.k + 1) + LIST_COST * width
        return {"search": search, "width": width, "compared": seen, "work": work}

    def attempt(self, point: dict[str, Any]) -> dict[str, Any]:
        """The same, with its recall and whether that is enough."""
        shares = hits(self.index, self.queries, self.query_ids, self.exact, self.k, point["search"])
        low = float(shares.mean() - 1.96 * shares.std() / len(shares) ** 0.5)
        self.tried.append(point | {"recall": float(shares.mean()), "low": low, "enough": low >= self.target})
        return self.tried[-1]

    def narrow(self, low: int, enough: dict[str, Any]) -> dict[str, Any]:
        """The narrowest that is still enough between low, which is not, and one that is; to an eighth."""
        while enough["width"] - low > max(1, enough["width"] // 8):
            middle = (low + enough["width"]) // 2
            point = self.attempt(self.plan(middle, enough["search"].get("k_factor", 0)))
            if point["enough"]:
                enough = point
            else:
                low = middle
        return enough


def wider(index: faiss.Index, search: Search) -> list[Search]:
    """The chosen search and others around it, narrow to wide: the points of a recall and speed curve."""
    name, values = widths(index)
    if not name:
        return [search]
    chosen = search[name]
    around = sorted({value for value in values if chosen / 16 <= value <= chosen * 2} | {chosen})
    return [search | {name: value} for value in around]


def queries_per_second(index: faiss.Index, queries: Floats, k: int, search: Search) -> float:
    """By the clock, in one batch on the threads that FAISS now uses."""
    chosen = parameters(index, search)
    started = time.perf_counter()
    index.search(queries, min(k, index.ntotal), params=chosen)
    return len(queries) / (time.perf_counter() - started)


def _best(ids: NDArray[np.int64], scores: NDArray[np.float32], depth: int) -> Exact:
    """The best of each row, equal scores by id; padded with -1 to depth."""
    missing = depth - ids.shape[1]
    if missing > 0:
        ids = np.pad(ids, ((0, 0), (0, missing)), constant_values=-1)
        scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
    order = np.lexsort((ids, -scores), axis=1)[:, :depth]
    return Exact(np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1))


def _score_of(index: faiss.Index, query: Floats, ids: NDArray[np.int64], search: Search) -> float | None:
    """What the index scores the worst of these ids that it finds: for ties, the score of any of them."""
    selector = faiss.IDSelectorBatch(np.ascontiguousarray(ids))
    scores, found = index.search(query[None], len(ids), params=parameters(index, search, selector))
    return float(scores[0, (found[0] >= 0).sum() - 1]) if (found[0] >= 0).any() else None
