"""A proxy before a real S3 server that spoils some of its answers, and `prepare` in this process."""

import contextlib
import http.client
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.waiting import EVENT_DEADLINE_S, let_pass

_SLOW_DOWN = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>'


class Proxy:
    """Answers with the server's answers, but for the share of them that is spoiled."""

    def __init__(self, upstream: str) -> None:
        self.share, self.kinds = 0.0, ("503",)
        self.num_requests = self.num_spoiled = 0
        self.delay_s, self.until_s = 0.0, math.inf
        self.before_request: Callable[[int], object] = lambda number: None
        self._draw, self._lock = random.Random(0), threading.Lock()
        self._upstream = urlsplit(upstream)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self, share: float, *kinds: str) -> None:
        """From now on so many answers are spoiled, and counting begins anew."""
        self.share, self.kinds, self.num_requests, self.num_spoiled = share, kinds, 0, 0
        self.until_s, self.before_request = math.inf, lambda number: None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, method: str) -> str:
        """Count a request, delay it by `delay_s`, and draw the fault of its response; empty for none."""
        with self._lock:
            self.num_requests += 1
            number, spoiled = self.num_requests, self._draw.random() < self.share
            kind = self._draw.choice(self.kinds)
            spoiled &= (kind == "503" or method == "GET") and time.monotonic() < self.until_s
            self.num_spoiled += spoiled
        self.before_request(number)
        let_pass(self.delay_s)
        return kind if spoiled else ""

    def forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list, bytes]:
        connection = http.client.HTTPConnection(
            self._upstream.hostname or "", self._upstream.port, timeout=EVENT_DEADLINE_S
        )
        headers = {name: value for name, value in headers.items() if name.lower() not in ("expect", "content-length")}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.body()
                fault = proxy.fault(self.command)
                if fault == "503":
                    return self.send(503, [("Content-Type", "application/xml")], _SLOW_DOWN, len(_SLOW_DOWN))
                try:
                    status, headers, content = proxy.forward(self.command, self.path, dict(self.headers.items()), body)
                except OSError:
                    self.close_connection = True
                    return None
                length = next((int(v) for k, v in headers if k.lower() == "content-length"), len(content))
                if fault and status in (200, 206) and len(content) > 1:
                    # "short" ends the connection in mid-body, "reset" before any of it.
                    content = content[: len(content) // 2 if fault == "short" else 0]
                    self.close_connection = True
                return self.send(status, headers, content, length)

            def body(self) -> bytes:
                """Read the request's body; pyarrow sends it in chunks."""
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                del self.headers["Transfer-Encoding"]
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                return b"".join(parts)

            def send(self, status: int, headers: list, content: bytes, length: int) -> None:
                with contextlib.suppress(ConnectionError):
                    self.send_response_only(status)
                    for name, value in headers:
                        if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                            self.send_header(name, value)
                    self.send_header("Content-Length", str(length))
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing is printed."""

        for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
            setattr(Handler, f"do_{method}", Handler.answer)
        return Handler


@pytest.fixture
def proxy(own_s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Yield a proxy in front of the S3 server, at the address in AWS_ENDPOINT_URL."""
    proxy = Proxy(own_s3.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    for name, value in (("AWS_ACCESS_KEY_ID", "testkey"), ("AWS_SECRET_ACCESS_KEY", "testsecretkey")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield proxy
    proxy.close()
