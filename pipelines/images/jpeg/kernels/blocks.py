"""Walk all blocks of a scan: find their positions and DC coefficients; rewrite them with other restart markers."""

from pipelines.images.jpeg.kernels.codes import DAMAGED, EOI, SPARE_BYTES, block_end, close, copy, dc_code, put, read_dc
from pipelines.images.jpeg.kernels.words import U64, ZERO, bits_at, compiled

RST0 = 0xD0


@compiled
def walk(data, first_bits, num_mcus, plan, tables, starts, dc_stops, stops, dc, last):
    """Record every block's start, the end of its DC code, its end, and its DC coefficient; return False if damaged.

    Segment i has the bits from first_bits[i] to first_bits[i + 1] and ends with less than a byte of padding. `plan`
    lists component and table rows of an MCU's blocks. `last` is a buffer for three numbers.
    """
    block = ZERO
    for segment in range(len(num_mcus)):
        at, stop = first_bits[segment], first_bits[segment + 1]
        last[0] = last[1] = last[2] = 0
        for _ in range(num_mcus[segment]):
            for place in range(len(plan)):
                if at >= stop:
                    return False
                component = plan[place, 0]
                starts[block] = at
                taken, difference = read_dc(tables[plan[place, 1]], bits_at(data, at))
                last[component] += difference
                dc[block], dc_stops[block] = last[component], at + taken
                at = block_end(data, at + taken, stop, tables[plan[place, 2]])
                if taken == 0 or at == DAMAGED:
                    return False
                stops[block] = at
                block += 1
        if stop - at >= 8:
            return False
    return True


@compiled
def rewrite(data, plan, tables, dc_stops, stops, dc, interval, out, offsets, last):
    """Write the blocks to `out` with a restart marker every `interval` MCUs, and their offsets to `offsets`.

    Returns the length, or DAMAGED if a DC difference has no code.
    """
    waiting, num_waiting, out_at = U64(0), ZERO, ZERO
    for mcu in range(len(dc) // len(plan)):
        if mcu % interval == 0:
            if mcu:
                out_at = close(out, out_at, waiting, num_waiting, RST0 + (mcu // interval - 1) % 8)
                waiting, num_waiting = U64(0), ZERO
            offsets[mcu // interval] = out_at
            last[0] = last[1] = last[2] = 0
        for place in range(len(plan)):
            block, component = mcu * len(plan) + place, plan[place, 0]
            if out_at + (stops[block] - dc_stops[block] >> 2) + SPARE_BYTES > len(out):
                return DAMAGED
            code, length = dc_code(tables[plan[place, 1]], dc[block] - last[component])
            if length == 0:
                return DAMAGED
            last[component] = dc[block]
            out_at, waiting, num_waiting = put(out, out_at, waiting, num_waiting, code, length)
            out_at, waiting, num_waiting = copy(data, dc_stops[block], stops[block], out, out_at, waiting, num_waiting)
    return close(out, out_at, waiting, num_waiting, EOI)
