"""The one exception that a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, where, and what to do.

    The command line prints it as `error: …` on stderr and exits with code 2. Of several training processes only the
    first prints, because all of them meet the same error.
    """


class LocalUserError(UserError):
    """Bad input that one of several processes met alone, such as an image of its share: that process prints it."""


def first_line(error: BaseException) -> str:
    """Message of a library's exception, for a message of one line: its first line without the full stop, or the
    name of its type when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def one_line(text: object) -> str:
    """The whole text with every run of white space, line breaks included, as one space."""
    return " ".join(str(text).split())
