"""Files: written whole or not at all, readable by their owner only, hashed; records as JSON and JSON lines."""

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
from tapir_local.memory import check_disk
from tapir_local.records import T, from_json, to_json

WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}  # errors of write(2) and close(2)
FILE, FOLDER = 0o600, 0o700
ELSEWHERE = "Name another, or delete it first."


def at_home(path: str | None) -> str | None:
    """A path with its `~` expanded; relative ones are left as they are: from the current folder."""
    if path is None or not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:  # ~nobody: then it is a file of that name
        return path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, `<path>.partial`, that becomes `path` only when the block ends well; a file or a folder.

    The file's bytes and the folder's entry are synced, so `path` is whole even after a power cut. TapirError where it
    cannot be written. Any other OSError of the block, such as that of a file that it reads, stays as it is.
    """
    partial = path.with_name(path.name + ".partial")
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
    try:
        yield partial
    except OSError as error:
        remove(partial)
        if is_of_writing(error, partial):
            raise unwritable(path, error) from error
        raise
    with written(path):
        for file in [partial] if partial.is_file() else [file for file in partial.rglob("*") if file.is_file()]:
            sync(file)
        partial.rename(path)
        sync(path.parent)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """TapirError for every OSError of a block that writes `path`."""
    try:
        yield
    except OSError as error:
        with suppress(OSError):
            remove(path.with_name(path.name + ".partial"))
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> TapirError:
    """What to say of a file or folder that could not be written."""
    return TapirError(
        f"cannot be written: {error.strerror or error}",
        where=str(path),
        fix="Make room or mend the folder; the same command goes on from here.",
    )


def is_of_writing(error: OSError, partial: Path) -> bool:
    """Whether an error is of writing `partial` or what is in it: it names such a file, or no file and a full disk."""
    names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return any(partial in (name, *name.parents) for name in names) if names else error.errno in WRITING


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of entries, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there; a cut leaves no half of a folder under its name."""
    if path.is_dir() and not path.is_symlink():
        if path.suffix != ".partial":
            remove(half := path.with_name(path.name + ".partial"))
            path = path.rename(half)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """A file under a second name: a hard link, or where the disk knows none a copy, if there is room for it."""
    try:
        target.hardlink_to(source)
    except OSError:
        check_disk(target, source.stat().st_size, f"a copy of {source.name}")
        shutil.copyfile(source, target)


def sha256(path: Path) -> str:
    """A file's SHA-256, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Whole or absent."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Readable JSON, keys in the order given."""
    write_text(path, orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


def write_record(path: Path, record: Any) -> None:
    """One record as readable JSON."""
    write_json(path, orjson.loads(to_json(record)))


def read_record(kind: type[T], path: Path) -> T:
    """One record from its file."""
    return from_json(kind, path.read_bytes(), str(path))


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Records as JSON lines."""
    with whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(f"{to_json(row)}\n" for row in rows)


def read_rows(kind: type[T], path: Path) -> list[T]:
    """Records from JSON lines; an error names the line."""
    with path.open("rb") as file:
        return [from_json(kind, line, f"{path}, line {number}") for number, line in enumerate(file, 1)]


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


def check_output(
    out: Path,
    reads: Iterable[Path | None],
    *,
    beside: Sequence[str] = (),
    force: bool = False,
    fix: str = ELSEWHERE,
) -> None:
    """TapirError where the command would write over what it `reads`, or where `out` is there already, unless `force`.

    `beside` are the ends of the names of files that it writes beside `out`. Links and other spellings are seen through.
    """
    sources = [path for path in reads if path is not None]
    for path in (out, *(out.with_name(out.name + end) for end in beside)):
        found = next((source for source in sources if is_same(path, source)), None)
        if found is not None:
            words = "the output" if path == out else f"{path}, which is written beside the output,"
            raise TapirError(
                f"{words} is a file that the command reads ({found})", where=str(out), fix="Name another output."
            )
    if os.path.lexists(out) and not force:
        raise TapirError("the file is there already", where=str(out), fix=fix)


def is_same(path: Path, source: Path) -> bool:
    """Whether a path is a file or folder that is read, or a folder that holds it."""
    try:
        if path.samefile(source):
            return True
    except OSError:  # one of them is not there
        pass
    target, whole = path.resolve(), source.resolve()
    return target == whole or target in whole.parents
