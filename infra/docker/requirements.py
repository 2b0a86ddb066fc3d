"""Print the dependencies of a pyproject.toml with extras: `python requirements.py pyproject.toml [EXTRA ...]`."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]

extras = project.get("optional-dependencies", {})
print("\n".join([*project["dependencies"], *(line for extra in sys.argv[2:] for line in extras[extra])]))
