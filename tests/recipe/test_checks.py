"""No setting is silently ignored: every kind with every setting, and settings without effect."""

from pathlib import Path
from typing import Any, get_args

import pytest
from server import Server, send

from tapir_local.errors import TapirError
from tapir_local.method import prompts
from tapir_local.pocket import teacher
from tapir_local.recipe.checks import KINDS_BY_SETTING, find_notices, find_unnamed
from tapir_local.recipe.endpoints import Judge, Teacher
from tapir_local.recipe.settings import settings
from tapir_local.recipe.text import (
    describe_replaced_kinds,
    diff_recipes,
    fixed_settings,
    override,
    parse_recipe,
    to_yaml,
    validate_recipe,
)
from tapir_local.records import Message, Request
from tapir_local.resources import find_recipe
from tapir_local.stages.judge import judge_endpoint, judge_name
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask

QUICK = {"seeds": "pocket", "student": "pocket", "teacher": {"kind": "pocket", "send_seed": True}, "judge": "teacher"}
VALUES: dict[str, Any] = {
    **{"gguf": "x.gguf", "context": 8192, "base_url": "http://127.0.0.1/v1", "model": "m", "alias": "a"},
    **{"api_key_env": "KEY", "api_key_file": "key.txt", "temperature": 0.1, "max_tokens": 99, "extra": {"top_p": 0.5}},
    **{"send_seed": True, "concurrency": 3, "timeout": 9.0, "attempts": 2, "batch": True, "mode": "single"},
    **{"price": {"input": 1, "output": 1}, "max_unjudged": 0.5, "health": "stop", "stream": True, "thinking": "keep"},
    **{"ahead": False},
}
NEEDED: dict[str, dict[str, Any]] = {"openai": {"model": "m"}, "gguf": {"gguf": "x.gguf"}}
PAIRS = [
    (role, kind, field)
    for role, section in (("teacher", Teacher), ("judge", Judge))
    for kind in get_args(section.model_fields["kind"].annotation)
    for field in section.model_fields
    if field != "kind"
]


def recipe_of(role: str, section: Any) -> dict[str, Any]:
    other = {"teacher": "pocket"} if role == "judge" else {"judge": "reference"}
    return {**other, role: section}


@pytest.mark.parametrize("value", ["another", "the default"])
@pytest.mark.parametrize(("role", "kind", "field"), PAIRS)
def test_every_kind_takes_the_fields_that_it_uses_and_refuses_the_others(
    role: str, kind: str, field: str, value: str
) -> None:
    section = {"teacher": Teacher, "judge": Judge}[role]
    default = section.model_fields[field].get_default(call_default_factory=True)
    given = VALUES[field] if value == "another" else default
    if given in (None, {}):
        return  # null counts as not given
    recipe = recipe_of(role, {"kind": kind, **NEEDED.get(kind, {}), field: given})
    if kind in KINDS_BY_SETTING[field]:
        assert getattr(getattr(validate_recipe(recipe, "r"), role), field) is not None
        return
    with pytest.raises(TapirError) as caught:
        validate_recipe(recipe, "r")
    assert role in str(caught.value)
    assert field in str(caught.value)


def test_the_table_names_every_field() -> None:
    assert {*Teacher.model_fields, *Judge.model_fields} - {"kind"} <= set(KINDS_BY_SETTING)


@pytest.mark.parametrize("role", ["teacher", "judge"])
@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"model": "m"}, "openai"),
        ({"model": "m", "base_url": "http://127.0.0.1/v1"}, "openai"),
        ({"gguf": "x.gguf"}, "gguf"),
        ({"gguf": "x.gguf", "kind": None}, "gguf"),
        ({"model": "m", "gguf": None}, "openai"),
    ],
)
def test_the_kind_is_told_from_what_is_given(role: str, given: dict[str, Any], kind: str) -> None:
    found = validate_recipe(recipe_of(role, given), "r")
    assert getattr(found, role).kind == kind
    assert {"teacher": Teacher, "judge": Judge}[role](**given).kind == kind  # type: ignore[attr-defined]


def test_a_judge_with_a_model_is_asked_and_named() -> None:
    recipe = parse_recipe("teacher: {model: small}\njudge: {model: gpt-4o}", "r")
    assert (judge_endpoint(recipe).model, judge_name(recipe)) == ("gpt-4o", "gpt-4o")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "teacher: pocket\njudge: {kind: teacher, model: gpt-4o}",
            "judge.model: `kind: teacher` does not use it; the t",
        ),
        ("teacher: {model: m}\njudge: {price: {input: 1, output: 1}}", "judge.price: `kind: teacher` does not use it"),
        ("teacher: pocket\njudge: {base_url: 'http://127.0.0.1/v1'}", "judge: model is missing"),
        ("teacher: {gguf: a.gguf, base_url: 'http://127.0.0.1/v1'}", "teacher.base_url: `kind: gguf` does not use it"),
        (
            "teacher: {model: m, api_key_env: A, api_key_file: b}",
            "teacher.api_key_env: `teacher.api_key_file` takes precedence",
        ),
        (
            "teacher: {model: m, base_url: 'https://me:secret@host/v1'}",
            "teacher.base_url: the URL contains a user name or p",
        ),
        ("teacher: {model: m, base_url: 'http://[::1/v1'}", "teacher.base_url: not the URL of a server"),
        ("teacher: {model: m, base_url: 'localhost:8000'}", "teacher.base_url: not the URL of a server"),
        ("teacher: {model: m, base_url: 'http://h:99999/v1'}", "teacher.base_url: not the URL of a server"),
        ("teacher: pocket\nstudent: {concurrency: 0}", "my.yaml: student.concurrency: Input should be greater than or"),
        ("teacher: pocket\nstudent: {max_tokens: 2048}", "student.max_tokens: 2,048 tokens leave no space"),
        ("teacher: pocket\nstudent: {max_length: 128}", "set student.max_tokens to 64"),
        ("teacher: {gguf: a, max_tokens: 4096}", "teacher.max_tokens: 4,096 tokens leave no space"),
        (
            "teacher: {gguf: a}\njudge: {max_tokens: 5000}",
            "judge.max_tokens: 5,000 tokens leave no space for a",
        ),
        (
            "teacher: pocket\nseeds: {limit: 200}",
            "seeds.limit: 200 rows leave nothing to train on after seeds.holdout",
        ),
        ("teacher: pocket\nclassifier: {held_out: 1}", "classifier.held_out"),
        ("teacher: pocket\nseeds: {split: train}", "seeds.split: the pocket seeds have none"),
        ("teacher: recorded\njudge: reference\nseeds: {answers: teacher}", "seeds.answers: a recorded teacher's"),
        (
            "teacher: pocket\ncurriculum: {name: growth, mastery: 0.9}",
            "curriculum: `mastery` needs the curriculum `tapir` with `difficulty: true`",
        ),
        (
            "teacher: pocket\ncurriculum: {name: lion, learnable: true}",
            "curriculum: `learnable` needs the curriculum `tapir` with `difficulty: true`",
        ),
        ("teacher: pocket\ncurriculum: {difficulty: off, mastery: 0}", "curriculum: `mastery` needs the"),
        ("teacher: pocket\ncurriculum: {difficulty: off, learnable: true}", "curriculum: `learnable` needs the"),
        ("teacher: pocket\ncurriculum: {mastery: 90}", "curriculum.mastery: Input should be less than or equal to 1"),
    ],
)
def test_what_cannot_serve_is_refused_by_its_path(text: str, said: str) -> None:
    with pytest.raises(TapirError) as caught:
        parse_recipe(text, "my.yaml")
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {method: full, lora_rank: 8}", "train.lora_rank has no effect"),
        ("curriculum: {name: uniform, alpha: 0.5, refine: all}", "curriculum.refine, curriculum.alpha have no effect"),
        ("curriculum: {name: all, refine: all, alpha: 0.5}", "no effect: only `curriculum.name: tapir` uses them"),
        (
            "curriculum: {name: all, alpha: 0.5}",
            "has no effect: only `curriculum.name: tapir` uses this",
        ),
        ("curriculum: {difficulty: off, mfd_threshold: 1}", "curriculum.mfd_threshold has no effect"),
        ("curriculum: {name: all, rows: 7, pool: 9}", "curriculum.rows has no effect: `curriculum.name: all`"),
        ("curriculum: {name: reflection, drafts: 2}", "curriculum.drafts has no effect"),
        ("rounds: 1\ncurriculum: {learnable: true}", "curriculum.learnable has no effect: no round comes after one"),
        ("curriculum: {name: growth}\njudge: {max_unjudged: 0.5}", "judge.max_unjudged has no effect"),
        ("classifier: {ask_below: 0, ask_at_most: 5}", "classifier.ask_at_most has no effect"),
        ("budget: {money: 5}", "budget.money has no effect: no endpoint with a price"),
        ("tasks: {Math: {share: 1, checker: length}}", "tasks.Math.checker has no effect"),
        ("checker: tasks\ntasks: {Art: 1}", "checker has no effect: none of the recipe's tasks"),
    ],
)
def test_what_has_no_effect_is_told(text: str, told: str) -> None:
    assert told in "\n".join(find_notices(parse_recipe(f"teacher: pocket\n{text}", "r")))


@pytest.mark.parametrize(
    ("text", "users"),
    [
        ("teacher: {kind: recorded, temperature: 0.3}\njudge: reference", "`gguf`, `openai` and `pocket`"),
        ("teacher: {kind: recorded, thinking: keep}\njudge: reference", "`gguf` and `openai`"),
        ("teacher: {kind: recorded, batch: true}\njudge: reference", "`openai`"),
        ("teacher: pocket\njudge: {kind: reference, temperature: 0.3}", "`gguf`, `openai` and `teacher`"),
        ("teacher: pocket\njudge: {kind: reference, send_seed: true}", "`openai`"),
    ],
)
def test_the_advice_names_only_kinds_that_the_role_can_have(text: str, users: str) -> None:
    with pytest.raises(TapirError) as caught:
        parse_recipe(text, "r")
    assert f"remove it (used by {users})" in str(caught.value)


def test_a_recorded_teachers_idle_settings_are_told_once() -> None:
    text = "teacher: recorded\njudge: reference\nclassifier: {epochs: 2}\ncurriculum: {drafts: 2}\nbudget: {calls: 1}"
    told = "\n".join(find_notices(parse_recipe(text, "r")))
    assert [told.count(path) for path in ("classifier has", "curriculum.drafts has", "budget has")] == [1, 1, 1]


def test_a_usual_recipe_is_told_nothing() -> None:
    assert find_notices(parse_recipe("teacher: pocket", "r")) == []
    text = "teacher: {model: m}\nstudent: my/model\nseeds: my.json\ntrain: {lora_rank: 8}\ncurriculum: {alpha: 0.4}"
    assert find_notices(parse_recipe(text, "r")) == []


def test_another_host_than_the_vendors_is_told_the_key_of() -> None:
    text = "teacher: {model: m, base_url: 'https://other.example/v1'}\nstudent: a/b\nseeds: c.json"
    assert find_notices(parse_recipe(text, "r")) == ["teacher: the key in OPENAI_API_KEY is sent to other.example"]


# Changing teacher and judge with --set


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"teacher.base_url": "http://127.0.0.1/v1", "teacher.model": "m"}, ("openai", "teacher")),
        ({"teacher.gguf": "x.gguf"}, ("gguf", "teacher")),
        ({"judge.model": "gpt-4o"}, ("pocket", "openai")),
        ({"teacher": "recorded", "judge": "reference"}, ("recorded", "reference")),
        ({"teacher.model": "m", "judge.gguf": "j.gguf"}, ("openai", "gguf")),
    ],
)
def test_a_kind_in_the_recipe_yields_to_what_set_gives(changes: dict[str, Any], kinds: tuple[str, str]) -> None:
    before = validate_recipe(QUICK, "r")
    after = override(before, changes)
    assert (after.teacher.kind, after.judge.kind) == kinds
    assert len(describe_replaced_kinds(before, after)) == sum(
        a != b for a, b in zip(("pocket", "teacher"), kinds, strict=True)
    )


def test_what_only_the_old_kind_used_yields_with_it_and_is_told() -> None:
    before = validate_recipe({"teacher": {"gguf": "a.gguf", "context": 8192, "concurrency": 4}}, "r")
    after = override(before, {"teacher.model": "m"})
    assert (after.teacher.kind, after.teacher.gguf, after.teacher.concurrency) == ("openai", None, 4)
    assert "it does not use teacher.context, teacher.gguf" in describe_replaced_kinds(before, after)[0]


def test_a_base_url_alone_says_what_else_to_set() -> None:
    with pytest.raises(TapirError, match=r"teacher: model is missing; set .*teacher\.model"):
        override(validate_recipe(QUICK, "r"), {"teacher.base_url": "http://127.0.0.1/v1"})


def test_the_quickstart_asks_a_server_that_set_names(server: Server, tmp_path: Path) -> None:
    server.otherwise = lambda handler, body: send(
        handler, 200, {**teacher.chat_completion_object(body), "model": body["model"]}
    )
    recipe = parse_recipe(find_recipe("quickstart").read_text(encoding="utf-8"), "quickstart")
    changed = override(recipe, {"teacher.base_url": server.url, "teacher.model": "theirs"})
    request = Request(prompts.answer_prompt((Message("user", "What is 2 + 3?"),)), "row", "seeds")
    with Store(tmp_path / "teacher.db") as store:
        for endpoint in (changed.teacher, judge_endpoint(changed)):
            ask([request], endpoint.model_copy(update={"api_key_env": "PATH"}), store, run="r")
    assert [body["model"] for body in server.bodies] == ["theirs"]  # the judge's reply was in the store


def test_a_kept_recipe_is_refused_only_what_changes_make_wrong() -> None:
    kept = validate_recipe({"teacher": {"kind": "pocket", "model": "m"}}, "r", kept=True)
    assert override(kept, {"curriculum.rows": 7}, kept=True).curriculum.rows == 7
    with pytest.raises(TapirError, match=r"teacher\.price"):
        override(kept, {"teacher.price": {"input": 1, "output": 1}}, kept=True)


def test_a_change_that_the_kind_cannot_use_is_refused() -> None:
    with pytest.raises(TapirError, match=r"teacher\.price: `kind: pocket` does not use it"):
        override(validate_recipe(QUICK, "r"), {"teacher.price": {"input": 1, "output": 1}})


def test_a_pocket_student_is_not_taken_in_silence_beside_a_real_teacher() -> None:
    alone = parse_recipe("teacher: {model: m}", "r")
    assert [line.partition(":")[0] for line in find_unnamed(alone)] == ["student.path", "seeds.path"]
    assert "`student: pocket`" in find_unnamed(alone)[0]
    named = parse_recipe("teacher: {model: m}\nstudent: pocket\nseeds: pocket", "r")
    assert find_unnamed(named) == find_unnamed(parse_recipe("teacher: pocket", "r")) == []
    assert [line.split()[:2] for line in find_notices(named)] == [
        ["WARNING:", "student.path"],
        ["WARNING:", "seeds.path"],
    ]


def test_seeds_and_student_may_be_given_as_their_path() -> None:
    recipe = parse_recipe("teacher: pocket\nseeds: mine.jsonl\nstudent: models/x", "r")
    assert (recipe.seeds.path, recipe.student.path) == ("mine.jsonl", "models/x")
    kept = override(parse_recipe("teacher: pocket\nseeds: {holdout: 7}", "r"), {"seeds": "mine.jsonl"})
    assert (kept.seeds.path, kept.seeds.holdout) == ("mine.jsonl", 7)


# Unfinished runs


@pytest.mark.parametrize("text", ["teacher: pocket", "teacher: {gguf: a}", "teacher: {model: m}\njudge: reference"])
def test_a_recipe_that_the_program_wrote_out_is_read_again(text: str) -> None:
    recipe = parse_recipe(text, "r")
    again = parse_recipe(to_yaml(recipe), "again")
    assert again == recipe
    assert again.teacher.model_fields_set <= recipe.teacher.model_fields_set | {"kind"}
    assert find_unnamed(again) == []  # the kept recipe names every setting


def test_a_kept_recipe_with_what_its_kind_did_not_use_goes_on_without_it() -> None:
    kept = to_yaml(parse_recipe("teacher: pocket", "r")).replace("  model: null", "  model: gpt-4o")
    with pytest.raises(TapirError, match=r"teacher\.model"):
        parse_recipe(kept, "r")
    old = parse_recipe(kept, "r", kept=True)
    assert (old.teacher.kind, old.teacher.model, old.judge.kind) == ("pocket", "gpt-4o", "teacher")
    assert diff_recipes(old, parse_recipe("teacher: pocket", "r")) == []


def test_a_reply_may_be_given_more_room_in_mid_run_and_not_less() -> None:
    old = parse_recipe("teacher: {model: m}", "r")
    more = override(old, {"teacher.max_tokens": 2048, "judge.max_tokens": 4096})
    assert diff_recipes(old, more) == []
    assert diff_recipes(more, old) == ["judge.max_tokens: 4096 -> 1024", "teacher.max_tokens: 2048 -> 1024"]


def test_an_endpoint_with_an_alias_may_move_in_mid_run() -> None:
    old = parse_recipe("teacher: {model: m, base_url: 'http://127.0.0.1:1/v1', alias: a}", "r")
    new = {"teacher.base_url": "http://127.0.0.1:2/v1"}
    assert diff_recipes(old, override(old, new)) == []
    assert len(diff_recipes(old, override(old, {**new, "teacher.alias": None}))) == 2


def test_every_setting_lasts_but_those_that_decide_no_row() -> None:
    recipe = parse_recipe("teacher: {model: m, alias: null}\njudge: {model: j}", "r")
    kept = fixed_settings(recipe)
    free = {path for path, *_ in settings() if "LABEL" not in path and not there(kept, path.split("."))}
    assert free == {
        *("ship", "train.report_to"),
        *("rounds", "about", "student.concurrency", "judge.max_unjudged", "judge.ahead", "judge.health"),
        "classifier.min_agreement",
        *("export.min_agreement", "train.micro_batch_size", "train.gradient_checkpointing", "train.checkpoint_minutes"),
        *("train.launcher", "budget.money", "budget.tokens", "budget.calls", "limits.unusable"),
        *("card.license", "card.base_license", "card.data_license", "card.terms", "card.language"),
        *(
            f"{role}.{name}"
            for role in ("teacher", "judge")
            for name in (
                "api_key_env",
                "api_key_file",
                "concurrency",
                "timeout",
                "attempts",
                "batch",
                "context",
                "stream",
            )
        ),
        *(f"{role}.price.{side}" for role in ("teacher", "judge") for side in ("input", "output")),
    }


def there(value: Any, path: list[str]) -> bool:
    """Whether nested mappings contain a path."""
    return not path or (isinstance(value, dict) and path[0] in value and there(value[path[0]], path[1:]))


def test_a_password_in_a_kept_recipe_is_not_shown() -> None:
    old = validate_recipe({"teacher": {"model": "m", "base_url": "http://me:secret@host/v1"}}, "r", kept=True)
    assert "secret" not in "".join(diff_recipes(old, parse_recipe("teacher: {model: m}", "r")))
