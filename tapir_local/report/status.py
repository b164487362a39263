"""What a run's files say: how far it is, and a round's plan, metrics and answers."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import orjson

from tapir_local.errors import TapirError
from tapir_local.files import read_record, read_rows
from tapir_local.method.judge_quality import measure_judge
from tapir_local.pipeline.loop import Step, kept_recipe, rounds_begun, sequence
from tapir_local.pipeline.prepare import too_low
from tapir_local.records import Completion, Example, Judgement, RoundPlan, instruction_of, to_json
from tapir_local.run_dir import RunDir
from tapir_local.store.schema import usage
from tapir_local.unusable import read_unusable

SAMPLES = 6


def status_of(run: RunDir) -> dict[str, Any]:
    """What `tapir-local status --json` prints: stages done and their seconds, metrics of each round, calls."""
    record, steps = run.record(), sequence(run, max(kept_recipe(run).rounds, rounds_begun(run)))
    taken = record.get("stages", {})
    rounds = [
        {
            "number": number,
            "stages": [stage_status(step, taken) for step in steps if step.number == number],
            "metrics": metrics_of(run, number),
        }
        for number in sorted({step.number for step in steps if step.number is not None})
    ]
    return {
        "run": run.name,
        "state": "done" if all(step.done for step in steps) else record.get("status", "unknown"),
        "prepare": [stage_status(step, taken) for step in steps[:-1] if step.number is None],
        "rounds": rounds,
        "end": [stage_status(steps[-1], taken)],
        "calls": calls_of(run, taken),
        "unusable": unusable_counts(run),
        "warnings": warnings_of(run),
    }


def unusable_counts(run: RunDir) -> dict[str, dict[str, int]]:
    """The rows that each step left out, by the kind of reason."""
    found: dict[str, dict[str, int]] = {}
    for row in read_unusable(run):
        kinds = found.setdefault(row.step, {})
        kinds[row.kind] = kinds.get(row.kind, 0) + 1
    return found


def unusable_of(run: RunDir) -> dict[str, Any]:
    """What `tapir-local show --unusable --json` prints: the rows left out, and their counts by step and kind."""
    return {"run": run.name, "by_step": unusable_counts(run), "rows": [asdict(row) for row in read_unusable(run)]}


def calls_of(run: RunDir, taken: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Calls paid by this run and hits, as the store has them; of a replay as its stages told.

    What the store knows of a replayed run's name is what the run that it repeats paid for, here or elsewhere.
    """
    told = {kind: sum(stage.get(kind, 0) for stage in taken.values()) for kind in ("paid", "hits")}
    replayed = any(stage.get("replay") for stage in taken.values())
    found = None if replayed else usage(run.cache / "teacher.db", run.name)
    return found if found and any(found.values()) else told


def stage_status(step: Step, taken: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of one stage; what it took is None until it is done."""
    told = taken.get(step.name, {}) if step.done else {}
    return {
        "name": step.stage.name,
        "done": step.done,
        **{key: told.get(key) for key in ("seconds", "paid", "hits", "note")},
    }


def metrics_of(run: RunDir, number: int) -> dict[str, Any] | None:
    """A round's metrics, None until they are there."""
    path = run.round(number) / "metrics.json"
    return dict(orjson.loads(path.read_bytes())) if path.exists() else None


def round_of(run: RunDir, number: int | None) -> dict[str, Any]:
    """What `tapir-local show --json` prints: a round's plan, judge, metrics and some of its student's answers.

    Without a number the last round that has metrics; TapirError where the round has not begun.
    """
    if number is None:
        number = max((n for n in range(rounds_begun(run) + 1) if metrics_of(run, n)), default=rounds_begun(run))
    if not run.round(number).is_dir():
        last = rounds_begun(run)
        raise TapirError(
            f"run {run.name!r} has no round {number}", where=str(run.path), fix=f"Rounds 0 to {last} have begun."
        )
    plan = run.round(number) / "plan.json"
    return {
        "run": run.name,
        "round": number,
        "plan": orjson.loads(to_json(read_record(RoundPlan, plan))) if plan.exists() else None,
        "judge": judge_of(run, number),
        "metrics": metrics_of(run, number),
        "unusable": {
            step: kinds for step, kinds in unusable_counts(run).items() if step.startswith(f"round-{number:02d}/")
        },
        "answers": answers_of(run, number),
    }


def agreement_of(run: RunDir) -> dict[str, Any] | None:
    """How far the run's classifier agrees with its teacher; None where there is none."""
    path = run.path / "classifier" / "agreement.json"
    return dict(orjson.loads(path.read_bytes())) if path.exists() else None


def warnings_of(run: RunDir) -> list[str]:
    """What makes a run's results doubtful."""
    found, least = agreement_of(run), kept_recipe(run).classifier.min_agreement
    return [too_low(found["agreement"], least)] if found and found["agreement"] < least else []


def judge_of(run: RunDir, number: int) -> dict[str, dict[str, Any]]:
    """How far the judge's scores of a round's pool and holdout can be trusted, as far as they are there."""
    files = {"pool": "judgements.jsonl", "holdout": "holdout-judgements.jsonl"}
    paths = {name: path for name, file in files.items() if (path := run.round(number) / file).exists()}
    found = {name: read_rows(Judgement, path) for name, path in paths.items()}
    return {name: asdict(measure_judge(rows)) for name, rows in found.items() if rows}


def answers_of(run: RunDir, number: int) -> list[dict[str, Any]]:
    """Some of a round's answers to the holdout with what the judge gave them, spread over the tasks."""
    path, judged = run.round(number) / "holdout-answers.jsonl", run.round(number) / "holdout-judgements.jsonl"
    if not path.exists():
        return []
    texts = {row.id: row for row in read_rows(Completion, path)}
    scores = {row.id: row for row in read_rows(Judgement, judged)} if judged.exists() else {}
    rows = sorted(read_rows(Example, run.path / "holdout.jsonl"), key=lambda row: row.task)
    chosen = rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]
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
