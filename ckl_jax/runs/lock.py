"""One process at a time in a run's directory."""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import socket
import weakref

from ckl_jax.errors import ConfigError

LOCK_NAME = ".lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class DirectoryLock:
    """Keeps other processes out of a local directory until it is released or its process ends, by kill -9 too.

    It is a lock of the operating system (flock) on the file ``.lock``; what the file says is for the error message
    alone, and a file that is left behind locks nothing. Buckets have no such locks, nor have the file systems of some
    clusters.

    Raises:
      ConfigError: a running process holds the directory. OSError: the file cannot be written.
    """

    def __init__(self, directory: pathlib.Path):
        self._file = (directory / LOCK_NAME).open("a+", encoding="utf-8", errors="replace")
        weakref.finalize(self, self._file.close)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another one"
            self._file.close()
            raise ConfigError(
                f"out: {directory} is in use by process {holder}; allowed is a directory that no running process has"
            ) from error
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()


_held: weakref.WeakValueDictionary[pathlib.Path, DirectoryLock] = weakref.WeakValueDictionary()


def hold(directory: pathlib.Path) -> DirectoryLock:
    """This process's lock on a local directory, which is released when nothing refers to it any more.

    Within one process the same directory may be held several times. Raises like ``DirectoryLock``.
    """
    lock = _held.get(directory)
    if lock is None:
        lock = _held[directory] = DirectoryLock(directory)
    return lock
