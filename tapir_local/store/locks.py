"""Who is asking what just now: a byte-range lock per key, so that two threads or processes never pay for one request.

The kernel holds the locks and drops them when a process ends, however it ends, so nothing has to be cleaned up. They
are locks of the open file (F_OFD_SETLK): the classic kind belongs to the process and goes when any descriptor closes.
"""

import fcntl
import os
import struct
import threading
from pathlib import Path

from tapir_local.files import private_file

LOCK = "hhqqi4x"  # struct flock on 64-bit Linux: type, whence, start, length, pid


class Claims:
    """The keys that this store's owner is asking at the moment; the file stays empty."""

    def __init__(self, path: Path) -> None:
        private_file(path)
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._held: set[bytes] = set()
        self._guard = threading.Lock()

    def take(self, key: bytes) -> bool:
        """True when nobody else, in this process or another, is asking the key; now we are."""
        with self._guard:
            if key in self._held or not self._set(key, fcntl.F_WRLCK):
                return False
            self._held.add(key)
            return True

    def drop(self, key: bytes) -> None:
        """Done with the key, answered or not."""
        with self._guard:
            if key in self._held:
                self._held.remove(key)
                self._set(key, fcntl.F_UNLCK)

    def close(self) -> None:
        """Drop everything."""
        os.close(self._file)

    def _set(self, key: bytes, kind: int) -> bool:
        place = int.from_bytes(key[:7], "big")  # two keys with the same 56 bits would only wait for each other
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack(LOCK, kind, os.SEEK_SET, place, 1, 0))
        except BlockingIOError:
            return False
        return True
