"""What compiled kernels share: mixing of bits, for hashes and counter-based random numbers, and arrays of one type."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2 ** 64 / golden ratio: its multiples are spread evenly over 64 bits."""


@numba.njit(cache=True, nogil=True, inline="always")
def mix(value: Any) -> Any:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), a bijection: every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def read_only(array: NDArray[Any], dtype: Any = None) -> NDArray[Any]:
    """A read-only, contiguous view of an array, or a copy if its type has to change.

    Arrow's arrays are read-only, numpy's are not: one type is one compilation.
    """
    view = np.ascontiguousarray(array, dtype).view(np.ndarray)
    if view.flags.writeable:
        view = view[:]
        view.flags.writeable = False
    return view
