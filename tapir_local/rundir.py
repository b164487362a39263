"""A run's folder: where each file is, how it is written whole or not at all, and who may write."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson

from tapir_local.errors import TapirError
from tapir_local.memory import check_disk
from tapir_local.private import private_folder
from tapir_local.records import from_json, to_json

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}  # errors of write(2) and close(2)


@dataclass(frozen=True)
class RunDir:
    """The folder cache/runs/<name>."""

    cache: Path
    name: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise TapirError(
                f"{self.name!r} is not a run's name",
                fix="A name has letters, digits, dots, dashes and underscores; --cache says where runs are.",
            )

    @property
    def path(self) -> Path:
        return self.cache / "runs" / self.name

    def round(self, number: int) -> Path:
        """The folder of a round; 0 is the baseline."""
        return self.path / f"round-{number:02d}"

    @property
    def exists(self) -> bool:
        return (self.path / "recipe.yaml").exists()

    def record(self) -> dict[str, Any]:
        """run.json: versions, times and what each finished stage took; {} before the first."""
        path = self.path / "run.json"
        return dict(orjson.loads(path.read_bytes())) if path.exists() else {}


def named_run(cache: Path, name: str) -> RunDir | None:
    """The folder of a run that the store names; None for what has none, such as `import:FILE`."""
    return RunDir(cache, name) if NAME.fullmatch(name) else None


def runs_of(cache: Path) -> list[RunDir]:
    """Every run in a cache, by name."""
    return [RunDir(cache, path.parent.name) for path in sorted((cache / "runs").glob("*/recipe.yaml"))]


def existing(cache: Path, name: str) -> RunDir:
    """A run that is there; TapirError naming those that are, otherwise."""
    run = RunDir(cache, name)
    if not run.exists:
        known = ", ".join(other.name for other in runs_of(cache)) or "none"
        raise TapirError(
            f"there is no run {name!r}",
            where=str(cache),
            fix=f"Runs in this cache: {known}. `tapir-local distill` makes one; --cache names another folder.",
        )
    return run


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


@contextmanager
def held(run: RunDir) -> Iterator[None]:
    """Hold the run for this process; TapirError naming the holder when another has it.

    The operating system drops the lock with its process, so a killed one leaves nothing to clean up.
    """
    from filelock import FileLock, Timeout

    private_folder(run.path)
    lock, owner = FileLock(run.path / ".lock"), run.path / ".lock-holder"
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        holder = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise TapirError(
            f"run {run.name!r} is being worked on by {holder}", fix="Wait for it, or use another --name."
        ) from error
    try:
        owner.write_text(f"process {os.getpid()}", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
