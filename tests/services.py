"""The servers of infra/cluster_demo for tests. That folder is no package, so its file is read where it lies."""

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

_FILE = Path(__file__).parents[1] / "infra/cluster_demo/services.py"


@cache
def services() -> ModuleType:
    """Return infra/cluster_demo/services.py as a module."""
    spec = importlib.util.spec_from_file_location("cluster_demo_services", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
