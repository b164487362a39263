"""A teacher on loopback that keeps its own bill, answers as the fakes do, and spoils replies in every known way.

A request is billed when it has arrived, whether or not its reply does. The same body gets the same answer each time,
so that runs can be compared byte by byte.
"""

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fakes import reply
from server import ODD, Fault, brings, completion, dropped, garbled, malformed, send, status

from tapir_local.records import Message, Request

LATE_SECONDS = 1.0  # an answer that was sent less than this before a kill may not have reached a busy disk
SETTLE_SECONDS = 0.1  # for requests that a killed process has sent and the server has not read


def answer_of(body: Mapping[str, Any]) -> str:
    """The fakes' answer to the body of a request; `seed` is the draw."""
    turns = tuple(Message(turn["role"], turn["content"]) for turn in body["messages"])
    return reply(Request(turns, "", "", draw=body.get("seed", 0)))


def key_of(body: Mapping[str, Any]) -> str:
    """Names a body: equal bodies have the same key."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def drip(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """The whole answer, a few bytes at a time."""
    raw = json.dumps(completion(answer_of(body))).encode()
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", str(len(raw)))
    handler.end_headers()
    for start in range(0, len(raw), 60):
        handler.wfile.write(raw[start : start + 60])
        handler.wfile.flush()
        time.sleep(0.005)


def in_chunks(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """The whole answer in chunks of odd lengths, without a content-length."""
    raw = json.dumps(completion(answer_of(body))).encode()
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("transfer-encoding", "chunked")
    handler.end_headers()
    for start in range(0, len(raw), 37):
        part = raw[start : start + 37]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
    handler.wfile.write(b"0\r\n\r\n")


def of_another_model(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """The answer, with the name of a model that was not asked."""
    send(handler, 200, completion(answer_of(body), model="another-model"))


def cut_answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """The first half of the answer's body, then a closed connection."""
    raw = json.dumps(completion(answer_of(body))).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(raw)
    garbled(head, raw[: len(raw) // 2])(handler, body)


def huge(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """A body of 40 MB: more than a reply may have."""
    part = b" " * (1 << 20)
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", str(40 * len(part)))
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(part)


# Odd ways to send a good answer: it must be kept.
GOOD: dict[str, Fault] = {"drip": drip, "in chunks": in_chunks, "another model": of_another_model}
# Replies without an answer after which the same request is sent again.
SPOILS: dict[str, Fault] = {
    "dropped": dropped,
    "cut in the body": cut_answer,
    "wrong JSON": malformed,
    "empty body": brings(b""),
    "500": status(500, "failed"),
    "502": status(502, "bad gateway"),
    "503": status(503, "busy", retry_after="0.01"),
    "429": status(429, "slow down", retry_after="0.01"),
    "408": status(408, "too slow"),
    "web page": brings(b"<html>busy</html>", content_type="text/html"),
    "bad chunk": ODD["bad chunk"],
    "bad length": ODD["bad length"],
    "status line": ODD["status line"],
    "bad gzip": ODD["bad gzip"],
    "empty choices": ODD["empty choices"],
    "empty answer": brings(completion("")),
}
UNBILLED = ("429", "503")


@dataclass
class Entry:
    """One request on the bill. `ended` is when its reply was sent, `whole` whether it was a good one."""

    key: str
    came: float
    ended: float = 0.0
    whole: bool = True


@dataclass
class BilledTeacher:
    """`spoiled` is the share of requests that get a spoiled reply, each body at most once; `odd` that of odd good ones.

    `on_request` is called with the number of each request, before it is answered.
    """

    chance: random.Random = field(default_factory=lambda: random.Random(1))
    seconds: tuple[float, float] = (0.002, 0.02)  # that an answer takes
    spoiled: float = 0.0
    odd: float = 0.0
    entries: list[Entry] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    on_request: Callable[[int], None] = lambda number: None
    otherwise: Fault | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def reset(self, seed: int, *, spoiled: float = 0.0, odd: float = 0.0) -> None:
        """Begin a new bill."""
        with self.lock:
            self.chance, self.spoiled, self.odd = random.Random(seed), spoiled, odd
            self.entries, self.headers, self.counts = [], [], Counter()
            self.on_request, self.otherwise = (lambda number: None), None

    def in_flight(self, moment: float) -> set[str]:
        """The bodies whose answer was not sent at a moment (time.monotonic()), or only just before it."""
        time.sleep(SETTLE_SECONDS)
        with self.lock:
            return {one.key for one in self.entries if not one.ended or one.ended > moment - LATE_SECONDS}

    def paid(self) -> Counter[str]:
        """How often a whole answer to each body was paid for."""
        with self.lock:
            return Counter(one.key for one in self.entries if one.whole)

    def choose(self, key: str) -> tuple[str, Fault | None]:
        """What to do with a request."""
        draw = self.chance.random()
        fresh = not any(one.key == key for one in self.entries)
        table = SPOILS if draw < self.spoiled and fresh else GOOD if draw > 1 - self.odd else {}
        if not table:
            return "answer", self.otherwise
        name = self.chance.choice(sorted(table))
        return name, table[name]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Bill a request, take the time of an answer, and send it or what stands for it."""
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        entry = Entry(key_of(body), time.monotonic())
        with self.lock:
            name, fault = self.choose(entry.key)
            entry.whole = name not in SPOILS
            wait = self.chance.uniform(*self.seconds)
            self.entries.append(entry)
            self.headers.append(dict(handler.headers))
            self.counts[name] += 1
            number = len(self.entries)
        self.on_request(number)
        time.sleep(wait)
        try:
            fault(handler, body) if fault else send(handler, 200, completion(answer_of(body)))
        finally:
            entry.ended = time.monotonic()


@contextmanager
def serving(teacher: BilledTeacher) -> Iterator[BilledTeacher]:
    """The teacher on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            teacher.answer(self)

        def log_message(self, format: str, *args: Any) -> None: ...

    class Quiet(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None: ...

    http = Quiet(("127.0.0.1", 0), Handler)
    teacher.port = http.server_port
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield teacher
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
