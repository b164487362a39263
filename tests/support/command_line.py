"""The program in a process of its own, and the processes that a test has started."""

import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from warm import FORKED, run_command

ROOT = Path(__file__).parents[2]


def tapir(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program in its own process, which starts warm (see `warm.py`) unless it gets a path of its own."""
    if "PYTHONPATH" not in environment:
        return run_command(*words, cwd=cwd, **environment)
    command = [sys.executable, str(ROOT / "cli.py"), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


def refused(*words: str, cwd: Path | None = None, code: int = 1) -> str:
    """What is said of a wrong command: on stderr, no traceback, the exit code."""
    out = tapir(*words, cwd=cwd)
    assert out.returncode == code, out.stderr
    assert "Traceback" not in out.stderr
    assert out.stdout == ""
    return out.stderr


def read_terminal(ours: int) -> str:
    """All that a terminal shows once its other end is closed everywhere; closes `ours`. One read may return a part."""
    shown = b""
    with suppress(OSError):  # EIO: nothing is left
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    return shown.decode()


def tapir_on_terminal(*words: str, typed: str, cwd: Path | None = None) -> tuple[int, str]:
    """The exit code of the program, and what it says on the terminal where `typed` waits as its input."""
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    command = [sys.executable, str(ROOT / "cli.py"), *words]
    child = subprocess.run(command, stdin=theirs, stderr=theirs, stdout=subprocess.DEVNULL, cwd=cwd, check=False)
    os.close(theirs)
    return child.returncode, read_terminal(ours)


def children() -> list[int]:
    """The processes that this one has started and that still run; a zombie does not count, nor does what warm
    processes are forked from."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
            if int(parent) == os.getpid() and state != "Z" and int(stat.parent.name) not in FORKED:
                found.append(int(stat.parent.name))
    return found


def kill_llama(number: int = signal.SIGKILL) -> None:
    """Send a signal to the process in which llama.cpp answers."""
    lines = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children()}
    (child,) = [child for child, line in lines.items() if b"tapir_local.inference.llama_process" in line]
    os.kill(child, number)


def record_loaded_modules(folder: Path) -> dict[str, str]:
    """The environment of a command whose processes write which of torch and llama_cpp they have imported.

    Each writes a line into `folder`/loaded when it ends.
    """
    (folder / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "def say():\n"
        "    found = [name for name in ('torch', 'llama_cpp') if name in sys.modules]\n"
        f"    print(*found, file=open({str(folder / 'loaded')!r}, 'a'))\n"
        "atexit.register(say)\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


NO_NETWORK = """
import socket as _socket
def _refuse(event, values):
    if event == "socket.connect" and values[0].family != _socket.AF_UNIX:
        host = str(values[1][0])
    elif event == "socket.getaddrinfo":
        host = str(values[0])
    else:
        return
    if host not in ("127.0.0.1", "::1", "localhost", "None", ""):
        print(host, file=open(PLACE, "a"))
        raise ConnectionRefusedError(f"no network: {host}")
sys.addaudithook(_refuse)
"""


def refuse_network(folder: Path) -> None:
    """Every Python process with `folder` on its path reaches this machine only, and notes other hosts in `folder`."""
    with (folder / "sitecustomize.py").open("a") as file:
        file.write(NO_NETWORK.replace("PLACE", repr(str(folder / "refused-hosts"))))


def network_name_space() -> list[str]:
    """The beginning of a command that runs without any network; [] where the machine does not allow it."""
    command = ["unshare", "--map-root-user", "--net"]
    with suppress(OSError):
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    return []


def loaded_modules(folder: Path) -> set[str]:
    """The modules that each process has written, as one text a process, such as `torch llama_cpp`."""
    return set((folder / "loaded").read_text().splitlines())
