"""Servers that are loading or overloaded, garbled replies, proxies and TLS: what is waited for, retried or named."""

import gzip
import json
import socket
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import pytest
from server import ODD, attempts, brings, completion, garbled, loading, questions, raises, send, status, teacher

from tapir_local.recipe.endpoints import Teacher
from tapir_local.teacher import http, responses
from tapir_local.teacher.ask import ask
from tapir_local.teacher.session import AskOptions

pytestmark = pytest.mark.usefixtures("no_pauses")


# Servers that are loading or overloaded


def test_a_server_that_loads_its_model_is_waited_for_without_using_attempts(server, store, monkeypatch):
    monkeypatch.setattr(http, "LOADING_POLL_SECONDS", 0.02)
    server.otherwise = loading(30)
    told = []
    answers = ask(
        questions("a"),
        teacher(server, attempts=1),
        store,
        run="r",
        options=AskOptions(tell=lambda *seen: told.append(seen)),
    )
    assert answers[0].text == "loaded"
    assert told[0][2].startswith("the server is loading its model")


def test_waiting_for_a_loading_server_ends(server, store, monkeypatch):
    monkeypatch.setattr(http, "LOADING_POLL_SECONDS", 0.02)
    server.otherwise = loading(10**6)
    with raises("Loading model; the server is still loading its model after"):
        ask(questions("a"), teacher(server), store, run="r", options=AskOptions(patience=0.2))
    assert http.MAX_LOADING_SECONDS >= 120


@pytest.mark.parametrize("code", [520, 521, 522, 523, 524, 529])
def test_temporary_failures_of_gateways_are_retried(server, store, code):
    server.faults["a"] = [status(code, "overloaded")]
    assert ask(questions("a"), teacher(server), store, run="r")[0].text == "re: a"


def test_a_pause_longer_than_patience_stops_at_once(server, store):
    server.otherwise = status(503, "maintenance", retry_after="86400")
    with raises("503: maintenance; the next request may be sent in 86,400 s"):
        ask(questions("a"), teacher(server), store, run="r")
    assert len(server.bodies) == 1


# Connections and HTTP

GARBLED = ["status line", "long header", "bad chunk", "bad length", "cut body", "bad gzip"]


@pytest.mark.parametrize("name", GARBLED)
def test_a_garbled_reply_is_tried_again(server, store, name):
    server.faults["a"] = [ODD[name]]
    assert ask(questions("a"), teacher(server), store, run="r")[0].text == "re: a"
    assert len(attempts(store)) == 1


@pytest.mark.parametrize("name", GARBLED)
def test_only_garbled_replies_end_in_one_error(server, store, name):
    server.otherwise = ODD[name]
    with raises(server.url) as caught:
        ask(questions("a"), teacher(server, attempts=3), store, run="r")
    assert "nothing paid for is lost" in str(caught.value)


def test_a_port_without_an_http_server_is_named(server, store):
    server.otherwise = garbled(b"-ERR unknown command 'POST'\r\n")
    with raises(f"the reply of 127.0.0.1:{server.port} is not HTTP") as caught:
        ask(questions("a"), teacher(server), store, run="r")
    assert len(server.bodies) == 2
    assert "ssl" not in str(caught.value)


def test_a_server_that_was_never_reached_is_given_up_after_two_tries(store):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with raises("nothing listens at"):
        ask(questions("a"), Teacher(base_url=f"http://127.0.0.1:{port}/v1", model="m", attempts=6), store, run="r")
    assert len(attempts(store)) == 2


def test_connection_errors_do_not_mention_ssl(store):
    with raises("nothing listens at localhost:9") as caught:
        ask(questions("a"), Teacher(base_url="http://localhost:9/v1", model="m"), store, run="r")
    assert "ssl" not in str(caught.value)
    assert len(attempts(store)) == 2


def test_an_endless_reply_is_not_read_to_its_end(server, store, monkeypatch):
    monkeypatch.setattr(responses, "MAX_REPLY_BYTES", 1 << 20)
    bomb = gzip.compress(json.dumps(completion("a" * (4 << 20))).encode())
    server.faults["1"] = [brings(bomb, content_encoding="gzip")] * 2
    answers = ask(questions("0", "1"), teacher(server, concurrency=1), store, run="r")
    assert "larger than 1 MiB" in answers[1].why
    assert store.path.stat().st_size < 1 << 20


@pytest.mark.parametrize(
    "url", ["http://[::1/v1", "http://host:99999/v1", "localhost:8000/v1", "ftp://host/v1", "http://", "http://a b/v1"]
)
def test_a_malformed_address_is_one_error(store, url):
    with raises("base_url"):
        ask(questions("a"), Teacher(base_url=url, model="m"), store, run="r")


def test_a_socks_proxy_is_named_before_anything_is_sent(store, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    with raises("SOCKS proxy"):
        ask(questions("a"), Teacher(base_url="http://teacher.invalid/v1", model="m"), store, run="r")
    monkeypatch.setenv("ALL_PROXY", "gopher://[")
    with raises("proxy"):
        ask(questions("a"), Teacher(base_url="http://teacher.invalid/v1", model="m"), store, run="r")


@pytest.mark.parametrize("refuses", [False, True])
def test_a_proxy_that_cannot_be_used_is_named(server, store, monkeypatch, refuses):
    for name in ("http_proxy", "no_proxy", "NO_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "short")
    server.otherwise = status(407, "Proxy Authentication Required")
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1") if refuses else "http://127.0.0.1:9")
    with raises("proxy") as caught:
        ask(questions("a"), Teacher(base_url="http://teacher.invalid/v1", model="m"), store, run="r")
    assert "PROXY" in str(caught.value)


def test_a_server_at_an_ipv6_address_answers(store):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            send(self, 200, completion("six"))

        def log_message(self, format, *args): ...

    class Six(ThreadingHTTPServer):
        import socket

        address_family = socket.AF_INET6

    try:
        http = Six(("::1", 0), Handler)
    except OSError:
        pytest.skip("no IPv6 here")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        url = f"http://[::1]:{http.server_port}/v1"
        assert ask(questions("a"), Teacher(base_url=url, model="m"), store, run="r")[0].text == "six"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.fixture
def secure(server, tmp_path):
    """The server behind TLS, and the file with the certificate of its authority."""
    key, certificate = tmp_path / "key.pem", tmp_path / "ca.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl here")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            server.answer(self)

        def log_message(self, format, *args): ...

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request, client_address): ...

    http = Quiet(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    http.socket = context.wrap_socket(http.socket, server_side=True)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"https://localhost:{http.server_port}/v1", certificate
    http.shutdown()
    thread.join()
    http.server_close()


def test_a_private_authority_is_trusted_by_its_file_on_this_machine_too(secure, store, monkeypatch):
    url, certificate = secure
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with raises("is not trusted") as caught:
        ask(questions("a"), Teacher(base_url=url, model="m"), store, run="r")
    assert "export SSL_CERT_FILE=" in str(caught.value)
    assert len(attempts(store)) == 2
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert ask(questions("a"), Teacher(base_url=url, model="m"), store, run="r")[0].text == "re: a"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("none.pem")))
    with raises("SSL_CERT_FILE"):
        ask(questions("b"), Teacher(base_url=url, model="m"), store, run="r")


def test_https_to_an_http_server_is_named(server, store):
    with raises("does not speak https"):
        ask(questions("a"), Teacher(base_url=server.url.replace("http:", "https:"), model="m"), store, run="r")


def test_a_server_that_goes_away_while_a_request_is_sent_is_named_without_the_clients_words() -> None:
    """A killed server left `[Errno None] Can not write request body for http://...` in the message."""
    error = aiohttp.ClientOSError(None, "Can not write request body for http://localhost:8123/v1/chat/completions")
    why, fix = responses.describe_transport_error(error, Teacher(model="m", base_url="http://localhost:8123/v1"))
    assert why == "localhost:8123 closed the connection before it had read the request"
    assert fix.startswith("Start the server")
