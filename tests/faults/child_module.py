"""A module that runs in a process of its own, as training does, and writes down what it was given."""

import os
import sys
from pathlib import Path
from typing import Any

from tapir_local.process import serve_parent


def work(folder: Path, parent: Any) -> None:
    """Write this process's environment and command line into `folder`."""
    (folder / "environ").write_bytes(Path("/proc/self/environ").read_bytes() + repr(dict(os.environ)).encode())
    (folder / "cmdline").write_bytes(Path("/proc/self/cmdline").read_bytes())


if __name__ == "__main__":
    sys.exit(serve_parent(work))
