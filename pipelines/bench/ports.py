"""Free ports of loopback for servers that start a moment later: benchmarks, the cluster demo and tests.

A port is taken from a range of its own, since another process could take it before the server does: Ray's workers use
10,002 to 19,999, and Linux gives outgoing connections a port from 32,768 on.
"""

import secrets
import socket

StorePorts = dict[str, int]
"""Port of each service of the S3 store: s3, master, volume and filer."""

_given: set[int] = set()
"""Ports that this process has given away; their servers may not have started yet."""


def free_port() -> int:
    """Return a port between 23,000 and 29,999 that nobody listens on."""
    while True:
        port = 23_000 + secrets.randbelow(7_000)
        if _take(port):
            return port


def free_store_ports(*more: str) -> StorePorts:
    """Return a port for each service of the S3 store, and for `more`, such that it and its gRPC port are free.

    SeaweedFS takes the gRPC port of a service 10,000 above it. Both lie between those of Ray and of Linux.
    """
    found: StorePorts = {}
    for name in ("s3", "master", "volume", "filer", *more):
        while name not in found:
            port = 20_000 + secrets.randbelow(2_700)
            if _is_free(port + 10_000) and _take(port):
                found[name] = port
    return found


def _take(port: int) -> bool:
    """Return whether the port was neither given away nor in use; it counts as given away from now on."""
    if port in _given or not _is_free(port):
        return False
    _given.add(port)
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as server:
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
