"""A heavy stage in its own process: its parent shows its progress and its errors, and takes it along when it dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tapir_local.assets import CHECKOUT
from tapir_local.errors import TapirError
from tapir_local.rundir import write_record

Progress = Callable[[int, int, str], None]
OWNED = "TAPIR_LOCAL_OWNED"  # set in a child whose standard input is its parent's life line
# Threads that wait for each other sleep after a moment instead of spinning on: on two cores shared with other jobs a
# training did 200 to 400 tokens/s with torch's default and over 1,000 so.
PATIENT = {"GOMP_SPINCOUNT": "1000"}
GRACE = 5.0  # seconds between asking a child to stop and killing it


def run_module(module: str, folder: Path, log: Path, progress: Progress | None = None) -> None:
    """Run `python -m module folder` and wait for it; what it writes to stderr goes to `log`.

    `progress` gets (done, total, note). TapirError: the child's own, or one that names the log and its last line. The
    child is stopped when this is interrupted, and ends by itself when this process dies.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(folder)],  # -P: a datasets.py in the user's folder is not ours
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which stops the whole group
        )
        try:
            failure = follow(child.stdout or [], progress)
            code = child.wait()
        finally:
            stop(child)
    if failure or code:
        raise failure or death(module, code, log)


def in_own_process(module: str, job: Any, folder: Path, progress: Progress | None = None) -> None:
    """Run a module on a job, a record that it finds as job.json in `folder`; its log is left there too."""
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "job.json", job)
    run_module(module, folder, folder / f"{module.rpartition('.')[2]}.log", progress)


def environment() -> dict[str, str]:
    """The child's: patient threads, the life line, and our own modules where they are not installed."""
    ours = [str(CHECKOUT)] if (CHECKOUT / "pyproject.toml").is_file() else []
    path = os.pathsep.join([*ours, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**PATIENT, **os.environ, OWNED: "1", **({"PYTHONPATH": path} if path else {})}


def follow(lines: Iterable[bytes], progress: Progress | None) -> TapirError | None:
    """Pass the child's progress on until it closes its output; the error that it reported, if it did."""
    failure = None
    for line in lines:
        said = json.loads(line)
        if "error" in said:
            failure = TapirError(**said["error"])
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
    if code == -signal.SIGKILL:
        return TapirError(
            f"{module} was killed (signal 9), probably because the memory ran out",
            where=str(log),
            fix="Lower the batch size or max_length, or close other programs; the same command goes on from here.",
        )
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed (exit code {code})"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    return TapirError(
        f"{module} {how}{last}",
        where=str(log),
        fix="The whole message is in that file; the same command goes on from here.",
    )


def child_main(work: Callable[[Path, Progress], None], environment: Mapping[str, str] | None = None) -> int:
    """The child's side: do `work` on the folder named in the arguments and report to the parent; the exit code.

    Standard output carries only the reports; whatever libraries print goes to standard error.
    """
    os.environ.update(environment or {})
    if os.environ.get(OWNED):
        threading.Thread(target=end_with_parent, daemon=True).start()
    report = reporter()
    try:
        work(Path(sys.argv[1]), lambda done, total, note: report({"done": done, "total": total, "note": note}))
    except TapirError as error:
        report({"error": {"what": error.what, "where": error.where, "fix": error.fix}})
        traceback.print_exc()
        return 1
    return 0


def reporter() -> Callable[[Mapping[str, Any]], None]:
    """A function that writes one line of JSON to what was standard output, which from now on is standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def report(value: Mapping[str, Any]) -> None:
        print(json.dumps(value), file=out, flush=True)

    return report


def end_with_parent() -> None:
    """Wait for the end of the life line, which the parent's death closes, then end this process and all it started."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)
