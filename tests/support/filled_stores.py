"""Stores filled with calls to export and import, and their tables."""

from pathlib import Path
from typing import Any

import orjson
from calls import asked, key

from tapir_local.store.rows import Call, Use
from tapir_local.store.store import Store
from tapir_local.store.transfer import Imported, import_store


def call(row: int, answer: str = "4", **fields: Any) -> Call:
    """A complete answer with the number of its row."""
    raw = orjson.dumps({"choices": [{"message": {"content": answer}, "finish_reason": "stop"}], "row": row})
    return Call(**{"request": asked(row), "answer": raw, "finish": "stop", "kind": "answers", **fields})


def use(row: int, run: str, paid: int = 1) -> Use:
    return Use(run, 0, "seeds", f"row-{row}", key(row), paid)


def put(path: Path, rows: range, run: str = "one", **fields: Any) -> Path:
    with Store(path) as store:
        for row in rows:
            store.put(call(row, **fields), [use(row, run)]).result()
    return path


def took(target: Path, file: Path) -> Imported:
    with Store(target) as store:
        return import_store(store, file)
