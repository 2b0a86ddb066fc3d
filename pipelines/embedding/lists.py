"""Lists of names that `mae prepare --exclude` takes: one a line."""

import logging
from collections.abc import Sequence

from pipelines.storage import Storage

log = logging.getLogger(__name__)


def write_list(target: Storage, name: str, sources: Sequence[str]) -> int:
    """Write the names; return their number. A name that contains a line break is left out with a warning."""
    kept = [source for source in sources if "\n" not in source and not source.endswith("\r")]
    if len(kept) < len(sources):
        log.warning("%d names contain line breaks and are left out of %s", len(sources) - len(kept), target.join(name))
    target.write(name, "".join(f"{source}\n" for source in kept).encode())
    return len(kept)
