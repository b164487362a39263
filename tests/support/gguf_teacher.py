"""A GGUF as the teacher, and requests to ask it."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Judge, Teacher
from tapir_local.records import Message, Request
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask

WORDS = [f"What is {number} times {number + 7}?" for number in range(12)]


def teacher(gguf: Path, **settings: Any) -> Teacher:
    return Teacher(**{"kind": "gguf", "gguf": str(gguf), "concurrency": 4, "context": 256, **settings})


def questions(*words: str, **fields: Any) -> list[Request]:
    return [
        Request((Message("system", "Be brief."), Message("user", word)), word, "seeds", **{"max_tokens": 8, **fields})
        for word in words
    ]


def rows(store: Store, sql: str) -> list[Any]:
    with sqlite3.connect(store.path) as conn:
        return conn.execute(sql).fetchall()


def refused(*words: str, endpoint: Teacher | Judge, store: Store) -> str:
    with pytest.raises(TapirError) as caught:
        ask(questions(*words), endpoint, store, run="r")
    return str(caught.value)
