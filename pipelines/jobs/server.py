"""Ray's job server behind a few functions whose errors say what to do. Importing this module does not import Ray."""

import os
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mae_core.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

Status = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
_VARIABLE = "RAY_API_SERVER_ADDRESS"
_REQUEST_TIMEOUT_S = 60.0
_OUTAGE_LIMIT_S = 120.0
_STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "40"}
"""How long a job may take to end after the SIGTERM of a stop: for compute.grace_s and the end. Ray's default is 3 s."""
_lock = threading.Lock()


class JobServerUnreachable(UserError, ConnectionError):
    """The job server does not answer, or refuses the token."""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """What the server knows of one job."""

    id: str
    """Submission id."""
    status: Status
    command: str
    message: str
    exit_status: int | None
    """Of the command; None while it runs, and if it never ran."""
    start_s: float | None
    end_s: float | None
    metadata: dict[str, str]

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


def job_server_address(given: str = "") -> str:
    """Return the address given, else that of RAY_API_SERVER_ADDRESS, else of RAY_ADDRESS; empty without any."""
    return given or os.environ.get(_VARIABLE, "") or os.environ.get("RAY_ADDRESS", "")


def open_job_server(address: str = "") -> "JobServer":
    """Connect to Ray's job server.

    Raises UserError if no address is known, and JobServerUnreachable if it does not answer or refuses the token.
    """
    found = job_server_address(address)
    if not found:
        raise UserError("no cluster is known; give --address http://HOST:8265, or set RAY_ADDRESS")
    client_class = _client_class()
    # Ray takes the variable even if an address is given.
    with _named_errors(found), _environment(found):
        return JobServer(client_class(found), found)


class JobServer:
    """A job server that answers. Create it with `open_job_server`."""

    def __init__(self, client: "JobSubmissionClient", address: str) -> None:
        self._client, self.address = client, address

    def submit(
        self,
        command: str,
        *,
        id: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> str | None:
        """Submit a shell command; return its submission id, or None if the server has had a job with that id.

        The server takes each id once, whoever submits it. Unless `runtime_env` says otherwise, a stopped job is killed
        after 40 s. Raises UserError if the working directory is too large.
        """
        environment = dict(runtime_env or {})
        environment["env_vars"] = _STOP_WAIT | environment.get("env_vars", {})
        try:
            with _named_errors(self.address):
                return self._client.submit_job(
                    entrypoint=command,
                    submission_id=id,
                    runtime_env=environment,
                    metadata=dict(metadata or {}),
                )
        except RuntimeError as error:
            if id is not None and "already exists" in str(error):
                return None
            raise UserError(f"Ray's job server refuses the job: {_first_line(error)}; correct it") from error
        except ValueError as error:
            raise UserError(f"the job cannot be submitted: {' '.join(str(error).split())}; correct it") from error

    def find(self, id: str) -> JobRecord | None:
        """Return what the server knows of the job; None if it has none with that id."""
        try:
            with _named_errors(self.address):
                return _record(self._client.get_job_info(id))
        except RuntimeError as error:
            if "status code 404" in str(error):
                return None
            raise JobServerUnreachable(f"Ray's job server fails: {_first_line(error)}; see the head's log") from error

    def jobs(self) -> list[JobRecord]:
        """Return all submitted jobs, the newest last."""
        with _named_errors(self.address):
            found = [_record(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda record: record.start_s or 0)

    def stop(self, id: str) -> bool:
        """Ask the job to stop; return False if it has ended. Raises UserError if there is none with that id."""
        if self.find(id) is None:
            raise UserError(f"the cluster at {self.address} has no job {id!r}; `mae jobs` lists them")
        with _named_errors(self.address):
            return self._client.stop_job(id)

    def tail(self, id: str) -> AsyncIterator[str]:
        """Yield the job's log from its beginning, until the job ends or the connection drops, which may raise."""
        return self._client.tail_job_logs(id)

    def find_through_outage(self, id: str) -> JobRecord | None:
        """Return what `find` does, asking again for two minutes if the server does not answer."""
        end_s = time.monotonic() + _OUTAGE_LIMIT_S
        while True:
            try:
                return self.find(id)
            except JobServerUnreachable:
                if time.monotonic() > end_s:
                    raise
                time.sleep(1)


def _client_class() -> "type[JobSubmissionClient]":
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's client sets no timeout: a server that hangs would hang us too."""

        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": _REQUEST_TIMEOUT_S, **kwargs})

    return Client


def _record(details: "JobDetails") -> JobRecord:
    return JobRecord(
        id=details.submission_id or "",
        status=details.status.value,  # pyright: ignore[reportArgumentType] -- its values are those of Status
        command=details.entrypoint,
        message=details.message or "",
        exit_status=details.driver_exit_code,
        start_s=details.start_time / 1000 if details.start_time else None,
        end_s=details.end_time / 1000 if details.end_time else None,
        metadata=dict(details.metadata or {}),
    )


@contextmanager
def _named_errors(address: str) -> Iterator[None]:
    """Name the server and the remedy if it does not answer or refuses the token."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise JobServerUnreachable(
            f"Ray at {address} refuses the token ({_first_line(error)}); set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise JobServerUnreachable(
            f"Ray's job server at {address} does not answer ({_first_line(error)}); check --address and RAY_ADDRESS, "
            "which name the dashboard's port, such as http://HOST:8265"
        ) from error


@contextmanager
def _environment(address: str) -> Iterator[None]:
    # One at a time, or what one thread set would be restored by another.
    with _lock:
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = address
        try:
            yield
        finally:
            os.environ.pop(_VARIABLE)
            if before is not None:
                os.environ[_VARIABLE] = before


def _first_line(error: BaseException) -> str:
    """Return the error's last sentence: the server sends tracebacks."""
    text = str(error).replace("\\n", "\n").strip().rstrip(".\"}'")
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
