"""Paths as people write them, `~` for the home folder."""

from pathlib import Path


def at_home(path: str | None) -> str | None:
    """A path with its `~` expanded; relative ones are left as they are: from the current folder."""
    if path is None or not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:  # ~nobody: then it is a file of that name
        return path
