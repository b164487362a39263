"""A closed store in a folder that cannot be written, such as a read-only copy, can be read."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from calls import call, fill, key

from tapir_local.errors import TapirError
from tapir_local.store.queries import count_paid_and_hits, count_uses
from tapir_local.store.store import Store

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can enter; those of pytest are private."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def as_other_user(work: Callable[[], str]) -> str:
    """What `work` returns, or its error, where the rights of root do not apply."""
    reading, writing = os.pipe()
    if not os.fork():
        try:
            if os.geteuid() == 0:
                os.setuid(NOBODY)
            said = work()
        except BaseException as error:  # noqa: BLE001 - the parent shows it
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read().decode()
    os.wait()
    return said


def close_folder(path: Path) -> None:
    for file in path.iterdir():
        file.chmod(0o444)
    path.chmod(0o555)


def test_a_closed_store_is_read(folder: Path) -> None:
    path = folder / "teacher.db"
    fill(path, 3)
    close_folder(folder)

    def read() -> str:
        assert count_uses(path)[0]["paid"] == 3
        assert count_paid_and_hits(path, "r") == {"paid": 3, "hits": 0}
        with Store(path, "replay") as store:
            assert store.get(key(2)) == call(2).answer
        return "read"

    assert as_other_user(read) == "read"
    assert [file.name for file in folder.glob("teacher.db-*")] == []


def test_a_store_that_was_not_closed_is_not_called_damaged(folder: Path) -> None:
    path = folder / "teacher.db"
    with Store(path) as store:
        store.put(call(0)).result()
        (folder / "copy").mkdir()
        for ending in ("", "-wal"):
            shutil.copy(f"{path}{ending}", folder / "copy")
    close_folder(folder / "copy")

    def read() -> str:
        with pytest.raises(TapirError) as error:
            count_uses(folder / "copy" / "teacher.db")
        return str(error.value)

    said = as_other_user(read)
    assert "the store cannot be read" in said
    assert "damaged" not in said
    (folder / "copy").chmod(0o755)
