"""What became of one row: its scores in every round, why a plan took it or not, what grew from it, what it cost."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tapir_local.data.dataset import Draft
from tapir_local.errors import TapirError
from tapir_local.files import read_record, read_rows
from tapir_local.method.baselines import LION_THRESHOLD
from tapir_local.method.curriculum import is_easy, is_hard, is_teachable
from tapir_local.method.judging import mfd
from tapir_local.pipeline.loop import kept_recipe, rounds_begun
from tapir_local.recipe.schema import POOL_CURRICULA, Curriculum, judges_pool
from tapir_local.records import Example, Judgement, Message, RoundPlan, instruction_of
from tapir_local.report.costs import costs
from tapir_local.run_dir import RunDir
from tapir_local.unusable import read_unusable

NAMED = 5  # rows named where several have the words


@dataclass(frozen=True)
class Round:
    """A row in one round. `use` is what the plan made of it, "" nothing; `why` says why in words.

    Scores are of the pool's judgement, or of the holdout's; None where there is none.
    """

    round: int
    teacher: float | None
    student: float | None
    mfd: float | None
    use: str
    why: str
    trained: bool


def why(run: RunDir, named: str) -> dict[str, Any]:
    """All that a run's files and the store say of a row, given its id or words that only its instruction has.

    TapirError when the run has no such row, or several.
    """
    drafts = drafts_of(run)
    known = rows_of(run, drafts)
    row = found(run, known, named)
    draft = next((draft for _, draft in drafts if draft.example.id == row.id), None)
    store = run.cache / "teacher.db"
    return {
        "run": run.name,
        "id": row.id,
        "task": row.task,
        "labelled_by": row.labelled_by,
        "instruction": instruction_of(row.prompt),
        "answer": row.completion,
        "place": place(run, row, draft),
        "left_out": [
            {"step": lost.step, "kind": lost.kind, "detail": lost.detail}
            for lost in read_unusable(run)
            if lost.id == row.id
        ],
        "rounds": [asdict(line) for line in rounds_of(run, row, {id: other.task for id, other in known.items()})],
        "grew": [
            {
                "round": number,
                "id": draft.example.id,
                "reason": draft.reason,
                "instruction": instruction_of(draft.example.prompt),
            }
            for number, draft in drafts
            if draft.example.parent == row.id
        ],
        "cost": costs(store, "stage", run.name, None, row.id) if store.exists() else [],
    }


def rows_of(run: RunDir, drafts: Sequence[tuple[int, Draft]]) -> dict[str, Example]:
    """Every row that a run has met, by id, each with its newest answer."""
    files = [
        run.path / name for name in ("rows.jsonl", "labels.jsonl", "labelled.jsonl", "seeds.jsonl", "holdout.jsonl")
    ]
    rows = {lost.id: Example(lost.id, (Message("user", lost.text),)) for lost in read_unusable(run)}
    rows |= {lost.example.id: lost.example for lost in rejected(run)}
    rows |= {row.id: row for file in files if file.exists() for row in read_rows(Example, file)}
    rows |= {draft.example.id: draft.example for _, draft in drafts}
    for number in range(rounds_begun(run) + 1):
        rows |= {row.id: row for row in trained_on(run, number)}
    return rows


def rejected(run: RunDir) -> list[Draft]:
    """The seeds that resemble another one, [] until they are read."""
    path = run.path / "rejected-seeds.jsonl"
    return read_rows(Draft, path) if path.exists() else []


def drafts_of(run: RunDir) -> list[tuple[int, Draft]]:
    """(round, draft) of every new instruction that a run has seen, kept or not."""
    paths = [(number, run.round(number) / "expanded.jsonl") for number in range(1, rounds_begun(run) + 1)]
    return [(number, draft) for number, path in paths if path.exists() for draft in read_rows(Draft, path)]


def trained_on(run: RunDir, number: int) -> list[Example]:
    """A round's training rows, [] until they are there."""
    path = run.round(number) / "train.jsonl"
    return read_rows(Example, path) if path.exists() else []


def found(run: RunDir, known: Mapping[str, Example], named: str) -> Example:
    """The row of this id, or the one whose instruction has these words."""
    if named in known:
        return known[named]
    words = named.casefold()
    having = [row for row in known.values() if words in instruction_of(row.prompt).casefold()]
    if len(having) == 1:
        return having[0]
    if having:
        ids = ", ".join(row.id for row in having[:NAMED])
        more = f" and {len(having) - NAMED:,} more" if len(having) > NAMED else ""
        raise TapirError(
            f"{len(having):,} rows have {named!r} in their instruction: {ids}{more}", fix="Name one by id."
        )
    near = difflib.get_close_matches(named, known, 3)
    raise TapirError(
        f"run {run.name!r} has no row {named!r}",
        where=str(run.path),
        fix=(f"Did you mean {' or '.join(near)}? " if near else "")
        + "A row is named by its id (they stand in the .jsonl files) or by words that only its instruction has.",
    )


def place(run: RunDir, row: Example, draft: Draft | None) -> str:
    """Where a row comes from and what it is for."""
    if draft:
        fate = f"rejected: {draft.reason}" if draft.reason else "kept"
        return f"written by the teacher in round {row.round}, from {row.parent}; {fate}"
    for name, words in (("holdout", "of the holdout: never trained on, never expanded"), ("seeds", "a seed")):
        path = run.path / f"{name}.jsonl"
        if path.exists() and any(other.id == row.id for other in read_rows(Example, path)):
            return words
    if twin := next((other for other in rejected(run) if other.example.id == row.id), None):
        return f"read from the seed file and left out: {twin.reason}, of {twin.near}"
    if lost := next((other for other in read_unusable(run) if other.id == row.id), None):
        return f"left out in {lost.step}: {lost.reason}"
    return "read from the seed file; not among the seeds (yet)"


def rounds_of(run: RunDir, row: Example, tasks: Mapping[str, str]) -> Iterator[Round]:
    """The row in each round that has begun; `tasks` are those of all rows."""
    if left_out_at_first(run, row):
        return
    settings = kept_recipe(run).curriculum
    held = {other.id for other in read_rows(Example, run.path / "holdout.jsonl")} if has_holdout(run) else set()
    for number in range(rounds_begun(run) + 1):
        trained = any(other.id == row.id for other in trained_on(run, number))
        if row.id in held:
            judgement = judgements_of(run, number, "holdout-judgements").get(row.id)
            yield line(number, judgement, "", "a row of the holdout", False)
        elif number == 0:
            said = "drawn for the student's first training" if trained else "not drawn for the first training"
            yield line(number, None, "drawn" if trained else "", said, trained)
        elif row.round < number or row.origin == "seed":
            yield in_round(run, number, row, settings, trained, tasks)
        elif row.round == number and trained:
            yield line(number, None, "new", "a new row", trained)


def left_out_at_first(run: RunDir, row: Example) -> bool:
    """Whether a row was left out in the preparation, so that no round has met it."""
    if any(lost.id == row.id and lost.step.startswith("prepare/") for lost in read_unusable(run)):
        return True
    return any(twin.example.id == row.id for twin in rejected(run))


def has_holdout(run: RunDir) -> bool:
    """Whether the run has come as far as its holdout."""
    return (run.path / "holdout.jsonl").exists()


def line(number: int, judgement: Judgement | None, use: str, said: str, trained: bool) -> Round:
    """A round's record of a row."""
    if judgement is None:
        return Round(number, None, None, None, use, said, trained)
    return Round(number, judgement.teacher, judgement.student, mfd(judgement), use, said, trained)


def judgements_of(run: RunDir, number: int, name: str) -> dict[str, Judgement]:
    """A round's judgements by id, none until they are there."""
    path = run.round(number) / f"{name}.jsonl"
    return {judgement.id: judgement for judgement in read_rows(Judgement, path)} if path.exists() else {}


def in_round(
    run: RunDir, number: int, row: Example, settings: Curriculum, trained: bool, tasks: Mapping[str, str]
) -> Round:
    """A row of the pool in a round with a plan, or without one yet."""
    judged, path = judgements_of(run, number, "judgements"), run.round(number) / "plan.json"
    judgement = judged.get(row.id)
    if not path.exists():
        return line(number, judgement, "", "the round is not planned yet", trained)
    plan = read_record(RoundPlan, path)
    use = use_of(plan, row.id)
    if plan.curriculum not in POOL_CURRICULA:
        taken = len(plan.drawn) + len(plan.reflected)
        said = f"{plan.curriculum}: {'taken' if use else 'not drawn'}, {taken:,} of {plan.pool:,} were"
    elif judgement is None and judges_pool(settings):
        said = "not in this round's pool, which is drawn at random"
    elif judgement is None:
        said = "difficulty is off: " + ("drawn at random" if use else "not drawn")
    else:
        said = f"{verdict_of(judgement, settings)}; {fate(plan, judgement, list(judged.values()), settings, tasks)}"
    parents = any(row.id in expansion.parents for expansion in plan.expansions)
    return line(number, judgement, use, said + ("; new rows may grow from it" if parents else ""), trained)


def use_of(plan: RoundPlan, id: str) -> str:
    """What a plan makes of a row: `hard`, `replay`, `drawn`, `reflected`, or nothing."""
    return next((use for use in ("hard", "replay", "drawn", "reflected") if id in getattr(plan, use)), "")


def verdict_of(judgement: Judgement, settings: Curriculum) -> str:
    """Hard, easy, or neither, and by which numbers."""
    difficulty = mfd(judgement)
    if difficulty is None:
        return f"unjudged: {judgement.reason}"
    if settings.name == "lion":
        return f"{'hard' if difficulty >= LION_THRESHOLD else 'easy'}: MFD {difficulty:g}, hard from {LION_THRESHOLD:g}"
    if not is_teachable(judgement, settings):
        return f"the teacher's own score {judgement.teacher:g} is below teacher_floor {settings.teacher_floor:g}"
    hard = is_hard(judgement, settings)
    return f"{'hard' if hard else 'easy'}: MFD {difficulty:g} {'>' if hard else '<='} {settings.mfd_threshold:g}"


def fate(
    plan: RoundPlan,
    judgement: Judgement,
    judged: Sequence[Judgement],
    settings: Curriculum,
    tasks: Mapping[str, str],
) -> str:
    """Why a judged row was taken or not."""
    use = use_of(plan, judgement.id)
    if plan.curriculum == "lion":
        return "Lion trains on new rows alone"
    if not is_teachable(judgement, settings):
        return "neither trained on nor replayed"
    if not is_hard(judgement, settings):
        easy = sum(is_easy(other, settings) for other in judged)
        return f"{'replayed' if use else 'not replayed'}: {len(plan.replay):,} of {easy:,} easy rows were drawn"
    task = tasks[judgement.id]
    rivals = [other for other in judged if tasks.get(other.id) == task and is_hard(other, settings)]
    harder = sum((mfd(other) or 0.0) > (mfd(judgement) or 0.0) for other in rivals)
    taken = sum(tasks.get(id) == task for id in plan.hard)
    return (
        f"{'taken' if use else 'not taken'}: of {len(rivals):,} hard rows of {task} {harder:,} are harder, "
        f"{taken:,} were taken, the hardest first and equals by chance"
    )
