"""The errors that decide a job's fate, and the exit code that each one becomes.

Standard library only: the requeue decision on the host reads these codes too.
"""

import errno

EXIT_DONE = 0
EXIT_HANG = 70
EXIT_STORAGE = 74
EXIT_YIELD = 75
"""Stopped and committed, but the requeue was refused or impossible."""
EXIT_USER = 78
EXIT_DIVERGED = 79
EXIT_TERM = 143
"""Ended by TERM."""
STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Disk full, over quota, read-only: no other attempt can write there either."""


class UserError(ValueError):
    """The user's configuration or data is wrong: exit 78, never requeued.

    The message's first line names the key, file, line or row, and says what would be right.
    """

    kind = "user"
    exit_code = EXIT_USER


class StorageError(OSError):
    """A write that a commit depends on failed (disk full, quota, read-only): exit 74, job held."""

    kind = "storage"
    exit_code = EXIT_STORAGE


class Diverged(ArithmeticError):
    """Loss or gradient is not finite: exit 79, nothing committed, never requeued."""

    kind = "diverged"
    exit_code = EXIT_DIVERGED


class Superseded(RuntimeError):
    """A newer attempt of this run has begun, on the word of Slurm that this one is dead."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters (transformers names every class it knows);
    its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
