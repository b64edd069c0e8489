"""A sample of the embeddings to an empty, trained index; and whether last night's may be used again.

k-means of many lists goes in two levels: sqrt(nlist) groups, then lists within each, by its share of the sample. It
takes 2 / sqrt(nlist) of the comparisons of one level. Memory: the sample, as float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.ann.choice import POINTS_PER_CENTROID, TRAIN_POINTS, coarse, make, reason
from pipeline.ann.devices import Floats, ListFinder, kmeans
from pipeline.ann.parts import inverted_lists, omp_threads, outer_lists
from pipeline.ann.searching import FOR_ONE_BY_CODES
from pipeline.contracts.errors import SettingsError
from pipeline.contracts.sharding import shuffled

TWO_LEVELS = 8192
"""From so many lists on, k-means goes in two levels."""
POLISHING = 3
"""Rounds over all centroids that follow."""
SAMPLE_SHARDS = 256
"""The sample comes from at most so many shards, evenly spread: the others need not be read for it."""
CODE_ROWS = 65_536
"""Codes (PQ, SQ) are trained on at most so many vectors."""
SPREAD, DISTANCE = 1.25, 1.1
"""A former quantizer is given up when the lists are so much less even, or vectors so much further from them."""


@dataclass(frozen=True)
class Sample:
    """Rows to train on and to ask for, as (shard, rows within it) of each shard that has any."""

    shards: tuple[int, ...]
    train: tuple[NDArray[np.int64], ...]
    queries: tuple[NDArray[np.int64], ...]


def sample_size(num_vectors: int, nlist: int | None, train_rows: int) -> int:
    """Vectors to train on: 50 for each list, CODE_ROWS at the least, if there are and may be so many."""
    return min(num_vectors, train_rows, max(TRAIN_POINTS * (nlist or 0), CODE_ROWS))


def draw(shard_rows: list[int], size: int, num_queries: int, seed: int) -> Sample:
    """Training rows evenly spread, from a place the seed decides, and query rows at random, none twice.

    With up to SAMPLE_SHARDS shards the rows are the same however the vectors are cut into shards.
    """
    count = len(shard_rows)
    chosen = np.arange(count) if count <= SAMPLE_SHARDS else np.arange(SAMPLE_SHARDS) * count // SAMPLE_SHARDS
    lengths = np.array([shard_rows[number] for number in chosen], np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    size, num_queries = min(size, total), min(num_queries, total)
    offset = np.random.default_rng([seed, 1]).random()
    train = ((np.arange(size) + offset) * total / max(size, 1)).astype(np.int64).clip(max=total - 1)
    queries = shuffled(np.arange(num_queries), max(total, 1), seed + 3)
    parts = []
    for place, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
        first = end - length
        inside = [np.sort(rows[(rows >= first) & (rows < end)]) - first for rows in (train, queries)]
        if length:
            parts.append((int(chosen[place]), *inside))
    shards, own, asked = zip(*parts, strict=True) if parts else ((), (), ())
    return Sample(shards, own, asked)


def train(sample: Floats, factory: str, seed: int, gpu: bool = False) -> faiss.Index:
    """An empty, trained index. Raises SettingsError if FAISS cannot train that factory on so few vectors."""
    size, width = sample.shape
    index = make(factory, width)
    lists = inverted_lists(index)
    if lists is not None and lists.nlist > size:
        raise SettingsError(
            f"task.index.factory {factory} has {lists.nlist:,} lists, and there are {size:,} vectors to train "
            "them on; use fewer lists, or auto"
        )
    if index.is_trained:
        return index
    try:
        fit(index, sample, seed, gpu)
    except RuntimeError as error:
        raise SettingsError(
            f"task.index.factory {factory}: FAISS cannot train it on {size:,} vectors ({reason(error)}); use auto"
        ) from None
    return index


def fit(index: faiss.Index, sample: Floats, seed: int, gpu: bool = False) -> None:
    """Train an index: its centroids as we do, its codes as FAISS does. Raises RuntimeError if FAISS cannot."""
    lists = inverted_lists(index)
    if lists is not None and outer_lists(index) is not None:
        _train_lists(lists, sample, int(np.random.default_rng([seed, 2]).integers(2**31)), gpu)
    elif lists is not None:  # behind a transformation: FAISS trains both, in one level
        lists.cp.min_points_per_centroid = 1
        lists.cp.seed = int(np.random.default_rng([seed, 2]).integers(2**31))
    size = len(sample)
    rows = np.arange(size) if lists is None or lists.quantizer.ntotal == 0 else _spread(size, CODE_ROWS)
    index.train(np.ascontiguousarray(sample[rows]))


def few_points(index: faiss.Index, size: int) -> str | None:
    """What to say of a quantizer whose lists saw too few vectors; None if they saw enough."""
    lists = inverted_lists(index)
    if lists is None or size >= POINTS_PER_CENTROID * lists.nlist:
        return None
    return (
        f"{size / lists.nlist:.1f} training vectors per list, fewer than the {POINTS_PER_CENTROID} that FAISS asks for"
    )


def condition(index: faiss.Index, sample: Floats, gpu: bool = False) -> dict[str, float]:
    """How a trained index takes a sample: `spread` of the lists (1: all equal) and mean `distance` to the centroids."""
    lists = outer_lists(index)
    if lists is None:
        return {}
    finder = ListFinder(lists, gpu)
    sizes, far = np.zeros(lists.nlist, np.int64), 0.0
    for first in range(0, len(sample), CODE_ROWS):
        block = sample[first : first + CODE_ROWS]
        found = finder.find(block)
        sizes += np.bincount(found, minlength=lists.nlist)
        centroids = np.empty_like(block)
        lists.quantizer.reconstruct_batch(found, centroids)
        far += float(np.linalg.norm(block - centroids, axis=1).sum(dtype=np.float64))
    return {"spread": spread(sizes), "distance": far / len(sample)}


def spread(sizes: NDArray[np.int64]) -> float:
    """FAISS's imbalance factor: 1 if all lists are equal; so many times more is compared than if they were."""
    total = int(sizes.sum())
    return float(len(sizes) * (sizes.astype(np.float64) ** 2).sum() / total**2) if total else 1.0


def still_holds(now: dict[str, float], then: dict[str, float]) -> str | None:
    """Why a former quantizer no longer serves; None if it does."""
    for name, factor in (("spread", SPREAD), ("distance", DISTANCE)):
        if name not in then or name not in now:
            return f"its {name} is not known"
        if now[name] > factor * then[name]:
            return f"the {name} of its lists grew from {then[name]:.3f} to {now[name]:.3f}"
    return None


def _train_lists(lists: faiss.IndexIVF, sample: Floats, seed: int, gpu: bool) -> None:
    """Centroids into the coarse quantizer."""
    if lists.nlist >= TWO_LEVELS and not gpu:
        centroids = two_levels(sample, lists.nlist, seed)
        for _ in range(POLISHING):
            centroids = polished(centroids, sample)
    else:
        centroids = kmeans(sample, lists.nlist, seed, gpu)
    _hold(lists.quantizer, centroids)


def _hold(owner: faiss.Index, centroids: Floats) -> None:
    """Put centroids into an empty quantizer; a graph is built by one thread, as its links depend on the order."""
    quantizer = faiss.downcast_index(owner)
    if isinstance(quantizer, faiss.IndexRefine):
        quantizer.k_factor = FOR_ONE_BY_CODES
    with omp_threads(1 if isinstance(quantizer, faiss.IndexHNSW) else faiss.omp_get_max_threads()):
        quantizer.train(centroids)
        quantizer.add(centroids)


def two_levels(sample: Floats, number: int, seed: int) -> Floats:
    """Centroids [number, d]: groups first, then within each group as many as its share, at most one per vector."""
    num_groups = round(number**0.5)
    groups = kmeans(sample[_spread(len(sample), 256 * num_groups)], num_groups, seed)
    compare = faiss.IndexFlatIP(sample.shape[1])
    compare.add(groups)
    owner = compare.search(sample, 1)[1][:, 0]
    sizes = np.bincount(owner, minlength=num_groups)
    shares = _shares(sizes, number)
    order, ends = np.argsort(owner, kind="stable"), np.cumsum(sizes)
    found = [
        kmeans(sample[order[end - size : end]], int(share), seed)
        for end, size, share in zip(ends, sizes, shares, strict=True)
        if share
    ]
    return np.concatenate(found)


def polished(centroids: Floats, sample: Floats) -> Floats:
    """One round of k-means over all centroids [number, d]: each becomes the mean, as a unit vector, of what is nearest.

    Levels keep a vector from centroids of other groups; this lets it go.
    """
    quantizer = make(coarse(sample.shape[1]), sample.shape[1])
    _hold(quantizer, centroids)
    owner = quantizer.search(sample, 1)[1][:, 0]
    order, sizes = np.argsort(owner, kind="stable"), np.bincount(owner, minlength=len(centroids))
    filled = np.flatnonzero(sizes)
    starts = np.concatenate([[0], np.cumsum(sizes[filled])[:-1]])
    result = centroids.copy()
    for first in range(0, len(filled), CODE_ROWS // 64):
        some = slice(first, first + CODE_ROWS // 64)
        end = starts[some][-1] + sizes[filled[some]][-1]
        rows = sample[order[starts[some][0] : end]]
        result[filled[some]] = np.add.reduceat(rows, starts[some] - starts[some][0]) / sizes[filled[some], None]
    faiss.normalize_L2(result)
    return result


def _shares(sizes: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """number shared out in proportion to sizes, at least 1 for any size and no more than it; they sum to number."""
    shares = np.minimum(sizes, np.maximum(sizes > 0, sizes * number // sizes.sum()))
    order = np.argsort(-sizes, kind="stable")
    while (left := number - int(shares.sum())) != 0:
        can = order[(shares < sizes)[order]] if left > 0 else order[(shares > 1)[order]]
        shares[can[: abs(left)]] += np.sign(left)
    found: NDArray[np.int64] = shares
    return found


def _spread(size: int, most: int) -> NDArray[np.int64]:
    """At most so many of [0, size), evenly spread."""
    count = min(size, most)
    rows: NDArray[np.int64] = np.arange(count) * size // max(count, 1)
    return rows
