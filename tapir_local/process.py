"""Run a heavy stage in its own process, which reports progress and errors and ends when its parent dies."""

import ctypes
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
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from tapir_local.errors import TapirError
from tapir_local.files import private_file, write_record
from tapir_local.memory import count_cpus
from tapir_local.printable import printable
from tapir_local.records import Progress
from tapir_local.resources import CHECKOUT

OWNED_VARIABLE = "TAPIR_LOCAL_OWNED"  # set in a child that ends when its standard input closes
MARK_VARIABLE = "TAPIR_LOCAL_MARK"  # the random prefix of a child's reports
# Waiting OpenMP threads sleep early instead of spinning: on two cores shared with other jobs, training ran at over
# 1,000 tokens/s with this and at 200 to 400 with torch's default.
THREAD_VARIABLES = {"GOMP_SPINCOUNT": "1000"}
# Without gdb's output after llama.cpp's last words, which an error quotes from the log.
LLAMA_VARIABLES = {"GGML_NO_BACKTRACE": "1"}
# Like python -P, which a launcher does not pass on: a datasets.py in the current folder must not shadow the package.
LAUNCHER_VARIABLES = {"PYTHONSAFEPATH": "1"}
LAUNCHER_KILLED = "Signal 9 (SIGKILL)"  # how torch's launcher reports a killed process
# Names of environment variables that hold a key, a token or a password.
SECRET_NAME = re.compile(r"(.*_)?(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)", re.IGNORECASE)
WITHHELD_NAMES: ContextVar[frozenset[str]] = ContextVar("NAMED", default=frozenset())  # more such names, from a recipe
PASSED_NAMES: ContextVar[frozenset[str]] = ContextVar("PASSED", default=frozenset())  # secrets that a job needs
# Secrets that a module needs: the classifier downloads its encoder from the Hub.
ALLOWED_SECRETS = {"tapir_local.training.classifier": {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}}
PR_SET_PDEATHSIG = 1  # of prctl(2)
STOP_SECONDS = 5.0  # seconds between asking a child to stop and killing it
NO_VARIABLES: Mapping[str, str] = {}


class OutOfMemory(TapirError):
    """Main or GPU memory ran out, or probably did: a smaller batch may fit."""


class Unsupported(TapirError):
    """This method does not work here; another may."""


class Crashed(TapirError):
    """A library crashed the process, usually by SIGABRT or SIGSEGV."""


class Killed(OutOfMemory):
    """A process ended by SIGKILL, which the kernel sends when memory runs out."""


ERROR_KINDS: Mapping[str, type[TapirError]] = {kind.__name__: kind for kind in (OutOfMemory, Unsupported)}


def say_on_stderr(text: str) -> None:
    """Print a remark on stderr: the default where the caller passes no function to show it."""
    print(printable(text), file=sys.stderr)


def send_remark(progress: Progress, text: str) -> None:
    """Send a line for the user through `progress`, as a report of 0 of 0."""
    progress(0, 0, text)


def run_module(
    module: str,
    folder: Path,
    log: Path,
    progress: Progress | None = None,
    say: Callable[[str], None] = say_on_stderr,
    launcher: Sequence[str] = (),
) -> None:
    """Run `python -m module folder` and wait for it; its stderr goes to `log`.

    `progress` is called with (done, total, note), `say` with remarks. A `launcher` is a command that starts several
    processes of the module (`accelerate launch …`); the first of them reports. Raises the child's own TapirError, or
    one that names the log and its last line. The child is stopped on an interrupt, and ends when this process dies.
    """
    start = [find_command(launcher[0]), *launcher[1:]] if launcher else [sys.executable, "-P"]
    variables = {**child_environment(module), **(LAUNCHER_VARIABLES if launcher else {})}
    with open_child([*start, "-m", module, str(folder)], variables, log) as (child, reports):
        failure = relay_reports(reports, progress, say)
        code = child.wait()
    if failure or code:
        raise failure or exit_error(module, code, log)


@contextmanager
def open_child(
    command: Sequence[str], variables: Mapping[str, str], log: Path
) -> Iterator[tuple["subprocess.Popen[bytes]", Iterator[dict[str, Any]]]]:
    """Start a child whose stderr goes to `log`; yield it and its reports. It is stopped at the end of the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    private_file(log)
    mark = secrets.token_hex(8)
    with log.open("wb", buffering=0) as errors:  # unbuffered: the child writes to the same file
        child = start_child(command, errors, {**variables, MARK_VARIABLE: mark}, log)
        try:
            yield child, read_reports(child.stdout or [], mark.encode(), errors)
        finally:
            stop_child(child)


def start_child(
    command: Sequence[str], errors: IO[bytes], variables: Mapping[str, str], log: Path
) -> "subprocess.Popen[bytes]":
    """Start the child in its own session: Ctrl-C then reaches only the parent, which stops the child's group."""
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
    """The path of a command next to this Python, which need not be on the PATH; otherwise the name itself."""
    here = Path(sys.executable).parent / name  # an absolute path stays as it is
    return str(here) if here.is_file() else name


def run_in_process(
    work: Callable[[Path, Progress], None],
    job: Any,
    folder: Path,
    progress: Progress | None = None,
    say: Callable[[str], None] = say_on_stderr,
    launcher: Sequence[str] = (),
) -> None:
    """Run the module that defines `work` in its own process; its `__main__` block must call `child_main(work)`.

    The job is a record. It is written to job.json in `folder`, where `work` reads it; the log is written there too.
    """
    module = work.__module__
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "job.json", job)
    run_module(module, folder, folder / f"{module.rpartition('.')[2]}.log", progress, say, launcher)


def call_in_process(
    work: Callable[[Path, "Parent"], Any],
    job: Any,
    folder: Path,
    hooks: Mapping[str, Callable[..., Any]],
    variables: Mapping[str, str] = NO_VARIABLES,
    explain: "Callable[[str, int, Path], TapirError] | None" = None,
) -> Any:
    """As `run_in_process`, for `work` that calls functions of this process while it runs; return what `work` returns.

    The module's `__main__` block must call `serve_parent(work)`. `hooks` are the functions by name. They run in this
    process, in the order of the calls, and an exception of theirs stops the child. Arguments and results are JSON
    values; a dataclass arrives as an object. `variables` are added to the child's environment. `explain` makes the
    error of a child that ends without reporting one, as `exit_error` does.
    """
    module = work.__module__
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "job.json", job)
    log = folder / f"{module.rpartition('.')[2]}.log"
    command = [sys.executable, "-P", "-m", module, str(folder)]
    returned, failure = list[Any](), None
    with open_child(command, {**child_environment(module), **variables}, log) as (child, reports):
        for report in reports:
            if "call" in report:
                found = hooks[report["call"]](*report["values"])
                if report["waits"]:
                    send_reply(child, found)
            elif "returned" in report:
                returned.append(report["returned"])
            elif "error" in report:
                failure = reported_error(report)
        code = child.wait()
    if failure or code:
        raise failure or (explain or exit_error)(module, code, log)
    return returned[0] if returned else None


def send_reply(child: "subprocess.Popen[bytes]", value: Any) -> None:
    """Send a value to a child that waits for it; if the child has ended, its reports end too, and say so."""
    if child.stdin:
        with suppress(BrokenPipeError):
            os.write(child.stdin.fileno(), json.dumps(value).encode() + b"\n")


def child_environment(module: str = "") -> dict[str, str]:
    """The environment of a child that runs `module`: libraries' settings, the path of our modules, and no API keys."""
    fewer = {"OMP_NUM_THREADS": str(count_cpus())} if count_cpus() < len(os.sched_getaffinity(0)) else {}
    kept = {name: value for name, value in os.environ.items() if not is_secret(name, module)}
    return {**THREAD_VARIABLES, **LLAMA_VARIABLES, **fewer, **kept, OWNED_VARIABLE: "1", **python_path_variable()}


def is_secret(name: str, module: str = "") -> bool:
    """Whether the name of a variable says that it is a secret, which a child running `module` does not get."""
    secret = SECRET_NAME.fullmatch(name) is not None or name in WITHHELD_NAMES.get()
    return secret and name not in ALLOWED_SECRETS.get(module, ()) and name not in PASSED_NAMES.get()


@contextmanager
def withhold_variables(names: Iterable[str]) -> Iterator[None]:
    """Withhold more variables, such as a recipe's api_key_env, from children started within the block."""
    token = WITHHELD_NAMES.set(WITHHELD_NAMES.get() | frozenset(names))
    try:
        yield
    finally:
        WITHHELD_NAMES.reset(token)


@contextmanager
def pass_variables(names: Iterable[str]) -> Iterator[None]:
    """Give these variables, though they are secrets, to children started within the block."""
    token = PASSED_NAMES.set(frozenset(names))
    try:
        yield
    finally:
        PASSED_NAMES.reset(token)


def read_reports(lines: Iterable[bytes], mark: bytes, log: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The child's reports, which follow the mark in a line. All other output goes to the log."""
    for line in lines:
        before, marked, after = line.partition(mark)
        log.write(before)
        if marked:
            try:
                text = after.decode("utf-8", "replace")
                report, end = json.JSONDecoder().raw_decode(text, 1)  # another process may write to the same line
                log.write(text[end:].strip("\n").encode())
                yield report
            except ValueError:
                log.write(after)


def python_path_variable() -> dict[str, str]:
    """PYTHONPATH for a child, so that it finds our modules in a checkout that is not installed."""
    places = [str(CHECKOUT)] if (CHECKOUT / "pyproject.toml").is_file() else []
    path = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path} if path else {}


def relay_reports(
    received: Iterable[Mapping[str, Any]], progress: Progress | None, say: Callable[[str], None]
) -> TapirError | None:
    """Pass on the child's progress and remarks until it closes its output; return its error, if it reported one."""
    failure = None
    for report in received:
        if "error" in report:
            failure = reported_error(report)
        elif not report["total"]:
            say(report["note"])
        elif progress:
            progress(report["done"], report["total"], report["note"])
    return failure


def reported_error(report: Mapping[str, Any]) -> TapirError:
    """The error that a child has reported."""
    return ERROR_KINDS.get(report["kind"], TapirError)(**report["error"])


def stop_child(child: "subprocess.Popen[bytes]") -> None:
    """Stop the child and its process group if they still run, and close its pipes."""
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
    """The error for a child that ended with `code` (negative: that signal) without reporting one."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code == -signal.SIGKILL or any(LAUNCHER_KILLED in line for line in lines[-40:]):
        return Killed(
            f"{module} was killed (signal 9), probably because memory ran out",
            where=str(log),
            fix="Lower the batch size or max_length, or close other programs, and run the same command again.",
        )
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed (exit code {code})"
    last = f": {lines[-1]}" if lines else ""
    return (Crashed if code < 0 else TapirError)(
        f"{module} {how}{last}",
        where=str(log),
        fix="The whole message is in that file. The same command resumes from here.",
    )


def signal_and_last_line(code: int, errors: bytes) -> tuple[str, str]:
    """How a child process ended: the name of the signal, "" if none, and the last line of its standard error."""
    lines = [line.strip() for line in errors.decode("utf-8", "replace").split("\n") if line.strip()]
    return signal.Signals(-code).name if code < 0 else "", lines[-1] if lines else ""


class Parent:
    """The parent of a process, as the process that runs for it sees it."""

    def __init__(self, report: Callable[[Mapping[str, Any]], None]) -> None:
        self.report = report
        self.replies: SimpleQueue[bytes] = SimpleQueue()

    def progress(self, done: int, total: int, note: str) -> None:
        """Report progress; 0 of 0 is a remark."""
        self.report({"done": done, "total": total, "note": note})

    def tell(self, hook: str, *values: Any) -> None:
        """Have the parent call one of its hooks; this does not wait for it."""
        self.report({"call": hook, "values": values, "waits": False})

    def ask(self, hook: str, *values: Any) -> Any:
        """Have the parent call one of its hooks, and return what it returns."""
        self.report({"call": hook, "values": values, "waits": True})
        return json.loads(self.replies.get())


def child_main(work: Callable[[Path, Progress], None], environment: Mapping[str, str] | None = None) -> int:
    """Run `work` on the folder in the arguments, in the child, and report to the parent; return the exit code.

    Standard output carries only reports; what libraries print goes to standard error. If a launcher has started
    several processes, only the first reports progress, and each reports its own error.
    """
    return serve_parent(lambda folder, parent: work(folder, parent.progress), environment)


def serve_parent(work: Callable[[Path, Parent], Any], environment: Mapping[str, str] | None = None) -> int:
    """As `child_main`, for `work` that calls hooks of its parent and returns a value to it (see `call_in_process`)."""
    os.environ.update(environment or {})
    parent = Parent(open_report_channel())
    if os.environ.get(OWNED_VARIABLE):
        wake_at_parents_death()
        threading.Thread(target=end_with_parent, args=(parent.replies.put,), daemon=True).start()
    try:
        found = work(Path(sys.argv[1]), parent)
        if found is not None:
            parent.report({"returned": found})
    except TapirError as error:
        shown = {"what": error.what, "where": error.where, "fix": error.fix}
        parent.report({"error": shown, "kind": type(error).__name__})
        traceback.print_exc()
        return 1
    return 0


def wake_at_parents_death() -> None:
    """Have the kernel send SIGCONT when the parent dies: a process that was stopped (SIGSTOP) cannot end itself.

    Not SIGKILL: `end_with_parent` then ends the processes that this one has started too.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0)


def open_report_channel() -> Callable[[Mapping[str, Any]], None]:
    """Redirect standard output to standard error; return a function that writes a report to the original one."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    mark = os.environ.get(MARK_VARIABLE, "report")
    first = os.environ.get("RANK", "0") == "0"

    def report(value: Mapping[str, Any]) -> None:
        if first or "error" in value:
            print(f"{mark} {json.dumps(value, default=asdict)}", file=out, flush=True)

    return report


def end_with_parent(reply: Callable[[bytes], None]) -> None:
    """Pass on each line of standard input until it closes, which the parent's death causes; then kill this group."""
    pending = b""
    while part := os.read(0, 4096):
        *lines, pending = (pending + part).split(b"\n")
        for line in lines:
            reply(line)
    os.killpg(0, signal.SIGKILL)
