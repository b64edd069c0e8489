"""Shards to batches for one rank; any step of any epoch is found by arithmetic, so training stops and resumes anywhere.

Reads PAIRS, NEIGHBOURS, HARD_NEGATIVES, FEATURES and QUESTIONS as memory-mapped copies shared by the ranks of a host.
Everything random comes from (seed, epoch, step) and the position in the global batch: one process and any number of
ranks see the same global batches. Memory: `prefetch` batches prepared ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from model.loss import Members
from model.minibatch import Blocks, Ids, NeighbourTable, build_blocks, distinct, hide, reach
from model.transfer import Batch, Carrier, Kept
from pipeline.contracts import schemas
from pipeline.contracts.config import CurriculumRow, Settings
from pipeline.contracts.datasets import Manifest, open_manifest
from pipeline.contracts.errors import DataError
from pipeline.contracts.replica import map_lists, map_values, map_vectors, padded
from pipeline.contracts.sharding import chances, rank_bounds, shuffled
from pipeline.contracts.storage import Storage

_SHUFFLE, _NEGATIVES, _DROPOUT = 2, 3, 4
"""Keep these uses of the seed apart, and apart from the network's initialisation."""
CPU = torch.device("cpu")
_NOBODY = np.zeros(0, np.int64)


class Position(NamedTuple):
    """Where training stands: the next step to do. Epochs count from 1, steps within an epoch from 0."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Examples:
    """One rank's slice of a global batch, as ids; -1 is nobody. shared are all ranks' candidates, rank after rank."""

    query: Ids
    positive: Ids
    drawn: NDArray[np.int64]
    hard: NDArray[np.int64]
    shared: NDArray[np.int64]
    all_query: Ids
    all_positive: Ids


class Loader:
    """The batches of one rank, on its device; carrier tells what it waited and copied."""

    def __init__(
        self,
        storage: Storage,
        settings: Settings,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device = CPU,
    ) -> None:
        task, cache = settings.task, settings.resources.cache
        self._storage, self._cache = storage, cache
        self.seed, self.rank, self.world_size = task.seed, rank, world_size
        self.prefetch, self._workers = settings.resources.training.prefetch, settings.resources.training.workers
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
        self._widths = reach(task.model.num_layers, task.model.fan_outs, self._table.width)
        self._curriculum, self._exponent = task.training.curriculum, task.training.popularity_exponent
        self._run = task.training.consecutive_pairs
        self._dropout = task.training.neighbour_dropout, task.training.content_dropout
        self.mined: NDArray[np.integer] | None = None
        mean, _ = self.statistics()
        kinds = np.full(self.num_features, "content", object)
        for column in self.manifests[schemas.FEATURES.name].metadata.get("columns", []):
            kinds[column["start"] : column["stop"]] = column["kind"]
        self._degree_columns, self._content_columns = (
            np.flatnonzero(kinds == "degree"),
            np.flatnonzero(kinds != "degree"),
        )
        self._content_means = np.array(mean)[self._content_columns]
        kept_bytes = settings.resources.training.device_features
        kept = Kept(self._features, self._table.neighbours, int(kept_bytes), device) if kept_bytes else None
        self.carrier = Carrier(device, kept)

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
        """This rank's examples of a step, and the pairs and shared negatives of the whole global batch."""
        size, row = self.global_batch, self.row(epoch)
        seed = int(np.random.SeedSequence((self.seed, _SHUFFLE, epoch)).generate_state(1, np.uint64)[0])
        rows = shuffled_runs(np.arange(step * size, (step + 1) * size), self.num_pairs, self._run, seed)
        query, positive = self._query[rows], self._positive[rows]
        generator = np.random.default_rng(np.random.SeedSequence((self.seed, _NEGATIVES, epoch, step)))
        drawn = [generator.integers(0, self.num_items, row.uniform)]
        if row.popular:
            drawn.append(np.searchsorted(self._popularity, generator.random(row.popular), side="right"))
        share = -(-sum(map(len, drawn)) // self.world_size)
        shares = np.full((self.world_size, share), -1, np.int64)
        shares.flat[: row.uniform + row.popular] = np.concatenate(drawn)
        shared = shares
        if row.in_batch:
            shared = np.concatenate([shares, positive.reshape(self.world_size, -1).astype(np.int64)], axis=1)
        mine = slice(*rank_bounds(size, self.rank, self.world_size))
        luck = generator.random((size, row.hard + row.mined))[mine]
        hard = drawn_from(self._hard_indptr, self._hard, query[mine], luck[:, : row.hard])
        if row.mined:
            if self.mined is None:
                raise ValueError("a curriculum row draws mined negatives before any were mined")
            numbers = np.arange(len(self.mined) + 1) * self.mined.shape[1]
            mined = drawn_from(numbers, self.mined.reshape(-1), query[mine], luck[:, row.hard :])
            hard = np.concatenate([hard, mined], axis=1)
        return Examples(query[mine], positive[mine], shares[self.rank], hard, shared.reshape(-1), query, positive)

    @cached_property
    def _frequency(self) -> NDArray[np.float64]:
        """The share of the pairs in which an item is the positive [N]."""
        return np.bincount(self._positive, minlength=self.num_items) / self.num_pairs

    @cached_property
    def _popularity(self) -> NDArray[np.float64]:
        """The running sum of what an item is drawn with as a popular negative [N]."""
        total: NDArray[np.float64] = np.cumsum(self._frequency**self._exponent * (self._frequency > 0))
        total /= total[-1]
        return total

    def log_q(self, row: CurriculumRow, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """log_q of items, see Members."""
        if not (row.popular or row.in_batch):
            return np.zeros(items.shape, np.float32)
        ids, from_batch = items.astype(np.int64), self.global_batch if row.in_batch else 0
        expected = row.uniform / self.num_items + from_batch * self._frequency[ids]
        if row.popular:
            before = np.where(ids > 0, self._popularity[ids - 1], 0.0)
            expected = expected + row.popular * (self._popularity[ids] - before)
        total = row.uniform + row.popular + from_batch
        result: NDArray[np.float32] = np.log(expected * self.num_items / total).astype(np.float32)
        return result

    def blocks(self, seeds: Ids, query: Ids, positive: Ids, alone: NDArray[np.bool_] | None = None) -> Blocks:
        """Blocks of the distinct seeds, in which no pair (query, positive) is seen in either direction."""
        return build_blocks(self._table, seeds, hide(query, positive), self._widths, alone)

    def lists(self, start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Neighbours and weights [n, T] of items start to stop; padding weighs 0."""
        table, rows = self._table, np.arange(start, stop)
        index = padded(table.indptr, table.neighbours, rows, max(1, table.width), np.int32)
        return index, padded(table.indptr, table.weights, rows, max(1, table.width), np.float32)

    def questions(self) -> tuple[Ids, Ids, NDArray[np.int64], Ids]:
        """Query and target of every validation question, and all questions' seen items with their row pointers."""
        manifest = self.manifests[schemas.QUESTIONS.name]
        if not manifest.num_rows:
            nobody = np.zeros(0, np.uint32)
            return nobody, nobody, np.zeros(1, np.int64), nobody
        query, target = (np.asarray(map_values(self._storage, manifest, n, self._cache)) for n in ("query", "target"))
        indptr, seen = map_lists(self._storage, manifest, "seen", self._cache)
        return query, target, np.asarray(indptr), np.asarray(seen)

    def features(self, ids: Ids) -> NDArray[np.floating]:
        """Rows of the features [n, F] as stored."""
        rows = self.carrier.empty((len(ids), self.num_features), self._features.dtype)
        return self._features.take(ids, axis=0, out=rows, mode="clip")  # raise would copy once more

    def batch(self, epoch: int, step: int) -> Batch:
        """All that a step needs, as tensors."""
        examples, row = self.examples(epoch, step), self.row(epoch)
        groups: list[NDArray[np.integer]] = [
            examples.query, examples.positive, examples.drawn, examples.hard.reshape(-1)
        ]  # fmt: skip
        ids = np.concatenate([group.astype(np.int64) for group in groups])
        seeds, places = distinct(np.maximum(ids, 0).astype(np.uint32), self.num_items)
        query, positive, drawn, hard = np.split(places, np.cumsum([len(group) for group in groups[:-1]]))
        seed = (self.seed, _DROPOUT, epoch, step)
        alone, silent = (
            chances((*seed, kind), seeds) < share if share else None for kind, share in enumerate(self._dropout)
        )
        blocks = self.blocks(seeds, examples.all_query, examples.all_positive, alone)
        numbers, kept = blocks.ids.astype(np.int64), self.carrier.kept
        new, mute = (_NOBODY if drawn is None else np.flatnonzero(drawn) for drawn in (alone, silent))
        lacking, slots = (None, None) if kept is None else kept.split(blocks.ids, np.concatenate([new, mute]))
        sent = blocks.ids if lacking is None else blocks.ids[lacking]
        features = self.features(sent)
        for changed, columns, value in (
            (new, self._degree_columns, 0.0),
            (mute, self._content_columns, self._content_means),
        ):
            rows = changed if lacking is None else np.searchsorted(lacking, changed)
            features[rows[:, None], columns] = value
        numbers[new] = -1
        candidates = np.flatnonzero(examples.shared >= 0)
        shared = examples.shared[candidates]
        members = (
            query, positive, drawn, hard.reshape(examples.hard.shape), examples.query.astype(np.int64),
            examples.positive.astype(np.int64), candidates, shared, examples.hard,
            self.log_q(row, examples.positive), self.log_q(row, shared),
        )  # fmt: skip
        inputs, shown = map(torch.from_numpy, (features, numbers))
        index, weights, widths = self.carrier.lists(blocks)
        held = [None if array is None else torch.from_numpy(array) for array in (lacking, slots)]
        who = Members(*map(torch.from_numpy, members))
        batch = Batch(blocks.sizes, inputs, shown, index, weights, who, row, held[0], held[1], widths)
        return self.carrier.prepared(batch)

    def batches(self, start: Position, stop: Position) -> Iterator[tuple[Position, Batch]]:
        """Batches from a position up to another, on the device, prepared ahead by threads that end with them."""
        with ThreadPoolExecutor(self._workers, thread_name_prefix="loader") as worker:
            ready: deque[Future[Batch]] = deque()
            positions = self._positions(start, stop)

            def prepared() -> Iterator[Future[Batch]]:
                for position in islice(positions, self.prefetch):
                    ready.append(worker.submit(self.batch, *position))
                while ready:
                    yield ready.popleft()
                    for position in islice(positions, 1):
                        ready.append(worker.submit(self.batch, *position))

            try:
                yield from zip(self._positions(start, stop), self.carrier.carry(prepared()), strict=True)
            finally:
                worker.shutdown(wait=False, cancel_futures=True)

    def _positions(self, start: Position, stop: Position) -> Iterator[Position]:
        position = start
        while position < stop:
            yield position
            position = self.after(position)

    def after(self, position: Position) -> Position:
        """The step that follows."""
        if self.ends_epoch(position):
            return Position(position.epoch + 1, 0)
        return Position(position.epoch, position.step + 1)

    def ends_epoch(self, position: Position) -> bool:
        """Whether it is the last step of its epoch."""
        return position.step + 1 == self.steps_per_epoch

    def number(self, position: Position) -> int:
        """How many steps come before it."""
        return (position.epoch - 1) * self.steps_per_epoch + position.step

    def row(self, epoch: int) -> CurriculumRow:
        """The negatives of an epoch."""
        return curriculum_row(self._curriculum, epoch)


def curriculum_row(curriculum: tuple[CurriculumRow, ...], epoch: int) -> CurriculumRow:
    """The last row that has begun at this epoch."""
    return [row for row in curriculum if row.from_epoch <= epoch][-1]


def shuffled_runs(places: NDArray[np.int64], total: int, length: int, seed: int) -> NDArray[np.int64]:
    """The pair at each place of an epoch's order: runs of so many consecutive pairs are shuffled, not what is in them.

    Where runs begin is drawn too. If they do not come out even, a few pairs come twice and as many not at all.
    """
    runs, within = np.divmod(places, length)
    rows: NDArray[np.int64] = (shuffled(runs, -(-total // length), seed) * length + within + seed % length) % total
    return rows


def drawn_from(
    indptr: NDArray[np.integer], values: NDArray[np.integer], rows: NDArray[np.integer], chances: NDArray[np.float64]
) -> NDArray[np.int64]:
    """One of each row's values [n, k] for every chance in [0, 1), with replacement; -1 where a row has none."""
    starts = indptr[rows][:, None]
    lengths = indptr[rows.astype(np.int64) + 1][:, None] - starts
    chosen = np.full(chances.shape, -1, np.int64)
    some = np.broadcast_to(lengths > 0, chances.shape)
    chosen[some] = values[(starts + (chances * lengths).astype(np.int64))[some]]
    return chosen


def _check_aligned(manifests: dict[str, Manifest]) -> int:
    """The number of items, on which features, neighbours and hard negatives must agree."""
    others = (schemas.PAIRS.name, schemas.QUESTIONS.name)
    rows = {name: manifest.num_rows for name, manifest in manifests.items() if name not in others}
    if len(set(rows.values())) != 1:
        raise DataError(f"datasets of different catalogues: {rows} rows; run `pinsage run` to bring them up to date")
    return rows[schemas.FEATURES.name]
