"""Record what the output of a stage is when it is written, and notice that it was changed later."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapir_local.files import file_sha256
from tapir_local.printable import format_count

MAX_HASHED_BYTES = 64 << 20  # larger outputs, such as a GGUF, are compared by size: hashing takes a second a gigabyte


def describe_output(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file, with the number of its "rows" if it is JSON lines; of a folder with its "files".

    The digest of a folder is that of its files' names and digests. Hidden files do not count.
    """
    if path.is_file():
        found = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        return {"rows": count_lines(path), **found} if path.suffix == ".jsonl" else found
    files = folder_files(path)
    lines = [f"{file_sha256(file)}  {file.relative_to(path)}\n" for file in files]
    digest = hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
    return {"files": len(files), "bytes": output_size(path), "sha256": digest}


def describe_change(path: Path, known: Mapping[str, Any]) -> str:
    """How an output differs from what `describe_output` said of it; "" if it does not, or if nothing is known.

    The contents are compared up to MAX_HASHED_BYTES, and only the size of anything larger.
    """
    if "sha256" not in known:  # a run of an older version
        return ""
    size = output_size(path)
    if size == known["bytes"] and (size > MAX_HASHED_BYTES or describe_output(path)["sha256"] == known["sha256"]):
        return ""
    rows = count_lines(path) if "rows" in known else 0
    if "rows" in known and rows != known["rows"]:
        return f"it has {format_count(rows, 'row')}, not {known['rows']:,} as written"
    return f"it has {size:,} bytes, not {known['bytes']:,} as written" if size != known["bytes"] else "other contents"


def folder_files(folder: Path) -> list[Path]:
    """The files of a folder that are not hidden, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def output_size(path: Path) -> int:
    """The bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else folder_files(path)))


def count_lines(path: Path) -> int:
    """The number of lines in a file; a last line without its end counts."""
    with path.open("rb") as file:
        return sum(1 for _ in file)
