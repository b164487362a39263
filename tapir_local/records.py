"""The records that stages exchange, as frozen dataclasses, and how they are read from and written to JSON."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from tapir_local.errors import TapirError

T = TypeVar("T")
Array = Any  # numpy.ndarray, as an annotation where numpy is imported inside functions
# A training's part of one schedule over several: warm-up and peak; peak; decay to zero; all of it in one training.
# `preference`: a training on preference pairs after the last round, which is a whole schedule of its own.
SchedulePart = Literal["first", "middle", "last", "whole", "preference"]
Progress = Callable[[int, int, str], None]  # called with (done, total, note); 0 of 0 is a remark


def noop(*_: object) -> None:
    """Do nothing: the default of every callback."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


Prompt = tuple[Message, ...]


@dataclass(frozen=True)
class Example:
    """An instruction and its answer.

    `prompt` ends with a user turn. `origin` says where the row came from: the seed file, or the teacher's expansion of
    the example `parent` in round `round`.
    """

    id: str
    prompt: Prompt
    completion: str = ""
    task: str = ""
    labelled_by: Literal["", "file", "teacher", "classifier"] = ""
    origin: Literal["seed", "expanded"] = "seed"
    parent: str = ""
    round: int = 0


@dataclass(frozen=True)
class PreferencePair(Example):
    """Two answers to the prompt of a row: `completion`, the teacher's, is the better one, and `rejected` the student's.

    `teacher` and `student` are the judge's scores of the two; `judged_in` is the round in which they were judged.
    """

    rejected: str = ""
    teacher: float = 0.0
    student: float = 0.0
    judged_in: int = 0

    @property
    def difficulty(self) -> float:
        """The MFD: the teacher's score minus the student's."""
        return self.teacher - self.student


@dataclass(frozen=True)
class Completion:
    """An answer of the student.

    `finish`: `stop`, `length` (cut at max_tokens), or, with an empty text, `too_long` (the prompt fills the context)
    or `refused` (the chat template cannot render the prompt).
    """

    id: str
    text: str
    finish: Literal["stop", "length", "too_long", "refused"]
    tokens: int

    @property
    def asked(self) -> bool:
        """False if the student could not be given the prompt."""
        return self.finish not in ("too_long", "refused")


@dataclass(frozen=True)
class Judgement:
    """A judge's scores, 1 to 10, of the teacher's and the student's answer, averaged over both orders of showing them.

    Both are None if any reply could not be parsed; `reason` then says which and why. `orders` holds the parsed scores
    as (teacher, student): first with the teacher's answer shown first, then with the student's shown first; None if
    answers are not shown in pairs. Lengths are in characters; 0 in files of older versions.
    """

    id: str
    teacher: float | None
    student: float | None
    orders: tuple[tuple[float, float] | None, tuple[float, float] | None] = (None, None)
    reason: str = ""
    student_length: int = 0
    teacher_length: int = 0


@dataclass(frozen=True)
class JudgeQuality:
    """How reliable a judge's scores are, estimated from the scores. None: undefined, or too few rows.

    `rows` were judged, `unjudged` were not. For judgements in both orders: `agreement` is the share of rows whose two
    orders have the same winner or both tie, `order_difference` the mean absolute difference between the two scores of
    an answer, and `position_bias` the mean score of the answer shown first minus that of the second. `ties` is the
    share of rows on which both answers have the same score. `length_bias` is the rank correlation, -1 to 1, between
    the difference of the answers' lengths and the difference of their scores, each student minus teacher. `notes` are
    warnings for people. `checker_rows` counts the rows on which a checker finds exactly one of the two answers right,
    and `checker_agreement` is the share of these on which that answer scores more; an equal score counts half.
    `health` sums it up: `useless` (constant, or no better than chance), `doubtful` (there are warnings), `good`, or
    `unknown` (too few rows); "" in files of older versions.
    """

    rows: int
    unjudged: int
    agreement: float | None
    order_difference: float | None
    position_bias: float | None
    ties: float | None
    length_bias: float | None
    notes: tuple[str, ...] = ()
    checker_rows: int = 0
    checker_agreement: float | None = None
    health: Literal["", "unknown", "useless", "doubtful", "good"] = ""


@dataclass(frozen=True)
class Scored:
    """Log-probability (nats) of a given completion's `tokens` tokens; 0 tokens if it does not fit the context."""

    id: str
    logprob: float
    tokens: int


ExpansionManner = Literal["alike", "rarer"]
Styled = Literal["hard", "all", "none"]


@dataclass(frozen=True)
class Expansion:
    """A request for `rows` new instructions of a task, written from the pool rows `parents` in turn, then `others`.

    `others` are less hard rows of the task; they are used once every parent has curriculum.children new rows. `manner`:
    `alike` asks for the same task, domain and difficulty as the parent; `rarer` for a rarer one of the domain (Lion).
    """

    task: str
    rows: int
    parents: tuple[str, ...]
    manner: ExpansionManner = "alike"
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskMastery:
    """A task in a plan with `curriculum.mastery`.

    `gap` is the mean of the teacher's minus the student's score over the task's judged rows, in points (-9 to 9). A
    task that is not mastered is `taught` in this round, or `waiting` while tasks with larger gaps come first.
    """

    gap: float
    state: Literal["taught", "waiting", "mastered"]


@dataclass(frozen=True)
class TaskLearning:
    """The hard rows of a task that the last round trained on and this one judged again, with `curriculum.learnable`.

    `trained` counts all of them, `learned` those whose MFD fell.
    """

    trained: int
    learned: int

    @property
    def factor(self) -> float:
        """(learned + 1) / (trained + 2), Laplace's rule of succession: 0.5 without a row, and never 0 or 1."""
        return (self.learned + 1) / (self.trained + 2)


@dataclass(frozen=True)
class RoundPlan:
    """What a round trains on. Ids refer to the pool or the seeds; counts are numbers of rows.

    `hard` are hard rows, `expansions` the new rows to write, `drawn` rows taken unchanged whatever their difficulty,
    `replay` the easy rows kept in, `reflected` rows that the teacher criticizes and rewrites, `aside` hard rows left
    for a later round. `styled` says which answers the teacher rewrites in the task's style: those of hard and new rows,
    of all rows, or of none. `asked` and `got` are the tasks' requested and actual shares of the hard and new (or drawn)
    rows; `short` the missing rows by task; `notes` remarks for people. `alpha` is the challenge, the requested share of
    hard and new rows; `alpha_got` the actual share. `mastery` and `learning` are of the tasks that have a hard row;
    empty without `curriculum.mastery` and `curriculum.learnable`.
    """

    round: int
    curriculum: str
    alpha: float
    alpha_got: float
    hard: tuple[str, ...] = ()
    expansions: tuple[Expansion, ...] = ()
    drawn: tuple[str, ...] = ()
    replay: tuple[str, ...] = ()
    reflected: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    styled: Styled = "none"
    pool: int = 0
    pool_hard: int = 0
    unjudged: int = 0
    asked: Mapping[str, float] = field(default_factory=dict)
    got: Mapping[str, float] = field(default_factory=dict)
    short: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    mastery: Mapping[str, TaskMastery] = field(default_factory=dict)
    learning: Mapping[str, TaskLearning] = field(default_factory=dict)

    @property
    def to_write(self) -> int:
        """The number of new rows to write."""
        return sum(expansion.rows for expansion in self.expansions)


@dataclass(frozen=True)
class Metrics:
    """A student on the holdout. Rates are 0 to 1; intervals are 95 %.

    `win_rate` counts a tie with the teacher's answer as half a win, so a student as good as its teacher has 0.5. With
    `judge: reference` there is no win rate, and `student_score` is the similarity, 1 to 10, of the student's answers to
    the teacher's; `by_task` then has it too. `accuracy` is the share of correct answers among the `checked` ones, those
    that a checker can verify; None if the recipe has no checker. `length_controlled` is the win rate at equal length of
    both answers (method/length_control.py); None without a win rate, with too few rows, or if one side's answers are
    nearly all longer. `judge_quality`, `checked` and `length_controlled` are None in files of older versions.
    """

    round: int
    rows: int
    judged: int
    unjudged: int
    win_rate: float | None
    win_rate_interval: tuple[float, float] | None
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None
    student_score: float | None
    teacher_score: float | None
    by_task: Mapping[str, Mapping[str, float | None]]
    cut: int
    judge: str
    judge_quality: JudgeQuality | None = None
    checked: int | None = None
    length_controlled: float | None = None
    length_controlled_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Request:
    """One request to a teacher or judge. `draw` numbers the answers to requests with the same body.

    `schema` is the JSON schema of the reply, for endpoints that can enforce one: a GGUF on this machine.
    """

    messages: Prompt
    row: str
    stage: str
    round: int = 0
    draw: int = 0
    temperature: float = 0.0
    max_tokens: int = 1024
    schema: Mapping[str, Any] | None = field(default=None, hash=False)  # a mapping is not hashable


@dataclass(frozen=True)
class Answer:
    """The answer to a request. `finish` is the API's finish reason; `hit` is True if it came from the store, unpaid.

    `key` is the call's key, 64 hexadecimal digits. `why` says why there is no usable text, with the server's message if
    it sent one; "" if there is a text. `ahead`: it was asked before its stage began, and was paid for then.
    """

    text: str
    finish: str
    hit: bool
    tokens_in: int = 0
    tokens_out: int = 0
    key: str = ""
    why: str = ""
    ahead: bool = False

    @property
    def complete(self) -> bool:
        """True if the text is complete: not cut off, filtered or empty."""
        return self.finish == "stop" and bool(self.text.strip())

    @property
    def refused(self) -> bool:
        """True if the server refuses the content of the request, so that a repetition would be refused too."""
        return self.finish in ("refused", "content_filter")


ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def type_adapter(kind: type[T]) -> TypeAdapter[T]:
    """The pydantic reader and writer of a record class, cached."""
    if kind not in ADAPTERS:
        ADAPTERS[kind] = TypeAdapter(kind)
    return ADAPTERS[kind]


def to_json(record: Any) -> str:
    """The record as one line of JSON, with keys in the order of the class."""
    return type_adapter(type(record)).dump_json(record).decode()


def from_json(kind: type[T], text: str | bytes, where: str = "") -> T:
    """The record in a text of JSON; TapirError with `where` if it is not one."""
    try:
        return type_adapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise TapirError(
            f"not a {kind.__name__}: {key} {first['msg']}".strip(),
            where=where,
            fix="It is damaged or of another version of the program; `tapir-local redo` writes it again.",
        ) from error


def instruction_of(prompt: Prompt) -> str:
    """The prompt as plain text: the user turn itself, or a transcript if there are several turns."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt)
