"""The store file: older versions are migrated, newer ones refused, and unsuitable places reported."""

import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
from calls import BODY, asked, call, key

from tapir_local.errors import TapirError
from tapir_local.report.costs import summarize_costs
from tapir_local.store.queries import billed_to_run
from tapir_local.store.rows import Use
from tapir_local.store.store import Store


def fill(path: Path, rows: int) -> None:
    with Store(path) as store:
        for row in range(rows):
            store.put(call(row), [Use("r", 1, "answers", f"row-{row}", key(row), 1)])


def test_a_store_of_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "teacher.db"
    fill(path, 1)
    conn = sqlite3.connect(path)
    conn.execute(
        "insert into _sqlite_migrations (migration_set, name, applied_at) values ('teacher', 'from_the_future', '2030')"
    )
    conn.commit()
    conn.close()
    with pytest.raises(TapirError, match="newer version"):
        Store(path)


def test_a_folder_instead_of_a_file_is_an_error(tmp_path):
    (tmp_path / "teacher.db").mkdir()
    with pytest.raises(TapirError, match="cannot be used"):
        Store(tmp_path / "teacher.db")


@pytest.mark.parametrize(("kind", "warned"), [("nfs4", True), ("cifs", True), ("ext4", False), ("overlay", False)])
def test_a_network_file_system_gives_a_warning(tmp_path, monkeypatch, kind, warned):
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    with Store(tmp_path / "cache" / "teacher.db") as store:
        assert any("network file system" in notice for notice in store.notices) == warned


def test_a_store_of_an_older_version_is_migrated(tmp_path):
    path = tmp_path / "teacher.db"
    with Store(path) as store:
        for row, size in enumerate((256, 256, 512)):
            store.put(call(row, request=asked(row, {**BODY, "max_tokens": size})))
    older = sqlite3.connect(path, isolation_level=None)
    for statement in (
        "drop table reply_limits",
        "alter table calls drop column estimated",
        "alter table attempts drop column estimated",
        "delete from _sqlite_migrations where name = 'bills'",
    ):
        older.execute(statement)
    older.close()
    with Store(path, "read-only") as store:
        assert store.limits("answers") == [512, 256]
        assert billed_to_run(path, "r", estimated=True) == (0, 0, 0.0)
        assert summarize_costs(path, "run") == []
    for _ in range(2):
        with Store(path) as store:
            assert store.limits("answers") == [512, 256]
            assert store.limits("other ") == []
            store.put(call(9)).result()
