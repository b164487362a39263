"""The whole loop with the real backends and the pocket world, on a small setting: it repeats, and survives kill -9.

The first run starts every process as for a user. The others start warm (see `warm.py`) and give the same bytes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import loaded_modules, network_name_space, record_loaded_modules, refuse_network
from warm import may_start_warm, run_command, start_command

from tapir_local.pipeline.loop import list_steps
from tapir_local.run_dir import RunDir

ROOT = Path(__file__).parent.parent
SMALL = ROOT / ".ci" / "small.yaml"
COMMAND = [sys.executable, str(ROOT / "cli.py")]


def tapir(*words: str) -> subprocess.CompletedProcess[str]:
    out = run_command(*words)
    assert out.returncode == 0, out.stderr
    return out


def distilled(cache: Path, name: str = "small") -> RunDir:
    tapir("distill", str(SMALL), "--cache", str(cache), "--name", name)
    return RunDir(cache, name)


def status(run: RunDir) -> dict[str, object]:
    return dict(json.loads(tapir("status", run.name, "--json", "--cache", str(run.cache)).stdout))


def results(run: RunDir) -> dict[str, bytes]:
    """The bytes of every output of a stage, adapters and GGUFs among them; what has the run's name in it left out."""
    outputs = [run.path / "tapir.lock", *(step.output for step in list_steps(run, 1))]
    files = [file for out in outputs for file in ([out] if out.is_file() else sorted(out.rglob("*")))]
    times, named = ("train_log.jsonl", "resolved.json"), ("README.md", "recipe.yaml", "SHA256SUMS")
    kept = [file for file in files if file.name not in (*times, *(named if file.parent == run.path / "model" else ()))]
    return {str(file.relative_to(run.path)): file.read_bytes() for file in kept if file.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """In a network name space without any network, or, where that is not allowed, with Python's sockets refused."""
    cache = tmp_path_factory.mktemp("cache")
    environment = record_loaded_modules(cache)
    refuse_network(cache)
    words = ["distill", str(SMALL), "--cache", str(cache), "--name", "small"]
    command = [*network_name_space(), *COMMAND, *words]
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert out.returncode == 0, out.stderr
    return RunDir(cache, "small")


def test_the_quickstart_asks_for_no_host(run: RunDir) -> None:
    """Neither a download nor telemetry of a library was even tried."""
    assert not (run.cache / "refused-hosts").exists()


def test_what_the_quickstart_wrote_is_private(run: RunDir) -> None:
    """Apart from files of this test, each file, or a folder that holds it, is closed to others."""
    ours = ("sitecustomize.py", "loaded")
    files = [path for path in run.cache.rglob("*") if path.is_file() and path.name not in ours]
    open_ = [
        path for path in files if not any(is_private(one) for one in (path, *path.parents) if run.cache in one.parents)
    ]
    assert [path for path in open_ if "__pycache__" not in path.parts] == []


def is_private(path: Path) -> bool:
    return not path.stat().st_mode & 0o077


def test_torch_and_llama_cpp_are_never_in_one_process(run: RunDir) -> None:
    """With CUDA they crash together. Without a GPU the main process answers, and the other stages are processes."""
    assert loaded_modules(run.cache) == {"torch", "llama_cpp", ""}


def test_status_has_what_others_rely_on(run: RunDir) -> None:
    found = status(run)
    assert {"run", "rounds", "calls"} <= set(found)
    assert set(found["calls"]) == {"paid", "hits"}  # type: ignore[call-overload]
    for row in found["rounds"]:  # type: ignore[attr-defined]
        assert {"number", "stages", "metrics"} <= set(row)
        assert all({"name", "done", "seconds"} <= set(stage) and stage["done"] for stage in row["stages"])
        assert {"win_rate", "accuracy", "by_task", "judged", "unjudged"} <= set(row["metrics"])
        assert row["metrics"]["rows"] == row["metrics"]["judged"] == 60
    assert [(stage["name"], stage["done"]) for stage in found["end"]] == [("ship", True)]  # type: ignore[attr-defined]


def test_the_holdout_is_never_trained_on(run: RunDir) -> None:
    def prompts(path: Path) -> set[str]:
        return {json.dumps(json.loads(line)["prompt"]) for line in path.read_text().splitlines()}

    trained = prompts(run.round(0) / "train.jsonl") | prompts(run.round(1) / "train.jsonl")
    assert not trained & prompts(run.path / "holdout.jsonl")


def test_the_classifier_was_trained_and_its_agreement_stored(run: RunDir) -> None:
    found = json.loads((run.path / "classifier" / "agreement.json").read_text())
    assert 0 <= found["agreement"] <= 1
    assert found["rows"] > 0


def test_a_replay_elsewhere_asks_nobody_and_gives_the_same_files(run: RunDir, tmp_path: Path) -> None:
    """The run's calls exported, taken into an empty cache on another path, and the run made again from them alone."""
    tapir("calls", "export", "--run", run.name, str(tmp_path / "small.db"), "--cache", str(run.cache))
    elsewhere = tmp_path / "another" / "cache"
    tapir("calls", "import", str(tmp_path / "small.db"), "--cache", str(elsewhere))
    tapir("distill", str(SMALL), "--cache", str(elsewhere), "--replay")  # of the same name, whose payments came along
    replayed = RunDir(elsewhere, run.name)
    assert results(replayed) == results(run)
    assert status(replayed)["calls"]["paid"] == 0  # type: ignore[index]
    said = tapir("calls", "verify", "--run", run.name, "--cache", str(elsewhere)).stderr
    assert f"0 damaged, 0 of run {run.name} missing" in said


def test_a_replay_stops_at_what_was_never_asked(run: RunDir) -> None:
    words = ["distill", str(SMALL), "--cache", str(run.cache), "--name", "other", "--replay", "--random-seed", "9"]
    out = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert "stage label" in out.stderr
    assert "is not in the store" in out.stderr


def test_the_same_command_says_that_the_run_is_done(run: RunDir) -> None:
    out = tapir("distill", str(SMALL), "--cache", str(run.cache))
    assert out.stdout == ""
    assert "is done already" in out.stderr


def test_chat_answers_once_and_beside_the_base(run: RunDir) -> None:
    words = ("chat", run.name, "--cache", str(run.cache), "--prompt", "What is 3 + 4?")
    alone, both = tapir(*words).stdout, tapir(*words, "--vs", "base").stdout
    assert alone.strip()
    assert "<|" not in alone  # the stop token ends the answer and is not shown
    assert both.startswith(f"[{run.name}]\n{alone}")
    assert "[base]\n" in both


def test_a_conversation_is_kept_and_forgotten(run: RunDir) -> None:
    lines = "What is 3 + 4?\n/reset\nWhat is 3 + 4?\n/exit\nnever read\n"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*COMMAND, "chat", run.name, "--cache", str(run.cache)]
    out = subprocess.run(command, input=lines, capture_output=True, text=True, env=env, check=True).stdout
    before, after = out.partition("stops an answer.\n")[2].split("started a new conversation\n")
    assert before == after


def test_show_has_the_rounds_plan_and_answers(run: RunDir) -> None:
    found = json.loads(tapir("show", run.name, "--round", "1", "--json", "--cache", str(run.cache)).stdout)
    assert found["plan"]["round"] == 1
    assert len(found["answers"]) == 6
    assert "target" in tapir("show", run.name, "--cache", str(run.cache)).stdout


def killed_in_turn(cache: Path, rng: random.Random) -> Iterator[str]:
    """Start the command again and again, each time to be killed in the first stage that was not done at its start."""
    run = RunDir(cache, "small")
    while True:
        pending = [step for step in list_steps(run, 1) if not step.done]
        if not pending:
            return
        with Path(os.devnull).open("wb") as nothing:
            process = start_command("distill", str(SMALL), "--cache", str(cache), output=nothing, errors=nothing)
        while process.poll() is None and not pending[0].done:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.2 if may_start_warm() else 0.6))  # a warm stage begins its work at once
        process.send_signal(signal.SIGKILL)
        process.wait()
        yield pending[0].name


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_in_the_same_files(run: RunDir, tmp_path: Path) -> None:
    """kill -9 soon after each stage's end, so within the next: nothing is paid twice, the same bytes come out."""
    killed = list(killed_in_turn(tmp_path, random.Random(0)))
    assert len(killed) >= 15
    broken = distilled(tmp_path)
    assert results(broken) == results(run)
    assert status(broken)["calls"]["paid"] == status(run)["calls"]["paid"]  # type: ignore[index]
