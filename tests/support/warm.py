"""Processes that start warm: forked from one that has already imported what they need.

The process of a training takes nine seconds of processor time to import torch, transformers, peft, trl and datasets,
and one or two to train a tiny student. So in the tests `tapir_local.process` starts the modules of LIBRARIES warm.

A warm process is a real one: it runs `python -P -m MODULE FOLDER` or `python cli.py WORDS` in a session, environment
and folder of its own, with its own pipes and exit code, it can be killed, and its children are warm too. It lacks only
the start of the interpreter and the imports; `tests/test_process.py` holds both kinds to the same behavior. These stay
cold: what a test starts with `subprocess`, with all its children (one whole quickstart among them); launchers and what
they start; and every process where there is Unsloth, which must be imported before the libraries that it changes, or a
GPU, where torch and llama.cpp must not be in one process. With TAPIR_TEST_COLD=1 every process starts cold.

`python -P warm.py FD` is the process that is forked: it listens on the socket FD until its standard input closes.
"""

import atexit
import importlib
import json
import os
import runpy
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from tapir_local import process

ROOT = Path(__file__).parents[2]
COLD = process.start_child
FORKED: list[int] = []  # the process that warm ones are forked from, once it is started
LARGEST_REQUEST = 1 << 20  # bytes: the command and its environment
TORCH = ("torch", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "peft")
TRAINER = ("datasets", "accelerate", "transformers.trainer", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer")
# The modules that start warm, and what is imported for each, besides the module itself, before the first one starts.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "tapir_local.training.train": (*TORCH, *TRAINER),
    "tapir_local.training.classifier": (*TORCH, "transformers.models.deberta_v2.modeling_deberta_v2"),
    "tapir_local.export.gate": TORCH,
    "tapir_local.export.gguf_side": ("llama_cpp", "numpy"),
    "tapir_local.export.gguf_student": (*TORCH, "gguf"),
    "tapir_local.export.export": ("gguf", "numpy"),
    "tapir_local.commands.main": ("tapir_local.stages.backends", "llama_cpp", "numpy"),  # of cli.py
}


def warm_module(command: Sequence[str]) -> str:
    """The module of LIBRARIES that a command runs; "" if there is none."""
    if [*command[:2]] == [sys.executable, str(ROOT / "cli.py")]:
        return "tapir_local.commands.main"
    is_module = [*command[:3]] == [sys.executable, "-P", "-m"] and command[3] in LIBRARIES
    return command[3] if is_module else ""


# The tests' side


class WarmProcess:
    """As subprocess.Popen; `files` are standard input, output and error."""

    def __init__(
        self, command: Sequence[str], variables: Mapping[str, str], files: Sequence[int], place: str, folder: Path
    ) -> None:
        self.args = command
        self.returncode: int | None = None
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect(place)
        request = {"command": [*command], "variables": {**variables}, "folder": str(folder)}
        socket.send_fds(self.connection, [json.dumps(request).encode()], files)
        self.pid = int(self.connection.recv(64))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired([*self.args], timeout or 0)
            self.returncode = int(self.connection.recv(64))
            self.connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def start_child(
    command: Sequence[str], errors: IO[bytes], variables: Mapping[str, str], log: Path, place: str = ""
) -> Any:
    """As `process.start_child`, warm if the command runs a module of LIBRARIES. `place` is the socket of the process
    to fork; by default that of these tests, which is started if it does not run."""
    if not warm_module(command):
        return COLD(command, errors, variables, log)
    input_read, input_write = os.pipe()
    output_read, output_write = os.pipe()
    files = (input_read, output_write, errors.fileno())
    child = WarmProcess(command, variables, files, place or warm_place(), Path.cwd())
    child.stdin, child.stdout = os.fdopen(input_write, "wb"), os.fdopen(output_read, "rb")
    os.close(input_read)
    os.close(output_write)
    return child


def start_command(
    *words: str, output: IO[bytes], errors: IO[bytes], cwd: Path | None = None, **environment: str
) -> Any:
    """Start `cli.py` with these words and no input, warm where that may be."""
    command = [sys.executable, str(ROOT / "cli.py"), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with Path(os.devnull).open("rb") as nothing:
        if not may_start_warm():
            return subprocess.Popen(command, stdin=nothing, stdout=output, stderr=errors, env=env, cwd=cwd)
        files = [file.fileno() for file in (nothing, output, errors)]
        return WarmProcess(command, env, files, warm_place(), cwd or Path.cwd())


def run_command(*words: str, cwd: Path | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `cli.py` with these words and no input to its end, warm where that may be."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        code = start_command(*words, output=output, errors=errors, cwd=cwd, **environment).wait()
        said = []
        for file in (output, errors):
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess([*words], code, *said)


def may_start_warm() -> bool:
    """Whether there is neither a GPU nor Unsloth, and TAPIR_TEST_COLD does not ask for cold processes."""
    asked = os.environ.get("TAPIR_TEST_GPU") == "1" or os.environ.get("TAPIR_TEST_COLD") == "1"
    return not asked and find_spec("unsloth") is None


@contextmanager
def warm_children() -> Iterator[None]:
    """Start the modules of LIBRARIES warm within the block, where that may be."""
    if may_start_warm():
        process.start_child = start_child  # type: ignore[assignment]
    try:
        yield
    finally:
        process.start_child = COLD


@lru_cache
def warm_place() -> str:
    """The socket of the process to fork, which is started here and ends with this process."""
    place = f"\0tapir-warm-{secrets.token_hex(8)}"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(place)
        listener.listen(64)
        parent = subprocess.Popen(
            [sys.executable, "-P", __file__, str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
    FORKED.append(parent.pid)
    atexit.register(parent.communicate)  # closes its input and waits
    return place


# The side of the process that is forked


def serve(listener: socket.socket) -> None:
    """Start a process for each request until standard input closes."""
    while 0 not in select.select([0, listener], [], [])[0]:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        connection, _ = listener.accept()
        with connection:
            message, files, *_ = socket.recv_fds(connection, LARGEST_REQUEST, 3)
            if message:
                request = json.loads(message)
                with suppress(Exception):  # the process meets the same error and reports it
                    import_libraries(warm_module(request["command"]))
                place = listener.getsockname()
                if os.fork() == 0:
                    listener.close()
                    watch(connection, request, files, f"\0{place[1:].decode()}")
            for file in files:
                os.close(file)
    with suppress(ChildProcessError):
        while True:
            os.wait()


def import_libraries(module: str) -> None:
    for name in (*LIBRARIES.get(module, ()), module):
        if name and find_spec(name.partition(".")[0]):
            importlib.import_module(name)


def watch(connection: socket.socket, request: Mapping[str, Any], files: Sequence[int], place: str) -> None:
    """Start the process, report its id and, when it ends, its exit code. Its id is kept until the other side has read
    the code, as that of a child is until its parent has waited for it."""
    waiting, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        connection.close()
        os.close(waiting)
        become(request, files, ready, place)
    os.close(ready)
    for file in files:
        os.close(file)
    os.read(waiting, 1)  # it has its own session now
    with suppress(ConnectionError):  # the other side has ended
        connection.send(str(pid).encode())
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        if ended:
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            connection.send(str(code).encode())
            connection.recv(1)
    os.waitpid(pid, 0)
    os._exit(0)


def become(request: Mapping[str, Any], files: Sequence[int], ready: int, place: str) -> None:
    """Turn into the process that was asked for, and end as it ends."""
    code = 1
    try:
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.close(ready)
        os.environ.clear()
        os.environ.update(request["variables"])
        os.chdir(request["folder"])
        process.start_child = partial(start_child, place=place)  # type: ignore[assignment]
        run_as_main(request["command"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code & 0xFF)


def run_as_main(command: Sequence[str]) -> None:
    """Run the module or file of a command as `__main__`, with the path and the sitecustomize of PYTHONPATH."""
    path = [name for name in os.environ.get("PYTHONPATH", "").split(os.pathsep) if name]
    sys.path[:] = [*path, *(name for name in sys.path if name not in path)]
    importlib.invalidate_caches()
    if any((Path(name) / "sitecustomize.py").is_file() for name in path):
        sys.modules.pop("sitecustomize", None)
        sys.orig_argv = [*command]
        importlib.import_module("sitecustomize")
    sys.orig_argv = [*command]
    if command[1] == "-P":
        sys.argv = [command[3], *command[4:]]
        sys.modules.pop(command[3], None)  # as in a cold process, which has not imported it
        runpy.run_module(command[3], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*command[1:]]
        runpy.run_path(command[1], run_name="__main__")


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        serve(listening)
