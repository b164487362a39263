"""What a command writes must be none of the files that it reads, under whatever name."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tapir_local.errors import TapirError

NAME_ANOTHER_FILE = "Name another, or delete it first."


def check_output(
    out: Path,
    reads: Iterable[Path | None],
    *,
    beside: Sequence[str] = (),
    force: bool = False,
    fix: str = NAME_ANOTHER_FILE,
) -> None:
    """TapirError where the command would write over what it `reads`, or where `out` is there already, unless `force`.

    `beside` are the ends of the names of files that it writes beside `out`. Links and other spellings are seen through.
    """
    sources = [path for path in reads if path is not None]
    for path in (out, *(out.with_name(out.name + end) for end in beside)):
        found = next((source for source in sources if would_overwrite(path, source)), None)
        if found is not None:
            words = "the output" if path == out else f"{path}, which is written beside the output,"
            raise TapirError(
                f"{words} is a file that the command reads ({found})", where=str(out), fix="Name another output."
            )
    if os.path.lexists(out) and not force:
        raise TapirError("the file is there already", where=str(out), fix=fix)


def would_overwrite(path: Path, source: Path) -> bool:
    """Whether a path is a file or folder that is read, or a folder that holds it."""
    try:
        if path.samefile(source):
            return True
    except OSError:  # one of them is not there
        pass
    target, whole = path.resolve(), source.resolve()
    return target == whole or target in whole.parents
