"""Parts of a file, read one by one, and the file that they make."""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Parts(Protocol):
    """What pyarrow's files are, too."""

    def size(self) -> int: ...

    def read_at(self, num_bytes: int, offset: int) -> Any: ...


class Ranges:
    """Parts of one file, from any thread; nothing is held but where it is."""

    def __init__(self, parts: Parts, named_errors: Callable[[], AbstractContextManager[None]]) -> None:
        self._parts, self._named_errors = parts, named_errors
        self.num_bytes = parts.size()

    def read(self, offset: int, num_bytes: int) -> bytes:
        """So many bytes from `offset` on. Raises OSError where there are fewer."""
        with self._named_errors():
            return whole(self._parts.read_at(num_bytes, offset), num_bytes)


class RangeFile(io.RawIOBase):
    """A file that is read in sequence or at random, each read a part."""

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
        """So many bytes, fewer only where the file ends, as the parts come: bytes, or a view of what is there."""
        wanted = max(0, self._size - self._position)
        wanted = wanted if size < 0 else min(size, wanted)
        if not wanted:
            return b""
        found = self._parts.read_at(wanted, self._position)
        self._position += wanted
        return found


def whole(content: bytes, num_bytes: int) -> bytes:
    """The content. Raises OSError where it is shorter than it should be."""
    if len(content) != num_bytes:
        raise OSError(f"short body: {len(content)} of {num_bytes} bytes")
    return content
