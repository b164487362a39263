"""What happened to one row: its scores in every round, why a plan used it or not, its new rows, its cost."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text

from tapir_local.data.dataset import Draft
from tapir_local.errors import TapirError
from tapir_local.files import read_record, read_rows
from tapir_local.method.baselines import LION_THRESHOLD
from tapir_local.method.curriculum import is_easy, is_hard, is_taught, is_teachable
from tapir_local.method.judging import mfd
from tapir_local.pipeline.loop import kept_recipe, last_round
from tapir_local.printable import format_count
from tapir_local.recipe.curriculum_settings import POOL_CURRICULA, Curriculum, judges_pool
from tapir_local.records import Example, Judgement, Message, RoundPlan, instruction_of
from tapir_local.report.costs import cost_table, summarize_costs
from tapir_local.report.tables import score_pair_cell, text_table
from tapir_local.run_dir import RunDir
from tapir_local.tables import PlainTable, plain_text
from tapir_local.unusable import read_unusable

MAX_IDS_NAMED = 5  # ids in the error if several rows match


@dataclass(frozen=True)
class RowInRound:
    """A row in one round. `use` is what the plan used it for, "" if nothing; `why` gives the reason.

    Scores are those of the pool's judgement or, for a row of the holdout, of the holdout's; None if there is none.
    """

    round: int
    teacher: float | None
    student: float | None
    mfd: float | None
    use: str
    why: str
    trained: bool


def explain_row(run: RunDir, named: str) -> dict[str, Any]:
    """All that the files of a run and the store contain on a row, given its id or words that only its instruction has.

    TapirError if no row or several rows match.
    """
    drafts = read_drafts(run)
    known = read_all_rows(run, drafts)
    row = find_row(run, known, named)
    draft = next((draft for _, draft in drafts if draft.example.id == row.id), None)
    store = run.cache / "teacher.db"
    return {
        "run": run.name,
        "id": row.id,
        "task": row.task,
        "labelled_by": row.labelled_by,
        "instruction": instruction_of(row.prompt),
        "answer": row.completion,
        "place": row_origin(run, row, draft),
        "left_out": [
            {"step": lost.step, "kind": lost.kind, "detail": lost.detail}
            for lost in read_unusable(run)
            if lost.id == row.id
        ],
        "rounds": [asdict(line) for line in row_in_rounds(run, row, {id: other.task for id, other in known.items()})],
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
        "cost": summarize_costs(store, "stage", run.name, None, row.id) if store.exists() else [],
    }


def read_all_rows(run: RunDir, drafts: Sequence[tuple[int, Draft]]) -> dict[str, Example]:
    """Every row in the files of a run, by id, each with its newest answer."""
    files = [
        run.path / name for name in ("rows.jsonl", "labels.jsonl", "labelled.jsonl", "seeds.jsonl", "holdout.jsonl")
    ]
    rows = {lost.id: Example(lost.id, (Message("user", lost.text),)) for lost in read_unusable(run)}
    rows |= {lost.example.id: lost.example for lost in read_rejected_seeds(run)}
    rows |= {row.id: row for file in files if file.exists() for row in read_rows(Example, file)}
    rows |= {draft.example.id: draft.example for _, draft in drafts}
    on_pairs = kept_recipe(run).pairs_round  # its answers may be older than the newest
    for number in range(last_round(run) + 1):
        rows |= {row.id: row for row in read_training_rows(run, number)} if number != on_pairs else {}
    return rows


def read_rejected_seeds(run: RunDir) -> list[Draft]:
    """The seeds that were rejected as duplicates; [] until the seeds are read."""
    path = run.path / "rejected-seeds.jsonl"
    return read_rows(Draft, path) if path.exists() else []


def read_drafts(run: RunDir) -> list[tuple[int, Draft]]:
    """(round, draft) of every new instruction, kept or rejected."""
    paths = [(number, run.round(number) / "expanded.jsonl") for number in range(1, last_round(run) + 1)]
    return [(number, draft) for number, path in paths if path.exists() for draft in read_rows(Draft, path)]


def read_training_rows(run: RunDir, number: int) -> list[Example]:
    """The training rows of a round; [] until they exist."""
    path = run.round(number) / "train.jsonl"
    return read_rows(Example, path) if path.exists() else []


def read_judgements(run: RunDir, number: int, name: str) -> dict[str, Judgement]:
    """The judgements of a round, by id; {} until they exist."""
    path = run.round(number) / f"{name}.jsonl"
    return {judgement.id: judgement for judgement in read_rows(Judgement, path)} if path.exists() else {}


def same_number(named: str, known: Iterable[str]) -> list[str]:
    """The id with the same beginning and number, such as seed-00017 for `seed-17`; [] if there is none."""
    head, _, number = named.rpartition("-")
    if not number.isdecimal():
        return []
    numbered = (id.rpartition("-") for id in known)
    return [
        "-".join((start, digits))
        for start, _, digits in numbered
        if start == head and digits.lstrip("0") == number.lstrip("0")
    ]


def find_row(run: RunDir, known: Mapping[str, Example], named: str) -> Example:
    """The row with this id, or the only one whose instruction contains these words; TapirError if there is none."""
    if named in known:
        return known[named]
    words = named.casefold()
    matches = [row for row in known.values() if words in instruction_of(row.prompt).casefold()]
    if len(matches) == 1:
        return matches[0]
    if matches:
        ids = ", ".join(row.id for row in matches[:MAX_IDS_NAMED])
        more = f" and {len(matches) - MAX_IDS_NAMED:,} more" if len(matches) > MAX_IDS_NAMED else ""
        raise TapirError(
            f"{len(matches):,} rows have {named!r} in their instruction: {ids}{more}", fix="Name one row by its id."
        )
    similar = same_number(named, known) or difflib.get_close_matches(named, known, 3)
    raise TapirError(
        f"run {run.name!r} has no row {named!r}",
        where=str(run.path),
        fix=(f"Did you mean {' or '.join(similar)}? " if similar else "")
        + "Name a row by its id (see the .jsonl files of the run) or by words that only its instruction has.",
    )


def row_origin(run: RunDir, row: Example, draft: Draft | None) -> str:
    """Where a row comes from, and what it is used for."""
    if draft:
        result = f"rejected: {draft.reason}" if draft.reason else "kept"
        return f"written by the teacher in round {row.round}, from {row.parent}; {result}"
    for name, words in (("holdout", "in the holdout: never trained on, never expanded"), ("seeds", "a seed")):
        path = run.path / f"{name}.jsonl"
        if path.exists() and any(other.id == row.id for other in read_rows(Example, path)):
            return words
    if twin := next((other for other in read_rejected_seeds(run) if other.example.id == row.id), None):
        return f"read from the seed file and left out: {twin.reason}, of {twin.near}"
    if lost := next((other for other in read_unusable(run) if other.id == row.id), None):
        return f"left out in {lost.step}: {lost.reason}"
    return "read from the seed file; not among the seeds (yet)"


def row_in_rounds(run: RunDir, row: Example, tasks: Mapping[str, str]) -> Iterator[RowInRound]:
    """The row in each round that has begun. `tasks` are the tasks of all rows, by id."""
    if was_left_out_in_preparation(run, row):
        return
    recipe = kept_recipe(run)
    held = {other.id for other in read_rows(Example, run.path / "holdout.jsonl")} if has_holdout(run) else set()
    for number in range(last_round(run) + 1):
        trained = any(other.id == row.id for other in read_training_rows(run, number))
        if row.id in held:
            judgement = read_judgements(run, number, "holdout-judgements").get(row.id)
            yield row_in_round(number, judgement, "", "a row of the holdout", False)
        elif number == 0:
            reason = "drawn for the first training" if trained else "not drawn for the first training"
            yield row_in_round(number, None, "drawn" if trained else "", reason, trained)
        elif number == recipe.pairs_round:
            reason = "both answers are a preference pair" if trained else "in no preference pair"
            yield row_in_round(number, None, "pair" if trained else "", reason, trained)
        elif row.round < number or row.origin == "seed":
            yield pool_row_in_round(run, number, row, recipe.curriculum, trained, tasks)
        elif row.round == number and trained:
            yield row_in_round(number, None, "new", "a new row", trained)


def was_left_out_in_preparation(run: RunDir, row: Example) -> bool:
    """Whether a row was left out before the first round."""
    if any(lost.id == row.id and lost.step.startswith("prepare/") for lost in read_unusable(run)):
        return True
    return any(twin.example.id == row.id for twin in read_rejected_seeds(run))


def has_holdout(run: RunDir) -> bool:
    """Whether the run has its holdout yet."""
    return (run.path / "holdout.jsonl").exists()


def row_in_round(number: int, judgement: Judgement | None, use: str, reason: str, trained: bool) -> RowInRound:
    """The record of a row in a round, with the scores of its judgement."""
    if judgement is None:
        return RowInRound(number, None, None, None, use, reason, trained)
    return RowInRound(number, judgement.teacher, judgement.student, mfd(judgement), use, reason, trained)


def pool_row_in_round(
    run: RunDir, number: int, row: Example, settings: Curriculum, trained: bool, tasks: Mapping[str, str]
) -> RowInRound:
    """The record of a row that a round's pool may contain, before or after the round is planned."""
    judged, path = read_judgements(run, number, "judgements"), run.round(number) / "plan.json"
    judgement = judged.get(row.id)
    if not path.exists():
        return row_in_round(number, judgement, "", "the round is not planned yet", trained)
    plan = read_record(RoundPlan, path)
    use = plan_use(plan, row.id)
    if plan.curriculum not in POOL_CURRICULA:
        count = len(plan.drawn) + len(plan.reflected)
        drawn = f"{count:,} of {format_count(plan.pool, 'row')} were drawn"
        reason = f"{plan.curriculum}: {'drawn' if use else 'not drawn'}; {drawn}"
    elif judgement is None and judges_pool(settings):
        reason = "not in this round's pool, which is drawn at random"
    elif judgement is None:
        reason = "difficulty is off: " + ("drawn at random" if use else "not drawn")
    else:
        verdict = difficulty_verdict(judgement, settings)
        reason = f"{verdict}; {plan_reason(plan, judgement, list(judged.values()), settings, tasks)}"
    if any(row.id in expansion.parents for expansion in plan.expansions):
        reason += "; new rows may be written from it"
    return row_in_round(number, judgement, use, reason, trained)


def plan_use(plan: RoundPlan, id: str) -> str:
    """What a plan uses a row for: `hard`, `replay`, `drawn` or `reflected`; "" if nothing."""
    return next((use for use in ("hard", "replay", "drawn", "reflected") if id in getattr(plan, use)), "")


def difficulty_verdict(judgement: Judgement, settings: Curriculum) -> str:
    """Hard, easy or neither, with the numbers that decide it."""
    difficulty = mfd(judgement)
    if difficulty is None:
        return f"unjudged: {judgement.reason}"
    if settings.name == "lion":
        verdict = "hard" if difficulty >= LION_THRESHOLD else "easy"
        return f"{verdict}: MFD {difficulty:g}, hard from {LION_THRESHOLD:g}"
    if not is_teachable(judgement, settings):
        return f"the teacher's own score {judgement.teacher:g} is below teacher_floor {settings.teacher_floor:g}"
    hard = is_hard(judgement, settings)
    return f"{'hard' if hard else 'easy'}: MFD {difficulty:g} {'>' if hard else '<='} {settings.mfd_threshold:g}"


def plan_reason(
    plan: RoundPlan,
    judgement: Judgement,
    judged: Sequence[Judgement],
    settings: Curriculum,
    tasks: Mapping[str, str],
) -> str:
    """Why a plan uses a judged row or not."""
    use = plan_use(plan, judgement.id)
    if plan.curriculum == "lion":
        return "Lion trains only on new rows"
    if not is_teachable(judgement, settings):
        return "neither trained on nor replayed"
    if not is_hard(judgement, settings):
        easy = sum(is_easy(other, settings) for other in judged)
        drawn = f"{len(plan.replay):,} of {format_count(easy, 'easy row')} were drawn"
        return f"{'replayed' if use else 'not replayed'}: {drawn}"
    if judgement.id in plan.aside:
        return "set aside: its MFD was above mfd_ceiling in its last judgement too; the next round judges it again"
    task = tasks[judgement.id]
    if not is_taught(task, plan.mastery):
        return f"not selected: {task_reason(plan, task)}"
    rivals = [other for other in judged if tasks.get(other.id) == task and is_hard(other, settings)]
    harder = sum((mfd(other) or 0.0) > (mfd(judgement) or 0.0) for other in rivals)
    count = sum(tasks.get(id) == task for id in plan.hard)
    of_task = f"{harder:,} of {format_count(len(rivals), 'hard row')} of {task} {'is' if harder == 1 else 'are'} harder"
    selected = format_count(count, "was", "were")
    said = "selected" if use else "not selected"
    about = task_reason(plan, task)
    return f"{said}: {of_task}; {selected} selected, the hardest first, ties at random{about and f'; {about}'}"


def task_reason(plan: RoundPlan, task: str) -> str:
    """What `curriculum.mastery` and `curriculum.learnable` found about a task; "" without them."""
    said = []
    if found := plan.mastery.get(task):
        state = "mastered" if found.state == "mastered" else "not mastered"
        waits = ", but tasks with larger gaps come first" if found.state == "waiting" else ""
        said.append(f"gap {found.gap:.1f}, {state}{waits}")
    if (learning := plan.learning.get(task)) and plan.round > 1:
        rows = format_count(learning.trained, "hard row")
        said.append(f"{learning.learned:,} of {rows} of the last round learned, weight {learning.factor:.2f}")
    return f"task {task}: {', '.join(said)}" if said else ""


def why_tables(found: Mapping[str, Any]) -> list[PlainTable | Text]:
    """What happened to a row: what it is, each round, the rows that were written from it, its cost."""
    head = plain_text(
        f"{found['id']} of run {found['run']}: {found['place']}\n"
        f"task {found['task'] or 'not known yet'}, labeled by {found['labelled_by'] or 'nobody yet'}\n"
        f"{found['instruction']}\n-> {found['answer']}\n"
    )
    cells = [
        [
            str(row["round"]),
            score_pair_cell([row["student"], row["teacher"]]),
            "-" if row["mfd"] is None else f"{row['mfd']:g}",
            row["use"],
            row["why"],
            "yes" if row["trained"] else "no",
        ]
        for row in found["rounds"]
    ]
    columns = ["round", "scores", "MFD", "use", "why", "trained"]
    tables: list[PlainTable | Text] = [
        head,
        text_table(
            "round by round", columns, cells, whole=[name for name in columns if name != "why"], ranks={"trained": 1}
        ),
    ]
    if found["left_out"]:
        lost = [[row["step"], row["kind"], row["detail"]] for row in found["left_out"]]
        tables.append(text_table("where it was left out", ["step", "reason", "details"], lost, whole=["step"]))
    if found["grew"]:
        grew = [[str(new["round"]), new["id"], new["reason"] or "kept", new["instruction"]] for new in found["grew"]]
        columns = ["round", "row", "kept, or why not", "instruction"]
        tables.append(text_table("rows written from it", columns, grew, whole=["round", "row"]))
    return [*tables, cost_table("what it cost", found["cost"], "stage")] if found["cost"] else tables
