"""Memory of the feed's blocks, reused once they are gone: fresh pages cost a tenth of decoding into them."""

from collections import deque
from math import prod
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

# Ray holds a block while the next is made.
_BUFFERS_KEPT = 2


class BlockBuffers:
    """Lends memory to one block at a time, from any thread; keeps the last two buffers that came back."""

    def __init__(self) -> None:
        self._free: deque[memoryview] = deque(maxlen=_BUFFERS_KEPT)

    def take(self, shape: tuple[int, ...], dtype: type[np.generic] = np.uint8) -> NDArray[Any]:
        """Return an uninitialised array; its memory is not lent again while any array or table views it."""
        num_bytes = prod(shape) * np.dtype(dtype).itemsize
        try:
            memory = self._free.popleft()
        except IndexError:
            memory = None
        if memory is None or memory.nbytes < num_bytes:
            memory = np.empty(num_bytes, np.uint8).data
        # Every view of this array holds it, and only it holds the memory.
        pixels = np.frombuffer(memory, dtype, prod(shape))
        finalize(pixels, self._free.append, memory).atexit = False
        return pixels.reshape(shape)
