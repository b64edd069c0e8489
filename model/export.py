"""A trained model as plain layer functions: arrays in, arrays out. What inference uses, inside Spark tasks.

Pickles to the stored bytes; whoever first calls a layer imports torch and builds its modules, once per process. Memory:
the model and what a call returns.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import config
from pipeline.contracts.errors import ResourceError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model.layers import Convolution
    from model.pinsage import PinSage

Floats = NDArray[np.float32]
BLOCK, GPU_BLOCK = 1 << 10, 1 << 13
"""Rows of a call on the CPU, whose caches hold them, and on a GPU, which fewer do not keep busy."""
_PIECE = 1 << 16
"""Rows that go to a GPU at a time."""
_TERMS = 1 << 26
"""Products that a GPU has in memory at a time, 12 bytes each at most."""
_WORKING = 2 << 30
"""Bytes of a process's share of a GPU that are left for those, for blocks and for the context."""


class Exported:
    """The layers of a trained PinSage, one call each. A layer counts from 0."""

    def __init__(self, weights: bytes, description: dict[str, Any]) -> None:
        self._weights, self._description = weights, description
        self._threads: int | None = None
        self._precision, self._device, self._sharers = "float32", _cpu, 1
        self.block = BLOCK
        self.num_layers = int(description["model"]["num_layers"])
        shape = description["model"]
        fan_outs = shape.get("fan_outs") or [0] * self.num_layers
        self.list_kinds = tuple(sorted(set(fan_outs)).index(fan_out) for fan_out in fan_outs)
        self.reads = f"{'evenly' if shape['pooling'] == 'mean' else 'by weight'}, {sorted(set(fan_outs))}"
        self.reduction = "max" if description["model"]["pooling"] == "max" else "sum"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_model", "_place")}

    def set_threads(self, threads: int) -> None:
        """CPU threads of torch in every process that uses this, from its first call; sums of floats depend on it."""
        self._threads = threads

    def set_place(self, precision: str, device: Callable[[], str], block: int = BLOCK, sharers: int = 1) -> None:
        """Of the matrix products: float32 or bfloat16, a function that names the device of whoever calls, the rows of
        every call, and how many processes may use a device at once.

        Arrays go there and come back with every call. ResourceError, at the first, if torch does not see the device.
        """
        self._precision, self._device, self.block, self._sharers = precision, device, block, sharers

    def standardise(self, features: NDArray[Any], ids: NDArray[np.integer]) -> Floats:
        """Content vectors [n, F] as stored and the items' ids [n], to the first layer's input [n, d']."""
        return self._run(self._model.standardise, features, ids)

    def project(self, layer: int, h: NDArray[Any]) -> Floats:
        """What items [n, inputs] say to those that have them as neighbours [n, m]."""
        return self._run(self._convolution(layer).project, h)

    def lists(
        self, layer: int, index: NDArray[np.integer], weights: NDArray[np.floating]
    ) -> tuple[NDArray[np.integer], Floats]:
        """The neighbours that a layer reads of lists [n, T], and how much each counts; padding weighs 0."""
        import torch

        with torch.no_grad():
            read, counted = self._convolution(layer).lists(_tensor(index), _tensor(weights))
        return read.numpy(), counted.numpy()

    def hold(self, parts: Sequence[NDArray[Any]]) -> Tensor | None:
        """A layer's messages [R, m], part after part, on the GPU; None if products are made elsewhere, or it is full.

        Every process has its own share of the GPU's memory, for the layer and for what blocks take.
        """
        import torch

        place = self._place
        if place.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(place)
        free += torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        size = sum(part.nbytes for part in parts)
        if not size or size > min(free, total // self._sharers) - _WORKING:
            return None
        whole = [sum(len(part) for part in parts), parts[0].shape[1]]
        try:
            held = torch.empty(whole, dtype=_as_it_is(parts[0]).dtype, device=place)
        except torch.cuda.OutOfMemoryError:  # somebody else was quicker
            return None
        first = 0
        for part in parts:
            for rows in _as_it_is(part).split(_PIECE):
                held[first : first + len(rows)].copy_(rows.pin_memory(), non_blocking=True)
                first += len(rows)
        return held

    def sum_held(self, held: Tensor, index: NDArray[np.integer], weights: NDArray[np.float32], unit: float) -> Tensor:
        """Of lists [n, T] of held rows [R, m] the weighted sums int32 [n, m], in multiples of unit, where they are.

        Every product is rounded by itself, as the CPU's sums do, so they are the same to the last bit.
        """
        import torch

        place = held.device
        lists, shares = (
            _there(_tensor(array), place) for array in (index.astype(np.int32), weights * np.float32(1 / unit))
        )
        sums = torch.empty((len(index), held.shape[1]), dtype=torch.int32, device=place)
        step = max(1, _TERMS // max(1, index.shape[1] * held.shape[1]))
        for first in range(0, len(index), step):
            own = slice(first, first + step)
            terms = torch.mul(held[lists[own].long()], shares[own, :, None]).add_(0.5)
            torch.sum(terms, 1, dtype=torch.int32, out=sums[own])
        return sums

    def scale_held(self, sums: Tensor, unit: float) -> Tensor:
        """The sums [n, m] as float32, with zeros below them up to a block."""
        import torch

        scaled = sums.float().mul_(unit)
        return torch.nn.functional.pad(scaled, (0, 0, 0, self.block - len(scaled)))

    def give_back(self) -> None:
        """Leave the GPU memory that nobody in this process uses to others; torch keeps it else."""
        import torch

        if self._place.type == "cuda":
            torch.cuda.empty_cache()

    def fetch(self, sums: Tensor) -> NDArray[np.int32]:
        """Such sums as an array."""
        fetched: NDArray[np.int32] = sums.cpu().numpy()
        return fetched

    def combine(self, layer: int, h: NDArray[Any], pooled: NDArray[Any] | Tensor) -> Floats:
        """A layer's output [n, d] from items [n, inputs] and what they pooled [n, m], which may be on the GPU."""
        return self._run(self._convolution(layer).combine, h, pooled)

    def head(self, h: NDArray[Any]) -> Floats:
        """Embeddings [n, d] from the last layer's output."""
        return self._run(self._model.head, h)

    def _convolution(self, layer: int) -> Convolution:
        convolution: Convolution = self._model.convolutions[layer]  # type: ignore[assignment]
        return convolution

    @cached_property
    def _model(self) -> PinSage:
        import torch

        if self._threads is not None:
            torch.set_num_threads(self._threads)
        return _built(self._weights, json.dumps(self._description, sort_keys=True), self._place)

    @cached_property
    def _place(self) -> torch.device:
        import torch

        name = self._device()
        place = torch.device(name)
        if place.type == "cuda" and not (place.index or 0) < torch.cuda.device_count():
            raise ResourceError(
                f"{name} is wanted, and torch sees {torch.cuda.device_count()} GPUs here; install a CUDA build of "
                "torch on every executor, or set resources.inference.device: cpu"
            )
        return place

    def _run(self, function: Callable[..., Tensor], *arrays: NDArray[Any] | Tensor) -> Floats:
        import torch

        place, fewer = self._place, self._precision == "bfloat16"
        with torch.no_grad(), torch.autocast(place.type, torch.bfloat16, enabled=fewer):
            tensors = (_there(_tensor(a), place) if isinstance(a, np.ndarray) else a for a in arrays)
            result = function(*tensors).float()
            if place.type == "cuda":  # pinned memory, which torch keeps: 12 ms a call of 100 000 rows in place of 172
                result = torch.empty(result.shape, pin_memory=True).copy_(result)
        made: Floats = result.numpy()
        return made


@lru_cache(maxsize=2)
def _built(weights: bytes, description: str, place: torch.device) -> PinSage:
    """The modules, kept by the process: every task unpickles an Exported of its own, and building takes 20 ms."""
    import safetensors.torch

    from model.pinsage import PinSage

    told = json.loads(description)
    model = PinSage(int(told["num_features"]), config.Model(**told["model"]), num_items=int(told["num_items"]))
    model.load_state_dict(safetensors.torch.load(weights))
    return model.eval().to(place)


def _there(tensor: Tensor, place: torch.device) -> Tensor:
    return tensor if place.type == "cpu" else tensor.pin_memory().to(place, non_blocking=True)


def _cpu() -> str:
    return "cpu"


def load_exported(weights: bytes, description: dict[str, Any]) -> Exported:
    """The model in model.safetensors, as model.json describes it."""
    return Exported(weights, description)


def _as_it_is(array: NDArray[Any]) -> Tensor:
    """The array as a tensor without a copy, float16 too."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def _tensor(array: NDArray[Any]) -> Tensor:
    """The array as a tensor without a copy where torch can use it as it is: float32, int32 or int64."""
    array = np.asarray(array)
    if array.dtype.kind == "f":
        array = np.asarray(array, np.float32)
    elif array.dtype not in (np.int32, np.int64):
        array = array.astype(np.int64)
    return _as_it_is(array)
