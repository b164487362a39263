"""A file of prompts in any format gives a file of answers, in order, whole or absent."""

import io
import json
import os
import pty
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import read_terminal
from models import CHATML, make_model

from tapir_local.commands.main import cli
from tapir_local.commands.models import answer_with_progress
from tapir_local.errors import TapirError
from tapir_local.export.export import export_gguf
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.generate import generate
from tapir_local.inference.prompt_file import (
    PromptFileJob,
    answer_file,
    generation_task,
    open_answers,
    read_prompts,
)
from tapir_local.records import Completion
from tapir_local.resumable import OrderedWriter
from tapir_local.terminal.output import time_left


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*words: object) -> list[dict[str, object]]:
    found = CliRunner().invoke(cli, ["generate", *map(str, words)], catch_exceptions=False)
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_answers_come_in_the_prompts_order_as_generate_gives_them(llama, tmp_path: Path) -> None:
    rows = [{"id": f"q{n}", "prompt": f"What is {n} times {n}?" * (1 + n % 3), "completion": ""} for n in range(9)]
    found = run(llama.gguf, written(tmp_path / "asked.jsonl", rows), "--max-tokens", 8, "--parallel", 4)
    prompts = [prompt for _, prompt in read_prompts(tmp_path / "asked.jsonl")]
    expected = generate(llama.gguf, prompts, GenerationConfig(max_tokens=8, context=2048, parallel=4, seed=1))
    assert [row["id"] for row in found] == [f"q{n}" for n in range(9)]
    assert [row["text"] for row in found] == [completion.text for completion in expected]


def test_the_file_is_whole_and_the_summary_counts_prompts_that_do_not_fit(llama, tmp_path: Path) -> None:
    asked = written(tmp_path / "asked.jsonl", [{"instruction": "Hi"}, {"instruction": "word " * 300}])
    words = ["generate", str(llama.gguf), str(asked), "-o", str(tmp_path / "out.jsonl"), "--context", "64"]
    found = CliRunner().invoke(cli, words, catch_exceptions=False)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["finish"] == "too_long" for row in rows] == [False, True]
    assert "1 longer than the context" in found.stderr
    assert found.exit_code == 1


@pytest.mark.parametrize("words", [["generate", "m.gguf", "asked.jsonl"], ["export", "pocket"]])
def test_a_file_is_replaced_only_if_asked(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").write_text("mine")
    with pytest.raises(TapirError, match="exists") as error:
        CliRunner().invoke(cli, [*words, "-o", "out"], catch_exceptions=False)
    assert "--force" in error.value.fix
    assert Path("out").read_text() == "mine"


def test_no_bar_shares_the_lines_of_answers_on_a_terminal(llama, tmp_path: Path, monkeypatch) -> None:
    job = PromptFileJob(llama.gguf, asked(tmp_path, 4), GenerationConfig(max_tokens=4, context=128, seed=1))
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setenv("TERM", "xterm")
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, terminal)
        assert answer_with_progress(job, None).rows == 5
        monkeypatch.undo()
    assert [json.loads(line)["id"] for line in read_terminal(ours).splitlines()] == ["1", "2", "3", "4", "5"]


def test_a_schema_holds_every_answer(llama, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}))
    found = run(
        llama.gguf, written(tmp_path / "asked.jsonl", [{"prompt": "Hi", "completion": ""}]), "--json-schema", schema
    )
    assert json.loads(str(found[0]["text"]))["a"] in (1, 2)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"instruction": ""}], "line 1: a row without a prompt"),
        ([{"id": 7, "instruction": "a"}, {"id": 7, "instruction": "b"}], "two rows have the id '7'"),
        ([{"id": 0, "instruction": "a"}, {"id": 0, "instruction": "b"}], "two rows have the id '0'"),
        ([{"prompt": True}], "line 1: a row with prompt that cannot be read: a bool stands where"),
        ([{"question_text": "a"}], "no known form"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(rows: list[dict[str, object]], said: str, tmp_path: Path) -> None:
    with pytest.raises(TapirError, match=said):
        read_prompts(written(tmp_path / "asked.jsonl", rows))


def test_a_row_without_a_prompt_costs_that_row(llama, tmp_path: Path) -> None:
    asked = written(tmp_path / "asked.jsonl", [{"prompt": "a"}, {"prompt": True}, {"prompt": "b"}, {"instruction": ""}])
    found = CliRunner().invoke(cli, ["generate", str(llama.gguf), str(asked), "--max-tokens", "4"])
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["finish"] == "refused" for row in rows] == [False, True, False, True]
    assert "2 of 4 rows cannot be asked; the first:" in found.stderr
    assert found.exit_code == 1


@pytest.mark.parametrize("missing", ["model", "prompts", "adapter", "schema"])
def test_a_missing_file_is_an_error_and_nothing_is_written(missing: str, llama, tmp_path: Path) -> None:
    asked = written(tmp_path / "asked.jsonl", [{"instruction": "Hi"}])
    words = {"model": str(llama.gguf), "prompts": str(asked)} | {missing: str(tmp_path / "none")}
    more = {"adapter": ["--adapter", str(tmp_path / "none")], "schema": ["--json-schema", str(tmp_path / "none")]}
    with pytest.raises(TapirError, match="none"):
        CliRunner().invoke(
            cli,
            ["generate", words["model"], words["prompts"], "-o", str(tmp_path / "out"), *more.get(missing, [])],
            catch_exceptions=False,
        )
    assert not (tmp_path / "out").exists()


def test_an_early_answer_waits_for_its_turn() -> None:
    out = io.StringIO()
    ordered = OrderedWriter(out, ["a", "b", "c"])
    for id, lines in (("c", 0), ("a", 1), ("b", 3)):
        ordered.add(Completion(id, "x", "stop", 1))
        assert out.getvalue().count("\n") == lines


def asked(folder: Path, count: int = 30) -> Path:
    """Prompts of several lengths, one of them too long for a context of 128 tokens."""
    rows = [{"instruction": f"What is {n} times {n}? " * (1 + n % 3)} for n in range(count)]
    return written(folder / "asked.jsonl", [*rows[:7], {"instruction": "word " * 300}, *rows[7:]])


def test_a_killed_run_resumes_where_it_stopped(llama, tmp_path: Path) -> None:
    """Killed after some answers, with an incomplete last line: the same command keeps the complete ones."""
    words = ["generate", str(llama.gguf), str(asked(tmp_path)), "--context", "128", "--max-tokens", "8", "--exact"]
    uncut = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / "uncut.jsonl")], catch_exceptions=False)
    cut = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        interrupted(llama.gguf, words, cut, after=12)
    partial = tmp_path / "cut.jsonl.partial"
    kept = partial.read_text().splitlines()
    partial.write_text("\n".join(kept) + '\n{"id":"torn')
    found = CliRunner().invoke(cli, [*words, "-o", str(cut)], catch_exceptions=False)
    assert f"{len(kept)} answers are there already" in found.stderr
    assert cut.read_text() == (tmp_path / "uncut.jsonl").read_text()
    assert "31 answers" in uncut.stderr
    assert "31 answers" in found.stderr
    assert not list(tmp_path.glob("*.partial*"))


def interrupted(gguf: Path, words: list[str], out: Path, after: int) -> None:
    """Run the command and stop it after some answers, as Ctrl-C does."""
    job = PromptFileJob(gguf, Path(words[2]), GenerationConfig(8, 128, seed=1, exact=True))
    done: list[int] = []

    def stop(count: int, total: int) -> None:
        done.append(count)
        if count == after:
            raise KeyboardInterrupt

    with open_answers(out, io.StringIO(), generation_task(job)) as (file, _):
        answer_file(job, file, stop)


def test_a_task_has_the_names_that_earlier_versions_wrote(llama, tmp_path: Path) -> None:
    """Runs that they left unfinished are resumed."""
    job = PromptFileJob(llama.gguf, asked(tmp_path), GenerationConfig(8, 128, stops=("x",)))
    task = generation_task(job)
    assert list(task) == ["version", "files", "manner"]
    names = ["max_tokens", "context", "parallel", "temperature", "random_seed", "exact", "adapter", "schema", "stops"]
    assert list(task["manner"]) == names


def test_an_interrupted_run_of_another_task_is_not_resumed(llama, tmp_path: Path) -> None:
    words = ["generate", str(llama.gguf), str(asked(tmp_path))]
    with pytest.raises(KeyboardInterrupt):
        interrupted(llama.gguf, words, tmp_path / "out.jsonl", after=20)
    again = [*words, "-o", str(tmp_path / "out.jsonl"), "--context", "128", "--max-tokens", "4"]
    found = CliRunner().invoke(cli, again, catch_exceptions=False)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert "already" not in found.stderr
    assert max(row["tokens"] for row in rows) == 4


def test_the_last_line_has_the_context_plan(llama, tmp_path: Path) -> None:
    words = ["generate", str(llama.gguf), str(asked(tmp_path, 9)), "--parallel", "3", "--max-tokens", "2"]
    found = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert re.search(r"; 3 at once in a context of 1,536 tokens \([\d.]+ MB of [\d.]+ GB free\)\n$", found.stderr)


def test_answers_end_before_a_stop_string(llama, tmp_path: Path) -> None:
    whole = run(llama.gguf, asked(tmp_path, 9), "--max-tokens", 12)
    [stop] = {row["text"][3:5] for row in whole[:1]}
    found = run(llama.gguf, asked(tmp_path, 9), "--max-tokens", 12, "--stop", stop, "--stop", "never written")
    assert [row["text"] for row in found] == [row["text"].split(stop)[0] for row in whole]
    assert found[0]["finish"] == "stop"


@pytest.mark.parametrize("words", [["--parallel", "0"], ["--parallel", "many"], ["--stop", ""]])
def test_invalid_options_are_refused(llama, words: list[str], tmp_path: Path) -> None:
    found = CliRunner().invoke(cli, ["generate", str(llama.gguf), str(asked(tmp_path)), *words])
    assert found.exit_code == 2
    assert words[0] in found.stderr


def test_a_prompt_that_the_template_refuses_costs_its_row_and_exits_with_1(tmp_path: Path) -> None:
    strict = "{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + CHATML
    export_gguf(make_model(tmp_path / "m", template=strict), tmp_path / "m.gguf", adapter=None, quant="f32")
    rows = [{"prompt": [{"role": "user", "content": "Hi"}] * (3 if n == 1 else 1)} for n in range(3)]
    words = ["generate", str(tmp_path / "m.gguf"), str(written(tmp_path / "asked.jsonl", rows)), "--max-tokens", "4"]
    found = CliRunner().invoke(cli, words, catch_exceptions=False)
    answers = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["finish"] == "refused" for row in answers] == [False, True, False]
    assert answers[0]["text"] == answers[2]["text"]
    assert found.exit_code == 1
    assert "1 refused by the chat template" in found.stderr
    assert "too many turns" in found.stderr
    again = CliRunner().invoke(cli, [*words[:2], str(written(tmp_path / "good.jsonl", rows[:1]))])
    assert again.exit_code == 0


def test_a_system_turn_reaches_a_gguf_whose_template_has_no_system_role(tmp_path: Path) -> None:
    silent = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    export_gguf(make_model(tmp_path / "m", template=silent), tmp_path / "m.gguf", adapter=None, quant="f32")
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": system}, {"prompt": [{"role": "user", "content": "Be brief.\n\nHi"}]}]
    first, second = run(tmp_path / "m.gguf", written(tmp_path / "asked.jsonl", rows), "--max-tokens", 4)
    assert first["text"] == second["text"]


def test_time_left() -> None:
    assert (time_left(90, 1.5), time_left(7200, 1), time_left(5, 0)) == ("0:01:00", "2:00:00", "?")
