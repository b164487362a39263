"""A small Batch API on loopback beside the live API: files, batches, paged lists, faults, and runs that ask it."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from command_line import ROOT
from server import completion, questions

from tapir_local.recipe.endpoints import Teacher
from tapir_local.records import Answer
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.pending_batches import BatchLimits
from tapir_local.teacher.session import AskOptions

Line = dict[str, Any]
FAST = BatchLimits(first_wait=0.02, longest_wait=0.05, settle=0.3)


def replied(status: int, body: Any) -> Line:
    return {"response": {"status_code": status, "request_id": "q", "body": body}, "error": None}


def refused(status: int, message: str = "no", code: str = "") -> Line:
    return replied(status, {"error": {"message": message, "code": code}})


def never(code: str) -> Line:
    return {"response": None, "error": {"code": code, "message": "This request could not be executed."}}


@dataclass
class BatchApi:
    """The server's files and batches, what it billed, and its faults.

    `ends` are the statuses with which the next batches end ("completed" when there are no more); an expired or
    cancelled one has answered the first half of its requests. `faults` are result lines by user text, `statuses` codes
    by the beginning of a request, one after another. `held` batches stay in progress. `room` is how many requests may
    be in batches that have not ended. Live requests wait for `gate`.
    """

    ends: list[str] = field(default_factory=list)
    faults: dict[str, list[Line]] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    held: bool = False
    room: int = 10**9
    page: int = 3
    looks: int = 1
    on_create: Callable[[BaseHTTPRequestHandler], None] | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    paid: list[str] = field(default_factory=list)
    live: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    gate: threading.Event | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    at_gate: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def put(self, text: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = text
        return name

    def submit(self, file: str, metadata: Any = None) -> dict[str, Any]:
        """Create a batch of an uploaded file."""
        lines = [json.loads(line) for line in self.files[file].splitlines()]
        number = len(self.batches)
        counts = {"total": 0, "completed": 0, "failed": 0}
        fields = {"object": "batch", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        times = {"created_at": int(time.time()) + number, "request_counts": counts}
        made = {"id": f"batch_{number}", "status": "validating", "input_file_id": file, "metadata": metadata, **times}
        end = self.ends.pop(0) if self.ends else "completed"
        self.batches[made["id"]] = {**made, **fields, "lines": lines, "end": end, "looks": self.looks}
        return self.batches[made["id"]]

    def move(self, batch: dict[str, Any]) -> None:
        """Each status request advances a batch: validating, in progress, ended."""
        counts, lines = batch["request_counts"], batch["lines"]
        if batch["status"] == "validating":
            waiting = sum(other["request_counts"]["total"] for other in self.batches.values() if not ended(other))
            batch["status"], counts["total"] = "in_progress", len(lines)
            if waiting + len(lines) > self.room:
                self.fail(batch, "token_limit_exceeded", "Enqueued token limit reached for m in organization o.")
            elif batch["end"] == "failed":
                self.fail(batch, "invalid_request", "The model 'm' is not for batches.", 1)
        elif not ended(batch) and not self.held:
            batch["looks"] -= 1
            if batch["looks"] < 0:
                self.end(batch)

    def fail(self, batch: dict[str, Any], code: str, message: str, line: int | None = None) -> None:
        error = {"code": code, "message": message, "line": line, "param": None}
        batch |= {"status": "failed", "errors": {"object": "list", "data": [error]}}
        batch["request_counts"]["total"] = 0

    def end(self, batch: dict[str, Any]) -> None:
        lines = batch["lines"]
        done = len(lines) if batch["end"] == "completed" else len(lines) // 2
        out = [(line, self.line(line)) for line in lines[:done]]
        out += [(line, never(f"batch_{batch['end']}")) for line in lines[done:]]
        good, bad = [], []
        for line, said in reversed(out):  # the order is not the input's
            text = json.dumps({"id": "r", "custom_id": line["custom_id"], **said}).encode()
            (good if (said["response"] or {}).get("status_code") == 200 else bad).append(text)
        batch |= {"status": batch["end"], "completed_at": batch["created_at"] + 60}
        batch |= {"output_file_id": self.put(b"\n".join(good) + b"\n") if good else None}
        batch |= {"error_file_id": self.put(b"\n".join(bad) + b"\n") if bad else None}
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}

    def line(self, line: dict[str, Any]) -> Line:
        words = line["body"]["messages"][-1]["content"]
        said = self.faults[words].pop(0) if self.faults.get(words) else replied(200, completion(f"re: {words}"))
        if (said["response"] or {}).get("status_code") == 200:
            self.paid.append(words)
        return said

    def listed(self, after: str | None) -> dict[str, Any]:
        newest = [shown(batch) for batch in reversed(self.batches.values())]
        start = next((place + 1 for place, batch in enumerate(newest) if batch["id"] == after), 0)
        page = newest[start : start + self.page]
        return {"object": "list", "data": page, "has_more": start + self.page < len(newest)}

    def answer(self, handler: BaseHTTPRequestHandler, raw: bytes) -> None:
        """Handle one request of a client."""
        parts = urlsplit(handler.path)
        name = f"{handler.command} {parts.path.removeprefix('/v1')}"
        if self.gate and name == "POST /chat/completions":
            self.at_gate.set()
            self.gate.wait(10)
        with self.lock:
            self.calls.append(name)
            self.keys.append(handler.headers["authorization"])
            status = next((codes.pop(0) for path, codes in self.statuses.items() if codes and name.startswith(path)), 0)
            if status:
                said = f"the key {self.keys[-1]} will not do" if status == 401 else "not here"
                send(handler, status, {"error": {"message": said}})
            else:
                self.route(handler, name, raw, parse_qs(parts.query))

    def route(self, handler: BaseHTTPRequestHandler, name: str, raw: bytes, query: dict[str, list[str]]) -> None:
        if name == "POST /chat/completions":
            words = json.loads(raw)["messages"][-1]["content"]
            self.live.append(words)
            send(handler, 200, completion(f"re: {words}"))
        elif name == "POST /files":
            file = self.put(uploaded(handler.headers["content-type"], raw))
            send(handler, 200, {"id": file, "object": "file", "purpose": "batch", "filename": "x.jsonl", "bytes": 1})
        elif name == "POST /batches":
            asked = json.loads(raw)
            made = self.submit(asked["input_file_id"], asked.get("metadata"))
            if self.on_create:
                self.on_create(handler)
            send(handler, 200, shown(made))
        elif name == "GET /batches":
            send(handler, 200, self.listed((query.get("after") or [None])[0]))
        else:
            self.fetched(handler, *name.split("/")[1:])

    def fetched(self, handler: BaseHTTPRequestHandler, kind: str, name: str, *rest: str) -> None:
        if kind == "files" and name in self.files:
            send(handler, 200, self.files[name], "application/octet-stream")
        elif kind == "batches" and name in self.batches:
            self.move(self.batches[name])
            send(handler, 200, shown(self.batches[name]))
        else:
            send(handler, 404, {"error": {"message": f"No {kind} {name}"}})


def ended(batch: dict[str, Any]) -> bool:
    return batch["status"] in ("completed", "failed", "expired", "cancelled")


def shown(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("lines", "end", "looks")}


def uploaded(kind: str, raw: bytes) -> bytes:
    """The file in a form; its purpose is checked too."""
    form = message_from_bytes(b"content-type: " + kind.encode() + b"\r\n\r\n" + raw)
    parts = {
        part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in form.walk()
    }
    assert parts["purpose"] == b"batch"
    return bytes(parts["file"])


def send(handler: BaseHTTPRequestHandler, status: int, body: Any, kind: str = "application/json") -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("content-type", kind)
    handler.send_header("content-length", str(len(raw)))
    handler.end_headers()
    handler.wfile.write(raw)


@contextmanager
def serving() -> Iterator[BatchApi]:
    """Run the server inside the block."""
    known = BatchApi()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            known.answer(self, self.rfile.read(int(self.headers["content-length"])))

        def do_GET(self) -> None:
            known.answer(self, b"")

        def log_message(self, format: str, *args: Any) -> None: ...

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None: ...

    http = Quiet(("127.0.0.1", 0), Handler)
    known.port = http.server_port
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield known
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def teacher(server: BatchApi, **settings: Any) -> Teacher:
    return Teacher(**{"base_url": server.url, "model": "m", "timeout": 20, "batch": True, **settings})


def by_batch(
    words: list[str], endpoint: Teacher, store: Store, limits: BatchLimits = FAST, **more: Any
) -> list[Answer]:
    return ask(questions(*words), endpoint, store, run="r", options=AskOptions(batch_limits=limits, **more))


def table(store: Store, sql: str) -> list[Any]:
    store.flush()
    with sqlite3.connect(store.path) as conn:
        return conn.execute(sql).fetchall()


def words(count: int) -> list[str]:
    return [str(number) for number in range(count)]


ASKING = """
import sys, signal
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from batches import FAST
from server import questions
from tapir_local.recipe.endpoints import Teacher
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask
from tapir_local.teacher.session import AskOptions
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
with Store(Path(sys.argv[1])) as store:
    told = lambda done, total, text: print(text, flush=True)
    endpoint = Teacher(base_url=sys.argv[2], model="m", batch=True)
    try:
        options = AskOptions(batch_limits=FAST, tell=told)
        answers = ask(questions(*sys.argv[4:]), endpoint, store, run="other", options=options)
    except KeyboardInterrupt as stopped:
        print(getattr(stopped, "__notes__", []), flush=True)
        sys.exit(130)
    print([answer.text for answer in answers], flush=True)
"""


def started(server: BatchApi, path: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ASKING, str(path), server.url, str(Path(__file__).parent), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def read_until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout
    line = " "
    while line and word not in line:
        line = process.stdout.readline()
    return line


def leave_away(server: BatchApi, path: Path, *words: str) -> None:
    """A run that submits a batch of these words and is killed while it is pending."""
    server.held = True
    with started(server, path, *words) as asking:
        read_until(asking, "in_progress")
        asking.kill()
    server.held = False
