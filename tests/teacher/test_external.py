"""Imported answers: a run finds them as if it had asked, and unusable rows are refused with a reason."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import STUDENT

from tapir_local.data.dataset import require_seeds
from tapir_local.data.files import read_path
from tapir_local.errors import TapirError
from tapir_local.recipe.endpoints import Teacher
from tapir_local.recipe.schema import Recipe
from tapir_local.run_dir import RunDir
from tapir_local.stages.backends import ask_backend
from tapir_local.stages.context import Work
from tapir_local.stages.prepare import answer_seeds
from tapir_local.store.queries import count_uses, get_call, list_uses, verify_calls
from tapir_local.store.store import Store
from tapir_local.teacher.external import ImportedRow, ImportResult, format_refused_rows, import_answers, read_answers

TEACHER = Teacher(
    base_url="http://teacher.invalid/v1", model="big", temperature=0.3, max_tokens=99, extra={"top_p": 0.9}
)
ALPACA_EVAL = Path(__file__).parents[3] / "shared/data/alpaca_eval"
ALPACA = [
    {"instruction": "Add the numbers.", "input": "2, 3", "output": "5"},
    {"instruction": " Name a fruit. ", "input": "", "output": " A quince.\n"},
]
SHAREGPT = [
    {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Hello."},
            {"from": "human", "value": "Name a tree."},
            {"from": "gpt", "value": "Oak."},
        ]
    }
]
MESSAGES = [{"messages": [{"role": "user", "content": "Name a town."}, {"role": "assistant", "content": "Ulm."}]}]


def written(file: Path, rows: list[Any], lines: bool = False) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return file


def imported(store: Path, file: Path, teacher: Teacher = TEACHER, requests: Path | None = None) -> ImportResult:
    rows, found = read_answers(file, teacher, requests)
    with Store(store) as opened:
        import_answers(opened, teacher, rows, file, found)
    return found


def replayed(store: Path, seeds: Path, teacher: Teacher = TEACHER) -> list[str]:
    """The answers to a file's seeds that a run with this teacher finds in the store, in replay mode."""
    recipe = Recipe(teacher=teacher)
    examples, _ = require_seeds(read_path(seeds), recipe.task_table())
    with Store(store, "replay") as opened:
        asks = ask_backend(teacher, opened, "run")
        backends: Any = SimpleNamespace(teacher=asks, judge=asks, student_format=lambda: STUDENT)
        work = Work(recipe, RunDir(store.parent, "run"), backends)
        return [row.completion for row in answer_seeds(work, examples, "seeds")[0]]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "teacher.db"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.json"


@pytest.mark.parametrize(
    ("rows", "answers"),
    [(ALPACA, ["5", "A quince."]), (SHAREGPT, ["Oak."]), (MESSAGES, ["Ulm."])],
    ids=["Alpaca", "ShareGPT", "messages"],
)
@pytest.mark.parametrize("lines", [False, True], ids=["array", "lines"])
def test_a_run_with_this_recipe_finds_them(
    store: Path, file: Path, rows: list[Any], answers: list[str], lines: bool
) -> None:
    found = imported(store, written(file, rows, lines))
    assert (found.new, found.known, found.refused) == (len(rows), 0, {})
    assert replayed(store, file) == answers
    assert verify_calls(store) == (len(rows), [])


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.4},
        {"max_tokens": 20},
        {"model": "small"},
        {"extra": {}},
        {"base_url": "http://other.invalid"},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_a_run_with_another_recipe_does_not(store: Path, file: Path, change: dict[str, Any]) -> None:
    imported(store, written(file, ALPACA))
    with pytest.raises(TapirError, match="not in the store"):
        replayed(store, file, TEACHER.model_copy(update=change))


def test_a_run_with_a_larger_max_tokens_finds_them_too(store: Path, file: Path) -> None:
    imported(store, written(file, ALPACA))
    assert len(replayed(store, file, TEACHER.model_copy(update={"max_tokens": 4096}))) == 2


def test_the_teachers_alias_and_seed_count(store: Path, file: Path) -> None:
    teacher = TEACHER.model_copy(update={"alias": "the big one", "send_seed": True})
    imported(store, written(file, ALPACA), teacher)
    assert len(replayed(store, file, teacher)) == 2


def test_the_stored_reply_says_that_it_was_imported(store: Path, file: Path) -> None:
    imported(store, written(file, [{**ALPACA[0], "generator": "gpt-9"}]))
    (row,) = list_uses(store, None, None, 9)
    reply = get_call(store, row["key"])["answer"]
    assert reply["imported"] == {"file": "rows.json", "line": 1}
    assert reply["model"] == "gpt-9"
    assert reply["choices"][0]["message"]["content"] == "5"
    assert (row["run"], row["stage"], row["row"], row["paid"]) == ("import:rows.json", "seeds", "line 1", False)


def test_without_a_generator_the_model_is_the_recipes(store: Path, file: Path) -> None:
    imported(store, written(file, ALPACA[:1]))
    assert get_call(store, list_uses(store, None, None, 1)[0]["key"])["answer"]["model"] == "big"


def test_importing_twice_adds_nothing_and_keeps_paid_answers(store: Path, file: Path) -> None:
    imported(store, written(file, ALPACA))
    again = written(file, [{**row, "output": "something else"} for row in ALPACA])
    found = imported(store, again)
    assert (found.new, found.known) == (0, 2)
    assert replayed(store, file) == ["5", "A quince."]


def test_of_two_answers_to_one_prompt_the_first_is_taken(store: Path, file: Path) -> None:
    found = imported(store, written(file, [ALPACA[0], {**ALPACA[0], "output": "six"}]))
    assert (found.new, found.known) == (1, 1)
    assert replayed(store, file) == ["5"]
    assert count_uses(store)[0]["paid"] == 0


PART = [{"type": "text", "text": "Hello"}, {"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"instruction": "Add.", "output": ""}, "without an answer"),
        ({"instruction": "Add.", "output": None}, "without an answer"),
        ({"instruction": "", "output": "5"}, "without an instruction"),
        ({"output": "5"}, "without an instruction"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "without an answer"),
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, "without an instruction"),
        ({"messages": [{"role": "tool", "content": "Hello"}]}, "unreadable"),
        ({"messages": "Hello"}, "unreadable"),
        ({"messages": 5}, "unreadable"),
        ({"messages": [{"role": "user", "content": PART}]}, "not only of text"),
        ({"instruction": "Add.", "output": ["5"]}, "not only of text"),
        ({"instruction": "Add \ud800.", "output": "5"}, "unreadable"),
        ({"instruction": "Add.", "output": "\ud800"}, "unreadable"),
    ],
)
def test_an_unusable_row_is_refused_with_its_line(store: Path, file: Path, row: dict[str, Any], why: str) -> None:
    found = imported(store, written(file, [ALPACA[0], row, ALPACA[1]], lines=True))
    assert (found.new, dict(found.refused)) == (2, {why: [2]})
    assert format_refused_rows(found) == f"1 {why} (line 2)"


def test_a_file_without_a_usable_row_is_refused_with_reasons(file: Path) -> None:
    with pytest.raises(TapirError, match=r"no row with an instruction and its answer: 1 without an answer \(line 1\)"):
        read_answers(written(file, [{"instruction": "Add."}]), TEACHER)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xff\xfe\0", "neither a store nor JSON"), (b"", "no rows in it"), (b"Hello", "not JSON"), (b"[1]", "object")],
)
def test_files_without_rows_are_refused(file: Path, content: bytes, said: str) -> None:
    file.write_bytes(content)
    with pytest.raises(TapirError, match=said):
        read_answers(file, TEACHER)


def test_a_file_name_that_is_not_text_is_accepted(store: Path, tmp_path: Path) -> None:
    assert imported(store, written(tmp_path / "rows\udcff.json", ALPACA)).new == 2
    assert [row["run"] for row in count_uses(store)] == ["import:rows?.json"]


def test_a_byte_order_mark_is_accepted(store: Path, file: Path) -> None:
    file.write_text("\ufeff" + json.dumps(ALPACA), encoding="utf-8")
    assert imported(store, file).new == 2


def test_a_recorded_teacher_cannot_be_imported_for(store: Path, file: Path) -> None:
    with pytest.raises(TapirError, match="'recorded' cannot be asked"):
        imported(store, written(file, ALPACA), Teacher(kind="recorded"))


@pytest.mark.skipif(not ALPACA_EVAL.exists(), reason="no AlpacaEval here")
@pytest.mark.parametrize("name", ["gpt4_1106_preview.json", "alpaca-7b.json"])
def test_alpaca_evals_model_outputs(store: Path, name: str) -> None:
    file = ALPACA_EVAL / name
    found = imported(store, file)
    rows = json.loads(file.read_text(encoding="utf-8"))
    refused = sum(map(len, found.refused.values()))
    assert found.new + found.known + refused == len(rows) == 805
    assert found.new > 790
    answers = replayed_of(store, [row for row in rows if row["output"].strip()][:50], file.parent)
    assert answers == [row["output"].strip() for row in rows if row["output"].strip()][:50]


def replayed_of(store: Path, rows: list[Any], _: Path) -> list[str]:
    return replayed(store, written(store.with_name("some.json"), rows))


# OpenAI's Batch API

SENT: dict[str, Any] = {"model": "big", "messages": [{"role": "user", "content": "What is 2 + 3?"}], "temperature": 0.3}
SENT |= {"max_tokens": 99, "top_p": 0.9}


def request(name: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {**SENT, **body}}


def reply(text: str = "5", finish: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 7, "completion_tokens": 1}
    return {"id": "chatcmpl-1", "model": "big-2026", "choices": [choice], "usage": usage, "unheard_of": 1.5}


def output(name: str, body: Any, status: int = 200, error: Any = None) -> dict[str, Any]:
    response = {"status_code": status, "request_id": "r", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": name, "response": response, "error": error}


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    return tmp_path / "input.jsonl"


def test_a_batch_keeps_its_replies_as_they_came(store: Path, file: Path, requests: Path) -> None:
    asked = [request("b"), request("a", messages=[{"role": "user", "content": "What is 4 + 5?"}])]
    written(requests, asked, lines=True)
    written(file, [output("a", reply("9")), output("b", reply())], lines=True)
    found = imported(store, file, TEACHER, requests)
    assert (found.new, found.different, found.refused) == (2, 0, {})
    row = next(row for row in list_uses(store, None, None, 9) if row["row"] == "b")
    call = get_call(store, row["key"])
    assert call["answer"] == reply()
    assert (call["tokens_in"], call["tokens_out"]) == (7, 1)
    seeds = written(file, [{"instruction": "What is 2 + 3?"}, {"instruction": "What is 4 + 5?"}])
    assert replayed(store, seeds) == ["5", "9"]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (output("a", {"error": {"message": "no"}}, 400), "without an answer"),
        (output("a", reply(), error={"code": "expired"}), "without an answer"),
        ({"custom_id": "a", "response": None, "error": {"code": "expired"}}, "without an answer"),
        (output("a", reply("")), "without an answer"),
        (output("a", reply(finish="length")), "with an incomplete answer"),
        (output("a", reply(finish="content_filter")), "with an incomplete answer"),
        (output("a", {"data": []}), "unreadable"),
        (output("a", None), "unreadable"),
        (output("z", reply()), "without a request in the requests file"),
        (output("other", reply()), "asked of another model than the recipe's"),
        (output("image", reply()), "not only of text"),
        (output("odd", reply()), "unreadable"),
        (output("\ud800", reply()), "unreadable"),
        (output("begun", reply()), "whose request already begins the answer"),
    ],
)
def test_an_unusable_row_of_a_batch_is_refused(
    store: Path, file: Path, requests: Path, row: dict[str, Any], why: str
) -> None:
    asked = [request("a"), request("good"), request("other", model="small"), request("\ud800")]
    asked.append(request("image", messages=[{"role": "user", "content": PART}]))
    asked.append(request("odd", temperature=float("nan")))
    asked.append(request("begun", messages=[*SENT["messages"], {"role": "assistant", "content": "It is"}]))
    written(requests, asked, lines=True)
    found = imported(store, written(file, [row, output("good", reply())], lines=True), TEACHER, requests)
    assert (found.new, dict(found.refused)) == (1, {why: [1]})


def test_rows_asked_with_other_settings_are_counted(store: Path, file: Path, requests: Path) -> None:
    written(requests, [request("a", temperature=1), request("b", messages=MESSAGES[0]["messages"][:1])], lines=True)
    found = imported(store, written(file, [output("a", reply()), output("b", reply())], lines=True), TEACHER, requests)
    assert (found.new, found.different, found.difference) == (2, 1, "temperature: 0.3 here, 1 there")


def test_a_batch_output_needs_its_requests(file: Path, requests: Path) -> None:
    written(file, [output("a", reply())], lines=True)
    with pytest.raises(TapirError, match=r"no prompts(.|\n)*--requests"):
        read_answers(file, TEACHER)
    written(requests, ALPACA, lines=True)
    with pytest.raises(TapirError, match="no requests of a batch"):
        read_answers(file, TEACHER, requests)
    with pytest.raises(TapirError, match="cannot be read"):
        read_answers(file, TEACHER, requests.with_name("none.jsonl"))


def test_a_row_is_read_with_its_prompt(file: Path) -> None:
    rows, _ = read_answers(written(file, ALPACA), TEACHER)
    assert [type(row) for row in rows] == [ImportedRow, ImportedRow]
    assert rows[0].prompt[0].content == "Add the numbers.\n\n2, 3"


def test_a_table_is_read_as_seeds_are(store: Path, tmp_path: Path) -> None:
    table = tmp_path / "answers.csv"
    table.write_text('question,answer\n"What, then?",This.\nAnd now?,\n')
    result = imported(store, table)
    assert (result.new, dict(result.refused)) == (1, {"without an answer": [3]})
