"""A key is in no file, log, report, card, export, command line or child process, whatever the server repeats."""

import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from billed_teacher import BilledTeacher, answer_of, serving
from campaign import Place, Worker, make_place
from filled_stores import put
from server import completion, questions, send, teacher, texts

from tapir_local.commands.main import cli
from tapir_local.store.compression import decompress_text
from tapir_local.store.key_like import find_key_like, key_like_calls
from tapir_local.store.queries import open_store
from tapir_local.store.recovery import samples_of
from tapir_local.teacher.ask import ask

KEY = "sk-proj-4f9A7c21bD83e6550a9c7712"
WORDS = (
    ("status", "fake"),
    ("status", "fake", "--json"),
    ("report", "fake"),
    ("show", "fake", "--round", "1", "--json"),
    ("show", "fake", "--unusable"),
    ("calls", "list", "--json"),
    ("calls", "cost", "--run", "fake"),
    ("calls", "search", "sum", "--json"),
)


def repeating(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """A good answer from a server that repeats the key: in a header, in its own fields, and in error texts at first."""
    key = str(handler.headers["authorization"])
    reply = {**completion(answer_of(body)), "id": key, "system_fingerprint": key, "debug": {"authorization": key}}
    send(handler, 200, reply, {"x-request": key})


@pytest.fixture(scope="module")
def seen() -> list[bytes]:
    """The command lines of all processes of the run, in its middle."""
    return []


@pytest.fixture(scope="module")
def place(hand: Worker, tmp_path_factory: pytest.TempPathFactory, seen: list[bytes]) -> Iterator[Place]:
    """A finished run with a key, and the output of the commands that look at it."""
    with serving(BilledTeacher()) as known:
        found = make_place(tmp_path_factory.mktemp("secrets"), known, "cache")
        known.reset(1, spoiled=0.05)
        known.otherwise = repeating
        known.on_request = lambda number: seen.extend(command_lines()) if number == 100 else None
        given = {"OPENAI_API_KEY": KEY, "MY_OTHER_TOKEN": KEY, "TAPIR_TEST_CHILD": "1"}
        run_all(hand, found, given)
        assert {one["authorization"] for one in known.headers} == {f"Bearer {KEY}"}
        yield found


def run_all(hand: Worker, place: Place, environment: dict[str, str]) -> None:
    """The run, the commands, and an export."""
    code = hand.run(*place.distill(), log=place.log, environ=environment)
    assert code == 0, place.last_words()
    for words in WORDS:
        assert hand.run(*words, "--cache", str(place.cache), log=place.log, environ=environment) == 0, words
    export = place.cache / "export.db"
    assert (
        hand.run("calls", "export", str(export), "--cache", str(place.cache), log=place.log, environ=environment) == 0
    )


def command_lines() -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return found


def store_texts(path: Path) -> Iterator[bytes]:
    """Everything in a store, decompressed."""
    with open_store(path) as conn:
        conn.row_factory = sqlite3.Row
        samples = samples_of(conn)
        for row in conn.execute("select * from calls"):
            for name in ("request", "answer"):
                yield decompress_text(row[name], samples[row["sample"]][name])
    with closing(sqlite3.connect(path)) as conn:
        for (table,) in conn.execute("select name from sqlite_master where type = 'table'").fetchall():
            for row in conn.execute(f'select * from "{table}"'):
                yield from (value if isinstance(value, bytes) else str(value).encode() for value in row)


def test_the_key_is_in_no_file_and_no_output(place: Place) -> None:
    files = [path for path in [place.log, *place.cache.rglob("*")] if path.is_file()]
    assert len(files) > 50
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_the_key_is_in_no_call_attempt_or_export(place: Place) -> None:
    for path in (place.store, place.cache / "export.db"):
        found = list(store_texts(path))
        assert len(found) > 1000
        assert [text for text in found if KEY.encode() in text] == []
    assert any(b"***" in text for text in store_texts(place.store))  # where the server repeated it


def test_the_key_is_in_no_command_line_and_no_child_process(place: Place, seen: list[bytes]) -> None:
    assert len(seen) > 1
    assert [line for line in seen if KEY.encode() in line] == []
    child = place.run.path / "child"
    for name in ("environ", "cmdline"):
        assert KEY.encode() not in (child / name).read_bytes()
    assert b"PATH" in (child / "environ").read_bytes()


def others_can_read(path: Path, top: Path) -> bool:
    """Whether a path, and each folder between it and `top`, lets others in."""
    chain = [path, *(folder for folder in path.parents if top in folder.parents)]
    return all(stat.S_IMODE(one.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO) for one in chain)


def test_what_a_run_wrote_is_private(place: Place) -> None:
    inside = [path for path in place.cache.rglob("*") if path.is_file() and path.name != "export.db"]
    assert [path for path in inside if others_can_read(path, place.cache)] == []


def test_an_exported_store_is_private(place: Place) -> None:
    assert not stat.S_IMODE((place.cache / "export.db").stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO)


SECRETS = {
    "API key": KEY,
    "Hugging Face token": "hf_" + "aB3" * 11,
    "GitHub token": "ghp_" + "aB3d" * 9,
    "AWS key": "AKIAIOSFODNN7EXAMPLE",
    "Google API key": "AIza" + "aB3d5" * 7,
    "Slack token": "xoxb-123456789012-abcdef",
    "JSON Web Token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJlLW9mLWl0",
    "private key": "-----BEGIN RSA PRIVATE KEY-----",
    "password in a URL": "postgres://me:hunter22@db.example/x",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_text_that_looks_like_a_secret_is_found_and_not_shown(kind: str) -> None:
    text = f'{{"content": "Use {SECRETS[kind]} here"}}'
    ((found, start),) = find_key_like(text.encode())
    assert found == kind
    assert len(start) == 5


@pytest.mark.parametrize(
    "text",
    ["ask-me-anything-about-the-sky-today", "sk-learn", "http://host:8000/v1", "What is a PRIVATE KEY?", "hf_hub"],
)
def test_ordinary_text_is_no_secret(text: str) -> None:
    assert list(find_key_like(text.encode())) == []


def test_an_export_warns_of_keys_in_prompts(tmp_path: Path) -> None:
    from click.testing import CliRunner

    path = put(tmp_path / "cache" / "teacher.db", range(3))
    put(path, range(3, 5), answer=f"Your key is {KEY}")
    found = CliRunner().invoke(cli, ["calls", "export", str(tmp_path / "out.db"), "--cache", str(path.parent)])
    assert found.exit_code == 0
    assert "2 of these calls hold text that looks like a secret (API key: 2)" in found.output
    assert "sk-p…" in found.output
    assert KEY[:10] not in found.output
    assert {one.call for one in key_like_calls(tmp_path / "out.db")} == {one.call for one in key_like_calls(path)}
    clean = CliRunner().invoke(
        cli, ["calls", "export", str(tmp_path / "x.db"), "--run", "no", "--cache", str(path.parent)]
    )
    assert clean.exit_code == 1


@pytest.mark.parametrize(("key", "kept"), [(KEY, "the key is ***"), ("any-word", "the key is any-word")])
def test_an_answer_that_repeats_an_issued_key_is_stored_without_it(server, store, monkeypatch, key, kept):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server.otherwise = lambda handler, body: send(handler, 200, completion(f"the key is {key}"))
    assert texts(ask(questions("a"), teacher(server), store, run="r")) == [kept]
    assert texts(ask(questions("a"), teacher(server), store, run="r")) == [kept]
    assert len(server.bodies) == 1
