"""The curricula that TAPIR is compared with, on the same pool, student and store; pure and seeded."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from tapir_local.method.curriculum import (
    PlanInput,
    allocate_rows,
    count_new_rows,
    group_by_task,
    plan_tapir,
    shares_of_sum,
)
from tapir_local.method.judging import mfd
from tapir_local.printable import format_count
from tapir_local.records import Example, Expansion, ExpansionManner, RoundPlan

LION_THRESHOLD = 1.0  # Lion (arXiv 2305.12870): a row is hard if the teacher scores at least this much more


def allocate_capped(counts: Mapping[str, int], targets: Mapping[str, float], size: int) -> dict[str, int]:
    """Like `allocate_rows`, but no task gets more rows than it has; the others get the rest by their targets."""
    rows = dict.fromkeys(counts, 0)
    while (left := size - sum(rows.values())) > 0 and (
        room := {t: n - rows[t] for t, n in counts.items() if n > rows[t]}
    ):
        for task, more in allocate_rows(room, targets, left).items():
            rows[task] += min(more, room[task])
    return rows


def plan_uniform(known: PlanInput) -> RoundPlan:
    """curriculum.rows seeds, drawn at random."""
    return plan_drawn(known, known.rng.sample(list(known.seeds), min(known.settings.rows, len(known.seeds))))


def plan_all(known: PlanInput) -> RoundPlan:
    """All seeds in each round: plain fine-tuning, divided into rounds."""
    return plan_drawn(known, known.seeds)


def plan_growth(known: PlanInput) -> RoundPlan:
    """Random seeds of each task, with its share proportional to its gap on the holdout.

    After Dynamics of Instruction Tuning (arXiv 2310.19651): each ability grows at its own pace. Since the holdout
    decides what is trained, its metrics are slightly optimistic for this curriculum. If a task has too few rows, the
    others fill the rest; if no task has a gap, tasks occur as often as among the seeds.
    """
    by_task = group_by_task(known.seeds)
    counts = {task: len(ids) for task, ids in by_task.items()}
    gaps = {task: max(0.0, known.gaps.get(task, 0.0)) for task in counts}
    targets = gaps if any(gaps.values()) else {task: float(count) for task, count in counts.items()}
    size = min(known.settings.rows, len(known.seeds))
    rows = allocate_capped(counts, targets, size)
    ids = {id for task, count in rows.items() for id in known.rng.sample(by_task[task], count)}
    asked = allocate_rows(counts, targets, size)
    short = {task: asked[task] - rows[task] for task in counts if rows[task] < asked[task]}
    return plan_drawn(known, [row for row in known.seeds if row.id in ids], asked, short)


def plan_drawn(
    known: PlanInput,
    rows: Sequence[Example],
    asked: Mapping[str, int] | None = None,
    short: Mapping[str, int] | None = None,
) -> RoundPlan:
    """A plan that trains on seeds unchanged."""
    got = Counter(sorted(row.task for row in rows))
    wanted = known.settings.rows if known.settings.name != "all" else 0
    return RoundPlan(
        round=known.number,
        curriculum=known.settings.name,
        alpha=0.0,
        alpha_got=0.0,
        drawn=tuple(row.id for row in rows),
        pool=len(known.seeds),
        asked=shares_of_sum(asked or got),
        got=shares_of_sum(got),
        short=short or {},
        notes=(f"only {format_count(len(rows), 'seed')} for {format_count(wanted, 'row')}",)
        if len(rows) < wanted
        else (),
    )


def plan_reflection(known: PlanInput) -> RoundPlan:
    """Random seeds that the teacher criticizes and rewrites and the student selects (arXiv 2402.10110)."""
    rows = known.rng.sample(list(known.seeds), min(known.settings.rows, len(known.seeds)))
    got = shares_of_sum(Counter(sorted(row.task for row in rows)))
    ids = tuple(row.id for row in rows)
    return RoundPlan(known.number, "reflection", 0.0, 0.0, reflected=ids, pool=len(known.seeds), asked=got, got=got)


def plan_lion(known: PlanInput) -> RoundPlan:
    """New rows only: half modeled on hard rows, half rarer ones from the domains of easy rows.

    Lion (arXiv 2305.12870): a row is hard if the teacher scores at least 1 more than the student. Tasks occur as often
    as among the parents, and answers are the teacher's unstyled ones.
    """
    judged = known.judged
    rows = [row for row in known.pool if row.id in judged and judged[row.id].teacher is not None]
    hard = [row for row in rows if (mfd(judged[row.id]) or 0.0) >= LION_THRESHOLD]
    easy = [row for row in rows if (mfd(judged[row.id]) or 0.0) < LION_THRESHOLD]
    size = known.settings.rows
    half = size - size // 2 if hard and easy else size * bool(hard)
    expansions = (
        *lion_expansions(hard, half, "alike", known),
        *lion_expansions(easy, size - half if easy else 0, "rarer", known),
    )
    got = count_new_rows(expansions)
    missing = (size if hard or easy else 0) - got.total()
    why = f"that curriculum.children ({known.settings.children}) leaves out, for want of parents"
    notes = {
        "no row is hard": rows and not hard,
        "no row is easy": rows and not easy,
        f"{format_count(missing, 'row')} {why}": missing > 0 and (hard or not easy),
    }
    return RoundPlan(
        round=known.number,
        curriculum="lion",
        alpha=0.5,
        alpha_got=half / max(1, got.total()),
        expansions=expansions,
        pool=len(rows),
        pool_hard=len(hard),
        unjudged=len(known.judgements) - len(rows),
        asked=shares_of_sum(got),
        got=shares_of_sum(got),
        notes=tuple(text for text, true in notes.items() if true),
    )


def lion_expansions(rows: Sequence[Example], wanted: int, manner: ExpansionManner, known: PlanInput) -> list[Expansion]:
    """`wanted` new rows from random parents; each parent is used once before any is used again, within the limit."""
    if not rows or wanted <= 0:
        return []
    shuffled = known.rng.sample(list(rows), len(rows))
    parents = [shuffled[number % len(shuffled)] for number in range(min(wanted, known.settings.children * len(rows)))]
    return [
        Expansion(task, len(ids), tuple(dict.fromkeys(ids)), manner) for task, ids in group_by_task(parents).items()
    ]


Planner = Callable[[PlanInput], RoundPlan]

CURRICULA: Mapping[str, Planner] = {
    "tapir": plan_tapir,
    "uniform": plan_uniform,
    "all": plan_all,
    "lion": plan_lion,
    "reflection": plan_reflection,
    "growth": plan_growth,
}
