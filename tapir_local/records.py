"""The values that travel between stages: frozen dataclasses, JSON in and out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from tapir_local.errors import TapirError

T = TypeVar("T")
Array = Any  # numpy.ndarray, as an annotation where numpy is imported inside functions
Progress = Callable[[int, int, str], None]  # called with (done, total, note); 0 of 0 is a remark


def noop(*_: object) -> None:
    """Do nothing: the default of every callback."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; role is `system`, `user` or `assistant`."""

    role: str
    content: str


Prompt = tuple[Message, ...]


@dataclass(frozen=True)
class Example:
    """An instruction and its answer.

    `prompt` ends with a user's turn. `origin` is where the row came from: the seed file, or the
    teacher's expansion of the example named by `parent` in round `round`.
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
class Completion:
    """What a student wrote.

    `finish`: `stop`, `length` (cut at max_tokens), or without a text `too_long` (the prompt fills the context) and
    `refused` (the chat template cannot render the prompt).
    """

    id: str
    text: str
    finish: Literal["stop", "length", "too_long", "refused"]
    tokens: int

    @property
    def asked(self) -> bool:
        """False where the prompt could not be given to the student."""
        return self.finish not in ("too_long", "refused")


@dataclass(frozen=True)
class Judgement:
    """A judge's scores, 1 to 10, of a teacher's and a student's answer, averaged over both orders of showing them.

    Both are None when any reply could not be read; `reason` then says which and why. `orders` holds what was read:
    (teacher, student) with the teacher's answer shown first, then the same with the student's shown first; None where
    answers are not shown in pairs. Lengths are of the answers, in characters; 0 in files of older versions.
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
    """How far a judge's scores can be trusted, by the scores alone. None: undefined, or too few rows to say.

    `rows` were judged and `unjudged` not. Of judgements in both orders: `agreement` is the share of rows whose orders
    name the same winner or both tie, `order_difference` the mean absolute difference of an answer's two scores, and
    `position_bias` the mean score of the answer shown first less that of the second. `ties` is the share of rows on
    which both answers score the same. `length_bias` is the rank correlation, -1 to 1, of the student's answer's length
    less the teacher's with its score less the teacher's. `notes` are warnings for people.
    """

    rows: int
    unjudged: int
    agreement: float | None
    order_difference: float | None
    position_bias: float | None
    ties: float | None
    length_bias: float | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scored:
    """Log-probability (nats) of a given completion's `tokens` tokens; 0 tokens where it does not fit the context."""

    id: str
    logprob: float
    tokens: int


ExpansionManner = Literal["alike", "rarer"]
Styled = Literal["hard", "all", "none"]


@dataclass(frozen=True)
class Expansion:
    """`rows` new instructions wanted of a task, grown in turn from the pool rows `parents`, then from `others`.

    `others` are less hard rows of the task, for where the parents have as many new rows as curriculum.children allows.
    `alike`: of the same task, domain and difficulty as the parent; `rarer`: of the same domain, and rarer (Lion's).
    """

    task: str
    rows: int
    parents: tuple[str, ...]
    manner: ExpansionManner = "alike"
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class RoundPlan:
    """What a round will train on. Ids refer to the pool or the seeds; counts are rows.

    `hard` are hard rows, `expansions` the new rows wanted, `drawn` rows taken as they are, whatever their difficulty,
    `replay` the easy rows kept in, `reflected` rows that the teacher criticises and rewrites. `styled` says whose
    answers are rewritten in the task's style: the hard and new rows', all rows', or none's. `asked` and `got` are the
    tasks' shares of the hard and new, or of the drawn rows; `short` the rows of a task that nothing can fill; `notes`
    what the reader ought to know. alpha is the challenge, the share of hard and new rows, asked and got.
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
    styled: Styled = "none"
    pool: int = 0
    pool_hard: int = 0
    unjudged: int = 0
    asked: Mapping[str, float] = field(default_factory=dict)
    got: Mapping[str, float] = field(default_factory=dict)
    short: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def to_write(self) -> int:
        """New rows wanted."""
        return sum(expansion.rows for expansion in self.expansions)


@dataclass(frozen=True)
class Metrics:
    """A student on the holdout. Rates are 0 to 1; intervals are 95 %.

    `win_rate` counts a tie with the teacher's answer as half a win, so a student as good as its teacher has 0.5. Where
    no judge is asked (`judge: reference`) there is no win rate, and `student_score` is the likeness, 1 to 10, of the
    student's answers to the teacher's; `by_task` then has it too. `accuracy` is the share of answers a checker finds
    right, of the `checked` that it can tell of; None where the recipe has no checker. `judge_quality` and `checked` are
    None in files of older versions.
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


@dataclass(frozen=True)
class Request:
    """One question to a teacher or judge. `draw` tells apart several answers wanted to the same body.

    `schema` is the JSON schema of the reply, for those who can be held to one: a GGUF on this machine.
    """

    messages: Prompt
    row: str
    stage: str
    round: int = 0
    draw: int = 0
    temperature: float = 0.0
    max_tokens: int = 1024
    schema: Mapping[str, Any] | None = field(default=None, hash=False)  # a mapping has no hash


@dataclass(frozen=True)
class Answer:
    """What came back. `finish` is the API's finish reason; `hit` says that it came from the store, unpaid.

    `key` is the call's, 64 hexadecimal digits. `why` says why there is no usable text, in the server's own words where
    it gave any; "" where there is one.
    """

    text: str
    finish: str
    hit: bool
    tokens_in: int = 0
    tokens_out: int = 0
    key: str = ""
    why: str = ""

    @property
    def complete(self) -> bool:
        """True when the text is whole: neither cut, nor filtered, nor empty."""
        return self.finish == "stop" and bool(self.text.strip())

    @property
    def refused(self) -> bool:
        """True when the server will not answer the request for what it says: asked again, it would refuse again."""
        return self.finish in ("refused", "content_filter")


ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def type_adapter(kind: type[T]) -> TypeAdapter[T]:
    """The pydantic reader and writer of a record class, made once."""
    if kind not in ADAPTERS:
        ADAPTERS[kind] = TypeAdapter(kind)
    return ADAPTERS[kind]


def to_json(record: Any) -> str:
    """One line of JSON, keys in the order of the class."""
    return type_adapter(type(record)).dump_json(record).decode()


def from_json(kind: type[T], text: str | bytes, where: str = "") -> T:
    """Read a record; TapirError naming `where` if the text is not one."""
    try:
        return type_adapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise TapirError(
            f"not a {kind.__name__}: {key} {first['msg']}".strip(),
            where=where,
            fix="It is damaged, or of another version of the program; `tapir-local redo` makes it again.",
        ) from error


def instruction_of(prompt: Prompt) -> str:
    """The prompt as plain text: the one user turn itself, or a transcript where there are several turns."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt)
