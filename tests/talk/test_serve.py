"""A student is served by llama.cpp's own servers; they die with this program, and no variable overrides an option."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import openai
import pytest
from command_line import ROOT, refused, tapir

from tapir_local.export.export import export_gguf
from tapir_local.resources import find_model_folder
from tapir_local.talk import serve
from tapir_local.talk.models import ModelSource, gguf_file_source
from tapir_local.talk.serve import SERVER_MODULES, ServerConfig, server_command, usage_lines

# A program named llama-server that records how it was started, and lists a model as the real one does.
LLAMA_SERVER = f"""#!{sys.executable}
import http.server, json, os, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
json.dump({{"given": given, "env": dict(os.environ), "pid": os.getpid()}}, open(os.environ["RECORD"], "w"))
if given["--model"].endswith("bad.gguf"):
    sys.exit("error: failed to load model")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({{"data": [{{"id": given["--alias"]}}]}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
"""


def unused_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@pytest.fixture
def on_path(tmp_path: Path) -> dict[str, str]:
    """The environment in which `llama-server` is on PATH."""
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(LLAMA_SERVER)
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record.json")}


@contextmanager
def serving(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`tapir-local serve` in a process of its own, and what it prints when the server answers."""
    command = [sys.executable, str(ROOT / "cli.py"), "serve", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert child.stdout
    try:
        said = "".join(child.stdout.readline() for _ in range(4))
        yield child, said
    finally:
        child.kill()
        child.communicate()


def has_ended(pid: int) -> bool:
    """Whether a process ends within some seconds; one that nobody has waited for yet counts as ended."""
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_llama_server_is_preferred_and_listens_only_where_it_is_told(llama, on_path: dict[str, str]) -> None:
    port = unused_port()
    variables = {**on_path, "HOST": "0.0.0.0", "PORT": "1", "MODEL": "other", "OPENAI_API_KEY": "sk-secret"}
    with serving(str(llama.gguf), "--port", str(port), "--context", "128", **variables) as (child, said):
        record = json.loads(Path(on_path["RECORD"]).read_text())
        given = {"--model": str(llama.gguf), "--host": "127.0.0.1", "--port": str(port), "--ctx-size": "128"}
        assert given.items() <= record["given"].items()
        assert (record["env"]["HOST"], record["env"]["PORT"]) == ("127.0.0.1", str(port))
        assert not {"MODEL", "OPENAI_API_KEY"} & record["env"].keys()
        assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in said
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 0
    assert has_ended(record["pid"])


def test_a_server_dies_with_a_program_that_is_killed_and_a_used_port_is_refused(llama, on_path) -> None:
    port = str(unused_port())
    with serving(str(llama.gguf), "--port", port, **on_path) as (child, _):
        record = json.loads(Path(on_path["RECORD"]).read_text())
        said = tapir("serve", str(llama.gguf), "--port", port, **on_path)
        assert (said.returncode, f"cannot listen at 127.0.0.1:{port}" in said.stderr) == (1, True)
        child.kill()
        child.wait()
    assert has_ended(record["pid"])


def test_a_server_that_ends_at_once_is_one_error_and_other_hosts_get_a_warning(tmp_path: Path, llama, on_path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(llama.gguf.read_bytes())
    out = tapir("serve", str(bad), "--port", str(unused_port()), "--host", "0.0.0.0", **on_path)
    assert out.returncode == 1
    assert "WARNING: 0.0.0.0 is not loopback" in out.stderr
    assert "error: failed to load model" in out.stderr
    assert "error: the server ended with exit code 1" in out.stderr
    assert "Traceback" not in out.stderr


def test_wrong_models_are_refused_before_a_server_starts(tmp_path: Path, llama) -> None:
    assert "the model is missing" in refused("serve", str(tmp_path / "none.gguf"))
    assert "a GGUF has no rounds" in refused("serve", str(llama.gguf), "--round", "1", code=2)
    assert "there is no run 'none'" in refused("serve", "none", "--cache", str(tmp_path))


@pytest.mark.parametrize(
    ("host", "url", "loopback"),
    [
        ("127.0.0.1", "http://127.0.0.1:80/v1", True),
        ("localhost", "http://localhost:80/v1", True),
        ("0.0.0.0", "http://127.0.0.1:80/v1", False),
        ("::1", "http://[::1]:80/v1", True),
        ("::", "http://[::1]:80/v1", False),
        ("box.example", "http://box.example:80/v1", False),
    ],
)
def test_base_url_and_loopback(host: str, url: str, loopback: bool) -> None:
    config = ServerConfig(host, 80)
    assert (config.base_url, config.is_loopback) == (url, loopback)


def test_a_round_that_is_an_adapter_is_served_on_its_base(on_path: dict[str, str], monkeypatch) -> None:
    monkeypatch.setenv("PATH", on_path["PATH"])
    source = ModelSource("mine, round 1", Path("base.gguf"), Path("lora.gguf"), 64, 8)
    command = server_command(source, ServerConfig("127.0.0.1", 8080))
    assert command[1:5] == ["--model", "base.gguf", "--lora", "lora.gguf"]
    assert '-d \'{"model": "mine, round 1"' in "\n".join(usage_lines(source, ServerConfig("127.0.0.1", 8080)))


needs_server = pytest.mark.skipif(
    any(find_spec(name) is None for name in SERVER_MODULES), reason="needs llama-cpp-python[server]"
)


@pytest.mark.skipif(all(find_spec(name) for name in SERVER_MODULES), reason="llama-cpp-python[server] is installed")
def test_without_a_server_the_command_that_installs_one_is_named(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    said = refused("serve", str(llama.gguf))
    assert "no server is installed" in said
    assert "-m pip install 'llama-cpp-python[server]==" in said


@needs_server
def test_the_served_answer_is_that_of_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "pocket.gguf"
    export_gguf(find_model_folder("pocket", None), gguf, adapter=None, quant="f16")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "llama_cpp.server" in server_command(gguf_file_source(str(gguf)), ServerConfig("127.0.0.1", 1))
    port, asked = unused_port(), "What is 7 + 8?"
    with serving(str(gguf), "--port", str(port)) as (_, said):
        assert f'OpenAI(base_url="http://127.0.0.1:{port}/v1"' in said
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        reply = client.chat.completions.create(
            model=gguf.name, messages=[{"role": "user", "content": asked}], temperature=0, max_tokens=1024
        )
    expected = tapir("chat", str(gguf), "--prompt", asked).stdout
    assert f"{reply.choices[0].message.content}\n" == expected


def test_llama_cpp_pythons_server_uses_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own default is half of them."""
    monkeypatch.setattr(serve.shutil, "which", lambda name: None)
    monkeypatch.setattr(serve, "SERVER_MODULES", ())
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    words = server_command(ModelSource("m", Path("m.gguf"), None, 512, 64), ServerConfig("127.0.0.1", 8080))
    assert (words[words.index("--n_threads") + 1], words[words.index("--n_threads_batch") + 1]) == ("6", "6")
