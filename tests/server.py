"""A server on loopback that speaks the chat API and fails in every way we know of, and requests to ask it."""

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
from tapir_local.recipe import Teacher
from tapir_local.records import Message, Request
from tapir_local.store import Store

Fault = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


@dataclass
class Server:
    """What it was asked, and what it will do wrong: `faults` by the user's words, one after another.

    Without a fault it does `otherwise`, or says the user's words again.
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


def attempts(store: Store) -> list[tuple[str, str]]:
    with sqlite3.connect(store.path) as conn:
        return conn.execute("select row, why from attempts order by id").fetchall()


@contextmanager
def raises(words: str) -> Iterator[pytest.ExceptionInfo[TapirError]]:
    with pytest.raises(TapirError) as caught:
        yield caught
    assert words in str(caught.value), str(caught.value)
