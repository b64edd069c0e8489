"""Weighted rows added up sixteen numbers at a time, in vectors as wide as the processor has.

What LLVM makes of the plain loop uses half of an AVX-512 register; the same sums take three quarters of the time so.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba.extending import intrinsic

LANES, ROWS = 16, 4
"""Numbers, and rows, of one call."""


def _generate_add(typing_context: Any, sums: Any, place: Any, rows: Any, places: Any, weights: Any) -> Any:
    """sums[place:place + 16] += the integers below weight x value + 1/2, of values rows[p:p + 16], for four p.

    sums is int32 [n], rows float32 [n] or the bits of float16; places and weights are tuples of four. The caller
    answers for it that all of these numbers are there.
    """
    signature = numba.types.void(sums, place, rows, places, weights)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        data = [context.make_array(kind)(context, builder, arguments[k]).data for k, kind in ((0, sums), (2, rows))]
        integers, floats = ir.VectorType(ir.IntType(32), LANES), ir.VectorType(ir.FloatType(), LANES)
        is_half = rows.dtype == numba.types.uint16
        stored = ir.VectorType(ir.HalfType(), LANES) if is_half else floats
        half = ir.Constant(floats, [0.5] * LANES)

        def address(of: int, at: Any, kind: Any) -> Any:
            return builder.bitcast(builder.gep(data[of], [at]), kind.as_pointer())

        def spread(value: Any) -> Any:
            nothing = ir.Constant(floats, ir.Undefined)
            first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(first, nothing, ir.Constant(integers, [0] * LANES))

        target = address(0, arguments[1], integers)
        total = builder.load(target, align=sums.dtype.bitwidth // 8)
        for row in range(ROWS):
            at, weight = (builder.extract_value(arguments[k], row) for k in (3, 4))
            values = builder.load(address(1, at, stored), align=rows.dtype.bitwidth // 8)
            values = builder.fpext(values, floats) if is_half else values
            rounded = builder.fptosi(builder.fadd(builder.fmul(values, spread(weight)), half), integers)
            total = builder.add(total, rounded)
        builder.store(total, target, align=sums.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return signature, generate


add_lanes: Any = intrinsic(_generate_add)
