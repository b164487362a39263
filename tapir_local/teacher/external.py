"""Import answers that were paid for elsewhere, as calls that this program would have made."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from tapir_local.data.files import read_path
from tapir_local.data.formats import find_row_format, format_line_numbers, require_row
from tapir_local.data.parsing import parse_json_objects
from tapir_local.errors import TapirError
from tapir_local.method import prompts
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.records import Prompt, Request, noop
from tapir_local.store import keys
from tapir_local.store.queries import CountProgress
from tapir_local.store.reply import build_chat_completion, parse_reply
from tapir_local.store.store import Store
from tapir_local.teacher.budget import Bill
from tapir_local.teacher.session import AskSession, RequestJob

IMPORT_STAGE = "seeds"  # such files contain only answers to seeds
UNREADABLE_ROW, NOT_ONLY_TEXT, MISSING_INSTRUCTION = "unreadable", "not only of text", "without an instruction"
NO_ANSWER, INCOMPLETE_ANSWER = "without an answer", "with an incomplete answer"
ANSWER_BEGUN = "whose request already begins the answer"
NO_REQUEST, OTHER_MODEL = "without a request in the requests file", "asked of another model than the recipe's"
ANSWER_FILE_FORMS = (
    "Rows may be Alpaca, ShareGPT, messages, AlpacaEval's model outputs, or the output of OpenAI's Batch API. "
    "Files may be JSON, JSON lines, CSV, TSV or Parquet."
)
TABLE_NAME = re.compile(r"\.(csv|tsv|parquet)(\.gz|\.zst)?$")


class ImportedRow(NamedTuple):
    """A row of a file: its name for messages, its prompt, its reply as a chat completion, and the body if known."""

    name: str
    prompt: Prompt
    raw: bytes
    body: Mapping[str, Any] | None = None


@dataclass
class ImportResult:
    """How many rows became calls, how many answers were in the store already, and the lines of refused rows, by reason.

    `different` counts the rows that were asked with other settings than the recipe's, `difference` describes the first.
    """

    new: int = 0
    known: int = 0
    refused: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    different: int = 0
    difference: str = ""


def read_answers(file: Path, teacher: Endpoint, requests: Path | None = None) -> tuple[list[ImportedRow], ImportResult]:
    """The rows of a file that can be imported (a text prompt and a complete answer), and why others cannot.

    `requests` is the input file of an OpenAI batch whose output is `file`. TapirError if the file has none of the known
    forms, has no row that can be imported, or is the output of a batch and `requests` is None.
    """
    rows, result = list[ImportedRow](), ImportResult()
    bodies = read_batch_requests(requests) if requests else None
    for line, row in read_answer_rows(file, table=bodies is None):
        if not isinstance(row, dict):
            result.refused[UNREADABLE_ROW].append(line)
            continue
        if bodies is None and "custom_id" in row and "response" in row:
            fix = "Name the batch's input file: --requests FILE"
            raise TapirError("the output of a batch contains no prompts", where=str(file), fix=fix)
        parsed = parse_answer_row(row, line, file, teacher) if bodies is None else parse_batch_row(row, bodies, teacher)
        if isinstance(parsed, str):
            result.refused[parsed].append(line)
        else:
            rows.append(parsed)
    if not rows:
        what = f"no row with an instruction and its answer: {format_refused_rows(result)}"
        raise TapirError(what, where=str(file), fix=ANSWER_FILE_FORMS)
    return rows, result


def read_answer_rows(file: Path, *, table: bool) -> Sequence[tuple[int, Any]]:
    """(line, row) of each row of a file: JSON or, with `table`, also CSV, TSV and Parquet, by its name."""
    if table and TABLE_NAME.search(file.name.lower()):
        return read_path(file).rows
    return parse_json_objects(read_answer_file(file), str(file))


def read_answer_file(file: Path) -> str:
    """A file as text; TapirError if it is not text."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise TapirError(what, where=str(file), fix="Check the path and the permissions.") from error
    except UnicodeDecodeError as error:
        raise TapirError("neither a store nor JSON", where=str(file), fix=ANSWER_FILE_FORMS) from error


def read_batch_requests(file: Path) -> dict[str, Any]:
    """The bodies of a batch's requests by custom_id."""
    rows = parse_json_objects(read_answer_file(file), str(file))
    bodies = {str(row["custom_id"]): row["body"] for _, row in rows if "custom_id" in row and "body" in row}
    if not bodies:
        fix = "A request has a custom_id and a body with messages."
        raise TapirError("the file contains no requests of a batch", where=str(file), fix=fix)
    return bodies


def parse_answer_row(row: Mapping[str, Any], line: int, file: Path, teacher: Endpoint) -> ImportedRow | str:
    """A row with an instruction and its answer, or why it is refused."""
    if not has_only_text(row):
        return NOT_ONLY_TEXT
    if find_row_format(row) is None:
        return MISSING_INSTRUCTION
    try:
        prompt, answer = require_row(row, f"{file}, line {line}")
    except TapirError:
        return UNREADABLE_ROW
    model = str(row.get("generator") or teacher.model or "")
    origin = {"file": decodable_file_name(file), "line": line}
    raw = json.dumps(build_chat_completion(answer, model) | {"imported": origin}).encode()
    return check_imported_row(ImportedRow(f"line {line}", prompt, raw))


def parse_batch_row(row: Mapping[str, Any], bodies: Mapping[str, Any], teacher: Endpoint) -> ImportedRow | str:
    """A row of a batch's output with the prompt of its request, or why it is refused."""
    name, response = str(row.get("custom_id")), row.get("response")
    body = bodies.get(name)
    if row.get("error") or not isinstance(response, dict) or response.get("status_code", 200) != 200:
        return NO_ANSWER
    if not isinstance(body, dict):
        return NO_REQUEST
    if teacher.model and body.get("model") not in (None, teacher.model):
        return OTHER_MODEL
    if not has_only_text(body):
        return NOT_ONLY_TEXT
    try:
        keys.canonical_json(body)
        prompt, _ = require_row({"messages": body.get("messages")}, name)
    except TapirError:
        return UNREADABLE_ROW
    if prompt and len(prompt) < len(body["messages"]):
        return ANSWER_BEGUN
    return check_imported_row(ImportedRow(name, prompt, json.dumps(response.get("body")).encode(), body))


def decodable_file_name(file: Path) -> str:
    """A file's name, with a replacement for bytes that are not text."""
    return file.name.encode(errors="replace").decode()


def has_only_text(row: Mapping[str, Any]) -> bool:
    """Whether no field of a row's prompt and answer is a list of parts, such as an image."""
    turns = row.get("messages") or row.get("conversations")
    turns = turns if isinstance(turns, list) else []
    texts = [turn.get(name) for turn in turns if isinstance(turn, dict) for name in ("content", "value")]
    texts += [row.get(name) for name in ("instruction", "input", "output", "prompt", "completion")]
    return not any(isinstance(text, list | dict) for text in texts)


def check_imported_row(row: ImportedRow) -> ImportedRow | str:
    """The row if it can be imported, otherwise why it is refused."""
    try:
        orjson.loads(row.raw)  # refuses an unpaired surrogate, which the user can correct in the file
        reply = parse_reply(row.raw)
        keys.canonical_json([row.name, *(turn.content for turn in row.prompt)])
    except (ValueError, TapirError):
        return UNREADABLE_ROW
    if not row.prompt or not row.prompt[-1].content:
        return MISSING_INSTRUCTION
    if not reply.text.strip():
        return NO_ANSWER
    return row if reply.finish == "stop" else INCOMPLETE_ANSWER


def import_answers(
    store: Store,
    teacher: Endpoint,
    rows: Sequence[ImportedRow],
    file: Path,
    result: ImportResult,
    progress: CountProgress = noop,
) -> None:
    """Store rows as the calls that `teacher` would receive if it answered these prompts as seeds.

    Answers that are in the store already are kept. The rows are recorded as used by a run
    `import:<file name>`, unpaid. `progress` is called with (done, total). `result` is updated.
    """
    requests = [seed_request(row, teacher) for row in rows]
    session = AskSession(requests, teacher, store, f"import:{decodable_file_name(file)}")
    jobs = session.look_up()
    for done, job in enumerate(jobs):
        progress(done, len(jobs))
        row = rows[job.places[0]]
        reply = parse_reply(row.raw)
        bill = Bill(reply.tokens_in, reply.tokens_out, None)
        uses = [session.use_record(place, job.key) for place in job.places]
        store.put(session.call_record(job, row.raw, reply, 0.0, bill), uses)
        count_difference(row, job, result)
    store.flush()
    result.new, result.known = len(jobs), len(rows) - len(jobs)


def seed_request(row: ImportedRow, teacher: Endpoint) -> Request:
    """What a run asks its teacher for a seed with this prompt."""
    messages = prompts.answer_prompt(row.prompt)
    return Request(messages, row.name, IMPORT_STAGE, temperature=teacher.temperature, max_tokens=teacher.max_tokens)


def count_difference(row: ImportedRow, job: RequestJob, result: ImportResult) -> None:
    """Count a row that was asked with other settings than those under which it is now stored."""
    if row.body is None:
        return
    theirs, ours = (
        {
            name: item
            for name, item in keys.normalize_value(body).items()
            if name not in {"messages", *keys.FIELDS_NOT_IN_KEY}
        }
        for body in (row.body, job.body)
    )
    difference = next(keys.find_differences(ours, theirs), None)
    if difference:
        result.different += 1
        result.difference = result.difference or keys.describe_difference(difference)


def format_refused_rows(result: ImportResult) -> str:
    """`3 without an answer (lines 4, 7, 9), 1 with an incomplete answer (line 12)`."""
    return ", ".join(f"{len(at):,} {why} ({format_line_numbers(at)})" for why, at in result.refused.items())
