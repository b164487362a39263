"""Parse rows of the common instruction formats into a prompt and a completion."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tapir_local.data.columns import (
    Columns,
    RowFault,
    UnreadableRow,
    build_json_object,
    field_text,
    first_text,
    has_unseen_text,
    is_metadata_column,
    refuse_duplicate_keys,
    refuse_lone_surrogates,
)
from tapir_local.errors import TapirError
from tapir_local.records import Message, Prompt

NumberedRow = tuple[int, Any]
PromptCompletion = tuple[Prompt, str]


@dataclass(frozen=True)
class Table:
    """The numbered rows of a source; `unit` says whether the number is that of the first line or of the row.

    A row is an object, or an UnreadableRow. `notes` are remarks of the reader for the user.
    """

    where: str
    rows: Sequence[NumberedRow]
    unit: str = "line"
    notes: tuple[str, ...] = ()

    def at(self, *numbers: int, most: int = 5) -> str:
        """`seeds.json, line 3`, `seeds.json, lines 3, 7, 9, 12, 13 and 4 more`."""
        return f"{self.where}, {format_line_numbers(numbers, most, self.unit)}"


def format_line_numbers(numbers: Sequence[int], most: int = 5, unit: str = "line") -> str:
    """`line 3`, `lines 3, 7, 9` or `lines 3, 7, 9, 12, 13 and 4 more`."""
    shown = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"{unit}{'s' if len(numbers) > 1 else ''} {shown}{more}"


# The texts that stand for a missing input or output in Alpaca and self-instruct.
NO_INPUT = re.compile(r"\s*(<\s*no[ _-]?input\s*>|no ?input)\.?\s*", re.IGNORECASE)
NO_OUTPUT = re.compile(r"\s*<\s*no[ _-]?output\s*>\.?\s*", re.IGNORECASE)


def instruction_with_input(row: Columns, name: str) -> str:
    """An instruction, and after an empty line its input, unless the instruction contains the input."""
    asked = field_text(row[name])
    given = [text for column in ("input", "context") if (text := field_text(row.get(column)))]
    given = [text for text in given if not NO_INPUT.fullmatch(text) and text not in asked]
    return "\n\n".join([asked, *given]) if asked.strip() else ""


def read_answer(row: Columns, *names: str) -> str:
    """The text of the first of several columns that has any; "" for a text that means "no output"."""
    text = first_text(row, *names)
    return "" if NO_OUTPUT.fullmatch(text) else text


def leading_turns(row: Columns) -> list[tuple[str, Any]]:
    """The turns before the question: a system message, and LLaMA-Factory's history as pairs or messages."""
    turns: list[tuple[str, Any]] = [("system", first_text(row, "system", "system_prompt", "system_message"))]
    for item in parse_messages(row.get("history")):
        if isinstance(item, dict):
            turns.append(parse_turn(row, item))
        elif isinstance(item, list | tuple) and len(item) == 2:
            turns += [("user", item[0]), ("assistant", item[1])]
        else:
            raise RowFault("history that is neither pairs nor messages")
    return turns


def read_alpaca(row: Columns) -> PromptCompletion:
    """Read instruction, input and output, also by Dolly's names, with LLaMA-Factory's system and history."""
    prompt, _ = split_dialogue(row, [*leading_turns(row), ("user", instruction_with_input(row, "instruction"))])
    return prompt, read_answer(row, "output", "response")


def read_self_instruct(row: Columns) -> PromptCompletion:
    """Read an instruction and the first of a list of instances."""
    instances = row["instances"]
    if not isinstance(instances, list) or not all(isinstance(item, dict) for item in instances[:1]):
        raise RowFault("instances is not a list of objects")
    first = instances[0] if instances else {}
    refuse_duplicate_keys(first)
    others = {name: value for name, value in row.items() if name != "instances"}
    one = Columns({**others, **first, "instruction": row["instruction"]})
    prompt, completion = read_alpaca(one)
    row.asked |= {"instances", "instruction", *(one.asked - set(first))}
    row.dropped += one.dropped + (["instances after the first"] if len(instances) > 1 else [])
    own = Columns(first)
    own.asked = one.asked - {"instruction"}
    row.dropped += [f"{name} of an instance" for name in own.unread(join_texts(prompt, completion))]
    return prompt, completion


def read_question_answer(row: Columns) -> PromptCompletion:
    """Read question and answer or response, as in GSM8K and OpenOrca, with a system prompt."""
    prompt, _ = split_dialogue(row, [*leading_turns(row), ("user", instruction_with_input(row, "question"))])
    return prompt, read_answer(row, "answer", "response")


def read_mt_bench(row: Columns) -> PromptCompletion:
    """Read a question of MT-Bench (question_id, category, turns): the first turn, and its reference answer if any.

    A second turn refers to the answer to the first, so it cannot be used alone.
    """
    turns, reference = row["turns"], row.get("reference")
    if not isinstance(turns, list) or not turns or not isinstance(reference, list | str | None):
        raise RowFault("turns is not a list of questions")
    if len(turns) > 1:
        row.dropped.append("turns after the first")
    answer = reference[0] if isinstance(reference, list) and reference else reference or None
    return split_dialogue(row, [*leading_turns(row), ("user", turns[0])])[0], field_text(answer)


def refuse_mt_bench_answers(row: Columns) -> PromptCompletion:
    """Refuse a row of MT-Bench's answers (question_id, choices), which has no question."""
    raise RowFault("answers without questions", "these are answers without their questions; name the file of questions")


def read_prompt_completion(row: Columns) -> PromptCompletion:
    """Read prompt and completion, each a string or a list of messages, as in TRL; the completion may be absent.

    One space before a completion is removed: OpenAI's former fine-tuning format required it.
    """
    given, reply = row["prompt"], row.get("completion")
    if isinstance(given, list):
        turns = [parse_turn(row, turn) for turn in parse_messages(given)]
    else:
        turns = [("user", instruction_with_input(row, "prompt"))]
    if isinstance(reply, list):
        answer = [parse_turn(row, turn) for turn in parse_messages(reply)]
    else:
        text = read_answer(row, "completion", "response")
        answer = [("assistant", text[1:] if text[:1] == " " and text[1:2].strip() else text)]
    return split_dialogue(row, [*leading_turns(row), *turns, *answer])


CHAT_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = ("tool", "function", "observation", "ipython", "tool_call", "function_call", "tool_response")
TOOL_CALL_KEYS = (
    "tool_calls",
    "function_call",
    "tool_call_id",
)  # keys of a turn that calls a tool, or of a tool's answer
CONTENT_KEYS = ("content", "value", "text")


def conversation_reader(name: str) -> Callable[[Columns], PromptCompletion]:
    """A reader of rows whose column `name` holds messages (`role`, `content`), or ShareGPT's (`from`, `value`)."""

    def read(row: Columns) -> PromptCompletion:
        return split_dialogue(
            row, [*leading_turns(row), *(parse_turn(row, turn) for turn in parse_messages(row[name]))]
        )

    return read


def parse_messages(turns: Any) -> list[Any]:
    """A list of messages, also from its JSON; None is an empty list. RowFault for anything else."""
    if isinstance(turns, str) and turns.strip():
        try:
            turns = json.loads(turns, object_pairs_hook=build_json_object)
        except (ValueError, RecursionError) as error:
            kind = "the conversation is not a list of objects"
            raise RowFault(kind, f"{kind}, nor JSON: {error}") from error
    if not turns and not isinstance(turns, bool | int | float):
        return []
    if not isinstance(turns, list):
        raise RowFault("the conversation is not a list of objects")
    return turns


def parse_turn(row: Columns, turn: Any) -> tuple[str, Any]:
    """(role, content) of a turn; RowFault if the role is not user, assistant or system, or the turn calls a tool."""
    if not isinstance(turn, dict):
        raise RowFault("the conversation is not a list of objects")
    refuse_duplicate_keys(turn)
    role = turn["role"] if turn.get("role") is not None else turn.get("from")
    known = isinstance(role, str) and role.lower() in CHAT_ROLES
    if any(turn.get(name) for name in TOOL_CALL_KEYS):
        raise RowFault("a turn that calls a tool", f"a turn by {role!r} calls a tool")
    if not known:
        tool = isinstance(role, str) and role.lower().replace("-", "_").startswith(TOOL_ROLES)
        said = f"a turn is by {role!r}; known are {', '.join(CHAT_ROLES)}"
        raise RowFault("a turn by a tool" if tool else "a turn by an unknown speaker", said)
    name = next((name for name in CONTENT_KEYS if turn.get(name) is not None), "content")
    value = turn.get(name)
    read = {"role", "from", name}
    seen = value if isinstance(value, str) else ""
    others = [
        key for key in turn if key not in read and not is_metadata_column(key) and has_unseen_text(turn[key], seen)
    ]
    row.dropped += [f"{key!r} of a turn" for key in others]
    return CHAT_ROLES[str(role).lower()], value


def split_dialogue(row: Columns, turns: Sequence[tuple[str, Any]]) -> PromptCompletion:
    """Split turns into a prompt, up to the last user turn, and a completion; ((), "") if there is no user turn.

    Several assistant turns after the last user turn are joined with an empty line. Empty system turns are dropped.
    Assistant turns before the first user turn are dropped too: chat templates refuse them, and FastChat, ShareGPT's
    first reader, skips them.
    """
    said = [Message(role, text) for role, value in turns if (text := field_text(value)) or role != "system"]
    users = [number for number, turn in enumerate(said) if turn.role == "user"]
    if not users:
        return (), ""
    last = users[-1] + 1
    prompt = [turn for number, turn in enumerate(said[:last]) if turn.role != "assistant" or number > users[0]]
    if any(turn.role == "assistant" and turn.content for turn in said[: users[0]]):
        row.dropped.append("what the assistant says before the first question")
    if empty := [number for number, turn in enumerate(prompt[:-1], 1) if not turn.content]:
        raise RowFault("an empty turn", f"turn {empty[0]} of the conversation is empty")
    if any(turn.role == "system" for turn in said[last:]):
        raise RowFault("a system turn after the last question")
    return tuple(prompt), "\n\n".join(turn.content for turn in said[last:] if turn.content)


class RowFormat(NamedTuple):
    """A row format: the keys it needs, its reader, and a description for messages ("" to leave it out)."""

    keys: tuple[str, ...]
    read: Callable[[Columns], PromptCompletion]
    about: str = ""


# The first format whose keys a row has is used.
ROW_FORMATS = (
    RowFormat(("instruction", "instances"), read_self_instruct, "self-instruct seed tasks (instruction, instances)"),
    RowFormat(
        ("instruction",),
        read_alpaca,
        "Alpaca, AlpacaEval and Dolly (instruction; input or context; output or response)",
    ),
    RowFormat(("messages",), conversation_reader("messages"), "messages (role, content)"),
    RowFormat(("conversations",), conversation_reader("conversations"), "ShareGPT"),
    RowFormat(("conversation",), conversation_reader("conversation")),
    RowFormat(("prompt",), read_prompt_completion, "prompt and completion"),
    RowFormat(("question_id", "turns"), read_mt_bench, "MT-Bench's questions (question_id, turns)"),
    RowFormat(("question_id", "choices"), refuse_mt_bench_answers),
    RowFormat(("question", "answer"), read_question_answer, "question and answer"),
    RowFormat(("question", "response"), read_question_answer),
)
KNOWN_FORMATS = (
    "Known formats: " + "; ".join(form.about for form in ROW_FORMATS if form.about) + ". For other column names set "
    "seeds.columns, as in {instruction: frage, output: antwort}."
)


def find_row_format(row: Mapping[str, Any]) -> RowFormat | None:
    """The first format whose keys all have values in a row, else the first whose keys it has, else None."""
    filled = (form for form in ROW_FORMATS if all(row.get(key) is not None for key in form.keys))
    return next(filled, None) or next((form for form in ROW_FORMATS if all(key in row for key in form.keys)), None)


class ParsedRow(NamedTuple):
    """The prompt and completion of a row; `unread` names columns and turns whose text was not read."""

    prompt: Prompt
    completion: str
    unread: list[str]


def parse_row(row: Any) -> ParsedRow:
    """Parse a row of any format; RowFault if it cannot be read. The prompt of a row without an instruction is ()."""
    if isinstance(row, UnreadableRow):
        raise RowFault(row.kind, row.said)
    if not isinstance(row, Mapping):
        raise RowFault("not an object", f"a row is a JSON object, this one is {type(row).__name__}")
    refuse_duplicate_keys(row)
    form = find_row_format(row)
    if form is None:
        keys = ", ".join(map(str, row)) or "none"
        raise RowFault("no known form", f"a row of no known format; its keys: {keys}", KNOWN_FORMATS)
    columns = Columns(row)
    try:
        prompt, completion = form.read(columns)
    except (ValueError, TypeError) as error:
        kind = error.kind if isinstance(error, RowFault) else "not readable"
        raise RowFault(kind, f"a row with {', '.join(form.keys)} that cannot be read: {error}") from error
    refuse_lone_surrogates(completion, *(turn.content for turn in prompt))
    if not prompt or not prompt[-1].content.strip():
        return ParsedRow((), completion, [])
    return ParsedRow(prompt, completion, columns.unread(join_texts(prompt, completion)))


def join_texts(prompt: Prompt, completion: str) -> str:
    """The texts of a prompt and a completion, joined by line breaks."""
    return "\n".join([*(turn.content for turn in prompt), completion])


def require_row(row: Any, where: str) -> PromptCompletion:
    """Parse a row of any format into (prompt, completion); ((), "") if its instruction is empty.

    TapirError with the row's keys if its format is unknown, or with the reason if it cannot be read.
    """
    try:
        return parse_row(row)[:2]
    except RowFault as fault:
        raise TapirError(fault.said, where=where, fix=fault.fix) from fault
