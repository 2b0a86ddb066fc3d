"""Retry MLflow requests through outages; raise other errors at once."""

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from mae_core.errors import UserError

log = logging.getLogger(__name__)

RETRY_LIMIT_S = 300.0
"""Default time for which a request is retried before an outage becomes an error."""
_LONGEST_PAUSE_S = 10.0

T = TypeVar("T")


class TrackingUnreachable(ConnectionError, UserError):
    """MLflow does not respond. Also a UserError, because only the user can fix it."""


def is_outage(error: Exception) -> bool:
    """Return whether the same request may succeed later: no connection, a timeout, a locked database, 429 or 5xx."""
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, MlflowException):
        # MLflow reports every error without a code as INTERNAL_ERROR (500): only HTTP responses can be an outage.
        is_remote = isinstance(error, RestException) or str(error).startswith("API request to")
        status = error.get_http_status_code()
        return error.error_code == "TEMPORARILY_UNAVAILABLE" or (is_remote and (status >= 500 or status in (408, 429)))
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError)


def retry(action: Callable[[], T], what: str, limit_s: float = RETRY_LIMIT_S) -> T:
    """Call the action until it succeeds, retrying outages for up to `limit_s`; return its result.

    `what` names the subject in messages. Raises TrackingUnreachable at the deadline, and any other error of the action
    at once.
    """
    deadline_s, pause_s = time.monotonic() + limit_s, 0.5
    while True:
        try:
            return action()
        except Exception as error:
            if not is_outage(error):
                raise
            if time.monotonic() + pause_s > deadline_s:
                raise TrackingUnreachable(
                    f"MLflow did not respond for {limit_s:g} s, so {what} was not recorded; start it and rerun the "
                    f"same command ({first_line(error)})"
                ) from error
            log.warning("MLflow does not respond; retrying %s in %.0f s: %s", what, pause_s, first_line(error))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 200 characters and without credentials, for a log."""
    return without_credentials((str(error).strip() or type(error).__name__).splitlines()[0])[:200]


def without_credentials(text: str) -> str:
    """Return the text without the user and password of any URL in it."""
    return re.sub(r"//[^/@\s]*@", "//", text)
