"""What the student's chat template makes of a row, and whether there is room for it: known before it is paid for."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tapir_local.data.chat_template import folded, training_text
from tapir_local.errors import TapirError
from tapir_local.export.tokenizer import read_json, read_template, read_tokenizer, special_texts
from tapir_local.records import Example, Prompt, instruction_of
from tapir_local.unusable import MAX_TEXT_KEPT, Unusable

ROOM = 16  # tokens that a prompt must leave for its answer, or a quarter of all where these are fewer
PROBE = "so be it"  # an answer of no importance
AT_ONCE = 1000  # texts whose token ids are in memory together
SPELLED = 16  # tokens that a tokenizer may put before a text
SPANNED = 8  # tokens more that a row may have once a token that spans prompt and answer is split
LETTERS = 4  # characters of a token, roughly
MODELS_OWN = "the length that the student was made for"

Encode = Callable[[Sequence[str]], list[list[int]]]
Text = tuple[Prompt, str]
Shown = Callable[[int, int, str], None]


@dataclass(frozen=True)
class StudentText:
    """How a student is asked and trained: its chat template, its tokens, and the `length` of a row in tokens.

    `stops` are the texts of its special tokens, one of which must end an answer; `limit` is what decides the length, in
    words.
    """

    template: str
    bos: str
    eos: str
    stops: tuple[str, ...]
    encode: Encode
    length: int
    limit: str = "student.max_length"

    @property
    def room(self) -> int:
        """Tokens that a prompt must leave for its answer."""
        return min(ROOM, self.length // 4)


@dataclass(frozen=True)
class Unfit:
    """Why a text cannot be used: the same few words for all texts of a kind, and what holds for this one."""

    kind: str
    detail: str = ""

    @property
    def reason(self) -> str:
        """The kind, and the detail where there is any."""
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


EMPTY = Unfit("no instruction")


def read_student_text(model: Path, max_length: int, template: str | None = None) -> StudentText:
    """Of a model's folder, with another chat template than its own where one is given.

    TapirError where the folder has no tokenizer, or no template.
    """
    tokenizer, texts = open_tokenizer(model), special_texts(model)
    stops = tuple(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)

    def encode(some: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch_fast(list(some), add_special_tokens=False)]

    made_for = longest_of(model)
    length, limit = (max_length, "student.max_length") if max_length <= made_for else (made_for, MODELS_OWN)
    jinja = read_template(model) if template is None else template
    return StudentText(jinja, texts.get("bos", ""), texts.get("eos", ""), stops, encode, length, limit)


def open_tokenizer(model: Path) -> Any:
    """The tokenizer by itself: transformers, which trains with it, takes seconds to import."""
    from tokenizers import Tokenizer

    path = model / "tokenizer.json"
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        return Tokenizer.from_str(json.dumps(read_tokenizer(model)))
    except TapirError:
        raise
    except Exception as error:  # the Rust library raises the plain class
        fix = "Save model and tokenizer again with transformers' save_pretrained."
        raise TapirError(f"the tokenizer cannot be read: {error}", where=str(path), fix=fix) from error


def longest_of(model: Path) -> int:
    """Tokens of the longest text that a model was made for, by its config; no limit where it names none."""
    path = model / "config.json"
    config = read_json(path) if path.is_file() else {}
    found = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else 1 << 62


def any_student(length: int) -> StudentText:
    """A student that takes every conversation, its tokens guessed: for a forecast where the student is not here."""
    template = (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return StudentText(template, "", "", ("</>",), lambda some: [[0] * (len(text) // LETTERS) for text in some], length)


def unfit_prompts(student: StudentText, prompts: Sequence[Prompt]) -> list[Unfit | None]:
    """For each prompt why the student cannot be asked it, or None where it can."""
    most, kind = student.length - student.room, f"the prompt leaves no room for an answer in {student.limit}"
    rendered = [render_row(student, (prompt, PROBE)) if is_asking(prompt) else EMPTY for prompt in prompts]
    sizes = iter(tokens_of(student, [row[0] for row in rendered if not isinstance(row, Unfit)], most))
    return [row if isinstance(row, Unfit) else too_long(kind, next(sizes), most, student.length) for row in rendered]


def is_asking(prompt: Prompt) -> bool:
    """Whether a prompt ends with a turn that says something."""
    return bool(prompt and prompt[-1].content.strip())


def unfit_answers(student: StudentText, texts: Sequence[Text]) -> list[Unfit | None]:
    """For each prompt and answer why the student cannot be trained on them, or None where it can."""
    most, kind = student.length, f"longer than {student.limit}"
    rendered = [render_row(student, text) for text in texts]
    sizes = iter(row_tokens(student, [row for row in rendered if not isinstance(row, Unfit)], most))
    return [row if isinstance(row, Unfit) else too_long(kind, next(sizes), most, most) for row in rendered]


def too_long(kind: str, tokens: int, most: int, length: int) -> Unfit | None:
    """The finding of this kind where there are more tokens than fit."""
    return Unfit(kind, f"{tokens:,} tokens, {length:,} allowed") if tokens > most else None


def render_row(student: StudentText, text: Text) -> tuple[str, str] | Unfit:
    """The prompt and the answer as they are trained on."""
    try:
        return training_text(student.template, *text, bos_token=student.bos, eos_token=student.eos, stops=student.stops)
    except TapirError as error:
        if error.__cause__ is None:
            return Unfit(error.what)
        roles = ", ".join(turn.role for turn in text[0])
        return Unfit("refused by the chat template", f"turns {roles}: {error.__cause__}")


def tokens_of(student: StudentText, texts: Sequence[str], most: int) -> list[int]:
    """The tokens of each text; 0 without a count where there can be no more than `most`.

    A token is a byte or more of its text, and some tokenizers spell a few characters out first: hence twice the bytes.
    """
    found = [0] * len(texts)
    counted = [number for number, text in enumerate(texts) if 2 * len(text.encode()) + SPELLED > most]
    for start in range(0, len(counted), AT_ONCE):
        some = counted[start : start + AT_ONCE]
        for number, ids in zip(some, student.encode([texts[number] for number in some]), strict=True):
            found[number] = len(ids)
    return found


def row_tokens(student: StudentText, rows: Sequence[tuple[str, str]], most: int) -> list[int]:
    """The tokens of each rendered row as in training, where a token that spans prompt and answer is split.

    Only near `most` does that matter, so only there prompt and answer are counted by themselves.
    """
    found = tokens_of(student, [asked + answer for asked, answer in rows], most)
    near = [number for number, tokens in enumerate(found) if most - SPANNED < tokens <= most]
    parts = student.encode([text for number in near for text in (*rows[number], "".join(rows[number]))])
    for place, number in enumerate(near):
        head, tail, whole = parts[3 * place : 3 * place + 3]
        found[number] = len(whole) if whole[: len(head)] == head else len(head) + len(tail)
    return found


def fold_rows(student: StudentText, rows: Sequence[Example]) -> tuple[list[Example], int]:
    """Rows as the student can be asked them, system turns in the user's where the template has none; how many had one.

    A template that takes no row at all folds none: the check that follows says why.
    """
    try:
        found = [replace(row, prompt=folded(student.template, row.prompt, student.bos, student.eos)) for row in rows]
    except TapirError:
        return list(rows), 0
    return found, sum(new.prompt != old.prompt for new, old in zip(found, rows, strict=True))


def sift(
    rows: Sequence[Example], step: str, check: Callable[[Sequence[Example]], list[Unfit | None]], shown: Shown
) -> tuple[list[Example], list[Unusable]]:
    """The rows that pass a check, and the others with why; `shown` is told how far it is."""
    kept, unusable = list[Example](), list[Unusable]()
    for start in range(0, len(rows), AT_ONCE):
        shown(start, len(rows), "checked with the chat template")
        some = rows[start : start + AT_ONCE]
        for row, unfit in zip(some, check(some), strict=True):
            if unfit is None:
                kept.append(row)
            else:
                text = instruction_of(row.prompt)[:MAX_TEXT_KEPT]
                unusable.append(Unusable(step, row.id, unfit.kind, unfit.detail, text))
    return kept, unusable
