"""Process group start and end; the only reader of rank and world size.

Started by torchrun, a process is one rank of several: gloo on CPUs, NCCL on GPUs. Started by plain python it is alone
and nothing here communicates. Ranks take the same decisions from the same facts; one that fails all the same ends, and
torchrun ends the others.
"""

from __future__ import annotations

import os
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from pipeline.contracts.config import TrainingResources
from pipeline.contracts.errors import ResourceError

MEETING_SECONDS = 600
"""How long ranks wait for each other at the start: hosts of a cluster do not start together."""


@dataclass(frozen=True)
class Group:
    """This process among those that train together, and the device it computes on."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over the ranks in every backward pass."""
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
            return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def means(self, values: Tensor) -> list[float]:
        """The means of the ranks' values [n]; a collective call."""
        total = values.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        found: list[float] = (total / self.world_size).tolist()
        return found

    def gather(self, rows: Tensor) -> Tensor:
        """The ranks' rows [n, d] one behind the other [ranks * n, d]; gradients find their way back. Collective."""
        if self.world_size == 1:
            return rows
        gathered: Tensor = _Gather.apply(rows, self.rank, self.world_size)
        return gathered

    def from_first(self, data: bytes | None) -> bytes | None:
        """The first rank's bytes, on every rank; a collective call."""
        box = [data]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums what every rank's loss says of these rows.

    DDP takes the mean of the ranks' gradients afterwards: the whole is the gradient of the mean of their losses.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.start, ctx.stop = rank * len(rows), (rank + 1) * len(rows)
        gathered = rows.new_empty(world_size * len(rows), *rows.shape[1:])
        dist.all_gather(list(gathered.chunk(world_size)), rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].clone()  # it may be another node's, too
        dist.all_reduce(total)
        return total[ctx.start : ctx.stop], None, None


def world() -> tuple[int, int]:
    """This process's rank and the number of ranks, before any group is started."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def start(resources: TrainingResources) -> Iterator[Group]:
    """Join the group that torchrun made, or be alone; leave it at the end.

    Sets the threads of this process. Raises ResourceError if the
    device is not there.
    """
    rank, world_size = world()
    device = _choose_device(resources.device)
    torch.set_num_threads(resources.threads)
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if world_size == 1:
        yield Group(device=device)
        return
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_fresh(store, rank, world_size), rank=rank, world_size=world_size)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ResourceError(
            f"rank {rank} of {world_size} cannot meet the others at {place}: {error}; "
            "start all ranks with torchrun, and set resources.training.master_port to a free port if this one is taken"
        ) from error
    try:
        yield Group(rank, world_size, device)
    finally:
        dist.destroy_process_group()


def _fresh(store: Store, rank: int, world_size: int) -> Store:
    """A part of the store that this start of the ranks has to itself.

    torchrun starts ranks again beside the same store, where the addresses of those that died still stand, and a rank
    that reads them before they are written anew gives up. The first rank opens a part under a name of its own and
    lists in it who came; another rank goes in when it finds itself on the list. Raises RuntimeError if not all come.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + MEETING_SECONDS
    if rank == 0:
        store.set("leader", own)
        others = [f"{own}/{other}" for other in range(1, world_size)]
        store.wait(others, timedelta(seconds=MEETING_SECONDS))
        store.set(f"{own}/all", ",".join(store.get(other).decode() for other in others))
        return PrefixStore(own, store)
    while time.monotonic() < deadline:
        if store.check(["leader"]):
            leader = store.get("leader").decode()
            store.set(f"{leader}/{rank}", own)
            if store.check([f"{leader}/all"]) and own in store.get(f"{leader}/all").decode():
                return PrefixStore(leader, store)
        time.sleep(0.05)
    raise RuntimeError(f"the first rank has not come within {MEETING_SECONDS} s")


def _choose_device(wanted: str) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ResourceError("resources.training.device is cuda, but torch sees no GPU here; set it to cpu or auto")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise ResourceError(
            f"local rank {number} has no GPU: this host has {torch.cuda.device_count()}; "
            "start at most one rank per GPU, or set resources.training.device to cpu"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device
