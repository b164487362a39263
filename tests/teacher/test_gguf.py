"""A GGUF as teacher and judge: answers are stored at once, follow a JSON schema, and are not generated again."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command_line import children, kill_llama
from gguf_teacher import WORDS, questions, refused, rows, teacher
from server import texts

from tapir_local.errors import TapirError
from tapir_local.inference.llama_process import ANYWHERE, LlamaPlace
from tapir_local.method import prompts
from tapir_local.method.parsing import parse_scores
from tapir_local.recipe.endpoints import Teacher
from tapir_local.recipe.schema import Budget, Recipe
from tapir_local.records import Answer, Example, Message
from tapir_local.run_dir import RunDir
from tapir_local.stages.backends import real_backends
from tapir_local.stages.context import Work
from tapir_local.stages.judge import ask_judge, judge_name
from tapir_local.store import keys
from tapir_local.store.rows import Call
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.budget import BudgetTracker
from tapir_local.teacher.endpoint import endpoint_identity, request_body
from tapir_local.teacher.session import AskOptions

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
sys.path.insert(0, sys.argv[1] + "/support")
from pathlib import Path
from gguf_teacher import WORDS, questions, teacher
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
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
sys.path.insert(0, sys.argv[1] + "/support")
from pathlib import Path
from gguf_teacher import WORDS, questions, teacher
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.session import AskOptions
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


# In a process of its own, as on a GPU


@pytest.fixture
def apart(tmp_path: Path) -> LlamaPlace:
    return LlamaPlace(apart=True, folder=tmp_path / "llama")


def test_a_process_of_its_own_gives_the_same_answers(gguf, store, tmp_path, apart) -> None:
    wanted = [
        *questions(*WORDS),
        *questions(*WORDS[:3], temperature=1.5, draw=1),
        *questions("a", max_tokens=40, schema=prompts.JUDGEMENT),
        *questions("word " * 400),
    ]
    found = ask(wanted, teacher(gguf), store, run="r", options=AskOptions(llama=apart))
    with Store(tmp_path / "here.db") as here:
        assert ask(wanted, teacher(gguf), here, run="r") == found
        columns = "select key, finish, tokens_in, tokens_out from calls order by key"
        assert rows(store, columns) == rows(here, columns)
        for (key,) in rows(store, "select key from calls"):
            raws = [json.loads(one.get(key) or b"") for one in (store, here)]
            assert {**raws[0], "created": 0} == {**raws[1], "created": 0}
        assert rows(store, "select row, why from attempts") == rows(here, "select row, why from attempts")
    assert all(answer.hit for answer in ask(wanted[:-1], teacher(gguf), store, run="s"))


def test_the_budget_holds_in_a_process_of_its_own(gguf, store, apart) -> None:
    limits = AskOptions(budget=BudgetTracker(Budget(calls=5)), llama=apart)
    with pytest.raises(TapirError, match="calls 5 of 5"):
        ask(questions(*WORDS), teacher(gguf), store, run="r", options=limits)
    assert rows(store, "select count(*) from calls") == [(5,)]
    assert children() == []
    answers = ask(questions(*WORDS), teacher(gguf), store, run="r", options=AskOptions(llama=apart))
    assert sum(answer.hit for answer in answers) == 5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_answers_are_kept_if_the_process_of_llama_cpp_ends(gguf, store, apart, number: int) -> None:
    def kill(done: int, *_: int) -> None:
        if done == 5:
            kill_llama(number)

    wanted, slow = questions(*WORDS, max_tokens=100), teacher(gguf, concurrency=1)
    with pytest.raises(TapirError, match=signal.Signals(number).name) as caught:
        ask(wanted, slow, store, run="r", options=AskOptions(progress=kill, llama=apart))
    assert "goes on from there" in caught.value.fix
    ((kept,),) = rows(store, "select count(*) from calls")
    assert 5 <= kept < len(wanted)
    again = ask(wanted, slow, store, run="r", options=AskOptions(llama=apart))
    assert sum(answer.hit for answer in again) == kept
    with Store(store.path.with_name("whole.db")) as whole:
        assert texts(ask(wanted, slow, whole, run="r")) == texts(again)


def test_a_faulty_gguf_is_the_same_error_in_a_process_of_its_own(gguf, store, tmp_path, apart) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:20_000])
    said = []
    for place in (apart, ANYWHERE):
        with pytest.raises(TapirError) as caught:
            ask(questions("a"), teacher(tmp_path / "cut.gguf"), store, run="r", options=AskOptions(llama=place))
        said.append((caught.value.what, caught.value.where, caught.value.fix))
    assert said[0] == said[1]
    assert "Check that teacher.gguf names a complete GGUF" in said[0][2]


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
