"""Odd replies of real servers: each costs at most its own row, is paid once, and is reported in its own words."""

import json
import sqlite3
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import httpx2
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server import ODD, WORDS, completion, questions, raises, teacher, with_usage

from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Judge, Teacher
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Message
from tapir_local.run_dir import RunDir
from tapir_local.stages.backends import ask_backend
from tapir_local.stages.context import Work
from tapir_local.store.reply import ReplyOptions, parse_reply, parse_usage
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.refusals import classify_error_response, classify_unreadable_reply
from tapir_local.teacher.responses import join_stream
from tapir_local.teacher.session import AskOptions

NAMES = [
    "choices",
    "message",
    "content",
    "text",
    "error",
    "errors",
    "code",
    "detail",
    "usage",
    "metadata",
    "raw",
    "type",
]

pytestmark = pytest.mark.usefixtures("no_pauses")


def body(text, finish, tokens=3, **message):
    found = completion(text, finish, **message)
    return json.dumps({**found, "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}).encode()


# What a reply means

WHOLE = """stop STOP Stop FINISH_REASON_STOP finish_reason_stop FinishReason.STOP eos EOS eos_token EOS_TOKEN eosFound
stop_sequence STOP_SEQUENCE stop-sequence end_turn endTurn END_TURN end_of_turn complete COMPLETE completed done
finished FINISHED stop_token stop_word stopStringFound stop_criteria_met STOP_CRITERIA_MET endoftext end_of_text"""


CUT = """length LENGTH max_tokens MAX_TOKENS maxTokens FINISH_REASON_MAX_TOKENS token_limit TOKEN_LIMIT max_length
model_length max_output_tokens maxPredictedTokensReached model_context_window_exceeded ERROR_LIMIT limit"""


BLOCKED = """content_filter CONTENT_FILTER content_filtered SAFETY FINISH_REASON_SAFETY RECITATION BLOCKLIST
PROHIBITED_CONTENT SPII sensitive refusal guardrail_intervened ERROR_TOXIC"""


@pytest.mark.parametrize("word", WHOLE.split())
def test_every_servers_finish_reason_for_a_complete_reply(word):
    reply = parse_reply(body("A plain answer.", word))
    assert (reply.finish, reply.complete, reply.keeps, reply.why) == ("stop", True, True, "")


@pytest.mark.parametrize("word", CUT.split())
def test_every_servers_finish_reason_for_a_cut_reply(word):
    reply = parse_reply(body("A plain ans", word))
    assert (reply.finish, reply.complete, reply.keeps, reply.why) == ("length", False, True, "")


@pytest.mark.parametrize("word", BLOCKED.split())
def test_every_servers_finish_reason_for_a_filtered_reply(word):
    reply = parse_reply(body("I", word))
    assert (reply.finish, reply.complete, reply.keeps) == ("content_filter", False, False)
    assert word in reply.why


@pytest.mark.parametrize("word", ["error", "abort", "insufficient_system_resource", "network_error", "USER_CANCEL"])
def test_a_reply_that_the_server_broke_off_is_retried(server, store, word):
    server.faults["a"] = [with_usage("A pl", word)]
    (answer,) = ask(questions("a"), teacher(server), store, run="r")
    assert (answer.text, answer.complete, len(server.bodies)) == ("re: a", True, 2)


@pytest.mark.parametrize("word", [None, "", "null", "FINISH_REASON_UNSPECIFIED"])
@pytest.mark.parametrize(
    ("text", "tokens", "most", "finish"),
    [("A plain answer.", 3, 64, "stop"), ("A plain answer.", 64, 64, "length"), ("word " * 60, 0, 64, "length")],
)
def test_without_a_finish_reason_the_tokens_decide(word, text, tokens, most, finish):
    assert parse_reply(body(text, word, tokens), ReplyOptions(max_tokens=most)).finish == finish


def test_sglangs_finish_is_an_object():
    assert parse_reply(body("A", {"type": "stop", "matched": 2})).finish == "stop"


@pytest.mark.parametrize("name", ["no finish", "no usage", "stream only"])
def test_complete_answers_with_missing_fields_are_paid_once(server, store, name):
    server.otherwise = ODD[name]
    settings = teacher(server, stream=name == "stream only")
    for hit in (False, True):
        answers = ask(questions(*WORDS), settings, store, run="r")
        assert {(answer.text, answer.complete, answer.hit) for answer in answers} == {("A plain answer.", True, hit)}
    assert len(server.bodies) == len(WORDS)


@pytest.mark.parametrize(("name", "finish"), [("unknown finish", "moon"), ("no finish, all tokens", "length")])
def test_text_with_any_finish_reason_is_paid_once_and_used(server, store, name, finish):
    server.otherwise = ODD[name]
    for hit in (False, True):
        answers = ask(questions(*WORDS), teacher(server), store, run="r")
        assert {(answer.finish, answer.complete, answer.hit) for answer in answers} == {(finish, False, hit)}
    assert len(server.bodies) == len(WORDS)
    assert ("'moon'" in answers[0].why) == (name == "unknown finish")


@pytest.mark.parametrize("content", [{"text": "a"}, 5, True, ["a", {"text": {"value": "b"}}]])
def test_a_content_that_is_not_text_is_not_an_answer(content):
    with pytest.raises(ValueError, match="not a chat completion"):
        parse_reply(body(content, "stop"))


def test_thinking_parts_are_not_text():
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "A."}, " B."]
    assert parse_reply(body(parts, "stop")).text == "A. B."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("half a pair", "A \ufffd smile"),
        ("not a number", "A plain answer."),
        ("latin-1", "A caf\ufffd"),
        ("mark at the beginning", "A plain answer."),
    ],
)
def test_a_reply_that_strict_readers_refuse_is_read_and_paid_once(server, store, name, text):
    server.otherwise = ODD[name]
    for hit in (False, True):
        (answer,) = ask(questions("a"), teacher(server), store, run="r")
        assert (answer.text, answer.complete, answer.hit) == (text, True, hit)
    assert len(server.bodies) == 1
    answer.text.encode()


def test_a_whole_pair_of_surrogates_stays_a_letter():
    raw = b'{"choices": [{"message": {"content": "\\ud83d\\ude00"}, "finish_reason": "stop"}], "x": NaN}'
    assert parse_reply(raw).text == "\U0001f600"


def test_parts_and_other_words_for_stop():
    parts = completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "eos")
    reply = parse_reply(json.dumps(parts).encode())
    assert (reply.text, reply.finish, reply.keeps) == ("ab", "stop", True)


# Thinking


@pytest.mark.parametrize(("thinking", "text"), [("strip", "A plain answer."), ("keep", None)])
def test_thinking_is_left_out_of_the_text_and_stays_in_the_store(server, store, thinking, text):
    server.otherwise = ODD["thinks inline"]
    raw = "<think>They ask for a use.</think>A plain answer."
    for settings in (teacher(server, thinking=thinking), Judge(**teacher(server, thinking=thinking).model_dump())):
        for word in "ab":
            (answer,) = ask(questions(word), settings, store, run="r")
            assert (answer.text, answer.complete) == (text or raw, True)
    assert len(server.bodies) == 2, "teacher and judge of one endpoint ask the same"
    kept = orjson.loads(store.get(bytes.fromhex(answer.key)) or b"")
    assert kept["choices"][0]["message"]["content"] == raw


def test_a_closing_mark_in_the_answer_itself_stays(server, store, tmp_path):
    server.otherwise = with_usage("<think>a</think>\nEnd it with\n</think>\non a line.", "stop")
    recipe = Recipe(teacher=teacher(server))
    backend = ask_backend(recipe.teacher, store, "r")
    backends: Any = SimpleNamespace(teacher=backend, judge=backend)
    work = Work(recipe, RunDir(tmp_path, "r"), backends, step="prepare/seeds")
    (answer,) = work.ask(backend, [work.request("seeds", "1", (Message("user", "How?"),))])
    assert answer.text == "End it with\n</think>\non a line."


def test_completeness_is_decided_on_the_text_without_thinking(server, store):
    server.otherwise = with_usage("<think>a</think> ", "stop")
    (answer,) = ask(questions("a"), teacher(server), store, run="r")
    assert (answer.complete, answer.text.strip()) == (False, "")
    with sqlite3.connect(store.path) as conn:
        assert conn.execute("select count(*) from calls").fetchone() == (0,)


# Useless replies


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("thought only", "reasoning_content"),
        ("thought used all", "raise teacher.max_tokens"),
        ("unclosed thought", "no answer"),
    ],
)
def test_a_reply_of_thinking_only_is_explained_and_not_retried(server, store, name, why):
    server.otherwise = ODD[name]
    answers = ask(questions(*WORDS), teacher(server), store, run="r")
    assert all(why in answer.why and not answer.complete for answer in answers)
    assert len(server.bodies) == len(WORDS)


@pytest.mark.parametrize("name", ["thought only", "thought used all", "unclosed thought", "unknown finish"])
def test_twenty_useless_replies_in_a_row_stop_before_more_is_paid(server, store, name):
    server.otherwise = ODD[name]
    words = [str(number) for number in range(100)]
    with raises("replies in a row cannot be used; the last: "):
        ask(questions(*words), teacher(server, concurrency=4), store, run="r")
    assert 20 <= len(server.bodies) <= 24


def test_cut_replies_stop_too_and_are_not_paid_again(server, store):
    server.otherwise = with_usage("A plain ans", "length", 1024)
    words = [str(number) for number in range(30)]
    with raises("Raise teacher.max_tokens (now 1,024)"):
        ask(questions(*words), teacher(server, concurrency=1), store, run="r")
    assert len(server.bodies) == 20
    answers = ask(questions(*words), teacher(server, concurrency=1), store, run="r")
    assert [answer.hit for answer in answers] == [True] * 20 + [False] * 10


def test_a_few_odd_rows_retried_together_do_not_stop_a_good_stage(server, store):
    words = [str(number) for number in range(500)]
    odd = words[::21][:22]
    server.faults = {word: [ODD["thought only"]] * 2 for word in odd}
    first = ask(questions(*words), teacher(server, concurrency=16), store, run="r")
    again = ask(questions(*odd, draw=1), teacher(server, concurrency=1, send_seed=True), store, run="r")
    assert sum(answer.complete for answer in first) == 478
    assert not any(answer.complete for answer in again)


# Arbitrary replies


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}', b"<html>"])
def test_replies_that_are_not_completions_are_refused(raw):
    with pytest.raises(ValueError, match=r"."):
        parse_reply(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@given(JSON, st.booleans())
def test_any_json_is_read_or_refused_with_a_reason(value, strip):
    raw = json.dumps(value).encode()
    reading = ReplyOptions("strip" if strip else "keep", 5)
    with suppress(ValueError):
        parse_reply(raw, reading).text.encode()
    failure = classify_unreadable_reply(raw, {}, Teacher(model="m"))
    assert failure.why
    assert failure.fix
    failure.why.encode()
    for code in (301, 400, 401, 404, 422, 429, 500, 503):
        assert classify_error_response(httpx2.Response(code, content=raw), Teacher(model="m")).why.startswith(str(code))


@given(JSON)
def test_any_value_in_a_completion_is_read_or_refused(value):
    for name in ("message", "finish_reason"):
        choice = {"message": {"content": "A."}, "finish_reason": "stop", name: value}
        with suppress(ValueError):
            parse_reply(json.dumps({"choices": [choice], "usage": value, "model": value}).encode()).text.encode()


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_with_a_reason(raw):
    with pytest.raises(ValueError, match=r"."):
        parse_reply(raw)
    assert classify_unreadable_reply(raw, {}, Teacher(model="m")).why
    with suppress(ValueError):
        join_stream(b"data: " + raw + b"\n\n")


def test_every_server_behavior_ends_in_answers_or_an_error(server, tmp_path):
    """Each behavior, for every row and then for one row among others."""
    for number, (name, fault) in enumerate(ODD.items()):
        server.faults, server.otherwise = {}, fault
        with Store(tmp_path / f"{number}.db") as store:
            with suppress(TapirError):
                ask(questions(*WORDS), teacher(server, attempts=2), store, run="r", options=AskOptions(patience=1.0))
            if name in ("error in 200", "no money"):  # an empty account concerns no single row
                continue
            server.otherwise, server.faults = None, {"3": [fault]}
            one_by_one = teacher(server, send_seed=True, concurrency=1)  # an error in the first reply may end the stage
            answers = ask(questions(*WORDS, draw=1), one_by_one, store, run="r")
            assert sum(answer.complete for answer in answers) >= 7, name


@pytest.mark.parametrize("count", [2**62, 1e300, float("nan"), float("inf"), -1, 1.5, True, "7"])
def test_impossible_token_counts_are_no_counts(count):
    assert parse_usage({"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 10}) == (0, 0)
