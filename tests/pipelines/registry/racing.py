"""A race of promotions: one process opens MLflow, which is slow, and forks all that promote at the same moment.

python -m tests.pipelines.registry.racing MODEL ALIAS NUMBER

MLFLOW_TRACKING_URI names the registry. Prints what came of each as a JSON list.
"""

import json
import multiprocessing
import subprocess
import sys
import traceback
from multiprocessing.synchronize import Barrier
from typing import Any

from pipelines.registry import AliasMoved, Decision, Tracking, open_tracking
from tests.waiting import COMMAND_DEADLINE_S, JOB_DEADLINE_S, join


def check_race(tracking: Tracking, name: str, alias: str, num_processes: int) -> None:
    """Race that many processes to give a model its first version with the alias; one wins, all others are told."""
    words = [sys.executable, "-m", "tests.pipelines.registry.racing", name, alias, str(num_processes)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=JOB_DEADLINE_S)
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    (winner,) = [entry for entry in said if entry["said"] == "won"]
    told = [entry["said"] for entry in said if entry is not winner]
    assert len(told) == num_processes - 1
    by_whom = f"moved from no version to version {winner['version']} by "
    assert [sentence for sentence in told if by_whom not in sentence] == []
    assert tracking.resolve(f"models:/{name}@{alias}").version == winner["version"]
    (move,) = tracking.history(name, alias).moves
    assert (move.version, move.why, move.is_done) == (winner["version"], f"process {winner['number']}", True)
    histories = tracking.client.search_runs([tracking.experiment_id], "tags.`mae.kind` = 'history'")
    assert [run.data.tags["mae.model"] for run in histories].count(name) == 1


def promote(tracking: Tracking, name: str, alias: str, version: int, number: int, together: Barrier) -> str:
    """Read the history, wait until every process has, and promote; return what came of it."""
    # A fork must not use its parent's connections.
    for service in (tracking.client._tracking_client, tracking.client._get_registry_client()):
        engine = getattr(service.store, "engine", None)
        if engine is not None:
            engine.dispose(close=False)
    history, ref = tracking.history(name, alias), tracking.resolve(f"models:/{name}/{version}")
    together.wait(COMMAND_DEADLINE_S)
    try:
        tracking.move_alias(history, ref, Decision(kind="promote", why=f"process {number}"))
    except AliasMoved as told:
        return str(told)
    return "won"


def main() -> int:
    name, alias, many = sys.argv[1], sys.argv[2], int(sys.argv[3])
    processes = multiprocessing.get_context("fork")
    tracking = open_tracking("race")
    versions = [version.version for version in tracking.client.search_model_versions(f"name='{name}'")]
    together, results = processes.Barrier(many), processes.SimpleQueue()

    def run(number: int, version: int) -> None:
        found: dict[str, Any] = {"number": number, "version": version}
        try:
            found["said"] = promote(tracking, name, alias, version, number, together)
        except BaseException:
            found["said"] = f"failed: {traceback.format_exc()}"
            together.abort()
        results.put(found)

    racing = [
        processes.Process(target=run, args=(number, int(versions[number % len(versions)]))) for number in range(many)
    ]
    for process in racing:
        process.start()
    print(json.dumps([results.get() for _ in racing]))
    for process in racing:
        join(process, JOB_DEADLINE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
