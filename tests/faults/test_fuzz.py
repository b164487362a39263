"""Every reader of what others write refuses damaged input by its one error: no traceback, no hang, bounded memory.

What was found is kept in FOUND. `make campaign` feeds thirty times as much.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from filled_stores import put
from garbage import damaged, feed, watched
from server import completion

from tapir_local.data.columns import RowFault
from tapir_local.data.files import parse_text_file, read_path
from tapir_local.data.formats import parse_row
from tapir_local.errors import TapirError
from tapir_local.files import read_json_object, read_rows
from tapir_local.inference.model import is_adapter
from tapir_local.method import parsing
from tapir_local.method.checkers import CHECKERS
from tapir_local.recipe.tasks import TASKS
from tapir_local.recipe.text import parse_changes, parse_recipe
from tapir_local.records import Completion, Example, Judgement
from tapir_local.resumable import read_complete_rows
from tapir_local.stages.context import LockedCall
from tapir_local.store.reply import parse_reply
from tapir_local.store.store import Store
from tapir_local.store.transfer import import_store, is_sqlite_file
from tapir_local.teacher.batch_api import parse_result_lines, reply_body_of_line
from tapir_local.teacher.responses import is_event_stream, join_stream
from tapir_local.training.gguf_source import open_gguf_source
from tapir_local.training.model_files import read_header, read_model_json

ROOT = Path(__file__).parents[2]
ROWS = [
    {"instruction": "Add 1 and 2", "input": "x", "output": "3"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"prompt": "p", "completion": "c"},
    {"turns": ["one", "two"], "reference": ["a", "b"]},
    {"name": "t", "instruction": "i", "instances": [{"input": "", "output": "o"}]},
]
SEEDS = [json.dumps(ROWS).encode(), b"\n".join(json.dumps(row).encode() for row in ROWS)]
TABLES = [b'instruction,input,output\nAdd,1,2\n"a, b",,NULL\n', b"instruction\toutput\na\tb\n"]
JUDGED = [
    b'{"answer_1": 7, "answer_2": 3}',
    b'Reasons.\n```json\n{"scores": {"answer_1": 8.5, "answer_2": "9/10"}}\n```',
    b"<answer_1>8</answer_1><answer_2>7</answer_2>",
    b'{"score": 4}\n{"complete": true, "answerable": true, "of_task": false}',
    b"<think>hm</think>[8, 7]",
    b'[{"name": "answer_1", "score": 3}, {"name": "answer_2", "score": 4}]',
    b"<new_instruction>Say x</new_instruction><new_answer>x</new_answer>",
    b'{"task": "Math"}',
]
REPLIES = [
    orjson.dumps(completion("An answer.")),
    orjson.dumps({**completion(None, reasoning_content="Hm."), "usage": {"total_tokens": 7}}),
    b'data: {"choices":[{"index":0,"delta":{"content":"A"}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
    orjson.dumps({"custom_id": "ab" * 32, "response": {"status_code": 200, "body": completion("x")}, "error": None}),
]
RECIPES = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
STAGES = [
    b'{"id":"a","prompt":[{"role":"user","content":"x"}],"completion":"y","task":"Math"}\n' * 3,
    b'{"id":"a","text":"right","finish":"stop","tokens":2}\n' * 3,
    b'{"id":"a","teacher":9,"student":2,"orders":[[9,2],[9,2]]}\n' * 2,
    b'{"step":"round-01/judge","row":"a","key":"' + b"0" * 64 + b'"}\n' * 2,
]


def in_file(folder: Path, name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A reader of files as a reader of bytes."""

    def write_and_read(text: bytes) -> object:
        path = folder / name
        path.write_bytes(text)
        return read(path)

    return write_and_read


def read_seeds(path: Path) -> None:
    for _, row in read_path(path).rows:
        try:
            parse_row(row)
        except (TapirError, RowFault):
            continue


def read_judgement(text: bytes) -> None:
    reply = text.decode(errors="replace")
    parsing.parse_scores(reply), parsing.parse_score(reply), parsing.parse_label(reply, TASKS)
    parsing.parse_instruction(reply), parsing.parse_draft_check(reply), parsing.parse_rewritten(reply)
    parsing.parse_json_list(reply)


def check_answer(text: bytes) -> None:
    answer = text.decode(errors="replace")
    for check in CHECKERS.values():
        check("What is 3 + 4? Answer as a JSON list of 3 words in Python.", answer)
        check(answer, "7")


def read_reply(text: bytes) -> None:
    parse_reply(join_stream(text) if is_event_stream(text) else text)


def read_batch(text: bytes) -> None:
    for line in parse_result_lines(text).values():
        body = reply_body_of_line(line)
        if body:
            feed(parse_reply, body, (ValueError,))


def read_stage(path: Path) -> None:
    for kind in (Example, Completion, Judgement, LockedCall):
        feed(lambda _, kind=kind: read_rows(kind, path), b"", (TapirError,))  # type: ignore[misc]
    feed(lambda _: read_json_object(path), b"", (TapirError,))
    read_complete_rows(path, Completion)


def safetensors() -> bytes:
    """A small file with two tensors."""
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(24)


def gguf() -> bytes:
    """The beginning of a GGUF: magic, version, counts, some metadata, one tensor."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    keys += text("llama.block_count") + struct.pack("<II", 4, 2)
    keys += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("b") + text("c")
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 3, 0, 0)
    raw = b"GGUF" + struct.pack("<IQQ", 3, 1, 3) + keys + tensor
    return raw + bytes(-len(raw) % 32) + bytes(48)


def import_into(folder: Path) -> Callable[[Path], object]:
    """Imports a store into a new one."""

    def read(path: Path) -> None:
        if is_sqlite_file(path):
            with Store(folder / "mine.db") as store:
                import_store(store, path)

    return read


Reader = tuple[Callable[[bytes], object], list[bytes], tuple[type[Exception], ...]]
REFUSED = (TapirError,)


def readers(folder: Path) -> dict[str, Reader]:
    """Every reader: the function, whole inputs, and the errors by which it may refuse."""
    recipe = folder / "recipe.yaml"
    return {
        "seeds": (in_file(folder, "seeds.json", read_seeds), SEEDS, REFUSED),
        "table": (in_file(folder, "seeds.csv", read_seeds), TABLES, REFUSED),
        "text seeds": (lambda text: parse_text_file(text.decode(errors="replace"), Path("x.txt")), SEEDS, REFUSED),
        "judge": (read_judgement, JUDGED, ()),
        "checkers": (check_answer, [*JUDGED, b"def f(a):\n    return a\n", b"7", b'["a", "b"]', b"due: x\n- y"], ()),
        "reply": (read_reply, REPLIES, (ValueError,)),
        "batch": (read_batch, REPLIES, ()),
        "recipe": (lambda text: parse_recipe(text.decode(errors="replace"), str(recipe)), RECIPES, REFUSED),
        "setting": (lambda text: parse_changes([text.decode(errors="replace")]), [b"a.b=[1, 2]", b"x={y: z}"], REFUSED),
        "stage file": (in_file(folder, "stage.jsonl", read_stage), STAGES, ()),
        "safetensors": (in_file(folder, "model.safetensors", read_header), [safetensors()], REFUSED),
        "model JSON": (in_file(folder, "config.json", read_model_json), [b'{"a": {"b": [1]}}'], REFUSED),
        "adapter": (in_file(folder, "a.gguf", is_adapter), [gguf()], REFUSED),
        "GGUF": (in_file(folder, "g.gguf", open_gguf_source), [gguf()], REFUSED),
    }


COUNTS = {"recipe": 40, "GGUF": 60, "seeds": 100, "store": 12}


@pytest.mark.parametrize("name", readers(Path()))
def test_damaged_input_is_refused_in_one_error(tmp_path: Path, name: str) -> None:
    read, whole, refusals = readers(tmp_path)[name]
    with watched():
        for text in damaged(whole, COUNTS.get(name, 150), seed=1):
            feed(read, text, refusals)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(2, 32))
@pytest.mark.parametrize("name", readers(Path()))
def test_much_damaged_input(tmp_path: Path, name: str, seed: int) -> None:
    read, whole, refusals = readers(tmp_path)[name]
    with watched():
        for text in damaged(whole, COUNTS.get(name, 150), seed):
            feed(read, text, refusals)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.campaign) for seed in range(2, 20))])
def test_damaged_stores_are_imported_or_refused(tmp_path: Path, seed: int) -> None:
    whole = put(tmp_path / "whole.db", range(30)).read_bytes()
    read = in_file(tmp_path, "other.db", import_into(tmp_path))
    with watched():
        for text in damaged([whole], COUNTS["store"], seed):
            feed(read, text, REFUSED)


DEEP = b"[" * 100_000
# What was found by the tests above, or by reading: (reader, input).
FOUND: list[tuple[str, bytes]] = [
    ("seeds", DEEP),
    ("seeds", b'[{"instruction": "a", "output": ' + DEEP),
    ("reply", DEEP),
    ("reply", b'{"choices": [{"message": {"content": ' + DEEP),
    ("reply", b"data: " + DEEP + b"\n\n"),
    ("batch", b'{"custom_id": "00", "response": ' + DEEP),
    ("model JSON", DEEP),
    ("safetensors", struct.pack("<Q", len(DEEP)) + DEEP),
    ("stage file", DEEP),
    ("stage file", b"\0" * 4096),
    ("setting", b"a=" + DEEP[:900]),
    ("judge", DEEP),
    ("judge", b'Reasons. {"' + b'{"a":' * 3_000),
    ("judge", b"{} " * 20_000),
    ("judge", b"{" * 50_000),
    ("checkers", DEEP),
]


@pytest.mark.parametrize("case", range(len(FOUND)))
def test_what_was_found_stays_mended(tmp_path: Path, case: int) -> None:
    name, text = FOUND[case]
    read, _, refusals = readers(tmp_path)[name]
    with watched():
        feed(read, text, refusals)
