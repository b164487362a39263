"""Start the program again and again cheaply: this process imports everything once, and each start is a fork of it.

    python run_worker.py      with tests/faults, tests/support and the checkout on PYTHONPATH (see campaign.Worker)

Each line of its input is a job as JSON: {"words": [...], "log": PATH, …}; `run_child` has the other fields. It prints
the child's process id, and when the child has ended, its exit code. The child runs the whole command line: real store,
real HTTP, real files. Only what trains, exports and generates is a fake (tests/support/fakes.py).
"""

import ctypes
import importlib
import itertools
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import fakes

import tapir_local
from tapir_local.commands import main as command_line
from tapir_local.process import call_in_process
from tapir_local.recipe.schema import Recipe
from tapir_local.run_dir import RunDir
from tapir_local.stages import backends as stage_backends
from tapir_local.stages.context import Backends
from tapir_local.teacher import http

REAL_BACKENDS = stage_backends.real_backends
NOBODY = 65534
LIBRARIES = ("aiohttp", "openai.resources.chat", "rich.console", "rich.progress", "scipy.stats", "sqlite_utils", "h11")
GENERATE_SECONDS = 0.001  # for each of the student's answers, so that a kill can fall between two


@contextmanager
def half_real(recipe: Recipe, run: RunDir, say: Callable[[str], None], *mode: Any) -> Iterator[Backends]:
    """The real teacher, judge and store; fakes that learn for the rest."""

    def generate(**given: Any) -> Any:
        keep = given.pop("on_result")

        def slowly(row: Any) -> None:
            time.sleep(GENERATE_SECONDS)
            keep(row)

        return fakes.generate(**given, on_result=slowly)

    def train(**given: Any) -> None:
        if os.environ.get("TAPIR_TEST_CHILD"):
            import child_module

            call_in_process(child_module.work, {}, run.path / "child", {})
        fakes.train(**given)

    with REAL_BACKENDS(recipe, run, say, *mode) as made:
        fake = fakes.fake_backends(fakes.World())
        yield replace(
            fake,
            teacher=made.teacher,
            judge=made.judge,
            judge_ahead=made.judge_ahead,
            replay=made.replay,
            generate=generate,
            train=train,
        )


def run_child(job: dict[str, Any]) -> int:
    """Run the command line in this process; the exit code."""
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job.get("environ", {}))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if shift := job.get("clock"):
        now, asked, turns = time.time, itertools.count(), job.get("clock_turns")
        time.time = lambda: now() + (shift if not turns or next(asked) // turns % 2 else 0.0)
    if job.get("obeys_modes"):
        obey_modes()
    if job.get("unprivileged") and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if limit := job.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if job.get("pauses") is None:
        http.backoff_seconds = lambda tries, chance: 0.01
    stage_backends.real_backends = half_real
    sys.argv = ["tapir-local", *job["words"]]
    try:
        command_line.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:  # noqa: BLE001  (whatever it is, the campaign must see it)
        traceback.print_exc()
        return 99
    return 0


def obey_modes() -> None:
    """Give up root's right to ignore the modes of files, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (capset(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    version_and_pid, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    failed = libc.capget(version_and_pid, sets)
    for place in (0, 1):  # the effective and the permitted ones
        sets[place] &= ~0b110
    if failed or libc.capset(version_and_pid, sets):
        raise OSError(ctypes.get_errno(), "capset")


def import_everything() -> None:
    """Import what a run needs, so that a fork of this process begins at once."""
    for module in pkgutil.walk_packages(tapir_local.__path__, "tapir_local."):
        importlib.import_module(module.name)
    for name in LIBRARIES:
        importlib.import_module(name)


def main() -> None:
    """Fork a child for each job."""
    import_everything()
    for line in sys.stdin:
        job = json.loads(line)
        if arguments := job.get("mount"):
            subprocess.run(["mount", *arguments], check=True)
        pid = os.fork()
        if not pid:
            code = run_child(job)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
