"""One process at a time: a lock on a file that ends with the process, however that ends.

    with locked(run_dir / "run.lock", "runs/first"):
        ...                          # a second process is refused at once, in one line

The system keeps it (a POSIX record lock), so what a killed process leaves is no lock, and there is nothing to clean up.
The file tells who holds it. On network file systems it holds between machines where their server keeps locks (NFSv4,
NFSv3 with its lock service); where it keeps none, that is said in one line and the work goes on without a lock.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy.core.errors import UserError


class InUse(UserError):
    """Another process holds the lock."""


_held: set[str] = set()
"""Real paths that this process holds: the system would give a process its own lock a second time."""


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold the lock `file`, which is made with its folder and removed at the end.

    what: is locked, for messages. Raises InUse at once where another process, or this one, holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    key = os.path.realpath(file)
    if key in _held:  # before it is opened: closing it would give the lock up
        raise InUse(f"{what}: is in use by this process already; let that end first")
    handle = _acquire(file, what)
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        with suppress(OSError):
            os.unlink(file)  # while it is held, so that it is never another's
        os.close(handle)


def _acquire(file: Path, what: str) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(handle)
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise InUse(f"{what}: is in use{holder}; wait for its end, or take another name") from None
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise OSError(error.errno, error.strerror, str(file)) from error
            print(
                f"{file}: this file system keeps no locks ({error.strerror}); start no second run here", file=sys.stderr
            )
            return os.open(os.devnull, os.O_RDONLY)
        if _is_still(handle, file):
            about = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            }
            with suppress(OSError):  # a full disk: the lock holds without a name
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(about).encode(), 0)
            return handle
        os.close(handle)  # whoever held it has removed it in between


def _is_still(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    """Tell who holds it; nothing where the file does not say."""
    try:
        about = json.loads(os.pread(handle, 4096, 0))
        return f" by process {about['pid']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return " by another process"
