"""API keys: a missing or wrong one is named, and a real one is never shown or stored."""

import pytest
from server import brings, questions, raises, status, teacher

from tapir_local.recipe.endpoints import Teacher
from tapir_local.teacher import http
from tapir_local.teacher.ask import ask
from tapir_local.teacher.endpoint import mask_key, unencrypted_key_warning
from tapir_local.teacher.session import AskOptions

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.mark.parametrize("code", [401, 403])
def test_a_wrong_key_stops_at_once_and_is_never_shown(server, store, monkeypatch, code):
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    server.faults = {str(row): [status(code, "Incorrect API key provided: sk-secret-123")] for row in range(50)}
    with raises("environment variable MY_KEY") as caught:
        ask(questions(*map(str, range(50))), teacher(server, api_key_env="MY_KEY", concurrency=4), store, run="r")
    assert server.headers[0]["authorization"] == "Bearer sk-secret-123"
    assert len(server.bodies) <= 8
    store.flush()
    kept = b"".join(file.read_bytes() for file in store.path.parent.iterdir())
    assert b"sk-secret" not in kept
    assert "sk-secret" not in str(caught.value)


def test_a_key_from_a_file_is_never_shown(server, store, tmp_path):
    file = tmp_path / "key"
    file.write_text("sk-in-a-file\n")
    server.faults["a"] = [status(401, "Incorrect API key provided: sk-in-a-file")]
    with raises(f"file {file}") as caught:
        ask(questions("a"), teacher(server, api_key_file=str(file)), store, run="r")
    assert server.headers[0]["authorization"] == "Bearer sk-in-a-file"
    store.flush()
    assert b"sk-in" not in b"".join(path.read_bytes() for path in store.path.parent.iterdir() if path != file)
    assert "sk-in" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "two words"])
def test_a_key_file_that_holds_no_key(server, store, tmp_path, text):
    if text is not None:
        (tmp_path / "key").write_text(text)
    with raises("key"):
        ask(questions("a"), teacher(server, api_key_file=str(tmp_path / "key")), store, run="r")
    assert not server.bodies


def test_a_missing_key_is_named_before_anything_is_sent(store):
    with raises("OPENAI_API_KEY: no API key for https://api.openai.com/v1"):
        ask(questions("a"), Teacher(model="m"), store, run="r")


class Client:
    def __init__(self, key):
        self.api_key = key


@pytest.mark.parametrize(
    ("key", "said", "shown"),
    [
        ("no", "no such model", "no such model"),
        ("x", "Unexpected token", "Unexpected token"),
        ("test", "the latest test", "the latest test"),
        ("no", "Incorrect API key provided: no", "Incorrect API key provided: ***"),
        ("no", "Authorization: Bearer no.", "Authorization: Bearer ***."),
        ("sk-secret-123", "see sk-secret-123x", "see ***x"),
    ],
)
def test_only_what_can_be_a_secret_is_masked(key, said, shown):
    assert mask_key(said, Client(key)) == shown


def test_a_short_key_does_not_mask_the_servers_words(server, store, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "no")
    server.otherwise = status(404, "no such model")
    with raises("404: no such model"):
        ask(questions("a"), teacher(server), store, run="r")


@pytest.mark.parametrize(
    "fault", [status(400, "no: sk-secret-123"), brings({"said": "sk-secret-123"}), brings(b"sk-secret-123")]
)
def test_a_real_key_is_nowhere_in_answers_or_store(server, store, monkeypatch, fault):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    server.faults["1"] = [fault] * 6
    answers = ask(questions("0", "1"), teacher(server, concurrency=1), store, run="r")
    assert "***" in answers[1].why
    store.flush()
    assert b"sk-secret" not in b"".join(file.read_bytes() for file in store.path.parent.iterdir())


@pytest.mark.parametrize("key", ["schlüssel-123", "sk-a\x07bcdefgh"])
def test_a_key_that_a_header_cannot_carry_is_refused(server, store, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with raises("environment variable OPENAI_API_KEY: the key contains characters"):
        ask(questions("a"), teacher(server), store, run="r")


@pytest.mark.parametrize(
    ("url", "key", "warned"),
    [
        ("http://teacher.example/v1", "sk-secret-123", True),
        ("http://192.168.1.7:8000/v1", "sk-secret-123", True),
        ("http://192.168.1.7:8000/v1", "x", False),
        ("https://teacher.example/v1", "sk-secret-123", False),
        ("http://127.0.0.1:8000/v1", "sk-secret-123", False),
        ("http://[::1]:8000/v1", "sk-secret-123", False),
        ("http://localhost/v1", "sk-secret-123", False),
    ],
)
def test_an_unencrypted_key_is_warned_of(url, key, warned):
    assert ("sent unencrypted" in unencrypted_key_warning(Teacher(base_url=url, model="m"), key)) == warned


def test_the_warning_is_given_once(store, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    monkeypatch.setattr(http, "WARNED_ENDPOINTS", set())
    told = []
    for _ in range(2):
        with raises("no connection"):
            ask(
                questions("a"),
                Teacher(base_url="http://0.0.0.0:9/v1", model="m"),
                store,
                run="r",
                options=AskOptions(warn=told.append),
            )
    assert [text.partition(" is sent")[0] for text in told] == ["the key in the environment variable OPENAI_API_KEY"]
