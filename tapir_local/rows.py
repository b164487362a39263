"""The rows that a round may use: the seeds, all that are known by now, and the pool of which it takes its pick."""

from dataclasses import replace

from tapir_local.near import Index
from tapir_local.records import Example
from tapir_local.rundir import read_rows
from tapir_local.work import Work


def seeds(work: Work) -> list[Example]:
    """The seeds with the teacher's plain answers."""
    return read_rows(Example, work.run.path / "seeds.jsonl")


def all_known(work: Work) -> list[Example]:
    """The seeds and all that earlier rounds trained on, each with the teacher's newest answer, by id."""
    rows = {row.id: row for row in seeds(work)}
    for number in range(1, work.number):
        rows |= {row.id: row for row in read_rows(Example, work.run.round(number) / "train.jsonl")}
    return sorted(rows.values(), key=lambda row: row.id)


def pool(work: Work) -> list[Example]:
    """The rows that this round looks at: all that are known, or as many of them as the recipe says, at random."""
    everything = all_known(work)
    size = work.recipe.curriculum.pool or len(everything)
    if size >= len(everything):
        return everything
    return sorted(work.chance("pool").sample(everything, size), key=lambda row: row.id)


def child_of(parent: Example, number: int, serial: int, instruction: str, answer: str = "") -> Example:
    """The new row of round `number` whose last turn is another instruction than its parent's."""
    prompt = (*parent.prompt[:-1], replace(parent.prompt[-1], content=instruction))
    id = f"r{number}-{serial:05d}"
    return Example(id, prompt, answer, parent.task, parent.labelled_by, "expanded", parent.id, number)


def holdout_index(work: Work) -> Index:
    """The holdout, near which no new instruction may come."""
    held = Index(work.recipe.curriculum.max_rouge)
    for row in read_rows(Example, work.run.path / "holdout.jsonl"):
        held.add(row)
    return held
