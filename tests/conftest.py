"""Students that several test files share, made once; a run of fake backends."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and lose much on a busy machine
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background jobs inherit that, and so would ours
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("COLUMNS", None)  # tables are as wide as in a pipe, whatever terminal the tests are started from
if os.environ.get("TAPIR_TEST_GPU") != "1":  # the tests expect a CPU's devices, libraries and bytes
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import server as servers
from fakes import make_recipe
from hypothesis import settings
from models import WITH_BOS
from students import Student, make_student
from warm import COLD, warm_children

from tapir_local import process
from tapir_local.recipe.schema import Recipe
from tapir_local.run_dir import RunDir
from tapir_local.store.store import Store

settings.register_profile("no-deadline", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("no-deadline")  # an example may take seconds on a busy machine

LOADS_BOTH = """
import tempfile
from pathlib import Path
import torch
from students import make_student
from tapir_local.inference.model import open_model
with tempfile.TemporaryDirectory() as folder:
    with open_model(make_student(Path(folder), "tiny").gguf):
        pass
"""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than there are processors: in a quarter of the time a test waits for a server or a clock."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_sessionstart(session: pytest.Session) -> None:
    """Where llama.cpp was built with CUDA, stop with one sentence if the tests would crash."""
    llama = find_spec("llama_cpp")
    if llama and llama.origin and not hasattr(session.config, "workerinput"):
        refuse_cuda_build(Path(llama.origin).with_name("lib") / "libggml-cuda.so")


def refuse_cuda_build(built: Path, code: str = LOADS_BOTH) -> None:
    """End the session if `built` exists and a process with torch and llama.cpp crashes, as one did on an H200.

    Most tests load both in one process. With the GPU hidden this may work; nobody has tried.
    """
    if not built.exists() or os.environ.get("TAPIR_TEST_GPU") == "1":
        return
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code_of_exit = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode
    if code_of_exit < 0:
        pytest.exit(
            f"torch and a llama.cpp built with CUDA crash in one process here (signal {-code_of_exit}), and most tests "
            "load both. Run the tests in another checkout, where `make test` builds llama.cpp without CUDA.",
            returncode=3,
        )


@pytest.fixture(scope="session", autouse=True)
def children_start_warm() -> Iterator[None]:
    """Trainings, exports and gates do not import their libraries again and again; see `tests/support/warm.py`."""
    with warm_children():
        yield


@pytest.fixture
def cold_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children start as they do for users: a new interpreter imports everything."""
    monkeypatch.setattr(process, "start_child", COLD)


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
