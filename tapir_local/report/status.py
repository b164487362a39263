"""Read the state of a run from its files: stages, calls, and a round's plan, metrics and answers."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import orjson

from tapir_local.errors import TapirError
from tapir_local.files import read_json_object, read_record, read_rows
from tapir_local.method.judge_quality import AnswersRight, check_both_answers, measure_judge
from tapir_local.pipeline.loop import Step, begun_steps, changed_outputs, kept_recipe, last_round
from tapir_local.records import Completion, Example, Judgement, RoundPlan, instruction_of, to_json
from tapir_local.report.person import person_report
from tapir_local.run_dir import UNTRAINED_ROUND, RunDir, list_runs, lock_holder, read_progress
from tapir_local.stages.labeling import warn_low_agreement
from tapir_local.stages.run_rows import rows_before_round
from tapir_local.stages.shipped_round import read_shipped_round
from tapir_local.store.queries import count_paid_and_hits
from tapir_local.unusable import read_unusable


@dataclass(frozen=True)
class AnswerChoice:
    """Which answers to the holdout to show: of one task, the wrong ones only, and at most so many."""

    task: str | None = None
    wrong: bool = False
    most: int = 6


SAMPLE = AnswerChoice()
SHORT_STATE = 100  # characters


def run_status(run: RunDir) -> dict[str, Any]:
    """What `tapir-local status --json` prints: the stages with their seconds, the metrics of each round, calls."""
    steps = begun_steps(run, kept_recipe(run).all_rounds)
    taken = run.record().get("stages", {})
    rounds = [
        {
            "number": number,
            "stages": [stage_status(step, taken) for step in steps if step.number == number],
            "metrics": read_metrics(run, number),
        }
        for number in sorted({step.number for step in steps if step.number is not None})
    ]
    return {
        "run": run.name,
        "folder": str(run.path),
        "state": describe_state(run, steps),
        "now": read_progress(run),
        "stages_done": sum(step.done for step in steps),
        "stages": len(steps),
        "prepare": [stage_status(step, taken) for step in steps[:-1] if step.number is None],
        "untrained": read_metrics(run, UNTRAINED_ROUND),
        "shipped": read_shipped_round(run, kept_recipe(run).rounds),
        "rounds": rounds,
        "end": [stage_status(steps[-1], taken)],
        "calls": call_counts(run, taken),
        "unusable": unusable_counts(run),
        "warnings": [*run_warnings(run), *changed_output_warnings(run, steps)],
    }


def describe_state(run: RunDir, steps: Sequence[Step]) -> str:
    """Whether a run is done, running or stopped, by its outputs and its lock: its record may be of an earlier state."""
    left, holder = [step for step in steps if not step.done], lock_holder(run)
    if holder:
        return f"running ({holder})" + (f", in {left[0].name}" if left else "")
    recorded = str(run.record().get("status", ""))
    if not left:
        return "done"
    if recorded == "running":
        return f"stopped in {left[0].name}: its process ended without an error, as by kill -9"
    return recorded if recorded.startswith("stopped") else f"not finished, {left[0].name} is next"


def read_run_state(run: RunDir) -> str:
    """The state of a run in words; of an unreadable one, why it cannot be read."""
    return str(run_summary(run)["state"])


def short_state(state: str) -> str:
    """A run's state in SHORT_STATE characters at most, for lists: it may end with a long error."""
    return shorten(state, SHORT_STATE, placeholder=" …")


def list_run_states(cache: Path) -> list[dict[str, Any]]:
    """What `tapir-local runs --json` prints: state, rounds and best round of each run, the newest first."""
    return sorted((run_summary(run) for run in list_runs(cache)), key=lambda row: str(row["updated"]), reverse=True)


def run_summary(run: RunDir) -> dict[str, Any]:
    """State, rounds, best round, calls, size and time of a run; of an unreadable one the state says why."""
    try:
        record, damage = run.record(), ""
    except TapirError as error:
        record, damage = {}, f"run.json: {error.what}"
    found = {
        "run": run.name,
        "rounds": None,
        "best": None,
        "calls": sum(stage.get("paid", 0) for stage in record.get("stages", {}).values()),
        "bytes": disk_bytes(run.path),
        "updated": record.get("updated", record.get("started")),
    }
    if damage:
        return {**found, "state": f"unreadable: {damage}"}
    try:
        rounds = kept_recipe(run).all_rounds
    except TapirError as error:
        return {**found, "state": f"unreadable: {error.what}"}
    steps = begun_steps(run, rounds)
    metrics = [row for n in range(last_round(run) + 1) if (row := read_metrics(run, n))]
    found |= {"rounds": {"done": max((row["round"] for row in metrics), default=None), "planned": rounds}}
    return {**found, "state": describe_state(run, steps), "best": best_of_rounds(metrics)}


def best_of_rounds(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The round with the highest accuracy or, without a checker, win rate or score; None before the first metrics."""
    for name in ("accuracy", "win_rate", "student_score"):
        values = [(row[name], row["round"]) for row in metrics if row.get(name) is not None]
        if values:
            value, number = max(values, key=lambda pair: (pair[0], -pair[1]))
            return {"round": number, "metric": name, "value": value}
    return None


def disk_bytes(folder: Path) -> int:
    """The size of the files in a folder; files with several names, such as linked weights, count once."""
    sizes = {}
    for path in folder.rglob("*"):
        with suppress(OSError):  # a running stage removes its partial files
            found = path.lstat()
            sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def changed_output_warnings(run: RunDir, steps: Sequence[Step]) -> list[str]:
    """A sentence for each output that is not what its stage wrote."""
    return [f"the output of {step.name} was changed: {change}" for step, change in changed_outputs(run, steps[:-1])]


def unusable_counts(run: RunDir) -> dict[str, dict[str, int]]:
    """The number of rows that each step left out, by reason."""
    found: dict[str, dict[str, int]] = {}
    for row in read_unusable(run):
        kinds = found.setdefault(row.step, {})
        kinds[row.kind] = kinds.get(row.kind, 0) + 1
    return found


def unusable_report(run: RunDir) -> dict[str, Any]:
    """What `tapir-local show --unusable --json` prints: the rows left out, and their counts by step and kind."""
    return {"run": run.name, "by_step": unusable_counts(run), "rows": [asdict(row) for row in read_unusable(run)]}


def call_counts(run: RunDir, taken: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The calls that this run paid for and its hits: from the store, or for a replay from the records of its stages.

    What the store has under the name of a replayed run belongs to the run that it repeats.
    """
    recorded = {kind: sum(stage.get(kind, 0) for stage in taken.values()) for kind in ("paid", "hits")}
    replayed = any(stage.get("replay") for stage in taken.values())
    found = None if replayed else count_paid_and_hits(run.cache / "teacher.db", run.name)
    return found if found and any(found.values()) else recorded


def stage_status(step: Step, taken: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether a stage is done, its seconds, end, calls and closing phrase; the latter are None until it is done."""
    record = taken.get(step.name, {}) if step.done else {}
    return {
        "name": step.stage.name,
        "done": step.done,
        **{key: record.get(key) for key in ("seconds", "finished", "paid", "hits", "note")},
    }


def read_metrics(run: RunDir, number: int) -> dict[str, Any] | None:
    """The metrics of a round, or of the untrained student; None until they exist."""
    path, where = run.round(number) / "metrics.json", "" if number == UNTRAINED_ROUND else f" --round {number}"
    fix = f"Make it again: tapir-local redo {run.name}{where} --from evaluate"
    return read_json_object(path, fix) if path.exists() else None


def round_report(run: RunDir, number: int | None, choice: AnswerChoice = SAMPLE) -> dict[str, Any]:
    """What `tapir-local show --json` prints: plan, judge, metrics and some answers of a round.

    Without a number it is the last round that has metrics. TapirError if the round has not begun, or no held-out row
    has the task of the choice.
    """
    if number is None:
        number = max((n for n in range(last_round(run) + 1) if read_metrics(run, n)), default=last_round(run))
    if not run.round(number).is_dir():
        last = last_round(run)
        raise TapirError(
            f"run {run.name!r} has no round {number}", where=str(run.path), fix=f"Rounds 0 to {last} have begun."
        )
    plan, before = run.round(number) / "plan.json", read_metrics(run, number - 1)
    answers, matching = chosen_answers(run, number, choice)
    return {
        "run": run.name,
        "round": number,
        "plan": orjson.loads(to_json(read_record(RoundPlan, plan))) if plan.exists() else None,
        "judge": round_judge_quality(run, number),
        "judge_check": person_report(run, number),
        "metrics": read_metrics(run, number),
        "before": before and {"round": before["round"], "by_task": before["by_task"]},
        "unusable": {
            step: kinds for step, kinds in unusable_counts(run).items() if step.startswith(f"round-{number:02d}/")
        },
        "answers": answers,
        "matching": matching,
    }


def read_agreement(run: RunDir) -> dict[str, Any] | None:
    """How far the classifier of a run agrees with the teacher; None if there is no classifier."""
    path = run.path / "classifier" / "agreement.json"
    fix = f"Make it again: tapir-local redo {run.name} --from classify"
    return read_json_object(path, fix) if path.exists() else None


def run_warnings(run: RunDir) -> list[str]:
    """The reasons to doubt the results of a run: the classifier, and the judge of the last evaluated round."""
    found, least = read_agreement(run), kept_recipe(run).classifier.min_agreement
    warnings = [warn_low_agreement(found["agreement"], least)] if found and found["agreement"] < least else []
    number = max((n for n in range(last_round(run) + 1) if read_metrics(run, n)), default=None)
    quality = (read_metrics(run, number) or {}).get("judge_quality") if number is not None else None
    return [*warnings, *(f"round {number}, holdout: {note}" for note in (quality or {}).get("notes", ()))]


def round_judge_quality(run: RunDir, number: int) -> dict[str, dict[str, Any]]:
    """How far the judge's scores of pool and holdout in a round can be trusted, as far as they exist.

    That of the holdout is the one in metrics.json, if it has one of this version.
    """
    files = {"pool": "judgements.jsonl", "holdout": "holdout-judgements.jsonl"}
    paths = {name: path for name, file in files.items() if (path := run.round(number) / file).exists()}
    rows = {name: read_rows(Judgement, path) for name, path in paths.items()}
    found = {name: asdict(measure_judge(some, round_checks(run, number, name))) for name, some in rows.items() if some}
    kept = (read_metrics(run, number) or {}).get("judge_quality") or {}
    return found | ({"holdout": kept} if kept.get("health") and "holdout" in found else {})


def round_checks(run: RunDir, number: int, name: str) -> dict[str, AnswersRight]:
    """What the recipe's checker says of the teacher's and the student's answers to `pool` or `holdout`, by row id."""
    from tapir_local.stages.backends import recipe_checker

    answers = run.round(number) / ("answers.jsonl" if name == "pool" else "holdout-answers.jsonl")
    check = recipe_checker(kept_recipe(run))
    if check is None or not answers.exists():
        return {}
    known = rows_before_round(run, number) if name == "pool" else read_rows(Example, run.path / "holdout.jsonl")
    rows = {row.id: row for row in known}
    completions = [found for found in read_rows(Completion, answers) if found.id in rows]
    return check_both_answers(check, [rows[found.id] for found in completions], completions)


def chosen_answers(run: RunDir, number: int, choice: AnswerChoice) -> tuple[list[dict[str, Any]], int]:
    """(answers of a round to the holdout with the judge's scores, from different tasks; how many match the choice)."""
    path, judged = run.round(number) / "holdout-answers.jsonl", run.round(number) / "holdout-judgements.jsonl"
    if not path.exists():
        return [], 0
    texts = {row.id: row for row in read_rows(Completion, path)}
    scores = {row.id: row for row in read_rows(Judgement, judged)} if judged.exists() else {}
    rows = sorted(read_rows(Example, run.path / "holdout.jsonl"), key=lambda row: row.task)
    if choice.task is not None:
        tasks = sorted({row.task for row in rows})
        if choice.task not in tasks:
            fix = f"Tasks of the holdout: {', '.join(tasks)}."
            raise TapirError(f"no held-out row has the task {choice.task!r}", where=str(run.path), fix=fix)
        rows = [row for row in rows if row.task == choice.task]
    if choice.wrong:
        right = round_checks(run, number, "holdout")
        rows = [row for row in rows if is_wrong(right.get(row.id, (None, None))[1], scores.get(row.id))]
    chosen = rows[:: max(1, len(rows) // choice.most)][: choice.most]
    return [
        {
            "id": row.id,
            "task": row.task,
            "instruction": instruction_of(row.prompt),
            "teacher": row.completion,
            "student": texts[row.id].text,
            "scores": [scores[row.id].student, scores[row.id].teacher] if row.id in scores else None,
        }
        for row in chosen
    ], len(rows)


def is_wrong(right: bool | None, scores: Judgement | None) -> bool:
    """Whether the checker rejects an answer or, if it cannot decide, the judge scores it below the teacher's."""
    if right is not None:
        return not right
    return bool(
        scores and scores.student is not None and scores.teacher is not None and scores.student < scores.teacher
    )
