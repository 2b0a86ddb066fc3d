"""The key-value table of the Ray cluster, which every one of its processes can read and write.

It is a private API of Ray (`ray.experimental.internal_kv`) that only this module uses.
"""

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T", int, str)


@dataclass(frozen=True)
class SharedTable:
    """Values under one key of the table, by name."""

    namespace: str
    key: str

    def put(self, name: str, value: int | str) -> None:
        """Store the value of a name."""
        from ray.experimental.internal_kv import _internal_kv_put

        path, content = f"{self.key}/{name}".encode(), str(value).encode()
        _internal_kv_put(path, content, overwrite=True, namespace=self.namespace.encode())

    def put_first(self, name: str, value: int | str) -> None:
        """Store the value of a name unless it has one: of several processes that do, the first decides."""
        from ray.experimental.internal_kv import _internal_kv_put

        path, content = f"{self.key}/{name}".encode(), str(value).encode()
        _internal_kv_put(path, content, overwrite=False, namespace=self.namespace.encode())

    def get(self, name: str, default: T) -> T:
        """Return the value of a name as the type of `default`, which is returned if there is none."""
        from ray.experimental.internal_kv import _internal_kv_get

        found = _internal_kv_get(f"{self.key}/{name}".encode(), namespace=self.namespace.encode())
        return default if found is None else type(default)(found.decode())
