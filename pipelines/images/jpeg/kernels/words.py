"""64 bits at a time read from bytes and written to them, whatever the machine's order."""

from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import types

from pipelines.images.compiling import compiler, inlined, pointer

U64 = np.uint64
ZERO = np.int64(0)
"""A count's first value: of a plain 0 numba compiles a case of its own."""
compiled = compiler(Path(__file__).parent)
_WORD = ir.IntType(64)


@inlined
def word_at(typing, data, at):
    """The 64 bits from that byte on, in one load: of eight loads and shifts LLVM makes that only where it is simple."""

    def build(context, builder, signature, values):
        place = pointer(context, builder, signature.args[0], values[0], values[1], _WORD)
        return builder.bswap(builder.load(place, align=1))

    return types.uint64(data, types.intp), build


@inlined
def store(typing, data, at, word):
    """The word becomes the eight bytes from there on."""

    def build(context, builder, signature, values):
        place = pointer(context, builder, signature.args[0], values[0], values[1], _WORD)
        builder.store(builder.bswap(values[2]), place, align=1)
        return context.get_dummy_value()

    return types.void(data, types.intp, types.uint64), build


@inlined
def leading_ones(typing, word):
    def build(context, builder, signature, values):
        return builder.ctlz(builder.not_(values[0]), ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), build


@compiled
def bits_at(data, at):
    """A word whose first 57 bits are those from bit `at` on."""
    return word_at(data, at >> 3) << U64(at & 7)
