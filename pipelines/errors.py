"""The error of a command that failed for a reason other than wrong input or a bug."""


class CommandFailed(RuntimeError):
    """The work failed: workers died too often, Ray did not answer. The command says so in one line and exits with 1."""
