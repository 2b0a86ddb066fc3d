"""The `mae` commands: data to stdout, everything else to stderr, and the only sys.exit."""

import contextlib
import os
import sys
from collections.abc import Sequence

from pipelines.cli.commands import COMMANDS, Command, Invocation
from pipelines.cli.parsing import parse

__all__ = ["COMMANDS", "Command", "Invocation", "main", "parse"]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Exit status 2 for what a user can mend, 1 for a run that failed."""
    sys.exit(_main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    from pipelines.console import print_result, set_up_logging

    set_up_logging()
    try:
        call = parse(argv)
        # Ray's own warnings go to stdout, where only the result belongs.
        with contextlib.redirect_stdout(sys.stderr):
            result = COMMANDS[call.command].run(call)
    except BrokenPipeError:
        return _unheard()
    except (ValueError, OSError) as error:
        print(f"mae: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mae: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except RuntimeError as error:
        print(f"mae: failed: {_one_line(error)}", file=sys.stderr)
        return 1
    try:
        print_result(call.command, result, as_json=call.json)
        sys.stdout.flush()
    except BrokenPipeError:
        return _unheard()
    return 0 if result.get("ok", True) else 1


def _unheard() -> int:
    """Whoever read the output has seen enough (`mae ... | head`), so that Python must not try to write the rest."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _one_line(error: BaseException) -> str:
    """What it says, without what a file's name could do to a terminal."""
    said = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)
