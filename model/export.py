"""A trained model as plain layer functions: arrays in, arrays out. What inference uses, inside Spark tasks.

Pickles to the stored bytes; torch's modules are built once per process. Memory: the model and what a call returns;
`pool` adds one block of gathered rows where the layer is not float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.layers import Convolution
from model.pinsage import PinSage
from pipeline.contracts import config

Floats = NDArray[np.float32]
BLOCK_BYTES = 64 << 20
"""At most about this much is gathered at a time when a stored layer has to be converted."""


class Exported:
    """The layers of a trained PinSage, one call each. A layer counts from 0."""

    def __init__(self, weights: bytes, description: dict[str, Any]) -> None:
        self._weights, self._description = weights, description
        self._threads: int | None = None
        self.num_layers = int(description["model"]["num_layers"])
        self._pads = description["model"]["pooling"] == "max"  # by a copy, which must not be one of the whole layer

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_model"}

    def set_threads(self, threads: int) -> None:
        """CPU threads of torch in every process that uses this; sums of floats depend on it."""
        self._threads = threads
        torch.set_num_threads(threads)

    def standardise(self, features: NDArray[Any], ids: NDArray[np.integer]) -> Floats:
        """Content vectors [n, F] as stored and the items' ids [n], to the first layer's input [n, d']."""
        return self._run(self._model.standardise, features, ids)

    def project(self, layer: int, h: NDArray[Any]) -> Floats:
        """What items [n, inputs] say to those that have them as neighbours [n, m]."""
        return self._run(self._convolution(layer).project, h)

    def pool(
        self, layer: int, projected: NDArray[Any], index: NDArray[np.integer], weights: NDArray[np.floating]
    ) -> Floats:
        """What lists [n, T] pool from rows of a projected layer [N, m], by index and weights; padding weighs 0.

        projected may be a memory map of the whole layer: only the rows named are read.
        """
        pool = self._convolution(layer).pool
        if projected.dtype == np.float32 and not self._pads:
            return self._run(pool, projected, index, weights)
        rows = max(1, BLOCK_BYTES // (4 * projected.shape[1] * max(1, index.shape[1])))
        parts = []
        for start in range(0, len(index), rows):
            needed, local = np.unique(index[start : start + rows], return_inverse=True)
            gathered = projected[needed].astype(np.float32)
            local = local.reshape(-1, index.shape[1])
            parts.append(self._run(pool, gathered, local, weights[start : start + rows]))
        return np.concatenate(parts) if parts else np.zeros((0, projected.shape[1]), np.float32)

    def combine(self, layer: int, h: NDArray[Any], pooled: NDArray[Any]) -> Floats:
        """A layer's output [n, d] from items [n, inputs] and what they pooled [n, m]."""
        return self._run(self._convolution(layer).combine, h, pooled)

    def head(self, h: NDArray[Any]) -> Floats:
        """Embeddings [n, d] from the last layer's output."""
        return self._run(self._model.head, h)

    def _convolution(self, layer: int) -> Convolution:
        convolution = self._model.convolutions[layer]
        assert isinstance(convolution, Convolution)
        return convolution

    @cached_property
    def _model(self) -> PinSage:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        model = PinSage(
            int(self._description["num_features"]),
            config.Model(**self._description["model"]),
            num_items=int(self._description["num_items"]),
        )
        model.load_state_dict(safetensors.torch.load(self._weights))
        return model.eval()

    def _run(self, function: Callable[..., Tensor], *arrays: NDArray[Any]) -> Floats:
        with torch.no_grad():
            result: Floats = function(*map(_tensor, arrays)).numpy()
        return result


def load_exported(weights: bytes, description: dict[str, Any]) -> Exported:
    """The model in model.safetensors, as model.json describes it."""
    return Exported(weights, description)


def _tensor(array: NDArray[Any]) -> Tensor:
    """The array as a tensor without a copy where torch can use it as it is: float32, int32 or int64."""
    array = np.asarray(array)
    if array.dtype.kind == "f":
        array = np.asarray(array, np.float32)
    elif array.dtype not in (np.int32, np.int64):
        array = array.astype(np.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
