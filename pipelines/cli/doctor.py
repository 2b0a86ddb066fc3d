"""`mae doctor`: which Ray, MLflow, storage and device a command would use here, and whether each answers.

Also what `auto` chooses in compute options, and what would bound a training step.
"""

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from pipelines.cluster import machine, ray_address
from pipelines.config import PretrainConfig
from pipelines.machine import num_cores
from pipelines.registry import open_tracking
from pipelines.runs.automatic import choose, describe_compute
from pipelines.storage import open_storage

_PACKAGES = ("torch", "timm", "ray", "mlflow", "pyarrow", "boto3")
_TIMEOUT_S = 5.0


def doctor() -> dict[str, Any]:
    """Check each part: what would be used, whether it answers, and the remedy if it does not."""
    checks: dict[str, Callable[[], str]] = {
        "python": lambda: sys.version.split()[0],
        "packages": lambda: ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
        "device": _device,
        "auto": _automatic,
        "step": _step,
        "ray": _ray,
        "mlflow": _mlflow,
        "storage": _storage,
    }
    found = {name: _attempt(check) for name, check in checks.items()}
    lines = [f"{'ok  ' if part['ok'] else 'FAIL'}  {name:<9} {part['says']}" for name, part in found.items()]
    return {"ok": all(part["ok"] for part in found.values()), **found, "text": "\n".join(lines)}


def _attempt(check: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"ok": True, "says": check()}
    except (OSError, ValueError, RuntimeError) as error:
        return {"ok": False, "says": " ".join(str(error).split())}


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{len(names)} GPU(s): {', '.join(sorted(set(names)))}; bfloat16 {torch.cuda.is_bf16_supported()}"
    return f"no GPU; {num_cores()} CPU cores, so choose small models"


def _automatic() -> str:
    _ray()
    config, here = PretrainConfig(), machine()
    return f"a run gets {describe_compute(config, choose(config, here), here)}"


def _step() -> str:
    from pipelines.cli.step_bound import step_bound

    if ray_address():
        return "not measured: the nodes of a cluster train, not this machine"
    config, here = PretrainConfig(), machine()
    return step_bound(config, choose(config, here), here)


def _ray() -> str:
    address = ray_address()
    if not address:
        return "embedded, started by each command; set RAY_ADDRESS to use a cluster"
    if address in ("auto", "local"):
        return f"RAY_ADDRESS={address}: the cluster that this machine belongs to"
    place = urlsplit(address if "//" in address else f"//{address}")
    try:
        socket.create_connection((place.hostname or "", place.port or 10001), timeout=_TIMEOUT_S).close()
    except OSError as error:
        raise OSError(f"RAY_ADDRESS={address} does not answer ({error}); start it, or unset RAY_ADDRESS") from None
    return f"cluster at {address} answers"


def _mlflow() -> str:
    tracking = open_tracking("mae")
    return f"{tracking.shown} answers; look at it with: {tracking.ui_command}"


def _storage() -> str:
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(folder)
        storage.write("probe", b"x")
        assert storage.read("probe") == b"x", "a folder returns what was written to it"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        return "folders work; s3:// goes to AWS unless AWS_ENDPOINT_URL names another endpoint"
    place = urlsplit(endpoint)
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname or "", port), timeout=_TIMEOUT_S).close()
    except OSError as error:
        raise OSError(f"AWS_ENDPOINT_URL={endpoint} does not answer ({error}); start it or correct the URL") from None
    return f"folders work; s3:// goes to {endpoint}, which answers"
