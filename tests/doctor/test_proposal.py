"""What `init` proposes for a file of seeds and a machine, and the recipe that it writes."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from gpus import put_driver

from tapir_local.doctor.proposal import (
    GPU_STUDENTS,
    Choices,
    SeedFacts,
    check_choices,
    free_name,
    inspect_seeds,
    key_variable,
    propose_holdout,
    propose_student,
    recipe_yaml,
    scalar,
    teacher_settings,
)
from tapir_local.errors import TapirError
from tapir_local.memory import Gpu
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import parse_recipe

FACTS = SeedFacts("my.jsonl", 300, 0, 0)
CHOICES = Choices("my", FACTS, "gpt-4o-mini", "pocket", 3)


def written(choices: Choices) -> Recipe:
    return parse_recipe(recipe_yaml(choices, Path("my.yaml")), "my.yaml")


@pytest.mark.parametrize(
    ("named", "section", "variable"),
    [
        ("gpt-4o-mini", {"model": "gpt-4o-mini"}, "OPENAI_API_KEY"),
        ("teacher.gguf", {"gguf": "teacher.gguf"}, ""),
        (
            "http://localhost:8080/v1/q.gguf",
            {"base_url": "http://localhost:8080/v1", "model": "q.gguf"},
            "",
        ),  # as `serve` names it
        ("recorded", {"kind": "recorded"}, ""),
        (
            "http://localhost:8000/v1/Qwen/Qwen3-8B",
            {"base_url": "http://localhost:8000/v1", "model": "Qwen/Qwen3-8B"},
            "",
        ),
        ("https://api.example/v1/m", {"base_url": "https://api.example/v1", "model": "m"}, "OPENAI_API_KEY"),
        ("https://api.example/openai/m", {"base_url": "https://api.example/openai", "model": "m"}, "OPENAI_API_KEY"),
    ],
)
def test_a_teacher_is_named_in_one_word(named, section, variable):
    assert teacher_settings(named) == section
    assert key_variable(named) == variable


@pytest.mark.parametrize(
    "named", ["http://localhost:8000/v1/", "http://localhost:8000/v1", "http://host", "https://host/"]
)
def test_a_url_without_a_model_is_refused(named):
    with pytest.raises(TapirError, match="names no model"):
        teacher_settings(named)


def test_the_holdout_is_a_fifth_and_at_most_200():
    assert [propose_holdout(rows) for rows in (5, 40, 300, 1000, 50_000)] == [1, 8, 60, 200, 200]


@pytest.mark.parametrize("teacher", ["gpt-4o-mini", "http://localhost:1/v1/a: b", "recorded", "pocket"])
@pytest.mark.parametrize(("rows", "answered"), [(6, 6), (300, 300), (300, 12), (60_000, 60_000)])
@pytest.mark.parametrize("path", ["my.jsonl", "folder/my file: 1.csv", "123", "a#b.json", "~/x.json"])
def test_every_recipe_that_is_written_is_valid(teacher, rows, answered, path):
    facts = replace(FACTS, path=path, rows=rows, answered=answered, columns={"instruction": "frage, bitte"})
    recipe = written(replace(CHOICES, seeds=facts, teacher=teacher))
    assert recipe.seeds.columns == facts.columns
    assert recipe.seeds.path == str(Path(path).expanduser())
    assert recipe.seeds.holdout + recipe.curriculum.rows <= rows
    assert recipe.teacher.model == teacher_settings(teacher).get("model")


def test_a_server_on_this_machine_without_a_gpu_gets_few_requests_and_time(monkeypatch):
    """One that answers in turn let requests of a judge wait for more than the default timeout."""
    from tapir_local.doctor import proposal

    monkeypatch.setattr(proposal, "list_visible_gpus", list)
    slow = written(replace(CHOICES, teacher="http://localhost:8080/v1/q.gguf")).teacher
    assert (slow.model, slow.concurrency, slow.timeout) == ("q.gguf", 2, 600)
    assert written(CHOICES).teacher.concurrency == 16
    monkeypatch.setattr(proposal, "list_visible_gpus", lambda: [Gpu("A", 1 << 30, 24 * 10**9)])
    assert written(replace(CHOICES, teacher="http://localhost:8000/v1/m")).teacher.concurrency == 16


def test_the_first_line_is_the_command_that_runs_it():
    first = recipe_yaml(CHOICES, Path("my recipe.yaml")).splitlines()[0]
    assert first == "# OPENAI_API_KEY=... tapir-local distill 'my recipe.yaml'"
    local = recipe_yaml(replace(CHOICES, teacher="recorded"), Path("my.yaml")).splitlines()[0]
    assert local == "# tapir-local distill my.yaml"


def test_answers_of_the_file_are_kept_if_every_row_has_one():
    assert written(replace(CHOICES, seeds=replace(FACTS, answered=300))).seeds.answers == "file"
    assert written(replace(CHOICES, seeds=replace(FACTS, answered=10))).seeds.answers == "teacher"
    assert written(CHOICES).seeds.answers == "teacher"
    with pytest.raises(TapirError, match="needs answers, and no row has one"):
        check_choices(replace(CHOICES, teacher="recorded"))


def test_a_student_is_proposed_by_the_gpu_and_trained_by_its_table(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert propose_student()[0] == "smollm2"
    put_driver(tmp_path, monkeypatch)  # 24 GB
    path, why = propose_student()
    assert (path, why) == ("Qwen/Qwen3-4B-Base", "NVIDIA A has 25.8 GB: train.method lora")
    recipe = written(replace(CHOICES, student=path))
    assert (recipe.student.chat_template, recipe.train.method) == ("chatml", "lora")


@pytest.mark.parametrize(("total", "method"), [(24, "lora"), (12, "lora"), (8, "qlora"), (4, "lora")])
def test_the_table_of_students_covers_every_gpu(monkeypatch, total, method):
    from tapir_local.doctor import proposal

    monkeypatch.setattr(proposal, "list_visible_gpus", lambda: [Gpu("A", 1 << 30, total * 10**9)])
    recipe = written(replace(CHOICES, student=propose_student()[0]))
    assert recipe.train.method == method
    assert GPU_STUDENTS[-1][0] == 0


def test_seeds_are_read_and_counted(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("frage,antwort\n" + "".join(f"Was ist {n}?,{n if n % 2 else ''}\n" for n in range(10)))
    columns = {"instruction": "frage", "output": "antwort"}
    assert inspect_seeds(str(path), columns) == SeedFacts(str(path), 10, 5, 0, columns)
    with pytest.raises(TapirError, match="no known format") as refused:
        inspect_seeds(str(path), {})
    assert "seeds.columns" in refused.value.fix
    path.write_text("instruction\na\nb\n")
    with pytest.raises(TapirError, match="too few rows to distill from: 2"):
        inspect_seeds(str(path), {})


def test_a_run_gets_a_name_that_no_other_has():
    assert free_name("my", []) == "my"
    assert free_name("my", ["my", "my-2"]) == "my-3"
    assert free_name("mein Versuch (1)", []) == "mein-Versuch-1"
    assert free_name("???", []) == "my"


@pytest.mark.parametrize("text", ["true", "1e3", "a: b", "x #y", "- a", "a\nb", "'", '"', "ä", "", "null", "a,b", "}"])
def test_texts_survive_yaml(text):
    assert yaml.safe_load(f"[{scalar(text, in_flow=True)}]") == [text]
    assert yaml.safe_load(f"a: {scalar(text)}") == {"a": text}
