"""A heavy stage in its own process: its parent shows its progress and its errors, and takes it along when it dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tapir_local.assets import CHECKOUT
from tapir_local.errors import TapirError
from tapir_local.printable import printable
from tapir_local.private import private_file
from tapir_local.rundir import write_record

Progress = Callable[[int, int, str], None]
OWNED = "TAPIR_LOCAL_OWNED"  # set in a child whose standard input is its parent's life line
# Threads that wait for each other sleep after a moment instead of spinning on: on two cores shared with other jobs a
# training did 200 to 400 tokens/s with torch's default and over 1,000 so.
PATIENT = {"GOMP_SPINCOUNT": "1000"}
# As python's -P, which does not reach a launcher's processes: a datasets.py in the user's folder is not ours.
LAUNCHED = {"PYTHONSAFEPATH": "1"}
KILLED = "Signal 9 (SIGKILL)"  # how torch's launcher tells of one of its processes
GRACE = 5.0  # seconds between asking a child to stop and killing it


class OutOfMemory(TapirError):
    """Memory ran out, main or the GPU's, or probably did: less at once may fit."""


class Killed(OutOfMemory):
    """A process ended by SIGKILL, which is how the kernel takes memory back."""


def say_on_stderr(text: str) -> None:
    """A remark for people, where nobody has said how to show one."""
    print(printable(text), file=sys.stderr)


def remark(progress: Progress, text: str) -> None:
    """A line that the user of a heavy stage is to read: a report of 0 of 0, which is no progress."""
    progress(0, 0, text)


def run_module(
    module: str,
    folder: Path,
    log: Path,
    progress: Progress | None = None,
    say: Callable[[str], None] = say_on_stderr,
    launcher: Sequence[str] = (),
) -> None:
    """Run `python -m module folder` and wait for it; what it writes to stderr goes to `log`.

    `progress` gets (done, total, note), `say` its remarks. A `launcher` is a command that starts several processes of
    the module (`accelerate launch …`), of which the first reports. TapirError: the child's own, or one that names the
    log and its last line. The child is stopped when this is interrupted, and ends by itself when this process dies.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    private_file(log)
    start = [beside_python(launcher[0]), *launcher[1:]] if launcher else [sys.executable, "-P"]
    with log.open("wb", buffering=0) as errors:  # the child writes at the same place
        child = popen([*start, "-m", module, str(folder)], errors, LAUNCHED if launcher else {}, log)
        try:
            failure = follow(child.stdout or [], progress, say, errors)
            code = child.wait()
        finally:
            stop(child)
    if failure or code:
        raise failure or death(module, code, log)


def popen(command: Sequence[str], errors: IO[bytes], more: Mapping[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """The child, in a session of its own: Ctrl-C reaches the parent alone, which stops the whole group."""
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**environment(), **more},
            start_new_session=True,
        )
    except OSError as error:
        what = f"{command[0]} cannot be started: {error.strerror}"
        raise TapirError(what, where=str(log), fix="Correct train.launcher.") from error


def beside_python(name: str) -> str:
    """A command of the environment that we run in, which need not be on the PATH; else the name as it is."""
    here = Path(sys.executable).parent / name  # a path from the root stays what it is
    return str(here) if here.is_file() else name


def in_own_process(
    module: str,
    job: Any,
    folder: Path,
    progress: Progress | None = None,
    say: Callable[[str], None] = say_on_stderr,
    launcher: Sequence[str] = (),
) -> None:
    """Run a module on a job, a record that it finds as job.json in `folder`; its log is left there too."""
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "job.json", job)
    run_module(module, folder, folder / f"{module.rpartition('.')[2]}.log", progress, say, launcher)


def environment() -> dict[str, str]:
    """The child's: patient threads, the life line, and our own modules where they are not installed."""
    ours = [str(CHECKOUT)] if (CHECKOUT / "pyproject.toml").is_file() else []
    path = os.pathsep.join([*ours, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**PATIENT, **os.environ, OWNED: "1", **({"PYTHONPATH": path} if path else {})}


def follow(
    lines: Iterable[bytes], progress: Progress | None, say: Callable[[str], None], log: IO[bytes]
) -> TapirError | None:
    """Pass the child's progress and remarks on until it closes its output; the error that it reported, if it did.

    What is no report is a launcher's own, and goes to the log.
    """
    failure = None
    for line in lines:
        if not line.startswith(b"{"):
            log.write(line)
            continue
        said = json.loads(line)
        if "error" in said:
            failure = (OutOfMemory if said.get("memory") else TapirError)(**said["error"])
        elif not said["total"]:
            say(said["note"])
        elif progress:
            progress(said["done"], said["total"], said["note"])
    return failure


def stop(child: "subprocess.Popen[bytes]") -> None:
    """End the child and all that it started, if it is still there, and close its pipes."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe:
            pipe.close()


def death(module: str, code: int, log: Path) -> TapirError:
    """What to say of a child that ended with `code` (negative: by that signal) and reported no error of its own."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code == -signal.SIGKILL or any(KILLED in line for line in lines[-40:]):
        return Killed(
            f"{module} was killed (signal 9), probably because the memory ran out",
            where=str(log),
            fix="Lower the batch size or max_length, or close other programs; the same command goes on from here.",
        )
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed (exit code {code})"
    last = f": {lines[-1]}" if lines else ""
    return TapirError(
        f"{module} {how}{last}",
        where=str(log),
        fix="The whole message is in that file; the same command goes on from here.",
    )


def child_main(work: Callable[[Path, Progress], None], environment: Mapping[str, str] | None = None) -> int:
    """The child's side: do `work` on the folder named in the arguments and report to the parent; the exit code.

    Standard output carries only the reports; whatever libraries print goes to standard error. Of several processes
    that a launcher has started, the first alone reports progress, and any its error.
    """
    os.environ.update(environment or {})
    if os.environ.get(OWNED):
        threading.Thread(target=end_with_parent, daemon=True).start()
    report = reporter()
    try:
        work(Path(sys.argv[1]), lambda done, total, note: report({"done": done, "total": total, "note": note}))
    except TapirError as error:
        shown = {"what": error.what, "where": error.where, "fix": error.fix}
        report({"error": shown, "memory": isinstance(error, OutOfMemory)})
        traceback.print_exc()
        return 1
    return 0


def reporter() -> Callable[[Mapping[str, Any]], None]:
    """A function that writes one line of JSON to what was standard output, which from now on is standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    first = os.environ.get("RANK", "0") == "0"

    def report(value: Mapping[str, Any]) -> None:
        if first or "error" in value:
            print(json.dumps(value), file=out, flush=True)

    return report


def end_with_parent() -> None:
    """Wait for the end of the life line, which the parent's death closes, then end this process and all it started."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)
