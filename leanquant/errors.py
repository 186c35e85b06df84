"""What is the user's to mend: bad input, and disks."""

import errno

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
