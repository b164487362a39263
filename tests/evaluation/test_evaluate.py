"""A tiny GGUF is evaluated by the command, with a judge on loopback: compared, graded, resumed, refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from annotations import write_gamed
from click.testing import CliRunner, Result
from command_line import refused
from fakes import QUIET, World, fake_backends, make_recipe, outputs
from server import Server, completion, running, send, status
from students import Student

from tapir_local.commands.main import cli
from tapir_local.errors import TapirError
from tapir_local.evaluation.annotations import read_annotations
from tapir_local.pipeline.loop import distill
from tapir_local.resources import POCKET_SEEDS
from tapir_local.run_dir import RunDir

ALPACA = [
    {"instruction": f"What is {number}?", "output": "o" * (30 + number), "dataset": name, "generator": "somebody"}
    for number in range(60)
    for name in ("koala" if number % 2 else "vicuna",)
]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Make it rhyme."]},
    {"question_id": 82, "category": "math", "turns": ["What is 2 + 2?", "Double it."], "reference": ["four", "eight"]},
]


def judge(handler: Any, body: dict[str, Any]) -> None:
    """Scores by length: of a pair, the longer answer is better; of one answer, 1 and a point for each 10 characters."""
    asked = body["messages"][1]["content"]
    texts = {tag: asked.partition(f"<{tag}>\n")[2].partition(f"\n</{tag}>")[0] for tag in ("answer_1", "answer_2")}
    if any(texts.values()):
        scores: dict[str, int] = {tag: 3 + (len(text) > 60) * 5 for tag, text in texts.items()}
    else:
        answer = asked.partition("<answer>\n")[2].partition("\n</answer>")[0]
        scores = {"score": min(10, 1 + len(answer) // 10)}
    send(handler, 200, completion(json.dumps(scores)))


@pytest.fixture(scope="module")
def judged() -> Iterator[Server]:
    with running() as known:
        known.otherwise = judge
        yield known


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("evaluate")
    (place / "alpaca.json").write_text(json.dumps(ALPACA))
    (place / "mt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MT_BENCH))
    return place


def evaluated(folder: Path, server: Server, student: Path, file: str, *words: str) -> Result:
    settings = (
        "--set",
        f"judge.base_url={server.url}",
        "--set",
        "judge.model=m-1",
        "--set",
        "judge.api_key_env=NO_KEY",
    )
    command = ["evaluate", str(student), str(folder / file), "--max-tokens", "12", "--cache", str(folder / "cache")]
    return CliRunner().invoke(cli, [*command, *settings, *words], catch_exceptions=False)


@pytest.fixture(scope="module")
def compared(folder: Path, judged: Server, llama: Student) -> dict[str, Any]:
    found = evaluated(folder, judged, llama.gguf, "alpaca.json", "--json", "-o", str(folder / "model_outputs.json"))
    return dict(json.loads(found.stdout))


@pytest.fixture(scope="module")
def graded(folder: Path, judged: Server, llama: Student) -> dict[str, Any]:
    found = evaluated(folder, judged, llama.gguf, "mt.jsonl", "--json", "-o", str(folder / "llama.jsonl"))
    return dict(json.loads(found.stdout))


def test_answers_are_compared_in_both_orders(compared: dict[str, Any]) -> None:
    pairs = compared["pairs"]
    assert (compared["shape"], compared["against"], compared["grades"]) == ("alpaca_eval", "somebody", None)
    assert compared["paid"] + compared["hits"] == 2 * len(ALPACA)
    assert (pairs["rows"], pairs["judged"]) == (60, 60)
    assert pairs["wins"] + pairs["ties"] + pairs["losses"] == 60
    assert pairs["win_rate"] == pytest.approx((pairs["wins"] + pairs["ties"] / 2) / 60)
    assert sorted(compared["pairs_by_category"]) == ["koala", "vicuna"]
    assert sum(rates["rows"] for rates in compared["pairs_by_category"].values()) == 60
    assert compared["judge_quality"]["agreement"] == 1


def test_the_annotations_and_outputs_are_those_of_alpaca_eval(compared: dict[str, Any], folder: Path) -> None:
    outputs = json.loads((folder / "model_outputs.json").read_bytes())
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in ALPACA]
    assert list(outputs[0]) == ["instruction", "output", "generator", "dataset"]
    (path,) = Path(compared["folder"]).glob("*.annotations.json")
    rows = read_annotations(path)
    assert [row.outputs[0] for row in rows] == [row["output"] for row in outputs]
    again = CliRunner().invoke(cli, ["evaluate", "--annotations", str(path), "--json"], catch_exceptions=False)
    assert json.loads(again.stdout)["pairs"] == compared["pairs"]


def test_a_second_evaluation_makes_no_answer_and_pays_nothing(
    compared: dict[str, Any], folder: Path, judged: Server, llama: Student
) -> None:
    asked = len(judged.bodies)
    dry = evaluated(folder, judged, llama.gguf, "alpaca.json", "--dry-run", "--json")
    found = json.loads(dry.stdout)
    assert (found["answers"], found["calls"][0]["hits"], found["calls"][0]["exact"]) == (0, 120, True)
    again = json.loads(evaluated(folder, judged, llama.gguf, "alpaca.json", "--json").stdout)
    assert len(judged.bodies) == asked
    assert (again["paid"], again["hits"]) == (0, 120)
    assert again["pairs"] == compared["pairs"]


def test_both_turns_are_asked_and_graded(graded: dict[str, Any], folder: Path, judged: Server) -> None:
    assert graded["pairs"] is None
    assert graded["paid"] + graded["hits"] == 4
    assert [len(graded["grades"]["turns"]), graded["grades"]["graded"]] == [2, 4]
    assert sorted(graded["grades_by_category"]) == ["math", "writing"]
    rows = [json.loads(line) for line in (folder / "llama.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [81, 82]
    first, second = rows[1]["choices"][0]["turns"]
    prompts = [body["messages"][1]["content"] for body in judged.bodies]
    (last,) = [prompt for prompt in prompts if "eight" in prompt]
    assert f"user: What is 2 + 2?\n\nassistant: {first}\n\nuser: Double it." in last
    assert f"<answer>\n{second}\n</answer>" in last


def test_an_interrupted_evaluation_goes_on_where_it_was(
    graded: dict[str, Any], folder: Path, judged: Server, llama: Student
) -> None:
    (path,) = Path(graded["folder"]).glob("*-turn-2.jsonl")
    whole = path.read_bytes()
    evaluated(folder, judged, llama.gguf, "mt.jsonl", "--limit", "1")
    path.unlink()
    again = json.loads(evaluated(folder, judged, llama.gguf, "mt.jsonl", "--json").stdout)
    assert path.read_bytes() == whole
    assert (again["paid"], again["grades"]) == (0, graded["grades"])


def test_another_gguf_is_the_opponent_and_tables_fit_sixty_columns(
    folder: Path, judged: Server, llama: Student, students: dict[str, Student], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    other = students["qwen2"].gguf
    found = evaluated(folder, judged, llama.gguf, "alpaca.json", "--against", str(other), "--limit", "4")
    assert found.stdout.startswith("llama against qwen2\n")
    assert "no length-controlled rate: it takes 50 judged rows" in " ".join(found.stdout.split())
    assert max(map(len, found.stdout.splitlines())) <= 60


def test_a_runs_student_meets_its_teacher_and_the_run_is_unchanged(tmp_path: Path, llama: Student) -> None:
    run = RunDir(tmp_path / "cache", "fake")
    distill(make_recipe(tmp_path), run, fake_backends(World()), QUIET)
    (run.path / "model" / "student.gguf").unlink()
    (run.path / "model" / "student.gguf").symlink_to(llama.gguf)
    before = outputs(run)
    seeds = json.loads(POCKET_SEEDS.read_bytes())[:4]
    (tmp_path / "own.json").write_text(json.dumps([{**row, "output": ""} for row in seeds]))
    words = [str(tmp_path / "own.json"), "--cache", str(run.cache), "--max-tokens", "8", "--json"]
    found = json.loads(CliRunner().invoke(cli, ["evaluate", "fake", *words, "--against", "teacher"]).stdout)
    assert (found["student"], found["against"]) == ("fake", "the pocket teacher")
    assert (found["paid"], found["pairs"]["judged"], found["pairs"]["wins"]) == (4 + 8, 4, 0)
    assert not any("pocket" in note for note in found["notes"])  # the judge knows these questions
    alone = json.loads(CliRunner().invoke(cli, ["evaluate", "fake", *words]).stdout)  # no answers: graded
    assert (alone["grades"]["graded"], alone["pairs"]) == (4, None)
    assert 1 <= alone["grades"]["mean"] < 5
    assert outputs(run) == before


def test_a_judge_that_says_nothing_readable_is_an_error(folder: Path, llama: Student) -> None:
    with running() as known, pytest.raises(TapirError, match="judged none of the 4 answers; the first: no score"):
        evaluated(folder, known, llama.gguf, "mt.jsonl", "--set", "judge.alias=other")


def test_a_spent_budget_stops_and_a_larger_one_goes_on(folder: Path, judged: Server, llama: Student) -> None:
    words = ("--grade", "--limit", "3", "--set", "judge.alias=budget")
    with pytest.raises(TapirError, match="budget"):
        evaluated(folder, judged, llama.gguf, "alpaca.json", *words, "--set", "budget.calls=2")
    found = json.loads(evaluated(folder, judged, llama.gguf, "alpaca.json", *words, "--json").stdout)
    assert (found["paid"], found["hits"], found["grades"]["graded"]) == (1, 2, 3)


def test_a_server_that_refuses_leaves_the_answers_there(folder: Path, llama: Student) -> None:
    with running() as known:
        known.otherwise = status(401, "no such key")
        with pytest.raises(TapirError, match="no such key"):
            evaluated(folder, known, llama.gguf, "mt.jsonl", "--set", "judge.attempts=1")
        dry = evaluated(folder, known, llama.gguf, "mt.jsonl", "--dry-run", "--json")
    assert json.loads(dry.stdout)["answers"] == 0


def test_gamed_baselines_are_for_alpaca_evals_instructions_only(
    folder: Path, judged: Server, llama: Student, compared: dict[str, Any]
) -> None:
    write_gamed(folder / "df_gamed.csv")
    with pytest.raises(TapirError, match="--gamed is for comparisons on AlpacaEval's own 240 instructions"):
        evaluated(folder, judged, llama.gguf, "alpaca.json", "--gamed", str(folder / "df_gamed.csv"))
    (path,) = Path(compared["folder"]).glob("llama-*-vs-somebody.annotations.json")
    words = ["evaluate", "--annotations", str(path), "--gamed", str(folder / "df_gamed.csv"), "--json"]
    found = json.loads(CliRunner().invoke(cli, words, catch_exceptions=False).stdout)
    assert sorted(found["weights"]) == ["constant", "instruction difficulty", "tanh(length difference)"]
    assert found["pairs"]["length_controlled_error"] > 0
    means = [rates["length_controlled"] for rates in found["pairs_by_category"].values()]
    assert sum(means) / 2 == pytest.approx(found["pairs"]["length_controlled"])  # both categories have 30 rows


FAULTS = {
    ("MODEL", "alpaca.json"): "a GGUF names no judge",
    ("nobody", "alpaca.json"): "there is no run 'nobody'",
    ("gone.gguf", "alpaca.json", "--set", "judge.model=x"): "gone.gguf",
    ("MODEL", "alpaca.json", "--set", "judge.kind=reference"): "there is no judge",
    ("MODEL", "mt.jsonl", "--set", "judge.model=x", "--against", "teacher"): "graded, not compared",
    ("MODEL", "alpaca.json", "--set", "judge.model=x", "--against", "base"): "only a run has a base model",
    ("MODEL", "alpaca.json", "--set", "judge.model=x", "-o", "alpaca.json"): "a file that the command reads",
    ("MODEL", "alpaca.json", "--set", "judge.model=x", "--references", "none"): "for MT-Bench's questions only",
}


@pytest.mark.parametrize("words", FAULTS, ids=lambda words: " ".join(words))
def test_what_cannot_be_evaluated_is_refused_in_one_sentence(
    words: tuple[str, ...], folder: Path, llama: Student
) -> None:
    named = [str(llama.gguf) if word == "MODEL" else word for word in words]
    said = CliRunner().invoke(cli, ["evaluate", *relative(named, folder), "--cache", str(folder / "cache")])
    assert isinstance(said.exception, TapirError)
    assert FAULTS[words] in str(said.exception)


def relative(words: list[str], folder: Path) -> list[str]:
    """The words with the files' names as paths in the folder."""
    return [str(folder / word) if word in ("alpaca.json", "mt.jsonl") else word for word in words]


def test_the_program_says_what_is_missing() -> None:
    assert "name a run or a GGUF, and a FILE of questions" in refused("evaluate", "run", code=2)
    assert "--annotations takes no STUDENT" in refused("evaluate", "x", "--annotations", "a.json", code=2)
