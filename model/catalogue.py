"""The whole catalogue under the network as it is: to ask how good it is, and what lies near to what.

Every layer is made once for every item, as in inference, each rank making its share of the rows. Memory per rank: one
layer's messages of all items, 4 m bytes each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.distributed import Group
from model.layers import Convolution
from model.loader import Loader
from model.pinsage import PinSage

CHUNK = 8192
"""Items whose rows are made at once."""
SEEDS = 512
"""Items embedded at once where only a sample is: their neighbourhoods are much larger."""
QUESTIONS = 256
"""Questions whose scores are held at once."""
FLAT_ITEMS = 20_000
"""Up to so many items the nearest are found by comparing all with all."""
_NOBODY = np.zeros(0, np.uint32)


@torch.no_grad()
def embed_all(model: PinSage, loader: Loader, group: Group) -> Tensor:
    """Every item's embedding [N, d], on every rank; a collective call."""
    share = -(-loader.num_items // group.world_size)
    start, stop = (min(loader.num_items, place * share) for place in (group.rank, group.rank + 1))
    chunks = [(first, min(stop, first + CHUNK)) for first in range(start, stop, CHUNK)]

    def everyones(rows: Sequence[Tensor], width: int) -> Tensor:
        own = torch.cat([*rows, torch.zeros(share - (stop - start), width, device=group.device)])
        return group.gather(own)[: loader.num_items]

    def standardised(first: int, last: int) -> Tensor:
        ids = np.arange(first, last, dtype=np.uint32)
        arrays = loader.features(ids), ids.astype(np.int64)
        return model.standardise(*(torch.from_numpy(array).to(group.device) for array in arrays))

    hidden = [standardised(*chunk) for chunk in chunks]
    for convolution in model.convolutions:
        assert isinstance(convolution, Convolution)
        messages = [convolution.project(h) for h in hidden]
        projected = everyones(messages, _width(convolution))
        for place, chunk in enumerate(chunks):
            index, weights = (torch.from_numpy(array).to(group.device) for array in loader.lists(*chunk))
            hidden[place] = convolution.combine(hidden[place], convolution.pool(projected, index, weights))
    return everyones([model.head(h) for h in hidden], model.G2.out_features)


@torch.no_grad()
def embed_some(model: PinSage, loader: Loader, group: Group, ids: NDArray[np.uint32]) -> Tensor:
    """Embeddings [n, d] of some items, on every rank; a collective call."""
    share = -(-len(ids) // group.world_size)
    own = np.resize(ids[group.rank * share :], share) if group.rank * share < len(ids) else np.resize(ids, share)
    rows = []
    for first in range(0, share, SEEDS):
        seeds, places = np.unique(own[first : first + SEEDS], return_inverse=True)
        blocks = loader.blocks(seeds, _NOBODY, _NOBODY)
        arrays = (loader.features(blocks.ids), blocks.ids.astype(np.int64), blocks.index, blocks.weights)
        z = model(*(torch.from_numpy(array).to(group.device) for array in arrays), blocks.sizes)
        rows.append(z[torch.from_numpy(places).to(group.device)])
    return group.gather(torch.cat(rows))[: len(ids)]


def _width(convolution: Convolution) -> int:
    return convolution.Q.out_features + (convolution.attention is not None)


# ------------------------------------------------------------------------------------------------ how good


class NotFiniteError(ArithmeticError):
    """Embeddings that are no numbers: no score is above another, and every rank would be the first."""


class Examiner:
    """Ranks of the targets of the stored questions: among all items where they are few enough, else a fixed sample."""

    def __init__(self, loader: Loader, full_catalogue: int, sample: int, seed: int) -> None:
        self.loader = loader
        self.query, self.target, self.seen_indptr, self.seen = loader.questions()
        self.candidates: NDArray[np.uint32] | None = None
        if loader.num_items > full_catalogue:
            drawn = np.random.default_rng(seed).integers(0, loader.num_items, sample, dtype=np.uint32)
            self.candidates = np.unique(np.concatenate([drawn, self.target]))

    def __len__(self) -> int:
        return len(self.query)

    def ask(self, model: PinSage, group: Group) -> dict[str, Any]:
        """Metrics, how many questions were asked, and among how many candidates; a collective call.

        Raises NotFiniteError, on every rank, if the network has diverged.
        """
        if self.candidates is None:
            items = embed_all(model, self.loader, group)
            queries, targets, seen = items[self.query.astype(np.int64)], self.target.astype(np.int64), self.seen
        else:
            distinct, places = np.unique(self.query, return_inverse=True)
            queries = embed_some(model, self.loader, group, distinct)[places]
            items = embed_some(model, self.loader, group, self.candidates)
            targets = np.searchsorted(self.candidates, self.target)
            places = np.minimum(np.searchsorted(self.candidates, self.seen), len(self.candidates) - 1)
            seen = np.where(self.candidates[places] == self.seen, places, -1)
        if not (torch.isfinite(queries).all() and torch.isfinite(items).all()):
            raise NotFiniteError
        ranks = target_ranks(queries, items, targets, self.seen_indptr, seen)
        return {
            "mrr": float((1 / ranks).mean()),
            **{f"{name}@{k}": float((ranks <= k).mean()) for name, k in (("hit_rate", 10), ("recall", 100))},
            "questions": len(self),
            "candidates": len(items),
            "full_catalogue": self.candidates is None,
        }


def target_ranks(
    queries: Tensor, items: Tensor, targets: NDArray[np.integer], seen_indptr: NDArray[np.integer], seen: Any
) -> NDArray[np.float64]:
    """The rank of each target by inner product with its query, seen items left out, ties shared.

    queries is [n, d], items [N, d]; seen[seen_indptr[k]:seen_indptr[k + 1]] are what query k's user has seen, as rows
    of items, below 0 for those that are not there. As the evaluation ranks (pipeline/ranking.py), on any device.
    """
    ranks = np.zeros(len(targets))
    for first in range(0, len(targets), QUESTIONS):
        last = min(len(targets), first + QUESTIONS)
        scores = queries[first:last] @ items.T
        wanted = torch.from_numpy(targets[first:last].astype(np.int64)).to(scores.device)[:, None]
        own = scores.gather(1, wanted)
        known = np.asarray(seen[seen_indptr[first] : seen_indptr[last]]).astype(np.int64)
        rows = np.repeat(np.arange(last - first), np.diff(seen_indptr[first : last + 1]))[known >= 0]
        masked = torch.from_numpy(np.stack([rows, known[known >= 0]])).to(scores.device)
        scores[masked[0], masked[1]] = -torch.inf
        above, equal = (scores > own).sum(1), (scores == own).sum(1)
        ranks[first:last] = (1 + above + (equal - 1).clamp(min=0) / 2).cpu().numpy()
    return ranks


# ------------------------------------------------------------------------------------------------ what is near


def nearest(vectors: Tensor, first: int, last: int, group: Group) -> NDArray[np.int32]:
    """Every item's nearest ones by inner product from rank first to rank last, counted from 1 [N, last - first + 1].

    Without the item itself; -1 where there are not so many. A collective call: every rank looks up its share.
    """
    import faiss  # by who mines negatives alone

    items = vectors.cpu().numpy()
    count, width = items.shape
    if count <= FLAT_ITEMS:
        index: Any = faiss.IndexFlatIP(width)
    else:
        num_lists = int(4 * count**0.5)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, num_lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid, index.nprobe = 1, max(8, num_lists // 64)
        index.train(items)
    index.add(items)
    share = -(-count // group.world_size)
    own = np.arange(group.rank * share, (group.rank + 1) * share) % count
    parts = np.array_split(own, -(-share // CHUNK))
    found = np.concatenate([_without_self(index.search(items[part], last + 1)[1], part) for part in parts])
    table = group.gather(torch.from_numpy(found[:, first - 1 : last].astype(np.int32)).to(group.device))
    return table[:count].cpu().numpy()


def _without_self(found: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each row without its own item, or without its last where that is not there."""
    is_self = found == items[:, None]
    is_self[~is_self.any(1), -1] = True
    rest: NDArray[np.int64] = found[~is_self].reshape(len(found), -1)
    return rest
