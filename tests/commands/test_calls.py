"""`tapir-local calls …` as typed by a user: stdout, stderr and exit code."""

import json
import sqlite3
from pathlib import Path

import pytest
from command_line import refused, tapir

from tapir_local.method import prompts
from tapir_local.recipe.endpoints import Teacher
from tapir_local.records import Message, Request
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import LockedCall, lock_calls
from tapir_local.stages.prepare import PREPARE_STAGES
from tapir_local.stages.rounds import ROUND_STAGES
from tapir_local.store.queries import ASKING_STAGES
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask

ROWS = [{"instruction": "Name a fruit.", "output": "Quince."}, {"instruction": "Name a tree.", "output": ""}]
RECIPE = "teacher: {kind: openai, model: big, base_url: 'http://teacher.invalid/v1'}\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a cache of two calls, a recipe, and a file of rows."""
    with Store(tmp_path / "cache" / "teacher.db") as store:
        for text in ("What is 2 + 3?", "What is 4 + 5?"):
            request = Request(prompts.answer_prompt((Message("user", text),)), f"row-{text}", "seeds")
            ask([request], Teacher(kind="pocket"), store, run="one")
    (tmp_path / "my.yaml").write_text(RECIPE)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path


def calls(place: Path, *words: str, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a command on the cache `cache`."""
    out = tapir("calls", *words, "--cache", "cache", cwd=place)
    assert out.returncode == code, out.stderr
    assert "Traceback" not in out.stderr
    return out.stdout, out.stderr


def test_stats_end_with_the_size_of_the_store(place: Path) -> None:
    out, err = calls(place, "stats", "--json")
    assert json.loads(out)[0]["used"] == 2
    assert err.startswith("2 calls stored, 0.")
    assert err.endswith("bytes per call\n")


def test_an_empty_store_has_no_size_per_call(place: Path) -> None:
    Store(place / "empty" / "teacher.db").close()
    out = tapir("calls", "stats", "--cache", "empty", cwd=place)
    assert out.stderr.startswith("0 calls stored")
    assert "per call" not in out.stderr


def test_search_prints_rows_and_says_if_there_are_more(place: Path) -> None:
    out, err = calls(place, "search", "what is", "--limit", "1", "--json")
    assert [row["stage"] for row in json.loads(out)] == ["seeds"]
    assert "more matches than the 1 shown" in err
    assert calls(place, "search", "bananas", "--json") == ("[]\n", "no call has all of these words\n")
    assert "4 + 5?" in calls(place, "search", "9")[0]


def test_explain_begins_with_the_first_difference(place: Path) -> None:
    a, b = (row["key"] for row in json.loads(calls(place, "list", "--json")[0]))
    out = calls(place, "explain", a[:9], b[:9])[0].splitlines()
    assert out == [
        f"A {a}",
        f"B {b}",
        "messages[0].content differs at character 8: 'What is 4 + 5?' here, 'What is 2 + 3?' there",
    ]
    assert calls(place, "explain", a)[0].splitlines() == out
    assert json.loads(calls(place, "explain", a, b, "--json")[0])["differences"][0]["a"] == "What is 4 + 5?"
    assert "one and the same request" in calls(place, "explain", a, a)[0]


def test_a_run_goes_to_another_machine_and_back(place: Path) -> None:
    out, err = calls(place, "export", "--run", "one", "one.db")
    size = (place / "one.db").stat().st_size
    assert (out, err) == ("", f"one.db: 2 calls exported, {size:,} bytes\n")
    other = tapir("calls", "import", "one.db", "--cache", "other", cwd=place)
    assert other.stderr == "2 calls imported, 0 already there\n"
    assert calls(place, "import", "other/teacher.db")[1] == "0 calls imported, 2 already there\n"


def test_an_import_with_a_wrong_hash_keeps_the_others_and_exits_with_1(place: Path) -> None:
    calls(place, "export", "one.db")
    conn = sqlite3.connect(place / "one.db")
    conn.execute("update calls set key = zeroblob(32) where id = 1")
    conn.commit()
    conn.close()
    out = tapir("calls", "import", "one.db", "--cache", "other", cwd=place)
    assert out.returncode == 1
    assert out.stderr == "1 call imported, 0 already there, 1 refused: 1 with a key that is not its request's\n"


def test_an_export_without_a_damaged_call_exits_with_1(place: Path) -> None:
    conn = sqlite3.connect(place / "cache" / "teacher.db")
    conn.execute("update calls set answer = x'00' where id = 1")
    conn.commit()
    conn.close()
    assert "1 call could not be read, and left out" in calls(place, "export", "one.db", code=1)[1]


def test_calls_in_the_lock_of_a_run_are_exported_and_verified_without_a_recorded_use(place: Path) -> None:
    keys = [row["key"] for row in json.loads(calls(place, "list", "--json")[0])]
    run = RunDir(place / "cache", "replayed")
    lock_calls(run, "prepare/seeds", [LockedCall("prepare/seeds", "x", keys[0])])
    assert "1 call exported" in calls(place, "export", "--run", "replayed", "one.db")[1]
    assert calls(place, "verify", "--run", "replayed") == ("", "2 calls read, 0 damaged, 0 of run replayed missing\n")
    lock_calls(run, "prepare/label", [LockedCall("prepare/label", "x", "00" * 32)])
    out, err = calls(place, "verify", "--run", "replayed", code=1)
    assert (out.strip(), err) == ("00" * 32, "2 calls read, 0 damaged, 1 of run replayed missing\n")


def test_a_stage_that_a_run_has_not_reached_is_no_error(place: Path) -> None:
    assert calls(place, "list", "--stage", "refine", "--json")[0] == "[]\n"
    (place / "cache" / "runs" / "new").mkdir(parents=True)
    assert calls(place, "cost", "--run", "new", "--json")[0] == "[]\n"


def test_the_stages_with_calls_are_stages_of_the_loop() -> None:
    """The commands know every stage that makes calls, and only those."""
    names = {stage.name for stage in (*PREPARE_STAGES, *ROUND_STAGES)}
    assert names >= ASKING_STAGES
    assert {"answer", "train", "plan", "evaluate"} & ASKING_STAGES == set()


def test_cost_is_a_table_or_json(place: Path) -> None:
    assert "seeds" in calls(place, "cost")[0]
    (row,) = json.loads(calls(place, "cost", "--by", "run", "--json")[0])
    assert (row["run"], row["paid"], row["money"], row["unpriced"]) == ("one", 2, 0, 0)


def test_answers_from_elsewhere_are_counted(place: Path) -> None:
    said = "1 answer imported, 0 already there, refused: 1 without an answer (line 1)\n"
    assert calls(place, "import", "rows.json", "--recipe", "my.yaml")[1] == said
    assert "Quince." in calls(place, "search", "quince")[0]


def test_every_command_accepts_an_import_as_a_run(place: Path) -> None:
    calls(place, "import", "rows.json", "--recipe", "my.yaml")
    for by in ("run", "round", "stage", "task"):
        rows = json.loads(calls(place, "cost", "--run", "import:rows.json", "--by", by, "--json")[0])
        assert [(row["from_store"], row["paid"], row["money"]) for row in rows] == [(1, 0, 0)]
    assert json.loads(calls(place, "cost", "--by", "task", "--json")[0])
    assert "1 call exported" in calls(place, "export", "--run", "import:rows.json", "one.db")[1]
    said = calls(place, "verify", "--run", "import:rows.json")
    assert said == ("", "3 calls read, 0 damaged, 0 of run import:rows.json missing\n")
    assert json.loads(calls(place, "list", "--run", "import:rows.json", "--json")[0])
    assert json.loads(calls(place, "stats", "--run", "import:rows.json", "--json")[0])
    assert json.loads(calls(place, "search", "quince", "--run", "import:rows.json", "--json")[0])


def test_a_batch_with_other_settings_says_so(place: Path) -> None:
    body = {"model": "big", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 1024}
    reply = {"choices": [{"message": {"content": "Hello."}, "finish_reason": "stop"}]}
    (place / "in.jsonl").write_text(json.dumps({"custom_id": "a", "body": body}))
    (place / "out.jsonl").write_text(json.dumps({"custom_id": "a", "response": {"status_code": 200, "body": reply}}))
    err = calls(place, "import", "out.jsonl", "--requests", "in.jsonl", "--recipe", "my.yaml")[1]
    assert (
        "1 were asked with settings other than the recipe's; the first difference: temperature: 0.7 here, 0 there"
        in err
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("export", "rows.json"), "already exists"),
        (("export", "--run", "two", "two.db"), "Runs with calls: one"),
        (("verify", "--run", "import:two"), "Runs with calls: one"),
        (("import", "none.db"), "No such file"),
        (("import", "cache/teacher.db"), "into itself"),
        (("import", "cache/teacher.db", "--recipe", "my.yaml"), "is a store"),
        (("import", "rows.json"), "--recipe RECIPE"),
        (("import", "rows.json", "--recipe", "none.yaml"), "no such recipe"),
        (("import", "my.yaml", "--recipe", "my.yaml"), "not JSON"),
        (("search", "*"), "no word"),
        (("explain", "zz"), "no call's key"),
        (("cost", "--run", "nope"), "there are no calls of a run 'nope'"),
        (("cost", "--run", "ona"), "Did you mean one? Runs with calls: one."),
        (("cost", "--round", "7"), "there are no calls of round 7"),
        (("stats", "--run", "nope"), "Runs with calls: one."),
        (("list", "--run", "nope"), "Runs with calls: one."),
        (("list", "--stage", "judges"), "there are no calls of a stage 'judges'"),
        (("list", "--stage", "seedz"), "Did you mean seeds? Stages with calls: seeds."),
        (("search", "--run", "nope", "what"), "Runs with calls: one."),
        (("search", "--stage", "judges", "what"), "Stages with calls: seeds."),
        (("verify", "--run", "nope"), "Runs with calls: one."),
    ],
)
def test_errors_are_printed_without_a_traceback(place: Path, words: tuple[str, ...], said: str) -> None:
    assert said in refused("calls", *words, "--cache", "cache", cwd=place)
