"""A driver that delivers the metrics of a run folder to MLflow until it is killed.

python -m tests.pipelines.registry.delivering FOLDER KEY, with MLFLOW_TRACKING_URI.
"""

import sys
import threading

from pipelines.registry import open_tracking
from pipelines.runs.followers import MetricFollower
from pipelines.storage import open_storage


def main(folder: str, key: str) -> None:
    """Deliver what is there and what comes."""
    run = open_tracking("mae").run(key, "pretrain", {})
    with MetricFollower(open_storage(folder), run, poll_every_s=0.05):
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
