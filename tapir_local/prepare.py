"""PREPARE: read the seeds, label them, set the holdout apart, and have the teacher answer; once for a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tapir_local import judging, prompts
from tapir_local.classifier import Prediction
from tapir_local.dataset import count_tasks, read_seeds, split_holdout, without_near
from tapir_local.errors import TapirError
from tapir_local.recipe import Recipe
from tapir_local.records import Example
from tapir_local.rundir import read_record, read_rows, write_rows
from tapir_local.seedfiles import read_table
from tapir_local.work import Stage, Work, lost


def read(work: Work, out: Path) -> str:
    """The seeds' rows as examples; duplicates and near-duplicates are left out, and kept in rejected-seeds.jsonl."""
    recipe = work.recipe
    table = read_table(recipe.seeds)
    examples, duplicates = read_seeds(table, recipe.task_table())
    if answered_by_file(recipe) and not any(row.completion for row in examples):
        raise TapirError(
            "no row has an answer, and the recipe takes the file's",
            where=table.where,
            fix="Set seeds.answers: teacher.",
        )
    examples, alike = without_near(
        examples, recipe.seeds.max_rouge, lambda done: work.progress(done, len(examples), "compared")
    )
    limit = recipe.seeds.limit
    if limit is not None and limit < len(examples):
        kept = set(work.chance("read").sample(range(len(examples)), limit))
        examples = [example for number, example in enumerate(examples) if number in kept]
    if len(examples) <= recipe.seeds.holdout:
        raise TapirError(
            f"{len(examples)} rows are too few for a holdout of {recipe.seeds.holdout} and something to train on",
            where=table.where,
            fix="Add rows or set seeds.holdout lower.",
        )
    write_rows(
        work.run.path / "rejected-seeds.jsonl", [*duplicates, *alike]
    )  # first: with rows.jsonl the stage is done
    write_rows(out, examples)
    return f"{len(examples):,} rows" + left_out(len(duplicates), len(alike))


def answered_by_file(recipe: Recipe) -> bool:
    """Whether the seeds' answers are the file's own."""
    return not recipe.can_expand or recipe.seeds.answers == "file"


def left_out(duplicates: int, alike: int) -> str:
    """`, 3 duplicates and 1 near-duplicate left out (rejected-seeds.jsonl)`, of those that there are."""
    counts = ((duplicates, "duplicate"), (alike, "near-duplicate"))
    found = [f"{count:,} {name}{'s' if count > 1 else ''}" for count, name in counts if count]
    return f", {' and '.join(found)} left out (rejected-seeds.jsonl)" if found else ""


def label(work: Work, out: Path) -> str:
    """The rows whose task is known from the file or is asked of the teacher."""
    examples = read_rows(Example, work.run.path / "rows.jsonl")
    known = [example for example in examples if example.task]
    unknown = [example for example in examples if not example.task]
    if not work.recipe.can_expand:
        write_rows(out, known + [replace(example, task="Others") for example in unknown])
        return (
            f"{len(known):,} labels from the file; the other {len(unknown):,} rows are Others, as no teacher is asked"
        )
    wanted = work.recipe.classifier.labelled
    sample = (
        unknown
        if len(unknown) <= wanted
        else sorted(work.chance("label").sample(unknown, wanted), key=lambda example: example.id)
    )
    labels = ask_labels(work, sample)
    labelled = [
        replace(example, task=labels[example.id], labelled_by="teacher") for example in sample if example.id in labels
    ]
    write_rows(out, known + labelled)
    unreadable = len(sample) - len(labelled)
    return f"{len(labelled):,} labelled by the teacher, {len(known):,} by the file, {unreadable:,} unreadable"


def ask_labels(work: Work, examples: Sequence[Example]) -> dict[str, str]:
    """The teacher's label by id; a reply that cannot be read is asked for once more, then left out."""
    tasks = work.recipe.task_table()
    labels: dict[str, str] = {}
    for draw in range(2):
        missing = [example for example in examples if example.id not in labels]
        requests = [
            work.request("label", row.id, prompts.classify(row.prompt, tasks), draw=draw, temperature=0.0)
            for row in missing
        ]
        for row, answer in zip(missing, work.ask(work.tools.teacher, requests), strict=True):
            if found := judging.parse_label(answer.text, tasks):
                labels[row.id] = found
    return labels


def classify(work: Work, out: Path) -> str:
    """A classifier's labels for the rows that the teacher was not asked about."""
    labelled, rows = work.run.path / "labels.jsonl", work.run.path / "rows.jsonl"
    if len(read_rows(Example, labelled)) == len(read_rows(Example, rows)):
        out.mkdir()
        return "not needed: every row has a label"
    work.tools.classify(labelled, rows, work.recipe.random_seed, out, work.progress)
    found = read_record(Agreement, out / "agreement.json")
    return f"{found.agreement:.1%} agreement with the teacher on {found.rows:,} rows held out of its training"


@dataclass(frozen=True)
class Agreement:
    """How often the classifier gives the teacher's label, on rows held out of its training."""

    agreement: float
    rows: int


def labelled_rows(work: Work) -> list[Example]:
    """Every row with a task: from the file or the teacher, else from the classifier."""
    known = {row.id: row for row in read_rows(Example, work.run.path / "labels.jsonl")}
    predictions = work.run.path / "classifier" / "predictions.jsonl"
    predicted = {row.id: row.task for row in read_rows(Prediction, predictions)} if predictions.exists() else {}
    rows = read_rows(Example, work.run.path / "rows.jsonl")
    return [
        known.get(row.id) or replace(row, task=predicted.get(row.id, "Others"), labelled_by="classifier")
        for row in rows
    ]


def holdout(work: Work, out: Path) -> str:
    """Rows set apart by task, with the teacher's answers to compare with."""
    held, _ = split_holdout(labelled_rows(work), work.recipe.seeds.holdout, work.chance("holdout"))
    answered = answer_seeds(work, held, "holdout")
    write_rows(out, answered)
    return f"{len(answered):,} rows of {len(count_tasks(answered))} tasks" + lost(len(held) - len(answered))


def seeds(work: Work, out: Path) -> str:
    """The other rows, with the teacher's answers to train on."""
    _, rest = split_holdout(labelled_rows(work), work.recipe.seeds.holdout, work.chance("holdout"))
    answered = answer_seeds(work, rest, "seeds")
    write_rows(out, answered)
    return f"{len(answered):,} rows" + lost(len(rest) - len(answered))


def answer_seeds(work: Work, rows: Sequence[Example], stage: str) -> list[Example]:
    """Rows with a whole answer: the file's own where the recipe trusts it, else the teacher's."""
    if answered_by_file(work.recipe):
        return [row for row in rows if row.completion]
    answers = work.ask(work.tools.teacher, [work.request(stage, row.id, prompts.answer(row.prompt)) for row in rows])
    return [
        replace(row, completion=answer.text.strip())
        for row, answer in zip(rows, answers, strict=True)
        if answer.complete
    ]


PREPARE = (
    Stage("read", "rows.jsonl", read),
    Stage("label", "labels.jsonl", label),
    Stage("classify", "classifier", classify),
    Stage("holdout", "holdout.jsonl", holdout),
    Stage("seeds", "seeds.jsonl", seeds),
)
