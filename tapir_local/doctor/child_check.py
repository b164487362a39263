"""Run a check in a child process, for a library that may end its process or must not share one with another."""

import subprocess
import sys
from collections.abc import Sequence

from tapir_local.process import child_environment, signal_and_last_line

CHECK_TIMEOUT = 120.0  # seconds; a check takes about 5, more from a slow disk


def run_check(arguments: Sequence[str]) -> subprocess.CompletedProcess[bytes] | None:
    """Run this Python with the given arguments, such as `-m MODULE`; None if it takes too long."""
    command = [sys.executable, "-P", *arguments]
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=child_environment(),
            timeout=CHECK_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None


def check_fault(arguments: Sequence[str]) -> str:
    """What ended a check, such as `SIGILL` or the last line of an error; "" if it succeeded."""
    done = run_check(arguments)
    if done is None:
        return f"no answer within {CHECK_TIMEOUT:.0f} s"
    ended_by, last_line = signal_and_last_line(done.returncode, done.stderr)
    return (ended_by or last_line or "it failed") if done.returncode else ""
