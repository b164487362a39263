"""Seeds of all common formats and files are read; unreadable ones are refused with line and advice."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tapir_local.data.dataset import require_seeds
from tapir_local.data.files import read_hub, read_path, read_table
from tapir_local.data.formats import Table, require_row
from tapir_local.errors import TapirError
from tapir_local.recipe.schema import Seeds
from tapir_local.recipe.tasks import TASKS
from tapir_local.records import Example, Message
from tapir_local.resources import POCKET_SEEDS, find_seeds

DATA = Path(__file__).parents[3] / "shared/data"
ALPACA = [
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
    {"instruction": 'Say "hi"\nin ünicode\u2028', "input": "", "output": "hi; ÿ"},
]


def examples(table: Table) -> list[Example]:
    return require_seeds(table, TASKS)[0]


def user(*turns: str) -> tuple[Message, ...]:
    """Turns of user and assistant, alternately."""
    return tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(turns))


def said(role: str, *turns: str) -> list[dict[str, str]]:
    """OpenAI's messages, alternately of `role` and the other role."""
    other = {"user": "assistant", "assistant": "user"}[role]
    return [{"role": (role, other)[n % 2], "content": text} for n, text in enumerate(turns)]


SYSTEM = Message("system", "Be brief.")


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, user("Add.\n\n1 2"), "3"),
        ({"instruction": "Add.", "input": None, "output": 3}, user("Add."), "3"),
        ({"instruction": "Add.", "context": "1 2", "response": "3", "category": "x"}, user("Add.\n\n1 2"), "3"),
        ({"instruction": "Add.", "dataset": "koala", "output": "3", "generator": "g"}, user("Add."), "3"),
        (
            {"instruction": "Add.", "history": [["Hi", "Ho"]], "system": "Be brief."},
            (SYSTEM, *user("Hi", "Ho", "Add.")),
            "",
        ),
        ({"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}]}, user("Add.\n\n1 2"), "3"),
        ({"instruction": "Add.", "instances": []}, user("Add."), ""),
        ({"messages": said("user", "Hi", "Ho", "Add.", "3")}, user("Hi", "Ho", "Add."), "3"),
        ({"messages": said("assistant", "Welcome", "Add.", "3")}, user("Add."), "3"),
        ({"messages": [{"role": "system", "content": ""}, *said("user", "Add.")]}, user("Add."), ""),
        ({"messages": json.dumps(said("user", "Add.", "3"))}, user("Add."), "3"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Add."}]}]}, user("Add."), ""),
        ({"messages": said("user", "Add."), "prompt": "Add.", "prompt_id": "x"}, user("Add."), ""),
        ({"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}]}, user("Add."), "3"),
        ({"conversations": [{"from": "human", "value": "Add."}], "system": "Be brief."}, (SYSTEM, *user("Add.")), ""),
        ({"prompt": "Add.", "completion": " 3\n"}, user("Add."), "3"),
        ({"prompt": "Add."}, user("Add."), ""),
        (
            {"prompt": said("user", "Hi", "Ho", "Add."), "completion": said("assistant", "3")},
            user("Hi", "Ho", "Add."),
            "3",
        ),
        ({"prompt": "Add.", "completion": said("assistant", "3")}, user("Add."), "3"),
        (
            {"question_id": 81, "category": "math", "turns": ["Add.", "Again."], "reference": ["3", "4"]},
            user("Add."),
            "3",
        ),
        ({"question": "Add.", "answer": "3"}, user("Add."), "3"),
        ({"system_prompt": "Be brief.", "question": "Add.", "response": "3"}, (SYSTEM, *user("Add.")), "3"),
        ({"instruction": None, "messages": said("user", "Add.")}, user("Add."), ""),
    ],
)
def test_rows_of_every_format(row: dict[str, Any], prompt: tuple[Message, ...], completion: str) -> None:
    assert require_row(row, "f") == (prompt, completion)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": "Add.", "label": 1}, "no known format; its keys: text, label"),
        ({}, "no known format; its keys: none"),
        ({"messages": 3}, "messages that cannot be read: the conversation is not a list of objects"),
        ({"messages": [{"role": "tool", "content": "3"}]}, "a turn is by 'tool'; known are user, human"),
        ({"messages": [{"content": "3"}]}, "a turn is by None"),
        ({"messages": said("user", "Hi", "", "Add.")}, "turn 2 of the conversation is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a list stands where text is expected"),
        ({"instruction": {"a": 1}}, "a dict stands where text is expected"),
        ({"instruction": "Add.", "instances": "none"}, "instances is not a list of objects"),
        ({"question_id": 1, "turns": []}, "turns is not a list of questions"),
        ({"question_id": 101, "choices": []}, "name the file of questions"),
    ],
)
def test_unreadable_rows_give_a_reason(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(TapirError, match=fault) as error:
        require_row(row, "seeds.json, line 7")
    assert str(error.value).startswith("seeds.json, line 7: a row")


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(TapirError) as error:
        require_row({"text": "a"}, "f")
    assert all(name in error.value.fix for name in ("Alpaca", "ShareGPT", "messages", "self-instruct", "MT-Bench"))


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


ARRAY = json.dumps(ALPACA, indent=1, ensure_ascii=False).encode()
LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ALPACA).encode()
TEXTS = {
    "a.json": ARRAY,
    "a.jsonl": LINES,
    "bom.json": b"\xef\xbb\xbf" + ARRAY,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    "a.csv": as_csv(ALPACA),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(ALPACA),
    "semicolons.CSV": as_csv(ALPACA, ";"),
    "a.tsv": as_csv(ALPACA, "\t"),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.compress(data[:40]) + zstandard.compress(data[40:]),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("suffix", PACKED)
def test_compressed_and_plain_files_give_equal_rows(tmp_path: Path, name: str, suffix: str) -> None:
    (tmp_path / (name + suffix)).write_bytes(PACKED[suffix](TEXTS[name]))
    found = examples(read_path(tmp_path / (name + suffix)))
    assert [(row.prompt, row.completion) for row in found] == [require_row(row, "f") for row in ALPACA]


def test_a_csv_may_hold_long_fields_and_conversations_as_json(tmp_path: Path) -> None:
    turns = said("user", "a" * 200_000, "3")
    (tmp_path / "a.csv").write_bytes(as_csv([{"messages": json.dumps(turns)}]))
    assert examples(read_path(tmp_path / "a.csv"))[0].prompt == user("a" * 200_000)


DAMAGED = [
    ("a.json", b"", "no rows in it"),
    ("a.json", b"[]", "no rows in it"),
    ("a.json", b'[\n{"instruction": "a"},\n{"instruction": }\n]', "line 3: not JSON"),
    ("a.json", b'[{"instruction": "a"}', "line 1: not JSON"),
    ("a.json", b"[" * 100_000, "line 1: not JSON"),
    ("a.jsonl", b'{"instruction": "a"}\nnonsense\n', "line 2: not JSON"),
    ("a.jsonl", b'"text"\n', "line 1: a row is a JSON object"),
    ("a.jsonl", '{"instruction": "a"}\n{"instruction": "ü"}\n'.encode("latin-1"), "line 2: not UTF-8: byte 0xfc"),
    ("a.json", "[]".encode("utf-16"), r"line 1: not UTF-8: byte 0xff\n  .*iconv -f UTF-16"),
    (
        "a.json",
        b'{\n"data": [{"instruction": "a"}]\n}',
        r"line 1: a single JSON object \(data\), but rows are expected",
    ),
    ("a.csv", b"", "no rows in it"),
    ("a.csv", b"instruction,output\n", "no rows in it"),
    ("a.csv", b"question,reply\na,b\n", "line 2: a row of no known format; its keys: question, reply"),
    ("a.csv", b"instruction,output\na,b\n\nc\n", "line 4: 1 field where the header has 2"),
    ("a.csv", b'instruction,output\n"a\nb",c\nd,e,f\n', "line 4: 3 fields where the header has 2"),
    ("a.csv", b'instruction,output\na,"b\n', "line 2: not CSV"),
    ("a.csv", b"instruction,instruction\na,b\n", "line 1: two columns are called 'instruction'"),
    ("a.json.gz", gzip.compress(ARRAY, mtime=0)[:-9], "damaged or incomplete"),
    ("a.json.gz", gzip.compress(ARRAY, mtime=0)[:30] + b"\0" * 9, "damaged or incomplete"),
    ("a.json.gz", gzip.compress(b"", mtime=0), "no rows in it"),
    ("a.json.zst", zstandard.compress(ARRAY)[:-9], "damaged or incomplete"),
    ("a.json.zst", zstandard.compress(ARRAY) + b"more", "damaged or incomplete"),
    ("a.parquet", b"PAR1 and no more", "not a complete Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "fault"), DAMAGED)
def test_damaged_files_are_refused_in_one_message(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TapirError, match=fault) as error:
        examples(read_path(tmp_path / name))
    assert name in str(error.value)


def as_parquet(rows: list[dict[str, Any]], path: Path) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_keeps_conversations_and_counts_rows(tmp_path: Path) -> None:
    rows = [{"messages": said("user", "Hi", "Ho", "Add.", "3"), "n": 1}, {"messages": [], "n": 2}]
    path = as_parquet(rows, tmp_path / "a.parquet")
    assert require_row(read_path(path).rows[0][1], "f") == (user("Hi", "Ho", "Add."), "3")
    with pytest.raises(TapirError, match="row 2: 1 of 2 rows without an instruction"):
        examples(read_path(path))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders written by `datasets`, and one of plain files."""
    from datasets import Dataset, DatasetDict

    folder, data = tmp_path_factory.mktemp("saved"), Dataset.from_list(ALPACA)
    data.save_to_disk(folder / "alone")
    DatasetDict(test=data, train=data.select([1])).save_to_disk(folder / "two")
    DatasetDict(test=data).save_to_disk(folder / "one")
    DatasetDict(a=data, b=data).save_to_disk(folder / "unclear")
    (folder / "files").mkdir()
    (folder / "files" / "train.jsonl").write_bytes(LINES)
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("name", "split", "rows"),
    [
        ("alone", None, 2),
        ("two", None, 1),
        ("two", "test", 2),
        ("one", None, 2),
        ("unclear", "b", 2),
        ("files", None, 2),
    ],
)
def test_a_folder_of_a_saved_dataset(saved: Path, name: str, split: str | None, rows: int) -> None:
    found = examples(read_path(saved / name, split))
    assert [row.completion for row in found] == ["3", "hi; ÿ"][-rows:]


@pytest.mark.parametrize(
    ("name", "split", "fault"),
    [
        ("alone", "test", r"no split 'test'\n  It has none; leave"),
        ("two", "dev", r"no split 'dev'\n  Name one in seeds.split: test, train"),
        ("unclear", None, r"several splits\n  Name one in seeds.split: a, b"),
        ("empty", None, "contains no readable dataset"),
    ],
)
def test_a_folder_without_a_usable_dataset_is_an_error(saved: Path, name: str, split: str | None, fault: str) -> None:
    with pytest.raises(TapirError, match=fault):
        read_path(saved / name, split)


def test_a_file_has_no_splits() -> None:
    with pytest.raises(TapirError, match=r"a file has no split 'train'\n  seeds.split is for datasets"):
        read_path(POCKET_SEEDS, "train")


def test_local_files_have_no_subsets() -> None:
    with pytest.raises(TapirError, match=r"no subset 'main'\n  seeds.subset is for datasets on the Hub"):
        read_table(Seeds(path="pocket", subset="main"))


def test_an_unreachable_hub_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TapirError, match=r"^no/such: .*the Hub has no such dataset or cannot be reached.*\n  Download"):
        read_hub("no/such", None, None)


def test_a_local_copy_is_read_if_the_hub_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config, load_dataset
    from huggingface_hub import constants

    (tmp_path / "such").mkdir()
    (tmp_path / "such" / "train.jsonl").write_bytes(LINES)
    load_dataset(str(tmp_path / "such"), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "cache" / "such").rename(tmp_path / "cache" / "no___such")  # the folder of a download from the Hub
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(examples(read_table(Seeds(path="no/such")))) == 2


def test_kinds_of_seeds_path(tmp_path: Path) -> None:
    assert find_seeds("pocket") == POCKET_SEEDS
    assert find_seeds(str(tmp_path)) == tmp_path
    assert find_seeds("tatsu-lab/alpaca") is None
    for name in ("seeds.json", "data/seeds.jsonl", "./data/seeds", "/no/such", "a/b/c"):
        with pytest.raises(TapirError, match="the seed file does not exist"):
            find_seeds(name)


@pytest.mark.skipif(not DATA.exists(), reason="no real data here")
@pytest.mark.parametrize(
    ("name", "rows", "answered"),
    [
        ("alpaca_cherry_5pct.json", 3111, 3111),
        ("alpaca_eval/alpaca-7b.json", 805, 805),
        ("alpaca_eval/gpt4_1106_preview.json", 805, 805),
        ("self_instruct_seed_tasks.jsonl", 175, 175),
        ("mt_bench_question.jsonl", 80, 38),
    ],
)
def test_real_files_are_read_completely(name: str, rows: int, answered: int) -> None:
    found = examples(read_path(DATA / name))
    assert (len(found), sum(bool(row.completion) for row in found)) == (rows, answered)


@pytest.mark.skipif(not DATA.exists(), reason="no real data here")
def test_real_answers_without_questions_give_advice() -> None:
    with pytest.raises(TapirError, match=r"gpt4.jsonl, lines 1, 2, .*name the file of questions"):
        examples(read_path(DATA / "mt_bench_reference_gpt4.jsonl"))
