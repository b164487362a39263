"""Students that several test files share, made once."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and lose much on a busy machine

import pytest
import server as servers
from models import WITH_BOS, make_adapter, make_model

from tapir_local.export.export import export_gguf
from tapir_local.store.store import Store


class Student(NamedTuple):
    """A base, an adapter on it, and the two merged as an f32 GGUF."""

    model: Path
    adapter: Path
    gguf: Path


def make_student(folder: Path, family: str, **changes: object) -> Student:
    model = make_model(folder / family, family, **changes)
    adapter = make_adapter(model, folder / f"{family}-lora")
    export_gguf(model, folder / f"{family}.gguf", adapter=adapter, quant="f32")
    return Student(model, adapter, folder / f"{family}.gguf")


@pytest.fixture(scope="session")
def students(tmp_path_factory) -> dict[str, Student]:
    """A Llama whose template writes BOS, a Qwen2 with biases and a Qwen3, the latter two with tied embeddings."""
    folder = tmp_path_factory.mktemp("students")
    return {
        "llama": make_student(folder, "llama", template=WITH_BOS),
        "qwen2": make_student(folder, "qwen2", kind="qwen2"),
        "qwen3": make_student(folder, "qwen3", kind="qwen2"),
    }


@pytest.fixture(scope="session")
def llama(students) -> Student:
    return students["llama"]


@pytest.fixture
def server() -> Iterator[servers.Server]:
    with servers.running() as known:
        yield known


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "teacher.db") as opened:
        yield opened
