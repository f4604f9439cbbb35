"""A lock on a folder, so that two runs never write to the same one."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import warnings
from pathlib import Path

from flaxdet.files.checkpoint import CheckpointFileError

NAME = ".lock"
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


class LockedError(CheckpointFileError):
    """Another process, or another object of this process, writes to the folder."""


class FolderLock:
    """The right to write to a folder, which one ``FolderLock`` at a time has.

    The operating system gives the lock up when the process ends, even by SIGKILL. The file of the lock stays; its text
    says who holds the lock.
    """

    def __init__(self, folder: Path):
        """Takes the lock.

        Args:
            folder: an existing folder.

        Raises:
            LockedError: if another holds the lock; the message names the folder and the holder.
            OSError: if the file of the lock can't be written.
        """
        path = folder / NAME
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._descriptor: int | None = descriptor
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno not in _BUSY:
                # some network file systems have no locks: training must be possible there too
                warnings.warn(f"{path}: this file system has no locks ({error.strerror})", stacklevel=3)
                return
            os.lseek(descriptor, 1, os.SEEK_SET)
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            self.release()
            who = "this process, by another Checkpoints," if holder == _holder() else holder or "another process"
            locked = LockedError(f"{folder}: {who} is writing to it; wait for its end, or take another folder")
            locked.errno = errno.EWOULDBLOCK
            raise locked from None
        except BaseException:
            self.release()
            raise
        os.ftruncate(descriptor, 0)
        # the first byte is the one that Windows locks
        os.write(descriptor, f" {_holder()}\n".encode())

    def release(self) -> None:
        """Gives the lock up; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.release()


def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
