"""Ports of servers: none twice, none of Ray's or of Linux' outgoing connections, none in use."""

import itertools
import socket
from pathlib import Path

import pytest

from pipelines.bench.ports import free_port, free_store_ports

RAY_WORKERS_END = 20_000


def test_no_port_is_given_twice_nor_lies_where_others_take_theirs() -> None:
    first_of_linux = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [free_port() for _ in range(300)]
    for _ in range(20):
        found = free_store_ports("admin")
        assert sorted(found) == ["admin", "filer", "master", "s3", "volume"]
        ports += [*found.values(), *(port + 10_000 for port in found.values())]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= RAY_WORKERS_END
    assert max(ports) < max(first_of_linux, 32_768)


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as server:
        used = server.getsockname()[1] - 23_000
        draws = itertools.chain([used], range(7_000))
        monkeypatch.setattr("secrets.randbelow", lambda _: next(draws))
        assert free_port() != used + 23_000
