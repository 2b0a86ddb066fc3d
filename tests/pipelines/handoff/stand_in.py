"""The process of an attempt whose work takes no time: it stands in for training, and keeps a diary.

python -m tests.pipelines.handoff.stand_in OUTPUT NAME NUMBER TOKEN LOG, with the claim's words DIARY finish|fail|hold
"""

import json
import os
import sys
import time
from pathlib import Path

from pipelines.handoff.ledger import Ledger, run_attempt
from pipelines.interrupts import handle_signals
from pipelines.storage import open_storage


def main() -> int:
    output, name, number, token, log = sys.argv[1:]

    def work(words: list[str]) -> int:
        diary, what = Path(words[0]), words[1]
        live = diary / f"{name}.live"
        live.touch()
        with (diary / f"{name}.ran").open("a") as file:
            file.write(f"{number} {len(list(diary.glob('*.live')))}\n")
        try:
            while what == "hold" and not (diary / "go").exists():
                time.sleep(0.01)  # noqa: TID251 -- a process of its own
        except KeyboardInterrupt:
            return 143
        finally:
            live.unlink()
        if what == "fail" and not (diary / "mended").exists():
            print(f"mae: no luck with attempt {number}; try again")
            return 1
        open_storage(output).write(f"{name}/outcome.json", json.dumps({"model": f"models:/{name}/1"}).encode())
        return 0

    return run_attempt(Ledger(open_storage(output), name), int(number), token, Path(log), work)


if __name__ == "__main__":
    handle_signals()
    if os.environ.get("MAE_TEST_KILL_AT"):
        from tests.pipelines.handoff.killing import kill_at

        kill_at(int(os.environ["MAE_TEST_KILL_AT"]))
    sys.exit(main())
