"""Read the state of a run from its files: stages, calls, and a round's plan, metrics and answers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import orjson

from tapir_local.errors import TapirError
from tapir_local.files import read_json_object, read_record, read_rows
from tapir_local.method.judge_quality import measure_judge
from tapir_local.pipeline.labeling import warn_low_agreement
from tapir_local.pipeline.loop import Step, changed_outputs, kept_recipe, last_round, list_steps, redo_command
from tapir_local.records import Completion, Example, Judgement, RoundPlan, instruction_of, to_json
from tapir_local.run_dir import RunDir, is_locked
from tapir_local.store.queries import count_paid_and_hits
from tapir_local.unusable import read_unusable

SAMPLE_ANSWERS = 6


def run_status(run: RunDir) -> dict[str, Any]:
    """What `tapir-local status --json` prints: the stages with their seconds, the metrics of each round, calls."""
    record, steps = run.record(), list_steps(run, max(kept_recipe(run).rounds, last_round(run)))
    taken = record.get("stages", {})
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
        "state": run_state(run, steps, str(record.get("status", ""))),
        "prepare": [stage_status(step, taken) for step in steps[:-1] if step.number is None],
        "rounds": rounds,
        "end": [stage_status(steps[-1], taken)],
        "calls": call_counts(run, taken),
        "unusable": unusable_counts(run),
        "warnings": [*run_warnings(run), *changed_output_warnings(run, steps)],
    }


def run_state(run: RunDir, steps: Sequence[Step], recorded: str) -> str:
    """`done`, `running, in STEP`, or where and why the run stopped, as `recorded` in run.json.

    A process that was killed has recorded nothing: whether a run is worked on is known from its lock.
    """
    left = next((step.name for step in steps if not step.done), "")
    if not left:
        return "done"
    if is_locked(run):
        return f"running, in {left}"
    if recorded.startswith("stopped"):
        return recorded
    if recorded == "running":
        return f"stopped in {left}: its process ended without an error, as by kill -9"
    return f"stopped before {left}"


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
    """Whether a stage is done, its seconds, calls and closing phrase; the latter are None until it is done."""
    record = taken.get(step.name, {}) if step.done else {}
    return {
        "name": step.stage.name,
        "done": step.done,
        **{key: record.get(key) for key in ("seconds", "paid", "hits", "note")},
    }


def read_metrics(run: RunDir, number: int) -> dict[str, Any] | None:
    """The metrics of a round; None until they exist."""
    step = next(step for step in list_steps(run, number) if (step.number, step.stage.name) == (number, "evaluate"))
    fix = f"Make it again: {redo_command(run.name, step)}"
    return read_json_object(step.output, fix) if step.output.exists() else None


def round_report(run: RunDir, number: int | None) -> dict[str, Any]:
    """What `tapir-local show --json` prints: plan, judge, metrics and sample answers of a round.

    Without a number it is the last round that has metrics. TapirError if the round has not begun.
    """
    if number is None:
        number = max((n for n in range(last_round(run) + 1) if read_metrics(run, n)), default=last_round(run))
    if not run.round(number).is_dir():
        last = last_round(run)
        raise TapirError(
            f"run {run.name!r} has no round {number}", where=str(run.path), fix=f"Rounds 0 to {last} have begun."
        )
    plan = run.round(number) / "plan.json"
    return {
        "run": run.name,
        "round": number,
        "plan": orjson.loads(to_json(read_record(RoundPlan, plan))) if plan.exists() else None,
        "judge": round_judge_quality(run, number),
        "metrics": read_metrics(run, number),
        "unusable": {
            step: kinds for step, kinds in unusable_counts(run).items() if step.startswith(f"round-{number:02d}/")
        },
        "answers": sample_answers(run, number),
    }


def read_agreement(run: RunDir) -> dict[str, Any] | None:
    """How far the classifier of a run agrees with the teacher; None if there is no classifier."""
    path = run.path / "classifier" / "agreement.json"
    fix = f"Make it again: tapir-local redo {run.name} --from classify"
    return read_json_object(path, fix) if path.exists() else None


def run_warnings(run: RunDir) -> list[str]:
    """The reasons to doubt the results of a run."""
    found, least = read_agreement(run), kept_recipe(run).classifier.min_agreement
    return [warn_low_agreement(found["agreement"], least)] if found and found["agreement"] < least else []


def round_judge_quality(run: RunDir, number: int) -> dict[str, dict[str, Any]]:
    """How far the judge's scores of pool and holdout in a round can be trusted, as far as they exist."""
    files = {"pool": "judgements.jsonl", "holdout": "holdout-judgements.jsonl"}
    paths = {name: path for name, file in files.items() if (path := run.round(number) / file).exists()}
    found = {name: read_rows(Judgement, path) for name, path in paths.items()}
    return {name: asdict(measure_judge(rows)) for name, rows in found.items() if rows}


def sample_answers(run: RunDir, number: int) -> list[dict[str, Any]]:
    """Some answers of a round to the holdout, with the judge's scores, from different tasks."""
    path, judged = run.round(number) / "holdout-answers.jsonl", run.round(number) / "holdout-judgements.jsonl"
    if not path.exists():
        return []
    texts = {row.id: row for row in read_rows(Completion, path)}
    scores = {row.id: row for row in read_rows(Judgement, judged)} if judged.exists() else {}
    rows = sorted(read_rows(Example, run.path / "holdout.jsonl"), key=lambda row: row.task)
    chosen = rows[:: max(1, len(rows) // SAMPLE_ANSWERS)][:SAMPLE_ANSWERS]
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
    ]
