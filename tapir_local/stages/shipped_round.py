"""Choose the round whose student model/ gets, and say which one it has."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from tapir_local.files import read_rows, write_json
from tapir_local.method.judging import rouge_of_score
from tapir_local.method.metrics import win_value
from tapir_local.method.stats import RowValues, correct_p_values, estimate_difference
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Completion, Judgement
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import Work
from tapir_local.stages.rounds import check_answers, last_trained_round, read_holdout

SHIP_CHANCE = 0.05  # a difference whose corrected p is this or more may be chance
CHOSEN = "chosen with `ship --round`"  # why a round is in model/
MODEL_FOLDER = "model"  # in the run's folder


def choose_shipped_round(work: Work) -> tuple[int, str]:
    """The round that `ship` of the recipe names, and the reason in words.

    A round that the user chose stays chosen until the number of rounds or the setting changes.
    With `best`, every earlier round is compared with the last one on the holdout, by the paired test of method/stats.py
    and with Holm's correction for the number of rounds. Of the rounds that are better with a corrected p below 0.05,
    the one with the highest rate is chosen; without one it is the last round. Compared is accuracy if the recipe has a
    checker that can check the answers, otherwise the win rate or the likeness.
    """
    last, known = last_trained_round(work.run, work.recipe), work.run.record().get("shipped", {})
    if known.get("chosen") == choice_conditions(work.recipe):
        return int(known["round"]), CHOSEN
    if work.recipe.ship == "last" or not last:
        return last, "the last round"
    name, values = holdout_values_by_round(work, last)
    pairs = {
        number: estimate_difference({0: values[number]}, {0: values[last]})
        for number in range(last)
        if values[number].keys() & values[last].keys()
    }
    better = {
        number: gap for number, gap in correct_p_values(pairs).items() if gap.mean > 0 and gap.p_holm < SHIP_CHANCE
    }
    if not better:
        return last, f"the last round, as no earlier one has a higher {name} beyond chance"
    best = max(better, key=lambda number: (fmean(values[number].values()), -number))
    gap = better[best]
    return best, (
        f"better than the last: its {name} is {100 * gap.mean:.1f} points above that of round {last}, "
        f"p = {gap.p_holm:.2g} by Holm"
    )


def choice_conditions(recipe: Recipe) -> dict[str, Any]:
    """The settings under which a round that the user chose stays chosen."""
    return {"rounds": recipe.rounds, "ship": recipe.ship}


def holdout_values_by_round(work: Work, last: int) -> tuple[str, dict[int, RowValues]]:
    """(metric, its values by row id for each round up to `last`) of the holdout."""
    held = read_holdout(work)
    right, judged = dict[int, RowValues](), dict[int, RowValues]()
    alike = work.recipe.judge.kind == "reference"
    for number in range(last + 1):
        folder = work.run.round(number)
        answers = {row.id: row for row in read_rows(Completion, folder / "holdout-answers.jsonl")}
        scores = read_rows(Judgement, folder / "holdout-judgements.jsonl")
        rated = {row.id: rouge_of_score(row.student) if alike else win_value(row) for row in scores}
        right[number] = known_values(check_answers(work, held, [answers[row.id] for row in held]))
        judged[number] = known_values(rated)
    return ("accuracy", right) if right[last] else ("likeness" if alike else "win rate", judged)


def known_values(values: Mapping[str, float | bool | None]) -> RowValues:
    """The values of the rows that have one."""
    return {id: float(value) for id, value in values.items() if value is not None}


def record_shipped_round(run: RunDir, recipe: Recipe, number: int, why: str) -> None:
    """Write into run.json which round model/ has, and why."""
    chosen = {"chosen": choice_conditions(recipe)} if why == CHOSEN else {}
    write_json(run.path / "run.json", {**run.record(), "shipped": {"round": number, "why": why, **chosen}})


def read_shipped_round(run: RunDir, rounds: int) -> dict[str, Any] | None:
    """{"round", "why"} of model/; None without model/. Runs of older versions shipped the last of their `rounds`."""
    if not (run.path / MODEL_FOLDER).exists():
        return None
    found = run.record().get("shipped") or {"round": rounds, "why": "the last round"}
    return {name: found[name] for name in ("round", "why")}
