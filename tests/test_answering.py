"""A file of prompts comes back as a file of answers: in order, whole or absent, whatever form it has."""

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from tapir_local.answering import InOrder, read_prompts
from tapir_local.errors import TapirError
from tapir_local.generate import generate
from tapir_local.records import Completion


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*words: object) -> list[dict[str, object]]:
    found = CliRunner().invoke(cli.cli, ["generate", *map(str, words)], catch_exceptions=False)
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_answers_come_in_the_prompts_order_as_generate_gives_them(llama, tmp_path: Path) -> None:
    rows = [{"id": f"q{n}", "prompt": f"What is {n} times {n}?" * (1 + n % 3), "completion": ""} for n in range(9)]
    found = run(llama.gguf, written(tmp_path / "asked.jsonl", rows), "--max-tokens", 8, "--parallel", 4)
    prompts = [prompt for _, prompt in read_prompts(tmp_path / "asked.jsonl")]
    expected = generate(llama.gguf, prompts, max_tokens=8, context=2048, parallel=4, seed=1)
    assert [row["id"] for row in found] == [f"q{n}" for n in range(9)]
    assert [row["text"] for row in found] == [completion.text for completion in expected]


def test_the_file_is_whole_and_the_summary_says_what_did_not_fit(llama, tmp_path: Path) -> None:
    asked = written(tmp_path / "asked.jsonl", [{"instruction": "Hi"}, {"instruction": "word " * 300}])
    words = ["generate", str(llama.gguf), str(asked), "-o", str(tmp_path / "out.jsonl"), "--context", "64"]
    found = CliRunner().invoke(cli.cli, words, catch_exceptions=False)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["finish"] == "too_long" for row in rows] == [False, True]
    assert "1 longer than the context" in found.stderr


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
        ([{"instruction": ""}], "1 of 1 rows without a prompt"),
        ([{"id": 7, "instruction": "a"}, {"id": 7, "instruction": "b"}], "two rows have the id '7'"),
        ([{"question_text": "a"}], "no known form"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(rows: list[dict[str, object]], said: str, tmp_path: Path) -> None:
    with pytest.raises(TapirError, match=said):
        read_prompts(written(tmp_path / "asked.jsonl", rows))


@pytest.mark.parametrize("missing", ["model", "prompts", "adapter", "schema"])
def test_a_file_that_is_not_there_is_said_and_nothing_is_written(missing: str, llama, tmp_path: Path) -> None:
    asked = written(tmp_path / "asked.jsonl", [{"instruction": "Hi"}])
    words = {"model": str(llama.gguf), "prompts": str(asked)} | {missing: str(tmp_path / "none")}
    more = {"adapter": ["--adapter", str(tmp_path / "none")], "schema": ["--json-schema", str(tmp_path / "none")]}
    with pytest.raises(TapirError, match="none"):
        CliRunner().invoke(
            cli.cli,
            ["generate", words["model"], words["prompts"], "-o", str(tmp_path / "out"), *more.get(missing, [])],
            catch_exceptions=False,
        )
    assert not (tmp_path / "out").exists()


def test_what_is_done_early_waits_for_its_turn() -> None:
    out = io.StringIO()
    ordered = InOrder(out, ["a", "b", "c"])
    for id, lines in (("c", 0), ("a", 1), ("b", 3)):
        ordered.add(Completion(id, "x", "stop", 1))
        assert out.getvalue().count("\n") == lines
