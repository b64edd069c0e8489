"""A block of queries asked of an open index: what may be found, and wider until every query has what it is due.

The search was tuned for a few neighbours of any item. What a filter leaves may lie far from a query, and many
neighbours lie in more lists than the tuned search opens. Queries that came short, or whose last neighbours a search of
twice the width still changes, are asked again, each time twice as wide, up to all lists. Memory: a block's results a
few times, and what FAISS holds for CANDIDATES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.ann.searching import MORE_K_FACTORS, Search, parameters, takes_selectors, widths

FEW_DENIED = 256
"""So many are asked for beyond k and dropped from what is found, which tells how deep it had to go."""
DEEP = 2
"""Neighbours deeper than so many times the k that was tuned for may be found less surely than those."""
CANDIDATES = 1 << 23
"""Results, and what they are re-ranked from, of one call to FAISS: 100 MB."""

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Filter:
    """What may be found: of num_rows rows those listed or, if they are denied, all others.

    rows: in order, each once. selector tells FAISS, and is None where it need not be told.
    """

    num_rows: int
    rows: Rows
    denies: bool
    selector: Any

    @classmethod
    def of(cls, index: faiss.Index, num_rows: int, allowed: Rows | None, denied: Rows) -> Filter:
        """Of rows that are allowed, None for all, and not denied. Of a kind that takes no selector all is asked for."""
        told = takes_selectors(index)
        if allowed is not None and told:
            rows = np.setdiff1d(allowed, denied)
            return cls(num_rows, rows, False, faiss.IDSelectorBatch(rows))
        rows = np.unique(denied)
        if allowed is not None:
            rows = np.union1d(rows, np.setdiff1d(np.arange(num_rows), allowed))
        selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(rows)) if told and len(rows) > FEW_DENIED else None
        return cls(num_rows, rows, True, selector)

    @property
    def left(self) -> int:
        """How many rows may be found."""
        return self.num_rows - len(self.rows) if self.denies else len(self.rows)

    @property
    def dropped(self) -> Rows:
        """The denied rows of which FAISS is not told."""
        return self.rows if self.selector is None else self.rows[:0]

    def lets(self, rows: Rows) -> NDArray[np.bool_]:
        """Which of the rows, -1 for none, may be found."""
        places = np.searchsorted(self.rows, rows)
        listed = places < len(self.rows)
        listed[listed] = self.rows[places[listed]] == rows[listed]
        found: NDArray[np.bool_] = (rows >= 0) & (listed != self.denies)
        return found


def ask(
    index: faiss.Index, report: Mapping[str, Any], vectors: Floats, own: Rows, k: int, only: Filter
) -> tuple[Rows, Floats]:
    """Rows [n, k] and scores [n, k] of the best items of each of the vectors [n, d], best first; -1 where none is left.

    own [n] is a row that a query must not find, -1 for none. report: search, k and target as in recall.json. A query is
    settled when at twice the width no more of its k are new than the target lets both widths miss. A filter that FAISS
    is told of makes the tuned width as many times greater as it leaves fewer rows, and half of that comes first: of
    rows left at random most queries are settled then.
    """
    name, values = widths(index)
    search: Search = {name: values[-1]} | report["search"]
    if only.selector is not None:
        search[name] = min(values[-1], -(-search[name] * only.num_rows // (2 * only.left)))
    left = only.left - only.lets(own)
    spare = int(2 * (1 - report["target"]) * k + 1e-9)
    rows, scores, depths = _once(index, search, vectors, own, k, only)
    found = (rows >= 0).sum(axis=1)
    unsure = (depths > DEEP * max(report["k"], 1)) | (only.selector is not None)
    open_ = np.flatnonzero((found < np.minimum(k, left)) | (unsure & (found < left)))
    while len(open_) and search[name] < values[-1]:
        search[name] = min(values[-1], 2 * search[name])
        if "k_factor" in search:  # vectors that codes tell badly apart are no better found by more lists alone
            search["k_factor"] = min(MORE_K_FACTORS[-1], 2 * search["k_factor"])
        wider, better, _ = _once(index, search, vectors[open_], own[open_], k, only)
        found = (wider >= 0).sum(axis=1)
        changes = (found - _common(wider, rows[open_]) > spare) & (found < left[open_])
        rows[open_], scores[open_] = wider, better
        open_ = open_[changes | (found < np.minimum(k, left[open_]))]
    return rows, scores


def _once(
    index: faiss.Index, search: Search, vectors: Floats, own: Rows, k: int, only: Filter
) -> tuple[Rows, Floats, Rows]:
    """As ask, by one search; and how deep in the unfiltered order each query's last result lies, own rows aside [n]."""
    more = k + bool((own >= 0).any())
    wanted = candidates = min(more + len(only.dropped), only.num_rows)
    if "k_factor" in search:  # what is dropped takes places among what is re-ranked, and need not be re-ranked so often
        candidates = min(search["k_factor"] * more + len(only.dropped), only.num_rows)
        search = search | {"k_factor": -(-candidates // wanted)}
    chosen, step = parameters(index, search, only.selector), max(1, CANDIDATES // candidates)
    rows, scores = np.full((len(vectors), k), -1), np.full((len(vectors), k), -np.inf, np.float32)
    depths = np.zeros(len(vectors), np.int64)
    for at in range(0, len(vectors), step):
        some = slice(at, at + step)
        found_scores, found = index.search(vectors[some], wanted, params=chosen)
        others = (found >= 0) & (found != own[some, None])
        kept = others & ~np.isin(found, only.dropped) if len(only.dropped) else others
        places = np.cumsum(kept, axis=1)
        kept = kept & (places <= k)
        lines = np.nonzero(kept)[0]
        rows[at + lines, places[kept] - 1], scores[at + lines, places[kept] - 1] = found[kept], found_scores[kept]
        depths[some] = np.where(kept, np.cumsum(others, axis=1), 0).max(axis=1, initial=0)
    return rows, scores, depths


def _common(some: Rows, others: Rows) -> Rows:
    """How many rows each line of both [n, k] has in common [n]."""
    both = np.sort(np.hstack([some, others]), axis=1)
    count: Rows = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(axis=1)
    return count
