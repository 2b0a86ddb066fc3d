"""The `mae` commands: data to stdout, everything else to stderr, and the only sys.exit."""

import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from enum import IntEnum

import mae_core
from mae_core.errors import UserError
from pipelines.cli.commands import COMMANDS, Command, Invocation
from pipelines.cli.parsing import parse
from pipelines.errors import CommandFailed

__all__ = ["COMMANDS", "Command", "Invocation", "main", "parse"]


class ExitCode(IntEnum):
    """What a command's exit status means; docs/commands.md has the same table."""

    DONE = 0
    FAILED = 1
    """The run failed, or a check of `mae doctor` did."""
    WRONG_INPUT = 2
    """The message has the remedy."""
    BUG = 70
    """A traceback is printed, with the request to report it (EX_SOFTWARE of sysexits.h)."""
    INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with the status that `ExitCode` names."""
    sys.exit(_main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> ExitCode:
    from pipelines.console import print_result, set_up_logging

    set_up_logging()
    try:
        call = parse(argv)
        # Ray's own warnings go to stdout, where only the result belongs.
        with contextlib.redirect_stdout(sys.stderr):
            result = COMMANDS[call.command].run(call)
    except BrokenPipeError:
        return _unheard()
    except (UserError, OSError) as error:
        print(f"mae: {_one_line(error)}", file=sys.stderr)
        return ExitCode.WRONG_INPUT
    except KeyboardInterrupt:
        print("mae: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except CommandFailed as error:
        print(f"mae: failed: {_one_line(error)}", file=sys.stderr)
        return ExitCode.FAILED
    except Exception:
        traceback.print_exc()
        print(
            f"mae: this is a bug of mae-ray {mae_core.__version__}; please report it with the lines above and the "
            f"command: mae {shlex.join(argv)}",
            file=sys.stderr,
        )
        return ExitCode.BUG
    try:
        print_result(call.command, result, as_json=call.json)
        sys.stdout.flush()
    except BrokenPipeError:
        return _unheard()
    return ExitCode.DONE if result.get("ok", True) else ExitCode.FAILED


def _unheard() -> ExitCode:
    """Whoever read the output has seen enough (`mae ... | head`), so that Python must not try to write the rest."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.DONE


def _one_line(error: BaseException) -> str:
    """What it says, without what a file's name could do to a terminal."""
    said = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)
