"""Tables of what became of a row, and of what a plan would be."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from tapir_local.method.curriculum import count_new_rows
from tapir_local.records import RoundPlan
from tapir_local.report.terminal import cost_table, forecast_table, percent, plain_table, scores_phrase
from tapir_local.report.what_if import WhatIf
from tapir_local.tables import PlainTable, plain_text


def why_tables(found: Mapping[str, Any]) -> list[PlainTable | Text]:
    """A row's story: what it is, each round, what grew from it, what it cost."""
    head = plain_text(
        f"{found['id']} of run {found['run']}: {found['place']}\n"
        f"task {found['task'] or 'not known yet'}, labelled by {found['labelled_by'] or 'nobody yet'}\n"
        f"{found['instruction']}\n-> {found['answer']}\n"
    )
    cells = [
        [
            str(row["round"]),
            scores_phrase([row["student"], row["teacher"]]),
            "-" if row["mfd"] is None else f"{row['mfd']:g}",
            row["use"],
            row["why"],
            "yes" if row["trained"] else "no",
        ]
        for row in found["rounds"]
    ]
    tables: list[PlainTable | Text] = [
        head,
        plain_table("round by round", ["round", "student : teacher", "MFD", "use", "why", "trained"], cells),
    ]
    if found["left_out"]:
        lost = [[row["step"], row["kind"], row["detail"]] for row in found["left_out"]]
        tables.append(plain_table("where it was left out", ["step", "reason", "in particular"], lost))
    if found["grew"]:
        grew = [[str(new["round"]), new["id"], new["reason"] or "kept", new["instruction"]] for new in found["grew"]]
        tables.append(plain_table("what grew from it", ["round", "row", "kept or why not", "instruction"], grew))
    return [*tables, cost_table("what it cost", found["cost"], "stage")] if found["cost"] else tables


def what_if_tables(found: WhatIf) -> list[PlainTable]:
    """The plan as it is and as it would be, task by task, and the calls that would be made."""
    then, now = found.then, found.now
    table = PlainTable(f"run {found.run}, round {found.round}: the plan with {', '.join(found.changes) or 'no change'}")
    table.add_column("task")
    for name in ("share now", "share then", "to write now", "to write then"):
        table.add_column(name, justify="right")
    new = [count_new_rows(plan.expansions) if plan else Counter[str]() for plan in (now, then)]
    for task in sorted({*then.got, *(now.got if now else ())}):
        shares = [percent(plan.got.get(task, 0.0) if plan else None) for plan in (now, then)]
        table.add_row(task, *shares, *(str(counts[task]) for counts in new))
    table.caption = "\n".join(what_if_phrases(found))
    return [table, forecast_table(found.calls, found.run)] if found.calls else [table]


def what_if_phrases(found: WhatIf) -> list[str]:
    """What differs between the plans, and what to know of the new one."""
    then, now = found.then, found.now

    def told(plan: RoundPlan) -> str:
        taken = len(plan.hard) + len(plan.drawn) + len(plan.reflected)
        hard = f"{plan.pool_hard:,} of {plan.pool:,} rows hard, "
        return f"{hard}{taken:,} taken, {plan.to_write:,} to write, {len(plan.replay):,} replayed"

    said = [f"Now: {told(now)}."] if now else ["Now: not planned yet."]
    said.append(f"Then: {told(then)}.")
    if now:
        before, after = ({*plan.hard, *plan.drawn, *plan.reflected, *plan.replay} for plan in (now, then))
        said.append(f"{len(after - before):,} rows come in, {len(before - after):,} go out.")
    if found.unjudged:
        said.append(f"{found.unjudged:,} rows of the pool are not judged, and left out.")
    if not found.calls:
        said.append("No calls are needed.")
    return [*said, *(f"{note}." for note in then.notes)]
