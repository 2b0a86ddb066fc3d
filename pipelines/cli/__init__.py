"""The `mae` commands. Results go to stdout, everything else to stderr; only `main` calls sys.exit."""

import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

import mae_core
from mae_core.errors import UserError
from pipelines.cli.commands import COMMANDS, Command, Invocation
from pipelines.cli.exit_codes import ExitCode
from pipelines.cli.parsing import parse
from pipelines.errors import CommandFailed
from pipelines.interrupts import end_with, first_signal, handle_signals, interrupted_in_place_of_errors

__all__ = ["COMMANDS", "Command", "ExitCode", "Invocation", "main", "parse", "run"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with an `ExitCode`."""
    end_with(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run one command; return an `ExitCode`, or the exit status of the command that `mae submit` followed."""
    call = None
    try:
        from pipelines.console import print_result, set_up_logging
        from pipelines.stages import note

        set_up_logging()
        handle_signals()
        call = parse(argv)
        note("reading the command")
        # Ray prints warnings to stdout, which is for the result only.
        with contextlib.redirect_stdout(sys.stderr), interrupted_in_place_of_errors():
            result = COMMANDS[call.command].run(call)
        print_result(call.command, result, as_json=call.json)
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_closed()
    except (UserError, OSError) as error:
        print(f"mae: {_one_line(error)}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except KeyboardInterrupt as interrupt:
        return _interrupted(interrupt, argv, resumes=call is not None and COMMANDS[call.command].resumes)
    except CommandFailed as error:
        print(f"mae: failed: {_one_line(error)}", file=sys.stderr)
        return ExitCode.RUN_FAILED
    except Exception:
        traceback.print_exc()
        print(
            f"mae: this is a bug of mae-ray {mae_core.__version__}; please report it with the lines above and the "
            f"command: mae {shlex.join(argv)}",
            file=sys.stderr,
        )
        return ExitCode.BUG
    failed = ExitCode.SUCCESS if result.get("ok", True) else ExitCode.RUN_FAILED
    return int(result.get("exit_status", failed))


def _interrupted(interrupt: KeyboardInterrupt, argv: list[str], *, resumes: bool) -> ExitCode:
    """Print on one line how far the command got, and the command that resumes if it does."""
    said = _one_line(interrupt) if str(interrupt) else "stopped"
    again = shlex.join(["mae", *(word for word in argv if word != "--fresh")])
    print(f"mae: {said}; to resume: {again}" if resumes else f"mae: {said}", file=sys.stderr)
    return ExitCode(128 + first_signal())


def _reader_closed() -> ExitCode:
    """Discard further output after its reader closed it (`mae ... | head`), so that Python does not flush it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.SUCCESS


def _one_line(error: BaseException) -> str:
    """Return the message on one line, with control characters escaped: a file's name could hold some."""
    said = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)
