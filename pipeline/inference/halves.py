"""float16 to float32 and back by the processor's own conversions, many at once: numpy's go one by one."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.extending import intrinsic
from numpy.typing import NDArray

from pipeline.mixing import read_only

_INFINITE = 0x7C00
"""The exponent of what is no number or infinite, as float16 has it."""


def as_single(array: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers of any shape as float32."""
    if array.dtype != np.float16:
        return array.astype(np.float32, copy=False)
    result = np.empty(array.shape, np.float32)
    _widen(read_only(array).view(np.uint16).reshape(-1), result.reshape(-1))
    return result


def as_half(array: NDArray[np.float32]) -> tuple[NDArray[np.float16], bool]:
    """float32 numbers as float16, rounded to the nearest, and whether all of them are finite then."""
    result = np.empty(array.shape, np.float16)
    largest = _narrow(read_only(array).reshape(-1), result.view(np.uint16).reshape(-1))
    return result, int(largest) < _INFINITE


def _generate_widened(typing_context: Any, value: Any) -> Any:
    """A float32, or the bits of a float16 as one."""
    signature = numba.types.float32(value)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        if value == numba.types.float32:
            return arguments[0]
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return signature, generate


def _generate_narrowed(typing_context: Any, value: Any) -> Any:
    """The bits of a float32 rounded to a float16."""
    signature = numba.types.uint16(numba.types.float32)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return signature, generate


widened: Any = intrinsic(_generate_widened)
narrowed: Any = intrinsic(_generate_narrowed)


@numba.njit(nogil=True, cache=True)
def _widen(values: Any, out: Any) -> None:
    for k in range(len(values)):
        out[k] = widened(values[k])


@numba.njit(nogil=True, cache=True)
def _narrow(values: Any, out: Any) -> Any:
    """Also the largest exponent of them."""
    largest = np.uint16(0)
    for k in range(len(values)):
        bits = narrowed(values[k])
        out[k] = bits
        largest = max(largest, np.uint16(bits & np.uint16(0x7C00)))
    return largest
