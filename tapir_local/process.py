"""A heavy stage in its own process: its parent shows its progress and its errors, and takes it along when it dies."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from tapir_local.errors import TapirError
from tapir_local.files import private_file, write_record
from tapir_local.memory import count_cpus
from tapir_local.printable import printable
from tapir_local.resources import CHECKOUT

Progress = Callable[[int, int, str], None]
OWNED_VARIABLE = "TAPIR_LOCAL_OWNED"  # set in a child whose standard input is its parent's life line
MARK_VARIABLE = (
    "TAPIR_LOCAL_MARK"  # in a child: the word before each of its reports, drawn anew, so that no other line has it
)
# Threads that wait for each other sleep after a moment instead of spinning on: on two cores shared with other jobs a
# training did 200 to 400 tokens/s with torch's default and over 1,000 so.
THREAD_VARIABLES = {"GOMP_SPINCOUNT": "1000"}
# As python's -P, which does not reach a launcher's processes: a datasets.py in the user's folder is not ours.
LAUNCHER_VARIABLES = {"PYTHONSAFEPATH": "1"}
LAUNCHER_KILLED = "Signal 9 (SIGKILL)"  # how torch's launcher tells of one of its processes
# Names of variables that hold a key, a token or a password.
SECRET_NAME = re.compile(r"(.*_)?(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)", re.IGNORECASE)
WITHHELD_NAMES: ContextVar[frozenset[str]] = ContextVar("NAMED", default=frozenset())  # further such names, of a recipe
ALLOWED_SECRETS = {
    "tapir_local.training.classifier": {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
}  # its encoder comes from the Hub
STOP_SECONDS = 5.0  # seconds between asking a child to stop and killing it


class OutOfMemory(TapirError):
    """Memory ran out, main or the GPU's, or probably did: less at once may fit."""


class Unsupported(TapirError):
    """What was tried first does not work here, and another way may."""


class Crashed(TapirError):
    """A library ended the process, by SIGABRT or SIGSEGV as a rule."""


class Killed(OutOfMemory):
    """A process ended by SIGKILL, which is how the kernel takes memory back."""


ERROR_KINDS: Mapping[str, type[TapirError]] = {kind.__name__: kind for kind in (OutOfMemory, Unsupported)}


def say_on_stderr(text: str) -> None:
    """A remark for people, where nobody has said how to show one."""
    print(printable(text), file=sys.stderr)


def send_remark(progress: Progress, text: str) -> None:
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
    start = [find_command(launcher[0]), *launcher[1:]] if launcher else [sys.executable, "-P"]
    mark = secrets.token_hex(8)
    variables = {**child_environment(module), **(LAUNCHER_VARIABLES if launcher else {}), MARK_VARIABLE: mark}
    with log.open("wb", buffering=0) as errors:  # the child writes at the same place
        child = start_child([*start, "-m", module, str(folder)], errors, variables, log)
        try:
            failure = relay_reports(read_reports(child.stdout or [], mark.encode(), errors), progress, say)
            code = child.wait()
        finally:
            stop_child(child)
    if failure or code:
        raise failure or exit_error(module, code, log)


def start_child(
    command: Sequence[str], errors: IO[bytes], variables: Mapping[str, str], log: Path
) -> "subprocess.Popen[bytes]":
    """The child, in a session of its own: Ctrl-C reaches the parent alone, which stops the whole group."""
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=variables,
            start_new_session=True,
        )
    except OSError as error:
        what = f"{command[0]} cannot be started: {error.strerror}"
        raise TapirError(what, where=str(log), fix="Correct train.launcher.") from error


def find_command(name: str) -> str:
    """A command of the environment that we run in, which need not be on the PATH; else the name as it is."""
    here = Path(sys.executable).parent / name  # a path from the root stays what it is
    return str(here) if here.is_file() else name


def run_in_process(
    work: Callable[[Path, Progress], None],
    job: Any,
    folder: Path,
    progress: Progress | None = None,
    say: Callable[[str], None] = say_on_stderr,
    launcher: Sequence[str] = (),
) -> None:
    """Run the module that defines `work` as a process of its own; its `__main__` block must call `child_main(work)`.

    The job is a record, written to job.json in `folder`, where `work` reads it; the log is left there too.
    """
    module = work.__module__
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "job.json", job)
    run_module(module, folder, folder / f"{module.rpartition('.')[2]}.log", progress, say, launcher)


def child_environment(module: str = "") -> dict[str, str]:
    """The child's: patient threads, as many as there are processors for, the life line, our own modules where they are
    not installed; no keys, which a child has no use for."""
    fewer = {"OMP_NUM_THREADS": str(count_cpus())} if count_cpus() < len(os.sched_getaffinity(0)) else {}
    kept = {name: value for name, value in os.environ.items() if not is_secret(name, module)}
    return {**THREAD_VARIABLES, **fewer, **kept, OWNED_VARIABLE: "1", **python_path_variable()}


def is_secret(name: str, module: str = "") -> bool:
    """Whether a variable is withheld from a child that runs `module`: a key, a token or a password by its name."""
    return (
        SECRET_NAME.fullmatch(name) is not None or name in WITHHELD_NAMES.get()
    ) and name not in ALLOWED_SECRETS.get(module, ())


@contextmanager
def withhold_variables(names: Iterable[str]) -> Iterator[None]:
    """Withhold some more variables, such as a recipe's api_key_env, from the children that are started meanwhile."""
    token = WITHHELD_NAMES.set(WITHHELD_NAMES.get() | frozenset(names))
    try:
        yield
    finally:
        WITHHELD_NAMES.reset(token)


def read_reports(lines: Iterable[bytes], mark: bytes, log: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The child's reports: what follows the mark in a line. All else is a launcher's own, and goes to the log."""
    for line in lines:
        before, marked, after = line.partition(mark)
        log.write(before)
        if marked:
            try:
                text = after.decode("utf-8", "replace")
                report, end = json.JSONDecoder().raw_decode(text, 1)  # another process may write into the same line
                log.write(text[end:].strip("\n").encode())
                yield report
            except ValueError:
                log.write(after)


def python_path_variable() -> dict[str, str]:
    """What lets a child find our own modules where they are not installed."""
    places = [str(CHECKOUT)] if (CHECKOUT / "pyproject.toml").is_file() else []
    path = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path} if path else {}


def relay_reports(
    said: Iterable[Mapping[str, Any]], progress: Progress | None, say: Callable[[str], None]
) -> TapirError | None:
    """Pass the child's progress and remarks on until it closes its output; the error that it reported, if it did."""
    failure = None
    for report in said:
        if "error" in report:
            failure = ERROR_KINDS.get(report["kind"], TapirError)(**report["error"])
        elif not report["total"]:
            say(report["note"])
        elif progress:
            progress(report["done"], report["total"], report["note"])
    return failure


def stop_child(child: "subprocess.Popen[bytes]") -> None:
    """End the child and all that it started, if it is still there, and close its pipes."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe:
            pipe.close()


def exit_error(module: str, code: int, log: Path) -> TapirError:
    """What to say of a child that ended with `code` (negative: by that signal) and reported no error of its own."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code == -signal.SIGKILL or any(LAUNCHER_KILLED in line for line in lines[-40:]):
        return Killed(
            f"{module} was killed (signal 9), probably because the memory ran out",
            where=str(log),
            fix="Lower the batch size or max_length, or close other programs; the same command goes on from here.",
        )
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed (exit code {code})"
    last = f": {lines[-1]}" if lines else ""
    return (Crashed if code < 0 else TapirError)(
        f"{module} {how}{last}",
        where=str(log),
        fix="The whole message is in that file; the same command goes on from here.",
    )


def signal_and_last_line(code: int, errors: bytes) -> tuple[str, str]:
    """How a child process ended: the name of the signal, "" if none, and the last line of its standard error."""
    lines = [line.strip() for line in errors.decode("utf-8", "replace").split("\n") if line.strip()]
    return signal.Signals(-code).name if code < 0 else "", lines[-1] if lines else ""


def child_main(work: Callable[[Path, Progress], None], child_environment: Mapping[str, str] | None = None) -> int:
    """The child's side: do `work` on the folder named in the arguments and report to the parent; the exit code.

    Standard output carries only the reports; whatever libraries print goes to standard error. Of several processes
    that a launcher has started, the first alone reports progress, and any its error.
    """
    os.environ.update(child_environment or {})
    if os.environ.get(OWNED_VARIABLE):
        threading.Thread(target=end_with_parent, daemon=True).start()
    report = open_report_channel()
    try:
        work(Path(sys.argv[1]), lambda done, total, note: report({"done": done, "total": total, "note": note}))
    except TapirError as error:
        shown = {"what": error.what, "where": error.where, "fix": error.fix}
        report({"error": shown, "kind": type(error).__name__})
        traceback.print_exc()
        return 1
    return 0


def open_report_channel() -> Callable[[Mapping[str, Any]], None]:
    """A function that writes one line, the mark and JSON, to what was standard output, from now on standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    mark = os.environ.get(MARK_VARIABLE, "report")
    first = os.environ.get("RANK", "0") == "0"

    def report(value: Mapping[str, Any]) -> None:
        if first or "error" in value:
            print(f"{mark} {json.dumps(value)}", file=out, flush=True)

    return report


def end_with_parent() -> None:
    """Wait for the end of the life line, which the parent's death closes, then end this process and all it started."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)
