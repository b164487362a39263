"""Plan a round: which hard rows are refined, how many new ones each task needs, which easy rows are replayed."""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from tapir_local.judging import mfd
from tapir_local.recipe import Curriculum
from tapir_local.records import Example, Judgement, RoundPlan


def shares(counts: Mapping[str, int], targets: Mapping[str, float], size: int) -> dict[str, int]:
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


def challenge(settings: Curriculum, number: int) -> float:
    """alpha of round `number` (1, 2, ...): alpha_1 + (number - 1) * step, at most 1."""
    return min(1.0, settings.alpha + (number - 1) * settings.alpha_step)


def is_hard(judgement: Judgement, settings: Curriculum) -> bool:
    """MFD above the threshold, on a row where the teacher itself reaches its floor."""
    difficulty = mfd(judgement)
    return (
        difficulty is not None
        and difficulty > settings.mfd_threshold
        and (judgement.teacher or 0.0) >= settings.teacher_floor
    )


def is_easy(judgement: Judgement, settings: Curriculum) -> bool:
    """Judged, not hard, and answered well enough by the teacher to be worth keeping in."""
    return (
        judgement.teacher is not None
        and judgement.teacher >= settings.teacher_floor
        and not is_hard(judgement, settings)
    )


def tapir(
    pool: Sequence[Example],
    judgements: Sequence[Judgement],
    targets: Mapping[str, float],
    settings: Curriculum,
    number: int,
    can_expand: bool,
    rng: random.Random,
) -> RoundPlan:
    """Hard rows in the tasks' shares and easy rows at random, alpha to 1 - alpha (arXiv 2405.13448, section 3.3).

    Within a task the hardest come first. `expand_share` of a task's rows are new ones, and so is what its hard rows
    cannot fill. Where nothing can be expanded, the hardest rows are taken whatever their task.
    """
    judged = {judgement.id: judgement for judgement in judgements}
    rows = [example for example in pool if example.id in judged]
    alpha = challenge(settings, number)
    hard = hardest_first([row for row in rows if is_hard(judged[row.id], settings)], judged, rng)
    easy = [row.id for row in rows if is_easy(judged[row.id], settings)]
    wanted = hard_rows_wanted(alpha, settings.rows, bool(hard), bool(easy))
    by_task = group(hard)
    asked = shares({task: len(ids) for task, ids in by_task.items()}, targets, wanted)
    chosen, expand = (
        fill(by_task, asked, settings.expand_share) if can_expand else ([row.id for row in hard[:wanted]], {})
    )
    replay = rng.sample(easy, min(len(easy), settings.rows - wanted))
    tasks = {row.id: row.task for row in rows}
    got = {task: sum(tasks[id] == task for id in chosen) + expand.get(task, 0) for task in by_task}
    hard_rows = sum(got.values())
    return RoundPlan(
        round=number,
        alpha=alpha,
        alpha_got=hard_rows / max(1, hard_rows + len(replay)),
        hard=tuple(chosen),
        expand=expand,
        parents={task: tuple(by_task[task]) for task in expand},
        replay=tuple(replay),
        pool=len(rows),
        pool_hard=len(hard),
        unjudged=sum(judgement.teacher is None for judgement in judgements),
        asked=fractions(asked),
        got=fractions(got),
        short={task: asked[task] - got[task] for task in by_task if got[task] < asked[task]},
        notes=remarks(rows, hard, easy, replay, settings.rows - wanted),
    )


def hard_rows_wanted(alpha: float, rows: int, some_hard: bool, some_easy: bool) -> int:
    """alpha of a round's rows; all of them where nothing is easy, none where nothing is hard."""
    if not some_hard:
        return 0
    return min(rows, round(alpha * rows)) if some_easy else rows


def hardest_first(rows: Sequence[Example], judged: Mapping[str, Judgement], rng: random.Random) -> list[Example]:
    """By falling MFD; rows of equal MFD in random order, so that the file's order decides nothing."""
    shuffled = rng.sample(list(rows), len(rows))
    return sorted(shuffled, key=lambda row: -(mfd(judged[row.id]) or 0.0))


def group(rows: Sequence[Example]) -> dict[str, list[str]]:
    """The ids of each task's rows, in the order given; tasks by name."""
    tasks: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        tasks[row.task].append(row.id)
    return dict(sorted(tasks.items()))


def fill(
    by_task: Mapping[str, Sequence[str]], asked: Mapping[str, int], expand_share: float
) -> tuple[list[str], dict[str, int]]:
    """(hard rows chosen, new rows wanted of each task) that together are what was asked of each task."""
    chosen: list[str] = []
    expand: dict[str, int] = {}
    for task, ids in by_task.items():
        old = min(len(ids), asked[task] - round(expand_share * asked[task]))
        chosen += ids[:old]
        if asked[task] > old:
            expand[task] = asked[task] - old
    return chosen, expand


def fractions(rows: Mapping[str, int]) -> dict[str, float]:
    """Numbers of rows as shares of their sum, to four places."""
    total = max(1, sum(rows.values()))
    return {task: round(count / total, 4) for task, count in rows.items()}


def remarks(
    rows: Sequence[Example], hard: Sequence[Example], easy: Sequence[str], replay: Sequence[str], wanted: int
) -> tuple[str, ...]:
    """What the reader ought to know of an unusual pool."""
    mastered = sorted({row.task for row in rows} - {row.task for row in hard})
    said = {
        "no row is hard: the round only replays easy rows": rows and not hard,
        "no row is easy: the whole round is hard": rows and not easy,
        f"{wanted - len(replay):,} easy rows fewer than asked": easy and len(replay) < wanted,
        f"no hard row in {', '.join(mastered)}: the other tasks have their shares": hard and mastered,
    }
    return tuple(text for text, true in said.items() if true)


Plan = Callable[
    [Sequence[Example], Sequence[Judgement], Mapping[str, float], Curriculum, int, bool, random.Random], RoundPlan
]
CURRICULA: Mapping[str, Plan] = {"tapir": tapir}
