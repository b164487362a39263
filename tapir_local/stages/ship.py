"""The end of a run: the folder model/ with the GGUF, its gate report, a Modelfile, a model card and checksums.

The card and the recipe in it leave the machine, so they name models and files but no folders and no passwords.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml

from tapir_local.export.gate import GateReport
from tapir_local.files import atomic_write, file_sha256, read_record
from tapir_local.memory import format_bytes
from tapir_local.method.metrics import is_rouge_only
from tapir_local.output_record import count_lines
from tapir_local.printable import format_count
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.settings import path_settings
from tapir_local.recipe.text import fixed_settings, parse_recipe
from tapir_local.recipe.yaml import write_yaml
from tapir_local.records import Metrics
from tapir_local.resources import HUB_NAME, read_recipe_text
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import Stage, Work
from tapir_local.stages.shipped_round import MODEL_FOLDER, choose_shipped_round, record_shipped_round

CHECKSUMS_FILE = "SHA256SUMS"
CARD_SETTINGS = ("rounds", "about", "card", "ship")  # settings that may change during a run and that the card shows
NOT_STATED = "not stated"
SPECIAL_TOKENS_NOTE = (
    "In training, a special token quoted in a text (such as the one that ends a turn) was treated as plain text. A "
    "program that reads special tokens in a user's text, or does not normalize Unicode as the tokenizer does, gives "
    "the student other tokens than those it was trained on."
)


def ship_stage(work: Work, out: Path) -> str:
    """The student of the last or the best round with its card, recipe and checksums; complete or absent."""
    number, why = choose_shipped_round(work)
    with atomic_write(out) as partial:
        write_model_folder(work, partial, number, why)
        record_shipped_round(work.run, work.recipe, number, why)
    return describe_model_folder(out, number, why) + unstated_facts(work.recipe)


def write_model_folder(work: Work, out: Path, number: int, why: str) -> None:
    """Write the student of a round into the new folder `out`, with its card, recipe and checksums."""
    out.mkdir()
    work.backends.ship(student=work.run.round(number), out=out, progress=work.progress)
    (out / "recipe.yaml").write_text(published_recipe(work.recipe), encoding="utf-8")
    card = model_card(work.run, work.recipe, out, {"round": number, "why": why})
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / CHECKSUMS_FILE).write_text(checksum_lines(sorted(out.iterdir())), encoding="utf-8")


def describe_model_folder(out: Path, number: int, why: str) -> str:
    """The closing line of a model/: its round, the reason, and its size."""
    size = format_bytes((out / "student.gguf").stat().st_size)
    return f"{out}: student.gguf, {size}, of round {number} ({why}), with Modelfile and card"


def unstated_facts(recipe: Recipe) -> str:
    """A remark that names the facts that the card does not state; "" if it states all."""
    names = [f"card.{name}" for name, value in recipe.card.model_dump().items() if value is None]
    return f"; the card does not state {', '.join(names)}" if names else ""


SHIP_STAGE = Stage("ship", MODEL_FOLDER, ship_stage)


def checksum_lines(files: Sequence[Path]) -> str:
    """Lines for `sha256sum -c`."""
    return "".join(f"{file_sha256(path)}  {path.name}\n" for path in files)


def is_model_stale(run: RunDir, recipe: Recipe) -> bool:
    """Whether model/ exists and was made with other settings: other rounds, another card, or another choice of round.

    Settings that it does not depend on, such as the budget, do not count.
    """
    path = run.path / SHIP_STAGE.output / "recipe.yaml"
    if not path.exists():
        return False
    shipped = parse_recipe(read_recipe_text(path), str(path), kept=True)
    return model_settings(shipped) != model_settings(recipe)


def model_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that model/ depends on or shows, with paths reduced to their last part."""
    value = fixed_settings(recipe) | {name: recipe.model_dump(mode="json")[name] for name in CARD_SETTINGS}
    for section, name in path_settings():
        if value[section].get(name):
            value[section][name] = last_part(value[section][name])
    for role in ("teacher", "judge"):
        if value[role].get("base_url"):
            value[role]["base_url"] = public_url(value[role]["base_url"])
    return value


# What may leave the machine


def published_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every setting written out, for people who get the model."""
    value = recipe.model_dump(mode="json")
    for section, name in path_settings():
        if value[section][name]:
            value[section][name] = public_name(value[section][name])
    for role in ("teacher", "judge"):
        if value[role]["base_url"]:
            value[role]["base_url"] = public_url(value[role]["base_url"])
    if recipe.train.launcher:
        value["train"]["launcher"] = public_command(recipe.train.launcher)
    return write_yaml(value)


def is_hub_name(path: str) -> bool:
    """Whether `path` is the name of a model or data set on the Hub, and no local file or folder."""
    return bool(HUB_NAME.fullmatch(path)) and not Path(path).exists() and not path.lower().endswith(".gguf")


def public_name(path: str) -> str:
    """The last part of a path; a name on the Hub is left as it is."""
    return path if is_hub_name(path) else last_part(path)


def last_part(path: str) -> str:
    """`qwen` of `/models/qwen/`."""
    return Path(path).name or path


def public_url(url: str) -> str:
    """A URL without user name, password and query, which may hold a key."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def public_command(line: str) -> str:
    """A command without the folders of its absolute paths."""
    try:
        words = shlex.split(line)
    except ValueError:
        words = line.split()
    return shlex.join(last_part(word) if word.startswith(("/", "~")) else word for word in words)


# The model card


def model_card(run: RunDir, recipe: Recipe, folder: Path, shipped: Mapping[str, Any]) -> str:
    """The README.md of a run's model/ in Markdown; `folder` has gate.json, `shipped` the round and the reason for it.

    Everything in it comes from the run's files and its recipe; what they do not say is `not stated`.
    """
    origin = [*origin_rows(run, recipe), ("round", f"{shipped['round']}: {shipped['why']}")]
    parts = [
        front_matter(recipe),
        f"# {run.name}",
        *([recipe.about] if recipe.about else []),
        "A student that tapir-local distilled from a teacher by TAPIR (arXiv 2405.13448). Everything in this card "
        "comes from the run's own files and its recipe.",
        "## How to run it\n\n" + usage_commands(run) + "\n\n" + SPECIAL_TOKENS_NOTE,
        "## What it was made from\n\n" + markdown_table(("", ""), origin),
        "## Licenses and terms\n\nAs stated in the recipe; the program does not check them.\n\n"
        + markdown_table(("of", ""), license_rows(recipe)),
        "## On the holdout\n\n" + results_section(run, recipe, shipped["round"]),
        "## The gate\n\n" + gate_section(read_record(GateReport, folder / "gate.json")),
        "## Made with\n\n" + versions_line(run.record()),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(recipe: Recipe) -> str:
    """The metadata that the Hub reads; only what is known."""
    known = {
        "language": recipe.card.language,
        "license": recipe.card.license,
        "base_model": recipe.student.path if is_hub_name(recipe.student.path) else None,
    }
    values = {key: value for key, value in known.items() if value} | {"tags": ["gguf", "tapir-local"]}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def usage_commands(run: RunDir) -> str:
    """Commands that run or verify the model, for the folder model/."""
    return (
        "In this folder:\n\n"
        f"    ollama create {run.name.lower()} -f Modelfile && ollama run {run.name.lower()}\n"
        "    llama-server -m student.gguf\n"
        f"    sha256sum -c {CHECKSUMS_FILE}"
    )


def origin_rows(run: RunDir, recipe: Recipe) -> list[tuple[str, str]]:
    """Base model, data, teacher, judge and training, as rows of a table."""
    plan, train = recipe.curriculum, recipe.train
    seeds, held = (count_lines(run.path / name) for name in ("seeds.jsonl", "holdout.jsonl"))
    return [
        ("base", describe_base(run, recipe)),
        ("seeds", f"{public_name(recipe.seeds.path)}: {seeds:,} to train on, {held:,} held out and never trained on"),
        ("answers", "the file's own" if recipe.seeds.answers == "file" else "the teacher's"),
        ("teacher", describe_endpoint(recipe.teacher)),
        ("judge", "the teacher" if recipe.judge.kind == "teacher" else describe_endpoint(recipe.judge)),
        ("curriculum", f"{plan.name}; rounds after round 0: {recipe.rounds}, {format_count(plan.rows, 'row')} each"),
        *preference_facts(recipe),
        (
            "training",
            f"{train.method}; epochs per round: {train.epochs:g}; learning rate {train.learning_rate:g}",
        ),
        ("random_seed", str(recipe.random_seed)),
        ("weights", recipe.export.quant),
        ("context", f"{recipe.student.max_length:,} tokens in training and evaluation"),
        ("all settings", "recipe.yaml"),
    ]


def describe_base(run: RunDir, recipe: Recipe) -> str:
    """The student before training; of a GGUF also the types of weights that training began with."""
    made = run.record().get("student", {})
    if "gguf" not in made:
        return public_name(recipe.student.path)
    return (
        f"{made['file']}, a GGUF with {made['weights']} weights: training started from these, dequantized, and not "
        "from the original model's"
    )


def preference_facts(recipe: Recipe) -> list[tuple[str, str]]:
    """The training on preference pairs in a row, none if there is none."""
    if recipe.pairs_round is None:
        return []
    train = recipe.train
    rate = f"learning rate {train.preference_learning_rate:g}"
    return [("preference pairs", f"round {recipe.pairs_round}, DPO; beta {train.preference_beta:g}, {rate}")]


def describe_endpoint(endpoint: Endpoint) -> str:
    """Who answers: the kind, or the model and its public URL."""
    kind = str(getattr(endpoint, "kind", ""))
    words = {
        "pocket": "pocket: a program that solves its own world exactly, not an LLM",
        "recorded": "recorded: the seed file's answers",
        "reference": "reference: similarity to the teacher's answer (ROUGE-L), not an LLM",
        "gguf": f"the GGUF {Path(endpoint.gguf or '').name} on the same machine",
    }
    where = f" at {public_url(endpoint.base_url)}" if endpoint.base_url else ""
    return words.get(kind, f"{endpoint.model}{where}")


def license_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """The recipe's `card` section, `not stated` for what it leaves out."""
    card = recipe.card
    known = {
        "this student": card.license,
        "the base": card.base_license,
        "the seeds": card.data_license,
        "the teacher's answers (terms)": card.terms,
        "language": card.language,
    }
    return [(name, text or NOT_STATED) for name, text in known.items()]


def results_section(run: RunDir, recipe: Recipe, shipped: int) -> str:
    """Every evaluated round's metrics with their 95 % intervals, and how they were measured."""
    paths = [run.round(number) / "metrics.json" for number in range(recipe.all_rounds + 1)]
    found = [read_record(Metrics, path) for path in paths if path.exists()]
    heads = ("round", "win rate", "95 %", "accuracy", "95 %", "score, student : teacher", "rows", "judged")
    adapter = (
        ""
        if recipe.export.rounds == "merged"
        else " Answers were generated with the round's adapter on the base's GGUF; the file here has both merged."
    )
    measured = (
        f"There is no win rate: scores are {found[-1].judge}, 1 to 10, and the teacher's own answer counts 10"
        if is_rouge_only(found[-1].win_rate, found[-1].student_score)
        else f"Win rate is against the teacher's own answers, a tie counts as half a win, judged by {found[-1].judge}"
    )
    about = f"Greedy answers to the held-out rows. {measured}; round {shipped} is this student.{adapter}"
    return f"{about}\n\n" + markdown_table(heads, [metrics_row(row) for row in found])


def metrics_row(row: Metrics) -> tuple[str, ...]:
    """A round's metrics as cells."""
    return (
        str(row.round),
        format_rate(row.win_rate),
        format_rate_interval(row.win_rate_interval),
        format_rate(row.accuracy),
        format_rate_interval(row.accuracy_interval),
        format_scores(row.student_score, row.teacher_score),
        f"{row.rows:,}",
        f"{row.judged:,}",
    )


def format_rate(value: float | None) -> str:
    """`51.2%`, or a dash."""
    return "-" if value is None else f"{value:.1%}"


def format_rate_interval(pair: Sequence[float] | None) -> str:
    """`45.0% to 57.3%`, or a dash."""
    return "-" if pair is None else f"{pair[0]:.1%} to {pair[1]:.1%}"


def format_scores(student: float | None, teacher: float | None) -> str:
    """`5.50 : 9.25`, or a dash."""
    return "-" if student is None or teacher is None else f"{student:.2f} : {teacher:.2f}"


def gate_section(report: GateReport) -> str:
    """How closely the GGUF agrees with the trained model."""
    found = report.figures
    return (
        "student.gguf was compared with the trained model in transformers, in 32 bits (gate.json):\n\n"
        f"- {format_count(report.probes, 'text')} tokenized, {report.mismatches:,} differently than in training\n"
        f"- BOS tokens of a prompt: {report.bos_gguf}, in training {report.bos_trained}; end of turn and chat template "
        "as in training\n"
        f"- mean divergence {found.kl:.3g} nats per token, {report.max_kl:g} allowed; largest difference of two logits "
        f"{found.largest_difference:.3g}\n"
        f"- the same greedy token at {found.agreement:.1%} of {format_count(found.positions, 'position')}, "
        f"{report.min_agreement:.1%} required"
        + (f"\n- {report.bits_per_weight:.1f} bits per weight in the file" if report.bits_per_weight else "")
    )


def versions_line(record: Mapping[str, Any]) -> str:
    """The versions of the program and the packages with which the run began."""
    revision = f" (revision {record['revision']})" if record.get("revision") else ""
    program = f"tapir-local {record.get('tapir_local', NOT_STATED)}{revision}"
    packages = [f"{name} {found}" for name, found in record.get("packages", {}).items()]
    return ", ".join([program, f"Python {record.get('python', NOT_STATED)}", *packages]) + "."


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(escape_cell, line)) + " |" for line in lines)


def escape_cell(text: str) -> str:
    """A cell's text on one line, with `|` escaped."""
    return re.sub(r"\s+", " ", text).replace("|", r"\|")
