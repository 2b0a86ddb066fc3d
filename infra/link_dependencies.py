"""Link what `pip install .` without extras would install from this virtual environment into a folder.

    .venv/bin/python infra/link_dependencies.py FOLDER

Follows the requirements of mae-ray through the metadata of installed distributions, with their markers. Each top-level
file or folder of a distribution becomes a symbolic link, so that 5 GB of torch need not be installed twice. Folders
that several distributions share, such as nvidia/, are linked whole.
"""

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

_OURS = "mae-ray"


def required() -> dict[str, metadata.Distribution]:
    """Return the distributions that ours needs without extras, however indirectly, by name; itself not among them."""
    found: dict[str, metadata.Distribution] = {}
    seen, waiting = set[tuple[str, frozenset[str]]](), [(_OURS, frozenset[str]())]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = metadata.distribution(name)
        if name != _OURS:
            found[name] = distribution
        for line in distribution.requires or []:
            needed = Requirement(line)
            asked = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if needed.marker is None or any(map(needed.marker.evaluate, asked)):
                waiting.append((needed.name.lower(), frozenset(needed.extras)))
    return found


def link(distribution: metadata.Distribution, folder: Path) -> None:
    """Link the top-level files and folders of a distribution into a folder."""
    for name in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        place = folder / name
        if not place.is_symlink():
            place.symlink_to(Path(str(distribution.locate_file(name))).resolve())


def main() -> None:
    """Link everything; print the names and versions."""
    folder = Path(sys.argv[1])
    found = required()
    for distribution in found.values():
        link(distribution, folder)
    print("linked:", " ".join(f"{name}=={found[name].version}" for name in sorted(found)))


if __name__ == "__main__":
    main()
