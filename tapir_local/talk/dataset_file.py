"""The rows that a run distilled, or preference pairs from its judgements, as a file with a card."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

from tapir_local.data.row_formats import ROW_WRITERS, answer_turn, turn_dicts
from tapir_local.errors import TapirError
from tapir_local.files import atomic_write, check_output, file_sha256, read_rows, write_text
from tapir_local.method.judging import preference_pairs
from tapir_local.pipeline.loop import kept_recipe, last_round
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Example, PreferencePair
from tapir_local.run_dir import RunDir
from tapir_local.stages.judge import judge_name
from tapir_local.stages.run_rows import judged_answers
from tapir_local.stages.ship import (
    describe_endpoint,
    license_rows,
    markdown_table,
    public_name,
    versions_line,
)

CARD_SUFFIX = ".card.md"
ENDINGS = (".jsonl", ".parquet")
TERMS_NOTE = (
    "The teacher named above wrote these answers. Some providers forbid the use of their models' answers to train "
    "models that compete with theirs, and some licenses of open weights have conditions of their own. Read the terms "
    "of this teacher before you publish the rows or a model trained on them. The program checks neither licenses nor "
    "terms."
)


@dataclass(frozen=True)
class DatasetConfig:
    """What to write: a format of ROW_WRITERS, one round or all (None), or preference pairs.

    `margin` is the least difference of scores of a pair, None for the recipe's mfd_threshold; `force` replaces OUT.
    """

    form: str = "messages"
    number: int | None = None
    preferences: bool = False
    margin: float | None = None
    force: bool = False


@dataclass(frozen=True)
class WrittenDataset:
    """A file that was written: its rows, SHA-256 and card, and notes for people."""

    rows: int
    sha256: str
    card: Path
    notes: tuple[str, ...]


def write_dataset(run: RunDir, out: Path, config: DatasetConfig) -> WrittenDataset:
    """Write the rows of a run and a card; TapirError if there is none, or a file exists."""
    if out.suffix not in ENDINGS:
        fix = "Name a file that ends in .jsonl (JSON lines) or .parquet."
        raise TapirError("the ending of the file says no format", where=str(out), fix=fix)
    fix = "Choose another file, or replace this one with --force."
    check_output(out, [run.path], beside=(CARD_SUFFIX,), force=config.force, fix=fix)
    recipe, notes = kept_recipe(run), list[str]()
    rows = preference_rows(run, recipe, config, notes) if config.preferences else distilled_rows(run, config, notes)
    if not rows:
        what, fix = "has no such rows", "Choose another round."
        if config.preferences:
            what = f"has no preference pair: no answer of the teacher scores over {pair_margin(recipe, config):g} more"
            fix = "Choose a lower --margin, or another round."
        raise TapirError(f"run {run.name!r} {what}", where=str(run.path), fix=fix)
    write_dicts(out, rows)
    digest, card = file_sha256(out), out.with_name(out.name + CARD_SUFFIX)
    write_text(card, dataset_card(run, recipe, config, DatasetFacts(out.name, digest, rows, tuple(notes))))
    return WrittenDataset(len(rows), digest, card, tuple(notes))


def write_dicts(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write objects with the same keys as JSON lines or Parquet, atomically."""
    if out.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        with atomic_write(out) as partial:
            parquet.write_table(pyarrow.Table.from_pylist(list(rows)), partial)
        return
    with atomic_write(out) as partial, partial.open("wb") as file:
        file.writelines(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)


def chosen_rounds(run: RunDir, number: int | None, file: str) -> list[int]:
    """The rounds, or the one of this number, that have a file; TapirError if there is none."""
    there = [n for n in range(last_round(run) + 1) if (run.round(n) / file).exists()]
    found = [n for n in there if number in (None, n)]
    if not found:
        what = f"has no {file} yet" if number is None else f"has no {file} of round {number}"
        rounds = ", ".join(map(str, there)) or "none"
        raise TapirError(f"run {run.name!r} {what}", where=str(run.path), fix=f"Rounds that have it: {rounds}.")
    return found


# Distilled rows


def distilled_rows(run: RunDir, config: DatasetConfig, notes: list[str]) -> list[dict[str, Any]]:
    """The rows that rounds trained on, each once with its newest answer, in the order of first use.

    A round on preference pairs writes no rows: it repeats answers of earlier rounds.
    """
    newest: dict[str, tuple[int, Example]] = {}
    on_pairs = kept_recipe(run).pairs_round
    for number in chosen_rounds(run, config.number, "train.jsonl"):
        if number == on_pairs:
            continue
        newest |= {row.id: (number, row) for row in read_rows(Example, run.round(number) / "train.jsonl")}
    write = ROW_WRITERS[config.form]
    found = [(number, row, written) for number, row in newest.values() if (written := write(row)) is not None]
    if left := len(newest) - len(found):
        notes.append(f"conversations that `{config.form}` cannot hold, left out: {left:,}")
    used = {
        key for _, _, written in found for key, value in written.items() if value or key not in ("system", "history")
    }
    return [
        {**{key: value for key, value in written.items() if key in used}, **facts_of_row(row, number)}
        for number, row, written in found
    ]


def facts_of_row(row: Example, number: int) -> dict[str, Any]:
    """Where a row comes from; readers of datasets take these columns for metadata."""
    return {"id": row.id, "task": row.task, "origin": row.origin, "parent_id": row.parent, "round": number}


# Preference pairs


def preference_rows(run: RunDir, recipe: Recipe, config: DatasetConfig, notes: list[str]) -> list[dict[str, Any]]:
    """Pairs for DPO as TRL reads them: prompt, chosen (the teacher's answer) and rejected (the student's).

    A pair is a pool row on which the judge scores the teacher's answer higher by more than the margin, in both orders
    if it was asked in two; of a prompt that several rounds judged, the pair of the latest one.
    """
    if recipe.judge.kind == "reference":
        fix = "Use a run with a judge that reads answers."
        raise TapirError(
            "`judge: reference` measures likeness, not which answer is better", where=str(run.path), fix=fix
        )
    numbers = chosen_rounds(run, config.number, "judgements.jsonl")
    pairs, cut = preference_pairs(judged_answers(run, numbers), pair_margin(recipe, config))
    notes += [f"answers of the student that were cut, left out: {cut:,}"] if cut else []
    return [preference_row(pair) for pair in pairs]


def pair_margin(recipe: Recipe, config: DatasetConfig) -> float:
    """The least difference of the two scores of a pair."""
    return recipe.curriculum.mfd_threshold if config.margin is None else config.margin


def preference_row(pair: PreferencePair) -> dict[str, Any]:
    """A pair in TRL's conversational preference format."""
    return {
        "prompt": turn_dicts(pair.prompt),
        "chosen": answer_turn(pair.completion),
        "rejected": answer_turn(pair.rejected),
        "score_chosen": pair.teacher,
        "score_rejected": pair.student,
        "mfd": pair.difficulty,
        **facts_of_row(pair, pair.judged_in),
    }


# The card


@dataclass(frozen=True)
class DatasetFacts:
    """What a card says of its file."""

    name: str
    sha256: str
    rows: Sequence[Mapping[str, Any]]
    notes: tuple[str, ...]


def dataset_card(run: RunDir, recipe: Recipe, config: DatasetConfig, facts: DatasetFacts) -> str:
    """The card of a file in Markdown, from the run's files and its recipe; what they do not say is `not stated`."""
    known = {
        "language": recipe.card.language,
        "license": recipe.card.data_license,
        "tags": ["tapir-local", "synthetic"],
    }
    front = yaml.safe_dump({key: value for key, value in known.items() if value}, sort_keys=False, allow_unicode=True)
    tasks = Counter(row["task"] or "(none)" for row in facts.rows)
    origins = Counter(row["origin"] for row in facts.rows)
    parts = [
        f"---\n{front}---",
        f"# {run.name}: {'preference pairs' if config.preferences else 'distilled rows'}",
        "Everything in this card comes from the run's own files and its recipe.",
        markdown_table(("", ""), origin_of_rows(recipe, config, facts)),
        "## Where the instructions come from\n\n"
        + markdown_table(("", "rows"), [(ORIGIN_WORDS.get(name, name), f"{n:,}") for name, n in origins.most_common()]),
        "## Tasks\n\n"
        + markdown_table(("task", "rows"), [(name, f"{count:,}") for name, count in tasks.most_common()]),
        f"## Licenses and terms\n\n{TERMS_NOTE}\n\nAs stated in the recipe (`card`):\n\n"
        + markdown_table(
            ("of", ""), [pair for pair in license_rows(recipe) if pair[0] not in ("this student", "the base")]
        ),
        "## Made with\n\n" + versions_line(run.record()),
    ]
    return "\n\n".join(parts) + "\n"


ORIGIN_WORDS = {"seed": "seeds", "expanded": "written by the teacher from harder rows"}


def origin_of_rows(recipe: Recipe, config: DatasetConfig, facts: DatasetFacts) -> list[tuple[str, str]]:
    """File, run and models, as rows of a table."""
    margin = pair_margin(recipe, config)
    pairs = [
        ("chosen", "the teacher's answers"),
        ("rejected", "the student's answers before each round"),
        ("kept", f"the judge scores the chosen answer more than {margin:g} points higher, in every order it was shown"),
        ("judge", judge_name(recipe)),
    ]
    return [
        ("file", facts.name),
        ("SHA-256", facts.sha256),
        ("rows", f"{len(facts.rows):,}"),
        ("format", "prompt, chosen, rejected (TRL's preference format)" if config.preferences else config.form),
        ("rounds", "all" if config.number is None else str(config.number)),
        ("seeds", public_name(recipe.seeds.path)),
        ("teacher", describe_endpoint(recipe.teacher)),
        *(pairs if config.preferences else []),
        ("held-out rows", "none: the run's holdout is not in this file"),
        *(("note", note) for note in facts.notes),
    ]
