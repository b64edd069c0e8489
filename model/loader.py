"""Shards to batches for one rank; any step of any epoch is found by arithmetic, so training stops and resumes anywhere.

Reads PAIRS, NEIGHBOURS, HARD_NEGATIVES and FEATURES as memory-mapped copies shared by the ranks of a host. Everything
random comes from (seed, epoch, step) and the position in the global batch: one process and any number of ranks see the
same global batches. Memory: `prefetch` batches prepared ahead.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.minibatch import Blocks, Ids, NeighbourTable, build_blocks, distinct, hide
from pipeline.contracts import schemas
from pipeline.contracts.config import CurriculumRow, Settings
from pipeline.contracts.datasets import Manifest, open_manifest
from pipeline.contracts.errors import DataError
from pipeline.contracts.replica import map_lists, map_values, map_vectors
from pipeline.contracts.sharding import rank_bounds, shuffled
from pipeline.contracts.storage import Storage

_SHUFFLE, _NEGATIVES = 2, 3
"""Keep these uses of the seed apart, and apart from the network's initialisation."""


class Position(NamedTuple):
    """Where training stands: the next step to do. Epochs count from 1, steps within an epoch from 0."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Examples:
    """One rank's slice of a global batch, as ids; the negatives are the whole batch's. hard is [b, H], -1 for none."""

    query: Ids
    positive: Ids
    negatives: Ids
    hard: NDArray[np.int64]
    all_query: Ids
    all_positive: Ids


@dataclass(frozen=True)
class Batch:
    """One step's input. The members of the examples are positions among the seeds, which every item has one of."""

    sizes: tuple[int, ...]
    features: Tensor
    index: Tensor
    weights: Tensor
    query: Tensor
    positive: Tensor
    negatives: Tensor
    hard: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; from pinned memory the copy does not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The same batch in memory that a GPU can fetch from by itself."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Any) -> Batch:
        fields = {name: change(value) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return Batch(**fields)


class Loader:
    """The batches of one rank. waited_seconds is how long `batches` kept its caller waiting."""

    def __init__(self, storage: Storage, settings: Settings, rank: int = 0, world_size: int = 1) -> None:
        task, cache = settings.task, settings.resources.cache
        self.seed, self.num_layers, self.rank, self.world_size = task.seed, task.model.num_layers, rank, world_size
        self.prefetch = settings.resources.training.prefetch
        self.manifests = {d.name: open_manifest(storage, d) for d in schemas.TRAIN.reads}
        self.num_items = _check_aligned(self.manifests)
        self.num_pairs = self.manifests[schemas.PAIRS.name].num_rows
        self.global_batch = min(task.training.batch_size, self.num_pairs) // world_size * world_size
        if not self.global_batch:
            raise DataError(
                f"{storage.locate(schemas.PAIRS.name)} has {self.num_pairs} training pairs for {world_size} "
                "ranks, expected at least one each; check task.split and task.pairs, or train with fewer ranks"
            )
        self.steps_per_epoch = self.num_pairs // self.global_batch

        def lists(dataset: schemas.Dataset, column: str) -> list[NDArray[Any]]:
            return [np.asarray(array) for array in map_lists(storage, self.manifests[dataset.name], column, cache)]

        pairs, features = self.manifests[schemas.PAIRS.name], self.manifests[schemas.FEATURES.name]
        self._query = np.asarray(map_values(storage, pairs, "query", cache))
        self._positive = np.asarray(map_values(storage, pairs, "positive", cache))
        self._features = np.asarray(map_vectors(storage, features, "features", cache))
        self._hard_indptr, self._hard = lists(schemas.HARD_NEGATIVES, "negatives")
        indptr, neighbours = lists(schemas.NEIGHBOURS, "neighbours")
        self._table = NeighbourTable.of(indptr, neighbours, lists(schemas.NEIGHBOURS, "weights")[1])
        self._curriculum = task.training.curriculum
        self._pinned = False
        self.waited_seconds = 0.0

    @property
    def num_features(self) -> int:
        """Width of the content vectors."""
        return int(self._features.shape[1])

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of every feature, as the stage `features` measured them."""
        manifest = self.manifests[schemas.FEATURES.name]
        mean, std = manifest.metadata.get("mean"), manifest.metadata.get("std")
        for name, values in (("mean", mean), ("std", std)):
            if not isinstance(values, list) or len(values) != self.num_features:
                raise DataError(
                    f"features: the manifest lacks the {name} of the {self.num_features} features; "
                    "run `pinsage features --force` to build it again"
                )
        return mean, std  # type: ignore[return-value]

    def examples(self, epoch: int, step: int) -> Examples:
        """This rank's examples of a step, and the pairs of the whole global batch."""
        size = self.global_batch
        seed = int(np.random.SeedSequence((self.seed, _SHUFFLE, epoch)).generate_state(1, np.uint64)[0])
        rows = shuffled(np.arange(step * size, (step + 1) * size), self.num_pairs, seed)
        query, positive = self._query[rows], self._positive[rows]
        mine = slice(*rank_bounds(size, self.rank, self.world_size))
        generator = np.random.default_rng(np.random.SeedSequence((self.seed, _NEGATIVES, epoch, step)))
        row = curriculum_row(self._curriculum, epoch)
        negatives = generator.integers(0, self.num_items, row.uniform, dtype=np.uint32)
        chances = generator.random((size, row.hard))
        hard = self._draw_hard(query[mine], chances[mine])
        return Examples(query[mine], positive[mine], negatives, hard, query, positive)

    def _draw_hard(self, query: Ids, chances: NDArray[np.float64]) -> NDArray[np.int64]:
        """One of the query's stored hard negatives per chance in [0, 1), with replacement; -1 if none are stored."""
        starts = self._hard_indptr[query][:, None]
        lengths = self._hard_indptr[query.astype(np.int64) + 1][:, None] - starts
        chosen = np.full(chances.shape, -1, np.int64)
        some = np.broadcast_to(lengths > 0, chances.shape)
        chosen[some] = self._hard[(starts + (chances * lengths).astype(np.int64))[some]]
        return chosen

    def blocks(self, seeds: Ids, query: Ids, positive: Ids) -> Blocks:
        """Blocks of the distinct seeds, in which no pair (query, positive) is seen in either direction."""
        return build_blocks(self._table, seeds, hide(query, positive), self.num_layers)

    def batch(self, epoch: int, step: int) -> Batch:
        """All that a step needs, as tensors."""
        examples = self.examples(epoch, step)
        has_hard = examples.hard >= 0
        groups = (examples.query, examples.positive, examples.negatives, examples.hard[has_hard].astype(np.uint32))
        seeds, places = distinct(np.concatenate(groups), self.num_items)
        query, positive, negatives, some = np.split(places, np.cumsum([len(group) for group in groups[:-1]]))
        hard = np.full(examples.hard.shape, -1, np.int32)
        hard[has_hard] = some
        blocks = self.blocks(seeds, examples.all_query, examples.all_positive)
        features = self._features.take(blocks.ids, axis=0)
        arrays = (features, blocks.index, blocks.weights, query, positive, negatives, hard)
        batch = Batch(blocks.sizes, *[torch.from_numpy(array) for array in arrays])
        return batch.pin() if self._pinned else batch

    def batches(self, start: Position, epochs: int, device: torch.device) -> Iterator[tuple[Position, Batch]]:
        """Batches from a position to the end of the last epoch, prepared ahead by a thread that ends with them."""
        self._pinned = device.type == "cuda"
        positions = self._positions(start, epochs)
        ready: deque[tuple[Position, Future[Batch]]] = deque()
        worker = ThreadPoolExecutor(1, thread_name_prefix="loader")
        try:
            while True:
                while len(ready) < self.prefetch and (position := next(positions, None)) is not None:
                    ready.append((position, worker.submit(self.batch, *position)))
                if not ready:
                    return
                position, future = ready.popleft()
                began = time.perf_counter()
                batch = future.result()
                self.waited_seconds += time.perf_counter() - began
                yield position, batch.to(device)
        finally:
            worker.shutdown(cancel_futures=True)

    def _positions(self, start: Position, epochs: int) -> Iterator[Position]:
        for epoch in range(start.epoch, epochs + 1):
            for step in range(start.step if epoch == start.epoch else 0, self.steps_per_epoch):
                yield Position(epoch, step)


def curriculum_row(curriculum: tuple[CurriculumRow, ...], epoch: int) -> CurriculumRow:
    """The last row that has begun at this epoch."""
    return [row for row in curriculum if row.from_epoch <= epoch][-1]


def _check_aligned(manifests: dict[str, Manifest]) -> int:
    """The number of items, on which features, neighbours and hard negatives must agree."""
    rows = {name: manifest.num_rows for name, manifest in manifests.items() if name != schemas.PAIRS.name}
    if len(set(rows.values())) != 1:
        raise DataError(f"datasets of different catalogues: {rows} rows; run `pinsage run` to bring them up to date")
    return rows[schemas.FEATURES.name]
