"""Replies that come as a stream: stored like whole ones, and tried again if cut."""

import json

import orjson
import pytest
from server import WORDS, attempts, brings, questions, raises, status, streams, teacher

from tapir_local.store.reply import parse_reply
from tapir_local.teacher.ask import ask
from tapir_local.teacher.responses import join_stream

pytestmark = pytest.mark.usefixtures("no_pauses")


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
