"""A server on loopback that speaks the chat API and fails in every known way, and requests to send it."""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Teacher
from tapir_local.records import Answer, Message, Request
from tapir_local.store.store import Store

Fault = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]
WORDS = [str(number) for number in range(8)]


@dataclass
class Server:
    """Records what it was asked. `faults` holds, per user text, what it will do wrong, one fault after another.

    Without a fault it does `otherwise`, or repeats the user's text.
    """

    otherwise: Fault | None = None
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    flying: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        words = body["messages"][-1]["content"]
        with self.lock:
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            self.flying += 1
            self.most = max(self.most, self.flying)
            fault = self.faults[words].pop(0) if self.faults.get(words) else self.otherwise
        if handler.headers["content-type"] != "application/json":
            fault = status(415, f"a body of type {handler.headers['content-type']}")  # as vLLM does
        time.sleep(self.seconds)
        try:
            fault(handler, body) if fault else send(handler, 200, completion(f"re: {words}"), self.extra)
        finally:
            with self.lock:
                self.flying -= 1


def completion(text: Any, finish: str = "stop", model: str = "m-1", **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return {"id": "x", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage}


def send(handler: BaseHTTPRequestHandler, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"content-type": "application/json", **(headers or {})}.items():
        handler.send_header(name, value)
    handler.send_header("content-length", str(len(raw)))
    handler.end_headers()
    handler.wfile.write(raw)


def status(code: int, message: str = "no", kind: str = "", **headers: str) -> Fault:
    error = {"error": {"message": message, "code": kind}}
    return lambda handler, _: send(
        handler, code, error, {name.replace("_", "-"): value for name, value in headers.items()}
    )


def says(text: str | None, finish: str = "stop", **message: Any) -> Fault:
    return lambda handler, _: send(handler, 200, completion(text, finish, **message))


def garbled(*raw: bytes) -> Fault:
    """Send bytes instead of a reply."""

    def act(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        handler.close_connection = True
        handler.wfile.write(b"".join(raw))

    return act


def brings(raw: bytes | dict[str, Any] | list[Any], status: int = 200, **headers: str) -> Fault:
    """Reply with this body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: send(handler, status, raw, named)


def with_usage(text: Any, finish: Any = "stop", tokens: int = 3, **message: Any) -> Fault:
    """Reply with a completion of this many tokens."""
    body = completion(text, finish, **message)
    return brings({**body, "usage": {"prompt_tokens": 7, "completion_tokens": tokens}})


def streams(*pieces: str, finish: str | None = "stop", ends: bool = True, **delta: Any) -> Fault:
    """Stream events if a stream is requested, otherwise refuse."""

    def act(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if not body.get("stream"):
            error = {"message": "This model only support stream mode, please enable the stream parameter"}
            return send(handler, 400, {"error": error})
        deltas = [{"role": "assistant"}, *({"content": piece} for piece in pieces), *([delta] if delta else [])]
        chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": item}]} for item in deltas]
        chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}] if finish else []
        if (body.get("stream_options") or {}).get("include_usage"):
            chunks.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
        head = {"id": "x", "object": "chat.completion.chunk", "model": "m-1"}
        lines = [f"data: {json.dumps({**head, **chunk})}\n\n" for chunk in chunks]
        raw = ": hello\n\n" + "".join(lines) + ("data: [DONE]\n\n" if ends else "")
        return send(handler, 200, raw.encode(), {"content-type": "text/event-stream"})

    return act


def loading(replies: int) -> Fault:
    """Reply 503 to the first requests, as llama-server does while it loads its model; then answer."""
    left = [replies]

    def act(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        left[0] -= 1
        if left[0] >= 0:
            error = {"code": 503, "message": "Loading model", "type": "unavailable_error"}
            return send(handler, 503, {"error": error})
        return send(handler, 200, completion("loaded"))

    return act


def new_names(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """A model that accepts only max_completion_tokens, and only temperature 1."""
    if "max_tokens" in body:
        words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'"
        status(400, f"{words} instead.", "unsupported_parameter")(handler, body)
    elif body.get("temperature", 1) != 1:
        words = "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is"
        status(400, f"{words} supported.", "unsupported_value")(handler, body)
    else:
        send(handler, 200, completion("A plain answer."))


THOUGHT = "The answer is plain."
# Behaviors of real servers, by name: what each does to every request, or to one odd row among others.
ODD: dict[str, Fault] = {
    "no finish": with_usage("A plain answer.", None),
    "no finish, all tokens": with_usage("A plain ans", None, tokens=1024),
    "unknown finish": with_usage("A plain answer.", "moon"),
    "thought only": with_usage(None, reasoning_content=THOUGHT),
    "thought used all": with_usage("", "length", 1024, reasoning_content="Hm, hm."),
    "unclosed thought": with_usage("<think>Hm, hm.", "stop"),
    "thinks inline": with_usage("<think>They ask for a use.</think>A plain answer."),
    "no usage": brings({**completion("A plain answer."), "usage": None}),
    "empty choices": brings({"id": "x", "choices": [], "usage": None}),
    "null choices": brings({"id": "x", "choices": None}),
    "content object": with_usage({"text": "A plain answer."}),
    "empty body": brings(b""),
    "list": brings([1, 2]),
    "error in 200": brings({"error": {"message": "Insufficient credits", "code": 402}}),
    "web page": brings(b"<!doctype html><title>Sign in</title>", content_type="text/html"),
    "inspected": status(400, "Input data may contain inappropriate content.", "data_inspection_failed"),
    "too long": status(400, "This model's maximum context length is 64 tokens.", "context_length_exceeded"),
    "no money": brings({"error": {"message": "Insufficient Balance", "code": "invalid_request_error"}}, 402),
    "new names": new_names,
    "stream only": streams("A plain", " answer."),
    "half a pair": brings(b'{"choices": [{"message": {"content": "A \\ud83d smile"}, "finish_reason": "stop"}]}'),
    "not a number": brings(
        b'{"choices": [{"message": {"content": "A plain answer."}, "finish_reason": "stop", "logprobs": NaN}]}'
    ),
    "latin-1": brings(b'{"choices": [{"message": {"content": "A caf\xe9"}, "finish_reason": "stop"}]}'),
    "mark at the beginning": brings(
        b'\xef\xbb\xbf{"choices": [{"message": {"content": "A plain answer."}, "finish_reason": "stop"}]}'
    ),
    "status line": garbled(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "long header": garbled(b"HTTP/1.1 200 OK\r\nx-long: " + b"a" * 20000 + b"\r\ncontent-length: 2\r\n\r\n{}"),
    "bad chunk": garbled(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
    "bad length": garbled(b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n{}"),
    "cut body": garbled(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{}"),
    "bad gzip": brings(b"this is not gzip", content_encoding="gzip"),
}


def malformed(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    send(handler, 200, b'{"choices": [{"mess')


def dropped(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    handler.close_connection = True
    handler.connection.close()


def slow(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    time.sleep(1.0)
    dropped(handler, _)


@contextmanager
def running() -> Iterator[Server]:
    """The server on a free port of this machine."""
    known = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            known.answer(self)

        def log_message(self, format: str, *args: Any) -> None: ...

    class Quiet(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None: ...

    http = Quiet(("127.0.0.1", 0), Handler)
    known.port = http.server_port
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield known
    http.shutdown()
    thread.join()
    http.server_close()


def teacher(server: Server, **settings: Any) -> Teacher:
    return Teacher(**{"base_url": server.url, "model": "m", "concurrency": 8, "timeout": 20, **settings})


def questions(*words: str, **fields: Any) -> list[Request]:
    return [
        Request((Message("system", "Be brief."), Message("user", word)), f"row-{word}", "answers", **fields)
        for word in words
    ]


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def attempts(store: Store) -> list[tuple[str, str]]:
    with sqlite3.connect(store.path) as conn:
        return conn.execute("select row, why from attempts order by id").fetchall()


@contextmanager
def raises(words: str) -> Iterator[pytest.ExceptionInfo[TapirError]]:
    with pytest.raises(TapirError) as caught:
        yield caught
    assert words in str(caught.value), str(caught.value)
