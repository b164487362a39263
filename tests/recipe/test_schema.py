"""A recipe is read completely, or refused with the path of the wrong setting."""

import ast
from pathlib import Path

import pytest

from tapir_local.errors import TapirError
from tapir_local.method.parsing import parse_label
from tapir_local.recipe.endpoints import Price
from tapir_local.recipe.own_tasks import unnormalized_sum
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.settings import settings
from tapir_local.recipe.tasks import TASKS, Task
from tapir_local.recipe.text import diff_recipes, override, parse_change, parse_recipe, to_yaml
from tapir_local.resources import recipe_files


def refused(text: str) -> str:
    with pytest.raises(TapirError) as error:
        parse_recipe(text, "my.yaml")
    return str(error.value)


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_begins_with_its_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    recipe = parse_recipe(text, str(path))
    assert "tapir-local distill" in text.splitlines()[0]
    assert recipe.about
    assert parse_recipe(to_yaml(recipe), "again") == recipe


def test_one_e_minus_five_is_a_number() -> None:
    assert parse_recipe("teacher: pocket\ntrain: {learning_rate: 1e-5}", "r").train.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "teacher: pocket\ntrain: {learning_rte: 1}",
            "train.learning_rte: unknown setting (did you mean learning_rate?)",
        ),
        ("trian: {}\nteacher: pocket", "did you mean train?"),
        ("teacher: pocket\nrounds: -1", "rounds: Input should be greater than or equal to 0, not -1"),
        ("teacher: pocket\ntrain: {learning_rate: fast}", "train.learning_rate"),
        ("teacher: {model: m}\nbudget: {money: 5}", "budget: money needs teacher.price"),
        ("teacher: {gguf: x, kind: openai, model: m}", "`kind: gguf` and `gguf: PATH` need"),
        ("teacher: bob", "'recorded' or 'gguf', not 'bob'"),
        ("name: ../x\nteacher: pocket", "name"),
        ("teacher: {kind: openai}", "model is missing"),
        ("teacher: recorded", "cannot judge"),
        (
            "teacher: {kind: pocket, batch: true}",
            "teacher.batch: `kind: pocket` does not use it; remove it (used by `openai`",
        ),
        ("teacher: pocket\njudge: {batch: true}", "judge.batch: `kind: teacher` does not use it; the teacher judges;"),
        ("teacher: {kind: pocket, stream: true}", "teacher.stream: `kind: pocket` does not use it"),
        ("teacher: {model: m, stream: true, batch: true}", "teacher.stream: a batch cannot stream"),
        ("teacher: {gguf: x.gguf, stream: true}", "teacher.stream: `kind: gguf` does not use it"),
        ("teacher: {model: m, thinking: off}", "teacher.thinking"),
        ("tasks: {Cooking: 1}\nteacher: pocket", "unknown task 'Cooking'; a task of your own needs a share, a desc"),
        ("tasks: {Mth: 1}\nteacher: pocket", "did you mean Math?"),
        ("tasks: {Cooking: {share: 1, style: plainly}}\nteacher: pocket", "unknown task 'Cooking'"),
        ("tasks: {Math: -1}\nteacher: pocket", "tasks.Math.share: Input should be greater than or equal to 0, not -1"),
        ("tasks: {Math: .nan}\nteacher: pocket", "tasks.Math.share: Input should be a finite number"),
        ("tasks: {Math: 0, Art: 0}\nteacher: pocket", "tasks: every share is 0"),
        ("tasks: {}\nteacher: pocket", "tasks: empty"),
        ("tasks: {Math: {shar: 1}}\nteacher: pocket", "tasks.Math.shar: unknown setting (did you mean share?)"),
        ("tasks: {Math: {share: 1, checker: magic}}\nteacher: pocket", "tasks.Math.checker"),
        ("tasks: {'a: b': 1}\nteacher: pocket", "'a: b' is not a valid label"),
        ("tasks: {1: 1}\nteacher: pocket", "tasks.1: must be a text"),
        ("tasks: {Math: 1, math: {share: 1, description: d, style: s}}\nteacher: pocket", "differ only in capitals"),
        ("a: [", "not YAML"),
        ("- a", "mapping"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(text: str, said: str) -> None:
    assert said in refused(text)
    assert refused(text).startswith("my.yaml: ")


def test_a_setting_on_the_command_line_is_checked_like_one_in_the_file() -> None:
    recipe = parse_recipe("teacher: pocket", "r")
    assert override(recipe, {"train.epochs": 5}).train.epochs == 5
    with pytest.raises(TapirError, match="name"):
        override(recipe, {"name": "a/b"})


def test_how_a_gguf_is_asked_may_change_in_mid_run_but_not_which() -> None:
    recipe = parse_recipe("teacher: {gguf: a.gguf}", "r")
    assert diff_recipes(recipe, override(recipe, {"teacher.context": 8192, "teacher.concurrency": 2})) == []
    assert diff_recipes(recipe, override(recipe, {"teacher.gguf": "b.gguf"})) == ["teacher.gguf: 'a.gguf' -> 'b.gguf'"]
    assert "`kind: gguf` and `gguf: PATH` need each other" in refused("teacher: {kind: gguf}")
    assert "teacher.context" in refused("teacher: {gguf: a.gguf, context: 4}")


def test_thinking_lasts_for_a_run_and_streaming_may_change() -> None:
    recipe = parse_recipe("teacher: {model: m}", "r")
    assert diff_recipes(recipe, override(recipe, {"teacher.stream": True})) == []
    assert diff_recipes(recipe, override(recipe, {"teacher.thinking": "keep"})) == [
        "teacher.thinking: 'strip' -> 'keep'"
    ]


def test_two_recipes_differ_by_the_path_of_their_settings() -> None:
    recipe = parse_recipe("teacher: pocket", "r")
    assert diff_recipes(recipe, override(recipe, {"train.epochs": 5})) == ["train.epochs: 2.0 -> 5.0"]
    assert diff_recipes(recipe, recipe) == []


OWN = """
teacher: pocket
tasks:
  Math: 3
  Art: {share: 1, style: as one line}
  Code Debug: {share: 1, checker: length}
  Customer mail: {share: 1, description: "a customer's letter\n  to answer", style: politely}
"""


def test_a_recipe_has_tasks_of_its_own_and_its_own_words_for_known_ones() -> None:
    table = parse_recipe(OWN, "r").task_table()
    assert [task.share for task in table.values()] == pytest.approx([0.5, 1 / 6, 1 / 6, 1 / 6])
    assert (table["Math"].style, table["Math"].checker) == (TASKS["Math"].style, "arithmetic")
    assert (table["Art"].style, table["Art"].description) == ("as one line", TASKS["Art"].description)
    assert table["Code Debug"].checker == "length"
    mail = Task("Customer mail", 1 / 6, "a customer's letter to answer", "politely")
    assert table["Customer mail"] == mail


def test_shares_are_parts_of_their_sum_and_an_odd_sum_is_known() -> None:
    assert unnormalized_sum(parse_recipe(OWN, "r").tasks) == 6
    assert unnormalized_sum(parse_recipe("teacher: pocket\ntasks: {Math: 0.6667, Art: 0.3333}", "r").tasks) is None
    assert unnormalized_sum(None) is None
    assert sum(task.share for task in TASKS.values()) == pytest.approx(1)


def test_own_tasks_survive_their_file_and_a_changed_one_is_named() -> None:
    recipe = parse_recipe(OWN, "r")
    assert parse_recipe(to_yaml(recipe), "again") == recipe
    changed = override(recipe, {"tasks.Math": 2})
    assert diff_recipes(recipe, changed) == ["tasks.Math.share: 3.0 -> 2.0"]


def test_a_label_may_have_signs_but_no_wrapping() -> None:
    words = "{share: 1, description: d, style: s}"
    table = parse_recipe(f"teacher: pocket\ntasks: {{C++: {words}, 'R&D (new) x': {words}}}", "r").task_table()
    assert parse_label('{"task": "c++"}', table) == "C++"
    assert parse_label("r&d (new) x", table) == "R&D (new) x"
    assert "is not a valid label" in refused(f"teacher: pocket\ntasks: {{'D (old)': {words}}}")


def test_every_setting_has_its_help() -> None:
    assert [path for path, _, _, text in settings() if not text] == []


def test_a_recipe_cannot_be_changed_once_made() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe(teacher={"kind": "pocket"}).rounds = 4  # type: ignore[misc,arg-type]


def test_what_may_change_in_mid_run_is_no_difference() -> None:
    old = parse_recipe("teacher: {model: m}", "a.yaml")
    new = override(
        old,
        {
            "rounds": 7,
            "budget.calls": 10,
            "teacher.concurrency": 2,
            "teacher.price.input": 1,
            "teacher.price.output": 2,
            "teacher.timeout": 9,
            "judge.max_unjudged": 0.5,
            "about": "other words",
            "student.concurrency": 4,
        },
    )
    assert (new.teacher.price, new.budget.calls) == (Price(input=1, output=2), 10)
    assert diff_recipes(old, new) == []


def test_a_setting_that_a_runs_recipe_does_not_name_cannot_differ() -> None:
    """The kept recipe of an older version lacks `curriculum.max_opening`, and a newer recipe may set it."""
    old = parse_recipe("teacher: pocket", "x")
    new = override(old, {"curriculum.max_opening": None, "train.epochs": 5})
    written = {"teacher": {"kind": "pocket"}, "train": {"epochs": 2.0}, "curriculum": {"rows": 1000}, "tasks": None}
    assert diff_recipes(old, new, written) == ["train.epochs: 2.0 -> 5.0"]
    assert any("max_opening" in line for line in diff_recipes(old, new))
    tasks = override(old, {"tasks": {"Math": 1, "Art": 1}})
    assert any(line.startswith("tasks.Art.share") for line in diff_recipes(old, tasks, written))
    assert diff_recipes(old, override(old, {"teacher.temperature": 0})) == ["teacher.temperature: 0.7 -> 0.0"]


@pytest.mark.parametrize(
    ("text", "change"),
    [("train.epochs=1", ("train.epochs", 1)), ("name = x", ("name", "x")), ("seeds.limit=", ("seeds.limit", None))],
)
def test_a_change_on_the_command_line(text: str, change: tuple[str, object]) -> None:
    assert parse_change(text) == change


@pytest.mark.parametrize("text", ["train.epochs", "=1", "a={"])
def test_what_is_no_change(text: str) -> None:
    with pytest.raises(TapirError):
        parse_change(text)


def test_every_setting_is_read_by_the_program() -> None:
    """A setting that no code reads would mislead users."""
    package = Path(__file__).parents[2] / "tapir_local"
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {path.rpartition(".")[2] for path, *_ in settings()}
    assert names - read == set()


def test_a_recipe_that_a_run_kept_may_still_say_load_in_4bit() -> None:
    for word, method in (("true", "qlora"), ("false", "lora")):
        assert parse_recipe(f"teacher: pocket\ntrain: {{load_in_4bit: {word}}}", "r").train.method == method


def test_a_launcher_is_a_line_or_a_list_of_words() -> None:
    line, words = (
        parse_recipe(f"teacher: pocket\ntrain: {{launcher: {said}}}", "r").train.launcher
        for said in ("accelerate launch --num_processes 2", "[accelerate, launch, --num_processes, '2']")
    )
    assert line == words == "accelerate launch --num_processes 2"


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("{method: dora}", "train.method: Input should be 'lora', 'qlora' or 'full'"),
        ("{precision: fp8}", "train.precision"),
        ("{gradient_checkpointing: maybe}", "train.gradient_checkpointing"),
        ("{checkpoint_minutes: -1}", "greater than or equal to 0"),
        ("{backend: unsloth, packing: true}", "work with TRL only"),
        ("{backend: unsloth, launcher: accelerate launch}", "work with TRL only"),
    ],
)
def test_settings_of_training_that_will_not_do_are_refused(train: str, said: str) -> None:
    assert said in refused(f"teacher: pocket\ntrain: {train}")


@pytest.mark.parametrize("other", ["train: {method: full}\nexport: {", "export: {converter: x, "])
def test_rounds_as_adapters_need_an_adapter_of_a_family_that_is_mapped(other: str) -> None:
    assert "`rounds: adapter` works neither with" in refused(f"teacher: pocket\n{other}rounds: adapter}}")


def test_how_a_batch_goes_through_the_hardware_may_change_in_mid_run() -> None:
    old = parse_recipe("teacher: pocket", "r")
    free = {"micro_batch_size": 1, "gradient_checkpointing": True, "checkpoint_minutes": 0, "launcher": "torchrun"}
    assert diff_recipes(old, override(old, {f"train.{name}": value for name, value in free.items()})) == []
    assert diff_recipes(old, override(old, {"train.method": "full"})) == ["train.method: 'lora' -> 'full'"]
