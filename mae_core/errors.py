"""The error that tells a user's mistake from a bug. Imports nothing, so that every process can."""


class UserError(ValueError):
    """Wrong input: the message gives the value, the limit and the remedy, and the command exits with status 2.

    Any other ValueError that reaches the command line is a bug.
    """
