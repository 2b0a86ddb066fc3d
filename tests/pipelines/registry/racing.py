"""What the processes of the promotion race run: forks of one that has MLflow open, since opening it is slow."""

import os
from functools import cache
from multiprocessing.synchronize import Barrier
from typing import Any

from pipelines.registry import AliasMoved, Decision, Tracking, open_tracking
from tests.waiting import COMMAND_DEADLINE_S

PRELOAD = "MAE_TEST_RACE"
"""Variable of the environment: open MLflow as soon as the fork server imports this module."""


@cache
def opened() -> Tracking:
    return open_tracking("race")


def promote_at_once(version: int, alias: str, number: int, together: Barrier, results: Any) -> None:
    """Read the history, wait until every process has, and promote; report the number and what came of it."""
    tracking = opened()
    # A fork must not use its parent's connections.
    for service in (tracking.client._tracking_client, tracking.client._get_registry_client()):
        service.store.engine.dispose(close=False)
    history, ref = tracking.history("mae-race", alias), tracking.resolve(f"models:/mae-race/{version}")
    together.wait(COMMAND_DEADLINE_S)
    try:
        tracking.move_alias(history, ref, Decision(kind="promote", why=f"process {number}"))
        results.put((number, version, "won"))
    except AliasMoved as told:
        results.put((number, version, str(told)))


if PRELOAD in os.environ:
    opened().client._get_registry_client()
