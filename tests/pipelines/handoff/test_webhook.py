"""A webhook that MLflow itself signs and sends wakes the reconciler; any other is refused."""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mae_core.errors import UserError
from pipelines.handoff.webhook import listening, read_secret
from tests.waiting import REQUEST_DEADLINE_S

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
SECRET = "0123456789abcdef"


@pytest.fixture
def wake() -> threading.Event:
    return threading.Event()


@pytest.fixture
def url(wake: threading.Event) -> Iterator[str]:
    with listening(0, SECRET, wake) as port:
        yield f"http://127.0.0.1:{port}"


def post(url: str, body: bytes, headers: dict[str, str]) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=REQUEST_DEADLINE_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def signed(body: str, secret: str = SECRET, now_s: float | None = None) -> dict[str, str]:
    """Return the headers with which MLflow sends the body."""
    from mlflow.webhooks.delivery import _generate_hmac_signature

    timestamp = str(int(now_s or time.time()))
    signature = _generate_hmac_signature(secret, "id-1", timestamp, body)
    return {"X-MLflow-Delivery-Id": "id-1", "X-MLflow-Timestamp": timestamp, "X-MLflow-Signature": signature}


def send(url: str, secret: str) -> tuple[bool, str]:
    """Let MLflow send a webhook of its own; return whether it succeeded, and what went wrong."""
    from mlflow.entities.webhook import Webhook, WebhookAction, WebhookEntity, WebhookEvent
    from mlflow.webhooks.delivery import test_webhook as deliver

    event = WebhookEvent(WebhookEntity.MODEL_VERSION_ALIAS, WebhookAction.CREATED)
    about = {"webhook_id": "w", "name": "handoff", "creation_timestamp": 0, "last_updated_timestamp": 0}
    result = deliver(Webhook(url=url, events=[event], secret=secret, **about))
    return result.success, result.error_message or ""


def test_what_mlflow_sends_wakes_the_reconciler_once_its_two_variables_are_set(
    url: str, wake: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeeded, said = send(url, SECRET)
    assert not succeeded
    assert "scheme" in said
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "https,http")
    succeeded, said = send(url, SECRET)
    assert not succeeded
    assert "non-public" in said
    assert not wake.is_set()
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    assert send(url, SECRET) == (True, "")
    assert wake.is_set()


def test_a_wrong_signature_an_old_one_and_none_are_refused(url: str, wake: threading.Event) -> None:
    body = '{"entity": "model_version_alias"}'
    good = signed(body)
    refused = [
        signed(body, "another secret of some length"),
        signed(body, now_s=time.time() - 301),
        signed(body, now_s=time.time() + 400),
        good | {"X-MLflow-Timestamp": str(int(time.time()) + 1)},
        good | {"X-MLflow-Delivery-Id": "id-2"},
        good | {"X-MLflow-Timestamp": "-1"},
        good | {"X-MLflow-Signature": "v1,é".encode().decode("latin-1")},
        {name: value for name, value in good.items() if name != "X-MLflow-Signature"},
        {},
    ]
    assert [post(url, body.encode(), headers) for headers in refused] == [401] * len(refused)
    assert post(url, b"{}", good) == 401
    assert not wake.is_set()
    assert post(url, body.encode(), good) == 204
    assert wake.is_set()


def test_a_body_without_length_or_too_large_is_not_read(url: str, wake: threading.Event) -> None:
    assert post(url, b"", {"Content-Length": str(2**21)}) == 413
    assert post(url, b"", {"Content-Length": "x"}) == 411
    assert not wake.is_set()


def test_a_port_that_is_taken_is_named(url: str, wake: threading.Event) -> None:
    with pytest.raises(UserError, match=r"webhook_port \d+ cannot be used"), listening(int(url[-5:]), SECRET, wake):
        pass


def test_the_secret_is_of_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAE_WEBHOOK_SECRET", raising=False)
    with pytest.raises(UserError, match="has 0 characters, fewer than 16; set MAE_WEBHOOK_SECRET"):
        read_secret()
    monkeypatch.setenv("MAE_WEBHOOK_SECRET", SECRET)
    assert read_secret() == SECRET
    (tmp_path / "secret").write_text("of the file, of some length\n")
    monkeypatch.setenv("MAE_WEBHOOK_SECRET_FILE", str(tmp_path / "secret"))
    assert read_secret() == "of the file, of some length"
    monkeypatch.setenv("MAE_WEBHOOK_SECRET_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="cannot be read"):
        read_secret()
