"""A store that another program wrote, or that is none, is refused or harmless when it is imported."""

import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from calls import key, table
from filled_stores import call, took, use

from tapir_local.errors import TapirError
from tapir_local.store.queries import billed_to_run, count_uses
from tapir_local.store.store import Store

TABLES = {
    "_sqlite_migrations": "migration_set, name, applied_at",
    "samples": "id, name, request, answer",
    "sample_copies": "id, name, request, answer",
    "calls": "id, key, sample, request, answer, finish, model, fingerprint, tokens_in, tokens_out, seconds, price, "
    "created",
    "attempts": "id, key, run, round, stage, row, why, answer, tokens_in, tokens_out, seconds, price, created",
    "uses": "run, round, stage, row, key, paid",
}
BOMB = b"\1" + bytes(4) + (2**31 - 1).to_bytes(4, "little") + b"\x1fa\1\0" + b"\xff" * 4000


def made(folder: Path, **others: str) -> Path:
    """A store written by another program: columns without types; `others` replaces the columns of a table."""
    file = folder / "hostile.db"
    for name, columns in {**TABLES, **others}.items():
        table(file, f"create table {name} ({columns})")
    table(file, "insert into _sqlite_migrations values ('teacher', 'first_tables', '2026')")
    return file


def hostile_call(file: Path, **fields: Any) -> None:
    """Insert a valid call, except for the given fields."""
    with Store(file.with_name("sound.db")) as store:
        store.put(call(1), [use(1, "one")])
    with sqlite3.connect(file.with_name("sound.db")) as conn:
        conn.row_factory = sqlite3.Row
        (row,), samples = (
            conn.execute("select * from calls").fetchall(),
            conn.execute("select * from samples").fetchall(),
        )
    for sample in samples:
        table(file, "insert into samples values (?, ?, ?, ?)", *sample)
    values = {**{name: row[name] for name in TABLES["calls"].split(", ")}, **fields}
    table(file, f"insert into calls values ({', '.join('?' * len(values))})", *values.values())


@pytest.mark.parametrize(
    "fields",
    [
        {"answer": BOMB},
        {"request": BOMB},
        {"answer": "text"},
        {"sample": None},
        {"key": "text"},
        {"tokens_in": "many"},
        {"tokens_out": -5},
        {"seconds": float("inf")},
        {"price": float("inf")},
        {"price": "free"},
        {"created": None},
        {"finish": b"stop"},
        {"model": None},
    ],
    ids=lambda fields: str(next(iter(fields))),
)
def test_a_hostile_call_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    file = made(tmp_path)
    hostile_call(file, **fields)
    found = took(tmp_path / "new.db", file)
    assert (found.new, sum(found.refused.values())) == (0, 1)


def test_an_impossible_token_count_is_bounded(tmp_path: Path) -> None:
    file = made(tmp_path)
    hostile_call(file, tokens_in=2**62, tokens_out=2**62)
    table(file, "insert into uses values ('r', 0, 'seeds', 'row-1', ?, 1)", key(1))
    table(file, "insert into uses values ('r', 'no', 3, null, ?, 1)", key(1))
    table(file, "insert into attempts values (1, ?, 'r', 0, 's', 'x', 'why', x'', ?, 5, 1.0, null, 1.0)", key(1), 2**62)
    assert took(tmp_path / "new.db", file).new == 1
    assert billed_to_run(tmp_path / "new.db", "r") == (2, 3 * 10**9 + 5, 0.0)
    assert count_uses(tmp_path / "new.db", "r")[0]["tokens_in"] == 10**9


@pytest.mark.parametrize(
    "others",
    [
        {"calls": "key, sample, request, answer"},
        {"samples": "name"},
        {"uses": "who"},
        {"attempts": "id"},
        {"_sqlite_migrations": "other"},
    ],
    ids=lambda others: str(next(iter(others))),
)
def test_foreign_tables_give_an_error_or_nothing(tmp_path: Path, others: dict[str, str]) -> None:
    file = tmp_path / "hostile.db"
    for name, columns in {**TABLES, **others}.items():
        table(file, f"create table {name} ({columns})")
        table(file, f"insert into {name} values ({', '.join(['7'] * len(columns.split(', ')))})")
    with suppress(TapirError):
        assert took(tmp_path / "new.db", file).new == 0


def test_another_database_and_a_broken_one_are_errors(tmp_path: Path) -> None:
    table(tmp_path / "other.db", "create table calls (id integer primary key)")
    with pytest.raises(TapirError, match="not a store of calls"):
        took(tmp_path / "new.db", tmp_path / "other.db")
    (tmp_path / "other.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    with pytest.raises(TapirError, match="cannot be read"):
        took(tmp_path / "new.db", tmp_path / "other.db")
