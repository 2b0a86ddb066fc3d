#!/usr/bin/env bash
# pytest 9.2.0 with pytest-xdist 3.8.0: --dist loadgroup no longer keeps the tests of an xdist_group in one process.
# pytest-xdist writes the group into the item's attribute `_nodeid`; pytest 9.2 builds node ids from `_id` and never
# reads the other, so the scheduler sees no group and deals tests one by one. Nothing is said, and all tests pass:
# only fixtures of module and session scope are made once in each process. With pytest 9.1.1 groups are kept. It is known as
# pytest-xdist issue 1386, open since 2026-09-20.
#
# Who meets it: whoever shares expensive fixtures, or a resource that only one process may use, through xdist_group.
# Seen: 2026-11-28, Linux x86-64, Python 3.11. Output:
#   pytest 9.1.1: 8 tests of one group passed in 1 process, module fixture made 1 time
#   pytest 9.2.0: 8 tests of one group passed in 2 processes, module fixture made 2 times
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cd "$folder"
cat > test_group.py <<'PY'
import os
import pathlib
import time

import pytest

pytestmark = pytest.mark.xdist_group("one")


@pytest.fixture(scope="module")
def made() -> None:
    pathlib.Path(f"made-{os.getpid()}").touch()


@pytest.mark.parametrize("number", range(8))
def test_number(made: None, number: int) -> None:
    time.sleep(0.2)
PY
for version in 9.1.1 9.2.0; do
  "$folder/venv/bin/pip" install --quiet "pytest==$version" 'pytest-xdist==3.8.0'
  rm -f made-*
  passed=$("$folder/venv/bin/python" -m pytest -q -n 2 --dist loadgroup test_group.py | grep -o '[0-9]* passed' | cut -d' ' -f1)
  made=$(find . -maxdepth 1 -name 'made-*' | wc -l)
  if [ "$made" = 1 ]; then words="1 process, module fixture made 1 time"; else words="$made processes, module fixture made $made times"; fi
  echo "pytest $version: $passed tests of one group passed in $words"
done | tee output
diff output - <<'EXPECTED'
pytest 9.1.1: 8 tests of one group passed in 1 process, module fixture made 1 time
pytest 9.2.0: 8 tests of one group passed in 2 processes, module fixture made 2 times
EXPECTED
