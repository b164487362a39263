"""Lock the key of each request in flight, so that two threads or processes never pay for the same request.

The same lock file says that a store is open, so that no other process moves it away.

Each key is one byte of an empty lock file. The kernel releases the locks when a process ends in any way, so there is
nothing to clean up: rows of an SQLite table would stay after a crash, and would cost a commit each; one lock file per
key would leave a file per call and takes ten times the CPU time. The locks belong to the open file (F_OFD_SETLK). The
classic kind belongs to the process and is released as soon as the process closes any descriptor of the file.
"""

import fcntl
import os
import struct
import threading
from pathlib import Path

from tapir_local.files import private_file

FLOCK_FORMAT = "hhqqi4x"  # struct flock on 64-bit Linux: type, origin, start, length, pid
KEY_BYTES_USED = 7  # of a key; its byte in the lock file
OPEN_BYTE = 256**KEY_BYTES_USED  # after the bytes of all keys: locked by every process that has the store open


class Claims:
    """The keys that this process is asking for through this store; the lock file stays empty."""

    def __init__(self, path: Path) -> None:
        private_file(path)
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._held: set[bytes] = set()
        self._guard = threading.Lock()

    def take(self, key: bytes) -> bool:
        """Lock a key; False if this or another process has locked it already."""
        with self._guard:
            if key in self._held or not self._set(key, fcntl.F_WRLCK):
                return False
            self._held.add(key)
            return True

    def drop(self, key: bytes) -> None:
        """Unlock a key, whether it was answered or not."""
        with self._guard:
            if key in self._held:
                self._held.remove(key)
                self._set(key, fcntl.F_UNLCK)

    def share_store(self) -> None:
        """Lock the store for use, together with others that use it."""
        self._set_byte(OPEN_BYTE, fcntl.F_RDLCK)

    def lock_store_alone(self) -> bool:
        """Lock the store to move its file away; False if another owner uses it."""
        return self._set_byte(OPEN_BYTE, fcntl.F_WRLCK)

    def close(self) -> None:
        """Unlock everything and close the lock file."""
        os.close(self._file)

    def _set(self, key: bytes, kind: int) -> bool:
        # keys that share these 56 bits would only wait for each other
        return self._set_byte(int.from_bytes(key[:KEY_BYTES_USED], "big"), kind)

    def _set_byte(self, place: int, kind: int) -> bool:
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack(FLOCK_FORMAT, kind, os.SEEK_SET, place, 1, 0))
        except BlockingIOError:
            return False
        return True
