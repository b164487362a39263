"""The forms in which instructions are handed around: a row of any of them becomes a prompt and a completion."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tapir_local.errors import TapirError
from tapir_local.records import Message, Prompt

Row = tuple[int, dict[str, Any]]
Read = tuple[Prompt, str]


@dataclass(frozen=True)
class Table:
    """The rows of a source, each with its number: that of the line on which it starts, or its own, as `unit` says."""

    where: str
    rows: Sequence[Row]
    unit: str = "line"

    def at(self, *numbers: int, most: int = 5) -> str:
        """`seeds.json, line 3`, `seeds.json, lines 3, 7, 9, 12, 13 and 4 more`."""
        return f"{self.where}, {lines(numbers, most, self.unit)}"


def lines(numbers: Sequence[int], most: int = 5, unit: str = "line") -> str:
    """`line 3`, `lines 3, 7, 9` or `lines 3, 7, 9, 12, 13 and 4 more`."""
    shown = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"{unit}{'s' if len(numbers) > 1 else ''} {shown}{more}"


def text_of(value: Any) -> str:
    """A field as text: a string, a number, nothing, or OpenAI's list of parts; ValueError where it is anything else."""
    if isinstance(value, str):
        return value.strip()
    if value is None:
        return ""
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text") or "") for part in value).strip()
    raise ValueError(f"a {type(value).__name__} stands where text is expected")


def first_of(row: Mapping[str, Any], *names: str) -> str:
    """The text of the first of several columns that has any; "" where none has."""
    return next((text for name in names if (text := text_of(row.get(name)))), "")


def alpaca(row: Mapping[str, Any]) -> Read:
    """instruction, input, output; Dolly's names for the latter two; LLaMA-Factory's system and history before them."""
    given, asked = first_of(row, "input", "context"), text_of(row["instruction"])
    turns = [("system", row.get("system"))]
    for question, reply in row.get("history") or ():
        turns += [("user", question), ("assistant", reply)]
    turns += [("user", f"{asked}\n\n{given}" if given and asked else asked)]
    return dialogue(turns)[0], first_of(row, "output", "response")


def self_instruct(row: Mapping[str, Any]) -> Read:
    """instruction and a list of instances, of which the first is taken."""
    if not isinstance(row["instances"], list) or not all(isinstance(item, dict) for item in row["instances"][:1]):
        raise ValueError("instances is not a list of objects")
    return alpaca({"instruction": row["instruction"], **(row["instances"][0] if row["instances"] else {})})


def question_answer(row: Mapping[str, Any]) -> Read:
    """question, and answer or response, as GSM8K and OpenOrca have them; a system prompt before them."""
    system = first_of(row, "system_prompt", "system")
    return dialogue([("system", system), ("user", row["question"])])[0], first_of(row, "answer", "response")


def mt_bench(row: Mapping[str, Any]) -> Read:
    """question_id, category, turns: the first turn, and its reference answer where there is one.

    A second turn is about the answer to the first, so it asks nothing by itself.
    """
    turns, reference = row["turns"], row.get("reference") or [""]
    if not isinstance(turns, list) or not turns or not isinstance(reference, list):
        raise ValueError("turns is not a list of questions")
    return dialogue([("user", turns[0])])[0], text_of(reference[0])


def mt_bench_answers(row: Mapping[str, Any]) -> Read:
    """question_id, choices: MT-Bench's answers, refused with what to do."""
    raise ValueError("these are answers without their questions; name the file of questions")


def prompt_completion(row: Mapping[str, Any]) -> Read:
    """prompt and completion, each a string or a list of messages, as TRL has them; the completion may be absent."""
    given, reply = row["prompt"], row.get("completion")
    turns = given if isinstance(given, list) else [{"role": "user", "content": given}]
    answer = reply if isinstance(reply, list) else [{"role": "assistant", "content": reply or row.get("response")}]
    return conversation([*turns, *answer])


ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}


def conversation(turns: Any, system: Any = None) -> Read:
    """Messages of `role` and `content`, or ShareGPT's of `from` and `value`, as a list or as its JSON."""
    if isinstance(turns, str):
        turns = json.loads(turns)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("the conversation is not a list of objects")
    return dialogue([("system", system), *map(role_and_content, turns)])


def role_and_content(turn: Mapping[str, Any]) -> tuple[str, Any]:
    """A turn of a conversation; ValueError where who speaks is neither user, assistant nor system."""
    role = turn.get("role") or turn.get("from")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"a turn is by {role!r}; known are {', '.join(ROLES)}")
    return ROLES[role.lower()], turn.get("content") if turn.get("content") is not None else turn.get("value")


def dialogue(turns: Sequence[tuple[str, Any]]) -> Read:
    """Turns up to the last user's as prompt, the assistant's after it as completion; ((), "") where no user speaks.

    Empty system turns are left out, and what an assistant says before any user: chat templates refuse such a
    beginning, and FastChat, ShareGPT's first reader, skips it too.
    """
    said = [Message(role, text) for role, value in turns if (text := text_of(value)) or role != "system"]
    users = [number for number, turn in enumerate(said) if turn.role == "user"]
    if not users:
        return (), ""
    last = users[-1] + 1
    prompt = [turn for number, turn in enumerate(said[:last]) if turn.role != "assistant" or number > users[0]]
    if empty := [number for number, turn in enumerate(prompt[:-1], 1) if not turn.content]:
        raise ValueError(f"turn {empty[0]} of the conversation is empty")
    completion = said[last].content if len(said) > last and said[last].role == "assistant" else ""
    return tuple(prompt), completion


class Form(NamedTuple):
    """How rows with certain keys are read; `about` is how people know the form, "" where it is not to be named."""

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Read]
    about: str = ""


# The first form whose keys a row has reads it.
FORMS = (
    Form(("instruction", "instances"), self_instruct, "self-instruct seed tasks (instruction, instances)"),
    Form(("instruction",), alpaca, "Alpaca, AlpacaEval and Dolly (instruction; input or context; output or response)"),
    Form(("messages",), lambda row: conversation(row["messages"], row.get("system")), "messages (role, content)"),
    Form(("conversations",), lambda row: conversation(row["conversations"], row.get("system")), "ShareGPT"),
    Form(("conversation",), lambda row: conversation(row["conversation"], row.get("system"))),
    Form(("prompt",), prompt_completion, "prompt and completion"),
    Form(("question_id", "turns"), mt_bench, "MT-Bench's questions (question_id, turns)"),
    Form(("question_id", "choices"), mt_bench_answers),
    Form(("question", "answer"), question_answer, "question and answer"),
    Form(("question", "response"), question_answer),
)
KNOWN = "Known forms: " + "; ".join(form.about for form in FORMS if form.about) + "."


def form_of(row: Mapping[str, Any]) -> Form | None:
    """The first form for whose keys a row has values, else the first whose keys it has, else None."""
    filled = (form for form in FORMS if all(row.get(key) is not None for key in form.keys))
    return next(filled, None) or next((form for form in FORMS if all(key in row for key in form.keys)), None)


def read_row(row: Mapping[str, Any], where: str) -> Read:
    """The prompt and the completion of one row, whatever its form; ((), "") where its instruction is empty.

    TapirError with the row's keys where it has no known form, or with what is wrong where it cannot be read.
    """
    form = form_of(row)
    if form is None:
        keys = ", ".join(map(str, row)) or "none"
        raise TapirError(f"a row of no known form; its keys: {keys}", where=where, fix=KNOWN)
    try:
        return form.read(row)
    except (ValueError, TypeError) as error:
        raise TapirError(f"a row with {', '.join(form.keys)} that cannot be read: {error}", where=where) from error
