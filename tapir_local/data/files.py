"""Read seeds: JSON, JSON lines, CSV, Parquet and text files, compressed or not, saved datasets, and the Hub."""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapir_local.data.formats import Table
from tapir_local.data.parsing import (
    NULL_CELLS,
    VERBATIM_DECODER,
    decode_utf8,
    decompress_file,
    parse_json_rows,
    parse_table_rows,
    replace_nulls,
    require_rows,
)
from tapir_local.errors import TapirError
from tapir_local.recipe.schema import Seeds
from tapir_local.resources import find_seeds

PARQUET_MAGIC = b"PAR1"


def read_table(seeds: Seeds) -> Table:
    """Read the rows of a recipe's seeds, with the columns renamed by seeds.columns.

    TapirError if there are none, or they cannot be read.
    """
    path = find_seeds(seeds.path)
    if path is None:
        return rename_columns(read_hub(seeds.path, seeds.subset, seeds.split), column_mapping(seeds))
    if seeds.subset is not None:
        fix = "seeds.subset is for datasets on the Hub; leave it out."
        raise TapirError(f"a local file or folder has no subset {seeds.subset!r}", where=str(path), fix=fix)
    return rename_columns(read_path(path, seeds.split), column_mapping(seeds))


def column_mapping(seeds: Seeds) -> dict[str, str]:
    """seeds.columns as a plain dict."""
    return {str(name): column for name, column in seeds.columns.items()}


def rename_columns(table: Table, columns: Mapping[str, str]) -> Table:
    """Rename the columns given by `columns` to the names that row formats use; TapirError if no row has one of them."""
    rows = [row for _, row in table.rows if isinstance(row, dict)]
    for name, column in columns.items():
        if not any(column in row for row in rows):
            there = ", ".join(dict.fromkeys(str(key) for row in rows for key in row))
            fix = f"Its columns are: {there}. Correct seeds.columns.{name}."
            raise TapirError(f"there is no column {column!r}", where=table.where, fix=fix)
    if not columns:
        return table
    return replace(table, rows=[(number, rename_row_columns(row, columns)) for number, row in table.rows])


def rename_row_columns(row: Any, columns: Mapping[str, str]) -> Any:
    """Rename a row's columns; a column that already has such a name is kept as `NAME (its own)`."""
    if not isinstance(row, dict):
        return row
    others = {name: value for name, value in row.items() if name not in columns.values()}
    kept = {f"{name} (its own)" if name in columns else name: value for name, value in others.items()}
    return {name: row.get(column) for name, column in columns.items()} | kept


def read_path(path: Path, split: str | None = None) -> Table:
    """Read a file, or a folder with a dataset; `split` selects a split of a dataset."""
    if path.is_dir():
        return read_folder(path, split)
    if split is not None:
        raise TapirError(
            f"a file has no split {split!r}", where=str(path), fix="seeds.split is for datasets; leave it out."
        )
    try:
        with path.open("rb") as file:
            data = file.read(len(PARQUET_MAGIC))
            if data == PARQUET_MAGIC:
                return read_parquet(path)
            data += file.read()
    except OSError as error:
        raise TapirError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    return parse_text_file(decode_utf8(decompress_file(data, str(path)), str(path)), path)


def parse_text_file(text: str, path: Path) -> Table:
    """Parse the text of a file: a table, JSON, or one instruction per line if its name ends in .txt."""
    where, name = str(path), re.sub(r"\.(gz|zst)$", "", path.name.lower())
    if name.endswith((".csv", ".tsv")):
        rows = list(parse_table_rows(text, where))
        empty = sum(value in NULL_CELLS for _, row in rows if isinstance(row, dict) for value in row.values())
        notes = (f"cells that say NULL and count as empty: {empty:,}",) if empty else ()
        return Table(where, require_rows([(line, replace_nulls(row)) for line, row in rows], where), notes=notes)
    if name.endswith(".txt") and text.lstrip()[:1] not in ("[", "{"):
        lines = [(number, {"instruction": line}) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return Table(where, require_rows(lines, where))
    return Table(where, require_rows(parse_json_rows(text, where, VERBATIM_DECODER), where))


def read_parquet(path: Path) -> Table:
    """Read a Parquet file."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError) as error:
        raise TapirError(
            f"not a complete Parquet file: {first_message_line(error)}",
            where=str(path),
            fix="Copy or download it again.",
        ) from error
    return number_rows(rows, str(path))


def number_rows(rows: list[Any], where: str) -> Table:
    """A table of rows from a source without lines, numbered from 1."""
    return Table(where, require_rows(list(enumerate(rows, 1)), where, "row"), "row")


def first_message_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_folder(path: Path, split: str | None) -> Table:
    """Read a dataset written by save_to_disk, or a folder of files such as a copy from the Hub."""
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    files = [] if saved or card_lists_files(path / "README.md") else data_files(path)
    if files:
        return read_files(path, files, split)
    with tempfile.TemporaryDirectory() as cache:
        with explain_dataset_errors(
            str(path),
            "contains no readable dataset",
            "Name a file, or a folder written by save_to_disk of the package datasets.",
        ):
            from datasets import load_dataset, load_from_disk

            found = load_from_disk(str(path)) if saved else load_dataset(str(path), cache_dir=cache)
        return number_rows(select_split(found, split, str(path)).to_list(), str(path))


def card_lists_files(card: Path) -> bool:
    """Whether a dataset's card lists the files of each split."""
    return card.is_file() and re.search(r"(?m)^configs:", card.read_text("utf-8", errors="replace")) is not None


def data_files(path: Path) -> list[Path]:
    """The files of a folder that contain rows; TapirError if it has a loading script or several formats."""
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and (form := detect_file_format(file)) and form != "text"
    ]
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    found = found or [file for file in sorted(path.rglob("*.txt")) if file.is_file()]
    names = ", ".join(str(file.relative_to(path)) for file in found[:5]) + (" ..." if len(found) > 5 else "")
    if scripts := [file.name for file in sorted(path.glob("*.py"))]:
        fix = f"Name one of its data files: {names}." if names else "Run it yourself, and save the rows to a file."
        raise TapirError(f"has a loading script ({scripts[0]}), which is not run", where=str(path), fix=fix)
    if len(forms := sorted({detect_file_format(file) for file in found})) > 1:
        fix = f"Name one of its files, or keep one format in the folder: {names}."
        raise TapirError(f"has files of several formats ({', '.join(forms)})", where=str(path), fix=fix)
    return found


def detect_file_format(file: Path) -> str:
    """`JSON`, `CSV`, `Parquet` or `text`, from a file's name; "" for a file without rows."""
    if file.name == "dataset_infos.json":
        return ""
    found = re.search(r"\.(jsonl?|[ct]sv|parquet|txt)(\.gz|\.zst)?$", file.name.lower())
    kinds = {"csv": "CSV", "tsv": "CSV", "parquet": "Parquet", "txt": "text"}
    return kinds.get(found[1], "JSON") if found else ""


SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def split_in_path(file: Path) -> str:
    """The split named in a file's path, by the rules of `datasets`; `train` if none is named."""
    words = re.split(r"[^a-z]+", str(file).lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train")


def read_files(path: Path, files: Sequence[Path], split: str | None) -> Table:
    """Read the files of one split of a folder, sorted by name."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_in_path(file.relative_to(path)), []).append(file)
    tables = [read_path(file) for file in select_split(by_split, split, str(path))]
    if len(tables) == 1:
        return tables[0]
    rows = [row for table in tables for _, row in table.rows]
    notes = tuple(f"{Path(table.where).name}: {note}" for table in tables for note in table.notes)
    return replace(number_rows(rows, str(path)), notes=notes)


def read_hub(name: str, subset: str | None, split: str | None) -> Table:
    """Read a dataset from the Hub, or its local copy from an earlier use if the Hub cannot be reached."""
    with explain_dataset_errors(
        name,
        "there is no such file or folder, and the Hub has no such dataset or cannot be reached",
        "Download the dataset on a machine with a network, and name its file or folder in seeds.path.",
    ):
        from datasets import load_dataset

        with offline_if_unreachable(name):
            found = load_dataset(name, subset)
    return number_rows(select_split(found, split, name).to_list(), name)


@contextmanager
def offline_if_unreachable(name: str) -> Iterator[None]:
    """Switch to offline mode if one short request to the Hub fails: `datasets` would retry for 25 s with messages."""
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


OTHER_DATASET_ERRORS = (
    RuntimeError,
    TypeError,
)  # raised by `datasets` for a loading script and for rows of different types


@contextmanager
def explain_dataset_errors(where: str, what: str, fix: str) -> Iterator[None]:
    """Turn errors of `datasets` into a TapirError with their first line, and disable its progress bars."""
    import pyarrow
    from datasets.exceptions import DatasetsError
    from datasets.utils import disable_progress_bars
    from huggingface_hub.errors import HfHubHTTPError

    disable_progress_bars()
    try:
        yield
    except (
        DatasetsError,
        pyarrow.ArrowException,
        HfHubHTTPError,
        OSError,
        ValueError,
        KeyError,
        *OTHER_DATASET_ERRORS,
    ) as error:
        raise TapirError(f"{what}: {first_message_line(error)}", where=where, fix=fix) from error


def select_split(found: Any, split: str | None, where: str) -> Any:
    """The given split of a dataset; by default the only one, or `train`."""
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
