"""A person's verdicts on a run's answers, and how far the judge agrees with them."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tapir_local.errors import TapirError
from tapir_local.files import read_rows
from tapir_local.method.agreement import cohen_kappa, count_pairs, kappa_interval, kappa_word, rows_for_kappa
from tapir_local.method.judge_quality import format_percent, rounded_mean
from tapir_local.method.metrics import wilson_interval
from tapir_local.pipeline.loop import kept_recipe, last_round
from tapir_local.printable import format_count
from tapir_local.records import Completion, Example, Judgement
from tapir_local.run_dir import RunDir
from tapir_local.tables import PlainTable

VERDICTS_FILE = "judge-check.jsonl"  # in the run's folder
Winner = Literal["teacher", "student", "tie"]
Said = Literal["teacher", "student", "tie", "skip"]
WINNERS: tuple[Winner, ...] = ("teacher", "student", "tie")
WIN_VALUES: Mapping[str, float] = {"teacher": 0.0, "student": 1.0, "tie": 0.5}


@dataclass(frozen=True)
class PersonVerdict:
    """What a person says of a held-out row in a round: which answer is better, or `skip`.

    `answers` identifies the two answers: after a `redo` that changed them, the verdict does not count.
    """

    round: int
    row: str
    answers: str
    shown_first: Literal["teacher", "student"]
    said: Said


@dataclass(frozen=True)
class AnswerPair:
    """Two different answers to a held-out row, which is shown first, and which the judge prefers."""

    row: Example
    student: str
    shown_first: Literal["teacher", "student"]
    judged: Winner

    @property
    def answers(self) -> str:
        """Sixteen hexadecimal digits that identify both answers."""
        text = f"{len(self.row.completion)}\0{self.row.completion}\0{self.student}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class JudgeCheck:
    """The pairs of a round, in the order in which a person sees them."""

    run: RunDir
    number: int
    pairs: tuple[AnswerPair, ...]


def open_judge_check(run: RunDir, number: int | None) -> JudgeCheck:
    """The judged pairs of a round's holdout, by default of the last judged round, in an order drawn by the random seed.

    Rows whose two answers are equal are left out: they need no judge. TapirError if nothing was judged in pairs.
    """
    recipe, file = kept_recipe(run), "holdout-judgements.jsonl"
    if recipe.judge.kind == "reference":
        raise TapirError(
            "`judge: reference` measures likeness to the teacher's answer; there is no judge to check",
            where=str(run.path),
            fix="Use a run with a judge that reads answers.",
        )
    there = [n for n in range(last_round(run) + 1) if (run.round(n) / file).exists()]
    if not there or number not in (None, *there):
        rounds = ", ".join(map(str, there)) or "none"
        raise TapirError(
            f"run {run.name!r} has no judged holdout{'' if number is None else f' of round {number}'}",
            where=str(run.path),
            fix=f"Rounds that have one: {rounds}.",
        )
    chosen = there[-1] if number is None else number
    rng = random.Random(f"{recipe.random_seed}-judge-check-{chosen}")
    pairs = judged_pairs(run.path / "holdout.jsonl", run.round(chosen), rng)
    return JudgeCheck(run, chosen, tuple(rng.sample(pairs, len(pairs))))


def judged_pairs(holdout: Path, folder: Path, rng: random.Random) -> list[AnswerPair]:
    """The judged pairs of different answers in a round's folder."""
    texts = {answer.id: answer.text for answer in read_rows(Completion, folder / "holdout-answers.jsonl")}
    judged = {row.id: row for row in read_rows(Judgement, folder / "holdout-judgements.jsonl")}
    found = []
    for row in read_rows(Example, holdout):
        winner, first = judged_winner(judged.get(row.id)), rng.choice(("teacher", "student"))
        if winner and texts[row.id].strip() != row.completion.strip():
            found.append(AnswerPair(row, texts[row.id], "teacher" if first == "teacher" else "student", winner))
    return found


def judged_winner(found: Judgement | None) -> Winner | None:
    """Whose answer the judge scores higher; None if it is not judged."""
    if found is None or found.teacher is None or found.student is None:
        return None
    return "tie" if found.teacher == found.student else "teacher" if found.teacher > found.student else "student"


def read_verdicts(check: JudgeCheck) -> dict[str, PersonVerdict]:
    """The verdicts on the round's present answers, by row id; the newest counts."""
    answers = {pair.row.id: pair.answers for pair in check.pairs}
    return {
        verdict.row: verdict
        for verdict in all_verdicts(check.run)
        if verdict.round == check.number and answers.get(verdict.row) == verdict.answers
    }


def all_verdicts(run: RunDir) -> list[PersonVerdict]:
    """Every verdict in a run's folder."""
    path = run.path / VERDICTS_FILE
    return read_rows(PersonVerdict, path) if path.exists() else []


def check_report(check: JudgeCheck, wanted: int) -> dict[str, Any]:
    """What `tapir-local judge-check --json` prints: how far the judge agrees with the person's verdicts."""
    verdicts = read_verdicts(check)
    judged = {pair.row.id: pair.judged for pair in check.pairs}
    pairs = [(verdict.said, judged[row]) for row, verdict in verdicts.items() if verdict.said != "skip"]
    counts = count_pairs(pairs, WINNERS)
    kappa, interval = cohen_kappa(counts), kappa_interval(counts)
    same = [one == other for one, other in pairs]
    return {
        "run": check.run.name,
        "round": check.number,
        "rows": len(pairs),
        "skipped": len(verdicts) - len(pairs),
        "left": max(0, min(wanted, len(check.pairs)) - len(verdicts)),
        "agreement": rounded_mean(same),
        "agreement_interval": wilson_interval(same),
        "kappa": kappa,
        "kappa_interval": interval,
        "rows_needed": rows_for_kappa(interval, len(pairs)),
        "win_rate": {
            "person": rounded_mean([WIN_VALUES[said] for said, _ in pairs]),
            "judge": rounded_mean([WIN_VALUES[judge] for _, judge in pairs]),
        },
        "counts": {
            said: {judge: int(counts[at, column]) for column, judge in enumerate(WINNERS)}
            for at, said in enumerate(WINNERS)
        },
        "meaning": agreement_meaning(len(pairs), rounded_mean(same), kappa, interval),
    }


def agreement_meaning(rows: int, share: float | None, kappa: float | None, interval: tuple[float, float] | None) -> str:
    """The agreement in words."""
    if share is None:
        return "there are no verdicts yet"
    said = f"the judge agrees with you on {format_percent(share)} of {format_count(rows, 'row')}"
    if kappa is None or interval is None:
        return f"{said}; kappa is undefined while all verdicts are the same"
    said += f"; beyond chance the agreement is {kappa_word(kappa)} (kappa {kappa:.2f}, "
    said += f"{interval[0]:.2f} to {interval[1]:.2f})"
    return said + ("; it may be no better than chance" if interval[0] <= 0 else "")


def person_report(run: RunDir, number: int) -> dict[str, Any] | None:
    """The report of a round, for `show`; None without verdicts."""
    if not any(verdict.round == number for verdict in all_verdicts(run)):
        return None
    found = check_report(open_judge_check(run, number), 0)
    return found if found["rows"] else None


def check_table(found: Mapping[str, Any]) -> PlainTable:
    """The counts of verdicts of the person and the judge, and what they mean."""
    table = PlainTable(f"run {found['run']}, round {found['round']}: whose answer is better")
    table.add_column("you")
    table.add_numbers(*(f"judge: {winner}" for winner in WINNERS))
    for said, counts in found["counts"].items():
        table.add_row(said, *(f"{counts[winner]:,}" for winner in WINNERS))
    table.caption = "\n".join(check_lines(found))
    return table


def check_lines(found: Mapping[str, Any]) -> Sequence[str]:
    """What the verdicts mean, and how many more are needed."""
    lines = [f"{found['meaning'][:1].upper()}{found['meaning'][1:]}."]
    if found["rows"]:
        rates = (format_percent(found["win_rate"][who]) for who in ("person", "judge"))
        lines.append("The student's win rate on these rows: {} by you, {} by the judge.".format(*rates))
    if found["rows_needed"] and found["rows_needed"] > found["rows"]:
        lines.append(f"For a kappa of +-0.1 you need about {format_count(found['rows_needed'], 'row')}.")
    return lines
