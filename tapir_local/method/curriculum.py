"""Plan a round: which rows it trains on, which the teacher writes anew or rewrites; pure and seeded.

`tapir` is the product; the others are its relatives, on the same pool, student and store, to be compared with it.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tapir_local.method.judging import mfd
from tapir_local.recipe.schema import Curriculum
from tapir_local.records import Example, Expansion, ExpansionManner, Judgement, RoundPlan, Styled

LION_THRESHOLD = 1.0  # Lion (arXiv 2305.12870): hard where the teacher scores at least this much more


@dataclass(frozen=True)
class PlanInput:
    """What is known when a round is planned.

    `pool` are the rows that may be taken, `seeds` the rows of the file; `judgements` are of pool rows, none where the
    curriculum does not judge. `targets` are the tasks' shares, `gaps` the mean of teacher's less student's score by
    task on the holdout, for the last round's student. `number` is the round, 1 and up.
    """

    pool: Sequence[Example]
    seeds: Sequence[Example]
    judgements: Sequence[Judgement]
    targets: Mapping[str, float]
    settings: Curriculum
    number: int
    can_expand: bool
    rng: random.Random
    gaps: Mapping[str, float] = field(default_factory=dict)

    @property
    def judged(self) -> dict[str, Judgement]:
        """Judgements by id."""
        return {judgement.id: judgement for judgement in self.judgements}

    @property
    def alpha(self) -> float:
        """The challenge of this round."""
        return challenge_of_round(self.settings, self.number)


def allocate_rows(counts: Mapping[str, int], targets: Mapping[str, float], size: int) -> dict[str, int]:
    """How many of `size` rows each present task gets: its target renormalised over the tasks whose count is not 0.

    The sum is `size` exactly and each task lies within one row of its share (largest remainders; equal ones go to the
    larger target, then by name). Where no present task has a target all are equal. Counts do not cap: what a task
    lacks is to be written.
    """
    present = {task: max(0.0, targets.get(task, 0.0)) for task, count in counts.items() if count > 0}
    if not present or size <= 0:
        return dict.fromkeys(present, 0)
    total = sum(present.values())
    exact = {task: size * (target / total if total else 1 / len(present)) for task, target in present.items()}
    rows = {task: int(share) for task, share in exact.items()}
    by_remainder = sorted(present, key=lambda task: (rows[task] - exact[task], -present[task], task))
    for task in by_remainder[: size - sum(rows.values())]:
        rows[task] += 1
    return rows


def allocate_capped(counts: Mapping[str, int], targets: Mapping[str, float], size: int) -> dict[str, int]:
    """As `shares`, but no task gets more rows than it has: what one cannot take goes to the others by their targets."""
    rows = dict.fromkeys(counts, 0)
    while (left := size - sum(rows.values())) > 0 and (
        room := {t: n - rows[t] for t, n in counts.items() if n > rows[t]}
    ):
        for task, more in allocate_rows(room, targets, left).items():
            rows[task] += min(more, room[task])
    return rows


def challenge_of_round(settings: Curriculum, number: int) -> float:
    """alpha of round `number` (1, 2, ...): alpha_1 + (number - 1) * step, at most 1."""
    return min(1.0, settings.alpha + (number - 1) * settings.alpha_step)


def is_hard(judgement: Judgement, settings: Curriculum) -> bool:
    """MFD above the threshold, on a row where the teacher itself reaches its floor."""
    difficulty = mfd(judgement)
    return difficulty is not None and difficulty > settings.mfd_threshold and is_teachable(judgement, settings)


def is_easy(judgement: Judgement, settings: Curriculum) -> bool:
    """Judged, not hard, and answered well enough by the teacher to be worth keeping in."""
    return is_teachable(judgement, settings) and not is_hard(judgement, settings)


def is_teachable(judgement: Judgement, settings: Curriculum) -> bool:
    """Judged, and the teacher's own answer reaches its floor."""
    return judgement.teacher is not None and judgement.teacher >= settings.teacher_floor


UNREAD, POOR, NO_REASON = "not judged", "whose teacher's own answer is below teacher_floor", "taken by none"
BELOW_THRESHOLD = "whose MFD is at most mfd_threshold"


def count_not_hard(judgements: Sequence[Judgement], settings: Curriculum) -> Counter[str]:
    """How many rows are not hard, by the reason why."""
    return Counter(reason_not_hard(row, settings) for row in judgements if not is_hard(row, settings))


def reason_not_hard(judgement: Judgement, settings: Curriculum) -> str:
    """Why a row is not hard."""
    if mfd(judgement) is None:
        return UNREAD
    return BELOW_THRESHOLD if is_teachable(judgement, settings) else POOR


def plan_tapir(known: PlanInput) -> RoundPlan:
    """Hard rows in the tasks' shares and easy rows at random, alpha to 1 - alpha (arXiv 2405.13448, section 3.3).

    Within a task the hardest come first. `expand_share` of a task's rows are new ones, and so is what its hard rows
    cannot fill. Where nothing can be expanded, the hardest rows are taken whatever their task. With `difficulty` off
    every row may be taken as a hard one and as an easy one, at random; with `balance` off the tasks come as they do
    among the hard rows.
    """
    settings = known.settings
    rows, hard, easy = split_by_difficulty(known)
    wanted = count_hard_rows(known.alpha, settings.rows, bool(hard), len(easy))
    by_task = group_by_task(hard)
    counts = {task: len(ids) for task, ids in by_task.items()}
    asked = allocate_rows(counts, known.targets if settings.balance else counts, wanted)
    chosen, expansions = (
        fill_tasks(by_task, asked, less_hard_by_task(known, hard), settings)
        if known.can_expand
        else ([row.id for row in hard[:wanted]], ())
    )
    taken = set(chosen)
    left = [id for id in easy if id not in taken]
    replay = known.rng.sample(left, min(len(left), settings.rows - wanted))
    got = count_by_task(hard, chosen) + count_new_rows(expansions)
    short = {task: asked[task] - got[task] for task in by_task if got[task] < asked[task]}
    styled: Mapping[str, Styled] = {"hard": "hard", "all": "all", "off": "none"}
    return RoundPlan(
        round=known.number,
        curriculum="tapir",
        alpha=known.alpha,
        alpha_got=got.total() / max(1, got.total() + len(replay)),
        hard=tuple(chosen),
        expansions=expansions,
        replay=tuple(replay),
        styled=styled[settings.refine] if known.can_expand else "none",
        pool=len(rows),
        pool_hard=len(hard) if settings.difficulty else 0,
        unjudged=sum(judgement.teacher is None for judgement in known.judgements),
        asked=shares_of_sum(asked),
        got=shares_of_sum({task: got[task] for task in by_task}),
        short=short,
        notes=(*pool_notes(known, rows, hard, len(easy)), *parent_notes(expansions, short, settings)),
    )


def split_by_difficulty(known: PlanInput) -> tuple[list[Example], list[Example], list[str]]:
    """(rows looked at, hard ones with the hardest first, ids of easy ones); without difficulty every row is both."""
    settings, judged = known.settings, known.judged
    if not settings.difficulty:
        rows = known.rng.sample(list(known.pool), len(known.pool))
        return rows, rows, [row.id for row in known.pool]
    rows = [example for example in known.pool if example.id in judged]
    hard = sort_hardest_first([row for row in rows if is_hard(judged[row.id], settings)], judged, known.rng)
    return rows, hard, [row.id for row in rows if is_easy(judged[row.id], settings)]


def count_hard_rows(alpha: float, rows: int, some_hard: bool, easy: int) -> int:
    """alpha of a round's rows and whatever its easy rows cannot fill; none where nothing is hard."""
    return max(round(alpha * rows), rows - easy) if some_hard else 0


def sort_hardest_first(rows: Sequence[Example], judged: Mapping[str, Judgement], rng: random.Random) -> list[Example]:
    """By falling MFD; rows of equal MFD in random order, so that the file's order decides nothing."""
    shuffled = rng.sample(list(rows), len(rows))
    return sorted(shuffled, key=lambda row: -(mfd(judged[row.id]) or 0.0))


def group_by_task(rows: Sequence[Example]) -> dict[str, list[str]]:
    """The ids of each task's rows, in the order given; tasks by name."""
    tasks: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        tasks[row.task].append(row.id)
    return dict(sorted(tasks.items()))


def less_hard_by_task(known: PlanInput, hard: Sequence[Example]) -> dict[str, list[str]]:
    """By task, the judged rows that are not hard and that the teacher answers well, the hardest first."""
    ids, judged = {row.id for row in hard}, known.judged
    rows = [row for row in known.pool if row.id in judged and row.id not in ids]
    teachable_ones = [row for row in rows if is_teachable(judged[row.id], known.settings)]
    return group_by_task(sorted(teachable_ones, key=lambda row: -(mfd(judged[row.id]) or 0.0)))


def fill_tasks(
    by_task: Mapping[str, Sequence[str]],
    asked: Mapping[str, int],
    others: Mapping[str, Sequence[str]],
    settings: Curriculum,
) -> tuple[list[str], tuple[Expansion, ...]]:
    """(hard rows chosen, new rows wanted of each task) that together are what was asked of each task, if possible.

    A parent has at most settings.children new rows: ten of one parent would be one question told ten times. Where the
    hard rows are too few for that, `others` are parents too; where these are too few, more hard rows are taken.
    """
    chosen: list[str] = []
    expansions: list[Expansion] = []
    for task, ids in by_task.items():
        old = min(len(ids), asked[task] - round(settings.expand_share * asked[task]))
        new = asked[task] - old
        parents, more = tuple(ids), tuple(others.get(task, ())[:new])
        room = settings.children * (len(parents) + len(more))
        chosen += ids[: old + max(0, new - room)]
        if min(new, room) > 0:
            expansions.append(Expansion(task, min(new, room), parents, others=more))
    return chosen, tuple(expansions)


def parent_notes(expansions: Sequence[Expansion], short: Mapping[str, int], settings: Curriculum) -> tuple[str, ...]:
    """What the limit of new rows for a parent has come to."""
    beyond = {e.task: e.rows - settings.children * len(e.parents) for e in expansions}
    lion_expansions = [f"{task} {count:,}" for task, count in beyond.items() if count > 0]
    missing = [f"{task} {count:,}" for task, count in short.items() if expansions]
    said = {
        f"new rows that grow from less hard rows, the hard ones being too few: {', '.join(grown)}": lion_expansions,
        f"rows that curriculum.children ({settings.children}) leaves out, for want of parents: {', '.join(missing)}": (
            missing
        ),
    }
    return tuple(text for text, true in said.items() if true)


def count_by_task(rows: Sequence[Example], ids: Sequence[str]) -> Counter[str]:
    """How many of the rows named by `ids` are of each task."""
    chosen = set(ids)
    return Counter(row.task for row in rows if row.id in chosen)


def count_new_rows(expansions: Sequence[Expansion]) -> Counter[str]:
    """New rows wanted of each task."""
    counts: Counter[str] = Counter()
    for expansion in expansions:
        counts[expansion.task] += expansion.rows
    return counts


def shares_of_sum(rows: Mapping[str, int]) -> dict[str, float]:
    """Numbers of rows as shares of their sum, to four places."""
    total = max(1, sum(rows.values()))
    return {task: round(count / total, 4) for task, count in rows.items()}


def pool_notes(known: PlanInput, rows: Sequence[Example], hard: Sequence[Example], easy: int) -> tuple[str, ...]:
    """What the reader ought to know of an unusual pool."""
    mastered = sorted({row.task for row in rows} - {row.task for row in hard})
    reasons = ", ".join(f"{n:,} {why}" for why, n in count_not_hard(known.judgements, known.settings).most_common())
    missing = known.settings.rows - round(known.alpha * known.settings.rows) - easy
    said = {
        "difficulty is off: rows are drawn at random": not known.settings.difficulty,
        "no row is hard: the round only replays easy rows": rows and not hard and easy,
        "no row is easy: the whole round is hard": rows and not easy and hard,
        f"no row is hard and none is easy: {reasons}": rows and not hard and not easy,
        f"{missing:,} easy rows fewer than asked, hard ones in their place": hard and easy and missing > 0,
        f"no hard row in {', '.join(mastered)}: the other tasks have their shares": hard and mastered,
    }
    return tuple(text for text, true in said.items() if true)


def plan_uniform(known: PlanInput) -> RoundPlan:
    """As many seeds as a round has rows, drawn at random."""
    return plan_drawn(known, known.rng.sample(list(known.seeds), min(known.settings.rows, len(known.seeds))))


def plan_all(known: PlanInput) -> RoundPlan:
    """All seeds, once: plain fine-tuning cut into rounds."""
    return plan_drawn(known, known.seeds)


def plan_growth(known: PlanInput) -> RoundPlan:
    """Seeds at random within each task, a task's share in proportion to its gap on the holdout.

    After Dynamics of Instruction Tuning (arXiv 2310.19651): each ability grows at its own pace. The holdout decides
    what is trained here, so its metrics flatter this curriculum a little. A task without rows enough leaves its rest to
    the others; where no task has a gap, tasks come as they do among the seeds.
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
    """A plan of seeds taken as they are."""
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
        notes=(f"only {len(rows):,} seeds for {wanted:,} rows",) if len(rows) < wanted else (),
    )


def plan_reflection(known: PlanInput) -> RoundPlan:
    """Seeds at random, which the teacher criticises and rewrites and the student selects (arXiv 2402.10110)."""
    rows = known.rng.sample(list(known.seeds), min(known.settings.rows, len(known.seeds)))
    got = shares_of_sum(Counter(sorted(row.task for row in rows)))
    ids = tuple(row.id for row in rows)
    return RoundPlan(known.number, "reflection", 0.0, 0.0, reflected=ids, pool=len(known.seeds), asked=got, got=got)


def plan_lion(known: PlanInput) -> RoundPlan:
    """Half of a round's rows new ones in the image of hard rows, half rarer ones in the domain of easy rows.

    Lion (arXiv 2305.12870): a row is hard where the teacher scores at least 1 more than the student; only new rows are
    trained on, tasks come as they do among the rows they grow from, and answers are the teacher's plain ones.
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
    notes = {
        "no row is hard": rows and not hard,
        "no row is easy": rows and not easy,
        f"{missing:,} rows that curriculum.children ({known.settings.children}) leaves out, for want of parents": (
            missing > 0 and (hard or not easy)
        ),
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
    """`wanted` new rows from parents drawn at random, each once before any is taken again, and none too often."""
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
