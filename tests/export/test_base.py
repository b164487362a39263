"""A round's student as an adapter on a base GGUF that is made once: equal answers, replaced files are noticed."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import QUIET, here
from models import make_adapter, make_model

from tapir_local.errors import TapirError
from tapir_local.export import export, gate
from tapir_local.export.base import (
    base_gguf,
    base_gguf_path,
    fingerprint,
    fingerprint_path,
    model_digest,
    student_files,
)
from tapir_local.export.export import export_adapter
from tapir_local.export.gate import GateReport
from tapir_local.files import read_record, read_rows, write_json, write_rows
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.generate import generate
from tapir_local.inference.model import is_adapter
from tapir_local.pipeline.loop import distill, redo
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override, parse_recipe
from tapir_local.records import Completion, Example, Message, Progress
from tapir_local.resources import POCKET_SEEDS, find_recipe
from tapir_local.run_dir import RunDir
from tapir_local.stages.backends import export_backend, gate_backend, real_backends, ship_backend
from tapir_local.talk.conversation import answer_once, open_chat_models
from tapir_local.talk.models import ModelFinder
from tapir_local.training import train

PROMPTS = [(Message("user", f"What is {number} times {number % 7}?"),) for number in range(12)]
SETTINGS = {"export.rounds": "adapter", "export.quant": "f32", "export.min_agreement": 0.5}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    for module in (train, export, gate):
        monkeypatch.setattr(module, "run_in_process", here)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def model(llama, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama.model, tmp_path / "model"))


@pytest.fixture
def recipe(model: Path) -> Recipe:
    return override(parse_recipe("teacher: pocket", "r"), {"student.path": str(model), **SETTINGS})


@pytest.fixture
def run(llama, tmp_path: Path) -> RunDir:
    return begun(llama, RunDir(tmp_path / "cache", "r"))


def begun(llama, run: RunDir) -> RunDir:
    """A run whose round 0 is trained but not exported."""
    shutil.copytree(llama.adapter, run.round(0) / "adapter")
    write_rows(run.round(0) / "train.jsonl", [Example(str(n), prompt) for n, prompt in enumerate(PROMPTS)])
    return run


def exported(recipe: Recipe, run: RunDir, progress: Progress = QUIET.progress) -> Path:
    out = run.round(0) / "student.gguf"
    export_backend(recipe, run)(adapter=run.round(0) / "adapter", out=out, progress=progress)
    return out


def gated(recipe: Recipe, run: RunDir) -> GateReport:
    folder, out = run.round(0), run.round(0) / "gate.json"
    gate_backend(recipe, run)(
        adapter=folder / "adapter",
        gguf=folder / "student.gguf",
        rows=folder / "train.jsonl",
        out=out,
        progress=QUIET.progress,
    )
    return read_record(GateReport, out)


def answers(recipe: Recipe, run: RunDir) -> list[str]:
    opened = student_files(recipe, run, run.round(0) / "student.gguf")
    found = generate(opened.gguf, PROMPTS, GenerationConfig(max_tokens=16, context=256), adapter=opened.adapter)
    return [row.text for row in found]


def test_an_adapter_answers_as_the_merged_student_does(llama, recipe: Recipe, run: RunDir, tmp_path: Path) -> None:
    exported(recipe, run)
    assert gated(recipe, run).passed
    whole, merged = begun(llama, RunDir(tmp_path / "other", "r")), override(recipe, {"export.rounds": "merged"})
    assert not is_adapter(exported(merged, whole))
    assert answers(recipe, run) == answers(merged, whole)
    assert gated(merged, whole).figures.agreement == gated(recipe, run).figures.agreement


def test_the_shipped_gguf_is_merged_and_verified(recipe: Recipe, run: RunDir, tmp_path: Path) -> None:
    exported(recipe, run)
    (tmp_path / "out").mkdir()
    ship_backend(recipe, run)(student=run.round(0), out=tmp_path / "out", progress=QUIET.progress)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "gate.json", "student.gguf"]
    assert read_record(GateReport, tmp_path / "out" / "gate.json").passed
    shipped = generate(tmp_path / "out" / "student.gguf", PROMPTS, GenerationConfig(max_tokens=16, context=256))
    assert [row.text for row in shipped] == answers(recipe, run)
    assert not (run.path / "ship").exists()


def test_a_base_is_made_once_and_found_by_another_run(llama, recipe: Recipe, run: RunDir) -> None:
    exported(recipe, run)
    base = base_gguf(recipe, run)
    before = base.stat().st_mtime_ns
    other = begun(llama, RunDir(run.cache, "other"))
    exported(recipe, other)
    assert student_files(recipe, other, other.round(0) / "student.gguf").gguf == base
    assert base.stat().st_mtime_ns == before
    assert read_record(GateReport, base.with_name("f32.gguf.gate.json")).passed


def test_a_student_is_opened_without_its_models_folder(recipe: Recipe, run: RunDir, model: Path) -> None:
    exported(recipe, run)
    before = answers(recipe, run)
    shutil.rmtree(model)
    assert answers(recipe, run) == before


def test_a_deleted_base_is_made_again_with_the_same_bytes(recipe: Recipe, run: RunDir) -> None:
    exported(recipe, run)
    base = base_gguf(recipe, run)
    before = base.read_bytes()
    base.unlink()
    assert student_files(recipe, run, run.round(0) / "student.gguf").gguf.read_bytes() == before


@pytest.mark.parametrize("nth", [1, 12, 21, 30])
def test_an_interrupted_export_ends_in_the_same_files(
    llama, recipe: Recipe, run: RunDir, tmp_path: Path, nth: int
) -> None:
    """Interrupted while the base (21 tensors) is written, and while the adapter is."""
    notes = []

    def cut(done: int, total: int, note: str) -> None:
        notes.append(note)
        if len(notes) == nth:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exported(recipe, run, cut)
    assert not (run.round(0) / "student.gguf").exists()
    exported(recipe, run)
    whole = begun(llama, RunDir(tmp_path / "uncut", "r"))
    exported(recipe, whole)
    for one, other in ((run, whole), (whole, run)):
        assert (one.round(0) / "student.gguf").read_bytes() == (other.round(0) / "student.gguf").read_bytes()
        assert base_gguf(recipe, one).read_bytes() == base_gguf(recipe, other).read_bytes()


# Replaced or damaged files


def refused(recipe: Recipe, run: RunDir) -> str:
    with pytest.raises(TapirError) as caught:
        answers(recipe, run)
    return str(caught.value)


@pytest.mark.parametrize("damage", ["a byte", "cut short"])
def test_a_damaged_base_is_noticed(recipe: Recipe, run: RunDir, damage: str) -> None:
    exported(recipe, run)
    base = base_gguf(recipe, run)
    content = bytearray(base.read_bytes())
    content[len(content) // 2] ^= 1
    base.write_bytes(content if damage == "a byte" else content[:-9])
    assert "not the file that passed the gate" in refused(recipe, run)
    base.unlink()
    answers(recipe, run)


def test_a_base_of_other_weights_does_not_pass_the_rounds_gate(recipe: Recipe, run: RunDir, tmp_path: Path) -> None:
    """Its fingerprint is made to match, as for a file that differs only between the hashed pieces."""
    exported(recipe, run)
    base, other = base_gguf(recipe, run), make_model(tmp_path / "other", seed=5)
    export.export_gguf(other, base, adapter=None, quant="f32")
    write_json(fingerprint_path(base), {"bytes": base.stat().st_size, "print": fingerprint([base])})
    with pytest.raises(TapirError, match=r"not the trained model: .*logits"):
        gated(recipe, run)


def test_a_swapped_adapter_does_not_pass_the_gate(recipe: Recipe, run: RunDir, model: Path, tmp_path: Path) -> None:
    exported(recipe, run).unlink()
    other = make_adapter(model, tmp_path / "other", seed=9)
    export_adapter(model, other, run.round(0) / "student.gguf")
    with pytest.raises(TapirError, match=r"not the trained model: .*logits"):
        gated(recipe, run)
    assert not (run.round(0) / "gate.json").exists()


def test_a_student_whose_weights_changed_during_the_run_is_refused(recipe: Recipe, run: RunDir, model: Path) -> None:
    exported(recipe, run)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-3] ^= 64
    (model / "model.safetensors").write_bytes(weights)
    shutil.copytree(run.round(0) / "adapter", run.round(1) / "adapter")
    folder = run.round(1)
    with pytest.raises(TapirError, match=r"have changed since run 'r' began(.|\n)*redo r --round 0 --from train"):
        export_backend(recipe, run)(adapter=folder / "adapter", out=folder / "student.gguf", progress=QUIET.progress)
    exported(recipe, run)  # round 0, when started again, uses the student as it is now
    assert gated(recipe, run).passed


def test_a_digest_depends_on_weights_and_tokenizer_only(model: Path) -> None:
    before = model_digest(model)
    (model / "README.md").write_text("new")
    assert model_digest(model) == before
    (model / "chat_template.jinja").write_text("new")
    assert model_digest(model) != before


def test_two_types_of_weights_are_two_files_of_one_base(tmp_path: Path) -> None:
    one, other = (base_gguf_path(tmp_path, "0123", quant) for quant in ("q8_0", "f16"))
    assert one.parent == other.parent
    assert one != other


def test_an_adapter_is_not_a_model(recipe: Recipe, run: RunDir) -> None:
    with pytest.raises(TapirError, match="LoRA adapter, not a model"):
        generate(exported(recipe, run), PROMPTS[:1], GenerationConfig(max_tokens=4, context=64))


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"no GGUF at all", b"GGUF" + bytes(30), b"GGUF" + b"\xff" * 20, b"GGUF" + b"\x01" * 40]
)
def test_a_file_that_is_not_a_gguf_is_not_an_adapter(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert not is_adapter(tmp_path / "file")
    assert not is_adapter(tmp_path / "none")


def test_too_little_disk_space_for_the_base_is_an_error_before_the_export(
    recipe: Recipe, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(TapirError, match="not enough disk space for"):
        exported(recipe, run)
    assert not (run.cache / "base" / model_digest(Path(recipe.student.path)) / "f32.gguf").exists()
    assert not (run.round(0) / "student.gguf").exists()


# A whole run


@pytest.mark.slow
def test_a_run_gives_the_same_answers_merged_and_as_adapter(tmp_path: Path) -> None:
    model = make_model(tmp_path / "student")
    shipped = parse_recipe(find_recipe("recorded").read_text(encoding="utf-8"), "recorded")
    small = {"rounds": 1, "seeds.limit": 44, "seeds.holdout": 8, "student.max_tokens": 8, "curriculum.rows": 12}
    named = {"seeds.path": str(POCKET_SEEDS), "student.path": str(model), "classifier.model": "small"}
    found = {}
    for way in ("merged", "adapter"):
        changes = {**SETTINGS, **small, **named, "export.rounds": way, "name": way, "train.start": "previous"}
        recipe, run = override(shipped, changes), RunDir(tmp_path / "cache", way)
        with real_backends(recipe, run, print) as backends:
            distill(recipe, run, backends, QUIET)
        found[way] = [row.text for row in read_rows(Completion, run.round(1) / "holdout-answers.jsonl")]
        assert is_adapter(run.round(1) / "student.gguf") == (way == "adapter")
        assert not is_adapter(run.path / "model" / "student.gguf")
    assert found["merged"] == found["adapter"]
    said: list[str] = []
    finder = ModelFinder(run.cache, run, said.append)
    with open_chat_models([finder.find_round(1), finder.find_base()], 1) as answering:
        answer_once(answering, "What is 3 + 4?", 0.0, said.append)
    assert "[base]\n" in said
    assert json.loads((run.path / "base.json").read_bytes())["base"] == model_digest(model)
    before = {path.name: path.read_bytes() for path in (run.path / "model").iterdir()}
    redo(run, 1, "export")
    with real_backends(recipe, run, print) as backends:
        distill(recipe, run, backends, QUIET)
    assert {path.name: path.read_bytes() for path in (run.path / "model").iterdir()} == before
