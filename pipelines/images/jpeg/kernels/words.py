"""Load and store 64-bit big-endian words at any byte, independent of the machine's byte order."""

from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import types

from pipelines.images.compiling import compiler, inlined, pointer

U64 = np.uint64
ZERO = np.int64(0)
"""Initial value of a counter: numba would compile a specialisation for a literal 0."""
compiled = compiler(Path(__file__).parent)
_WORD = ir.IntType(64)


@inlined
def word_at(typing, data, at):
    """Load the 64 bits at byte `at` in one instruction: LLVM does not always merge eight loads and shifts."""

    def build(context, builder, signature, values):
        place = pointer(context, builder, signature.args[0], values[0], values[1], _WORD)
        return builder.bswap(builder.load(place, align=1))

    return types.uint64(data, types.intp), build


@inlined
def store(typing, data, at, word):
    """Store the word in the eight bytes at `at`."""

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
    """Return a word whose first 57 bits are those at bit `at`."""
    return word_at(data, at >> 3) << U64(at & 7)
