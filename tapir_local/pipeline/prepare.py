"""PREPARE: read the seeds, label them, set the holdout apart, and have the teacher answer; once for a run."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tapir_local.data.dataset import count_tasks, sorted_seeds, split_holdout, without_near
from tapir_local.data.files import read_table
from tapir_local.data.source import digest, keep_source
from tapir_local.errors import TapirError
from tapir_local.files import atomic_write, read_record, read_rows, write_rows
from tapir_local.method import parsing, prompts
from tapir_local.pipeline.context import Stage, Work, answered, askable, trainable
from tapir_local.pipeline.reading import drawn, leave_out, many_alike, not_read, unreadable
from tapir_local.pipeline.student_text import fold_rows
from tapir_local.recipe.own_tasks import unnormalized_sum
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Example, instruction_of
from tapir_local.training.classifier import Prediction
from tapir_local.unusable import MAX_TEXT_KEPT, Unusable, format_left_out


def read(work: Work, out: Path) -> str:
    """The seeds' rows as examples; duplicates and near-duplicates are left out, and kept in rejected-seeds.jsonl."""
    recipe = work.recipe
    source, table = digest(recipe.seeds), read_table(recipe.seeds)
    found = sorted_seeds(table, recipe.task_table())
    if recipe.seeds.unusable == "refuse" or not found.examples:
        found.refuse()
    examples, folds, unfit = usable(work, found.examples)
    unusable = [*(unreadable(work, table, row) for row in found.faulty), *unfit]
    leave_out(work, found, unusable)
    if answered_by_file(recipe) and not any(row.completion for row in examples):
        found.refuse()  # perhaps the answers are in the rows that cannot be read
        raise TapirError(
            "no row has an answer, and the recipe takes the file's",
            where=table.where,
            fix="Set seeds.answers: teacher.",
        )
    compared = len(examples)
    examples, alike = without_near(
        examples, recipe.seeds.max_rouge, lambda done: work.progress(done, compared, "compared")
    )
    said = repeated(len(found.duplicates), len(alike)) + turned(folds) + format_left_out(unusable)
    told = [*table.notes, not_read(found.unread), many_alike(len(alike), compared)]
    examples = drawn(work, examples, table.where)
    # First these: with rows.jsonl the stage is done.
    write_rows(work.run.path / "rejected-seeds.jsonl", [*found.duplicates, *alike])
    keep_source(work.run, source, len(table.rows))
    write_rows(out, examples)
    return "; ".join(filter(None, [f"{len(examples):,} rows{said}", *told]))


def usable(work: Work, rows: Sequence[Example]) -> tuple[list[Example], int, list[Unusable]]:
    """(rows that the student can be asked and, where the file answers, trained on; system turns folded; the others).

    This is all that can be known of a row before anything is paid for it.
    """
    if not rows:
        return [], 0, []
    kept, folds = fold_rows(work.tools.student_text(), rows)
    kept, unusable = askable(work, kept)
    if answered_by_file(work.recipe) and any(row.completion for row in kept):
        unusable += [no_answer(work, row) for row in kept if not row.completion]
        kept, unfit = trainable(work, [row for row in kept if row.completion])
        unusable += unfit
    return kept, folds, unusable


def turned(folds: int) -> str:
    """What to say of system turns that the student's chat template has no place for."""
    return f", {folds:,} system turns moved into the user's (the chat template has no system role)" if folds else ""


def no_answer(work: Work, row: Example) -> Unusable:
    """The record of a row that the seed file does not answer."""
    return Unusable(work.step, row.id, "no answer in the seed file", "", instruction_of(row.prompt)[:MAX_TEXT_KEPT])


def answered_by_file(recipe: Recipe) -> bool:
    """Whether the seeds' answers are the file's own."""
    return not recipe.can_expand or recipe.seeds.answers == "file"


def repeated(duplicates: int, alike: int) -> str:
    """`, 3 duplicates and 1 near-duplicate left out (rejected-seeds.jsonl)`, of those that there are."""
    counts = ((duplicates, "duplicate"), (alike, "near-duplicate"))
    found = [f"{count:,} {name}{'s' if count > 1 else ''}" for count, name in counts if count]
    return f", {' and '.join(found)} left out (rejected-seeds.jsonl)" if found else ""


def label(work: Work, out: Path) -> str:
    """The rows whose task is known from the file or is asked of the teacher.

    Where all are asked, a row without a readable label is one of the Others: no classifier is trained for those few.
    """
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
    labels = ask_labels(work, sample, "label")
    refuse_no_label(work, len(sample), len(labels))
    labelled = [
        replace(example, task=labels[example.id], labelled_by="teacher") for example in sample if example.id in labels
    ]
    unreadable = [replace(example, task="Others") for example in sample if example.id not in labels]
    others = unreadable if len(sample) == len(unknown) and "Others" in work.recipe.task_table() else []
    write_rows(out, known + labelled + others)
    counts = f"{len(labelled):,} labelled by the teacher, {len(known):,} by the file, {len(unreadable):,} unreadable"
    total = unnormalized_sum(work.recipe.tasks)
    odd = f"; the shares of `tasks` sum to {total:g}, so each counts as its part of that" if total else ""
    return counts + (" and so Others" if others else "") + odd + many_unreadable(work, len(unreadable), len(sample))


def many_unreadable(work: Work, unreadable: int, asked: int) -> str:
    """A warning where more of the teacher's labels cannot be read than limits.unusable allows of other rows."""
    if unreadable <= work.recipe.limits.unusable * asked:
        return ""
    return (
        f"; WARNING: {unreadable / asked:.0%} of the teacher's labels cannot be read: `tapir-local calls list --run "
        f"{work.run.name} --stage label` shows the replies. A teacher that keeps to JSON, or tasks in the seed file, "
        "make the balance of tasks reliable"
    )


def refuse_no_label(work: Work, asked: int, read: int) -> None:
    """TapirError where the teacher was asked for labels and none of its replies names one."""
    if asked and not read:
        raise TapirError(
            f"none of the teacher's {asked:,} replies names a task",
            where="prepare/label",
            fix="`tapir-local calls list --stage label` shows them. Name another teacher and a new run (--name), or "
            "give the rows a `task` in the seed file.",
        )


def ask_labels(work: Work, examples: Sequence[Example], stage: str) -> dict[str, str]:
    """The teacher's label by id; a reply that is cut or cannot be read is asked for once more, then left out.

    A row that the server refuses is not asked again.
    """
    tasks = work.recipe.task_table()
    labels, refused = dict[str, str](), set[str]()
    for draw in range(2):
        missing = [example for example in examples if example.id not in labels.keys() | refused]
        requests = [
            work.request(stage, row.id, prompts.classify_prompt(row.prompt, tasks), draw=draw, temperature=0.0)
            for row in missing
        ]
        for row, answer in zip(missing, work.ask(work.tools.teacher, requests), strict=True):
            if answer.complete and (found := parsing.parse_label(answer.text, tasks)):
                labels[row.id] = found
            elif answer.refused:
                refused.add(row.id)
    return labels


@dataclass(frozen=True)
class Agreement:
    """How often the classifier gives the teacher's label, on rows held out of its training; `interval` is of 95 %."""

    agreement: float
    rows: int
    interval: tuple[float, float] | None = None


def classify(work: Work, out: Path) -> str:
    """A classifier's labels for the rows that the teacher was not asked about."""
    labelled, rows = work.run.path / "labels.jsonl", work.run.path / "rows.jsonl"
    known, everything = read_rows(Example, labelled), read_rows(Example, rows)
    if len(known) == len(everything):
        out.mkdir()
        return "not needed: every row has a label"
    tasks = count_tasks(known)
    if len(known) > 1 and len(tasks) == 1:
        return all_alike(known, everything, out)
    work.tools.classify(labelled, rows, work.recipe.random_seed, out, work.progress)
    single = [task for task, count in tasks.items() if count == 1]
    alone = f"; learned from a single row: {some(single)}" if single else ""
    return agreed(read_record(Agreement, out / "agreement.json"), work.recipe.classifier.min_agreement) + alone


def all_alike(known: Sequence[Example], everything: Sequence[Example], out: Path) -> str:
    """The one task of all labelled rows for the others too: nothing can be learned, and little be doubted.

    Its probability is Laplace's rule of succession, (n + 1) / (n + 2) after n of n.
    """
    task, seen = known[0].task, {row.id for row in known}
    sure = round((len(known) + 1) / (len(known) + 2), 6)
    with atomic_write(out) as partial:
        partial.mkdir()
        found = [Prediction(row.id, task, sure) for row in everything if row.id not in seen]
        write_rows(partial / "predictions.jsonl", found)
    return (
        f"no classifier trained: all {len(known):,} labelled rows are {task}, so the other {len(found):,} count as such"
    )


def agreed(found: Agreement, least: float) -> str:
    """How far the classifier agrees with the teacher, and a warning where that is less than the recipe's least."""
    interval = f" (95 %: {found.interval[0]:.0%} to {found.interval[1]:.0%})" if found.interval else ""
    said = f"{found.agreement:.1%} agreement with the teacher{interval} on {found.rows:,} rows held out of its training"
    return said if found.agreement >= least else f"{said}; WARNING: {too_low(found.agreement, least)}"


def too_low(agreement: float, least: float) -> str:
    """What an agreement below the recipe's least means and what to do."""
    return (
        f"the classifier agrees with the teacher in {agreement:.0%}, below classifier.min_agreement ({least:.0%}): the "
        "balance of tasks is doubtful. Raise classifier.labelled or classifier.epochs, or drop tasks that are hard to "
        "tell apart (tapir-local show RUN --labels says which)"
    )


def some(tasks: Sequence[str], most: int = 5) -> str:
    """`Art, Law`, or the first few and how many more."""
    return ", ".join(tasks[:most]) + (f" and {len(tasks) - most} more" if len(tasks) > most else "")


def tasks(work: Work, out: Path) -> str:
    """Every row with its task: of the file, of the teacher, or of the classifier where it is sure enough.

    Of the rows that it is not sure of, the teacher is asked about the least sure ones, as many as the recipe allows.
    """
    known = {row.id: row for row in read_rows(Example, work.run.path / "labels.jsonl")}
    rows = read_rows(Example, work.run.path / "rows.jsonl")
    guesses = guessed(work) if len(known) < len(rows) else {}
    unsure = unsure_of(guesses.values(), work.recipe.classifier.ask_below)
    asked = {guess.id for guess in unsure[: work.recipe.classifier.ask_at_most]}
    told = ask_labels(work, [row for row in rows if row.id in asked], "tasks")
    found = [known.get(row.id) or settled(row, guesses[row.id].task, told.get(row.id)) for row in rows]
    write_rows(out, found)
    changed = sum(guesses[id].task != label for id, label in told.items())
    said = [counted_by_source(found), doubts(work.recipe, len(unsure), len(asked), changed), absent(work.recipe, found)]
    return "; ".join(filter(None, said))


def guessed(work: Work) -> dict[str, Prediction]:
    """The classifier's labels by id."""
    return {row.id: row for row in read_rows(Prediction, work.run.path / "classifier" / "predictions.jsonl")}


def unsure_of(guesses: Iterable[Prediction], ask_below: float) -> list[Prediction]:
    """The guesses of a lower probability, the least sure first."""
    doubtful = [guess for guess in guesses if guess.confidence < ask_below]
    return sorted(doubtful, key=lambda guess: (guess.confidence, guess.id))


def settled(row: Example, guess: str, told: str | None) -> Example:
    """A row with the teacher's label, or else the classifier's."""
    return replace(row, task=told or guess, labelled_by="teacher" if told else "classifier")


def counted_by_source(rows: Sequence[Example]) -> str:
    """How many rows of how many tasks, and who labelled them."""
    counts = Counter(row.labelled_by for row in rows)
    sources = [f"{counts[who]:,} by the {who}" for who in ("file", "teacher", "classifier") if counts[who]]
    return f"{len(rows):,} rows of {len(count_tasks(rows))} tasks, labelled {', '.join(sources) or 'by nobody'}"


def doubts(recipe: Recipe, unsure: int, asked: int, changed: int) -> str:
    """What became of the rows that the classifier was not sure of."""
    if not unsure:
        return ""
    settings = recipe.classifier
    limit = f" (classifier.ask_at_most is {settings.ask_at_most:,})" if asked < unsure else ""
    return (
        f"the classifier was less than {settings.ask_below:.0%} sure of {unsure:,}: the teacher was asked about "
        f"{asked:,} of them{limit} and named another task for {changed:,}"
    )


def absent(recipe: Recipe, rows: Sequence[Example]) -> str:
    """Which tasks of the recipe have a share and no row."""
    present = set(count_tasks(rows))
    missing = [label for label, task in recipe.task_table().items() if task.share and label not in present]
    if not missing or not recipe.can_expand:  # recorded answers are not balanced
        return ""
    return f"no row of {some(missing)}: the other tasks have their shares"


def labelled_rows(work: Work) -> list[Example]:
    """Every row with a task."""
    return read_rows(Example, work.run.path / "labelled.jsonl")


def holdout(work: Work, out: Path) -> str:
    """Rows set apart by task, with the teacher's answers to compare with."""
    held, _ = split_holdout(labelled_rows(work), work.recipe.seeds.holdout, work.chance("holdout"))
    answered, unusable = answer_seeds(work, held, "holdout")
    work.leave_out(unusable, len(held))
    write_rows(out, answered)
    return f"{len(answered):,} rows of {len(count_tasks(answered))} tasks" + format_left_out(unusable)


def seeds(work: Work, out: Path) -> str:
    """The other rows, with the teacher's answers to train on."""
    _, rest = split_holdout(labelled_rows(work), work.recipe.seeds.holdout, work.chance("holdout"))
    answered, unusable = answer_seeds(work, rest, "seeds")
    work.leave_out(unusable, len(rest))
    write_rows(out, answered)
    return f"{len(answered):,} rows" + format_left_out(unusable)


def answer_seeds(work: Work, rows: Sequence[Example], stage: str) -> tuple[list[Example], list[Unusable]]:
    """Rows with a whole answer, the file's own where the recipe trusts it, else the teacher's; and those without."""
    if answered_by_file(work.recipe):
        without = [no_answer(work, row) for row in rows if not row.completion]
        return [row for row in rows if row.completion], without
    # The holdout is never trained on: an answer that the template would change can be compared with all the same.
    return answered(work, stage, rows, [prompts.answer_prompt(row.prompt) for row in rows], trained=stage != "holdout")


PREPARE = (
    Stage("read", "rows.jsonl", read),
    Stage("label", "labels.jsonl", label),
    Stage("classify", "classifier", classify),
    Stage("tasks", "labelled.jsonl", tasks),
    Stage("holdout", "holdout.jsonl", holdout),
    Stage("seeds", "seeds.jsonl", seeds),
)
