"""What the plan of a round would be with other settings, and what its calls would cost. Nothing is asked."""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.files import read_record, remove_path, write_record, write_rows
from tapir_local.method.baselines import CURRICULA
from tapir_local.method.curriculum import count_new_rows
from tapir_local.pipeline.dry_run import (
    EXPECTED_ANSWER_TOKENS,
    PROMPT_FRAME_TOKENS,
    CostEstimate,
    DryRun,
    estimate_step,
    link_files,
    make_estimate,
)
from tapir_local.pipeline.loop import Step, kept_recipe, last_round, list_steps
from tapir_local.printable import format_count
from tapir_local.recipe.curriculum_settings import POOL_CURRICULA, judges_pool
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override, parse_changes
from tapir_local.records import RoundPlan
from tapir_local.report.costs import cost_estimate_table
from tapir_local.report.tables import percent_cell
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import Work
from tapir_local.stages.rounds import read_situation
from tapir_local.store.queries import mean_tokens_by_stage
from tapir_local.store.store import Store
from tapir_local.tables import PlainTable

# The settings that decide a plan and its price. Any other setting would have changed the student of the round.
PLAN_SETTINGS = ("curriculum.", "tasks", "budget", "teacher.price", "judge.price", "judge.max_unjudged")


@dataclass(frozen=True)
class WhatIf:
    """The present plan of a round (None if it is not planned yet), the plan with the changes, and the calls it needs.

    `unjudged` counts the rows of the new plan's pool that are not judged; they are left out.
    """

    run: str
    round: int
    changes: tuple[str, ...]
    now: RoundPlan | None
    then: RoundPlan
    calls: tuple[CostEstimate, ...]
    unjudged: int


def plan_with_changes(run: RunDir, number: int | None, changes: Sequence[str]) -> WhatIf:
    """The plan with `changes` (`curriculum.rows=2000`), and its calls.

    TapirError for a setting that affects more than the plan, and for a round that is not judged.
    """
    recipe = apply_plan_changes(kept_recipe(run), changes)
    number = number or last_judged_round(run)
    folder = run.round(number)
    if not (folder / "judgements.jsonl").exists():
        last = last_judged_round(run)
        raise TapirError(
            f"round {number} of run {run.name!r} is not judged yet, so it cannot be planned",
            where=str(folder),
            fix=f"Choose one of rounds 1 to {last}." if last else "Run `tapir-local distill` with its recipe first.",
        )
    with ExitStack() as stack:
        copy = RunDir(Path(stack.enter_context(tempfile.TemporaryDirectory())), run.name)
        link_files(run.path, copy.path)
        path = run.cache / "teacher.db"
        store = stack.enter_context(Store(path, "read-only")) if path.exists() else None
        then, unjudged = make_plan(recipe, copy, number)
        steps = [step for step in list_steps(copy, number) if step.number == number]
        calls = estimate_calls(then, recipe, copy, steps, store, mean_tokens_by_stage(path) if path.exists() else {})
    now = read_record(RoundPlan, folder / "plan.json") if (folder / "plan.json").exists() else None
    return WhatIf(run.name, number, tuple(changes), now, then, calls, unjudged)


def apply_plan_changes(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """The recipe with the changes; TapirError for a setting that affects nothing of a plan, or more than the plan."""
    pairs = parse_changes(changes)
    for path in pairs:
        if not path.startswith(PLAN_SETTINGS):
            raise TapirError(
                f"a plan does not depend on {path}, or {path} affects more than the plan",
                where="--set",
                fix=f"Settings to try here: {', '.join(PLAN_SETTINGS)}. For others start a new run with --name.",
            )
    return override(recipe, pairs, kept=True)


def last_judged_round(run: RunDir) -> int:
    """The last round whose pool is judged; 0 if there is none."""
    judged = [n for n in range(1, last_round(run) + 1) if (run.round(n) / "judgements.jsonl").exists()]
    return max(judged, default=0)


def make_plan(recipe: Recipe, copy: RunDir, number: int) -> tuple[RoundPlan, int]:
    """(plan by this recipe, rows of its pool that are not judged)."""
    known = read_situation(Work(recipe, copy, DryRun(recipe, None).backends(), number, f"round-{number:02d}/plan"))
    judging = judges_pool(recipe.curriculum)
    if judging and not known.judgements:
        others = sorted(CURRICULA.keys() - POOL_CURRICULA)
        raise TapirError(
            f"round {number} of run {copy.name!r} was not judged: its curriculum does not use difficulty",
            where="--set curriculum.name",
            fix=f"Try another that does not use it: {', '.join(others)}, or tapir with curriculum.difficulty=off.",
        )
    judged = known.judged
    missing = sum(row.id not in judged for row in known.pool) if judging else 0
    return CURRICULA[recipe.curriculum.name](known), missing


def estimate_calls(
    then: RoundPlan,
    recipe: Recipe,
    copy: RunDir,
    steps: Sequence[Step],
    store: Store | None,
    known: Mapping[str, tuple[float, float]],
) -> tuple[CostEstimate, ...]:
    """The calls of `expand` and `refine` for this plan; requests that are known are looked up in the store."""
    by_name = {step.stage.name: step for step in steps}
    plan, expand, refine = by_name["plan"], by_name["expand"], by_name["refine"]
    for step in steps[steps.index(plan) :]:
        remove_path(step.output)
    write_record(plan.output, then)
    calls = [estimate_step(expand, recipe, copy, store, known)]
    written_before = expand.done
    if not written_before:
        write_rows(expand.output, [])
    if written_before or then.hard or then.reflected:
        calls.append(estimate_step(refine, recipe, copy, store, known))
    if not written_before and then.to_write:
        calls.append(estimate_new_answers(refine, then.to_write, recipe, known))
    return tuple(row for row in calls if row.calls)


def estimate_new_answers(
    refine: Step, rows: int, recipe: Recipe, known: Mapping[str, tuple[float, float]]
) -> CostEstimate:
    """The calls that answer instructions which are not written yet."""
    size_in, size_out = known.get("refine", (PROMPT_FRAME_TOKENS + EXPECTED_ANSWER_TOKENS, EXPECTED_ANSWER_TOKENS))
    found = make_estimate(refine, recipe.teacher, (rows, None), (rows * size_in, rows * size_out))
    return replace(found, step=f"{refine.name}, new rows")


def what_if_tables(found: WhatIf) -> list[PlainTable]:
    """The present plan and the plan with the changes, task by task, and the calls that it needs."""
    then, now = found.then, found.now
    changes = ", ".join(found.changes) or "no change"
    table = PlainTable(f"run {found.run}, round {found.round}: the plan with {changes}")
    table.add_column("task", no_wrap=True)
    table.add_numbers("share\nnow", "share\nthen", "to write\nnow", "to write\nthen")
    new = [count_new_rows(plan.expansions) if plan else Counter[str]() for plan in (now, then)]
    for task in sorted({*then.got, *(now.got if now else ())}):
        shares = [percent_cell(plan.got.get(task, 0.0) if plan else None) for plan in (now, then)]
        table.add_row(task, *shares, *(str(counts[task]) for counts in new))
    table.caption = "\n".join(what_if_lines(found))
    return [table, cost_estimate_table(found.calls, found.run)] if found.calls else [table]


def what_if_lines(found: WhatIf) -> list[str]:
    """How the plans differ, and notes on the new one."""
    then, now = found.then, found.now
    lines = [f"Now: {describe_plan(now)}." if now else "Now: not planned yet.", f"Then: {describe_plan(then)}."]
    if now:
        before, after = ({*plan.hard, *plan.drawn, *plan.reflected, *plan.replay} for plan in (now, then))
        lines.append(f"{format_count(len(after - before), 'row')} added, {len(before - after):,} removed.")
    if found.unjudged:
        lines.append(f"{format_count(found.unjudged, 'row')} of the pool not judged, and left out.")
    if not found.calls:
        lines.append("No calls are needed.")
    return [*lines, *(f"{note}." for note in then.notes)]


def describe_plan(plan: RoundPlan) -> str:
    """The numbers of rows that a plan selects, writes and replays."""
    selected = len(plan.hard) + len(plan.drawn) + len(plan.reflected)
    hard = f"{plan.pool_hard:,} of {format_count(plan.pool, 'row')} hard"
    return f"{hard}, {selected:,} selected, {plan.to_write:,} to write, {len(plan.replay):,} replayed"
