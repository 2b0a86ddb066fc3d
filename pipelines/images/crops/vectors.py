"""SIMD on eight int32, for which numba has no type: two pixels of four channels, or one pixel of two lines."""

from pathlib import Path

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from pipelines.images.compiling import compiler, inlined, pointer

compiled = compiler(Path(__file__).parent)


class Eight(types.Type):
    """Eight int32 in one register."""

    def __init__(self) -> None:
        super().__init__(name="Eight")


_eight = Eight()


def _vector(bits: int, count: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(bits), count)


_NUMBERS = _vector(32, 8)


@register_model(Eight)
class _EightModel(models.PrimitiveModel):
    def __init__(self, manager, eight):
        super().__init__(manager, eight, _NUMBERS)


@inlined
def eight(typing, number):
    """Broadcast a number to all eight lanes."""

    def build(context, builder, signature, values):
        first = builder.insert_element(ir.Constant(_NUMBERS, ir.Undefined), values[0], ir.Constant(ir.IntType(32), 0))
        return _picked(builder, first, [0] * 8)

    return _eight(types.int32), build


@inlined
def plus_products(typing, total, pairs, at, weights):
    """Add to `total` the products of the eight int16 pairs at pairs[at] with the pairs of weights."""

    def build(context, builder, signature, values):
        place = pointer(context, builder, signature.args[1], values[1], values[2], _vector(16, 16))
        factors = builder.load(place, align=4), builder.bitcast(values[3], _vector(16, 16))
        # Written this way, LLVM compiles the rest to one instruction where the machine has it (vpmaddwd).
        products = builder.mul(*(builder.sext(factor, _vector(32, 16)) for factor in factors))
        lower, upper = (_picked(builder, products, range(first, 16, 2)) for first in (0, 1))
        return builder.add(values[0], builder.add(lower, upper))

    return _eight(_eight, pairs, types.intp, _eight), build


@inlined
def to_bytes(typing, numbers, bits):
    """Divide by 2**bits, rounding down, and clamp to 0..255."""

    def build(context, builder, signature, values):
        found = builder.ashr(values[0], values[1])
        for sign, limit in ((">", 0), ("<", 255)):
            limits = ir.Constant(_NUMBERS, [limit] * 8)
            found = builder.select(builder.icmp_signed(sign, found, limits), found, limits)
        return found

    return _eight(_eight, _eight), build


@inlined
def widen(typing, data, at, out, out_at):
    """Expand two adjacent RGB pixels to three channel pairs and a fourth, unused one.

    Reads two bytes beyond the pixels.
    """

    def build(context, builder, signature, values):
        place = pointer(context, builder, signature.args[0], values[0], values[1], _vector(8, 8))
        pairs = _picked(builder, builder.load(place, align=1), (0, 3, 1, 4, 2, 5, 2, 5))
        target = pointer(context, builder, signature.args[2], values[2], values[3], _vector(16, 8))
        builder.store(builder.zext(pairs, _vector(16, 8)), target, align=4)
        return context.get_dummy_value()

    return types.void(data, types.intp, out, types.intp), build


@inlined
def store_pairs(typing, out, first_at, second_at, lower, upper):
    """Pack `lower` and `upper` into pairs; store four at each of two positions."""

    def build(context, builder, signature, values):
        pairs = builder.or_(values[3], builder.shl(values[4], ir.Constant(_NUMBERS, [16] * 8)))
        _store_halves(context, builder, signature, values, pairs, 32, 4)
        return context.get_dummy_value()

    return types.void(out, types.intp, types.intp, _eight, _eight), build


@inlined
def store_pixels(typing, out, first_at, second_at, numbers):
    """Store four bytes at each of two positions."""

    def build(context, builder, signature, values):
        _store_halves(context, builder, signature, values, builder.trunc(values[3], _vector(8, 8)), 8, 1)
        return context.get_dummy_value()

    return types.void(out, types.intp, types.intp, _eight), build


def _store_halves(context, builder, signature, values, vector, bits, align):
    for half in (0, 1):
        place = pointer(context, builder, signature.args[0], values[0], values[1 + half], _vector(bits, 4))
        builder.store(_picked(builder, vector, range(4 * half, 4 * half + 4)), place, align=align)


def _picked(builder, vector, places):
    mask = ir.Constant(_vector(32, len(places)), list(places))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)
