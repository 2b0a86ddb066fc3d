"""Compiled functions, and 64 bits at a time read from bytes and written to them, whatever the machine's order."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np import arrayobj

U64 = np.uint64
ZERO = np.int64(0)
"""A count's first value: of a plain 0 numba compiles a case of its own."""

_SOURCES = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
_STAMP = hashlib.sha256(_SOURCES).hexdigest()[:16]


# What an intrinsic takes is not what its function takes, which begins with the typing context.
_inlined: Any = intrinsic


def compiled(function: Callable[..., Any]) -> Any:
    """The function compiled at its first call, kept beside its file or in the user's cache for later processes.

    What would take seconds to compile (arrays made, slices assigned) is left to the callers or to loops.
    """
    # Numba keeps a function under its name until its own file changes; those that it calls are in others.
    function.__qualname__ += f"_{_STAMP}"
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        # No folder that can be written to: each process compiles.
        return numba.njit(nogil=True)(function)


@_inlined
def word_at(typing, data, at):
    """The 64 bits from that byte on, in one load: of eight loads and shifts LLVM makes that only where it is simple."""

    def build(context, builder, signature, values):
        pointer = _pointer(context, builder, signature, values)
        return builder.bswap(builder.load(pointer, align=1))

    return types.uint64(data, types.intp), build


@_inlined
def store(typing, data, at, word):
    """The word becomes the eight bytes from there on."""

    def build(context, builder, signature, values):
        pointer = _pointer(context, builder, signature, values)
        builder.store(builder.bswap(values[2]), pointer, align=1)
        return context.get_dummy_value()

    return types.void(data, types.intp, types.uint64), build


@_inlined
def leading_ones(typing, word):
    def build(context, builder, signature, values):
        return builder.ctlz(builder.not_(values[0]), ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), build


def _pointer(context, builder, signature, values):
    array = arrayobj.make_array(signature.args[0])(context, builder, values[0])
    return builder.bitcast(builder.gep(array.data, [values[1]]), ir.IntType(64).as_pointer())


@compiled
def bits_at(data, at):
    """A word whose first 57 bits are those from bit `at` on."""
    return word_at(data, at >> 3) << U64(at & 7)
