"""Odd replies of real servers: each costs at most its own row, is paid once, and is reported in its own words."""

import gzip
import json
import sqlite3
import ssl
import subprocess
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server import (
    ODD,
    attempts,
    brings,
    completion,
    garbled,
    loading,
    questions,
    raises,
    send,
    status,
    streams,
    teacher,
    with_usage,
)

from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Judge, Teacher
from tapir_local.store.reply import ReplyOptions, parse_reply
from tapir_local.store.store import Store
from tapir_local.teacher import http, responses
from tapir_local.teacher.ask import ask
from tapir_local.teacher.endpoint import mask_key, unencrypted_key_warning
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
WORDS = [str(number) for number in range(8)]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(http, "backoff_seconds", lambda tries, chance: 0.01)


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


# Refusals of one row


@pytest.mark.parametrize(
    ("name", "finish", "words", "sent"),
    [
        ("inspected", "content_filter", "may contain inappropriate content", 1),
        ("too long", "refused", "maximum context length is 64 tokens", 1),
        ("empty choices", "", "without choices", 2),
        ("null choices", "", "without choices", 2),
        ("content object", "", "no readable text", 2),
        ("empty body", "", "it is empty", 2),
        ("list", "", "a JSON list", 2),
    ],
)
def test_a_row_that_the_server_does_not_answer_costs_that_row(server, store, name, finish, words, sent):
    for _ in range(2):  # at the next start too
        server.faults["3"] = [ODD[name]] * sent
        answers = ask(questions(*WORDS), teacher(server), store, run="r")
        assert [answer.complete for answer in answers] == [word != "3" for word in WORDS]
        assert (answers[3].finish, answers[3].text) == (finish, "")
        assert words in answers[3].why
    assert len(server.bodies) == len(WORDS) - 1 + 2 * sent
    assert {row for row, _ in attempts(store)} == {"row-3"}


TOO_LONG = [
    (400, "This model's maximum context length is 4097 tokens. However, you requested 5000 tokens", ""),
    (400, "the request exceeds the available context size, try increasing it", "exceed_context_size_error"),
    (
        400,
        "'max_tokens' or 'max_completion_tokens' is too large: 9. This model's maximum context length is 8 tokens",
        "",
    ),
    (413, "Request Entity Too Large", ""),
    (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. Given: input tokens exceed", ""),
    (400, "Range of input length should be [1, 30720]", "InvalidParameter"),
    (400, "prompt is too long: 210000 tokens > 200000 maximum", "invalid_request_error"),
    (400, "Invalid 'messages[0].content': string too long.", "string_above_max_length"),
    (429, "Request too large for gpt-4o on tokens per min (TPM): Limit 10000, Requested 20000", "rate_limit_exceeded"),
]
FILTERED = [
    (400, "The response was filtered due to the prompt triggering Azure's content management policy", "content_filter"),
    (400, "Content Exists Risk", "invalid_request_error"),
    (400, "Your request was rejected as a result of our safety system.", "content_policy_violation"),
    (403, "Your chosen model requires moderation and your input was flagged for violence", "403"),
    (451, "harmful", ""),
]
OTHERS = [
    (400, "invalid unicode in messages[0]", ""),
    (422, "body.messages.0.content: wrong", ""),
    (400, "the server dislikes it", ""),
]


@pytest.mark.parametrize(
    ("code", "message", "kind", "finish"),
    [(*case, "refused") for case in (*TOO_LONG, *OTHERS)] + [(*case, "content_filter") for case in FILTERED],
)
def test_every_wording_of_a_refused_row(server, store, code, message, kind, finish):
    server.faults["3"] = [status(code, message, kind)]
    answers = ask(questions(*WORDS), teacher(server, concurrency=1), store, run="r")
    assert [answer.complete for answer in answers] == [word != "3" for word in WORDS]
    assert (answers[3].finish, answers[3].why) == (finish, f"{code}: {message}")
    assert len(server.bodies) == len(WORDS)


@pytest.mark.parametrize("shape", ["string", "detail", "details", "list", "errors", "code beside"])
def test_errors_of_every_shape_keep_the_servers_words(server, store, shape):
    words = "prompt is too long"
    bodies = {
        "string": {"error": words},
        "detail": {"detail": words},
        "details": {"detail": [{"loc": ["body"], "msg": words}]},
        "list": [{"error": {"message": words}}],
        "errors": {"errors": [{"message": words}]},
        "code beside": {"object": "error", "message": words, "code": 40303},
    }
    server.faults["1"] = [brings(bodies[shape], 400)]
    answers = ask(questions("0", "1"), teacher(server, concurrency=1), store, run="r")
    assert (answers[1].finish, answers[1].why) == ("refused", f"400: {words}")


def test_a_row_at_the_first_place_costs_that_row_too(server, store):
    server.faults["0"] = [status(400, "the server dislikes it")]
    answers = ask(questions(*WORDS), teacher(server, concurrency=1), store, run="r")
    assert [answer.complete for answer in answers] == [False] + [True] * 7


def test_odd_rows_left_alone_at_a_later_start_cost_themselves_again(server, store):
    server.faults = {word: [status(400, "the server dislikes it")] * 2 for word in WORDS[:6]}
    ask(questions(*reversed(WORDS)), teacher(server, concurrency=1), store, run="r")
    (answer,) = ask(questions("0"), teacher(server), store, run="r")
    assert answer.why == "400: the server dislikes it"


@pytest.mark.parametrize("name", ["inspected", "too long", "empty choices", "list", "empty body"])
def test_if_every_row_is_refused_it_stops_after_a_few(server, store, name):
    server.otherwise = ODD[name]
    words = [str(number) for number in range(100)]
    with raises(str(server.url)):
        ask(questions(*words), teacher(server, concurrency=2), store, run="r")
    assert len(server.bodies) <= (7 if name in ("inspected", "too long") else 22)


def test_an_unexplained_refusal_of_all_rows_stops_even_with_few_rows(server, store):
    server.otherwise = status(400, "the server dislikes it")
    with raises("400: the server dislikes it\n  The endpoint does not accept this request"):
        ask(questions("a", "b"), teacher(server), store, run="r")


def test_a_row_at_which_the_server_fails_every_time_costs_that_row(server, store):
    server.faults["3"] = [status(500, "index out of range")] * 6
    answers = ask(questions(*WORDS), teacher(server), store, run="r")
    assert [answer.complete for answer in answers] == [word != "3" for word in WORDS]
    assert answers[3].why == "500: index out of range"


def test_a_server_that_fails_at_everything_stops(server, store):
    ask(questions(*WORDS), teacher(server), store, run="r")
    server.otherwise = status(500, "the engine is dead")
    with raises("the engine is dead (tried 3 times)"):
        ask(questions(*WORDS, *(f"{word}x" for word in WORDS)), teacher(server, attempts=3), store, run="r")


# Refusals of everything


@pytest.mark.parametrize(
    ("name", "words", "fix"),
    [
        ("error in 200", "Insufficient credits", "Add credit to the account"),
        ("no money", "402: Insufficient Balance", "Add credit to the account"),
        ("web page", "a web page: Sign in", "base_url"),
        (
            "new names",
            "Use 'max_completion_tokens'",
            "teacher: {extra: {max_tokens: null, max_completion_tokens: 1024}}",
        ),
        ("stream only", "only support stream mode", "teacher: {stream: true}"),
    ],
)
def test_failures_of_all_rows_quote_the_server_and_say_what_to_do(server, store, name, words, fix):
    server.otherwise = ODD[name]
    with raises(words) as caught:
        ask(questions(*map(str, range(50))), teacher(server, concurrency=2), store, run="r")
    assert fix in str(caught.value)
    assert len(server.bodies) <= 6


def test_the_proposed_recipe_lines_work(server, store):
    server.otherwise = ODD["new names"]
    extra = {"max_tokens": None, "max_completion_tokens": 64}
    with raises("teacher: {extra: {temperature: null}}"):
        ask(questions("a", temperature=0.7), teacher(server, extra=extra), store, run="r")
    (answer,) = ask(
        questions("a", temperature=0.7), teacher(server, extra={**extra, "temperature": None}), store, run="r"
    )
    assert answer.complete


def test_the_proposed_lines_for_a_judge_name_the_judge(server, store):
    server.otherwise = ODD["new names"]
    judge = Judge(kind="openai", base_url=server.url, model="m", max_tokens=99)
    with raises("judge: {extra: {max_tokens: null, max_completion_tokens: 99}}"):
        ask(questions("a"), judge, store, run="r")


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_another_address_is_named_or_the_request_stays_a_post(server, store, code):
    server.otherwise = lambda handler, body: (
        send(handler, 200, completion("there"))
        if "/v2/" in handler.path
        else send(handler, code, b"", {"location": "/api/v2/chat/completions"})
    )
    if code in (307, 308):
        assert ask(questions("a"), teacher(server), store, run="r")[0].text == "there"
        return
    with raises(f"teacher: {{base_url: http://127.0.0.1:{server.port}/api/v2}}"):
        ask(questions("a"), teacher(server), store, run="r")
    assert len(server.bodies) == 1


def test_the_key_is_not_sent_to_another_host(server, store, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    server.otherwise = brings(b"", 307, location="http://elsewhere.invalid/v1/chat/completions")
    with raises("teacher: {base_url: http://elsewhere.invalid/v1}"):
        ask(questions("a"), teacher(server), store, run="r")


@pytest.mark.parametrize(
    ("code", "message", "kind", "fix"),
    [
        (401, "Invalid token", "", "environment variable OPENAI_API_KEY"),
        (403, "Country not supported", "", "environment variable OPENAI_API_KEY"),
        (404, "404 page not found", "", "often ends in /v1"),
        (404, "The model `x` does not exist", "model_not_found", "a model named 'm'"),
        (405, "Method Not Allowed", "", "base_url"),
        (403, "Your account balance is insufficient", "", "Add credit"),
        (429, "Insufficient Balance", "1113", "Add credit"),
    ],
)
def test_statuses_give_their_own_advice_at_once(server, store, code, message, kind, fix):
    server.otherwise = status(code, message, kind)
    with raises(f"{code}: {message}") as caught:
        ask(questions(*WORDS), teacher(server, concurrency=1), store, run="r")
    assert fix in str(caught.value)
    assert len(server.bodies) == 1


# Servers that are loading or overloaded


def test_a_server_that_loads_its_model_is_waited_for_without_using_attempts(server, store, monkeypatch):
    monkeypatch.setattr(http, "LOADING_POLL_SECONDS", 0.02)
    server.otherwise = loading(30)
    told = []
    answers = ask(
        questions("a"),
        teacher(server, attempts=1),
        store,
        run="r",
        options=AskOptions(tell=lambda *seen: told.append(seen)),
    )
    assert answers[0].text == "loaded"
    assert told[0][2].startswith("the server is loading its model")


def test_waiting_for_a_loading_server_ends(server, store, monkeypatch):
    monkeypatch.setattr(http, "LOADING_POLL_SECONDS", 0.02)
    server.otherwise = loading(10**6)
    with raises("Loading model; the server is still loading its model after"):
        ask(questions("a"), teacher(server), store, run="r", options=AskOptions(patience=0.2))
    assert http.MAX_LOADING_SECONDS >= 120


@pytest.mark.parametrize("code", [520, 521, 522, 523, 524, 529])
def test_temporary_failures_of_gateways_are_retried(server, store, code):
    server.faults["a"] = [status(code, "overloaded")]
    assert ask(questions("a"), teacher(server), store, run="r")[0].text == "re: a"


def test_a_pause_longer_than_patience_stops_at_once(server, store):
    server.otherwise = status(503, "maintenance", retry_after="86400")
    with raises("503: maintenance; the next request may be sent in 86,400 s"):
        ask(questions("a"), teacher(server), store, run="r")
    assert len(server.bodies) == 1


# Connections and HTTP


GARBLED = ["status line", "long header", "bad chunk", "bad length", "cut body", "bad gzip"]


@pytest.mark.parametrize("name", GARBLED)
def test_a_garbled_reply_is_tried_again(server, store, name):
    server.faults["a"] = [ODD[name]]
    assert ask(questions("a"), teacher(server), store, run="r")[0].text == "re: a"
    assert len(attempts(store)) == 1


@pytest.mark.parametrize("name", GARBLED)
def test_only_garbled_replies_end_in_one_error(server, store, name):
    server.otherwise = ODD[name]
    with raises(server.url) as caught:
        ask(questions("a"), teacher(server, attempts=3), store, run="r")
    assert "nothing paid for is lost" in str(caught.value)


def test_a_port_without_an_http_server_is_named(server, store):
    server.otherwise = garbled(b"-ERR unknown command 'POST'\r\n")
    with raises(f"the reply of 127.0.0.1:{server.port} is not HTTP") as caught:
        ask(questions("a"), teacher(server), store, run="r")
    assert len(server.bodies) == 2
    assert "ssl" not in str(caught.value)


def test_connection_errors_do_not_mention_ssl(store):
    with raises("nothing listens at localhost:9") as caught:
        ask(questions("a"), Teacher(base_url="http://localhost:9/v1", model="m"), store, run="r")
    assert "ssl" not in str(caught.value)
    assert len(attempts(store)) == 2


def test_an_endless_reply_is_not_read_to_its_end(server, store, monkeypatch):
    monkeypatch.setattr(responses, "MAX_REPLY_BYTES", 1 << 20)
    bomb = gzip.compress(json.dumps(completion("a" * (4 << 20))).encode())
    server.faults["1"] = [brings(bomb, content_encoding="gzip")] * 2
    answers = ask(questions("0", "1"), teacher(server, concurrency=1), store, run="r")
    assert "larger than 1 MiB" in answers[1].why
    assert store.path.stat().st_size < 1 << 20


@pytest.mark.parametrize(
    "url", ["http://[::1/v1", "http://host:99999/v1", "localhost:8000/v1", "ftp://host/v1", "http://", "http://a b/v1"]
)
def test_a_malformed_address_is_one_error(store, url):
    with raises("base_url"):
        ask(questions("a"), Teacher(base_url=url, model="m"), store, run="r")


def test_a_socks_proxy_is_named_before_anything_is_sent(store, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    with raises("SOCKS proxy"):
        ask(questions("a"), Teacher(base_url="http://teacher.invalid/v1", model="m"), store, run="r")
    monkeypatch.setenv("ALL_PROXY", "gopher://[")
    with raises("proxy"):
        ask(questions("a"), Teacher(base_url="http://teacher.invalid/v1", model="m"), store, run="r")


@pytest.mark.parametrize("refuses", [False, True])
def test_a_proxy_that_cannot_be_used_is_named(server, store, monkeypatch, refuses):
    for name in ("http_proxy", "no_proxy", "NO_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "short")
    server.otherwise = status(407, "Proxy Authentication Required")
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1") if refuses else "http://127.0.0.1:9")
    with raises("proxy") as caught:
        ask(questions("a"), Teacher(base_url="http://teacher.invalid/v1", model="m"), store, run="r")
    assert "PROXY" in str(caught.value)


def test_a_server_at_an_ipv6_address_answers(store):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            send(self, 200, completion("six"))

        def log_message(self, format, *args): ...

    class Six(ThreadingHTTPServer):
        import socket

        address_family = socket.AF_INET6

    try:
        http = Six(("::1", 0), Handler)
    except OSError:
        pytest.skip("no IPv6 here")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        url = f"http://[::1]:{http.server_port}/v1"
        assert ask(questions("a"), Teacher(base_url=url, model="m"), store, run="r")[0].text == "six"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.fixture
def secure(server, tmp_path):
    """The server behind TLS, and the file with the certificate of its authority."""
    key, certificate = tmp_path / "key.pem", tmp_path / "ca.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl here")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            server.answer(self)

        def log_message(self, format, *args): ...

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request, client_address): ...

    http = Quiet(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    http.socket = context.wrap_socket(http.socket, server_side=True)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"https://localhost:{http.server_port}/v1", certificate
    http.shutdown()
    thread.join()
    http.server_close()


def test_a_private_authority_is_trusted_by_its_file_on_this_machine_too(secure, store, monkeypatch):
    url, certificate = secure
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with raises("is not trusted") as caught:
        ask(questions("a"), Teacher(base_url=url, model="m"), store, run="r")
    assert "export SSL_CERT_FILE=" in str(caught.value)
    assert len(attempts(store)) == 2
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert ask(questions("a"), Teacher(base_url=url, model="m"), store, run="r")[0].text == "re: a"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("none.pem")))
    with raises("SSL_CERT_FILE"):
        ask(questions("b"), Teacher(base_url=url, model="m"), store, run="r")


def test_https_to_an_http_server_is_named(server, store):
    with raises("does not speak https"):
        ask(questions("a"), Teacher(base_url=server.url.replace("http:", "https:"), model="m"), store, run="r")


# Arbitrary replies

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


# Streams


def test_a_stream_is_stored_as_one_completion_under_the_same_key(server, store):
    server.otherwise = streams("A ", "plain", " answer.", reasoning_content="hm")
    settings = teacher(server, stream=True)
    (answer,) = ask(questions("a"), settings, store, run="r")
    assert (answer.text, answer.tokens_in, answer.tokens_out, answer.complete) == ("A plain answer.", 7, 3, True)
    kept = orjson.loads(store.get(bytes.fromhex(answer.key)) or b"")
    message = {"role": "assistant", "content": "A plain answer.", "reasoning_content": "hm"}
    assert kept["choices"] == [{"index": 0, "finish_reason": "stop", "message": message}]
    assert (kept["model"], kept["object"]) == ("m-1", "chat.completion")
    assert ask(questions("a"), teacher(server), store, run="r")[0].hit, "stream is no part of the key"
    assert server.bodies[0]["stream"] is True
    assert server.bodies[0]["stream_options"] == {"include_usage": True}


def test_a_cut_stream_is_retried(server, store):
    server.otherwise = streams("A plain answer.")
    server.faults["a"] = [streams("A pl", finish=None, ends=False)]
    assert ask(questions("a"), teacher(server, stream=True), store, run="r")[0].text == "A plain answer."
    assert attempts(store) == [("row-a", "the stream ended before the reply was complete")]


def test_a_server_without_stream_options_is_asked_without_them(server, store):
    def strict(handler, asked):
        known = "stream_options" not in asked
        (streams("A.") if known else status(400, "stream_options: Extra inputs are not permitted"))(handler, asked)

    server.otherwise = strict
    answers = ask(questions(*WORDS), teacher(server, stream=True, attempts=1, concurrency=1), store, run="r")
    assert all(answer.complete for answer in answers)
    assert len(server.bodies) == len(WORDS) + 1


def test_a_whole_reply_to_a_stream_request_is_read(server, store):
    assert ask(questions("a"), teacher(server, stream=True), store, run="r")[0].text == "re: a"


def test_an_error_in_a_stream_is_an_error(server, store):
    event = b'data: {"error": {"message": "Insufficient credits", "code": 402}}\n\n'
    server.otherwise = brings(event, content_type="text/event-stream")
    with raises("Add credit to the account"):
        ask(questions("a"), teacher(server, stream=True), store, run="r")


def test_pieces_of_a_stream():
    def chunk(**delta):
        return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\r\n\r\n"

    halves = chunk(content="\ud83d") + chunk(content="\ude00") + b"data: [DONE]\r\n\r\n"
    assert parse_reply(join_stream(halves)).text == "\U0001f600"
    assert parse_reply(join_stream(halves)).finish == "stop"
    other = b'data: {"choices": [{"index": 1, "delta": {"content": "x"}, "finish_reason": "stop"}]}\n\n'
    assert parse_reply(join_stream(other + chunk(content="y") + b"data: [DONE]\n\n")).text == "y"
    with pytest.raises(ValueError, match="before the reply was complete"):
        join_stream(chunk(content="half"))
    with pytest.raises(ValueError, match="not a chat completion"):
        parse_reply(join_stream(b"data: [DONE]\n\n"))


# Thinking and API keys


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


def test_completeness_is_decided_on_the_text_without_thinking(server, store):
    server.otherwise = with_usage("<think>a</think> ", "stop")
    (answer,) = ask(questions("a"), teacher(server), store, run="r")
    assert (answer.complete, answer.text.strip()) == (False, "")
    with sqlite3.connect(store.path) as conn:
        assert conn.execute("select count(*) from calls").fetchone() == (0,)


class Client:
    def __init__(self, key):
        self.api_key = key


@pytest.mark.parametrize(
    ("key", "said", "shown"),
    [
        ("no", "no such model", "no such model"),
        ("x", "Unexpected token", "Unexpected token"),
        ("test", "the latest test", "the latest test"),
        ("no", "Incorrect API key provided: no", "Incorrect API key provided: ***"),
        ("no", "Authorization: Bearer no.", "Authorization: Bearer ***."),
        ("sk-secret-123", "see sk-secret-123x", "see ***x"),
    ],
)
def test_only_what_can_be_a_secret_is_masked(key, said, shown):
    assert mask_key(said, Client(key)) == shown


def test_a_short_key_does_not_mask_the_servers_words(server, store, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "no")
    server.otherwise = status(404, "no such model")
    with raises("404: no such model"):
        ask(questions("a"), teacher(server), store, run="r")


@pytest.mark.parametrize(
    "fault", [status(400, "no: sk-secret-123"), brings({"said": "sk-secret-123"}), brings(b"sk-secret-123")]
)
def test_a_real_key_is_nowhere_in_answers_or_store(server, store, monkeypatch, fault):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    server.faults["1"] = [fault] * 6
    answers = ask(questions("0", "1"), teacher(server, concurrency=1), store, run="r")
    assert "***" in answers[1].why
    store.flush()
    assert b"sk-secret" not in b"".join(file.read_bytes() for file in store.path.parent.iterdir())


@pytest.mark.parametrize("key", ["schlüssel-123", "sk-a\x07bcdefgh"])
def test_a_key_that_a_header_cannot_carry_is_refused(server, store, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with raises("environment variable OPENAI_API_KEY: the key contains characters"):
        ask(questions("a"), teacher(server), store, run="r")


@pytest.mark.parametrize(
    ("url", "key", "warned"),
    [
        ("http://teacher.example/v1", "sk-secret-123", True),
        ("http://192.168.1.7:8000/v1", "sk-secret-123", True),
        ("http://192.168.1.7:8000/v1", "x", False),
        ("https://teacher.example/v1", "sk-secret-123", False),
        ("http://127.0.0.1:8000/v1", "sk-secret-123", False),
        ("http://[::1]:8000/v1", "sk-secret-123", False),
        ("http://localhost/v1", "sk-secret-123", False),
    ],
)
def test_an_unencrypted_key_is_warned_of(url, key, warned):
    assert ("sent unencrypted" in unencrypted_key_warning(Teacher(base_url=url, model="m"), key)) == warned


def test_the_warning_is_given_once(store, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    monkeypatch.setattr(http, "WARNED_ENDPOINTS", set())
    told = []
    for _ in range(2):
        with raises("no connection"):
            ask(
                questions("a"),
                Teacher(base_url="http://0.0.0.0:9/v1", model="m"),
                store,
                run="r",
                options=AskOptions(warn=told.append),
            )
    assert [text.partition(" is sent")[0] for text in told] == ["the key in the environment variable OPENAI_API_KEY"]


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
            answers = ask(questions(*WORDS, draw=1), teacher(server, send_seed=True), store, run="r")
            assert sum(answer.complete for answer in answers) >= 7, name
