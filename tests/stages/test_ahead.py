"""A remote judge is asked while the student answers: same files, same calls, same end as asking it in turn."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from fakes import QUIET, World, fake_backends, generate, make_recipe, outputs, reply
from server import Fault, Server, completion, says, send, status

from tapir_local.errors import TapirError
from tapir_local.files import read_rows, write_text
from tapir_local.interrupts import stop_on_signals
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.checks import find_faults, find_notices
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import diff_recipes, override, parse_recipe
from tapir_local.records import Completion, Example, Message, Request, noop
from tapir_local.report.costs import summarize_costs
from tapir_local.run_dir import RunDir
from tapir_local.stages.ahead import asks_ahead
from tapir_local.stages.backends import real_backends
from tapir_local.stages.context import Backends, Work
from tapir_local.stages.judge import write_judgements
from tapir_local.stages.rounds import generate_answers

HALF_MINUTE = 30.0  # seconds after which a request that never comes fails its test
CALLS = 130  # of the judge in a run of one round; both orders of two equal answers are one call

UNLIKE = {"recipe.yaml", "model/recipe.yaml", "model/SHA256SUMS"}  # of runs that differ in how the judge is asked

Generate = Callable[..., list[Completion]]


def scores(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Judge as the fakes' teacher does."""
    turns = tuple(Message(**turn) for turn in body["messages"])
    send(handler, 200, completion(reply(Request(turns, "", ""))))


@pytest.fixture
def judged(recipe: Recipe, server: Server, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe of one round whose judge is the server."""
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    server.otherwise = scores
    return remote(recipe, server.url)


def remote(recipe: Recipe, url: str) -> Recipe:
    """The recipe with one round and a judge behind an endpoint."""
    asked = {"judge.model": "m", "judge.base_url": url, "judge.alias": "judge", "judge.concurrency": 4}
    return override(recipe, {"rounds": 1, **asked})


@contextlib.contextmanager
def backends(recipe: Recipe, run: RunDir, world: World, made: Generate) -> Iterator[Backends]:
    """The fakes, with the real judge."""
    with real_backends(recipe, run, print) as real:
        yield replace(fake_backends(world), generate=made, judge=real.judge, judge_ahead=real.judge_ahead)


def answer(*, gguf: Path, on_result: Callable[[Completion], None], **rest: Any) -> list[Completion]:
    """The fakes' answers; those to every second row differ from round to round, and from the teacher's."""
    found = [
        replace(row, text=f"{row.text}, {gguf.parent.name}") if int(row.id[-1]) % 2 else row
        for row in generate(gguf=gguf, on_result=noop, **rest)
    ]
    for row in found:
        on_result(row)
    return found


def ran(recipe: Recipe, run: RunDir, world: World | None = None, made: Generate = answer) -> dict[str, bytes]:
    """The files of a run."""
    with backends(recipe, run, world or World(), made) as parts:
        distill(recipe, run, parts, QUIET)
    return {name: raw for name, raw in outputs(run).items() if name not in UNLIKE}


ROWS = [
    Example(f"row-{n:02}", (Message("user", f"{'sum' if n % 3 else 'paint'} {n}"),), "right", "Math") for n in range(24)
]
ROW_CALLS = 40  # of the judge for these rows: every second answer equals the teacher's


def judged_rows(recipe: Recipe, run: RunDir, made: Generate = answer) -> dict[str, bytes]:
    """The files of two stages: the student answers the rows, and the judge compares the answers."""
    with backends(recipe, run, World(), made) as parts:
        answers, judgements = (run.round(1) / f"{name}.jsonl" for name in ("answers", "judgements"))
        if not (run.round(0) / "student.gguf").exists():
            write_text(run.round(0) / "student.gguf", json.dumps([f"sum {n}" for n in range(24)]))
        answers.parent.mkdir(parents=True, exist_ok=True)
        if not answers.exists():
            generate_answers(Work(recipe, run, parts, 1, "round-01/answer"), ROWS, run.round(0), answers, "judge")
        work = Work(recipe, run, parts, 1, "round-01/judge")
        write_judgements(work, "judge", ROWS, read_rows(Completion, answers), judgements)
    return outputs(run)


def ahead(recipe: Recipe, **changes: Any) -> Recipe:
    return override(recipe, {"judge.ahead": True, **changes})


def texts(server: Server) -> Counter[str]:
    """How often the server was asked each question."""
    return Counter(json.dumps(body, sort_keys=True) for body in server.bodies)


def waiting(server: Server, replies: int = 1) -> Generate:
    """A student that finishes only after the judge was asked about its first half."""

    def made(*, prompts, ids, on_result, **rest):  # type: ignore[no-untyped-def]
        half, before = len(ids) // 2, len(server.bodies)
        first = answer(prompts=prompts[:half], ids=ids[:half], on_result=on_result, **rest)
        wait_for(lambda: len(server.bodies) >= before + replies)
        return first + answer(prompts=prompts[half:], ids=ids[half:], on_result=on_result, **rest)

    return made


def wait_for(arrived: Callable[[], bool]) -> None:
    again = threading.Event()
    for _ in range(int(HALF_MINUTE / 0.01)):
        if arrived():
            return
        again.wait(0.01)
    raise AssertionError("the judge was not asked while the student answered")


def test_the_judge_is_asked_while_the_student_answers_and_the_files_are_the_same(
    judged: Recipe, server: Server, tmp_path: Path
) -> None:
    runs = [RunDir(tmp_path / name, "fake") for name in ("serial", "ahead")]
    serial, asked = ran(judged, runs[0]), texts(server)
    assert asked.total() == len(asked) == CALLS
    server.bodies.clear()
    assert ran(ahead(judged), runs[1], made=waiting(server)) == serial
    assert texts(server) == asked
    assert server.most <= 4
    stages, ahead_stages = (run.record()["stages"] for run in runs)
    for name, stage in stages.items():
        assert (ahead_stages[name]["paid"], ahead_stages[name]["hits"]) == (stage["paid"], stage["hits"]), name
    assert re.search(r"; [1-9]\d* replies of the judge meanwhile", ahead_stages["round-01/answer"]["note"])
    assert "judge meanwhile" not in stages["round-01/answer"]["note"]
    serial_costs, ahead_costs = (summarize_costs(run.cache / "teacher.db", "stage") for run in runs)
    assert ahead_costs == serial_costs


@pytest.mark.parametrize("mode", ["pair", "single"])
def test_a_stage_that_is_cut_again_and_again_pays_for_nothing_twice(
    judged: Recipe, server: Server, tmp_path: Path, mode: str
) -> None:
    either = override(judged, {"judge.mode": mode})
    whole, asked = judged_rows(either, RunDir(tmp_path / "serial", "fake")), texts(server)
    run, cuts, server.seconds = RunDir(tmp_path / "cut", "fake"), 0, 0.02

    def stopping(*, prompts, ids, **rest):  # type: ignore[no-untyped-def]
        """Interrupted after every five answers, while the judge is asked about one of them."""
        nonlocal cuts
        found = answer(prompts=prompts[:5], ids=ids[:5], **rest)
        if len(ids) > 5:
            cuts += 1
            wait_for(lambda: bool(server.bodies))
            raise KeyboardInterrupt
        return found

    server.bodies.clear()
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            judged_rows(ahead(either), run, stopping)
    assert judged_rows(ahead(either), run, stopping) == whole
    assert cuts == 4
    assert texts(server) == asked


def test_a_budget_stops_at_the_same_row_and_the_run_goes_on_with_a_larger_one(
    judged: Recipe, server: Server, tmp_path: Path
) -> None:
    whole, found = judged_rows(judged, RunDir(tmp_path / "whole", "fake")), list[tuple[str, list[Any]]]()
    limited = override(judged, {"judge.concurrency": 1, "budget.calls": 17})
    for name, recipe, made in (("serial", limited, answer), ("ahead", ahead(limited), waiting(server, 17))):
        server.bodies.clear()
        run = RunDir(tmp_path / name, "fake")
        with pytest.raises(TapirError, match="the budget is spent: calls 17 of 17") as stopped:
            judged_rows(recipe, run, made)
        assert not (run.round(1) / "judgements.jsonl").exists()
        found.append((str(stopped.value), server.bodies[:]))
        assert judged_rows(override(recipe, {"budget.calls": 100}), run) == whole
        assert len(server.bodies) == ROW_CALLS
    assert found[0] == found[1]


def test_an_endpoint_that_refuses_for_a_while_is_asked_again_by_the_judges_stage(
    judged: Recipe, server: Server, tmp_path: Path
) -> None:
    whole, asked = judged_rows(judged, RunDir(tmp_path / "serial", "fake")), texts(server)
    refusals = [status(401, "not yet")]

    def closed_at_first(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        (refusals.pop() if refusals else scores)(handler, body)

    server.bodies.clear()
    server.otherwise = closed_at_first
    one = ahead(judged, **{"judge.concurrency": 1})
    assert judged_rows(one, RunDir(tmp_path / "ahead", "fake"), waiting(server)) == whole
    assert texts(server).keys() == asked.keys()
    assert len(server.bodies) == ROW_CALLS + 1


def test_an_endpoint_that_cannot_be_used_is_reported_by_the_judges_stage(
    judged: Recipe, server: Server, run: RunDir
) -> None:
    server.otherwise = status(401, "a wrong key")
    with pytest.raises(TapirError, match="401: a wrong key"):
        judged_rows(ahead(judged), run, waiting(server))
    assert (run.round(1) / "answers.jsonl").exists()


def odd_rows(fault: Fault) -> Fault:
    """Do this about two of the rows, and judge the others."""

    def act(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        (fault if "sum 1\\n" in str(body) or "paint 3\\n" in str(body) else scores)(handler, body)

    return act


@pytest.mark.parametrize(
    "fault",
    [status(400, "it was flagged by the content filter"), says("", "stop"), says("no scores"), says("{", "length")],
    ids=["refused", "empty", "unreadable", "cut"],
)
def test_rows_without_a_usable_reply_are_asked_as_often_as_in_turn(
    judged: Recipe, server: Server, tmp_path: Path, fault: Fault
) -> None:
    server.otherwise = odd_rows(fault)
    twice = override(judged, {"judge.attempts": 2})
    serial, asked = judged_rows(twice, RunDir(tmp_path / "serial", "fake")), texts(server)
    assert b"unjudged" in serial["unusable.jsonl"]
    server.bodies.clear()
    assert judged_rows(ahead(twice), RunDir(tmp_path / "ahead", "fake"), waiting(server)) == serial
    assert texts(server) == asked


def test_useless_replies_stop_the_run_after_as_many_as_in_turn(judged: Recipe, server: Server, tmp_path: Path) -> None:
    server.otherwise, found = says("{", "length"), []
    one = override(judged, {"judge.concurrency": 1})
    for name, recipe, made in (("serial", one, answer), ("ahead", ahead(one), waiting(server, 18))):
        server.bodies.clear()
        with pytest.raises(TapirError, match="20 replies in a row cannot be used") as stopped:
            judged_rows(recipe, RunDir(tmp_path / name, "fake"), made)
        found.append((str(stopped.value), len(server.bodies)))
    assert found[0] == found[1]


def test_what_is_in_flight_at_ctrl_c_is_awaited_and_kept(judged: Recipe, server: Server, run: RunDir) -> None:
    held = threading.Event()

    def slow(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        held.wait(HALF_MINUTE)
        scores(handler, body)

    def cut(*, ids, prompts, **rest):  # type: ignore[no-untyped-def]
        answer(ids=ids[:8], prompts=prompts[:8], **rest)
        wait_for(lambda: server.flying == 4)
        threading.Timer(0.2, held.set).start()
        raise KeyboardInterrupt

    server.otherwise = slow
    with pytest.raises(KeyboardInterrupt) as stopped:
        judged_rows(ahead(judged), run, cut)
    assert not hasattr(stopped.value, "__notes__")
    assert len(server.bodies) == 4
    judged_rows(ahead(judged), run)
    assert texts(server).total() == len(texts(server)) == ROW_CALLS


def hang(folder: str, url: str) -> None:
    """In a process of its own: the student hangs after its first answers."""

    def hanging(*, ids, prompts, **rest):  # type: ignore[no-untyped-def]
        answer(ids=ids[:8], prompts=prompts[:8], **rest)
        threading.Event().wait(2 * HALF_MINUTE)

    stop_on_signals()
    recipe = ahead(remote(make_recipe(Path(folder)), url), **{"budget.calls": 100})  # so each is on disk when sent
    with contextlib.suppress(KeyboardInterrupt):
        judged_rows(recipe, RunDir(Path(folder), "fake"), hanging)


@pytest.mark.parametrize(
    ("signals", "why"),
    [
        ([signal.SIGTERM, signal.SIGINT], "interrupted while in flight"),
        ([signal.SIGKILL], "sent; this process ended before an answer came"),
    ],
    ids=["SIGTERM, then Ctrl-C", "SIGKILL"],
)
def test_requests_in_flight_are_recorded_if_the_process_is_ended(
    judged: Recipe, server: Server, run: RunDir, signals: list[signal.Signals], why: str
) -> None:
    server.seconds = HALF_MINUTE
    code = f"import test_ahead; test_ahead.hang({str(run.cache)!r}, {server.url!r})"
    places = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": places}) as process:
        wait_for(lambda: server.flying == 4)
        for number in signals:
            process.send_signal(number)
            threading.Event().wait(0.5)
        process.wait(HALF_MINUTE)
    server.seconds = 0.0
    with sqlite3.connect(run.cache / "teacher.db") as conn:
        assert conn.execute("select why, count(*) from attempts group by why").fetchall() == [(why, 4)]
    judged_rows(ahead(judged), run)
    assert (len(texts(server)), len(server.bodies)) == (ROW_CALLS, ROW_CALLS + 4)


# Where it is on


def of(text: str) -> Recipe:
    return parse_recipe(f"seeds: a.json\nstudent: a\n{text}", "r.yaml")


REMOTE = "teacher: {model: m, base_url: http://example.org/v1, api_key_env: KEY}\n"
LOCAL = "teacher: {model: m, base_url: http://127.0.0.1:8000/v1}\n"


@pytest.mark.parametrize(
    ("text", "on"),
    [
        ("teacher: {model: gpt}", True),
        (REMOTE, True),
        (LOCAL, False),
        (LOCAL + "judge: {model: m, base_url: http://192.168.1.2:8000/v1}", True),
        (REMOTE + "judge: {model: m, base_url: 'http://[::1]:8000/v1'}", False),
        (REMOTE + "judge: {model: m, base_url: 'http://localhost:8000/v1'}", False),
        (LOCAL + "judge: {ahead: true}", True),
        (REMOTE + "judge: {ahead: false}", False),
        (REMOTE + "judge: reference", False),
        (REMOTE + "judge: {gguf: a.gguf}", False),
        (REMOTE + "judge: {model: m, batch: true}", False),
        ("teacher: {gguf: a.gguf}", False),
        ("teacher: pocket", False),
    ],
)
def test_it_is_on_for_a_live_endpoint_on_another_machine(text: str, on: bool) -> None:
    assert asks_ahead(of(text)) is on
    assert not any(asks_ahead(of(text), mode) for mode in ("off", "refresh", "read-only", "replay"))


def test_it_may_change_during_a_run_and_is_refused_or_told_where_it_does_nothing() -> None:
    assert diff_recipes(of(REMOTE), of(REMOTE + "judge: {ahead: false}")) == []
    with pytest.raises(TapirError, match=r"judge\.ahead: `kind: gguf` does not use it"):
        of(REMOTE + "judge: {gguf: a.gguf, ahead: true}")
    for text in ("teacher: pocket\njudge: {ahead: true}", REMOTE + "judge: {model: m, batch: true, ahead: true}"):
        assert any(line.startswith("judge.ahead has no effect") for line in find_notices(of(text)))
    assert find_faults(of(REMOTE + "judge: {ahead: true}")) == []
