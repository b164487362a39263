"""Propose a recipe for a file of seeds and this machine, and write it as commented YAML."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tapir_local.data.dataset import parse_seeds
from tapir_local.data.files import read_table
from tapir_local.errors import TapirError
from tapir_local.memory import format_bytes, list_visible_gpus, total_memory
from tapir_local.printable import format_count
from tapir_local.recipe.schema import Seeds
from tapir_local.recipe.tasks import TASKS
from tapir_local.resources import SMOLLM2, named_student_gguf
from tapir_local.training.memory_estimate import estimate_memory
from tapir_local.training.model import Hardware

MIN_SEEDS = 5  # fewer rows leave nothing to hold out and train on
MAX_HOLDOUT, HOLDOUT_SHARE = 200, 0.2
MAX_ROWS, MAX_POOL = 6000, 4000  # rows of a round, and rows judged in it, as in recipes/qwen2.5-1.5b-alpaca.yaml
DEFAULT_LABELLED = 2000  # rows that the teacher labels (classifier.labelled); with fewer seeds no classifier is trained
PLAIN_SCALAR = re.compile(r"[\w./~-][\w./ ~:-]*")
# Students by the memory that they need, from the largest: bytes of the GPU, path, settings of student and of train.
# The figures are those of recipes/*.yaml (bench/memory.py); the last one is for a GPU of any size.
GPU_STUDENTS: tuple[tuple[float, str, Mapping[str, Any], Mapping[str, Any]], ...] = (
    (15e9, "Qwen/Qwen3-4B-Base", {"chat_template": "chatml"}, {"method": "lora", "micro_batch_size": 4}),
    (11e9, "Qwen/Qwen2.5-1.5B", {}, {"method": "lora", "micro_batch_size": 8}),
    (6e9, "Qwen/Qwen2.5-1.5B", {}, {"method": "qlora", "micro_batch_size": 4}),
    (0, "Qwen/Qwen2.5-0.5B", {}, {"method": "lora", "micro_batch_size": 4}),
)
CPU_STUDENT_SETTINGS = {"max_length": 512, "max_tokens": 128, "concurrency": 8}


@dataclass(frozen=True)
class SeedFacts:
    """What a file of seeds holds: rows that can be used, how many have answers, and rows that cannot be used."""

    path: str
    rows: int
    answered: int
    unusable: int
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choices:
    """What the user chose: seeds, teacher (see `teacher_settings`), student (a path), rounds after round 0."""

    name: str
    seeds: SeedFacts
    teacher: str
    student: str
    rounds: int


def inspect_seeds(path: str, columns: Mapping[str, str]) -> SeedFacts:
    """Read a file of seeds; TapirError if it cannot be read or has too few rows."""
    found = parse_seeds(read_table(Seeds.model_validate({"path": path, "columns": dict(columns)})), TASKS)
    if not found.examples:
        found.refuse()
    rows, bad = len(found.examples), len(found.faulty) + len(found.duplicates)
    if rows < MIN_SEEDS:
        what = f"too few rows to distill from: {rows}"
        raise TapirError(what, where=path, fix=f"Give at least {MIN_SEEDS}; some hundred make a useful student.")
    return SeedFacts(path, rows, sum(bool(row.completion) for row in found.examples), bad, columns)


def describe_seeds(facts: SeedFacts) -> str:
    """What was found in a file of seeds, and what will be held out."""
    answers = f"{facts.answered:,} with answers" if facts.answered else "no answers"
    bad = f"; {facts.unusable:,} left out (duplicate or unreadable)" if facts.unusable else ""
    held = f"{propose_holdout(facts.rows):,} will be held out"
    return f"{facts.path}: {format_count(facts.rows, 'row')}, {answers}; {held}{bad}"


def propose_holdout(rows: int) -> int:
    """A fifth of the rows, at most 200: then the 95 % interval of a rate is about 7 points to either side."""
    return max(1, min(MAX_HOLDOUT, round(HOLDOUT_SHARE * rows)))


def propose_student() -> tuple[str, str]:
    """(path of a student that this machine can train, the reason in words)."""
    if cards := list_visible_gpus():
        card = max(cards, key=lambda gpu: gpu.total)
        path, settings = next((path, train) for least, path, _, train in GPU_STUDENTS if card.total >= least)
        return path, f"{card.name} has {format_bytes(card.total)}: train.method {settings['method']}"
    return SMOLLM2, f"no GPU, {format_bytes(total_memory())} of memory: SmolLM2 has 135 million weights"


def student_settings(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of `student`, settings of `train`) for a student on this machine, without its path."""
    cards = list_visible_gpus()
    if not cards:
        return dict(CPU_STUDENT_SETTINGS), {"method": "lora", "learning_rate": 5e-4, "micro_batch_size": 8}
    card = max(cards, key=lambda gpu: gpu.total)
    for least, known, student, train in GPU_STUDENTS:
        if known == path and card.total >= least:
            return dict(student), dict(train)
    return {}, {"method": "lora" if fits_as_lora(path, card.free, card.total) else "qlora", "micro_batch_size": 4}


def fits_as_lora(path: str, free: int, total: int) -> bool:
    """Whether LoRA on a model fits into a GPU's free memory; True for a model that is no folder here."""
    from tapir_local.recipe.schema import Train

    if not Path(path).is_dir():
        return True
    hardware = Hardware("cuda", "trl", "bf16", free, 1, total)
    needs = estimate_memory(path, Train(), hardware, 4 * 2048)
    return needs is None or needs.fixed + needs.checkpointed < free


def teacher_settings(named: str) -> dict[str, Any]:
    """The section `teacher` for `recorded`, a GGUF, URL/MODEL of a server, or the name of a model at OpenAI.

    The model is what follows /v1/ or, in a URL without it, the last part. TapirError if a URL names no model.
    """
    if named in ("recorded", "pocket"):
        return {"kind": named}
    if not named.startswith(("http://", "https://")):
        return {"gguf" if named.lower().endswith(".gguf") else "model": named}
    head, mark, model = named.partition("/v1/")
    url = head + "/v1" if mark else named.rpartition("/")[0]
    model = model if mark else named.rpartition("/")[2]
    if not model or url.endswith((":", ":/", "/")) or (not mark and model == "v1"):
        fix = "Write the server's URL and the model: http://localhost:8000/v1/MODEL"
        raise TapirError("the URL names no model", where=named, fix=fix)
    return {"base_url": url, "model": model}


def key_variable(named: str) -> str:
    """The environment variable whose key the teacher needs; "" if it needs none."""
    from tapir_local.teacher.endpoint import is_loopback

    found = teacher_settings(named)
    remote = "model" in found and not is_loopback(found.get("base_url", "https://api.openai.com/v1"))
    return "OPENAI_API_KEY" if remote else ""


def check_choices(choices: Choices) -> None:
    """TapirError if the teacher is `recorded` and no row has an answer, or the student is a GGUF that is not there."""
    if choices.teacher == "recorded" and not choices.seeds.answered:
        fix = "Name a teacher, or give a file with answers."
        raise TapirError("a recorded teacher needs answers, and no row has one", where=choices.seeds.path, fix=fix)
    teacher_settings(choices.teacher)
    if choices.student != SMOLLM2 and (gguf := named_student_gguf(choices.student)) and not gguf.is_file():
        raise TapirError("there is no such GGUF", where=choices.student, fix="Correct --student.")


def recipe_yaml(choices: Choices, path: Path) -> str:
    """The recipe in YAML with a reason for each proposal; the first line is the command that runs it."""
    facts, teacher = choices.seeds, teacher_settings(choices.teacher)
    recorded, asked = choices.teacher == "recorded", "model" in teacher
    held = propose_holdout(facts.rows)
    rest = facts.rows - held
    student, train = student_settings(choices.student)
    variable = key_variable(choices.teacher)
    command = f"# {f'{variable}=... ' if variable else ''}tapir-local distill {shlex.quote(str(path))}"
    lines = [
        command,
        "#",
        f"# Written by `tapir-local init` for {format_count(facts.rows, 'row')}; "
        "docs/settings.md describes every setting.",
        f"name: {choices.name}",
        note(f"rounds: {choices.rounds}", "after round 0, which is plain fine-tuning"),
        "seeds:",
        f"  path: {scalar(facts.path)}",
        *([f"  columns: {flow(facts.columns)}"] if facts.columns else []),
        note(f"  holdout: {held}", f"for evaluation, never trained on; {format_count(rest, 'row')} left to train on"),
        *answer_lines(facts, recorded),
        "student:",
        f"  path: {scalar(choices.student)}",
        *setting_lines(student),
        f"teacher: {'recorded' if recorded else flow({**teacher, **slow_server_settings(teacher)})}",
        *(price_lines() if asked else []),
        note("judge: reference", "likeness to your answers (ROUGE-L); no calls") if recorded else "judge: teacher",
        "curriculum:",
        note(f"  rows: {min(rest, MAX_ROWS)}", "training rows per round, as many as there are seeds, at most 6,000"),
        *([note(f"  pool: {MAX_POOL}", "rows judged per round; two calls each")] if rest > MAX_POOL else []),
        "train:",
        note(f"  batch_size: {propose_batch(rest)}", "rows per step"),
        *setting_lines(train),
        "export:",
        "  quant: q8_0",
    ]
    return "\n".join(lines) + "\n"


def slow_server_settings(teacher: Mapping[str, Any]) -> Mapping[str, Any]:
    """Few requests in flight and a long timeout, for a server on this machine without a GPU.

    Such a server answers one request after the other: with 16 in flight, those of a judge waited longer than 120 s.
    """
    from tapir_local.teacher.endpoint import is_loopback

    slow = is_loopback(teacher.get("base_url", "")) and not list_visible_gpus()
    return {"concurrency": 2, "timeout": 600} if slow else {}


def propose_batch(rows: int) -> int:
    """Rows per optimizer step: a round should have some dozens of steps."""
    return 8 if rows < 1000 else 16 if rows < 4000 else 64


def answer_lines(facts: SeedFacts, recorded: bool) -> list[str]:
    """The setting seeds.answers, if the rows have answers."""
    if not facts.answered:
        return []
    if recorded:
        return [note("  answers: file", f"of {format_count(facts.answered, 'row')}; the others are left out")]
    few = facts.answered < facts.rows
    if few:
        have = format_count(facts.answered, "row has an answer", "rows have answers")
        return [note("  answers: teacher", f"{have}; `file` keeps them and leaves out the other rows")]
    return [note("  answers: file", "the rows' own; `teacher`: the teacher writes its own")]


def price_lines() -> list[str]:
    """The price and the budget of an endpoint, as comments: only the user knows them."""
    return [
        "# For costs in money, add the price per million tokens to teacher, such as price: {input: 0.15, output: 0.60}",
        "# budget: {money: 20}   # the run stops before it is exceeded; it needs the price",
    ]


def setting_lines(settings: Mapping[str, Any]) -> list[str]:
    """Lines of YAML for the settings of a section."""
    return [f"  {name}: {scalar(value)}" for name, value in settings.items()]


def note(line: str, text: str) -> str:
    """A line of YAML with a comment."""
    return f"{line:<24}# {text}"


def flow(settings: Mapping[str, Any]) -> str:
    """A mapping on one line: `{model: gpt-4o-mini}`."""
    return "{" + ", ".join(f"{scalar(name)}: {scalar(value, in_flow=True)}" for name, value in settings.items()) + "}"


def scalar(value: Any, *, in_flow: bool = False) -> str:
    """A text or number as YAML, in quotes only if it needs them."""
    if not isinstance(value, str):
        return f"{value:g}" if isinstance(value, float) else str(value)
    plain = PLAIN_SCALAR.fullmatch(value) and not (in_flow and ": " in value) and not value.endswith((" ", ":"))
    try:
        same = bool(plain) and yaml.safe_load(value) == value
    except yaml.YAMLError:
        same = False
    return value if same else json.dumps(value, ensure_ascii=False)


def free_name(stem: str, taken: Sequence[str]) -> str:
    """A valid run name from a file's stem that no run of the cache has: `my`, `my-2`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:80] or "my"
    number = next(n for n in range(1, len(taken) + 2) if (name if n == 1 else f"{name}-{n}") not in taken)
    return name if number == 1 else f"{name}-{number}"
