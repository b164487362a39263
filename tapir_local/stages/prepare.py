"""The preparation of a run: read the seeds, label them, set the holdout apart, and have the teacher answer them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tapir_local.data.dataset import (
    FaultyRow,
    ParsedSeeds,
    count_tasks,
    parse_seeds,
    remove_near_duplicates,
    split_holdout,
)
from tapir_local.data.files import read_table
from tapir_local.data.formats import Table
from tapir_local.data.seed_digest import digest_seeds, record_seed_digest
from tapir_local.errors import TapirError
from tapir_local.files import read_rows, write_rows
from tapir_local.method import prompts
from tapir_local.printable import format_count
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Example
from tapir_local.stages.context import Stage, Work
from tapir_local.stages.labeling import classify_stage, label_stage, tasks_stage
from tapir_local.stages.row_check import fold_system_turns
from tapir_local.stages.run_rows import answer_rows, split_askable, split_trainable
from tapir_local.unusable import MAX_TEXT_KEPT, Unusable, format_left_out

SEED_WITHOUT_ANSWER = "no answer in the seed file"  # a reason in unusable.jsonl; existing files have it
WARN_SHARE, WARN_ROWS = 0.2, 3  # near-duplicates, as a share of the rows and in number, above which to warn


def read_stage(work: Work, out: Path) -> str:
    """Read the seed file as examples; duplicates and near-duplicates are left out and kept in rejected-seeds.jsonl."""
    recipe = work.recipe
    source, table = digest_seeds(recipe.seeds), read_table(recipe.seeds)
    found = parse_seeds(table, recipe.task_table())
    if recipe.seeds.unusable == "refuse" or not found.examples:
        found.refuse()
    examples, folds, unfit = usable_seeds(work, found.examples)
    unusable = [*(unreadable_seed(work, table, row) for row in found.faulty), *unfit]
    leave_out_seeds(work, found, unusable)
    refuse_without_answers(recipe, found, examples)
    total = len(examples)
    examples, alike = remove_near_duplicates(
        examples, recipe.seeds.max_rouge, lambda done: work.progress(done, total, "compared")
    )
    left = describe_duplicates(len(found.duplicates), len(alike)) + describe_folds(folds) + format_left_out(unusable)
    notes = [*table.notes, describe_unread_columns(found.unread), warn_near_duplicates(len(alike), total)]
    notes += [describe_unused_answers(recipe, examples)]
    examples = sample_seeds(work, examples, table.where)
    # These files come first: once rows.jsonl exists, the stage is done.
    write_rows(work.run.path / "rejected-seeds.jsonl", [*found.duplicates, *alike])
    record_seed_digest(work.run, source, len(table.rows))
    write_rows(out, examples)
    return "; ".join(filter(None, [format_count(len(examples), "row") + left, *notes]))


def usable_seeds(work: Work, rows: Sequence[Example]) -> tuple[list[Example], int, list[Unusable]]:
    """(rows that the student can be asked and, with answers from the file, trained on; folded system turns; the rest).

    This is everything that can be known about a row before anything is paid for it.
    """
    if not rows:
        return [], 0, []
    kept, folds = fold_system_turns(work.backends.student_format(), rows)
    kept, unusable = split_askable(work, kept)
    if uses_file_answers(work.recipe) and any(row.completion for row in kept):
        unusable += [work.unusable(row, SEED_WITHOUT_ANSWER) for row in kept if not row.completion]
        kept, unfit = split_trainable(work, [row for row in kept if row.completion])
        unusable += unfit
    return kept, folds, unusable


def describe_unused_answers(recipe: Recipe, rows: Sequence[Example]) -> str:
    """A remark that the teacher also answers rows that have answers; "" if it does not. The pocket seeds are ours."""
    answered = sum(bool(row.completion) for row in rows)
    if uses_file_answers(recipe) or recipe.seeds.path == "pocket" or not answered:
        return ""
    have = format_count(answered, "row has an answer", "rows have answers")
    return f"{have}, but the teacher writes its own (seeds.answers: file keeps yours)"


def uses_file_answers(recipe: Recipe) -> bool:
    """Whether the seeds' answers are taken from the seed file."""
    return not recipe.can_expand or recipe.seeds.answers == "file"


def unreadable_seed(work: Work, table: Table, row: FaultyRow) -> Unusable:
    """The record of a row that cannot be read, identified by its line."""
    fault = row.fault
    detail = "" if fault.said == fault.kind else fault.said
    place = f"{Path(table.where).name}, {table.unit} {row.number}"
    return Unusable(work.step, place, fault.kind, detail, row.text[:MAX_TEXT_KEPT])


def leave_out_seeds(work: Work, found: ParsedSeeds, unusable: Sequence[Unusable]) -> None:
    """Leave out the unusable rows; if they are too many for one single reason, the error is about that reason."""
    try:
        work.leave_out(unusable, len(found.table.rows))
    except TapirError:
        if len({row.kind for row in unusable}) == 1:
            found.refuse()
        raise


def refuse_without_answers(recipe: Recipe, found: ParsedSeeds, examples: Sequence[Example]) -> None:
    """TapirError if the recipe takes the file's answers and no row has one."""
    if not uses_file_answers(recipe) or any(row.completion for row in examples):
        return
    found.refuse()  # the answers may be in the rows that cannot be read
    raise TapirError(
        "no row has an answer, but the recipe takes the answers from the file",
        where=found.table.where,
        fix="Set seeds.answers: teacher.",
    )


def sample_seeds(work: Work, examples: list[Example], where: str) -> list[Example]:
    """A random sample of seeds.limit rows; TapirError if the holdout would leave no row to train on."""
    limit, held = work.recipe.seeds.limit, work.recipe.seeds.holdout
    if limit is not None and limit < len(examples):
        kept = set(work.rng("read").sample(range(len(examples)), limit))
        examples = [example for number, example in enumerate(examples) if number in kept]
    if len(examples) <= held:
        raise TapirError(
            f"not enough rows to train on: {len(examples):,} in all, and the holdout takes {held:,}",
            where=where,
            fix=f"Add rows or lower seeds.holdout: --set seeds.holdout={max(1, len(examples) // 5)}",
        )
    return examples


def describe_folds(folds: int) -> str:
    """`, 4 system turns moved into the user turn (…)`; "" if there are none."""
    if not folds:
        return ""
    turns = format_count(folds, "system turn")
    return f", {turns} moved into the user turn (the chat template has no system role)"


def describe_duplicates(duplicates: int, alike: int) -> str:
    """`, 3 duplicates and 1 near-duplicate left out (rejected-seeds.jsonl)`; "" if there are none."""
    counts = ((duplicates, "duplicate"), (alike, "near-duplicate"))
    found = [format_count(count, name) for count, name in counts if count]
    return f", {' and '.join(found)} left out (rejected-seeds.jsonl)" if found else ""


def describe_unread_columns(unread: Mapping[str, int], most: int = 5) -> str:
    """`not read: column 'notes' (12 rows)`; "" if all text was read."""
    names = [f"{name} ({format_count(count, 'row')})" for name, count in unread.items()]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"not read: {', '.join(names[:most])}{more}" if names else ""


def warn_near_duplicates(alike: int, rows: int) -> str:
    """A warning if many rows are near-duplicates; else ""."""
    if alike < WARN_ROWS or alike <= WARN_SHARE * rows:
        return ""
    return (
        f"WARNING: {alike / rows:.0%} of the rows are near-duplicates of others. See rejected-seeds.jsonl; "
        "a higher seeds.max_rouge keeps more of them, null keeps all"
    )


def read_labelled_rows(work: Work) -> list[Example]:
    """Every row with its task."""
    return read_rows(Example, work.run.path / "labelled.jsonl")


def holdout_stage(work: Work, out: Path) -> str:
    """Set rows of each task apart, with the teacher's answers to compare with."""
    held, _ = split_holdout(read_labelled_rows(work), work.recipe.seeds.holdout, work.rng("holdout"))
    kept, unusable = answer_seeds(work, held, "holdout")
    work.leave_out(unusable, len(held))
    write_rows(out, kept)
    tasks = format_count(len(count_tasks(kept)), "task")
    return f"{format_count(len(kept), 'row')} of {tasks}" + format_left_out(unusable)


def seeds_stage(work: Work, out: Path) -> str:
    """The other rows, with the teacher's answers to train on."""
    _, rest = split_holdout(read_labelled_rows(work), work.recipe.seeds.holdout, work.rng("holdout"))
    kept, unusable = answer_seeds(work, rest, "seeds")
    work.leave_out(unusable, len(rest))
    write_rows(out, kept)
    return format_count(len(kept), "row") + format_left_out(unusable)


def answer_seeds(work: Work, rows: Sequence[Example], stage: str) -> tuple[list[Example], list[Unusable]]:
    """(rows with an answer, from the file if the recipe says so, else from the teacher; records of the others)."""
    if uses_file_answers(work.recipe):
        unanswered = [work.unusable(row, SEED_WITHOUT_ANSWER) for row in rows if not row.completion]
        return [row for row in rows if row.completion], unanswered
    # The holdout is never trained on, so its answers need not pass the chat template unchanged.
    return answer_rows(
        work, stage, rows, [prompts.answer_prompt(row.prompt) for row in rows], trained=stage != "holdout"
    )


PREPARE_STAGES = (
    Stage("read", "rows.jsonl", read_stage),
    Stage("label", "labels.jsonl", label_stage),
    Stage("classify", "classifier", classify_stage),
    Stage("tasks", "labelled.jsonl", tasks_stage),
    Stage("holdout", "holdout.jsonl", holdout_stage),
    Stage("seeds", "seeds.jsonl", seeds_stage),
)
