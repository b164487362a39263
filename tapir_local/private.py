"""Files and folders that their owner alone can read: paid answers, prompts and logs."""

import os
import stat
from contextlib import suppress
from pathlib import Path

FILE, FOLDER = 0o600, 0o700


def private_file(path: Path) -> None:
    """Create an empty file that only its owner can read, or take the others' access to one away.

    A file that is there is not opened: closing it would drop the locks that SQLite holds on it in this process.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE))
    tighten(path, FILE)


def private_folder(path: Path) -> None:
    """Create a folder, with those above it, that only its owner can enter, or take the others' access away."""
    path.mkdir(mode=FOLDER, parents=True, exist_ok=True)
    tighten(path, FOLDER)


def tighten(path: Path, mode: int) -> None:
    """Give a file or folder of ours this mode, where others have access or the umask took ours; else leave it."""
    with suppress(PermissionError, FileNotFoundError):
        found = path.stat()
        if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != mode:
            path.chmod(mode)
