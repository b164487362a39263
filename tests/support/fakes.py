"""Fake backends of a run that learn: a GGUF is the list of instructions trained on, and answers those correctly."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapir_local.export.gate import Figures, GateReport
from tapir_local.files import read_rows, write_json, write_record, write_text
from tapir_local.method import prompts
from tapir_local.pipeline.loop import Watch
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import parse_recipe
from tapir_local.records import (
    Answer,
    Completion,
    Example,
    Progress,
    Prompt,
    Request,
    SchedulePart,
    Scored,
    instruction_of,
)
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import Backends
from tapir_local.stages.row_check import placeholder_format

RECIPE = """
name: fake
rounds: 2
seeds: {holdout: 10, path: PATH}
teacher: {kind: pocket}
curriculum: {rows: 20, first_rows: 10, drafts: 2}
classifier: {labelled: 30}
"""
PASSED = GateReport((), 600, 0, (), 0, 0, Figures(1e-4, 0.5, 0.01, 1.0, 100), 1e-2, 0.9)
STUDENT = placeholder_format(2048)  # accepts every conversation
QUIET = Watch(lambda step: None, lambda done, total, said: None, lambda step, taken: None)


def inner(text: str, tag: str) -> str:
    """The text between a pair of tags."""
    return text.partition(f"<{tag}>\n")[2].partition(f"\n</{tag}>")[0]


def reply(request: Request) -> str:
    """A teacher that labels by the first word, answers `right`, and judges `right` as 9 and the rest as 2."""
    system, text = request.messages[0].content, request.messages[min(1, len(request.messages) - 1)].content
    if system == prompts.CLASSIFY:
        return json.dumps({"task": "Math" if inner(text, "instruction").startswith("sum") else "Art"})
    if system == prompts.JUDGE:
        return json.dumps({f"answer_{n}": 9 if "right" in inner(text, f"answer_{n}") else 2 for n in (1, 2)})
    if system == prompts.JUDGE_SINGLE:
        return json.dumps({"score": 9 if "right" in inner(text, "answer") else 2})
    if system == prompts.CHECK:
        return json.dumps(
            {"complete": True, "answerable": True, "of_task": not inner(text, "instruction").endswith("3")}
        )
    if system in (prompts.EXPAND, prompts.RARER):
        word, number = inner(text, "instruction").split()[:2]
        word, digit = (f"{word} rare", 9) if system == prompts.RARER else (word, "")
        numbers = " ".join(f"{number}{digit}{request.draw}{n}" for n in range(5))
        return f"<new_instruction>{word} {numbers}</new_instruction>"
    if system == prompts.REFLECT_INSTRUCTION:
        asked = inner(text, "instruction")
        return f"Hm.<new_instruction>{asked}, better</new_instruction><new_answer>right indeed</new_answer>"
    if system == prompts.REFLECT_ANSWER:
        return f"right, reflected: {inner(text, 'instruction')}"
    return "right, in style" if system == prompts.REFINE else "right"


class World:
    """A teacher that counts its requests and can be interrupted at a given call."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.store: set[Request] = set()
        self.fail_at: int | None = None

    def ask(self, requests: Sequence[Request], progress: Progress) -> list[Answer]:
        answers = []
        for request in requests:
            hit = request in self.store
            if not hit and self.fail_at is not None and len(self.asked) >= self.fail_at:
                raise KeyboardInterrupt
            if not hit:
                self.asked.append(request)
                self.store.add(request)
            key = hashlib.sha256(repr(request).encode()).hexdigest()
            answers.append(Answer(reply(request), "stop", hit, key=key))
        return answers


def generate(
    *,
    gguf: Path,
    prompts: Sequence[Prompt],
    ids: Sequence[str],
    progress: Progress,
    on_result: Callable[[Completion], None],
) -> list[Completion]:
    known = set(json.loads(gguf.read_text()))
    found = []
    for id, prompt in zip(ids, prompts, strict=True):
        found.append(Completion(id, "right" if instruction_of(prompt) in known else "no idea", "stop", 2))
        on_result(found[-1])
    return found


def classify(*, labelled: Path, rows: Path, seed: int, out: Path, progress: Progress) -> None:
    out.mkdir()
    known = {row.id for row in read_rows(Example, labelled)}
    found = [row for row in read_rows(Example, rows) if row.id not in known]
    (out / "predictions.jsonl").write_text(
        "".join(f'{{"id":"{row.id}","task":"Art","confidence":1}}\n' for row in found)
    )
    write_json(out / "agreement.json", {"agreement": 0.9, "rows": 3})


def train(*, rows: Path, previous: Path | None, seed: int, part: SchedulePart, out: Path, progress: Progress) -> None:
    known = json.loads((previous / "known").read_text()) if previous else []
    out.mkdir()
    (out / "known").write_text(
        json.dumps(sorted({*known, *(instruction_of(row.prompt) for row in read_rows(Example, rows))}))
    )


def score(
    *, gguf: Path, texts: Sequence[tuple[Prompt, str]], progress: Progress, on_result: Callable[[Scored], None]
) -> list[Scored]:
    """A text is more likely the more of its letters are in the prompt; of two texts the longer has the higher IFD."""
    found = [
        Scored(str(n), -float(len(set(text) - set(instruction_of(prompt))) or 1), len(text))
        for n, (prompt, text) in enumerate(texts)
    ]
    for one in found:
        on_result(one)
    return found


def ship(*, student: Path, out: Path, progress: Progress) -> None:
    for name in ("student.gguf", "gate.json"):
        (out / name).write_bytes((student / name).read_bytes())
    (out / "Modelfile").write_text("FROM ./student.gguf\n")


def fake_backends(world: World) -> Backends:
    return Backends(
        teacher=world.ask,
        judge=world.ask,
        generate=generate,
        classify=classify,
        train=train,
        export=lambda adapter, out, progress: write_text(out, (adapter / "known").read_text()),
        export_untrained=lambda out, progress: write_text(out, "[]"),
        gate=lambda adapter, gguf, rows, out, progress: write_record(out, PASSED),
        score=score,
        ship=ship,
        student_format=lambda: STUDENT,
        check=lambda instruction, answer: "right" in answer,
    )


def make_recipe(folder: Path) -> Recipe:
    """A recipe with sixty seeds of two tasks."""
    texts = [f"{'sum' if n % 3 else 'paint'} {n} {n * n} {n**3} and {n * 7}" for n in range(60)]
    (folder / "seeds.json").write_text(json.dumps([{"instruction": text} for text in texts]))
    return parse_recipe(RECIPE.replace("PATH", str(folder / "seeds.json")), "fake.yaml")


def outputs(run: RunDir) -> dict[str, bytes]:
    """The bytes of every output, without run.json and run.log, which hold times."""
    files = [path for path in sorted(run.path.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {
        str(path.relative_to(run.path)): path.read_bytes() for path in files if path.name not in ("run.json", "run.log")
    }


def with_ask(world: World, change: Callable[[Request, Answer], Answer]) -> Backends:
    """Backends whose teacher's and judge's answers pass through `change`."""

    def ask(requests: Sequence[Request], progress: Progress) -> list[Answer]:
        return [
            change(request, answer) for request, answer in zip(requests, world.ask(requests, progress), strict=True)
        ]

    return replace(fake_backends(world), teacher=ask, judge=ask)


def here(
    work: Callable[[Path, Progress], None], job: Any, folder: Path, progress: Progress | None = None, *_: Any
) -> None:
    """Do in this process what a stage's own process does; importing torch there would take most of the tests' time."""
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "job.json", job)
    work(folder, progress or QUIET.progress)
