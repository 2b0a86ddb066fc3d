"""Memory of the feed's rows, used again once they are gone: fresh pages cost a tenth of decoding into them."""

from collections import deque
from math import prod
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

# Ray holds a row while the next is made.
_ROWS_KEPT = 2


class RowMemory:
    """Lends memory to one row at a time, from any thread; keeps that of the last two that came back."""

    def __init__(self) -> None:
        self._free: deque[memoryview] = deque(maxlen=_ROWS_KEPT)

    def take(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Pixels of that shape with anything in them; nobody else's until no array and no table views them."""
        num_bytes = prod(shape)
        try:
            memory = self._free.popleft()
        except IndexError:
            memory = None
        if memory is None or memory.nbytes < num_bytes:
            memory = np.empty(num_bytes, np.uint8).data
        # Every view of this array holds it, and only it holds the memory.
        pixels = np.frombuffer(memory, np.uint8, num_bytes)
        finalize(pixels, self._free.append, memory).atexit = False
        return pixels.reshape(shape)
