"""The GGUF that answers: its bytes identify it, its context and template limit it, and its faults are named."""

import hashlib
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from gguf_teacher import questions, refused, rows, teacher
from models import CHATML, make_model

from tapir_local.errors import TapirError
from tapir_local.export.export import export_gguf
from tapir_local.method import prompts
from tapir_local.recipe.endpoints import Judge
from tapir_local.recipe.text import parse_recipe
from tapir_local.records import Message, Request
from tapir_local.stages.judge import judge_name
from tapir_local.store import keys
from tapir_local.teacher.ask import ask
from tapir_local.teacher.endpoint import endpoint_identity, request_body
from tapir_local.teacher.gguf import answer_with_gguf
from tapir_local.teacher.session import AskSession

# Prompts and answers that do not fit


def test_a_prompt_over_the_context_has_no_answer_and_says_so(gguf, store) -> None:
    long = "word " * 400
    answers = ask(questions("a", long, "b"), teacher(gguf), store, run="r")
    assert [answer.finish == "too_long" for answer in answers] == [False, True, False]
    assert not answers[1].complete
    [(row, why)] = rows(store, "select row, why from attempts")
    assert row == long
    assert "tokens, the context 256" in why
    assert [answer.hit for answer in ask(questions("a", long, "b"), teacher(gguf), store, run="r")] == [
        True,
        False,
        True,
    ]


def test_an_answer_cut_by_the_context_is_regenerated_in_a_larger_one(gguf, store) -> None:
    (first,) = ask(questions("a", max_tokens=60), teacher(gguf, context=40), store, run="r")
    (second,) = ask(questions("a", max_tokens=60), teacher(gguf, context=256), store, run="r")
    assert (first.finish, second.hit) == ("length", False)
    assert second.text.startswith(first.text)
    assert second.tokens_out > first.tokens_out
    assert rows(store, "select count(*) from calls") == [(1,)]


def test_the_context_is_at_most_the_models_own(gguf, store) -> None:
    (answer,) = ask(questions("word " * 600), teacher(gguf, context=100_000), store, run="r")
    assert answer.finish == "too_long"
    assert "the context 512" in rows(store, "select why from attempts")[0][0]


# Identity


def test_a_gguf_is_identified_by_its_bytes_and_llama_cpp(gguf) -> None:
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert endpoint_identity(teacher(gguf)) == f"gguf {digest} llama.cpp {version('llama-cpp-python')}"
    assert endpoint_identity(teacher(gguf, alias="mine")) == "mine"


def test_golden_body_and_key() -> None:
    """An upgrade must not change the keys of stored answers."""
    (request,) = questions("a", schema=prompts.JUDGEMENT, temperature=0.7)
    body = request_body(request, teacher(Path("any.gguf")))
    assert list(body) == ["messages", "temperature", "max_tokens", "response_format"]
    assert body["response_format"]["json_schema"]["schema"] == prompts.JUDGEMENT
    assert (
        keys.request_key("gguf 00 llama.cpp 0", body).hex()
        == "05eb45cbeea25c366e6b63bcb38835087acf90ab09e997c5f7317676e5feba27"
    )


def test_every_part_of_a_split_gguf_counts(tmp_path) -> None:
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    with pytest.raises(TapirError, match="no such GGUF"):
        endpoint_identity(teacher(parts[0]))
    parts[0].write_text("one")
    with pytest.raises(TapirError, match="m-00002-of-00002"):
        endpoint_identity(teacher(parts[0]))
    seen = []
    for text in ("two", "three"):
        parts[1].write_text(text)
        seen.append(endpoint_identity(teacher(parts[0])))
    assert seen[0] != seen[1]


def test_a_path_is_from_the_current_folder_or_from_home(gguf, monkeypatch) -> None:
    there = endpoint_identity(teacher(gguf))
    monkeypatch.chdir(gguf.parent)
    monkeypatch.setenv("HOME", str(gguf.parent))
    assert endpoint_identity(teacher(Path("teacher.gguf"))) == there
    assert endpoint_identity(teacher(Path("~/teacher.gguf"))) == there


def test_a_template_without_a_system_turn_still_gets_the_system_text(tmp_path, store) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    export_gguf(make_model(tmp_path / "m", template=refusing), tmp_path / "m.gguf", adapter=None, quant="f32")
    merged = [Request((Message("user", "Be brief.\n\na"),), "a", "seeds", max_tokens=8)]
    (one,) = ask(questions("a"), teacher(tmp_path / "m.gguf"), store, run="r")
    (other,) = ask(merged, teacher(tmp_path / "m.gguf"), store, run="r")
    assert (one.text, one.tokens_in) == (other.text, other.tokens_in)
    assert not other.hit


def test_a_file_that_is_changed_before_it_is_opened_answers_nothing(gguf, store, llama) -> None:
    asking = AskSession(questions("a"), teacher(gguf), store, "r")
    jobs = asking.look_up()
    shutil.copy(llama.gguf, gguf)
    with pytest.raises(TapirError, match="changed while this command was running"):
        answer_with_gguf(asking, jobs)
    store.flush()
    assert rows(store, "select count(*) from calls") == [(0,)]


# Errors that the user can correct


def test_faults_of_the_file_are_named_by_their_setting(gguf, store, tmp_path) -> None:
    assert "teacher.gguf: there is no such GGUF" in refused("a", endpoint=teacher(tmp_path / "none.gguf"), store=store)
    judge = Judge(kind="gguf", gguf="~nobody-here/none.gguf")
    assert "judge.gguf: there is no such GGUF" in refused("a", endpoint=judge, store=store)
    for name, content in (("text.gguf", b"text"), ("cut.gguf", gguf.read_bytes()[:20_000])):
        (tmp_path / name).write_bytes(content)
        said = refused("a", endpoint=teacher(tmp_path / name), store=store)
        assert name in said
        assert "Check that teacher.gguf names a complete GGUF" in said


def test_a_gguf_without_a_template_is_refused(tmp_path, store) -> None:
    export_gguf(make_model(tmp_path / "m"), tmp_path / "m.gguf", adapter=None, quant="f32")
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw.replace(b"tokenizer.chat_template", b"tokenizer.chat_no_plate"))
    said = refused("a", endpoint=teacher(tmp_path / "m.gguf"), store=store)
    assert "no chat template" in said
    assert "instruct model" in said


def test_a_prompt_that_the_template_refuses_costs_only_its_row(gguf, store, tmp_path) -> None:
    strict = "{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + CHATML
    export_gguf(make_model(tmp_path / "m", template=strict), tmp_path / "m.gguf", adapter=None, quant="f32")
    wanted = [*questions("a"), Request((Message("user", "x"),) * 3, "row-x", "seeds")]
    good, bad = ask(wanted, teacher(tmp_path / "m.gguf"), store, run="r")
    assert good.text
    assert (bad.text, bad.finish, bad.complete) == ("", "refused", False)
    store.flush()
    [(row, why)] = rows(store, "select row, why from attempts")
    assert row == "row-x"
    assert "too many turns" in why


@pytest.mark.parametrize("extra", [{"top_p": 0.5}, {"temperature": 0.1, "stop": ["x"]}])
def test_parameters_that_a_gguf_does_not_accept_are_refused(gguf, store, extra) -> None:
    said = refused("a", endpoint=teacher(gguf, extra=extra), store=store)
    assert f"teacher.extra: a GGUF does not accept {', '.join(sorted(extra))}" in said


def test_a_recipe_needs_only_the_gguf_file() -> None:
    recipe = parse_recipe("teacher: {gguf: a.gguf}\njudge: {gguf: b.gguf}", "r")
    assert (recipe.teacher.kind, recipe.judge.kind, recipe.teacher.context) == ("gguf", "gguf", 4096)
    assert judge_name(recipe) == "b.gguf"
    assert judge_name(parse_recipe("teacher: {gguf: models/a.gguf}", "r")) == "a.gguf"
