"""Files of infra/ for tests. That folder is no package, so they are read where they lie."""

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

_INFRA = Path(__file__).parents[1] / "infra"


@cache
def infra_module(path: str) -> ModuleType:
    """Return a file of infra/ as a module, such as "validate.py"."""
    spec = importlib.util.spec_from_file_location(f"infra_{Path(path).stem}", _INFRA / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # Its folder is where Python finds its neighbours, as it does for a script.
        patch.syspath_prepend(str((_INFRA / path).parent))
        spec.loader.exec_module(module)
    return module


def services() -> ModuleType:
    """Return the servers of infra/cluster_demo."""
    return infra_module("cluster_demo/services.py")


def processes() -> ModuleType:
    """Return how infra/cluster_demo finds and ends processes."""
    return infra_module("cluster_demo/processes.py")


def skip_without_postgres() -> None:
    """Skip the test with a sentence if Postgres is not installed."""
    if not has_postgres():
        pytest.skip("needs Postgres; try apt-get install postgresql (infra/system_packages.sh)")


def has_postgres() -> bool:
    """Return whether Postgres is installed."""
    try:
        return bool(services().postgres_program("initdb")) and bool(services().postgres_program("postgres"))
    except FileNotFoundError:
        return False
