"""Read byte ranges of a file, and a file object on top of them."""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Parts(Protocol):
    """A source of byte ranges; pyarrow's files satisfy this protocol."""

    def size(self) -> int: ...

    def read_at(self, num_bytes: int, offset: int) -> Any: ...


class Ranges:
    """Byte ranges of one file, readable from any thread. Holds no data."""

    def __init__(self, parts: Parts, named_errors: Callable[[], AbstractContextManager[None]]) -> None:
        self._parts, self._named_errors = parts, named_errors
        self.num_bytes = parts.size()

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Read exactly `num_bytes` bytes from `offset`. Raises OSError if there are fewer."""
        with self._named_errors():
            return check_length(self._parts.read_at(num_bytes, offset), num_bytes)


class RangeFile(io.RawIOBase):
    """A random-access file; each read is one range request."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._size, self._position = parts, parts.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int = -1) -> Any:
        """Read up to `size` bytes, fewer only at the end of the file; return bytes or a buffer."""
        wanted = max(0, self._size - self._position)
        wanted = wanted if size < 0 else min(size, wanted)
        if not wanted:
            return b""
        found = self._parts.read_at(wanted, self._position)
        self._position += wanted
        return found


def check_length(content: bytes, num_bytes: int) -> bytes:
    """Return the content. Raises OSError if it is not `num_bytes` long."""
    if len(content) != num_bytes:
        raise OSError(f"short body: {len(content)} of {num_bytes} bytes")
    return content
