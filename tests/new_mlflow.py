"""An empty MLflow for a test: a copy of one file, since MLflow needs 1 to 2 s of CPU to make its tables."""

import tempfile
from functools import cache
from pathlib import Path


def new_mlflow(folder: Path) -> str:
    """Put an empty `mlflow.db` into an existing folder that has none; return its URI."""
    path = folder / "mlflow.db"
    if not path.exists():
        path.write_bytes(_empty())
    return f"sqlite:///{path}"


@cache
def _empty() -> bytes:
    """Return the content of a file that MLflow made, once in each process of the tests."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix="mae-mlflow-") as folder:
        path = Path(folder) / "mlflow.db"
        assert MlflowClient(f"sqlite:///{path}").search_experiments()
        return path.read_bytes()
