"""Every shipped recipe names a valid command and the estimated number of calls, and runs with a tiny student."""

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from fakes import QUIET, here
from models import make_model
from server import Server, send

from tapir_local.commands.distill import distill_command as command
from tapir_local.data.chat_template import render_training_text
from tapir_local.data.dataset import Draft
from tapir_local.errors import TapirError
from tapir_local.export import export, gate
from tapir_local.export.base import base_gguf, prepare_student_folder, student_folder
from tapir_local.export.export import export_gguf
from tapir_local.export.gate import GateReport
from tapir_local.files import read_record, read_rows
from tapir_local.inference.model import read_gguf_template
from tapir_local.pipeline.dry_run import expected_calls
from tapir_local.pipeline.loop import distill, list_steps
from tapir_local.pocket import teacher
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override, parse_recipe
from tapir_local.records import Completion, Example, Message
from tapir_local.resources import POCKET_SEEDS, find_recipe, read_chat_template, recipe_files
from tapir_local.run_dir import RunDir
from tapir_local.stages.backends import real_backends
from tapir_local.stages.rounds import ROUND_STAGES
from tapir_local.training import classifier, train

ROOT = Path(__file__).parents[2]
ALPACA = 52002  # rows of alpaca_data.json
LLAMA2_TOKENIZER = ROOT.parent / "shared/data/tokenizers/granite-7b-lab"
SMALL = {
    "rounds": 1,
    "seeds.limit": 44,
    "seeds.holdout": 8,
    "student.max_tokens": 8,
    "curriculum.rows": 12,
    "export.min_agreement": 0.5,  # the greedy choices of random weights are near ties
}


def shipped(name: str) -> Recipe:
    path = find_recipe(name)
    return parse_recipe(path.read_text(encoding="utf-8"), path.name)


# The comments of a recipe


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: path.stem)
def test_the_first_line_is_a_command_that_runs_this_recipe(path: Path) -> None:
    words = shlex.split(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#"))
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    assert words[:2] == ["tapir-local", "distill"]
    given = command.make_context("distill", words[2:]).params
    assert find_recipe(given["recipe"]).resolve() == path.resolve()
    changes = {"rounds": given["rounds"], "seeds.path": given["seeds"] and str(given["seeds"])}
    settled = {key: value for key, value in changes.items() if value is not None}
    assert override(shipped(path.stem), settled) == shipped(path.stem)


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: path.stem)
def test_the_calls_in_a_recipes_comment_are_the_estimated_ones(path: Path) -> None:
    quoted = re.search(r"52,002 rows[^:]*: ([\d,]+) calls", path.read_text(encoding="utf-8").replace("\n# ", " "))
    recipe = shipped(path.stem)
    if quoted is None:
        assert recipe.teacher.kind in ("pocket", "recorded")
        return
    rows = min(recipe.seeds.limit or ALPACA, ALPACA)
    labelled = min(recipe.classifier.labelled, rows)
    calls = rows + labelled + min(recipe.classifier.ask_at_most, rows - labelled)
    calls += sum(expected_calls(name, 0, recipe, rows) for name in ("untrained-judge", "holdout-judge"))
    for number in range(1, recipe.rounds + 1):
        calls += sum(expected_calls(stage.name, number, recipe, rows) for stage in ROUND_STAGES)
    assert quoted[1] == f"{calls:,}"


def test_the_paper_recipe_has_the_papers_settings() -> None:
    plan = shipped("llama2-7b-alpaca").curriculum
    assert (plan.alpha, plan.alpha_step, plan.mfd_threshold) == (0.3, 0.2, 2)
    assert (shipped("llama2-7b-alpaca").rounds, plan.name, plan.pool) == (3, "tapir", None)


# Runs


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    os.environ["OPENAI_API_KEY"] = "a key"
    for module in (classifier, train, export, gate):
        monkeypatch.setattr(module, "run_in_process", here)
    yield
    os.environ.clear()
    os.environ.update(before)


def llama2(folder: Path) -> dict[str, Any]:
    """A model like meta-llama/Llama-2-7b-hf: SentencePiece, no chat template, no padding token, weights in f16."""
    from transformers import AutoModelForCausalLM

    make_model(folder, **({"vocab_size": 32000} if LLAMA2_TOKENIZER.is_dir() else {}))
    AutoModelForCausalLM.from_pretrained(folder).half().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    if LLAMA2_TOKENIZER.is_dir():
        tokenizer = json.loads((LLAMA2_TOKENIZER / "tokenizer.json").read_text())
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < 3]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {"student.path": str(folder)}


def qwen(folder: Path, family: str, template: str) -> dict[str, Any]:
    """Qwen's tokenizer, with TRL's copy of the family's template."""
    (trl,) = find_spec("trl").submodule_search_locations  # type: ignore[union-attr,misc]
    make_model(folder, family, kind="qwen2", template=(Path(trl) / "chat_templates" / f"{template}.jinja").read_text())
    return {"student.path": str(folder)}


def talker(folder: Path) -> Path:
    """A GGUF that generates a few random words and stops: one large hidden dimension stands for <|im_end|>."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    model = make_model(folder / "teacher", max_position_embeddings=2048)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 8.0
    weights["model.norm.weight"][0] = 1.0
    weights["lm_head.weight"][:, 0] = 0.0
    weights["lm_head.weight"][:6] = weights["lm_head.weight"][400:] = 0.0
    weights["lm_head.weight"][AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<|im_end|>"), 0] = 1.2
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    export_gguf(model, folder / "teacher.gguf", adapter=None, quant="q8_0")
    return folder / "teacher.gguf"


def teacher_here(folder: Path) -> dict[str, Any]:
    """Labels from the file and random scores, because a teacher of random weights cannot label or judge."""
    folder.mkdir()
    rows = json.loads(POCKET_SEEDS.read_text())[:44]
    (folder / "seeds.json").write_text(json.dumps([{**row, "task": "Math"} for row in rows]))
    asked = {"teacher.gguf": str(talker(folder)), "teacher.max_tokens": 48, "teacher.context": 2048}
    lots = {"judge.temperature": 2.0, "curriculum.teacher_floor": 1, "curriculum.mfd_threshold": 0}
    student = qwen(folder / "student", "qwen2", "qwen2_5")
    return {**student, **asked, **lots, "seeds.path": str(folder / "seeds.json")}


def recorded(folder: Path) -> dict[str, Any]:
    return {"seeds.path": str(POCKET_SEEDS), "student.path": str(make_model(folder))}


STUDENTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "llama2-7b-alpaca": llama2,
    "qwen2.5-1.5b-alpaca": lambda folder: qwen(folder, "qwen2", "qwen2_5"),
    "qwen3-4b": lambda folder: qwen(folder, "qwen3", "qwen3"),
    "local-teacher": teacher_here,
    "recorded": recorded,
    "smollm2": recorded,
}


def ran(recipe: Recipe, cache: Path) -> RunDir:
    run = RunDir(cache, recipe.name)
    with real_backends(recipe, run, print) as backends:
        distill(recipe, run, backends, QUIET)
    assert all(step.done for step in list_steps(run, recipe.rounds))
    return run


def small(name: str, server: Server, changes: dict[str, Any]) -> Recipe:
    """A shipped recipe with few rows; a teacher behind an endpoint is the pocket teacher over HTTP on loopback."""
    server.otherwise = lambda handler, body: send(
        handler, 200, {**teacher.chat_completion_object(body), "model": body["model"]}
    )
    recipe = shipped(name)
    if recipe.teacher.kind == "openai":
        changes = {"teacher.base_url": server.url, "seeds.path": "pocket", "classifier.model": "small", **changes}
    return override(recipe, {**SMALL, "classifier.labelled": 30, **changes})


def test_every_recipe_is_run_by_a_test() -> None:
    assert {path.stem for path in recipe_files()} == {
        *STUDENTS,
        "quickstart",
    }  # quickstart is run by test_quickstart.py


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_a_recipe_runs(name: str, tmp_path: Path, server: Server, one_process: None) -> None:
    recipe = small(name, server, STUDENTS[name](tmp_path / "student"))
    run, own = ran(recipe, tmp_path), Path(recipe.student.path) / "chat_template.jinja"
    named = recipe.student.chat_template
    wanted = read_chat_template(named) if named else own.read_text()
    for number in (0, 1):
        assert read_record(GateReport, run.round(number) / "gate.json").passed
        assert read_rows(Example, run.round(number) / "train.jsonl")
        assert read_gguf_template(run.round(number) / "student.gguf")[0] == wanted
    held, answers = (run.path / "holdout.jsonl", run.round(1) / "holdout-answers.jsonl")
    assert [row.id for row in read_rows(Completion, answers)] == [row.id for row in read_rows(Example, held)]
    assert read_gguf_template(base_gguf(recipe, run))[0] == wanted
    assert bool(server.bodies) == (recipe.teacher.kind == "openai")


@pytest.mark.slow
def test_reflection_scores_with_the_students_gguf(tmp_path: Path, one_process: None) -> None:
    small_run = parse_recipe((ROOT / ".ci" / "small.yaml").read_text(), "small.yaml")
    changes = {"curriculum.name": "reflection", "seeds.limit": 60, "seeds.holdout": 12, "curriculum.rows": 24}
    run = ran(override(small_run, {**changes, "classifier.labelled": 100}), tmp_path)
    drafts, rows = (
        read_rows(Draft, run.round(1) / "expanded.jsonl"),
        read_rows(Example, run.round(1) / "train.jsonl"),
    )
    kept = {draft.example.parent for draft in drafts if not draft.reason}
    assert len(drafts) == len(rows) == 24
    assert {row.parent for row in rows if row.origin == "expanded"} == kept
    assert 0 < len(kept) < 24
    assert any("IFD" in draft.reason for draft in drafts)


# A student's chat template


def refused(recipe: Recipe, cache: Path) -> str:
    with pytest.raises(TapirError) as caught:
        ran(recipe, cache)
    return str(caught.value)


def test_a_student_without_a_template_is_refused_before_anything_is_paid(tmp_path: Path, server: Server) -> None:
    recipe = small("llama2-7b-alpaca", server, {**llama2(tmp_path / "student"), "student.chat_template": None})
    said = refused(recipe, tmp_path)
    assert "has no chat template" in said
    assert "student.chat_template: `alpaca`" in said
    assert server.bodies == []


@pytest.mark.skipif(not LLAMA2_TOKENIZER.is_dir(), reason="the tokenizer is not on this machine")
def test_a_template_of_tokens_that_a_student_lacks_is_refused(tmp_path: Path, server: Server) -> None:
    recipe = small("llama2-7b-alpaca", server, {**llama2(tmp_path / "student"), "student.chat_template": "chatml"})
    assert "would never stop" in refused(recipe, tmp_path)
    assert server.bodies == []


def test_a_missing_template_is_refused(tmp_path: Path, server: Server) -> None:
    recipe = small("qwen3-4b", server, {"student.path": "pocket", "student.chat_template": "alpacca"})
    said = refused(recipe, tmp_path)
    assert "alpacca: there is no such chat template" in said
    assert "alpaca, chatml" in said


def test_a_template_stays_as_it_was_at_the_first_training(tmp_path: Path) -> None:
    own, run = tmp_path / "own.jinja", RunDir(tmp_path, "r")
    model = make_model(tmp_path / "student")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    recipe = parse_recipe(f"teacher: pocket\nstudent: {{path: {model}, chat_template: {own}}}", "r")
    for text in ("one", "two"):
        own.write_text(text)
        assert (prepare_student_folder(recipe, run) / "chat_template.jinja").read_text() == text
    (run.round(0) / "adapter").mkdir(parents=True)
    own.write_text("three")
    view = prepare_student_folder(recipe, run)
    assert student_folder(recipe, run) == view
    assert (view / "chat_template.jinja").read_text() == "two"
    assert {path.name: path.read_bytes() for path in view.iterdir()} == {**before, "chat_template.jinja": b"two"}
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_qwen3s_own_template_makes_a_student_write_an_empty_thought(tmp_path: Path) -> None:
    """The reason why qwen3-4b.yaml names another template: the judge sees everything that a student writes."""
    folder = Path(qwen(tmp_path, "qwen3", "qwen3")["student.path"])
    texts = [(folder / "chat_template.jinja").read_text(), read_chat_template("chatml")]
    written = [render_training_text(text, (Message("user", "Hi"),), "Yes.")[1] for text in texts]
    assert written == ["<think>\n\n</think>\n\nYes.<|im_end|>\n", "Yes.<|im_end|>\n"]
