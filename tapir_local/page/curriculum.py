"""Sections 4 and 5 of a report: what each round trained on, and the new rows that the teacher wrote."""

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tapir_local.data.dataset import Draft
from tapir_local.files import read_record
from tapir_local.method.judging import mfd
from tapir_local.page.draw import INK, Spec, color_by, color_of_lines, draw_figure, inline_values, rule_at
from tapir_local.page.parts import (
    Cell,
    Facts,
    Figure,
    Grid,
    Paragraph,
    Part,
    Section,
    clip_text,
    count_number,
    rate_number,
)
from tapir_local.pipeline.loop import kept_recipe, last_round
from tapir_local.printable import format_count
from tapir_local.records import Example, RoundPlan, instruction_of
from tapir_local.report.status_tables import plan_phrase
from tapir_local.report.why import plan_use, read_all_rows, read_drafts, read_judgements, read_training_rows
from tapir_local.run_dir import RunDir

USE_NAMES = {
    "hard": "hard", "new": "new", "replay": "easy, replayed", "drawn": "drawn", "reflected": "rewritten",
    "pair": "preference pair",
}  # fmt: skip
SAMPLES = 12  # random drafts of each kind that a page shows
SAMPLE_LENGTH = 1_200  # characters of a text in a sample


def read_plans(run: RunDir) -> dict[int, RoundPlan]:
    """The plan of each round that has one."""
    paths = {number: run.round(number) / "plan.json" for number in range(1, last_round(run) + 1)}
    return {number: read_record(RoundPlan, path) for number, path in paths.items() if path.exists()}


def curriculum_section(run: RunDir) -> Section:
    """Section 4."""
    question = "What did each round train on, and does the number of hard rows shrink?"
    plans = read_plans(run)
    rows = {number: read_training_rows(run, number) for number in range(last_round(run) + 1)}
    if not plans:
        none = Paragraph("No round is planned yet; round 0 trains on seeds drawn at random.")
        return Section("curriculum", "Curriculum", question, (none,))
    uses = count_training_uses(plans, {number: found for number, found in rows.items() if found})
    parts: list[Part] = [uses_figure(uses)] if uses else []
    if difficulties := read_difficulties(run):
        parts.append(difficulty_figure(difficulties, kept_recipe(run).curriculum.mfd_threshold))
    parts.append(plans_grid(run, plans, difficulties))
    notes = [
        (f"round {number}", "; ".join([plan_phrase(plan_data(plan)), *plan.notes])) for number, plan in plans.items()
    ]
    return Section("curriculum", "Curriculum", question, [*parts, Facts(notes)])


def plan_data(plan: RoundPlan) -> dict[str, Any]:
    """A plan's fields by name."""
    return {name: getattr(plan, name) for name in RoundPlan.__dataclass_fields__}


def count_training_uses(plans: Mapping[int, RoundPlan], rows: Mapping[int, Sequence[Example]]) -> list[dict[str, Any]]:
    """The training rows of each round by what the plan uses them for; rows that the round wrote are `new`."""
    found = []
    for number, examples in rows.items():
        plan, counts = plans.get(number), Counter[str]()
        for row in examples:
            written = row.origin == "expanded" and row.round == number
            use = "new" if written else plan_use(plan, row.id) if plan else "pair" if number else "drawn"
            counts[USE_NAMES.get(use, "drawn")] += 1
        found += [{"round": f"round {number}", "use": use, "rows": count} for use, count in counts.items()]
    return found


def uses_figure(uses: Sequence[Mapping[str, Any]]) -> Figure:
    """A stacked bar for each round."""
    names = [name for name in USE_NAMES.values() if any(row["use"] == name for row in uses)]
    rounds = list(dict.fromkeys(row["round"] for row in uses))
    tips = [{**row, "tip": f"{row['round']}: {format_count(row['rows'], 'row')} {row['use']}"} for row in uses]

    def make(narrow: bool) -> Spec:
        y = {"field": "round", "type": "nominal", "sort": rounds, "axis": {"title": None, "labelColor": INK}}
        x = {"field": "rows", "type": "quantitative", "axis": {"title": "training rows", "tickCount": 5}}
        color = color_by("use", names, narrow)
        return {
            "height": {"step": 28},
            "data": inline_values(tips),
            "mark": {"type": "bar", "height": {"band": 0.72}},
            "encoding": {"y": y, "x": x, "color": color, "description": {"field": "tip"}},
        }

    return draw_figure("Training rows by use", make)


def read_difficulties(run: RunDir) -> dict[int, list[float]]:
    """The MFD of each judged row of each round's pool."""
    found = {}
    for number in range(1, last_round(run) + 1):
        values = [mfd(row) for row in read_judgements(run, number, "judgements").values()]
        if known := [value for value in values if value is not None]:
            found[number] = known
    return found


def difficulty_bins(values: Sequence[float]) -> dict[int, float]:
    """The share of values nearest to each whole MFD from the lowest to the highest."""
    counts = Counter(round(value) for value in values)
    return {at: counts[at] / len(values) for at in range(min(counts) - 1, max(counts) + 2)}


def difficulty_figure(difficulties: Mapping[int, Sequence[float]], threshold: float) -> Figure:
    """The distribution of MFD in each round's pool, laid over each other."""
    points = [
        {"round": f"round {number}", "mfd": at, "share": share}
        for number, values in difficulties.items() for at, share in difficulty_bins(values).items()
    ]  # fmt: skip
    names = [f"round {number}" for number in difficulties]

    def make(narrow: bool) -> Spec:
        x = {
            "field": "mfd",
            "type": "quantitative",
            "axis": {"title": "MFD: the teacher's score minus the student's", "format": "d"},
        }
        y = {"field": "share", "type": "quantitative", "axis": {"title": None, "format": "%", "tickCount": 5}}
        mark = {"type": "line", "interpolate": "step", "strokeWidth": 2.5, "aria": False}
        line = {"mark": mark, "encoding": {"x": x, "y": y, "color": color_of_lines("round", names, narrow)}}
        rule = rule_at("x", threshold, f"hard: above {threshold:g}")
        return {"height": 200, "data": inline_values(points), "layer": [line, *rule]}

    note = "Shares of the pool. The further left a round's curve lies, the closer the student is to the teacher."
    return draw_figure("Difficulty of the pool", make, note)


def plans_grid(run: RunDir, plans: Mapping[int, RoundPlan], judged: Collection[int]) -> Grid:
    """A row for each planned round; `judged` are the rounds whose pool was judged."""
    aside = ["set aside"] if any(plan.aside for plan in plans.values()) else []
    heads = ["round", "pool", "hard in the pool", "alpha, target", "alpha, got"]
    heads += ["hard", "new", "missing", "easy, replayed", *aside]
    rows = []
    for number, plan in plans.items():
        missing = sum(plan.short.values())
        new = sum(row.origin == "expanded" and row.round == number for row in read_training_rows(run, number))
        rows.append(
            [
                Cell(str(number), number),
                count_number(plan.pool),
                rate_number(plan.pool_hard / plan.pool if plan.pool and number in judged else None),
                rate_number(plan.alpha),
                rate_number(plan.alpha_got),
                count_number(len(plan.hard)),
                count_number(new),
                count_number(missing, "bad" if missing else ""),
                count_number(len(plan.replay)),
                *(count_number(len(plan.aside)) for _ in aside),
            ]
        )
    return Grid(heads, rows, note="alpha is the share of hard and new rows.")


# Section 5


def new_data_section(run: RunDir) -> Section:
    """Section 5: what became of the teacher's drafts, with random samples."""
    question = "Are the rows that the teacher wrote any good?"
    drafts = read_drafts(run)
    if not drafts:
        return Section("new-data", "New data", question)
    parts: list[Part] = [drafts_figure(drafts), drafts_grid(drafts)]
    rows = read_all_rows(run, drafts)
    draw = random.Random(f"{kept_recipe(run).random_seed}-report")
    kept = pick([draft for _, draft in drafts if not draft.reason], draw)
    rejected = pick([draft for _, draft in drafts if draft.reason], draw)
    if kept:
        parts.append(kept_grid(kept, rows))
    if rejected:
        parts.append(rejected_grid(rejected, rows))
    return Section("new-data", "New data", question, parts)


def pick(drafts: Sequence[Draft], draw: random.Random) -> list[Draft]:
    """Some drafts at random, in their order."""
    chosen = sorted(draw.sample(range(len(drafts)), min(SAMPLES, len(drafts))))
    return [drafts[at] for at in chosen]


# Green for what was kept. Only a ninth outcome would repeat a color.
OUTCOME_COLORS = tuple(f"var(--c{number})" for number in (3, 2, 4, 6, 7, 1, 5, 8))


def outcome(draft: Draft) -> str:
    """`kept`, or the kind of the reason why a draft was rejected, without its figures."""
    return draft.reason.partition(":")[0] or "kept"


def drafts_figure(drafts: Sequence[tuple[int, Draft]]) -> Figure:
    """A stacked bar for each round: drafts kept and rejected, by reason."""
    counts = Counter((number, outcome(draft)) for number, draft in drafts)
    reasons = sorted({what for _, what in counts if what != "kept"})
    names = ["kept", *reasons]
    bars = [
        {"round": f"round {number}", "outcome": what, "drafts": count, "order": names.index(what),
         "tip": f"round {number}: {count:,} {what}"}
        for (number, what), count in counts.items()
    ]  # fmt: skip

    def make(narrow: bool) -> Spec:
        y = {"field": "round", "type": "nominal", "sort": None, "axis": {"title": None, "labelColor": INK}}
        x = {"field": "drafts", "type": "quantitative", "axis": {"title": "drafts", "tickCount": 5}}
        color = color_by("outcome", names, narrow, OUTCOME_COLORS)
        order = {"field": "order", "type": "quantitative"}
        return {
            "height": {"step": 28},
            "data": inline_values(sorted(bars, key=lambda bar: (bar["round"], bar["order"]))),
            "mark": {"type": "bar", "height": {"band": 0.72}},
            "encoding": {"y": y, "x": x, "color": color, "order": order, "description": {"field": "tip"}},
        }

    return draw_figure("What became of the drafts", make)


def drafts_grid(drafts: Sequence[tuple[int, Draft]]) -> Grid:
    """A row for each task: drafts, kept, and rejected by reason."""
    counts = Counter((draft.example.task, outcome(draft)) for _, draft in drafts)
    reasons = sorted({what for _, what in counts if what != "kept"})
    rows = []
    for task in sorted({task for task, _ in counts}):
        total = sum(count for (of, _), count in counts.items() if of == task)
        kept = counts[task, "kept"]
        cells = (count_number(counts[task, reason]) for reason in reasons)
        rows.append([Cell(task), count_number(total), count_number(kept), rate_number(kept / total), *cells])
    return Grid(
        ["task", "drafts", "kept", "kept, share", *reasons], rows, title="Drafts by task", folded=len(rows) > 12
    )


def kept_grid(kept: Sequence[Draft], rows: Mapping[str, Example]) -> Grid:
    """Drafts that were kept, with the row that each was written from and its answer."""
    heads = ["row", "task", "written from", "new instruction", "answer"]
    cells = [
        [
            Cell(draft.example.id),
            Cell(draft.example.task),
            Cell(row_text(rows, draft.example.parent)),
            Cell(clip_text(instruction_of(draft.example.prompt), SAMPLE_LENGTH)),
            Cell(clip_text(rows[draft.example.id].completion, SAMPLE_LENGTH)),
        ]
        for draft in kept
    ]
    return Grid(
        heads,
        cells,
        title=f"{format_count(len(kept), 'random row')} kept",
        texts=["task", "reason"],
        wide=heads[2:],
        folded=True,
    )


def rejected_grid(rejected: Sequence[Draft], rows: Mapping[str, Example]) -> Grid:
    """Drafts that were rejected, with the reason and the similar row beside them."""
    heads = ["row", "task", "reason", "rejected instruction", "similar row"]
    cells = [
        [
            Cell(draft.example.id),
            Cell(draft.example.task),
            Cell(draft.reason),
            Cell(clip_text(instruction_of(draft.example.prompt), SAMPLE_LENGTH)),
            Cell(row_text(rows, draft.near)),
        ]
        for draft in rejected
    ]
    return Grid(
        heads,
        cells,
        title=f"{format_count(len(rejected), 'random draft')} rejected",
        texts=["task"],
        wide=heads[2:],
        folded=True,
    )


def row_text(rows: Mapping[str, Example], id: str) -> str:
    """The id and the instruction of a row; "" without an id."""
    if not id:
        return ""
    return f"{id}: {clip_text(instruction_of(rows[id].prompt), SAMPLE_LENGTH)}" if id in rows else id
