"""Read and write files: atomic writes, private permissions, hashes, and records as JSON or JSON lines."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson

from tapir_local.errors import TapirError
from tapir_local.memory import check_disk_space
from tapir_local.records import T, from_json, to_json

WRITE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}  # errors of write(2) and close(2)
FILE_MODE, FOLDER_MODE = 0o600, 0o700  # readable by the owner only
NAME_ANOTHER_FILE = "Choose another name, or delete the file first."


def expand_home(path: str | None) -> str | None:
    """The path with `~` expanded. Relative paths stay relative to the current folder."""
    if path is None or not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:  # `~nobody` without such a user is a file of that name
        return path


def check_path_text(path: Path) -> None:
    """TapirError for a path that is not UTF-8: no recipe or record could name it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        what = "the path is not UTF-8, so the files of a run cannot name it"
        raise TapirError(what, where=repr(str(path)), fix="Use another folder, or rename it.") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield `<path>.partial` to write to, as a file or a folder; rename it to `path` when the block succeeds.

    The contents and the parent folder are synced first, so that `path` is complete even after a power failure. Raises
    TapirError if it cannot be written. Other errors of the block, such as an unreadable input, are passed on.
    """
    partial = path.with_name(path.name + ".partial")
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_path(partial)
    try:
        yield partial
    except OSError as error:
        remove_path(partial)
        if is_write_error(error, partial):
            raise write_error(path, error) from error
        raise
    with wrap_write_errors(path):
        for file in [partial] if partial.is_file() else [file for file in partial.rglob("*") if file.is_file()]:
            sync_to_disk(file)
        partial.rename(path)
        sync_to_disk(path.parent)


@contextmanager
def wrap_write_errors(path: Path) -> Iterator[None]:
    """Turn every OSError of a block that writes `path` into a TapirError."""
    try:
        yield
    except OSError as error:
        with suppress(OSError):
            remove_path(path.with_name(path.name + ".partial"))
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> TapirError:
    """The error for a file or folder that cannot be written."""
    return TapirError(
        f"cannot be written: {error.strerror or error}",
        where=str(path),
        fix="Free some disk space or fix the folder, then run the same command again: it resumes from here.",
    )


def is_write_error(error: OSError, partial: Path) -> bool:
    """Whether writing `partial` caused the error: it names a path in it, or names none and has a write error number."""
    names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return any(partial in (name, *name.parents) for name in names) if names else error.errno in WRITE_ERRNOS


def sync_to_disk(path: Path) -> None:
    """Flush a file, or a folder's list of entries, to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_path(path: Path) -> None:
    """Delete a file or folder if it exists. A folder is renamed first, so that no incomplete one keeps its name."""
    if path.is_dir() and not path.is_symlink():
        if path.suffix != ".partial":
            remove_path(half := path.with_name(path.name + ".partial"))
            path = path.rename(half)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it on file systems without hard links, if there is space for the copy."""
    try:
        target.hardlink_to(source)
    except OSError:
        check_disk_space(target, source.stat().st_size, f"a copy of {source.name}")
        shutil.copyfile(source, target)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; the order of keys is kept."""
    write_text(path, orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


def write_record(path: Path, record: Any) -> None:
    """Write one record as indented JSON."""
    write_json(path, orjson.loads(to_json(record)))


def read_record(kind: type[T], path: Path) -> T:
    """Read one record from a JSON file."""
    return from_json(kind, path.read_bytes(), str(path))


def read_json_object(path: Path, fix: str = "") -> dict[str, Any]:
    """The object in a JSON file; TapirError with `fix` if it holds anything else."""
    try:
        found = orjson.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        empty = not path.stat().st_size
        raise TapirError("the file is empty" if empty else "the file is not a JSON object", where=str(path), fix=fix)
    return found


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write records as JSON lines, atomically."""
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(f"{to_json(row)}\n" for row in rows)


def read_rows(kind: type[T], path: Path) -> list[T]:
    """Read records from JSON lines; an error names the line."""
    with path.open("rb") as file:
        return [from_json(kind, line, f"{path}, line {number}") for number, line in enumerate(file, 1)]


def private_file(path: Path) -> None:
    """Create an empty file that only its owner can read, or restrict an existing one.

    An existing file is not opened: closing it would release the locks that SQLite holds on it in this process.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE))
    restrict_access(path, FILE_MODE)


def private_folder(path: Path) -> None:
    """Create a folder and its parents that only its owner can enter, or restrict an existing one."""
    path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    restrict_access(path, FOLDER_MODE)


def restrict_access(path: Path, mode: int) -> None:
    """Set the mode of a file or folder that we own, if it differs."""
    with suppress(PermissionError, FileNotFoundError):
        found = path.stat()
        if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != mode:
            path.chmod(mode)


def check_output(
    out: Path,
    reads: Iterable[Path | None],
    *,
    beside: Sequence[str] = (),
    force: bool = False,
    fix: str = NAME_ANOTHER_FILE,
) -> None:
    """Raise TapirError if a command would overwrite a file that it `reads`, or, without `force`, an existing `out`.

    `beside` holds the suffixes of further files that the command writes next to `out`. Links are resolved.
    """
    sources = [path for path in reads if path is not None]
    for path in (out, *(out.with_name(out.name + end) for end in beside)):
        found = next((source for source in sources if would_overwrite(path, source)), None)
        if found is not None:
            words = "the output" if path == out else f"{path}, which is written beside the output,"
            raise TapirError(
                f"{words} is a file that the command reads ({found})", where=str(out), fix="Choose another output."
            )
    if os.path.lexists(out) and not force:
        raise TapirError("the file exists already", where=str(out), fix=fix)


def would_overwrite(path: Path, source: Path) -> bool:
    """Whether writing `path` would overwrite `source`: it is the same file or folder, or a folder that contains it."""
    try:
        if path.samefile(source):
            return True
    except OSError:  # one of them does not exist
        pass
    target, whole = path.resolve(), source.resolve()
    return target == whole or target in whole.parents
