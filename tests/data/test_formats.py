"""Texts of rows are read exactly; unread texts are reported, and unreadable rows are refused with a kind."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapir_local.data.columns import RowFault, is_metadata_column
from tapir_local.data.dataset import parse_seeds
from tapir_local.data.files import read_path, read_table
from tapir_local.data.formats import ParsedRow, Table, parse_row
from tapir_local.errors import TapirError
from tapir_local.recipe.schema import Seeds
from tapir_local.recipe.tasks import TASKS
from tapir_local.records import Message

SYSTEM = Message("system", "Be brief.")
EARLY = "what the assistant says before the first question"
LATE = "a system turn after the last question"


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def turns(*said: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in said]


ONE_OF_EACH: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Add.", "output": "3"},
    "self-instruct": {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}]},
    "messages": {"messages": turns(("user", "Add."), ("assistant", "3"))},
    "conversations": {"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}]},
    "conversation": {"conversation": turns(("user", "Add."), ("assistant", "3"))},
    "prompt": {"prompt": "Add.", "completion": "3"},
    "prompts": {"prompt": turns(("user", "Add.")), "completion": turns(("assistant", "3"))},
    "mt-bench": {"question_id": 1, "turns": ["Add."], "reference": ["3"]},
    "answer": {"question": "Add.", "answer": "3"},
    "response": {"question": "Add.", "response": "3"},
}
SAID = (
    "instruction input context output response system system_prompt system_message history messages conversations "
    "conversation prompt completion question answer turns reference text passage document notes tools rationale chosen "
    "thinking id source category dataset generator prompt_id created_at difficulty"
)
NAMES = SAID.split()
letters = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=9)
values = st.one_of(
    letters, st.lists(letters, max_size=2), st.dictionaries(letters, letters, max_size=2), st.just([["why", "so"]])
)


def texts_in(value: Any) -> list[str]:
    """All texts with a letter, at any depth."""
    if isinstance(value, str):
        return [value.strip()] if any(map(str.isalpha, value)) else []
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in items for text in texts_in(item)]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(ONE_OF_EACH)), st.dictionaries(st.sampled_from(NAMES), values, min_size=1, max_size=4))
def test_every_text_of_a_row_is_read_or_metadata_or_reported_or_refused(form: str, more: dict[str, Any]) -> None:
    row = {**more, **ONE_OF_EACH[form]}
    try:
        found = parse_row(row)
    except RowFault:
        return
    if not found.prompt:
        return  # refused: a row without an instruction
    read = "\n".join([*(turn.content for turn in found.prompt), found.completion])
    for name, value in row.items():
        missing = [text for text in texts_in(value) if text not in read]
        reported = (
            any(repr(name) in said for said in found.unread) or is_metadata_column(name) or name in ONE_OF_EACH[form]
        )
        assert not missing or reported or value in ("no input", "No input"), (name, missing, found)


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"context": "The mill.", "question": "Who?", "answer": "Ada"}, user("Who?\n\nThe mill."), "Ada"),
        ({"system": "Be brief.", "prompt": "Hi", "completion": "Ho"}, (SYSTEM, *user("Hi")), "Ho"),
        ({"system": "Be brief.", "prompt": turns(("user", "Hi"))}, (SYSTEM, *user("Hi")), ""),
        ({"system": "Be brief.", "question": "Hi", "answer": "Ho"}, (SYSTEM, *user("Hi")), "Ho"),
        ({"instruction": "Hi", "input": "a", "context": "b"}, user("Hi\n\na\n\nb"), ""),
        (
            {"prompt": "Who built the mill?\nThe mill.", "context": "The mill."},
            user("Who built the mill?\nThe mill."),
            "",
        ),
        ({"messages": turns(("user", "Hi"), ("assistant", "a"), ("assistant", "b"))}, user("Hi"), "a\n\nb"),
        ({"messages": turns(("user", "a"), ("user", "b"), ("assistant", "c"))}, (*user("a"), *user("b")), "c"),
        ({"messages": turns(("user", "a"), ("assistant", ""), ("assistant", "c"))}, user("a"), "c"),
        ({"messages": turns(("user", "a"), ("assistant", "c"), ("assistant", ""))}, user("a"), "c"),
        (
            {"instruction": "Add.", "history": turns(("user", "Hi"), ("assistant", "Ho"))},
            (Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "Add.")),
            "",
        ),
        ({"instruction": "  def f():\n\n\n    x\n", "output": "    y\n\n"}, user("  def f():\n\n\n    x"), "    y"),
        ({"instruction": "Mend.", "input": "    if a:\n        b"}, user("Mend.\n\n    if a:\n        b"), ""),
        ({"instruction": "\n\nHi"}, user("\n\nHi"), ""),
        ({"prompt": "Hi", "completion": "    return x"}, user("Hi"), "    return x"),
        *(
            ({"instruction": "Hi", "input": mark, "output": "3"}, user("Hi"), "3")
            for mark in ("<noinput>", "<no input>", "<NoInput>", "No input", "<noinput>.", " ")
        ),
        ({"instruction": "Hi", "input": "N/A"}, user("Hi\n\nN/A"), ""),
        ({"instruction": "Hi", "input": "no input is given here"}, user("Hi\n\nno input is given here"), ""),
        ({"instruction": "Hi", "output": "<nooutput>"}, user("Hi"), ""),
        ({"instruction": "Count.", "input": 0, "output": 0}, user("Count.\n\n0"), "0"),
        ({"prompt": "Count.", "completion": 0, "response": "no"}, user("Count."), "0"),
        ({"question_id": 0, "turns": [0], "reference": [0]}, user("0"), "0"),
    ],
)
def test_texts_of_a_row_are_read_exactly(row: dict[str, Any], prompt: tuple[Message, ...], completion: str) -> None:
    assert parse_row(row)[:2] == (prompt, completion)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"instruction": float("nan"), "output": "a"}, "NaN stands where text is expected"),
        ({"instruction": "a", "input": float("inf")}, "Infinity stands where text is expected"),
        ({"instruction": "a", "output": True}, "a bool stands where text is expected"),
        ({"instruction": "a", "output": ["b"]}, "a list stands where text is expected"),
        ({"instruction": "a", "output": b"b"}, "a bytes stands where text is expected"),
        ({"instruction": "a", "history": ["b"]}, "history that is neither pairs nor messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "a turn by a tool"),
        ({"conversations": [{"from": "function-call", "value": "a"}]}, "a turn by a tool"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "a turn by an unknown speaker"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}, "a turn that calls a tool"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "a turn that calls a tool"),
        (
            {"messages": turns(("user", "a"), ("system", "b"), ("assistant", "c"))},
            "a system turn after the last question",
        ),
        (
            {"messages": turns(("user", "a"), ("assistant", "c"), ("system", "b"))},
            "a system turn after the last question",
        ),
        ({"messages": "not JSON"}, "the conversation is not a list of objects"),
        ({"messages": ["a"]}, "the conversation is not a list of objects"),
        ({"instruction": "half \ud83d"}, "not Unicode text: half a surrogate pair"),
        ({"instruction": "a", "output": "half \ude00"}, "not Unicode text: half a surrogate pair"),
        ({"\ud83d": "a"}, "no known form"),
        ("text", "not an object"),
        (3, "not an object"),
        ([], "not an object"),
    ],
)
def test_unreadable_rows_have_a_kind(row: Any, kind: str) -> None:
    with pytest.raises(RowFault) as fault:
        parse_row(row)
    assert fault.value.kind == kind
    assert fault.value.said.encode()  # even if it quotes a lone surrogate


def test_a_nested_column_is_reported() -> None:
    deep: Any = "text"
    for _ in range(5000):
        deep = [deep]
    assert parse_row({"instruction": "a", "notes": deep}).unread == ["column 'notes'"]


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"instruction": "a", "notes": "see b", "id": "x", "source": "web"}, ["column 'notes'"]),
        (
            {"instruction": "a", "notes": "A", "n": 3, "rank": "high", "empty": " ", "no": None},
            ["column 'notes'"],
        ),
        ({"messages": turns(("user", "a")), "prompt": "a"}, []),
        ({"messages": turns(("user", "a")), "tools": [{"name": "f"}]}, ["column 'tools'"]),
        ({"messages": [{"role": "user", "content": "a", "thinking": "hm"}]}, ["'thinking' of a turn"]),
        (
            {"messages": turns(("assistant", "Hi"), ("user", "a"))},
            [EARLY],
        ),
        ({"instruction": "a", "instances": [{"output": "b"}, {"output": "c"}]}, ["instances after the first"]),
        ({"question_id": 1, "turns": ["a", "b"]}, ["turns after the first"]),
        ({"instruction": "a", "output": "b", "response": "c"}, ["column 'response'"]),
    ],
)
def test_unread_columns_are_reported(row: dict[str, Any], unread: list[str]) -> None:
    found = parse_row(row)
    assert isinstance(found, ParsedRow)
    assert found.unread == unread


def rows_in(path: Path) -> list[Any]:
    """(line, kind of fault or instruction) of every row of a file, in order."""
    table = read_path(path)
    found = parse_seeds(table, TASKS)
    read, faulty = {row.id: row.prompt[-1].content for row in found.examples}, iter(found.faulty)
    return [
        (number, read.get(f"seed-{serial:05d}") or next(faulty).fault.kind)
        for serial, (number, _) in enumerate(table.rows, 1)
    ]


A, B, C = (json.dumps({"instruction": letter}) for letter in "abc")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (f"{A}\nnonsense\n{B}\n", [(1, "a"), (2, "not JSON"), (3, "b")]),
        (f"{A}\n{B}\n" + '{"instruction": "c', [(1, "a"), (2, "b"), (3, "not JSON")]),
        (f'{A}\n{{"instruction": "c", \n{B}', [(1, "a"), (2, "not JSON"), (3, "b")]),
        (f"{A}{B}\n{C}", [(1, "a"), (1, "b"), (2, "c")]),
        (f"{A},\n{B},\n", [(1, "a"), (2, "b")]),
        ('{\n "instruction": "a"\n}\n{\n "instruction": "b"\n}', [(1, "a"), (4, "b")]),
        ('{\n "instruction": "a"\n}', [(1, "a")]),
        (f"[{A}]\n[{B},\n{C}]", [(1, "a"), (2, "b"), (2, "c")]),
        (f"[{A}]\n{B}", [(1, "a"), (2, "b")]),
        (f"[{A}] and more", [(1, "a"), (1, "not JSON")]),
        (f"{A} and more\n{B}", [(1, "a"), (1, "not JSON"), (2, "b")]),
        (f"{A}\n" + "[" * 100_000, [(1, "a"), (2, "not JSON")]),
        (f'{A}\n{{"instruction": "b", "instruction": "c"}}', [(1, "a"), (2, "a key stands twice in it")]),
        (f'{A}\n{{"instruction": NaN}}\n"b"\nnull\n3', [
            (1, "a"), (2, "NaN stands where text is expected"), (3, "not an object"), (4, "not an object"),
            (5, "not an object"),
        ]),
    ],
)  # fmt: skip
def test_no_text_of_a_json_file_is_lost(text: str, rows: list[Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    assert rows_in(tmp_path / "a.jsonl") == rows


def test_numbers_are_kept_as_written(tmp_path: Path) -> None:
    text = '{"instruction": 3.10, "input": 1e5, "output": 100000000000000000000.0, "id": 0}'
    (tmp_path / "a.jsonl").write_text(f"{text}\n")
    (found,) = parse_seeds(read_path(tmp_path / "a.jsonl"), TASKS).examples
    assert (found.prompt, found.completion) == (user("3.10\n\n1e5"), "100000000000000000000.0")


def test_a_text_file_has_one_instruction_per_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfName a knot.\r\n\n  Indented?\n")
    assert [row.prompt for row in parse_seeds(read_path(tmp_path / "a.txt"), TASKS).examples] == [
        user("Name a knot."),
        user("  Indented?"),
    ]
    (tmp_path / "b.txt").write_text(A)
    assert rows_in(tmp_path / "b.txt") == [(1, "a")]


def test_columns_are_renamed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("frage,antwort,output\nWer?,Ada,x y\nWo?,NULL,\n")
    columns = {"instruction": "frage", "output": "antwort"}
    table = read_table(Seeds.model_validate({"path": str(tmp_path / "a.csv"), "columns": columns}))
    found = parse_seeds(table, TASKS)
    assert [(row.prompt, row.completion) for row in found.examples] == [(user("Wer?"), "Ada"), (user("Wo?"), "")]
    assert found.unread == {"column 'output (its own)'": 1}
    assert table.notes == ("cells that say NULL and count as empty: 1",)
    wrong = Seeds.model_validate({"path": str(tmp_path / "a.csv"), "columns": {"instruction": "Frage"}})
    with pytest.raises(TapirError, match=r"no column 'Frage'\n  Its columns are: frage, antwort, output. Corr"):
        read_table(wrong)


def test_rows_with_more_or_fewer_fields_than_the_header_are_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfinstruction,output\na,b\nc\nd,e,f\n\ng,h\n")
    kind = "more or fewer fields than the header"
    assert rows_in(tmp_path / "a.csv") == [(2, "a"), (3, kind), (4, kind), (6, "g")]


def test_parquet_columns_that_are_not_text(tmp_path: Path) -> None:
    import datetime

    import pyarrow
    from pyarrow.parquet import write_table

    day = datetime.date(2026, 1, 2)
    rows = {"instruction": ["a", "b"], "input": [1, None], "output": [2.5, float("nan")], "day": [day, day]}
    write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    found = parse_seeds(read_path(tmp_path / "a.parquet"), TASKS)
    assert [(row.prompt, row.completion) for row in found.examples] == [(user("a\n\n1"), "2.5")]
    assert [(row.number, row.fault.kind) for row in found.faulty] == [(2, "NaN stands where text is expected")]


def test_the_rows_of_a_table_that_cannot_be_read_are_listed_together() -> None:
    rows = [
        (3, {"instruction": "a", "output": True}),
        (5, {"instruction": "b"}),
        (9, {"instruction": "c", "output": True}),
    ]
    with pytest.raises(TapirError, match="f, lines 3, 9: 2 of 3 rows: a bool stands where text is expected; the first"):
        parse_seeds(Table("f", rows), TASKS).refuse()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"train.jsonl": A, "old.py": "# a script"},
            r"loading script \(old.py\), which is not run\n  Name .*train.jsonl",
        ),
        ({"old.py": "# a script"}, "loading script"),
        (
            {"a.jsonl": A, "b.csv": "instruction\na\n"},
            r"several formats \(CSV, JSON\)\n  Name one .*a.jsonl",
        ),
        ({"README.md": "no rows"}, "contains no readable dataset"),
    ],
)
def test_refused_folders_give_advice(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(TapirError, match=said):
        read_path(tmp_path)


def test_a_folders_files_of_one_split_are_read_together(tmp_path: Path) -> None:
    files = {"data/train-0.jsonl": A, "data/train-1.json": f"[{B}]", "data/test.jsonl": C, "LICENCE.txt": "Mine."}
    (tmp_path / "data").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert [row.prompt for row in parse_seeds(read_path(tmp_path), TASKS).examples] == [user("a"), user("b")]
    assert [row.prompt for row in parse_seeds(read_path(tmp_path, "test"), TASKS).examples] == [user("c")]
