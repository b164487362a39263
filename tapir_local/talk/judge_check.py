"""Ask a person which of two answers is better, without saying whose they are."""

from collections.abc import Callable, Mapping

from tapir_local.files import write_rows
from tapir_local.records import instruction_of
from tapir_local.report.person import (
    VERDICTS_FILE,
    AnswerPair,
    JudgeCheck,
    PersonVerdict,
    Said,
    all_verdicts,
    read_verdicts,
)
from tapir_local.talk.conversation import Write

QUESTION = "Which answer is better? 1, 2, t (tie), s (skip) or q (quit):"
WORDS: Mapping[str, str] = {"1": "1", "2": "2", "t": "tie", "tie": "tie", "s": "skip", "skip": "skip"}
QUIT_WORDS = ("q", "quit")


def ask_verdicts(check: JudgeCheck, wanted: int, read: Callable[[], str | None], write: Write) -> None:
    """Show pairs until `wanted` have a verdict, the input ends or the person quits; each verdict is kept at once."""
    pairs, known = check.pairs[:wanted], read_verdicts(check)
    for number, pair in enumerate(pairs, 1):
        if pair.row.id in known:
            continue
        write(describe_pair(pair, f"{number} of {len(pairs)}"))
        said = read_verdict(read, write)
        if said is None:
            return
        keep_verdict(check, pair, said)


def describe_pair(pair: AnswerPair, place: str) -> str:
    """An instruction and its two answers, in the order in which they are shown."""
    answers = (pair.row.completion, pair.student)
    first, second = answers if pair.shown_first == "teacher" else answers[::-1]
    asked = f"\n=== {place}: instruction\n{instruction_of(pair.row.prompt)}"
    return f"{asked}\n--- answer 1\n{first}\n--- answer 2\n{second}\n---"


def read_verdict(read: Callable[[], str | None], write: Write) -> str | None:
    """`1`, `2`, `tie` or `skip`; None at the end of the input or if the person quits."""
    write(QUESTION)
    while (line := read()) is not None:
        word = line.strip().lower()
        if word in QUIT_WORDS:
            return None
        if word in WORDS:
            return WORDS[word]
        write(f"{line.strip()!r} is no verdict. {QUESTION}")
    return None


def keep_verdict(check: JudgeCheck, pair: AnswerPair, said: str) -> None:
    """Add a verdict to the run's file, atomically."""
    second: Said = "student" if pair.shown_first == "teacher" else "teacher"
    meant: Mapping[str, Said] = {"1": pair.shown_first, "2": second, "tie": "tie", "skip": "skip"}
    verdict = PersonVerdict(check.number, pair.row.id, pair.answers, pair.shown_first, meant[said])
    write_rows(check.run.path / VERDICTS_FILE, [*all_verdicts(check.run), verdict])
