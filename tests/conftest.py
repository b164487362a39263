"""Students that several test files share, made once; a run of fake backends."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and lose much on a busy machine
os.environ.pop("COLUMNS", None)  # tables are as wide as in a pipe, whatever terminal the tests are started from
if os.environ.get("TAPIR_TEST_GPU") != "1":  # the tests expect a CPU's devices, libraries and bytes
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import server as servers
from fakes import make_recipe
from models import WITH_BOS
from students import Student, make_student

from tapir_local.recipe.schema import Recipe
from tapir_local.run_dir import RunDir
from tapir_local.store.store import Store


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


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path, "fake")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path)
