"""Plan a round of TAPIR: which rows it trains on, and which the teacher writes or rewrites; pure and seeded.

The other curricula, and `CURRICULA`, the planner of each by its name, are in method/baselines.py.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tapir_local.method.judging import mfd
from tapir_local.printable import format_count
from tapir_local.recipe.curriculum_settings import Curriculum
from tapir_local.records import Example, Expansion, Judgement, RoundPlan, Styled


@dataclass(frozen=True)
class PlanInput:
    """The input of a plan.

    `pool` are the rows to choose from, `seeds` the rows of the seed file. `judgements` are of pool rows; empty if the
    curriculum does not judge. `targets` are the target shares of the tasks. `gaps` is, by task, the mean of the
    teacher's minus the student's score on the holdout, for the last round's student. `earlier` is, by row id, the last
    judgement of an earlier round. `number` is the round, from 1.
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
    earlier: Mapping[str, Judgement] = field(default_factory=dict)

    @property
    def judged(self) -> dict[str, Judgement]:
        """The judgements by row id."""
        return {judgement.id: judgement for judgement in self.judgements}

    @property
    def alpha(self) -> float:
        """The challenge of this round."""
        return challenge_of_round(self.settings, self.number)


def allocate_rows(counts: Mapping[str, int], targets: Mapping[str, float], size: int) -> dict[str, int]:
    """How many of `size` rows each task gets: its target, renormalized over the tasks whose count is not 0.

    The sum is exactly `size`, and each task is within one row of its share (largest remainders; ties go to the larger
    target, then by name). If no task with rows has a target, all get equal shares. Counts are not an upper limit:
    missing rows are to be written.
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


def challenge_of_round(settings: Curriculum, number: int) -> float:
    """The alpha of round `number` (1, 2, ...): alpha_1 + (number - 1) * step, at most 1."""
    return min(1.0, settings.alpha + (number - 1) * settings.alpha_step)


def is_hard(judgement: Judgement, settings: Curriculum) -> bool:
    """Whether a row is hard: its MFD exceeds the threshold, and the teacher's score reaches teacher_floor."""
    difficulty = mfd(judgement)
    return difficulty is not None and difficulty > settings.mfd_threshold and is_teachable(judgement, settings)


def is_easy(judgement: Judgement, settings: Curriculum) -> bool:
    """Whether a row is easy: judged, not hard, and the teacher's score reaches teacher_floor."""
    return is_teachable(judgement, settings) and not is_hard(judgement, settings)


def is_teachable(judgement: Judgement, settings: Curriculum) -> bool:
    """Whether a row is judged and the teacher's score reaches teacher_floor."""
    return judgement.teacher is not None and judgement.teacher >= settings.teacher_floor


NOT_JUDGED, POOR_TEACHER, NOT_TAKEN = "not judged", "whose teacher's own answer is below teacher_floor", "taken by none"

BELOW_THRESHOLD = "whose MFD is at most mfd_threshold"


def count_not_hard(judgements: Sequence[Judgement], settings: Curriculum) -> Counter[str]:
    """The number of rows that are not hard, by reason."""
    return Counter(reason_not_hard(row, settings) for row in judgements if not is_hard(row, settings))


def reason_not_hard(judgement: Judgement, settings: Curriculum) -> str:
    """Why a row is not hard."""
    if mfd(judgement) is None:
        return NOT_JUDGED
    return BELOW_THRESHOLD if is_teachable(judgement, settings) else POOR_TEACHER


def plan_tapir(known: PlanInput) -> RoundPlan:
    """Hard rows by the tasks' shares, and random easy rows, as alpha to 1 - alpha (arXiv 2405.13448, section 3.3).

    Within a task the hardest rows come first. `expand_share` of a task's rows are new rows, plus those that its hard
    rows cannot fill. If nothing can be expanded, the hardest rows are taken whatever their task. Without `difficulty`,
    any row may be chosen as hard or as easy, at random; without `balance`, tasks occur as often as among the hard rows.
    """
    settings = known.settings
    rows, every_hard, easy = split_by_difficulty(known)
    aside = rows_beyond_student(known)
    hard = [row for row in every_hard if row.id not in aside]
    wanted = count_hard_rows(known.alpha, settings.rows, bool(hard), len(easy))
    by_task = group_by_task(hard)
    counts = {task: len(ids) for task, ids in by_task.items()}
    asked = allocate_rows(counts, known.targets if settings.balance else counts, wanted)
    chosen, expansions = (
        fill_tasks(by_task, asked, less_hard_by_task(known, every_hard), settings)
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
        aside=tuple(row.id for row in rows if row.id in aside),
        styled=styled[settings.refine] if known.can_expand else "none",
        pool=len(rows),
        pool_hard=len(every_hard) if settings.difficulty else 0,
        unjudged=sum(judgement.teacher is None for judgement in known.judgements),
        asked=shares_of_sum(asked),
        got=shares_of_sum({task: got[task] for task in by_task}),
        short=short,
        notes=(
            *aside_notes(aside, settings),
            *pool_notes(known, rows, hard, len(easy)),
            *parent_notes(expansions, short, settings),
        ),
    )


def split_by_difficulty(known: PlanInput) -> tuple[list[Example], list[Example], list[str]]:
    """(rows considered, hard rows with the hardest first, ids of easy rows); without difficulty, every row is both."""
    settings, judged = known.settings, known.judged
    if not settings.difficulty:
        rows = known.rng.sample(list(known.pool), len(known.pool))
        return rows, rows, [row.id for row in known.pool]
    rows = [example for example in known.pool if example.id in judged]
    hard = sort_hardest_first([row for row in rows if is_hard(judged[row.id], settings)], judged, known.rng)
    return rows, hard, [row.id for row in rows if is_easy(judged[row.id], settings)]


def rows_beyond_student(known: PlanInput) -> set[str]:
    """Ids of the hard rows whose MFD is above `mfd_ceiling` now and was so in their last judgement before.

    A row at the floor twice teaches as little as a mastered one (see TAPIR's authors on utility, 2026); it is judged
    again in the next round.
    """
    settings, judged, ceiling = known.settings, known.judged, known.settings.mfd_ceiling
    if ceiling is None or not settings.difficulty:
        return set()
    both = ((now, known.earlier[id]) for id, now in judged.items() if id in known.earlier and is_hard(now, settings))
    return {now.id for now, before in both if min(mfd(now) or 0.0, mfd(before) or 0.0) > ceiling}


def aside_notes(aside: set[str], settings: Curriculum) -> tuple[str, ...]:
    """A note on rows that are set aside."""
    if not aside:
        return ()
    return (f"{format_count(len(aside), 'hard row')} set aside: MFD above {settings.mfd_ceiling:g} twice in a row",)


def count_hard_rows(alpha: float, rows: int, some_hard: bool, easy: int) -> int:
    """The number of hard rows: alpha of a round's rows, plus those that easy rows cannot fill; 0 if no row is hard."""
    return max(round(alpha * rows), rows - easy) if some_hard else 0


def sort_hardest_first(rows: Sequence[Example], judged: Mapping[str, Judgement], rng: random.Random) -> list[Example]:
    """Rows by descending MFD; rows of equal MFD in random order, so that the order in the file has no influence."""
    shuffled = rng.sample(list(rows), len(rows))
    return sorted(shuffled, key=lambda row: -(mfd(judged[row.id]) or 0.0))


def group_by_task(rows: Sequence[Example]) -> dict[str, list[str]]:
    """The ids of each task's rows, in the given order; tasks sorted by name."""
    tasks: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        tasks[row.task].append(row.id)
    return dict(sorted(tasks.items()))


def less_hard_by_task(known: PlanInput, hard: Sequence[Example]) -> dict[str, list[str]]:
    """By task, the ids of judged rows that are not hard and that the teacher answers well, the hardest first."""
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
    """(hard rows chosen, new rows to write) that together fill the requested rows of each task, if possible.

    A parent has at most settings.children new rows, since ten from one parent would be ten variants of one question. If
    the hard rows are too few parents, `others` are parents too; if these are too few, more hard rows are taken.
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
    """Notes on the effects of the limit of new rows per parent."""
    beyond = {e.task: e.rows - settings.children * len(e.parents) for e in expansions}
    grown = [f"{task} {count:,}" for task, count in beyond.items() if count > 0]
    missing = [f"{task} {count:,}" for task, count in short.items() if expansions]
    said = {
        f"new rows that grow from less hard rows, the hard ones being too few: {', '.join(grown)}": grown,
        f"rows that curriculum.children ({settings.children}) leaves out, for want of parents: {', '.join(missing)}": (
            missing
        ),
    }
    return tuple(text for text, true in said.items() if true)


def count_by_task(rows: Sequence[Example], ids: Sequence[str]) -> Counter[str]:
    """The number of rows with the given ids, by task."""
    chosen = set(ids)
    return Counter(row.task for row in rows if row.id in chosen)


def count_new_rows(expansions: Sequence[Expansion]) -> Counter[str]:
    """The number of new rows to write, by task."""
    counts: Counter[str] = Counter()
    for expansion in expansions:
        counts[expansion.task] += expansion.rows
    return counts


def shares_of_sum(rows: Mapping[str, int]) -> dict[str, float]:
    """Counts as shares of their sum, rounded to four places."""
    total = max(1, sum(rows.values()))
    return {task: round(count / total, 4) for task, count in rows.items()}


def pool_notes(known: PlanInput, rows: Sequence[Example], hard: Sequence[Example], easy: int) -> tuple[str, ...]:
    """Notes on an unusual pool."""
    mastered = sorted({row.task for row in rows} - {row.task for row in hard})
    reasons = ", ".join(f"{n:,} {why}" for why, n in count_not_hard(known.judgements, known.settings).most_common())
    missing = known.settings.rows - round(known.alpha * known.settings.rows) - easy
    said = {
        "difficulty is off: rows are drawn at random": not known.settings.difficulty,
        "no row is hard: the round only replays easy rows": rows and not hard and easy,
        "no row is easy: the whole round is hard": rows and not easy and hard,
        f"no row is hard and none is easy: {reasons}": rows and not hard and not easy,
        f"{format_count(missing, 'easy row')} fewer than asked, hard ones in their place": hard
        and easy
        and missing > 0,
        f"no hard row in {', '.join(mastered)}: the other tasks have their shares": hard and mastered,
    }
    return tuple(text for text, true in said.items() if true)
