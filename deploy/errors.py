"""The one exception that a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, where, and what to do.

    The command line prints it as `error: …` on stderr and exits with code 2.
    """
