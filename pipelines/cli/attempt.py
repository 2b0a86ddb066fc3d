"""The process of an attempt that `mae handoff` starts on this machine: a `mae` command with a pulse in the ledger.

python -m pipelines.cli.attempt OUTPUT NAME NUMBER TOKEN LOG
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from mae_core.errors import UserError
from pipelines.cli import run
from pipelines.handoff.ledger import Ledger, run_attempt
from pipelines.interrupts import end_with, first_signal, handle_signals
from pipelines.storage import open_storage


def attempt(arguments: Sequence[str]) -> int:
    """Run the attempt; return the exit status of its command."""
    output, name, number, token, log = arguments
    return run_attempt(Ledger(open_storage(output), name), int(number), token, Path(log), _status_of)


def _status_of(words: list[str]) -> int:
    if words[:1] not in (["finetune"], ["probe"]):
        # They come from the storage, which others may be able to write.
        raise UserError(f"the attempt's claim names {words[:1]}, neither finetune nor probe; remove the claim")
    return run(words)


if __name__ == "__main__":
    handle_signals()
    try:
        status = attempt(sys.argv[1:])
    except KeyboardInterrupt:
        status = 128 + first_signal()
    end_with(status)
