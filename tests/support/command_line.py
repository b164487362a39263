"""The program in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tapir(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program in its own process."""
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
