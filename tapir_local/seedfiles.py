"""Seeds from where they lie: JSON, JSON lines, CSV, Parquet, lines of text, packed or not; datasets; the Hub."""

import csv
import gzip
import io
import json
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapir_local.assets import seeds_path
from tapir_local.errors import TapirError
from tapir_local.recipe import Seeds
from tapir_local.seedforms import KNOWN, Row, Table, form_of
from tapir_local.seedtext import Broken, Spelled, json_object

GAP = re.compile(r"[ \t\r\n,]*")  # between the values of a text
GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
WINDOW = 2**31  # bytes: what `zstd --ultra --long=31` may need
NULLS = ("NULL", "\\N")
FILES = (
    "JSON, JSON lines, CSV, TSV, Parquet or, with a name in .txt, one instruction a line; of these the texts may be "
    "packed by gzip or zstd."
)


def read_table(seeds: Seeds) -> Table:
    """The rows that a recipe's seeds name, their columns by the names of seeds.columns.

    TapirError where there are none, or they cannot be read.
    """
    path = seeds_path(seeds.path)
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
        notes = (f"{empty:,} cells that say NULL count as empty",) if empty else ()
        return Table(where, checked([(line, without_nulls(row)) for line, row in rows], where), notes=notes)
    if name.endswith(".txt") and text.lstrip()[:1] not in ("[", "{"):
        lines = [(number, {"instruction": line}) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return Table(where, checked(lines, where))
    return Table(where, checked(json_rows(text, where, SPELLED), where))


def unpacked(data: bytes, where: str) -> bytes:
    """What gzip or zstd packed, known by its first bytes; anything else as it is."""
    try:
        if data.startswith(GZIP):
            return gzip.decompress(data)
        return unzstd(data) if data.startswith(ZSTD) else data
    except (EOFError, OSError, zlib.error) as error:
        raise TapirError(
            f"the packed file is damaged or cut off: {error}", where=where, fix="Copy or download it again."
        ) from error


def unzstd(data: bytes) -> bytes:
    """All frames of a zstd file; EOFError where the last is cut off, OSError where one is damaged."""
    import zstandard

    unpacker, found = zstandard.ZstdDecompressor(max_window_size=WINDOW), []
    while data:
        frame = unpacker.decompressobj()
        try:
            found.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        if not frame.eof:
            raise EOFError("it ends before its end-of-frame marker")
        data = frame.unused_data
    return b"".join(found)


def decoded(data: bytes, where: str) -> str:
    """UTF-8 with or without a byte order mark as text; TapirError with the line of the first byte that is not."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        perhaps = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise TapirError(
            f"not UTF-8: byte 0x{data[error.start]:02x}",
            where=f"{where}, line {line}",
            fix=f"Convert it, as by `iconv -f {perhaps} -t UTF-8`. Files may be {FILES}",
        ) from error


SPELLED = json.JSONDecoder(object_pairs_hook=json_object, parse_float=Spelled, parse_int=Spelled)


def rows_of(text: str, where: str) -> list[Row]:
    """(line number, object) of every row of a JSON array or of JSON lines; TapirError where one is no object."""
    rows = checked(json_rows(text, where, json.JSONDecoder()), where)
    for line, row in rows:
        if isinstance(row, Broken):
            raise TapirError(row.said, where=f"{where}, line {line}", fix=f"Files may be {FILES}")
        if not isinstance(row, dict):
            raise TapirError(f"a row is a JSON object, this one is {type(row).__name__}", where=f"{where}, line {line}")
    return rows


def checked(rows: list[Row], where: str, unit: str = "line") -> list[Row]:
    """The rows; TapirError where there is none, or not one of them could be read."""
    if not rows:
        raise TapirError("no rows in it", where=where, fix=KNOWN)
    number, first = rows[0]
    if isinstance(first, Broken) and all(isinstance(row, Broken) for _, row in rows):
        raise TapirError(first.said, where=f"{where}, {unit} {number}", fix=f"Files may be {FILES}")
    return rows


def json_rows(text: str, where: str, decoder: json.JSONDecoder) -> list[Row]:
    """The rows of a JSON array, of JSON lines, or of JSON values in any layout, each with the line on which it starts.

    A line that begins no JSON value is Broken, and reading goes on with the next. An array at the beginning must be
    whole.
    """
    rows, at = array_rows(text, where, decoder) if text.lstrip().startswith("[") else ([], 0)
    rows += stream_rows(text, at, decoder)
    if len(rows) == 1 and isinstance(row := rows[0][1], dict) and form_of(row) is None and not is_one_line(text):
        names = ", ".join(row)
        fault = f"one JSON object ({names}) where rows are expected, in a list or one on each line"
        raise TapirError(fault, where=f"{where}, line {rows[0][0]}", fix=f"Files may be {FILES}")
    return rows


def is_one_line(text: str) -> bool:
    """Whether a text has no line break within."""
    return "\n" not in text.strip()


def array_rows(text: str, where: str, decoder: json.JSONDecoder) -> tuple[list[Row], int]:
    """The items of a JSON array, each with the line on which it starts, and where the array ends."""
    rows, at, line, counted = list[Row](), text.index("[") + 1, 1, 0
    while True:
        at = after_gap(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return rows, at + 1
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise TapirError(f"not JSON: {fault_of(error, text)}", where=f"{where}, line {line}") from error
        rows.append((line, item))


def stream_rows(text: str, at: int, decoder: json.JSONDecoder) -> Iterator[Row]:
    """JSON values one after another, on lines of their own or not; of a list its items."""
    line, counted = 1, 0
    while (at := after_gap(text, at)) < len(text):
        line, counted = line + text.count("\n", counted, at), at
        try:
            item, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            end = text.find("\n", at)
            end = len(text) if end < 0 else end
            yield line, Broken("not JSON", f"not JSON: {fault_of(error, text)}", text[at:end])
        else:
            yield from ((line, one) for one in (item if isinstance(item, list) else [item]))
        at = end


def after_gap(text: str, at: int) -> int:
    """Where the next value begins."""
    found = GAP.match(text, at)
    return found.end() if found else at


def fault_of(error: Exception, text: str) -> str:
    """What is wrong with a JSON text, and with which letter of its line."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg}, letter {error.pos - text.rfind(chr(10), 0, error.pos)}"


def table_rows(text: str, where: str) -> Iterator[Row]:
    """Rows of a table with a header, by the line on which each starts; columns parted by comma, semicolon or tab."""
    csv.field_size_limit(sys.maxsize)  # 131,072 letters otherwise
    header = text.lstrip("\r\n").partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    names, line = list[str](), 1
    try:
        for fields in reader:
            if fields and not names:
                names = column_names(fields, where)
            elif fields:
                yield line, by_name(names, fields)
            line = reader.line_num + 1
    except csv.Error as error:
        raise TapirError(f"not CSV: {error}", where=f"{where}, line {line}") from error


def column_names(fields: list[str], where: str) -> list[str]:
    """The header's fields; TapirError where two are the same."""
    names = [field.strip() for field in fields]
    if twice := [name for name in names if names.count(name) > 1]:
        raise TapirError(f"two columns are called {twice[0]!r}", where=f"{where}, line 1")
    return names


def by_name(names: list[str], fields: list[str]) -> Any:
    """One row by its columns' names; Broken where it has more or fewer fields than the header."""
    if len(fields) == len(names):
        return dict(zip(names, fields, strict=True))
    advice = "a field with a comma, a line break or a quotation mark is written in quotation marks"
    said = f"{len(fields)} fields where the header has {len(names)}; {advice}"
    return Broken("more or fewer fields than the header", said, ", ".join(fields))


def without_nulls(row: Any) -> Any:
    """A row of a table whose cells that say NULL, as databases write nothing, are empty."""
    return {name: None if value in NULLS else value for name, value in row.items()} if isinstance(row, dict) else row


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


def numbered(rows: list[dict[str, Any]], where: str) -> Table:
    """Rows of a source without lines, counted from 1."""
    return Table(where, checked(list(enumerate(rows, 1)), where, "row"), "row")


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_folder(path: Path, split: str | None) -> Table:
    """A dataset that was saved by save_to_disk, or a folder of files such as a copy of the Hub's."""
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    with tempfile.TemporaryDirectory() as cache:
        with told(
            str(path),
            "holds no dataset that can be read",
            "Name a file, or a folder that datasets' save_to_disk wrote.",
        ):
            from datasets import load_dataset, load_from_disk

            found = load_from_disk(str(path)) if saved else load_dataset(str(path), cache_dir=cache)
        return numbered(split_of(found, split, str(path)).to_list(), str(path))


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
    except (DatasetsError, pyarrow.ArrowException, HfHubHTTPError, OSError, ValueError, KeyError) as error:
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
