"""`mae registry prune`: list or delete versions that neither an alias, a rollback nor a lineage needs."""

from typing import Any

from pipelines import registry
from pipelines.config import PruneConfig


def prune(config: PruneConfig) -> dict[str, Any]:
    """List what nothing needs and, with `config.delete`, delete it; return both lists and why others are kept."""
    tracking = registry.open_tracking(config.experiment)
    found = tracking.find_garbage(config.name, keep=config.keep, older_than_days=config.older_than_days)
    deleted = [garbage.id for garbage in found.garbage if config.delete and tracking.delete_garbage(garbage)]
    shown = [_line(garbage, is_deleted=garbage.id in deleted) for garbage in found.garbage]
    said = (
        f"{len(deleted)} of {len(shown)} deleted" if config.delete else f"{len(shown)} to delete; add --delete to do it"
    )
    return {
        "garbage": [garbage.id for garbage in found.garbage],
        "deleted": deleted,
        "kept": found.needed,
        "text": "\n".join([*shown, f"{said}; {len(found.needed)} versions are needed"]),
    }


def _line(garbage: registry.Garbage, *, is_deleted: bool) -> str:
    what = garbage.id if garbage.ref else f"upload {garbage.id}, which never became a version"
    return f"{'deleted' if is_deleted else 'not needed'}: {what}"
