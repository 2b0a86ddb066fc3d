"""The exit codes of the `mae` commands; `mae --help` prints them, and docs/commands.md explains them."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of a command, with its meaning."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> "ExitCode":
        member = int.__new__(cls, code)
        member._value_, member.meaning = code, meaning
        return member

    SUCCESS = 0, "the command succeeded"
    RUN_FAILED = 1, "the run, or a check of `mae doctor`, failed; a gate refused"
    USER_ERROR = 2, "wrong input or a service that does not answer; the message has the remedy"
    BUG = 70, "a bug (EX_SOFTWARE of sysexits.h); please report the traceback"
    INTERRUPTED = 130, "stopped in order by Ctrl-C (SIGINT)"
    TERMINATED = 143, "stopped in order by SIGTERM"
