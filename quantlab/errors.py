"""What can go wrong in a way that a user can mend. The command line prints the one line and exits with the code."""

from __future__ import annotations


class QuantlabError(Exception):
    """A message of one line: what was given, what is needed, what to do."""

    exit_code = 1


class UsageError(QuantlabError):
    """The call itself is off: no such model, unknown scheme, a recipe that does not parse."""

    exit_code = 2


class PreflightError(QuantlabError):
    """The work was refused before it began, or the source turned out to be unfit; nothing was left behind."""

    exit_code = 3


class VerificationError(QuantlabError):
    """A checkpoint is not what it should be, or a quality gate was missed."""

    exit_code = 4


def one_line(error: BaseException) -> str:
    """What an error of another package says, short enough for a message of ours."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
