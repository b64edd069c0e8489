"""Batches to the device while it computes: copies on a stream of their own, features of the commonest items kept there.

On a CPU nothing is copied. On a GPU batches come in pinned memory; at most AHEAD of them are on the device before
their turn, so that what waits takes bounded memory. Memory on the device: the kept features, and those batches.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from model.loss import Members
from model.minibatch import Blocks
from pipeline.contracts.config import CurriculumRow

AHEAD = 2
COUNTED_ENTRIES = 1 << 24
"""Neighbours that are counted, at most, to find the commonest items."""


@dataclass(frozen=True)
class Batch:
    """One step's input: blocks as tensors, and who is who among the seeds, of which every item is one.

    features are of all nodes, or, with places, of those nodes alone whose features are not kept on the device: places
    are these nodes' numbers, and slots [nodes] where the others' features are kept. index and weights are as in
    Blocks, or, with widths, hop after hop without what fills rows up: hop h's rows have widths[h] entries.
    """

    sizes: tuple[int, ...]
    features: Tensor
    ids: Tensor
    index: Tensor
    weights: Tensor
    members: Members
    row: CurriculumRow
    places: Tensor | None = None
    slots: Tensor | None = None
    widths: tuple[int, ...] = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        changed: dict[str, Any] = {name: change(part) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, members=Members(*map(change, self.members)), **changed)

    def filled_up(self) -> Batch:
        """The batch with index and weights as in Blocks."""
        rows = [size - inner for inner, size in pairwise((0, *reversed(self.sizes[1:])))]

        def whole(entries: Tensor) -> Tensor:
            hops = entries.split([count * width for count, width in zip(rows, self.widths, strict=True)])
            shaped = (hop.view(-1, width) for hop, width in zip(hops, self.widths, strict=True))
            return torch.cat([F.pad(hop, (0, max(self.widths) - hop.shape[1])) for hop in shaped])

        return replace(self, index=whole(self.index), weights=whole(self.weights), widths=())


class Kept:
    """The features of the items that are most often a neighbour, on the device, up to so many bytes.

    Memory here: 4 bytes an item of the catalogue.
    """

    def __init__(
        self, features: NDArray[Any], neighbours: NDArray[np.uint32], num_bytes: int, device: torch.device
    ) -> None:
        row_bytes = features.shape[1] * features.dtype.itemsize
        ids = commonest(neighbours, len(features), num_bytes // max(1, row_bytes))
        self._features = torch.from_numpy(features[ids]).to(device)
        self._slots = np.full(len(features), -1, np.int32)
        self._slots[ids] = np.arange(len(ids))

    def __len__(self) -> int:
        return len(self._features)

    def split(self, ids: NDArray[np.uint32], own: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(places, slots) of a batch's nodes; the nodes of the numbers own are sent, whatever is kept."""
        slots = self._slots.take(ids).astype(np.int64)
        slots[own] = -1
        return np.flatnonzero(slots < 0), np.maximum(slots, 0)

    def whole(self, batch: Batch) -> Batch:
        """The batch, on the device, with the features of all its nodes."""
        assert batch.places is not None
        assert batch.slots is not None
        features = self._features.index_select(0, batch.slots).index_copy_(0, batch.places, batch.features)
        return replace(batch, features=features, places=None, slots=None)


def commonest(neighbours: NDArray[np.uint32], num_items: int, most: int) -> NDArray[np.uint32]:
    """Up to so many items that are in the most lists, ascending; of long tables an evenly spread part is counted."""
    counts = np.zeros(num_items, np.int32)
    _count(neighbours, max(1, -(-len(neighbours) // COUNTED_ENTRIES)), counts)
    most = min(most, int(np.count_nonzero(counts)))
    found = np.argpartition(counts, num_items - most)[num_items - most :] if most else np.zeros(0, np.int64)
    return np.sort(found).astype(np.uint32)


@njit(nogil=True, cache=True)
def _count(neighbours: NDArray[np.uint32], step: int, counts: NDArray[np.int32]) -> None:
    for k in range(0, len(neighbours), step):
        counts[neighbours[k]] += 1


def _used_by(stream: torch.cuda.Stream, tensor: Tensor) -> Tensor:
    """The tensor, whose memory is not given away before the stream is through with it."""
    tensor.record_stream(stream)
    return tensor


class Carrier:
    """Hands prepared batches over to the device, in order.

    waited_seconds is how long the device had nothing to compute on: on a CPU how long the caller was kept waiting, on
    a GPU the time between the end of a step and the arrival of the next batch. copied_seconds is the time of copying,
    on a GPU beside the computing.
    """

    def __init__(self, device: torch.device, kept: Kept | None = None) -> None:
        self.device, self.kept = device, kept or None  # there may be room for none
        self.waited_seconds = self.copied_seconds = 0.0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array that the device can fetch by itself: what is written there need not be copied for it again."""
        if self._stream is None:
            return np.empty(shape, dtype)
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=kind, pin_memory=True).numpy()

    def lists(self, blocks: Blocks) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """A batch's index, weights and widths: as short as they can be, where they are sent."""
        if self._stream is None or not blocks.hops or not all(hop.index.size for hop in blocks.hops):
            return torch.from_numpy(blocks.index), torch.from_numpy(blocks.weights), ()
        total = sum(hop.index.size for hop in blocks.hops)
        index, weights = self.empty((total,), np.int32), self.empty((total,), np.float32)
        np.concatenate([hop.index.reshape(-1) for hop in blocks.hops], out=index)
        np.concatenate([hop.weights.reshape(-1) for hop in blocks.hops], out=weights)
        return torch.from_numpy(index), torch.from_numpy(weights), tuple(hop.index.shape[1] for hop in blocks.hops)

    def prepared(self, batch: Batch) -> Batch:
        """The batch as the device can fetch it by itself; may run in any thread."""
        return batch if self._stream is None else batch.map(Tensor.pin_memory)

    def carry(self, batches: Iterator[Future[Batch]]) -> Iterator[Batch]:
        """Every batch on the device, whole. What is done with one must be queued before the next is asked for."""
        return self._wait(batches) if self._stream is None else self._copy(batches, self._stream)

    def _moved(self, batch: Batch) -> Batch:
        moved = batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
        moved = moved.filled_up() if moved.widths else moved
        return moved if self.kept is None else self.kept.whole(moved)

    def _wait(self, batches: Iterator[Future[Batch]]) -> Iterator[Batch]:
        for future in batches:
            began = time.perf_counter()
            batch = future.result()
            arrived = time.perf_counter()
            batch = self._moved(batch)
            self.waited_seconds += arrived - began
            self.copied_seconds += time.perf_counter() - arrived
            yield batch

    def _copy(self, batches: Iterator[Future[Batch]], stream: torch.cuda.Stream) -> Iterator[Batch]:
        """Events mark when each copy begins and ends, and when each step can begin and has ended."""
        current = torch.cuda.current_stream(self.device)
        ended: torch.cuda.Event | None = None
        queued: deque[tuple[Batch, tuple[torch.cuda.Event, ...]]] = deque()
        for future in batches:
            sent = future.result()  # its memory must not be used again before the copy has ended
            if len(queued) == AHEAD:
                self._account(queued.popleft()[1])
            copying, copied, ready, done = (torch.cuda.Event(enable_timing=True) for _ in range(4))
            with torch.cuda.stream(stream):
                copying.record(stream)
                batch = self._moved(sent)
                copied.record(stream)
            current.wait_event(copied)
            ready.record(current)
            batch.map(partial(_used_by, current))
            yield batch
            done.record(current)
            queued.append((sent, (copying, copied, ended or ready, ready, done)))
            ended = done
        while queued:
            self._account(queued.popleft()[1])

    def _account(self, events: tuple[torch.cuda.Event, ...]) -> None:
        """Wait for a step to end, and add up what it waited and copied."""
        copying, copied, before, ready, done = events
        done.synchronize()
        self.copied_seconds += copying.elapsed_time(copied) / 1e3
        self.waited_seconds += before.elapsed_time(ready) / 1e3
