"""Plan a round of TAPIR: which rows it trains on, and which the teacher writes or rewrites; pure and seeded.

The other curricula, and `CURRICULA`, the planner of each by its name, are in method/baselines.py.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from tapir_local.method.judging import mfd
from tapir_local.method.parents import fill_tasks, parent_notes
from tapir_local.printable import format_count
from tapir_local.recipe.curriculum_settings import Curriculum
from tapir_local.records import Example, Expansion, Judgement, RoundPlan, Styled, TaskLearning, TaskMastery


@dataclass(frozen=True)
class PlanInput:
    """The input of a plan.

    `pool` are the rows to choose from, `seeds` the rows of the seed file. `judgements` are of pool rows; empty if the
    curriculum does not judge. `targets` are the target shares of the tasks. `gaps` is, by task, the mean of the
    teacher's minus the student's score on the holdout, for the last round's student. `earlier` is, by row id, the last
    judgement of an earlier round; `trained` are the ids of the rows that the last round trained on. Both may be empty
    if no setting uses them. `number` is the round, from 1.
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
    trained: Collection[str] = frozenset()

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
    `mastery` leaves hard rows of some tasks for later rounds, and `learnable` changes the shares of the others.
    """
    settings = known.settings
    rows, every_hard, easy = split_by_difficulty(known)
    aside = rows_beyond_student(known)
    reachable = [row for row in every_hard if row.id not in aside]
    mastery, learning = rate_mastery(known, reachable), count_learned(known, reachable)
    hard = sort_by_weight([row for row in reachable if is_taught(row.task, mastery)], known.judged, learning)
    wanted = count_hard_rows(known.alpha, settings.rows, bool(hard), len(easy))
    by_task = group_by_task(hard)
    asked = allocate_rows(count_by_key(by_task), weigh_tasks(known, by_task, learning), wanted)
    chosen, expansions = (
        fill_tasks(by_task, asked, less_hard_by_task(known, every_hard), settings)
        if known.can_expand
        else ([row.id for row in hard[:wanted]], ())
    )
    replay = draw_replay(known, easy, set(chosen), settings.rows - wanted)
    got = count_by_task(hard, chosen) + count_new_rows(expansions)
    short = {task: asked[task] - got[task] for task in by_task if got[task] < asked[task]}
    return RoundPlan(
        round=known.number,
        curriculum="tapir",
        alpha=known.alpha,
        alpha_got=got.total() / max(1, got.total() + len(replay)),
        hard=tuple(chosen),
        expansions=expansions,
        replay=tuple(replay),
        aside=tuple(row.id for row in rows if row.id in aside),
        styled=styled_answers(known),
        pool=len(rows),
        pool_hard=len(every_hard) if settings.difficulty else 0,
        unjudged=sum(judgement.teacher is None for judgement in known.judgements),
        asked=shares_of_sum(asked),
        got=shares_of_sum({task: got[task] for task in by_task}),
        short=short,
        notes=(
            *aside_notes(aside, settings),
            *(*mastery_notes(mastery), *learning_notes(known, learning)),
            *pool_notes(known, rows, reachable, len(easy)),
            *parent_notes(expansions, short, settings),
        ),
        mastery=mastery,
        learning=learning,
    )


def draw_replay(known: PlanInput, easy: Sequence[str], taken: Collection[str], wanted: int) -> list[str]:
    """`wanted` easy rows that are not taken as hard ones, at random; fewer if there are fewer."""
    left = [id for id in easy if id not in taken]
    return known.rng.sample(left, min(len(left), wanted))


def styled_answers(known: PlanInput) -> Styled:
    """The answers that the teacher rewrites in the task's style."""
    styled: Mapping[str, Styled] = {"hard": "hard", "all": "all", "off": "none"}
    return styled[known.settings.refine] if known.can_expand else "none"


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


def rate_mastery(known: PlanInput, hard: Sequence[Example]) -> dict[str, TaskMastery]:
    """The gap and the state of every task of the hard rows, the largest gap first; {} without `curriculum.mastery`.

    A task's gap is the mean of the teacher's minus the student's score over all its judged rows in this round's pool,
    hard or not, in points. The task is mastered if the student's mean is at least `mastery` times the teacher's. Of the
    tasks that are not mastered, the weaker half is taught: those whose gap is at least the median of their gaps, so
    tasks of equal gap are treated alike. The others wait. Tasks without a hard row, such as those without a judged row,
    are left out: there is nothing to teach them, and they hold no other task back. If every task is mastered,
    `is_taught` is true of all. Replay is not affected: easy rows come from every task.

    After IOA (arXiv 2602.12172), which teaches weak abilities by their gap to the teacher, and the next ones when these
    are mastered. IOA finds out which ability requires which and keeps to that order; here the tasks are the abilities,
    and the gap alone orders them. The state is found again in each round, so a task that falls back is taught again.
    That half of the tasks are taught at a time is our choice, so that a round has several; no experiment has tested it.
    """
    settings, judged = known.settings, known.judged
    if settings.mastery is None or not settings.difficulty:
        return {}
    scores: dict[str, list[tuple[float, float]]] = {row.task: [] for row in hard}
    for row in known.pool:
        found = judged.get(row.id)
        if row.task in scores and found and found.teacher is not None and found.student is not None:
            scores[row.task].append((found.teacher, found.student))
    gaps = {task: fmean(teacher - student for teacher, student in pairs) for task, pairs in scores.items()}
    # Sums, whose quotient is rounded once: a student at exactly the share has mastered the task.
    reached = {task: sum(pair[1] for pair in pairs) / sum(pair[0] for pair in pairs) for task, pairs in scores.items()}
    mastered = {task for task, share in reached.items() if share >= settings.mastery}
    least = median(gaps[task] for task in gaps.keys() - mastered) if gaps.keys() - mastered else 0.0
    return {
        task: TaskMastery(
            round(gaps[task], 4),
            "mastered" if task in mastered else "taught" if gaps[task] >= least else "waiting",
        )
        for task in sorted(gaps, key=lambda task: (-gaps[task], task))
    }


def is_taught(task: str, mastery: Mapping[str, TaskMastery]) -> bool:
    """Whether a plan takes and expands hard rows of a task: the task is `taught`, or no task is."""
    taught = {name for name, found in mastery.items() if found.state == "taught"}
    return not taught or task in taught


def mastery_notes(mastery: Mapping[str, TaskMastery]) -> tuple[str, ...]:
    """Notes that name each task with its gap."""
    named: dict[str, list[str]] = defaultdict(list)
    for task, found in mastery.items():
        named[found.state].append(f"{task} (gap {found.gap:.1f})")
    said = {
        "taught": "hard and new rows go to the weakest tasks that are not mastered",
        "waiting": "not mastered either, but left for a later round",
        "mastered": "mastered, and so without hard and new rows"
        if "taught" in named
        else "every task that has hard rows is mastered, so all of them get rows",
    }
    return tuple(f"{text}: {', '.join(named[state])}" for state, text in said.items() if named[state])


def count_learned(known: PlanInput, hard: Sequence[Example]) -> dict[str, TaskLearning]:
    """How many hard rows of each task the student learned in the last round; {} without `curriculum.learnable`.

    A row counts as trained if it was hard in the last round's judgement, the last round trained on it, and this round's
    judgement has it too; as learned if its MFD is lower now. So new rows of the last round do not count, since they
    were not judged before it, nor easy rows, whose MFD has hardly any room to fall, nor, with `curriculum.pool`, rows
    that only one of the two pools has drawn. In round 1 nothing counts. A row that was chosen for its high MFD tends to
    have a lower one the next time even if it was not learned; this happens in every task.
    """
    settings, judged = known.settings, known.judged
    if not settings.learnable or not settings.difficulty:
        return {}
    fell: dict[str, list[bool]] = {task: [] for task in sorted({row.task for row in hard})}
    for row in known.pool:
        if row.task in fell and row.id in known.trained and row.id in judged and row.id in known.earlier:
            now, before = mfd(judged[row.id]), mfd(known.earlier[row.id])
            if now is not None and before is not None and is_hard(known.earlier[row.id], settings):
                fell[row.task].append(now < before)
    return {task: TaskLearning(len(values), sum(values)) for task, values in fell.items()}


def learning_notes(known: PlanInput, learning: Mapping[str, TaskLearning]) -> tuple[str, ...]:
    """A note on the hard rows of the last round that were judged again; none in round 1."""
    found = [f"{task} {one.learned:,} of {one.trained:,}" for task, one in learning.items() if one.trained]
    if found:
        return (f"hard rows of the last round whose MFD has fallen: {', '.join(found)}",)
    none = "no hard row of the last round was judged again, so learnable changes no share"
    return (none,) if learning and known.number > 1 else ()


def weigh_tasks(
    known: PlanInput, by_task: Mapping[str, Sequence[str]], learning: Mapping[str, TaskLearning]
) -> dict[str, float]:
    """The weights by which tasks share the hard rows, not normalized.

    A task's weight is its target share, or without `balance` its number of hard rows, times its `TaskLearning.factor`.
    Multiplying the MFD of each row instead would change nothing, because rows compete only within their task.
    """
    base = known.targets if known.settings.balance else count_by_key(by_task)
    return {task: base.get(task, 0.0) * learning_factor(task, learning) for task in by_task}


def learning_factor(task: str, learning: Mapping[str, TaskLearning]) -> float:
    """The factor of a task; 1 without `curriculum.learnable`."""
    return learning[task].factor if task in learning else 1.0


def sort_by_weight(
    hard: Sequence[Example], judged: Mapping[str, Judgement], learning: Mapping[str, TaskLearning]
) -> list[Example]:
    """Hard rows by descending MFD times their task's factor; the order of equals, such as within a task, is kept.

    It matters where nothing can be expanded: there the first rows are taken, whatever their task.
    """
    if not learning:
        return list(hard)
    return sorted(hard, key=lambda row: -(mfd(judged[row.id]) or 0.0) * learning_factor(row.task, learning))


def count_by_key(groups: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The number of values of each key."""
    return {key: len(values) for key, values in groups.items()}


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
    without = ", ".join(sorted({row.task for row in rows} - {row.task for row in hard}))
    others = ": the other tasks have their shares" if known.settings.mastery is None else ""
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
        f"no hard row in {without}{others}": hard and without,
    }
    return tuple(text for text, true in said.items() if true)
