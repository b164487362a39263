"""Check whether a row fits the student's chat template and context length, before anything is paid for it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tapir_local.data.chat_template import NO_TEMPLATE, merge_system_turns, render_training_text
from tapir_local.errors import TapirError
from tapir_local.export.tokenizer import read_model_template, read_tokenizer_json, special_token_texts
from tapir_local.inference.model import Advice, metadata_number, open_model, require_template
from tapir_local.inference.tokens import special_marks, tokenize_texts
from tapir_local.printable import format_count
from tapir_local.records import Example, Prompt
from tapir_local.training.model_files import read_model_json

MIN_ANSWER_TOKENS = 16  # tokens that a prompt must leave for the answer, or a quarter of the length if that is less
PROBE_ANSWER = "so be it"  # stands for an answer while only the prompt is checked
TEXTS_PER_CHECK = 1000  # texts whose token ids are in memory together
MAX_PREFIX_TOKENS = 16  # tokens that a tokenizer may put before a text
MAX_SPLIT_TOKENS = 8  # more tokens that a row may have once a token across prompt and answer is split
CHARACTERS_PER_TOKEN = 4  # roughly, in English
MODEL_LIMIT = "the length that the student was made for"

Encode = Callable[[Sequence[str]], list[list[int]]]
PromptAndAnswer = tuple[Prompt, str]


@dataclass(frozen=True)
class StudentFormat:
    """How rows are given to a student: its chat template, its tokenizer, and the longest row in tokens (`length`).

    `stops` are its special tokens, one of which must end an answer. `limit` names what sets the length.
    """

    template: str
    bos: str
    eos: str
    stops: tuple[str, ...]
    encode: Encode
    length: int
    limit: str = "student.max_length"

    @property
    def min_answer(self) -> int:
        """Tokens that a prompt must leave for its answer."""
        return min(MIN_ANSWER_TOKENS, self.length // 4)


@dataclass(frozen=True)
class Unfit:
    """Why a text cannot be used: `kind` is the same for all texts with this fault, `detail` is about this text."""

    kind: str
    detail: str = ""

    @property
    def reason(self) -> str:
        """The kind, with the detail if there is one."""
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


EMPTY_INSTRUCTION = Unfit("no instruction")


def read_student_format(model: Path, max_length: int, template: str | None = None) -> StudentFormat:
    """The format of a model's folder, with `template` in place of its own chat template if given.

    TapirError if the folder has no tokenizer or no template.
    """
    tokenizer, texts = open_tokenizer(model), special_token_texts(model)
    stops = tuple(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)

    def encode(some: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch_fast(list(some), add_special_tokens=False)]

    made_for = model_max_length(model)
    length, limit = (max_length, "student.max_length") if max_length <= made_for else (made_for, MODEL_LIMIT)
    jinja = read_model_template(model) if template is None else template
    return StudentFormat(jinja, texts.get("bos", ""), texts.get("eos", ""), stops, encode, length, limit)


def read_gguf_format(gguf: Path, max_length: int, template: str | None = None) -> StudentFormat:
    """The format of a student that is a GGUF, by llama.cpp: for a dry run, which makes no folder from it.

    TapirError if the file cannot be opened, or has no template and none is given.
    """
    advice = Advice("Correct student.path.", no_template=NO_TEMPLATE)
    with open_model(gguf, vocab_only=True, advice=advice) as model:
        jinja = require_template(model) if template is None else template
        made_for, stops = metadata_number(model, "context_length", 1 << 62), tuple(special_marks(model).ids)
        bos, eos = model.bos, model.eos
    length, limit = (max_length, "student.max_length") if max_length <= made_for else (made_for, MODEL_LIMIT)
    return StudentFormat(jinja, bos, eos, stops, lambda texts: tokenize_texts(gguf, texts), length, limit)


def open_tokenizer(model: Path) -> Any:
    """The tokenizer, read without transformers, whose import takes seconds."""
    from tokenizers import Tokenizer

    path = model / "tokenizer.json"
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        return Tokenizer.from_str(json.dumps(read_tokenizer_json(model)))
    except TapirError:
        raise
    except Exception as error:  # the Rust library raises the plain class
        fix = "Save model and tokenizer again with transformers' save_pretrained."
        raise TapirError(f"the tokenizer cannot be read: {error}", where=str(path), fix=fix) from error


def model_max_length(model: Path) -> int:
    """The longest text in tokens that a model was made for, by its config; very large if the config names none."""
    path = model / "config.json"
    config = read_model_json(path) if path.is_file() else {}
    found = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else 1 << 62


def placeholder_format(length: int) -> StudentFormat:
    """A format that accepts every conversation and estimates tokens: for a dry run without the student's files."""
    template = (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    def encode(some: Sequence[str]) -> list[list[int]]:
        return [[0] * (len(text) // CHARACTERS_PER_TOKEN) for text in some]

    return StudentFormat(template, "", "", ("</>",), encode, length)


def unfit_prompts(student: StudentFormat, prompts: Sequence[Prompt]) -> list[Unfit | None]:
    """For each prompt why the student cannot be asked it, or None if it can."""
    most, kind = student.length - student.min_answer, f"the prompt leaves no room for an answer in {student.limit}"
    rendered = [
        render_row(student, (prompt, PROBE_ANSWER)) if has_instruction(prompt) else EMPTY_INSTRUCTION
        for prompt in prompts
    ]
    sizes = iter(count_text_tokens(student, [row[0] for row in rendered if not isinstance(row, Unfit)], most))
    return [
        row if isinstance(row, Unfit) else unfit_length(kind, next(sizes), most, student.length) for row in rendered
    ]


def has_instruction(prompt: Prompt) -> bool:
    """Whether a prompt ends with a turn that has text."""
    return bool(prompt and prompt[-1].content.strip())


def unfit_answers(student: StudentFormat, texts: Sequence[PromptAndAnswer]) -> list[Unfit | None]:
    """For each prompt and answer why the student cannot be trained on them, or None if it can."""
    most, kind = student.length, f"longer than {student.limit}"
    rendered = [render_row(student, text) for text in texts]
    sizes = iter(count_row_tokens(student, [row for row in rendered if not isinstance(row, Unfit)], most))
    return [row if isinstance(row, Unfit) else unfit_length(kind, next(sizes), most, most) for row in rendered]


def unfit_length(kind: str, tokens: int, most: int, length: int) -> Unfit | None:
    """The fault of a text with more than `most` tokens, else None; the message names `length`."""
    return Unfit(kind, f"{format_count(tokens, 'token')}, {length:,} allowed") if tokens > most else None


def render_row(student: StudentFormat, text: PromptAndAnswer) -> tuple[str, str] | Unfit:
    """(prompt, answer) as the student is trained on them, or why the chat template cannot render them."""
    try:
        return render_training_text(
            student.template, *text, bos_token=student.bos, eos_token=student.eos, stops=student.stops
        )
    except TapirError as error:
        if error.__cause__ is None:
            return Unfit(error.what)
        roles = ", ".join(turn.role for turn in text[0])
        return Unfit("refused by the chat template", f"turns {roles}: {error.__cause__}")


def count_text_tokens(student: StudentFormat, texts: Sequence[str], most: int) -> list[int]:
    """The tokens of each text; 0, without counting, for a text too short to have more than `most`.

    A token is at least one byte of the text, and some tokenizers split a few characters first, so twice the bytes is
    an upper bound.
    """
    found = [0] * len(texts)
    long_ones = [number for number, text in enumerate(texts) if 2 * len(text.encode()) + MAX_PREFIX_TOKENS > most]
    for start in range(0, len(long_ones), TEXTS_PER_CHECK):
        some = long_ones[start : start + TEXTS_PER_CHECK]
        for number, ids in zip(some, student.encode([texts[number] for number in some]), strict=True):
            found[number] = len(ids)
    return found


def count_row_tokens(student: StudentFormat, rows: Sequence[tuple[str, str]], most: int) -> list[int]:
    """The tokens of each rendered row as in training, where a token across prompt and answer is split.

    The split matters only near `most`, so only there are prompt and answer counted separately.
    """
    found = count_text_tokens(student, [prompt + answer for prompt, answer in rows], most)
    near = [number for number, tokens in enumerate(found) if most - MAX_SPLIT_TOKENS < tokens <= most]
    parts = student.encode([text for number in near for text in (*rows[number], "".join(rows[number]))])
    for place, number in enumerate(near):
        head, tail, whole = parts[3 * place : 3 * place + 3]
        found[number] = len(whole) if whole[: len(head)] == head else len(head) + len(tail)
    return found


def fold_system_turns(student: StudentFormat, rows: Sequence[Example]) -> tuple[list[Example], int]:
    """(rows whose system turn is moved into the user's if the template has no system role, how many were changed).

    With a template that renders no row at all, nothing is changed; the check that follows says why.
    """
    try:
        found = [
            replace(row, prompt=merge_system_turns(student.template, row.prompt, student.bos, student.eos))
            for row in rows
        ]
    except TapirError:
        return list(rows), 0
    return found, sum(new.prompt != old.prompt for new, old in zip(found, rows, strict=True))
