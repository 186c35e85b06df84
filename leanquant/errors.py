"""What is the user's to mend, bad input and disks, and how commands end with it."""

import errno
import os
import sys
from collections.abc import Callable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full, over the quota, a file as large as they may be
BROKEN = (errno.EIO, errno.EROFS)  # a disk that fails, or is gone read-only


class InputError(ValueError):
    """Bad input: the message says in one sentence what is wrong and what to do. CLIs print it and exit with 2."""


def disk_trouble(error: OSError) -> str | None:
    """The sentence for an `error` that is the disk's; None for another one."""
    if error.errno not in NO_ROOM + BROKEN:
        return None
    what, remedy = ("written", "make room") if error.errno in NO_ROOM else ("used", "see what is wrong with its disk")
    return f"{error.filename or 'a file'} cannot be {what} ({error.strerror}): {remedy}"


def exit_code(command: Callable[[], None], interrupted: str) -> int:
    """Of a program that does `command`: what is the user's to mend is printed as one sentence, as is `interrupted` after Ctrl-C."""
    try:
        command()
        return 0
    except InputError as error:
        what = str(error)
    except OSError as error:
        if (what := disk_trouble(error)) is None:
            raise
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
    print(f"error: {printable(what)}", file=sys.stderr)
    return 2


def end_at_once(*_) -> None:
    """What Ctrl-C does while there is nothing to lose. An exception would be lost in imports of compiled code, or make them fail."""
    os.write(2, b"interrupted: nothing is lost\n")
    os._exit(130)


def first_line(error: Exception) -> str:
    """What an `error` of a library says, short enough to stand within a sentence."""
    return (str(error) or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """For a terminal: what a file says may hold escapes."""
    return "".join(c if c.isprintable() else "?" for c in text)
