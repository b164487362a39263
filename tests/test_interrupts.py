"""SIGTERM and SIGHUP stop a run as Ctrl-C does: what is in flight is waited for, stored, and not paid twice."""

import os
import pty
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from command_line import ROOT
from server import Server, says

IN_FLIGHT = 16


def start_run(server: Server, cache: Path, prepare: Callable[[], object] | None = None) -> "subprocess.Popen[str]":
    """A run whose first requests label the seeds."""
    server.otherwise = says('{"task": "Math"}')
    sets = {"kind": "openai", "base_url": server.url, "model": "m", "concurrency": IN_FLIGHT}
    words = [word for name, value in sets.items() for word in ("--set", f"teacher.{name}={value}")]
    command = [sys.executable, str(ROOT / "cli.py"), "distill", "quickstart", "--cache", str(cache), *words]
    env = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=prepare
    )
    deadline = time.monotonic() + 120
    while len(server.bodies) < 3 * IN_FLIGHT and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return run


def stored_calls(cache: Path) -> int:
    with sqlite3.connect(cache / "teacher.db") as conn:
        return conn.execute("select count(*) from calls").fetchone()[0]


def ignore(number: signal.Signals) -> Callable[[], object]:
    return lambda: signal.signal(number, signal.SIG_IGN)


def default(number: signal.Signals) -> Callable[[], object]:
    return lambda: signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "prepare", "name"),
    [
        (signal.SIGINT, default(signal.SIGINT), "Ctrl-C"),
        (signal.SIGTERM, None, "SIGTERM"),
        (signal.SIGTERM, ignore(signal.SIGINT), "SIGTERM"),  # in the background of a script
        (signal.SIGHUP, default(signal.SIGHUP), "SIGHUP"),
    ],
    ids=["ctrl-c", "term", "background", "hup"],
)
def test_requests_in_flight_are_waited_for(server, tmp_path, number, prepare, name):
    server.seconds = 0.5
    run = start_run(server, tmp_path, prepare)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + number, said
    assert "Traceback" not in said
    assert "requests in flight" in said
    assert "Every answer that arrived is kept" in said
    assert "abandoned" not in said.replace("abandons", "")
    assert stored_calls(tmp_path) == len(server.bodies)
    record = orjson.loads((tmp_path / "runs" / "quickstart" / "run.json").read_bytes())
    assert record["status"].startswith("stopped in prepare/label")
    assert record["status"].endswith(name)


def test_a_second_signal_abandons_them_and_says_so(server, tmp_path):
    server.seconds = 3.0
    run = start_run(server, tmp_path)
    run.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 143
    assert f"{IN_FLIGHT} requests were in flight and abandoned" in said
    assert stored_calls(tmp_path) == len(server.bodies) - IN_FLIGHT


WAITS = """
import sys, time
from tapir_local.interrupts import stop_on_signals, interrupt_reason
stop_on_signals()
print("ready", flush=True)
try:
    time.sleep(float(sys.argv[1]))
    print("slept", flush=True)
except KeyboardInterrupt:
    try:
        print("to the terminal", flush=True)
    finally:
        open(sys.argv[2], "w").write(interrupt_reason())
"""


def test_a_signal_that_nohup_ignores_stays_ignored(tmp_path):
    command = [sys.executable, "-c", WAITS, "2", str(tmp_path / "said")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=ignore(signal.SIGHUP)
    ) as waiting:
        assert waiting.stdout
        waiting.stdout.readline()
        waiting.send_signal(signal.SIGHUP)
        assert waiting.stdout.read() == b"slept\n"


def test_a_terminal_that_is_closed_stops_the_program_and_not_its_last_words(tmp_path):
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", WAITS, "60", str(tmp_path / "said")])
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "said").read_text() == "SIGHUP"
