"""Section 7 of a report: every answer to the holdout, as data for the browser of answers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tapir_local.page.parts import Browser, Paragraph, Section, clip_text, short_round_name
from tapir_local.page.summary import RunView
from tapir_local.printable import printable
from tapir_local.records import Completion, Example, Judgement, instruction_of
from tapir_local.report.run_results import EvaluatedRound, RunResults, read_holdout_records
from tapir_local.run_dir import RunDir

# The longest text of the browser, in characters, and the first one with which all texts fit into MAX_CHARACTERS.
TEXT_LIMITS = (20_000, 5_000, 2_000, 800)
MAX_CHARACTERS = 6_000_000
RESULTS = (
    ("", "all results"),
    ("fixed", "fixed"),
    ("broken", "broken"),
    ("wrong", "still wrong"),
    ("right", "right from the start"),
    ("open", "not decided"),
)


@dataclass(frozen=True)
class AnsweredRow:
    """A row of the holdout: its answers, scores (student, teacher) and results in each evaluated round.

    A result is True for a right answer; without a checker, for one that is judged at least as good as the teacher's.
    """

    example: Example
    answers: Sequence[str]
    scores: Sequence[tuple[float, float] | None]
    results: Sequence[bool | None]

    @property
    def change(self) -> str:
        """`fixed`, `broken`, `wrong` or `right`, from the first round to the last; `open` if one is not decided."""
        first, last = self.results[0], self.results[-1]
        if first is None or last is None:
            return "open"
        return ("right" if first else "fixed") if last else ("broken" if first else "wrong")


def answers_section(view: RunView) -> Section:
    """Section 7; left out until a round is evaluated."""
    question, run, results = "What does it really say?", view.run, view.results
    if results is None:
        return Section("answers", "Answers", question)
    rounds, rows = evaluated_rounds(results), read_answered_rows(run, results)
    names = [short_round_name(found.number) for found in rounds]
    present = {row.change for row in rows}
    shown = [(key, name) for key, name in RESULTS if not key or key in present] if present != {"open"} else []
    browser = Browser(
        script_json(browser_data(rows, names, view.prefix)), sorted({row.example.task for row in rows}), shown
    )
    return Section("answers", "Answers", question, (Paragraph(explain_results(rounds)), browser))


def explain_results(rounds: Sequence[EvaluatedRound]) -> str:
    """What the marks of the answers mean."""
    if rounds[-1].right:
        marks = "✓: the checker accepts the answer; ✗: it does not. "
    elif rounds[-1].wins:
        marks = "✓: judged at least as good as the teacher's answer; ✗: worse. "
    else:
        marks = ""
    change = "Fixed and broken compare the first evaluation with the last. " if marks else ""
    return f"{marks}{change}Scores are student : teacher. A link to a row ends in #ID, such as #seed-00017."


def evaluated_rounds(results: RunResults) -> list[EvaluatedRound]:
    """The untrained student, if it is evaluated, and the rounds."""
    return [*([results.untrained] if results.untrained else []), *results.rounds]


def read_answered_rows(run: RunDir, results: RunResults) -> list[AnsweredRow]:
    """Every row of the holdout with its answers in all evaluated rounds."""
    holdout, rounds = results.holdout, evaluated_rounds(results)
    texts = [
        read_holdout_records(run, found.number, Completion, "holdout-answer", "holdout-answers.jsonl", holdout)
        for found in rounds
    ]
    judged = [
        read_holdout_records(run, found.number, Judgement, "holdout-judge", "holdout-judgements.jsonl", holdout)
        for found in rounds
    ]
    return [
        AnsweredRow(
            row,
            [answers[row.id].text for answers in texts],
            [score_pair(scores[row.id]) for scores in judged],
            [decide_result(found, row.id) for found in rounds],
        )
        for row in holdout
    ]


def score_pair(judgement: Judgement) -> tuple[float, float] | None:
    """(student, teacher) of a judgement."""
    if judgement.student is None or judgement.teacher is None:
        return None
    return judgement.student, judgement.teacher


def decide_result(found: EvaluatedRound, id: str) -> bool | None:
    """Whether an answer is right, or else as good as the teacher's; None if nobody decided."""
    if found.right:
        return found.right[id] == 1 if id in found.right else None
    return found.wins[id] >= 0.5 if id in found.wins else None


def browser_data(rows: Sequence[AnsweredRow], names: Sequence[str], prefix: str) -> dict[str, Any]:
    """The data of the browser: column names, and for each row a list of values, which page.js reads by position."""
    texts = [
        text for row in rows for text in (instruction_of(row.example.prompt), row.example.completion, *row.answers)
    ]
    limit = text_limit(texts)
    return {
        "prefix": prefix,
        "rounds": list(names),
        "rows": [
            [
                row.example.id,
                printable(row.example.task),
                shown_text(instruction_of(row.example.prompt), limit),
                shown_text(row.example.completion, limit),
                [shown_text(text, limit) for text in row.answers],
                [pair and [round(score, 2) for score in pair] for pair in row.scores],
                [None if result is None else int(result) for result in row.results],
                row.change,
            ]
            for row in rows
        ],
    }


def text_limit(texts: Sequence[str]) -> int:
    """The longest of TEXT_LIMITS with which all texts together are not too long for a page."""
    for limit in TEXT_LIMITS:
        if sum(min(len(text), limit) for text in texts) <= MAX_CHARACTERS:
            return limit
    return TEXT_LIMITS[-1]


def shown_text(text: str, limit: int) -> str:
    """A text as the page shows it: unsafe characters visible, and not longer than `limit`."""
    return printable(clip_text(text, limit))


def script_json(value: Mapping[str, Any]) -> str:
    r"""JSON that no text in it can end early or turn into markup: `<`, `>`, `&`, U+2028 and U+2029 as `\u....`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
