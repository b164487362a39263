"""YAML is read without surprises, or refused by path: property tests over every numeric and every text setting."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tapir_local.errors import TapirError
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.settings import path_settings, settings
from tapir_local.recipe.text import override, parse_change, parse_changes, parse_recipe, to_yaml
from tapir_local.recipe.yaml import annotation_at, wanted_type
from tapir_local.resources import read_recipe_text

PATHS = [
    path for path, *_ in settings() if "LABEL" not in path and path not in ("tasks", "teacher.extra", "judge.extra")
]
NUMBERS = [path for path in PATHS if wanted_type(annotation_at(Recipe, path)) == "number"]
TEXTS = [path for path in PATHS if wanted_type(annotation_at(Recipe, path)) == "text"]
NO_NUMBERS = ["yes", "no", "on", "off", "true", "false", "y", ".inf", "-.inf", ".nan", "inf", "nan", "1e999", "-1e999"]
NO_NUMBERS += ["1:30", "1:30:00", "010", "2026-11-27", "1,000", "5%", "'yes'", "[1]", "{a: 1}", "0b2", "9" * 5000]


def nested(path: str, text: str) -> str:
    """A recipe in which the setting at `path` is `text`."""
    *sections, name = path.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    return "\n".join([*lines, f"{'  ' * len(sections)}{name}: {text}"])


def refused(text: str, where: str = "my.yaml") -> str:
    with pytest.raises(TapirError) as caught:
        parse_recipe(text, where)
    assert str(caught.value).startswith(where)
    return str(caught.value)


def value_of(recipe: Recipe, path: str) -> object:
    found: object = recipe
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", NUMBERS)
def test_no_numeric_setting_takes_what_is_no_finite_number(path: str) -> None:
    recipe = parse_recipe("teacher: pocket", "r")
    assert len(NUMBERS) > 40
    for text in NO_NUMBERS:
        assert path.split(".")[-1] in refused(nested(path, text)), text
        with pytest.raises(TapirError):
            override(recipe, dict([parse_change(f"{path}={text}")]))
    for value in (True, False, math.inf, -math.inf, math.nan):
        with pytest.raises(TapirError):
            override(recipe, {path: value})


@examples(deadline=None)
@given(st.floats(min_value=1e-300, max_value=1e300), st.sampled_from(["{:e}", "{!r}", "{:E}", "+{!r}"]))
def test_every_spelling_of_a_number_is_that_number(number: float, spelling: str) -> None:
    text = spelling.format(number)
    rate = parse_recipe(f"teacher: pocket\ntrain: {{learning_rate: {text}}}", "r").train.learning_rate
    assert rate == float(text)
    assert parse_change(f"train.learning_rate={text}")[1] == float(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e3", 1000), ("1_000", 1000), ("0x10", 16), ("0o10", 8), ("'12'", 12), ("3.0", 3), ("08.0", 8)],
)
def test_whole_numbers_as_people_write_them(text: str, number: int) -> None:
    assert parse_recipe(f"teacher: pocket\ncurriculum: {{rows: {text}}}", "r").curriculum.rows == number


def test_a_leading_zero_is_refused_with_what_to_write() -> None:
    assert "my.yaml: curriculum.rows: 010 may mean 10 or an octal number\n  Write 10." in refused(
        "teacher: pocket\ncurriculum: {rows: 010}"
    )


@pytest.mark.parametrize(
    "text", ["no", "yes", "on", "2026", "1.10", "1e5", "1:30", "2026-11-27", "010", "0x1F", ".5", "true"]
)
def test_a_word_where_text_is_wanted_stays_as_it_is_written(text: str) -> None:
    for path in ("card.language", "teacher.alias", "about", "card.terms"):
        teacher = "\n  kind: pocket" if path.startswith("teacher") else "\nteacher: pocket"
        assert value_of(parse_recipe(nested(path, text) + teacher, "r"), path) == text
        changed = override(parse_recipe("teacher: pocket", "r"), dict([parse_change(f"{path}={text}")]))
        assert value_of(changed, path) == text


def test_every_text_setting_reads_null_and_quotes_as_yaml_does() -> None:
    recipe = parse_recipe("teacher: pocket\ncard: {language: null, terms: 'null'}", "r")
    assert (recipe.card.language, recipe.card.terms) == (None, "null")
    assert len(TEXTS) > 15


@pytest.mark.parametrize(("word", "value"), [("on", True), ("no", False), ("true", True), ("Off", False)])
def test_switches_take_the_words_of_yaml(word: str, value: bool) -> None:
    assert parse_recipe(f"teacher: pocket\ntrain: {{packing: {word}}}", "r").train.packing is value


def test_refine_off_and_on_stay_what_they_were() -> None:
    for word, meant in (("off", "off"), ("no", "off"), ("false", "off"), ("on", "hard"), ("all", "all")):
        assert parse_recipe(f"teacher: pocket\ncurriculum: {{refine: {word}}}", "r").curriculum.refine == meant


def test_extra_keeps_its_types_and_takes_no_nan() -> None:
    text = "teacher: {model: m, extra: {top_p: 1e-1, echo: no, stop: [a, 12:30], user: 'no', n2: 3, day: 2026-11-27}}"
    assert parse_recipe(text, "r").teacher.extra == {
        **{"top_p": 0.1, "echo": False, "stop": ["a", "12:30"], "user": "no", "n2": 3, "day": "2026-11-27"}
    }
    for text in (".nan", "[1, .inf]", "{a: {b: -.inf}}"):
        assert "teacher.extra" in refused(f"teacher: {{model: m, extra: {{x: {text}}}}}")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]))
    | st.from_regex(r"[-+.0-9xobeE_:]{1,8}", fullmatch=True),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), inner),
    max_leaves=8,
)


@examples(deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), JSON, max_size=4))
def test_a_recipe_that_is_written_is_read_as_the_same(extra: dict[str, object]) -> None:
    recipe = override(parse_recipe("teacher: {model: m}", "r"), {"teacher.extra": extra})
    assert parse_recipe(to_yaml(recipe), "again").teacher.extra == extra


@examples(deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20) | st.sampled_from(["1e5", "0o7", "010", "no"])
)
def test_text_that_is_written_is_read_as_the_same(text: str) -> None:
    recipe = override(parse_recipe("teacher: pocket", "r"), {"about": text, "card.terms": text, "teacher.alias": text})
    assert parse_recipe(to_yaml(recipe), "again") == recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {epochs: 1}\nname: a\ntrain: {batch_size: 8}", "train: given twice, in lines 1 and 3"),
        ("train:\n  epochs: 1\n  epochs: 2", "train.epochs: given twice, in lines 2 and 3"),
        ("train: {epochs: 1, epochs: 1}", "train.epochs: given twice, in line 1"),
        ("teacher: {model: m, extra: {a: {b: 1, b: 1}}}", "teacher.extra.a.b: given twice, in line 1"),
        ("tasks: {Math: 1, 'Math': 2}", "tasks.Math: given twice"),
        ("teacher: pocket\nbudget: [{a: 1, a: 2}]", "budget.0.a: given twice"),
        ("", "the recipe is empty"),
        ("# nothing\n", "the recipe is empty"),
        ("- a\n- b", "a recipe is a mapping of settings"),
        ("pocket", "a recipe is a mapping of settings"),
        ("train:\n\tepochs: 1", "line 2, column 1: a tab, where YAML allows only spaces"),
        ("a: 1\n---\nb: 2", "not YAML"),
        ("? [a]\n: 1", "a key must be one word"),
        ("about: !!python/object:os.system x", "the tag"),
        ("rounds: !!timestamp tomorrow", "rounds: must be a whole number"),
        ("a: &a [*a]", "20,000 values or 40 levels"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("about: '" + "x" * 1_000_001 + "'", "longer than"),
        ("name: a\0b", "not YAML"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_sentence(text: str, said: str) -> None:
    found = refused(text)
    assert said in found
    assert len(found.splitlines()) <= 2


def test_an_anchor_bomb_is_refused_at_once() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    assert "aliases" in refused(bomb)


def test_anchors_and_merges_are_read() -> None:
    text = "teacher: &t {model: m, base_url: 'http://127.0.0.1/v1', timeout: 5}\njudge: {<<: *t, model: j, timeout: 7}"
    recipe = parse_recipe(text, "r")
    assert (recipe.judge.model, recipe.judge.base_url, recipe.judge.timeout) == ("j", "http://127.0.0.1/v1", 7)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["train.epochs=1", "train.epochs=2"], "train.epochs is given twice"),
        (["train.epochs=1", "train={epochs: 2}"], "one of which contains the other"),
        (["train={epochs: 2}", "train.batch_size=2"], "one of which contains the other"),
        (["train={epochs: 1, epochs: 2}"], "--set train: train.epochs: given twice, in line 1"),
        (["train.epochs=010"], "Write 10."),
    ],
)
def test_a_change_given_twice_is_refused(sets: list[str], said: str) -> None:
    with pytest.raises(TapirError) as caught:
        parse_changes(sets)
    assert said in str(caught.value)


@pytest.mark.parametrize("data", [b"about: caf\xe9\n", "about: x".encode("utf-16"), b"\xef\xbb\xbfabout: \xff"])
def test_a_recipe_that_is_not_utf8_is_refused_with_its_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(data)
    with pytest.raises(TapirError, match="not UTF-8") as caught:
        read_recipe_text(tmp_path / "my.yaml")
    assert "line 1" in str(caught.value)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(b"\xef\xbb\xbfteacher: pocket\n")
    assert parse_recipe(read_recipe_text(tmp_path / "my.yaml"), "r").teacher.kind == "pocket"


def test_home_is_expanded_in_every_path_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = {".".join(pair) for pair in path_settings()}
    assert found >= {
        *("seeds.path", "student.path", "student.chat_template", "teacher.gguf", "judge.gguf", "teacher.api_key_file"),
        *("judge.api_key_file", "classifier.model", "export.converter"),
    }
    for path in found:
        role, _, name = path.partition(".")
        base = f"{role}: {{model: m, {name}: ~/x/y}}" if name == "api_key_file" else nested(path, "~/x/y")
        more = "" if role == "teacher" else "\nteacher: pocket"
        assert value_of(parse_recipe(base + more, "r"), path) == "/home/me/x/y", path
    assert parse_recipe("teacher: pocket\nseeds: ~nobody-here/x", "r").seeds.path == "~nobody-here/x"
    assert parse_recipe("teacher: pocket\nseeds: a~b", "r").seeds.path == "a~b"


def test_a_setting_whose_help_speaks_of_a_file_is_a_path_setting() -> None:
    """Every setting that names a file must be listed."""
    words = ("a file", "a folder", "a Jinja file", "convert_hf_to_gguf.py", "a GGUF file")
    named = {path for path, kind, _, text in settings() if "str" in kind and any(word in text for word in words)}
    assert named <= {".".join(pair) for pair in path_settings()}
