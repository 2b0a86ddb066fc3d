#!/usr/bin/env bash
# psutil 7.2.2 on Linux: subprocess.Popen returns as soon as the child's old program is gone, and for a moment the new one has
# neither environment nor arguments. Process.environ() then is {} and Process.cmdline() [], without an error, as of a process
# that was started with none. So whoever ends processes by a variable or by words of their command passes over one that was just
# started, and it lives on. A later look finds both; a process that has really none can be told by the address of its environment
# in /proc/PID/stat (env_start), which is 0 only until the program has been loaded.
#
# Seen: 2026-11-29, Linux 6.18 x86-64, Python 3.11. Output (the numbers vary):
#   2000 processes, each looked at as soon as Popen returned
#   without environment: some (73 here), without arguments: some (73 here), errors raised: 0
#   a tenth of a second later: 0 without environment, 0 without arguments
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'psutil==7.2.2'
cat > "$folder/check.py" <<'PY'
import subprocess
import time

import psutil

NUM = 2000
no_environment = no_arguments = errors = late_environment = late_arguments = 0
for _ in range(NUM):
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, env={"MARK": "1"}) as child:
        process = psutil.Process(child.pid)
        try:
            is_bare = (not process.environ(), not process.cmdline())
        except psutil.Error:
            errors += 1
            continue
        if any(is_bare):
            no_environment += is_bare[0]
            no_arguments += is_bare[1]
            time.sleep(0.1)
            late_environment += process.environ() != {"MARK": "1"}
            late_arguments += process.cmdline() != ["/bin/cat"]
print(f"{NUM} processes, each looked at as soon as Popen returned")
print(
    f"without environment: {'some' if no_environment else 'none'} ({no_environment} here), "
    f"without arguments: {'some' if no_arguments else 'none'} ({no_arguments} here), errors raised: {errors}"
)
print(f"a tenth of a second later: {late_environment} without environment, {late_arguments} without arguments")
assert no_environment and not errors and not late_environment and not late_arguments
PY
"$folder/venv/bin/python" "$folder/check.py"
