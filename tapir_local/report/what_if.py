"""What a round's plan would be with other settings, and what the calls not yet made would cost: nothing is asked."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.files import read_record, remove_path, write_record, write_rows
from tapir_local.method.baselines import CURRICULA
from tapir_local.pipeline.context import Work
from tapir_local.pipeline.dry_run import ANSWER, FRAME, Foreseen, Scout, foresee, link, priced
from tapir_local.pipeline.loop import Step, kept_recipe, rounds_begun, sequence
from tapir_local.pipeline.rounds import situation
from tapir_local.recipe.schema import POOL_CURRICULA, Recipe, judges_pool
from tapir_local.recipe.text import override, parse_changes
from tapir_local.records import RoundPlan
from tapir_local.run_dir import RunDir
from tapir_local.store.schema import tokens_by_stage
from tapir_local.store.store import Store

# What decides a plan, and what is paid for it; all else would have changed what the round's student was.
PLANNING = ("curriculum.", "tasks", "budget", "teacher.price", "judge.price", "judge.max_unjudged")


@dataclass(frozen=True)
class WhatIf:
    """The plan of a round as it is (None where it is not made yet) and as it would be, and the calls for the latter.

    `unjudged` counts rows that the other pool would have and that nobody has judged: they are left out.
    """

    run: str
    round: int
    changes: tuple[str, ...]
    now: RoundPlan | None
    then: RoundPlan
    calls: tuple[Foreseen, ...]
    unjudged: int


def what_if(run: RunDir, number: int | None, changes: Sequence[str]) -> WhatIf:
    """The plan with `changes` (`curriculum.rows=2000`) and its calls.

    TapirError for a setting that decides more than the plan, and for a round whose pool nobody has judged.
    """
    kept = kept_recipe(run)
    recipe = changed(kept, changes)
    number = number or last_judged(run)
    folder = run.round(number)
    if not (folder / "judgements.jsonl").exists():
        raise TapirError(
            f"round {number} of run {run.name!r} is not judged yet, so there is nothing to plan from",
            where=str(folder),
            fix=f"Rounds 1 to {last_judged(run)} can be planned." if last_judged(run) else "Let `distill` go on first.",
        )
    with ExitStack() as stack:
        copy = RunDir(Path(stack.enter_context(tempfile.TemporaryDirectory())), run.name)
        link(run.path, copy.path)
        path = run.cache / "teacher.db"
        store = stack.enter_context(Store(path, "read-only")) if path.exists() else None
        then, unjudged = replan(recipe, copy, number)
        steps = [step for step in sequence(copy, number) if step.number == number]
        calls = calls_for(then, recipe, copy, steps, store, tokens_by_stage(path) if path.exists() else {})
    now = read_record(RoundPlan, folder / "plan.json") if (folder / "plan.json").exists() else None
    return WhatIf(run.name, number, tuple(changes), now, then, calls, unjudged)


def changed(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """The recipe with the changes; TapirError for one that a plan does not depend on."""
    pairs = parse_changes(changes)
    for path in pairs:
        if not path.startswith(PLANNING):
            raise TapirError(
                f"a plan does not depend on {path}, or more than a plan does",
                where="--set",
                fix=f"Settings that can be tried: {', '.join(PLANNING)}. For all else start a new run with --name.",
            )
    return override(recipe, pairs, kept=True)


def last_judged(run: RunDir) -> int:
    """The last round whose pool is judged; 0 if none."""
    judged = [n for n in range(1, rounds_begun(run) + 1) if (run.round(n) / "judgements.jsonl").exists()]
    return max(judged, default=0)


def replan(recipe: Recipe, copy: RunDir, number: int) -> tuple[RoundPlan, int]:
    """The plan by this recipe, and how many rows of its pool are without a judgement."""
    known = situation(Work(recipe, copy, Scout(recipe, None).tools(), number, f"round-{number:02d}/plan"))
    judging = judges_pool(recipe.curriculum)
    if judging and not known.judgements:
        others = sorted(CURRICULA.keys() - POOL_CURRICULA)
        raise TapirError(
            f"round {number} of run {copy.name!r} was not judged: its curriculum does not ask how hard a row is",
            where="--set curriculum.name",
            fix=f"Try one that does not either: {', '.join(others)}, or tapir with curriculum.difficulty=off.",
        )
    judged = known.judged
    missing = sum(row.id not in judged for row in known.pool) if judging else 0
    return CURRICULA[recipe.curriculum.name](known), missing


def calls_for(
    then: RoundPlan,
    recipe: Recipe,
    copy: RunDir,
    steps: Sequence[Step],
    store: Store | None,
    known: Mapping[str, tuple[float, float]],
) -> tuple[Foreseen, ...]:
    """What `expand` and `refine` would ask for this plan, looked up in the store as far as that goes."""
    by_name = {step.stage.name: step for step in steps}
    plan, expand, refine = by_name["plan"], by_name["expand"], by_name["refine"]
    for step in steps[steps.index(plan) :]:
        remove_path(step.output)
    write_record(plan.output, then)
    calls = [foresee(expand, recipe, copy, store, known)]
    written_before = expand.done
    if not written_before:
        write_rows(expand.output, [])
    if written_before or then.hard or then.reflected:
        calls.append(foresee(refine, recipe, copy, store, known))
    if not written_before and then.to_write:
        calls.append(new_answers(refine, then.to_write, recipe, known))
    return tuple(row for row in calls if row.calls)


def new_answers(refine: Step, rows: int, recipe: Recipe, known: Mapping[str, tuple[float, float]]) -> Foreseen:
    """The answers to instructions that are not written yet."""
    size_in, size_out = known.get("refine", (FRAME + ANSWER, ANSWER))
    found = priced(refine, rows, None, rows * size_in, rows * size_out, recipe.teacher)
    return replace(found, step=f"{refine.name}, new rows")
