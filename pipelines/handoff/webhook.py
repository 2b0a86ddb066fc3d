"""Listen on loopback for MLflow's webhooks, whose only effect is that the reconciler looks at once.

A webhook is signed as MLflow 3.17 does: base64 of HMAC-SHA256 over "ID.TIMESTAMP.BODY" with the webhook's secret.
Nothing in its body is used: what is to be trained is read from MLflow.
"""

import base64
import hashlib
import hmac
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mae_core.errors import UserError

log = logging.getLogger(__name__)

SECRET, SECRET_FILE = "MAE_WEBHOOK_SECRET", "MAE_WEBHOOK_SECRET_FILE"
_SIGNATURE, _TIMESTAMP, _DELIVERY = "X-MLflow-Signature", "X-MLflow-Timestamp", "X-MLflow-Delivery-Id"
_OLDEST_S = 300.0
"""Age from which a signed webhook is refused, since somebody may have recorded it."""
_MAX_BYTES = 2**20
_REQUEST_TIMEOUT_S = 10.0
_MIN_SECRET_CHARS = 16


def read_secret() -> str:
    """Return the secret of the environment. Raises UserError if there is none, or if it is short."""
    file = os.environ.get(SECRET_FILE, "")
    try:
        secret = Path(file).read_text().strip() if file else os.environ.get(SECRET, "")
    except OSError as error:
        raise UserError(f"{SECRET_FILE} {file} cannot be read ({error.strerror}); check path and mode") from None
    if len(secret) < _MIN_SECRET_CHARS:
        raise UserError(
            f"the webhook's secret has {len(secret)} characters, fewer than {_MIN_SECRET_CHARS}; set {SECRET} or "
            f"{SECRET_FILE} to what the webhook was created with, such as the output of `openssl rand -hex 32`"
        )
    return secret


def is_genuine(secret: str, headers: Callable[[str], str | None], body: bytes, now_s: float) -> bool:
    """Return whether the request was signed with the secret within the last five minutes."""
    id, timestamp, signature = (headers(name) or "" for name in (_DELIVERY, _TIMESTAMP, _SIGNATURE))
    if not timestamp.isdecimal() or abs(now_s - int(timestamp)) > _OLDEST_S:
        return False
    signed = f"{id}.{timestamp}.".encode() + body
    digest = base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()
    return hmac.compare_digest(f"v1,{digest}".encode(), signature.encode())


@contextmanager
def listening(port: int, secret: str, wake: threading.Event) -> Iterator[int]:
    """Set `wake` for each genuine webhook while the block runs; yield the port, a free one for 0.

    Raises UserError if the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = _REQUEST_TIMEOUT_S

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > _MAX_BYTES:
                self._answer(413 if length.isdecimal() else 411)
            elif is_genuine(secret, self.headers.get, self.rfile.read(int(length)), time.time()):
                log.info("a webhook of MLflow arrived: looking now")
                wake.set()
                self._answer(204)
            else:
                log.warning("a webhook with a wrong signature, or of more than five minutes ago, was refused")
                self._answer(401)

        def _answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            log.debug(format, *args)

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(f"webhook_port {port} cannot be used ({error.strerror}); try another") from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="webhooks", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
