"""Calls to fill a store with; its own module, so that the writers that tests kill start fast."""

import sqlite3
from pathlib import Path
from typing import Any

import orjson

from tapir_local.store import keys
from tapir_local.store.rows import Call, Use

BODY: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}],
    "temperature": 0.7,
    "max_tokens": 256,
}


def asked(row: int, body: dict[str, Any] = BODY) -> bytes:
    return keys.request_text("http://localhost/v1", {**body, "user": str(row)}, 0)


def call(row: int, answer: str = "4", **fields: Any) -> Call:
    raw = orjson.dumps({"choices": [{"message": {"content": answer}}], "row": row})
    return Call(**{"request": asked(row), "answer": raw, "finish": "stop", "kind": "answers", **fields})


def key(row: int) -> bytes:
    return keys.hash_request(asked(row))


def fill(path: Path, rows: int) -> None:
    from tapir_local.store.store import Store

    with Store(path) as store:
        for row in range(rows):
            store.put(call(row), [Use("r", 1, "answers", f"row-{row}", key(row), 1)])


def table(path: Path, sql: str, *values: Any) -> list[Any]:
    conn = sqlite3.connect(path)
    try:
        with conn:
            return conn.execute(sql, values).fetchall()
    finally:
        conn.close()
