"""Seeds from where they lie: JSON, JSON lines, CSV, Parquet, lines of text, packed or not; datasets; the Hub."""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapir_local.data.formats import Table
from tapir_local.data.rows import (
    NULLS,
    SPELLED,
    checked,
    decoded,
    json_rows,
    table_rows,
    unpacked,
    without_nulls,
)
from tapir_local.errors import TapirError
from tapir_local.recipe.schema import Seeds
from tapir_local.resources import find_seeds

PARQUET = b"PAR1"


def read_table(seeds: Seeds) -> Table:
    """The rows that a recipe's seeds name, their columns by the names of seeds.columns.

    TapirError where there are none, or they cannot be read.
    """
    path = find_seeds(seeds.path)
    if path is None:
        return renamed(read_hub(seeds.path, seeds.subset, seeds.split), own_names(seeds))
    if seeds.subset is not None:
        fix = "seeds.subset is for datasets on the Hub; leave it out."
        raise TapirError(f"what lies on this machine has no subset {seeds.subset!r}", where=str(path), fix=fix)
    return renamed(read_path(path, seeds.split), own_names(seeds))


def own_names(seeds: Seeds) -> dict[str, str]:
    """seeds.columns as a plain mapping."""
    return {str(name): column for name, column in seeds.columns.items()}


def renamed(table: Table, columns: Mapping[str, str]) -> Table:
    """The rows with the columns that `columns` names called as forms know them; TapirError where no row has one."""
    rows = [row for _, row in table.rows if isinstance(row, dict)]
    for name, column in columns.items():
        if not any(column in row for row in rows):
            there = ", ".join(dict.fromkeys(str(key) for row in rows for key in row))
            fix = f"Its columns are: {there}. Correct seeds.columns.{name}."
            raise TapirError(f"there is no column {column!r}", where=table.where, fix=fix)
    if not columns:
        return table
    return replace(table, rows=[(number, by_forms(row, columns)) for number, row in table.rows])


def by_forms(row: Any, columns: Mapping[str, str]) -> Any:
    """A row with its columns renamed; one of its own that has such a name keeps its value under another."""
    if not isinstance(row, dict):
        return row
    others = {name: value for name, value in row.items() if name not in columns.values()}
    kept = {f"{name} (its own)" if name in columns else name: value for name, value in others.items()}
    return {name: row.get(column) for name, column in columns.items()} | kept


def read_path(path: Path, split: str | None = None) -> Table:
    """The rows of a file, or of a folder that holds a dataset; `split` names one of a dataset's."""
    if path.is_dir():
        return read_folder(path, split)
    if split is not None:
        raise TapirError(
            f"a file has no split {split!r}", where=str(path), fix="seeds.split is for datasets; leave it out."
        )
    try:
        with path.open("rb") as file:
            data = file.read(len(PARQUET))
            if data == PARQUET:
                return read_parquet(path)
            data += file.read()
    except OSError as error:
        raise TapirError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    return read_text(decoded(unpacked(data, str(path)), str(path)), path)


def read_text(text: str, path: Path) -> Table:
    """The rows of a file of text: a table, JSON, or one instruction a line where its name ends in .txt."""
    where, name = str(path), re.sub(r"\.(gz|zst)$", "", path.name.lower())
    if name.endswith((".csv", ".tsv")):
        rows = list(table_rows(text, where))
        empty = sum(value in NULLS for _, row in rows if isinstance(row, dict) for value in row.values())
        notes = (f"cells that say NULL and count as empty: {empty:,}",) if empty else ()
        return Table(where, checked([(line, without_nulls(row)) for line, row in rows], where), notes=notes)
    if name.endswith(".txt") and text.lstrip()[:1] not in ("[", "{"):
        lines = [(number, {"instruction": line}) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return Table(where, checked(lines, where))
    return Table(where, checked(json_rows(text, where, SPELLED), where))


def read_parquet(path: Path) -> Table:
    """The rows of a Parquet file."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError) as error:
        raise TapirError(
            f"not a whole Parquet file: {first_line(error)}", where=str(path), fix="Copy or download it again."
        ) from error
    return numbered(rows, str(path))


def numbered(rows: list[Any], where: str) -> Table:
    """Rows of a source without lines, counted from 1."""
    return Table(where, checked(list(enumerate(rows, 1)), where, "row"), "row")


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_folder(path: Path, split: str | None) -> Table:
    """A dataset that was saved by save_to_disk, or a folder of files such as a copy of the Hub's."""
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    files = [] if saved or names_its_files(path / "README.md") else data_files(path)
    if files:
        return read_files(path, files, split)
    with tempfile.TemporaryDirectory() as cache:
        with told(
            str(path),
            "holds no dataset that can be read",
            "Name a file, or a folder that datasets' save_to_disk wrote.",
        ):
            from datasets import load_dataset, load_from_disk

            found = load_from_disk(str(path)) if saved else load_dataset(str(path), cache_dir=cache)
        return numbered(split_of(found, split, str(path)).to_list(), str(path))


def names_its_files(card: Path) -> bool:
    """Whether a dataset's card says which files make which split."""
    return card.is_file() and re.search(r"(?m)^configs:", card.read_text("utf-8", errors="replace")) is not None


def data_files(path: Path) -> list[Path]:
    """The files of a folder that hold rows; TapirError where it has a loading script or several formats."""
    found = [
        file for file in sorted(path.rglob("*")) if file.is_file() and (form := format_of(file)) and form != "text"
    ]
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    found = found or [file for file in sorted(path.rglob("*.txt")) if file.is_file()]
    names = ", ".join(str(file.relative_to(path)) for file in found[:5]) + (" ..." if len(found) > 5 else "")
    if scripts := [file.name for file in sorted(path.glob("*.py"))]:
        fix = f"Name one of its data files: {names}." if names else "Run it where it was written, and save the rows."
        raise TapirError(f"has a loading script ({scripts[0]}), which is not run", where=str(path), fix=fix)
    if len(forms := sorted({format_of(file) for file in found})) > 1:
        fix = f"Name one of its files, or keep one format in the folder: {names}."
        raise TapirError(f"has files of several formats ({', '.join(forms)})", where=str(path), fix=fix)
    return found


def format_of(file: Path) -> str:
    """`JSON`, `CSV`, `Parquet` or `text`, by a file's name; "" for a file without rows."""
    if file.name == "dataset_infos.json":
        return ""
    found = re.search(r"\.(jsonl?|[ct]sv|parquet|txt)(\.gz|\.zst)?$", file.name.lower())
    kinds = {"csv": "CSV", "tsv": "CSV", "parquet": "Parquet", "txt": "text"}
    return kinds.get(found[1], "JSON") if found else ""


SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def split_named(file: Path) -> str:
    """The split of a dataset that a file's path names, as `datasets` has it; `train` where it names none."""
    words = re.split(r"[^a-z]+", str(file).lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "train")


def read_files(path: Path, files: Sequence[Path], split: str | None) -> Table:
    """The rows of a folder's files of one split, in the order of their names."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_named(file.relative_to(path)), []).append(file)
    tables = [read_path(file) for file in split_of(by_split, split, str(path))]
    if len(tables) == 1:
        return tables[0]
    rows = [row for table in tables for _, row in table.rows]
    notes = tuple(f"{Path(table.where).name}: {note}" for table in tables for note in table.notes)
    return replace(numbered(rows, str(path)), notes=notes)


def read_hub(name: str, subset: str | None, split: str | None) -> Table:
    """A dataset of the Hub; where the Hub cannot be reached, the copy that an earlier use left on this machine."""
    with told(
        name,
        "there is no such file or folder, and the Hub has no such dataset or cannot be reached",
        "Download the dataset where there is a network, and name its file or folder in seeds.path.",
    ):
        from datasets import load_dataset

        with tried(name):
            found = load_dataset(name, subset)
    return numbered(split_of(found, split, name).to_list(), name)


@contextmanager
def tried(name: str) -> Iterator[None]:
    """Offline, if one short question to the Hub is not answered: `datasets` would try for 25 seconds, and aloud."""
    from datasets import config
    from httpx import TransportError
    from huggingface_hub import HfApi, constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, timeout=10)
    except (TransportError, ConnectionError):
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


OTHERS = (RuntimeError, TypeError)  # what `datasets` says to a loading script, and to rows of unlike types


@contextmanager
def told(where: str, what: str, fix: str) -> Iterator[None]:
    """What goes wrong in `datasets` as one TapirError, with the first line of its own; and no bars of its own."""
    import pyarrow
    from datasets.exceptions import DatasetsError
    from datasets.utils import disable_progress_bars
    from huggingface_hub.errors import HfHubHTTPError

    disable_progress_bars()
    try:
        yield
    except (DatasetsError, pyarrow.ArrowException, HfHubHTTPError, OSError, ValueError, KeyError, *OTHERS) as error:
        raise TapirError(f"{what}: {first_line(error)}", where=where, fix=fix) from error


def split_of(found: Any, split: str | None, where: str) -> Any:
    """The named split of a dataset; of an unnamed one the only one, or `train`."""
    if not isinstance(found, dict):
        if split in (None, str(found.split)):
            return found
        known = f"Its only one is {found.split}" if found.split else "It has none"
        raise TapirError(f"there is no split {split!r}", where=where, fix=f"{known}; leave seeds.split out.")
    chosen = split or (next(iter(found)) if len(found) == 1 else "train")
    if chosen not in found:
        fault = f"there is no split {split!r}" if split else "it has several splits"
        raise TapirError(fault, where=where, fix=f"Name one in seeds.split: {', '.join(found)}.")
    return found[chosen]
