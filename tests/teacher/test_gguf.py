"""A GGUF as teacher and judge: answers are stored at once, follow a JSON schema, and are keyed by the GGUF's bytes."""

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from models import CHATML, make_model

from tapir_local.errors import TapirError
from tapir_local.export.export import export_gguf
from tapir_local.method import prompts
from tapir_local.method.parsing import parse_scores
from tapir_local.pipeline.backends import real_backends
from tapir_local.pipeline.context import Work
from tapir_local.pipeline.judge import ask_judge, judge_name
from tapir_local.recipe.endpoints import Judge, Teacher
from tapir_local.recipe.schema import Budget, Recipe
from tapir_local.recipe.text import parse_recipe
from tapir_local.records import Answer, Example, Message, Request
from tapir_local.run_dir import RunDir
from tapir_local.store import keys
from tapir_local.store.rows import Call
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.budget import BudgetTracker
from tapir_local.teacher.endpoint import endpoint_identity, request_body
from tapir_local.teacher.gguf import answer_with_gguf
from tapir_local.teacher.session import AskOptions, AskSession

WORDS = [f"What is {number} times {number + 7}?" for number in range(12)]


@pytest.fixture(scope="session")
def talker(tmp_path_factory) -> Path:
    """A model that never prefers a special token, so that no greedy answer is empty."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("talker")
    weights = make_model(folder / "m") / "model.safetensors"
    found = load_file(weights)
    found["lm_head.weight"][:6] = found["lm_head.weight"][400:] = 0
    save_file(found, weights, metadata={"format": "pt"})
    export_gguf(folder / "m", folder / "m.gguf", adapter=None, quant="f32")
    return folder / "m.gguf"


@pytest.fixture
def gguf(talker: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(talker, tmp_path / "teacher.gguf"))


def teacher(gguf: Path, **settings: Any) -> Teacher:
    return Teacher(**{"kind": "gguf", "gguf": str(gguf), "concurrency": 4, "context": 256, **settings})


def questions(*words: str, **fields: Any) -> list[Request]:
    return [
        Request((Message("system", "Be brief."), Message("user", word)), word, "seeds", **{"max_tokens": 8, **fields})
        for word in words
    ]


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def rows(store: Store, sql: str) -> list[Any]:
    with sqlite3.connect(store.path) as conn:
        return conn.execute(sql).fetchall()


def refused(*words: str, endpoint: Teacher | Judge, store: Store) -> str:
    with pytest.raises(TapirError) as caught:
        ask(questions(*words), endpoint, store, run="r")
    return str(caught.value)


# Answers and hits


def test_answers_are_stored_as_an_endpoint_would_have_sent_them(gguf, store) -> None:
    shown: list[tuple[int, int, int]] = []
    answers = ask(
        questions(*WORDS), teacher(gguf), store, run="r", options=AskOptions(progress=lambda *seen: shown.append(seen))
    )
    assert [done for done, *_ in shown] == list(range(13))
    assert len(set(texts(answers))) > 6
    assert {(answer.hit, answer.finish in ("stop", "length")) for answer in answers} == {(False, True)}
    for answer, (text, tokens) in zip(answers, alone(gguf), strict=True):
        raw = json.loads(store.get(bytes.fromhex(answer.key)) or b"")
        assert raw["choices"] == [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": answer.finish}
        ]
        assert raw["usage"] == {
            "prompt_tokens": tokens,
            "completion_tokens": answer.tokens_out,
            "total_tokens": tokens + answer.tokens_out,
        }
        assert (raw["object"], raw["model"]) == ("chat.completion", "teacher.gguf")
        assert raw["id"] == f"chatcmpl-{answer.key[:24]}"


def alone(gguf: Path) -> list[tuple[str, int]]:
    """Each question's greedy answer by `generate`, and the number of tokens of its prompt."""
    from tapir_local.inference.config import GenerationConfig
    from tapir_local.inference.generate import encode_prompt, generate
    from tapir_local.inference.model import open_model

    asked = [request.messages for request in questions(*WORDS)]
    with open_model(gguf, vocab_only=True) as model:
        counts = [len(encode_prompt(model, prompt)) for prompt in asked]
    found = generate(gguf, asked, GenerationConfig(max_tokens=8, context=256, parallel=4))
    return [(answer.text, count) for answer, count in zip(found, counts, strict=True)]


AGAIN = """
import sys
sys.path[:0] = [sys.argv[1] + "/support", sys.argv[1] + "/teacher"]
from test_gguf import *
with Store(Path(sys.argv[2])) as store:
    answers = ask(questions(*WORDS), teacher(Path(sys.argv[3])), store, run="s")
print(all(answer.hit for answer in answers), "llama_cpp" in sys.modules)
"""


def test_hits_do_not_open_the_model_wherever_the_file_is(gguf, store) -> None:
    ask(questions(*WORDS), teacher(gguf), store, run="r")
    moved = gguf.rename(gguf.with_name("elsewhere.gguf"))
    command = [sys.executable, "-c", AGAIN, str(Path(__file__).parents[1]), str(store.path), str(moved)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True False\n"


def test_the_model_is_closed_when_the_answers_are_there(gguf, store) -> None:
    def mapped() -> bool:
        return gguf.name in Path("/proc/self/maps").read_text()

    open_then: list[bool] = []
    ask(
        questions("a"),
        teacher(gguf),
        store,
        run="r",
        options=AskOptions(progress=lambda *_: open_then.append(mapped())),
    )
    assert open_then == [False, True]
    assert not mapped()


def test_another_file_under_the_same_name_is_another_teacher(gguf, store, talker, students) -> None:
    first = ask(questions(*WORDS), teacher(gguf), store, run="r")
    shutil.copy(students["qwen2"].gguf, gguf)
    second = ask(questions(*WORDS), teacher(gguf), store, run="r")
    assert not any(answer.hit for answer in second)
    assert texts(first) != texts(second)
    shutil.copy(talker, gguf)
    assert texts(ask(questions(*WORDS), teacher(gguf), store, run="r")) == texts(first)


def test_draws_differ_and_are_the_same_again(gguf, store, tmp_path) -> None:
    drawn = [request for draw in range(4) for request in questions(*WORDS[:3], draw=draw, temperature=1.5)]
    first = ask(drawn, teacher(gguf), store, run="r")
    assert len(set(texts(first))) > 9
    with Store(tmp_path / "other.db") as other:
        assert texts(ask(drawn, teacher(gguf), other, run="r")) == texts(first)


def test_each_request_has_its_own_settings(gguf, store) -> None:
    mixed = [
        *questions("a", max_tokens=3),
        *questions("b", max_tokens=5, temperature=1.0),
        *questions("c", max_tokens=40, schema=prompts.JUDGEMENT),
        *questions("a", max_tokens=3),
        *questions("d", max_tokens=3),
    ]
    answers = ask(mixed, teacher(gguf), store, run="r")
    assert [answer.tokens_out <= most for answer, most in zip(answers, (3, 5, 40, 3, 3), strict=True)] == [True] * 5
    assert answers[0].text == answers[3].text
    assert [answer.hit for answer in answers] == [False, False, False, True, False]
    assert parse_scores(answers[2].text)
    assert rows(store, "select count(*) from calls") == [(4,)]


# The judge


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_every_reply_of_a_judge_that_knows_no_json_can_be_read(gguf, tmp_path, temperature: float) -> None:
    settings = {"gguf": str(gguf), "context": 512, "max_tokens": 40, "temperature": temperature}
    recipe = Recipe.model_validate({"teacher": "pocket", "judge": settings})
    pairs = [Example(f"row-{n}", (Message("user", word),), "answer") for n, word in enumerate(WORDS)]
    run = RunDir(tmp_path / "cache", "r")
    with real_backends(recipe, run, print) as backends:
        found = ask_judge(Work(recipe, run, backends), "judge", pairs, {pair.id: f"{pair.id}?" for pair in pairs})
    scores = [score for judgement in found for order in judgement.orders for score in order or (0.0,)]
    assert len(scores) == 48
    assert {1.0 <= score <= 10.0 for score in scores} == {True}
    assert len(set(scores)) > 1
    assert judge_name(recipe) == "teacher.gguf"


def test_the_schema_is_sent_to_no_other_kind() -> None:
    (request,) = questions("a", schema=prompts.JUDGEMENT)
    (plain,) = questions("a")
    endpoint = Teacher(model="m")
    assert request_body(request, endpoint) == request_body(plain, endpoint)
    assert keys.canonical_json(request_body(plain, endpoint)) == (
        b'{"max_tokens":8,"messages":[{"content":"Be brief.","role":"system"},{"content":"a","role":"user"}],'
        b'"model":"m","temperature":0}'
    )


# Interruption and other processes


class Cut(Exception):
    """Stands for any error that ends a run."""


def test_a_run_cut_after_five_answers_keeps_five(gguf, store) -> None:
    def cut(done: int, total: int, hits: int) -> None:
        if done == 5:
            raise Cut

    with pytest.raises(Cut):
        ask(questions(*WORDS), teacher(gguf), store, run="r", options=AskOptions(progress=cut))
    assert rows(store, "select count(*) from calls") == [(5,)]
    assert sum(answer.hit for answer in ask(questions(*WORDS), teacher(gguf), store, run="r")) == 5


KILLED = """
import os, signal, sys, time
sys.path[:0] = [sys.argv[1] + "/support", sys.argv[1] + "/teacher"]
from test_gguf import *
def kill(done, total, hits):
    if done == 5:
        time.sleep(1)  # the writer's turn: an answer is on the disk within milliseconds, not at once
        os.kill(os.getpid(), signal.SIGKILL)
ask(questions(*WORDS), teacher(Path(sys.argv[3])), Store(Path(sys.argv[2])), run="r", options=AskOptions(progress=kill))
"""


def test_a_killed_run_keeps_what_was_answered(gguf, tmp_path) -> None:
    path = tmp_path / "killed.db"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), str(path), str(gguf)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    with Store(path) as store:
        assert sum(answer.hit for answer in ask(questions(*WORDS), teacher(gguf), store, run="r")) == 5


@pytest.mark.parametrize("answered", [True, False])
def test_jobs_of_another_process_are_left_to_it(gguf, store, answered: bool) -> None:
    request = questions(WORDS[0])[0]
    text = keys.request_text(endpoint_identity(teacher(gguf)), request_body(request, teacher(gguf)), 0)
    got: list[list[Answer]] = []
    others_done = threading.Event()

    def watch(done: int, total: int, hits: int) -> None:
        if done == 11:
            others_done.set()

    asking = threading.Thread(
        target=lambda: got.append(
            ask(questions(*WORDS), teacher(gguf), store, run="r", options=AskOptions(progress=watch))
        )
    )
    with Store(store.path) as other:
        assert other.claim(keys.hash_request(text))
        asking.start()
        assert others_done.wait(60)
        if answered:
            raw = b'{"choices": [{"message": {"content": "theirs"}, "finish_reason": "stop"}]}'
            other.put(Call(text, raw, "stop", "k")).result()
        other.release(keys.hash_request(text))
        asking.join(60)
    assert [answer.hit for answer in got[0]] == [answered] + [False] * 11
    assert (got[0][0].text == "theirs") == answered


# Modes


def test_a_budget_is_never_exceeded_and_answers_are_kept(gguf, store) -> None:
    with pytest.raises(TapirError, match="calls 5 of 5"):
        ask(questions(*WORDS), teacher(gguf), store, run="r", options=AskOptions(budget=BudgetTracker(Budget(calls=5))))
    assert rows(store, "select count(*) from calls") == [(5,)]
    with pytest.raises(TapirError, match="the budget is spent"):
        ask(
            questions(*WORDS),
            teacher(gguf),
            store,
            run="r",
            options=AskOptions(budget=BudgetTracker(Budget(tokens=300))),
        )
    answers = ask(questions(*WORDS), teacher(gguf), store, run="r")
    assert sum(answer.hit for answer in answers) > 5
    assert texts(answers) == [text for text, _ in alone(gguf)]


def test_a_larger_max_tokens_regenerates_only_the_cut_answers(gguf, store) -> None:
    def asked(size: int) -> list[Answer]:
        held = questions(*WORDS[:6], max_tokens=size, schema=prompts.JUDGEMENT)  # they end by themselves
        return ask([*held, *questions(*WORDS[6:], max_tokens=size)], teacher(gguf), store, run="r")

    assert [answer.finish for answer in asked(40)] == ["stop"] * 6 + ["length"] * 6
    assert [answer.hit for answer in asked(60)] == [True] * 6 + [False] * 6


def test_replay_answers_from_the_store_alone(gguf, store) -> None:
    first = ask(questions(*WORDS), teacher(gguf), store, run="r")
    with Store(store.path, "replay") as replay:
        assert texts(ask(questions(*WORDS), teacher(gguf), replay, run="s")) == texts(first)
        said = refused("another", endpoint=teacher(gguf), store=replay)
    assert "stage seeds, row another is not in the store" in said


def test_refresh_answers_again(gguf, store) -> None:
    first = ask(questions(*WORDS), teacher(gguf), store, run="r")
    with Store(store.path, "refresh") as refresh:
        again = ask(questions(*WORDS), teacher(gguf), refresh, run="r")
    assert not any(answer.hit for answer in again)
    assert texts(again) == texts(first)


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
