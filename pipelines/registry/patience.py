"""Outages of MLflow are waited out; mistakes are not."""

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from mae_core.errors import UserError

log = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""How long a request is repeated before an outage becomes an error."""
_LONGEST_PAUSE_S = 10.0

T = TypeVar("T")


class TrackingUnreachable(ConnectionError, UserError):
    """MLflow does not answer. A UserError too, since the remedy is the user's."""


def is_outage(error: Exception) -> bool:
    """Whether the same request may succeed later: no connection, a timeout, a locked database, 429 or 5xx."""
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, MlflowException):
        # MLflow calls every error without a code of its own an internal one: only what came over a wire can be outage.
        wire = isinstance(error, RestException) or str(error).startswith("API request to")
        status = error.get_http_status_code()
        return error.error_code == "TEMPORARILY_UNAVAILABLE" or (wire and (status >= 500 or status in (408, 429)))
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError)


def patiently(action: Callable[[], T], what: str, patience_s: float = PATIENCE_S) -> T:
    """What the action returns, repeated through an outage of up to `patience_s`.

    Raises TrackingUnreachable after that, and any other error of the action at once.
    """
    deadline_s, pause_s = time.monotonic() + patience_s, 0.5
    while True:
        try:
            return action()
        except Exception as error:
            if not is_outage(error):
                raise
            if time.monotonic() + pause_s > deadline_s:
                raise TrackingUnreachable(
                    f"MLflow did not answer for {patience_s:g} s, so that {what} is not recorded; start it and run the "
                    f"same command again ({first_line(error)})"
                ) from error
            log.warning("MLflow does not answer; %s is tried again in %.0f s: %s", what, pause_s, first_line(error))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def first_line(error: Exception) -> str:
    """The beginning of an error's message, fit for one line of a log."""
    return without_credentials((str(error).strip() or type(error).__name__).splitlines()[0])[:200]


def without_credentials(text: str) -> str:
    """The text with user and password taken out of the addresses in it."""
    return re.sub(r"//[^/@\s]*@", "//", text)
