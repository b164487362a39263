"""Give every row a task: from the seed file, the teacher, or a classifier trained on the teacher's labels."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tapir_local.data.dataset import count_tasks
from tapir_local.errors import TapirError
from tapir_local.files import atomic_write, read_record, read_rows, write_rows
from tapir_local.method import parsing, prompts
from tapir_local.printable import format_count
from tapir_local.recipe.own_tasks import unnormalized_sum
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Example
from tapir_local.stages.context import Work
from tapir_local.training.classifier import Prediction


@dataclass(frozen=True)
class Agreement:
    """How often the classifier gives the teacher's label, on rows held out of its training, with a 95 % interval."""

    agreement: float
    rows: int
    interval: tuple[float, float] | None = None


def label_stage(work: Work, out: Path) -> str:
    """The rows whose task the file gives, and those that the teacher is asked to label.

    If the teacher labels all rows, no classifier follows, so rows without a readable label get the task Others.
    """
    examples = read_rows(Example, work.run.path / "rows.jsonl")
    known = [example for example in examples if example.task]
    unknown = [example for example in examples if not example.task]
    if not work.recipe.can_expand:
        write_rows(out, known + [replace(example, task="Others") for example in unknown])
        return (
            f"{format_count(len(known), 'label')} from the file; "
            f"the other {format_count(len(unknown), 'row')}: Others, as no teacher is asked"
        )
    sample = rows_to_label(work, unknown)
    labels, faults = ask_labels(work, sample, "label")
    refuse_without_labels(work, len(sample), len(labels))
    labeled = [replace(row, task=labels[row.id], labelled_by="teacher") for row in sample if row.id in labels]
    unreadable = [replace(row, task="Others") for row in sample if row.id not in labels]
    others = unreadable if len(sample) == len(unknown) and "Others" in work.recipe.task_table() else []
    write_rows(out, known + labeled + others)
    counts = f"{len(labeled):,} labeled by the teacher, {len(known):,} by the file, {len(unreadable):,} unreadable"
    counts += " (task Others)" if others else ""
    counts += f": {describe_faults(faults)}" if faults else ""
    return counts + describe_shares(work.recipe) + warn_unreadable_labels(work, len(unreadable), len(sample))


def rows_to_label(work: Work, unknown: Sequence[Example]) -> Sequence[Example]:
    """The rows that the teacher labels: all, or a random sample of classifier.labelled, sorted by id."""
    wanted = work.recipe.classifier.labelled
    if len(unknown) <= wanted:
        return unknown
    return sorted(work.rng("label").sample(unknown, wanted), key=lambda example: example.id)


def describe_shares(recipe: Recipe) -> str:
    """A note that the recipe's own shares were normalized; "" if their sum is 1."""
    total = unnormalized_sum(recipe.tasks)
    return f"; the shares of `tasks` add up to {total:g} and were normalized to 100 %" if total else ""


def warn_unreadable_labels(work: Work, unreadable: int, asked: int) -> str:
    """A warning if the share of unreadable labels is above limits.unusable; else ""."""
    if unreadable <= work.recipe.limits.unusable * asked:
        return ""
    return (
        f"; WARNING: {unreadable / asked:.0%} of the teacher's labels cannot be read, so the balance of tasks is "
        f"unreliable. `tapir-local calls list --run {work.run.name} --stage label` shows the replies. Use a teacher "
        "that reliably replies in JSON, or give the rows a `task` in the seed file"
    )


def refuse_without_labels(work: Work, asked: int, read: int) -> None:
    """TapirError if the teacher was asked for labels and none of its replies names a task."""
    if asked and not read:
        raise TapirError(
            f"none of the teacher's {format_count(asked, 'reply', 'replies')} names a task",
            where="prepare/label",
            fix="`tapir-local calls list --stage label` shows them. Name another teacher and a new run (--name), or "
            "give the rows a `task` in the seed file.",
        )


def ask_labels(work: Work, examples: Sequence[Example], stage: str) -> tuple[dict[str, str], dict[str, str]]:
    """(the teacher's labels, what is wrong with the last reply where there is no label), by row id.

    A reply that is cut or unreadable is asked for once more. A row that the server refuses is not asked again.
    """
    tasks = work.recipe.task_table()
    labels, faults, refused = dict[str, str](), dict[str, str](), set[str]()
    for draw in range(2):
        missing = [example for example in examples if example.id not in labels.keys() | refused]
        requests = [
            work.request(stage, row.id, prompts.classify_prompt(row.prompt, tasks), draw=draw, temperature=0.0)
            for row in missing
        ]
        for row, answer in zip(missing, work.ask(work.backends.teacher, requests), strict=True):
            if answer.complete and (found := parsing.parse_label(answer.text, tasks)):
                labels[row.id] = found
                faults.pop(row.id, None)
                continue
            faults[row.id] = parsing.label_fault(answer.text, tasks) if answer.complete else answer.finish
            if answer.refused:
                refused.add(row.id)
            else:
                work.backends.meter.count("unreadable")
    return labels, faults


def describe_faults(faults: Mapping[str, str]) -> str:
    """`3 name several tasks, 1 name no task of the list`."""
    return ", ".join(f"{count:,} {fault}" for fault, count in Counter(faults.values()).most_common())


def classify_stage(work: Work, out: Path) -> str:
    """A classifier's labels for the rows that the teacher did not label."""
    labeled, rows = work.run.path / "labels.jsonl", work.run.path / "rows.jsonl"
    known, everything = read_rows(Example, labeled), read_rows(Example, rows)
    if len(known) == len(everything):
        out.mkdir()
        return "not needed: every row has a label"
    tasks = count_tasks(known)
    if len(known) > 1 and len(tasks) == 1:
        return label_all_alike(known, everything, out)
    work.backends.classify(labelled=labeled, rows=rows, seed=work.recipe.random_seed, out=out, progress=work.progress)
    single = [task for task, count in tasks.items() if count == 1]
    alone = f"; learned from a single row: {list_tasks(single)}" if single else ""
    found = read_record(Agreement, out / "agreement.json")
    return describe_agreement(found, work.recipe.classifier.min_agreement) + alone


def label_all_alike(known: Sequence[Example], everything: Sequence[Example], out: Path) -> str:
    """Give all rows the one task that all labeled rows have; there is nothing to train a classifier on.

    The confidence is Laplace's rule of succession, (n + 1) / (n + 2) after n of n.
    """
    task, seen = known[0].task, {row.id for row in known}
    confidence = round((len(known) + 1) / (len(known) + 2), 6)
    with atomic_write(out) as partial:
        partial.mkdir()
        found = [Prediction(row.id, task, confidence) for row in everything if row.id not in seen]
        write_rows(partial / "predictions.jsonl", found)
    rest = format_count(len(found), "row")
    return f"no classifier trained: every labeled row ({len(known):,}) is {task}, so the other {rest} got that task too"


def describe_agreement(found: Agreement, least: float) -> str:
    """How often the classifier agrees with the teacher, with a warning if that is below classifier.min_agreement."""
    interval = f" (95 %: {found.interval[0]:.0%} to {found.interval[1]:.0%})" if found.interval else ""
    rows = format_count(found.rows, "row")
    said = f"{found.agreement:.1%} agreement with the teacher{interval} on {rows} held out of its training"
    return said if found.agreement >= least else f"{said}; WARNING: {warn_low_agreement(found.agreement, least)}"


def warn_low_agreement(agreement: float, least: float) -> str:
    """What an agreement below classifier.min_agreement means and what to do about it."""
    return (
        f"the classifier agrees with the teacher on {agreement:.0%} of the rows, below classifier.min_agreement "
        f"({least:.0%}), so the balance of tasks is doubtful. Raise classifier.labelled or classifier.epochs, or drop "
        "tasks that are hard to tell apart (tapir-local show RUN --labels lists them)"
    )


def list_tasks(tasks: Sequence[str], most: int = 5) -> str:
    """`Art, Law`; of many, the first few and how many more."""
    return ", ".join(tasks[:most]) + (f" and {len(tasks) - most} more" if len(tasks) > most else "")


def tasks_stage(work: Work, out: Path) -> str:
    """Every row with its task: from the file, the teacher, or the classifier.

    The teacher is asked about the rows that the classifier is least sure of, at most classifier.ask_at_most of them.
    """
    recipe = work.recipe
    known = {row.id: row for row in read_rows(Example, work.run.path / "labels.jsonl")}
    rows = read_rows(Example, work.run.path / "rows.jsonl")
    guesses = read_predictions(work) if len(known) < len(rows) else {}
    unsure = least_sure_predictions(guesses.values(), recipe.classifier.ask_below)
    asked = {guess.id for guess in unsure[: recipe.classifier.ask_at_most]}
    labels, _ = ask_labels(work, [row for row in rows if row.id in asked], "tasks")
    found = [known.get(row.id) or with_label(row, guesses[row.id].task, labels.get(row.id)) for row in rows]
    write_rows(out, found)
    changed = sum(guesses[id].task != label for id, label in labels.items())
    doubts = describe_unsure_rows(recipe, len(unsure), len(asked), changed)
    return "; ".join(filter(None, [count_labels(found), doubts, describe_missing_tasks(recipe, found)]))


def read_predictions(work: Work) -> dict[str, Prediction]:
    """The classifier's labels by row id."""
    return {row.id: row for row in read_rows(Prediction, work.run.path / "classifier" / "predictions.jsonl")}


def least_sure_predictions(guesses: Iterable[Prediction], ask_below: float) -> list[Prediction]:
    """The predictions with a confidence below `ask_below`, the least sure first."""
    doubtful = [guess for guess in guesses if guess.confidence < ask_below]
    return sorted(doubtful, key=lambda guess: (guess.confidence, guess.id))


def with_label(row: Example, guess: str, label: str | None) -> Example:
    """A row with the teacher's label, or else with the classifier's."""
    return replace(row, task=label or guess, labelled_by="teacher" if label else "classifier")


def count_labels(rows: Sequence[Example]) -> str:
    """How many rows of how many tasks, and who labeled them."""
    counts = Counter(row.labelled_by for row in rows)
    sources = [f"{counts[who]:,} by the {who}" for who in ("file", "teacher", "classifier") if counts[who]]
    tasks = format_count(len(count_tasks(rows)), "task")
    return f"{format_count(len(rows), 'row')} of {tasks}, labeled {', '.join(sources) or 'by nobody'}"


def describe_unsure_rows(recipe: Recipe, unsure: int, asked: int, changed: int) -> str:
    """What happened to the rows that the classifier was not sure of; "" if there are none."""
    if not unsure:
        return ""
    settings = recipe.classifier
    limit = f" (classifier.ask_at_most is {settings.ask_at_most:,})" if asked < unsure else ""
    return (
        f"the classifier was less than {settings.ask_below:.0%} sure of {format_count(unsure, 'row')}: the teacher was "
        f"asked about {asked:,} of them{limit} and gave {changed:,} another task"
    )


def describe_missing_tasks(recipe: Recipe, rows: Sequence[Example]) -> str:
    """The tasks of the recipe that have a share but no row; "" if there are none."""
    present = set(count_tasks(rows))
    missing = [label for label, task in recipe.task_table().items() if task.share and label not in present]
    if not missing or not recipe.can_expand:  # recorded answers are not balanced
        return ""
    return f"no row of {list_tasks(missing)}: their shares go to the other tasks"
