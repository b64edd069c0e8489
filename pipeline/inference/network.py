"""What a trained network is to inference: array functions; and how they are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Lists = tuple[NDArray[np.integer], NDArray[np.float32]]
"""Neighbour ids and their weights, [n, T] each; padding weighs 0."""


class Network(Protocol):
    """The trained model as array functions; must pickle, as Spark ships it to its tasks."""

    num_layers: int
    block: int
    """Rows of every call. A product's last bits may depend on how many rows it has: with always as many, the last of a
    shard filled up with zeros, an item's vector is the same in whatever company it is made. (Not of models narrower
    than any in use: MKL was seen to round products of fewer than 12 columns by the row's place.)"""
    reduction: str
    """How a neighbourhood becomes one message: `sum`, weighted, or `max`, column by column."""
    list_kinds: tuple[int, ...]
    """For every layer a number: layers of the same number read the same lists."""
    reads: str
    """How lists are read, in words: networks of the same words read them alike."""

    def standardise(self, features: Array, ids: NDArray[np.integer]) -> Array:
        """Content vectors [n, F] to the first layer's input [n, F]."""

    def project(self, layer: int, hidden: Array) -> Array:
        """What an item [n, d] says to those that have it as neighbour [n, m]; not negative."""

    def lists(self, layer: int, index: NDArray[np.integer], weights: NDArray[np.float32]) -> Lists:
        """The neighbours that a layer reads, and how much each counts: of lists [n, T], up to as many columns."""

    def hold(self, parts: Sequence[Array]) -> Any:
        """A layer's messages, part after part, where a GPU makes the products and has room for them; else None."""

    def sum_held(self, held: Any, index: NDArray[np.integer], weights: NDArray[np.float32], unit: float) -> Any:
        """Of lists [n, T] of held rows the sums that `sums.add_rows` makes, int32 [n, m], to the last bit; there."""

    def scale_held(self, sums: Any, unit: float) -> Any:
        """As `sums.scaled`, of sums that are there, with zeros below them up to a block."""

    def give_back(self) -> None:
        """Leave the GPU memory that nobody here uses to others."""

    def fetch(self, sums: Any) -> NDArray[np.int32]:
        """Such sums as an array."""

    def combine(self, layer: int, hidden: Array, pooled: Any) -> Array:
        """An item's next vector [n, d] from its own [n, d'] and its neighbours' scaled sums [n, m], here or there."""

    def head(self, hidden: Array) -> Array:
        """The embedding [n, d] of the last layer's output."""


def in_blocks(function: Callable[[slice], Any], count: int, size: int) -> Any:
    """What function makes of one block of rows after the other, each of size rows: one array or a tuple, joined."""
    made: list[Array] = []
    result: Any = ()
    for start in range(0, max(count, 1), size):
        result = function(slice(start, start + size))
        results = result if isinstance(result, tuple) else (result,)
        made = made or [np.empty((count, *part.shape[1:]), part.dtype) for part in results]
        for whole, part in zip(made, results, strict=True):
            whole[start : start + size] = part[: count - start]
    return tuple(made) if isinstance(result, tuple) else made[0]


def filled(rows: Array, size: int) -> Array:
    """The rows, with zeros below them up to size."""
    if len(rows) == size:
        return rows
    result = np.zeros((size, *rows.shape[1:]), rows.dtype)
    result[: len(rows)] = rows
    return result
