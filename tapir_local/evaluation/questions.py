"""Read the file of an evaluation: AlpacaEval's instructions, MT-Bench's questions, or rows in a format of seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

from tapir_local.data.columns import UnreadableRow
from tapir_local.data.files import read_path
from tapir_local.data.formats import Table, require_row
from tapir_local.errors import TapirError
from tapir_local.records import Message, Prompt

QuestionShape = Literal["alpaca_eval", "mt_bench", "rows"]
KNOWN_SHAPES = (
    "FILE has one of three shapes: AlpacaEval's JSON (instruction, dataset, output), MT-Bench's questions "
    "(question_id, category, turns), or rows in any format that seeds may have (docs/your-data.md)."
)
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")  # MT-Bench's questions of these have a right answer
NO_REFERENCES = "none"  # the value of --references that does without


@dataclass(frozen=True)
class Question:
    """What is asked: `opening` ends with the first user turn, and `later` are the user turns after it.

    `references` are right answers for the judge, one for each turn or fewer. `answer` is the answer to the first turn
    that the file has, "" if it has none. `category` groups the results.
    """

    id: str
    opening: Prompt
    later: tuple[str, ...] = ()
    category: str = ""
    references: tuple[str, ...] = ()
    answer: str = ""

    @property
    def turns(self) -> int:
        """The number of user turns that are answered."""
        return 1 + len(self.later)

    def conversation(self, answers: Sequence[str]) -> Prompt:
        """The prompt after some answers: each is followed by the next user turn."""
        said = list(self.opening)
        for answer, asked in zip(answers, self.later, strict=False):
            said += [Message("assistant", answer), Message("user", asked)]
        return tuple(said)


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a file, its shape, and who wrote the answers in it; `total` counts them without a limit."""

    path: Path
    shape: QuestionShape
    questions: tuple[Question, ...]
    answered_by: str
    total: int

    @property
    def turns(self) -> int:
        """The most turns of a question."""
        return max(question.turns for question in self.questions)


def read_questions(path: Path, references: str | None = None, limit: int | None = None) -> QuestionSet:
    """The first `limit` questions of a file.

    `references` names a file of reference answers in FastChat's format, or is NO_REFERENCES. TapirError if the file has
    none of the three shapes, two rows have the same id, or MT-Bench's references are missing.
    """
    table = read_path(path)
    shape = find_shape(table)
    questions = [read_question(shape, serial, row, table.at(at)) for serial, (at, row) in enumerate(table.rows, 1)]
    seen: dict[str, int] = {}
    for question, (number, _) in zip(questions, table.rows, strict=True):
        if question.id in seen:
            where = table.at(seen[question.id], number)
            raise TapirError(f"two questions have the id {question.id!r}", where=where, fix="Give each its own.")
        seen[question.id] = number
    questions = questions[:limit]
    if references is not None and shape != "mt_bench":
        fix = "Leave it out: rows have their references as answers."
        raise TapirError("--references is for MT-Bench's questions only", where=str(path), fix=fix)
    if shape == "mt_bench":
        questions = with_references(questions, path, references)
    writer = answers_writer(shape, [row for _, row in table.rows]) or f"the answers in {path.name}"
    return QuestionSet(path, shape, tuple(questions), writer, len(table.rows))


def find_shape(table: Table) -> QuestionShape:
    """The shape of a file, by its first readable row."""
    first = next((row for _, row in table.rows if isinstance(row, Mapping)), {})
    if "question_id" in first and "turns" in first:
        return "mt_bench"
    if "question_id" in first and "choices" in first:
        what = "these are answers without their questions"
        raise TapirError(what, where=table.where, fix=f"Name the file of questions. {KNOWN_SHAPES}")
    if "preference" in first and "output_1" in first:
        fix = "`tapir-local evaluate --annotations FILE` computes the rates from it."
        raise TapirError("these are annotations, not questions", where=table.where, fix=fix)
    return "alpaca_eval" if "instruction" in first and ("dataset" in first or "generator" in first) else "rows"


def read_question(shape: QuestionShape, serial: int, row: Any, where: str) -> Question:
    """The question of a row; `serial` is its id if it has none. TapirError if it is of another shape than the file."""
    if isinstance(row, UnreadableRow) or not isinstance(row, Mapping):
        what = (
            row.said if isinstance(row, UnreadableRow) else f"a row is a JSON object, this one is {type(row).__name__}"
        )
        raise TapirError(what, where=where, fix=KNOWN_SHAPES)
    if shape == "mt_bench":
        return read_mt_question(row, where)
    try:
        prompt, answer = require_row(row, where)
    except TapirError as error:
        raise TapirError(error.what, where=where, fix=KNOWN_SHAPES) from error
    if not prompt:
        raise TapirError("a row without a question", where=where, fix=KNOWN_SHAPES)
    if shape == "alpaca_eval":
        return Question(str(serial), prompt, category=str(row.get("dataset") or ""), answer=answer)
    given = row.get("id")
    category = next((str(row[name]) for name in ("category", "task", "label") if row.get(name)), "")
    id = str(serial if given in (None, "") else given)
    return Question(id, prompt, category=category, references=(answer,) if answer else (), answer=answer)


def read_mt_question(row: Mapping[str, Any], where: str) -> Question:
    """A question of MT-Bench with all its turns; references only if the row has some."""
    turns, references = row.get("turns"), row.get("reference") or []
    if not is_list_of_texts(turns) or not turns or "" in turns or row.get("question_id") is None:
        what = "a question without question_id or turns, a list of texts"
        raise TapirError(what, where=where, fix=KNOWN_SHAPES)
    if not is_list_of_texts(references):
        raise TapirError("the reference of a question is not a list of texts", where=where, fix=KNOWN_SHAPES)
    category, opening = str(row.get("category") or ""), (Message("user", turns[0]),)
    return Question(str(row["question_id"]), opening, tuple(turns[1:]), category, tuple(references))


def is_list_of_texts(value: Any) -> TypeGuard[list[str]]:
    """Whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def with_references(questions: Sequence[Question], path: Path, references: str | None) -> list[Question]:
    """The questions with the reference answers of a file, or as they are.

    TapirError if no question of REFERENCE_CATEGORIES has one, unless `references` is NO_REFERENCES.
    """
    if references == NO_REFERENCES:
        return [replace(question, references=()) for question in questions]
    if references is not None:
        known = read_references(Path(references))
        questions = [replace(one, references=known.get(one.id, one.references)) for one in questions]
    wanted = [one for one in questions if one.category in REFERENCE_CATEGORIES]
    if wanted and len(without_reference(wanted)) == len(wanted):
        raise TapirError(
            f"the questions of {', '.join(REFERENCE_CATEGORIES)} have no reference answers",
            where=references or str(path),
            fix="Name a file of them with --references, such as FastChat's reference_answer/gpt-4.jsonl, or judge "
            f"without with --references {NO_REFERENCES}.",
        )
    return list(questions)


def without_reference(questions: Sequence[Question]) -> list[Question]:
    """The questions that should have a reference answer, by their category, and have none."""
    return [one for one in questions if one.category in REFERENCE_CATEGORIES and not any(one.references)]


def read_references(path: Path) -> dict[str, tuple[str, ...]]:
    """The reference answers of a file in FastChat's format (question_id, choices[0].turns), by question id."""
    table, found = read_path(path), dict[str, tuple[str, ...]]()
    for number, row in table.rows:
        try:
            turns = row["choices"][0]["turns"]
            if not is_list_of_texts(turns):
                raise TypeError
            found[str(row["question_id"])] = tuple(turns)
        except (KeyError, TypeError, IndexError) as error:
            what = "not a reference answer in FastChat's format (question_id, choices[0].turns)"
            raise TapirError(what, where=table.at(number)) from error
    return found


def answers_writer(shape: QuestionShape, rows: Sequence[Any]) -> str:
    """Who wrote the answers in a file: AlpacaEval's `generator`; "" if it names nobody."""
    names = {row.get("generator") for row in rows if isinstance(row, Mapping)}
    return str(names.pop()) if shape == "alpaca_eval" and len(names) == 1 and all(names) else ""
