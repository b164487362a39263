"""Parse rows from text: JSON in any layout and tables with a header; an unreadable place costs only its row."""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from typing import Any

from tapir_local.data.columns import NumberText, UnreadableRow, build_json_object
from tapir_local.data.formats import KNOWN_FORMATS, NumberedRow, find_row_format
from tapir_local.errors import TapirError
from tapir_local.printable import format_count

VALUE_SEPARATORS = re.compile(r"[ \t\r\n,]*")  # between JSON values
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
MAX_ZSTD_WINDOW = 2**31  # bytes, for `zstd --ultra --long=31`
NULL_CELLS = ("NULL", "\\N")
ACCEPTED_FILES = (
    "JSON, JSON lines, CSV, TSV, Parquet, or .txt with one instruction per line; all except Parquet may be compressed "
    "with gzip or zstd."
)


def decompress_file(data: bytes, where: str) -> bytes:
    """Decompress data in gzip or zstd, detected by its first bytes; other data is returned unchanged."""
    try:
        if data.startswith(GZIP_MAGIC):
            return gzip.decompress(data)
        return decompress_zstd(data) if data.startswith(ZSTD_MAGIC) else data
    except (EOFError, OSError, zlib.error) as error:
        raise TapirError(
            f"the compressed file is damaged or incomplete: {error}", where=where, fix="Copy or download it again."
        ) from error


def decompress_zstd(data: bytes) -> bytes:
    """Decompress all frames of a zstd file; EOFError if the last is incomplete, OSError if one is damaged."""
    import zstandard

    unpacker, found = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW), []
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


def decode_utf8(data: bytes, where: str) -> str:
    """Decode UTF-8 with or without a byte order mark; TapirError with the line of the first invalid byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        perhaps = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise TapirError(
            f"not UTF-8: byte 0x{data[error.start]:02x}",
            where=f"{where}, line {line}",
            fix=f"Convert it, for example with `iconv -f {perhaps} -t UTF-8`. Files may be {ACCEPTED_FILES}",
        ) from error


VERBATIM_DECODER = json.JSONDecoder(object_pairs_hook=build_json_object, parse_float=NumberText, parse_int=NumberText)


def parse_json_objects(text: str, where: str) -> list[NumberedRow]:
    """(line number, object) of each row of a JSON array or of JSON lines; TapirError if a row is not an object."""
    rows = require_rows(parse_json_rows(text, where, json.JSONDecoder()), where)
    for line, row in rows:
        if isinstance(row, UnreadableRow):
            raise TapirError(row.said, where=f"{where}, line {line}", fix=f"Files may be {ACCEPTED_FILES}")
        if not isinstance(row, dict):
            raise TapirError(f"a row is a JSON object, this one is {type(row).__name__}", where=f"{where}, line {line}")
    return rows


def require_rows(rows: list[NumberedRow], where: str, unit: str = "line") -> list[NumberedRow]:
    """Return the rows; TapirError if there are none, or none of them could be read."""
    if not rows:
        raise TapirError("no rows in it", where=where, fix=KNOWN_FORMATS)
    number, first = rows[0]
    if isinstance(first, UnreadableRow) and all(isinstance(row, UnreadableRow) for _, row in rows):
        raise TapirError(first.said, where=f"{where}, {unit} {number}", fix=f"Files may be {ACCEPTED_FILES}")
    return rows


def parse_json_rows(text: str, where: str, decoder: json.JSONDecoder) -> list[NumberedRow]:
    """The rows of a JSON array, of JSON lines, or of JSON values in any layout, each with the line on which it starts.

    A line that begins no JSON value is Broken, and reading goes on with the next. An array at the beginning must be
    whole.
    """
    rows, at = parse_json_array(text, where, decoder) if text.lstrip().startswith("[") else ([], 0)
    rows += parse_json_stream(text, at, decoder)
    if (
        len(rows) == 1
        and isinstance(row := rows[0][1], dict)
        and find_row_format(row) is None
        and not is_one_line(text)
    ):
        names = ", ".join(row)
        fault = f"a single JSON object ({names}), but rows are expected: a list, or one object per line"
        raise TapirError(fault, where=f"{where}, line {rows[0][0]}", fix=f"Files may be {ACCEPTED_FILES}")
    return rows


def is_one_line(text: str) -> bool:
    """Whether a text is on a single line."""
    return "\n" not in text.strip()


def parse_json_array(text: str, where: str, decoder: json.JSONDecoder) -> tuple[list[NumberedRow], int]:
    """The items of a JSON array, each with the line on which it starts, and the position after the array."""
    rows, at, line, counted = list[NumberedRow](), text.index("[") + 1, 1, 0
    while True:
        at = skip_separators(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return rows, at + 1
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise TapirError(f"not JSON: {describe_json_error(error, text)}", where=f"{where}, line {line}") from error
        rows.append((line, item))


def parse_json_stream(text: str, at: int, decoder: json.JSONDecoder) -> Iterator[NumberedRow]:
    """Yield JSON values that follow each other, on separate lines or not; a list yields its items."""
    line, counted = 1, 0
    while (at := skip_separators(text, at)) < len(text):
        line, counted = line + text.count("\n", counted, at), at
        try:
            item, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            end = text.find("\n", at)
            end = len(text) if end < 0 else end
            yield line, UnreadableRow("not JSON", f"not JSON: {describe_json_error(error, text)}", text[at:end])
        else:
            yield from ((line, one) for one in (item if isinstance(item, list) else [item]))
        at = end


def skip_separators(text: str, at: int) -> int:
    """The position of the next value."""
    found = VALUE_SEPARATORS.match(text, at)
    return found.end() if found else at


def describe_json_error(error: Exception, text: str) -> str:
    """Describe a JSON error with the character of its line."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg}, character {error.pos - text.rfind(chr(10), 0, error.pos)}"


def parse_table_rows(text: str, where: str) -> Iterator[NumberedRow]:
    """Yield (first line, row) of a CSV table with a header; the separator is comma, semicolon or tab."""
    csv.field_size_limit(sys.maxsize)  # the default is 131,072 characters
    header = text.lstrip("\r\n").partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    names, line = list[str](), 1
    try:
        for fields in reader:
            if fields and not names:
                names = parse_header(fields, where)
            elif fields:
                yield line, make_table_row(names, fields)
            line = reader.line_num + 1
    except csv.Error as error:
        raise TapirError(f"not CSV: {error}", where=f"{where}, line {line}") from error


def parse_header(fields: list[str], where: str) -> list[str]:
    """The names in a header; TapirError if two are equal."""
    names = [field.strip() for field in fields]
    if twice := [name for name in names if names.count(name) > 1]:
        raise TapirError(f"two columns are called {twice[0]!r}", where=f"{where}, line 1")
    return names


def make_table_row(names: list[str], fields: list[str]) -> Any:
    """A row as a dict by column name; an UnreadableRow if its number of fields differs from the header's."""
    if len(fields) == len(names):
        return dict(zip(names, fields, strict=True))
    advice = "a field with a comma, a line break or a quotation mark must be in quotation marks"
    said = f"{format_count(len(fields), 'field')} where the header has {len(names)}; {advice}"
    return UnreadableRow("more or fewer fields than the header", said, ", ".join(fields))


def replace_nulls(row: Any) -> Any:
    """Replace the cells of a row that say NULL, as databases write missing values, by None."""
    return (
        {name: None if value in NULL_CELLS else value for name, value in row.items()} if isinstance(row, dict) else row
    )
