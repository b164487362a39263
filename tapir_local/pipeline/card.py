"""The model card of a finished run: what its files and its recipe say, and `not stated` for what they do not."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tapir_local.export.gate import GateReport
from tapir_local.files import read_record
from tapir_local.method.metrics import is_rouge_only
from tapir_local.pipeline.published import on_the_hub, public_name, public_url
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Metrics
from tapir_local.run_dir import RunDir

UNSTATED = "not stated"
QUOTED = (
    "In training, a special token that a text quotes (such as the one that ends a turn) was plain text. A program that "
    "reads special tokens in a user's text, or does not normalize Unicode as the tokenizer does, gives the student "
    "other tokens than those that it was trained on."
)


def card(run: RunDir, recipe: Recipe, shipped: Path) -> str:
    """The README.md of a run's model/, in Markdown; `shipped` is its folder, with gate.json in it."""
    return (
        "\n\n".join(
            [
                front_matter(recipe),
                f"# {run.name}",
                *([recipe.about] if recipe.about else []),
                "A student that tapir-local distilled from a teacher by TAPIR (arXiv 2405.13448). All that this card "
                "says is from the run's own files and its recipe.",
                "## To run it\n\n" + running(run) + "\n\n" + QUOTED,
                "## What it was made of\n\n" + table(("", ""), origins(run, recipe)),
                "## Licences and terms\n\nAs the recipe states them; the program does not check them.\n\n"
                + table(("of", ""), licences(recipe)),
                "## On the holdout\n\n" + results(run, recipe),
                "## The gate\n\n" + gate_words(read_record(GateReport, shipped / "gate.json")),
                "## Made with\n\n" + versions(run.record()),
            ]
        )
        + "\n"
    )


def front_matter(recipe: Recipe) -> str:
    """What the Hub reads: only what is known."""
    known = {
        "language": recipe.card.language,
        "license": recipe.card.license,
        "base_model": recipe.student.path if on_the_hub(recipe.student.path) else None,
    }
    values = {key: value for key, value in known.items() if value} | {"tags": ["gguf", "tapir-local"]}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def running(run: RunDir) -> str:
    """Commands, in this folder."""
    return (
        "In this folder:\n\n"
        f"    ollama create {run.name.lower()} -f Modelfile && ollama run {run.name.lower()}\n"
        "    llama-server -m student.gguf\n"
        "    sha256sum -c SHA256SUMS"
    )


def origins(run: RunDir, recipe: Recipe) -> list[tuple[str, str]]:
    """Base, data, teacher, judge and way of training."""
    plan, train = recipe.curriculum, recipe.train
    seeds, held = (count(run.path / name) for name in ("seeds.jsonl", "holdout.jsonl"))
    return [
        ("base", public_name(recipe.student.path)),
        ("seeds", f"{public_name(recipe.seeds.path)}: {seeds:,} to train on, {held:,} held out and never trained on"),
        ("answers", "the file's own" if recipe.seeds.answers == "file" else "the teacher's"),
        ("teacher", asked(recipe.teacher)),
        ("judge", "the teacher" if recipe.judge.kind == "teacher" else asked(recipe.judge)),
        ("curriculum", f"{plan.name}; rounds after round 0: {recipe.rounds}, of {plan.rows:,} rows"),
        (
            "training",
            f"{train.method}; passes over a round's rows: {train.epochs:g}; learning rate {train.learning_rate:g}",
        ),
        ("random_seed", str(recipe.random_seed)),
        ("weights", recipe.export.quant),
        ("context", f"{recipe.student.max_length:,} tokens, as trained and measured"),
        ("all settings", "recipe.yaml"),
    ]


def asked(endpoint: Endpoint) -> str:
    """Who answers, in the recipe's words."""
    kind = str(getattr(endpoint, "kind", ""))
    words = {
        "pocket": "pocket: a programme that solves its own world exactly, no LLM",
        "recorded": "recorded: the seed file's answers",
        "reference": "reference: likeness to the teacher's answer (ROUGE-L), no LLM",
        "gguf": f"the GGUF {Path(endpoint.gguf or '').name} on the same machine",
    }
    where = f" at {public_url(endpoint.base_url)}" if endpoint.base_url else ""
    return words.get(kind, f"{endpoint.model}{where}")


def licences(recipe: Recipe) -> list[tuple[str, str]]:
    """What the recipe's card section says, `not stated` where it says nothing."""
    said = recipe.card
    named = {
        "this student": said.license,
        "the base": said.base_license,
        "the seeds": said.data_license,
        "the teacher's answers (terms)": said.terms,
        "language": said.language,
    }
    return [(name, text or UNSTATED) for name, text in named.items()]


def results(run: RunDir, recipe: Recipe) -> str:
    """Every round's metrics with their 95 % intervals, and how they were measured."""
    paths = [run.round(number) / "metrics.json" for number in range(recipe.rounds + 1)]
    found = [read_record(Metrics, path) for path in paths]
    heads = ("round", "win rate", "95 %", "accuracy", "95 %", "score, student : teacher", "rows", "judged")
    rows = [
        (
            str(row.round),
            percent(row.win_rate),
            interval(row.win_rate_interval),
            percent(row.accuracy),
            interval(row.accuracy_interval),
            scores(row.student_score, row.teacher_score),
            f"{row.rows:,}",
            f"{row.judged:,}",
        )
        for row in found
    ]
    lone = (
        ""
        if recipe.export.rounds == "merged"
        else (" Answers were written with the round's adapter over the base's GGUF; the file here is both merged.")
    )
    alike = is_rouge_only(found[-1].win_rate, found[-1].student_score)
    measured = (
        f"There is no win rate: scores are {found[-1].judge}, 1 to 10, and the teacher's own answer counts 10"
        if alike
        else f"Win rate is against the teacher's own answers, a tie being half a win, judged by {found[-1].judge}"
    )
    return f"Greedy answers to the held-out rows. {measured}; the last row is this student.{lone}\n\n" + table(
        heads, rows
    )


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def interval(pair: Sequence[float] | None) -> str:
    return "-" if pair is None else f"{pair[0]:.1%} to {pair[1]:.1%}"


def scores(student: float | None, teacher: float | None) -> str:
    return "-" if student is None or teacher is None else f"{student:.2f} : {teacher:.2f}"


def gate_words(report: GateReport) -> str:
    """How near the GGUF is to the trained model."""
    found = report.figures
    return (
        "student.gguf was compared with the trained model in transformers, in 32 bits (gate.json):\n\n"
        f"- {report.probes:,} texts tokenised, {report.mismatches:,} otherwise than in training\n"
        f"- BOS tokens of a prompt: {report.bos_gguf}, in training {report.bos_trained}; end of turn and chat template "
        "as trained\n"
        f"- mean divergence {found.kl:.3g} nats a token, {report.max_kl:g} allowed; largest difference of two logits "
        f"{found.largest_difference:.3g}\n"
        f"- the same greedy token at {found.agreement:.1%} of {found.positions:,} positions, "
        f"{report.min_agreement:.1%} wanted"
    )


def versions(record: Mapping[str, Any]) -> str:
    """The program and the packages that the run began with."""
    revision = f" (revision {record['revision']})" if record.get("revision") else ""
    packages = [f"{name} {found}" for name, found in record.get("packages", {}).items()]
    named = [f"tapir-local {record.get('tapir_local', UNSTATED)}{revision}", f"Python {record.get('python', UNSTATED)}"]
    return ", ".join([*named, *packages]) + "."


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; what would end a cell is escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def cell(text: str) -> str:
    """One line without the mark that parts cells."""
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


def count(path: Path) -> int:
    """Lines of a file."""
    with path.open("rb") as file:
        return sum(1 for _ in file)
