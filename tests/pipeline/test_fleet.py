"""A run whose teacher is a fleet: servers behind one address, some of which die; and two runs on one store at once.

The servers are processes of their own, so that a killed one breaks its connections as a crashed machine does.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from calls import table
from fakes import QUIET, World, fake_backends, make_recipe, outputs, reply
from server import Server, completion, running, send

from tapir_local.errors import TapirError
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.endpoints import Teacher
from tapir_local.records import Answer, Message, Progress, Request
from tapir_local.run_dir import RunDir
from tapir_local.store.store import Store
from tapir_local.teacher import http
from tapir_local.teacher.ask import ask

SECONDS = 0.02  # that a server takes for an answer
KILL_AFTER = 100  # answers: in the middle of a stage
BAD_GATEWAY = b"<html><head><title>502 Bad Gateway</title></head></html>"


def serve() -> None:
    """Answer like the teacher of fakes.py until standard input ends; the port is printed. Runs in a child."""

    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        messages = tuple(Message(**turn) for turn in body["messages"])
        send(handler, 200, completion(reply(Request(messages, "row", "stage", draw=body["seed"]))))

    with running() as server:
        server.otherwise, server.seconds = answer, SECONDS
        print(server.port, flush=True)
        sys.stdin.read()


def run_fake(folder: Path, name: str, url: str) -> RunDir:
    """Distill with fakes, but ask the teacher and judge at `url` through the store of `folder`."""
    teacher = Teacher(base_url=url, model="fake", alias="fleet", send_seed=True, concurrency=8)
    with Store(folder / "teacher.db") as store:

        def asked(requests: list[Request], progress: Progress) -> list[Answer]:
            return ask(requests, teacher, store, run=name)

        backends = replace(fake_backends(World()), teacher=asked, judge=asked)
        recipe = make_recipe(folder).model_copy(update={"name": name, "rounds": 1})
        distill(recipe, RunDir(folder, name), backends, QUIET)
    return RunDir(folder, name)


def start(call: str) -> "subprocess.Popen[str]":
    """Run a call of a function of this file in a child."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", f"import test_fleet; test_fleet.{call}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@contextmanager
def started() -> Iterator["subprocess.Popen[str]"]:
    """A server in a child."""
    child = start("serve()")
    yield child
    child.kill()
    child.communicate()


def port_of(child: "subprocess.Popen[str]") -> int:
    assert child.stdout
    return int(child.stdout.readline())


def passed_on(body: dict[str, Any], port: int | None) -> bytes:
    """The reply of the server at this port; OSError or HTTPException if it is dead or there is none."""
    if port is None:
        raise OSError("no live servers")
    connection = HTTPConnection("127.0.0.1", port)
    with closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        return connection.getresponse().read()


class Balancer:
    """A load balancer that acts as nginx does by default.

    It sends requests in turns, gives a server that failed nothing more, and answers 502 if a request was lost with its
    server. `doomed` (port: process) are killed while they work on a request, after KILL_AFTER answers.
    """

    def __init__(self, ports: list[int], doomed: "dict[int, subprocess.Popen[str]] | None" = None) -> None:
        self.ports, self.doomed, self.turns = list(ports), dict(doomed or {}), count()
        self.answered: list[str] = []
        self.guard = threading.Lock()

    def __call__(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self.guard:
            port = self.ports[next(self.turns) % len(self.ports)] if self.ports else None
            if len(self.answered) >= KILL_AFTER and port in self.doomed:
                threading.Timer(SECONDS / 2, self.doomed.pop(port).send_signal, [signal.SIGKILL]).start()
        try:
            raw = passed_on(body, port)
        except (OSError, HTTPException):
            with self.guard:
                self.ports = [other for other in self.ports if other != port]
            send(handler, 502, BAD_GATEWAY, {"content-type": "text/html"})
            return
        with self.guard:
            self.answered.append(json.dumps(body, sort_keys=True))
        send(handler, 200, raw)


@pytest.fixture
def two() -> "Iterator[dict[int, subprocess.Popen[str]]]":
    """Two servers, by port."""
    with ExitStack() as stack:
        children = [stack.enter_context(started()) for _ in range(2)]
        yield {port_of(child): child for child in children}


def failures(folder: Path) -> set[str]:
    return {why for (why,) in table(folder / "teacher.db", "select why from attempts")}


def results(run: RunDir) -> dict[str, bytes]:
    """The outputs, without those that name the run or hold the calls' keys, which depend on who was asked."""
    named = {"tapir.lock", "recipe.yaml", "README.md", "SHA256SUMS"}
    return {name: raw for name, raw in outputs(run).items() if Path(name).name not in named}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of a run whose teacher never fails."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = make_recipe(folder).model_copy(update={"rounds": 1})
    distill(recipe, RunDir(folder, "fake"), fake_backends(World()), QUIET)
    return results(RunDir(folder, "fake"))


def test_a_run_goes_on_when_one_of_two_servers_dies_and_no_answered_request_is_sent_again(
    server: Server, two: "dict[int, subprocess.Popen[str]]", alone: dict[str, bytes], tmp_path: Path
) -> None:
    dying = next(iter(two))
    server.otherwise = balancer = Balancer(list(two), {dying: two[dying]})
    run = run_fake(tmp_path, "fake", server.url)
    assert two[dying].wait() == -signal.SIGKILL
    assert balancer.ports == [port for port in two if port != dying]
    assert failures(tmp_path) == {"502: a web page: 502 Bad Gateway"}
    sent = len(balancer.answered)
    assert len(set(balancer.answered)) == sent > 2 * KILL_AFTER
    assert table(tmp_path / "teacher.db", "select count(*) from calls") == [(sent,)]
    again = run_fake(tmp_path, "again", server.url)
    assert len(balancer.answered) == sent
    assert results(run) == results(again) == alone


def test_a_run_stops_when_all_servers_are_down_and_goes_on_when_one_is_back(
    server: Server,
    two: "dict[int, subprocess.Popen[str]]",
    alone: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "backoff_seconds", lambda tries, chance: 0.01)
    server.otherwise = balancer = Balancer(list(two), two)
    with pytest.raises(TapirError, match=r"502 Bad Gateway \(tried 6 times\)") as caught:
        run_fake(tmp_path, "fake", server.url)
    assert "nothing paid for is lost" in str(caught.value)
    with started() as child:
        balancer.ports = [port_of(child)]
        run = run_fake(tmp_path, "fake", server.url)
    assert len(set(balancer.answered)) == len(balancer.answered)
    assert table(tmp_path / "teacher.db", "select count(*) from calls") == [(len(balancer.answered),)]
    assert results(run) == alone


def test_two_runs_at_once_on_one_store_pay_for_each_request_once(
    server: Server, two: "dict[int, subprocess.Popen[str]]", alone: dict[str, bytes], tmp_path: Path
) -> None:
    server.otherwise = balancer = Balancer(list(two))
    place = f"test_fleet.Path({str(tmp_path)!r})"
    make_recipe(tmp_path)
    runs = [start(f"run_fake({place}, {name!r}, {server.url!r})") for name in ("one", "two")]
    assert [run.wait() for run in runs] == [0, 0]
    for run in runs:
        run.communicate()
    assert len(set(balancer.answered)) == len(balancer.answered)
    assert results(RunDir(tmp_path, "one")) == results(RunDir(tmp_path, "two")) == alone
    paid = dict(table(tmp_path / "teacher.db", "select run, sum(paid) from uses group by run"))
    assert sum(paid.values()) == len(balancer.answered)
