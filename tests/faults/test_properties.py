"""Properties that hold for any input: keys, the round trip of records, the order of resumed files, masked keys.

That a budget holds on the server's own bill, through any mix of faults and starts, is in tests/teacher/test_billing.py.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tapir_local.files import read_rows, write_rows
from tapir_local.records import Completion, Example, Judgement, Message, from_json, to_json
from tapir_local.resumable import OrderedWriter, resume_writing
from tapir_local.store import keys
from tapir_local.store.compression import compress_text, decompress_text

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)  # lone surrogates are no Unicode text
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
BODIES = st.dictionaries(TEXT.filter(lambda name: name not in keys.FIELDS_NOT_IN_KEY), VALUES, max_size=5)
MESSAGES = st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=TEXT)
EXAMPLES = st.builds(
    Example,
    id=TEXT,
    prompt=st.lists(MESSAGES, min_size=1, max_size=3).map(tuple),
    completion=TEXT,
    task=TEXT,
    round=st.integers(0, 99),
)
COMPLETIONS = st.builds(
    Completion, id=TEXT, text=TEXT, finish=st.sampled_from(["stop", "length"]), tokens=st.integers(0, 10**6)
)
SCORES = st.none() | st.floats(1, 10)
PAIRS = st.none() | st.tuples(st.floats(1, 10), st.floats(1, 10))
JUDGEMENTS = st.builds(Judgement, id=TEXT, teacher=SCORES, student=SCORES, orders=st.tuples(PAIRS, PAIRS), reason=TEXT)
QUICK = settings(max_examples=60, deadline=None)


def without_order(value: Any) -> Any:
    """The value as the server would see it: -0.0 is 0, 1.0 is 1."""
    return json.loads(keys.canonical_json(value))


@QUICK
@given(BODIES, BODIES, st.integers(0, 3), st.integers(0, 3))
def test_two_requests_have_one_key_if_and_only_if_they_are_equal(one, two, draw, other):
    same = without_order(one) == without_order(two) and draw == other
    # Python's 1 == True, which JSON tells apart
    same = same and keys.canonical_json(one) == keys.canonical_json(two)
    assert (keys.request_key("e", one, draw) == keys.request_key("e", two, other)) == same


@QUICK
@given(BODIES, st.randoms(use_true_random=False), st.sampled_from(sorted(keys.FIELDS_NOT_IN_KEY)), VALUES)
def test_the_order_of_fields_and_those_that_do_not_count_leave_the_key(body, chance, name, value):
    turned = list(body.items())
    chance.shuffle(turned)
    assert keys.request_key("e", {**dict(turned), name: value}) == keys.request_key("e", body)


@QUICK
@given(EXAMPLES | COMPLETIONS | JUDGEMENTS)
def test_a_record_comes_back_as_it_was(record):
    text = to_json(record)
    assert from_json(type(record), text) == record
    assert "\n" not in text


@QUICK
@given(st.lists(EXAMPLES, max_size=4))
def test_a_file_of_records_comes_back_as_it_was(rows):
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl", rows)
        assert read_rows(Example, Path(folder) / "rows.jsonl") == rows


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 12), st.lists(st.integers(0, 11), max_size=4), st.integers(0, 60), st.randoms(use_true_random=False)
)
def test_a_file_resumed_after_any_cuts_is_that_of_one_go(count, cuts, torn, chance):
    """Rows that finish in any order, cut after any number of them, the last line torn at any byte."""
    rows = [Completion(f"{n}", f"text {n}", "stop", n) for n in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl"
        for cut in [*cuts, count]:
            partial = path.with_name("answers.jsonl.partial")
            if partial.exists() and torn:
                partial.write_bytes(partial.read_bytes()[:-torn])
            if write_some(path, rows, cut, chance):
                break
        assert read_rows(Completion, path) == rows
        assert [item.name for item in Path(folder).iterdir()] == ["answers.jsonl"]


class Cut(Exception):
    """The process ends here."""


def write_some(path: Path, rows: list[Completion], cut: int, chance: Any) -> bool:
    """Write the missing rows until `cut` of them are done; whether the file is complete."""
    try:
        with resume_writing(path, {"task": 1}, Completion) as (out, done):
            known = {row.id for row in done}
            left = [row for row in rows if row.id not in known]
            writer = OrderedWriter[Completion](out, [row.id for row in left])
            order = list(left)
            chance.shuffle(order)
            for number, row in enumerate(order):
                if number == cut:
                    raise Cut
                writer.add(row)
    except Cut:
        return False
    return True


@QUICK
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_a_compressed_text_comes_back(text, sample):
    assert decompress_text(compress_text(text, sample), sample) == text
