#!/usr/bin/env bash
# Ray 2.60.0: each worker group of Ray Train has two processes that may have nothing to do. A DatasetManager is started although
# the trainer was given no datasets, and a PlacementGroupCleaner although there is no dashboard, from which alone it learns
# that the controller has died; the start of the group waits for the cleaner's process. Each imports ray.train and ray.data,
# one to three CPU seconds. Leaving DatasetsCallback and PlacementGroupCleanerCallback out of what
# DataParallelTrainer._create_default_callbacks() returns starts neither, and the group works as before.
#
# Seen: 2026-11-29, Linux x86-64, Python 3.11, two cores. Output:
#   by default, beside 1 worker: DatasetManager, PlacementGroupCleaner, SynchronizationActor
#   without both callbacks, beside 1 worker: SynchronizationActor
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'ray[train,data]==2.60.0' psutil==7.2.2
cd "$folder"
cat > check.py <<'PY'
import sys
import tempfile

import psutil
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

HELPERS = ("DatasetManager", "PlacementGroupCleaner", "SynchronizationActor")


class Lean(DataParallelTrainer):
    def _create_default_callbacks(self):
        without = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, without)]


def work(config):
    import time

    time.sleep(15)
    names = {line for process in psutil.process_iter() for line in process.cmdline()[:1] if line.startswith("ray::")}
    found = sorted(helper for helper in HELPERS if any(helper in name for name in names))
    with open(config["out"], "w") as file:
        file.write(", ".join(found))


kind, out = sys.argv[1:]
ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
with tempfile.TemporaryDirectory() as storage:
    trainer = {"default": DataParallelTrainer, "lean": Lean}[kind](
        work,
        train_loop_config={"out": out},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=storage),
    )
    trainer.fit()
ray.shutdown()
PY
for kind in default lean; do
    RAY_DISABLE_IMPORT_WARNING=1 "$folder/venv/bin/python" check.py "$kind" "$folder/$kind" > "$folder/log" 2>&1 ||
        { cat "$folder/log"; exit 1; }
done
echo "by default, beside 1 worker: $(cat default)"
echo "without both callbacks, beside 1 worker: $(cat lean)"
[ "$(cat default)" = "DatasetManager, PlacementGroupCleaner, SynchronizationActor" ]
[ "$(cat lean)" = "SynchronizationActor" ]
