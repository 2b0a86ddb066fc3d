#!/usr/bin/env bash
# Ray 2.60.0: ray.init(logging_config=ray.LoggingConfig(...)) adds a handler to the root logger of the calling process, and
# ray.shutdown() takes none away. After three sessions in one process, each message of the application is written three
# times more than before. The level that the application set for the root logger is replaced too, and stays so: below,
# INFO is lost after the first session. Who meets it: whoever starts Ray for one job after another in one process, as a
# test suite, a notebook or a library does. Saving level and handlers of the root logger around ray.init helps.
#
# Seen: 2026-11-28, Linux x86-64, Python 3.11. Output:
#   before: 1 handlers, level INFO
#   after session 1: 2 handlers, level WARNING
#   after session 2: 3 handlers, level WARNING
#   after session 3: 4 handlers, level WARNING
#   one warning was written 4 times
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'ray==2.60.0'
cd "$folder"
cat > check.py <<'PY'
import logging

import ray

root = logging.getLogger()
logging.basicConfig(level=logging.INFO)


def state() -> str:
    return f"{len(root.handlers)} handlers, level {logging.getLevelName(root.level)}"


print(f"before: {state()}")
for session in range(1, 4):
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        logging_config=ray.LoggingConfig(log_level="WARNING"),
    )
    ray.shutdown()
    print(f"after session {session}: {state()}")
logging.getLogger("application").warning("a word of the application")
PY
unset RAY_ADDRESS
"$folder/venv/bin/python" check.py > output 2> errors
echo "one warning was written $(grep -c 'a word of the application' errors) times" >> output
cat output
diff output - <<'EXPECTED'
before: 1 handlers, level INFO
after session 1: 2 handlers, level WARNING
after session 2: 3 handlers, level WARNING
after session 3: 4 handlers, level WARNING
one warning was written 4 times
EXPECTED
