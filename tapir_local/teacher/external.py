"""Answers that were paid for elsewhere, made calls as if this program had asked for them."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from tapir_local.data.formats import form_of, lines, read_row
from tapir_local.data.rows import rows_of
from tapir_local.errors import TapirError
from tapir_local.method import prompts
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.records import Prompt, Request, noop
from tapir_local.store import keys
from tapir_local.store.queries import CountProgress
from tapir_local.store.reply import read_reply
from tapir_local.store.store import Store
from tapir_local.teacher.account import Bill
from tapir_local.teacher.session import Asking, Job

STAGE = "seeds"  # what the teacher answers to a seed is the only kind of call that such files hold
UNREADABLE, NOT_TEXT, NO_INSTRUCTION = "unreadable", "not of text alone", "without an instruction"
NO_ANSWER, NOT_WHOLE = "without an answer", "with an answer that is not whole"
BEGUN = "whose request begins the answer itself"
NO_REQUEST, OTHER_MODEL = "without their request in the file of requests", "asked of another model than the recipe's"
FORMS = "Rows may be Alpaca, ShareGPT, messages, AlpacaEval's model outputs, or the output of OpenAI's Batch API."


class Given(NamedTuple):
    """A row of a file: what it is called, its prompt, the reply as a chat completion, and the body sent, if known."""

    name: str
    prompt: Prompt
    raw: bytes
    body: Mapping[str, Any] | None = None


@dataclass
class Taken:
    """How many rows became calls, how many answers were there already, and the lines of refused rows, by reason.

    `otherwise` are the rows that were asked with other settings than the recipe's, `difference` what the first has.
    """

    new: int = 0
    known: int = 0
    refused: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    otherwise: int = 0
    difference: str = ""


def read_answers(file: Path, teacher: Endpoint, requests: Path | None = None) -> tuple[list[Given], Taken]:
    """The rows of a file that can be taken: a prompt of text and a whole answer; and why others cannot.

    `requests` is the input of an OpenAI batch whose output `file` is. TapirError where the file is none of the forms,
    has no whole row, or is the output of a batch whose requests are not named.
    """
    given, found = list[Given](), Taken()
    bodies = bodies_of(requests) if requests else None
    for line, row in rows_of(read_text(file), str(file)):
        if bodies is None and "custom_id" in row and "response" in row:
            fix = "Name the batch's input: --requests FILE"
            raise TapirError("the output of a batch has no prompts", where=str(file), fix=fix)
        read = from_row(row, line, file, teacher) if bodies is None else from_batch(row, line, bodies, teacher)
        if isinstance(read, str):
            found.refused[read].append(line)
        else:
            given.append(read)
    if not given:
        raise TapirError(f"no row with an instruction and its answer: {reasons(found)}", where=str(file), fix=FORMS)
    return given, found


def read_text(file: Path) -> str:
    """A file as text; TapirError where it is none."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TapirError(f"cannot be read: {error.strerror or error}", where=str(file)) from error
    except UnicodeDecodeError as error:
        raise TapirError("neither a store nor JSON", where=str(file), fix=FORMS) from error


def bodies_of(file: Path) -> dict[str, Any]:
    """The bodies of a batch's requests by custom_id."""
    rows = rows_of(read_text(file), str(file))
    bodies = {str(row["custom_id"]): row["body"] for _, row in rows if "custom_id" in row and "body" in row}
    if not bodies:
        raise TapirError(
            "no requests of a batch in it", where=str(file), fix="A request has a custom_id and a body with messages."
        )
    return bodies


def from_row(row: Mapping[str, Any], line: int, file: Path, teacher: Endpoint) -> Given | str:
    """A row with an instruction and its answer, or why it is refused."""
    if not is_text(row):
        return NOT_TEXT
    if form_of(row) is None:
        return NO_INSTRUCTION
    try:
        prompt, answer = read_row(row, f"{file}, line {line}")
    except TapirError:
        return UNREADABLE
    model = str(row.get("generator") or teacher.model or "")
    return checked(Given(f"line {line}", prompt, completion(answer, model, name_of(file), line)))


def from_batch(row: Mapping[str, Any], line: int, bodies: Mapping[str, Any], teacher: Endpoint) -> Given | str:
    """A row of a batch's output with the prompt of its request, or why it is refused."""
    name, response = str(row.get("custom_id")), row.get("response")
    body = bodies.get(name)
    if row.get("error") or not isinstance(response, dict) or response.get("status_code", 200) != 200:
        return NO_ANSWER
    if not isinstance(body, dict):
        return NO_REQUEST
    if teacher.model and body.get("model") not in (None, teacher.model):
        return OTHER_MODEL
    if not is_text(body):
        return NOT_TEXT
    try:
        keys.canonical(body)
        prompt, _ = read_row({"messages": body.get("messages")}, name)
    except TapirError:
        return UNREADABLE
    if prompt and len(prompt) < len(body["messages"]):
        return BEGUN
    return checked(Given(name, prompt, json.dumps(response.get("body")).encode(), body))


def name_of(file: Path) -> str:
    """A file's name, of bytes that may be no text."""
    return file.name.encode(errors="replace").decode()


def is_text(row: Mapping[str, Any]) -> bool:
    """Whether nothing in a row's prompt and answer is a list of parts, such as an image."""
    turns = row.get("messages") or row.get("conversations")
    turns = turns if isinstance(turns, list) else []
    texts = [turn.get(name) for turn in turns if isinstance(turn, dict) for name in ("content", "value")]
    texts += [row.get(name) for name in ("instruction", "input", "output", "prompt", "completion")]
    return not any(isinstance(text, list | dict) for text in texts)


def completion(answer: str, model: str, source: str, line: int) -> bytes:
    """The reply of a chat completion with this text, and a field that says where it is from."""
    choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
    origin = {"file": source, "line": line}
    return json.dumps({"object": "chat.completion", "model": model, "choices": [choice], "imported": origin}).encode()


def checked(given: Given) -> Given | str:
    """The row if it is whole, or why it is not."""
    try:
        orjson.loads(given.raw)  # half a surrogate pair: a fault of the file, which can be corrected there
        reply = read_reply(given.raw)
        keys.canonical([given.name, *(turn.content for turn in given.prompt)])
    except (ValueError, TapirError):
        return UNREADABLE
    if not given.prompt or not given.prompt[-1].content:
        return NO_INSTRUCTION
    if not reply.text.strip():
        return NO_ANSWER
    return given if reply.finish == "stop" else NOT_WHOLE


def take(
    store: Store, teacher: Endpoint, given: Sequence[Given], file: Path, found: Taken, progress: CountProgress = noop
) -> None:
    """Make calls of rows: of those that `teacher` would be sent when it answers these prompts as seeds.

    An answer that is in the store stays. The rows' use is recorded as that of a run `import:<file's name>`, unpaid.
    `progress` is called with (done, all).
    """
    asking = Asking([request_of(row, teacher) for row in given], teacher, store, f"import:{name_of(file)}")
    jobs = asking.look_up()
    for done, job in enumerate(jobs):
        progress(done, len(jobs))
        row = given[job.places[0]]
        reply = read_reply(row.raw)
        bill = Bill(reply.tokens_in, reply.tokens_out, None)
        store.put(asking.call(job, row.raw, reply, 0.0, bill), [asking.use(at, job.key) for at in job.places])
        note_difference(row, job, found)
    store.flush()
    found.new, found.known = len(jobs), len(given) - len(jobs)


def request_of(row: Given, teacher: Endpoint) -> Request:
    """What a run asks of its teacher for a seed with this prompt."""
    asked = prompts.answer_prompt(row.prompt)
    return Request(asked, row.name, STAGE, temperature=teacher.temperature, max_tokens=teacher.max_tokens)


def note_difference(row: Given, job: Job, found: Taken) -> None:
    """Count a row that was asked with other settings than it is now stored under."""
    if row.body is None:
        return
    theirs, ours = (
        {name: item for name, item in keys.plain(body).items() if name not in {"messages", *keys.NOT_ASKED}}
        for body in (row.body, job.body)
    )
    difference = next(keys.differences(ours, theirs), None)
    if difference:
        found.otherwise += 1
        found.difference = found.difference or keys.told(difference)


def reasons(found: Taken) -> str:
    """`3 without an answer (lines 4, 7, 9), 1 cut short (line 12)`."""
    return ", ".join(f"{len(at):,} {why} ({lines(at)})" for why, at in found.refused.items())
