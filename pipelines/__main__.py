"""Entry point of `mae` and of `python -m pipelines`. Imports the standard library alone until the extra is found."""

import shlex
import sys
from importlib.util import find_spec

from pipelines.interrupts import first_signal, handle_signals

PIPELINE_MODULES = (
    "boto3",
    "faiss",
    "matplotlib",
    "mlflow",
    "numba",
    "PIL",
    "prometheus_client",
    "psutil",
    "pyarrow",
    "pydantic",
    "yaml",
    "ray",
    "rich",
    "sklearn",
    "scipy",
    "simplejpeg",
    "torchvision",
    "tyro",
)
"""Top-level module of each requirement of the extra `pipeline`, in the order of pyproject.toml."""


def main() -> None:
    """Run the command line; without the extra, name the pip command that installs it and exit with status 2."""
    handle_signals()
    try:
        _refuse_missing()
        from pipelines.cli import main as run
    except KeyboardInterrupt:
        again = shlex.join(["mae", *sys.argv[1:]])
        print(f"mae: stopped before it began; to start it again: {again}", file=sys.stderr)
        sys.exit(128 + first_signal())
    run()


def _refuse_missing() -> None:
    missing = [name for name in PIPELINE_MODULES if find_spec(name) is None]
    if missing:
        print(
            f"mae: {', '.join(missing)} missing, which the extra `pipeline` brings; "
            "run pip install '.[pipeline]' in a clone of the repository",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
