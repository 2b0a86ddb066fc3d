"""Enforce shapes in signatures, keep tests away from the user's MLflow and Ray, and deal them to processes."""

import logging
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)

# A shell's script ignores SIGINT in what it starts in the background, and commands that tests start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from jaxtyping import install_import_hook

# Installed before anything imports mae_core; it stays installed, since modules load as tests need them.
install_import_hook("mae_core", "beartype.beartype")

SHARED_RAY = "ray4"
"""Fixture of the Ray session that many tests share: they all run in one process."""


@pytest.fixture(autouse=True)
def own_logging() -> None:
    """Undo what the code of other tests, of fixtures and of libraries did to logging.

    Whatever hides a message from `caplog` is undone: a logger of ours that is disabled, filters, has a level or no
    longer propagates, as in a rank, and a level of the root logger, which all others inherit.
    """
    logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    for name, ours in list(logging.Logger.manager.loggerDict.items()):
        if name.partition(".")[0] in ("pipelines", "tune", "mae_core") and isinstance(ours, logging.Logger):
            ours.setLevel(logging.NOTSET)
            ours.disabled, ours.propagate, ours.handlers, ours.filters = False, True, [], []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests by file for pytest-xdist, those of the shared Ray together, and start the slow groups first.

    A file's tests share fixtures, so one process runs them all. The order of groups decides how well two processes
    share the work: a slow group that starts last would run alone.
    """
    group_of = {item: _group(item) for item in items}
    slow = {group for item, group in group_of.items() if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (group_of[item] != SHARED_RAY, group_of[item] not in slow))
    for item, group in group_of.items():
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to run in several processes if pytest-xdist does not see the groups: fixtures would be made in each."""
    if "PYTEST_XDIST_WORKER" in os.environ and session.config.getoption("loadgroup"):
        ungrouped = [item.nodeid for item in session.items if "@" not in item.nodeid]
        assert not ungrouped, f"pytest-xdist ignores the group of {ungrouped[0]}: check the versions of both"


def _group(item: pytest.Item) -> str:
    return SHARED_RAY if SHARED_RAY in getattr(item, "fixturenames", ()) else item.location[0]
