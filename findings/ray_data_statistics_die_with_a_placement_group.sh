#!/usr/bin/env bash
# Ray 2.60.0: all executions of Ray Data in a cluster report to one named, detached actor, _StatsActor. If the first of them runs
# in an actor of a placement group that captures child tasks, as Ray Train's workers and Ray Tune's trials do, this actor is
# placed in the group too, and removing the group kills it. Executions elsewhere go on, and report to a successor that does not
# know them: each report fails with a KeyError that nobody handles, and the terminal shows tracebacks, "Unhandled error", though
# nothing is wrong with the data. So it is when one trial of a sweep ends before another. RAY_IGNORE_UNHANDLED_ERRORS in the
# environment of all workers hides them.
#
# Seen: 2026-11-29, Linux x86-64, Python 3.11. Output:
#   the second execution yielded 100 of 100 blocks
#   its process printed: Unhandled error, KeyError in update_dataset
#   with RAY_IGNORE_UNHANDLED_ERRORS=1 it printed none
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'ray[data]==2.60.0'
cd "$folder"
cat > check.py <<'PY'
import time

import ray
import ray.data
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


def batches_of(num_blocks):
    dataset = ray.data.range(num_blocks, override_num_blocks=num_blocks)
    dataset.context.enable_progress_bars = False
    # Fewer blocks at a time than there are, so that the execution lasts as long as its consumer.
    return iter(dataset.map_batches(slow, concurrency=1).iter_batches(batch_size=1))


def slow(batch):
    time.sleep(0.2)
    return batch


@ray.remote(num_cpus=1)
class Owner:
    def begin(self, num_blocks):
        self.batches = batches_of(num_blocks)
        next(self.batches)

    def finish(self):
        return 1 + sum(1 for _ in self.batches)


ray.init(address="local", num_cpus=6, include_dashboard=False, object_store_memory=100 * 2**20)
group = ray.util.placement_group([{"CPU": 2}])
ray.get(group.ready())
strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
first = Owner.options(scheduling_strategy=strategy).remote()
second, third = Owner.remote(), Owner.remote()
ray.get(first.begin.remote(100))
ray.get(second.begin.remote(100))
ray.util.remove_placement_group(group)
# A new execution makes the new actor.
ray.get(third.begin.remote(5))
ray.get(third.finish.remote())
print(f"the second execution yielded {ray.get(second.finish.remote())} of 100 blocks")
time.sleep(3)
PY
unset RAY_ADDRESS RAY_IGNORE_UNHANDLED_ERRORS
"$folder/venv/bin/python" check.py 2>&1 | cat > plain
RAY_IGNORE_UNHANDLED_ERRORS=1 "$folder/venv/bin/python" check.py 2>&1 | cat > ignored
grep -h 'blocks' plain | grep -o 'the second.*' > output || true
grep -q 'Unhandled error' plain && grep -q 'in update_dataset' plain && grep -q KeyError plain \
    && echo "its process printed: Unhandled error, KeyError in update_dataset" >> output
grep -q 'yielded 100 of 100' ignored && ! grep -q 'Unhandled error\|KeyError' ignored \
    && echo "with RAY_IGNORE_UNHANDLED_ERRORS=1 it printed none" >> output
cat output
diff output - <<'EXPECTED'
the second execution yielded 100 of 100 blocks
its process printed: Unhandled error, KeyError in update_dataset
with RAY_IGNORE_UNHANDLED_ERRORS=1 it printed none
EXPECTED
