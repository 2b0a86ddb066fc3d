"""`mae rollback`: return an alias to the version that it pointed to before, by the recorded history."""

from typing import Any

from mae_core.errors import UserError
from pipelines import registry
from pipelines.config import RollbackConfig


def rollback(name: str, config: RollbackConfig) -> dict[str, Any]:
    """Point the alias to the version before, whose files are verified first; return both versions.

    Raises UserError if there is none, if it was deleted or altered, or if somebody else moved the alias meanwhile.
    """
    registry.check_why(config.why)
    tracking = registry.open_tracking(config.experiment)
    history = tracking.history(name.removeprefix("models:/").partition("@")[0], config.to)
    in_use = history.in_use
    if len(in_use) < 2:
        now = f"points to version {history.version}, its first" if history.version else "does not exist"
        raise UserError(f"{history.shown} {now}, so there is no version to return to; see `mae lineage`")
    ref = tracking.resolve(f"models:/{history.name}/{in_use[-2]}")
    tracking.verify(ref)
    moved = tracking.move_alias(history, ref, registry.Decision(kind="rollback", why=config.why))
    return {
        "model": ref.uri,
        "alias": config.to,
        "before": f"models:/{history.name}/{history.version}",
        "by": moved.moves[-1].by,
        "at": moved.moves[-1].at,
        "text": f"{moved.shown} returned from version {history.version} to {ref.version}",
    }
