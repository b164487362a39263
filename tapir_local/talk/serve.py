"""Serve a student over HTTP with llama.cpp's OpenAI-compatible server: `llama-server`, or llama-cpp-python's own."""

import ctypes
import ipaddress
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from tapir_local.errors import TapirError
from tapir_local.inference.lib import thread_count
from tapir_local.process import PR_SET_PDEATHSIG, child_environment, stop_child
from tapir_local.talk.models import ModelSource

START_SECONDS = 600.0  # for a server to load its model: tens of gigabytes from a slow disk
POLL_SECONDS = 0.2
# The modules that `pip install 'llama-cpp-python[server]'` adds to llama-cpp-python.
SERVER_MODULES = ("uvicorn", "fastapi", "pydantic_settings", "sse_starlette", "starlette_context")
# What this server needs to give the greedy answers of `chat` and of the evaluation. Its default for a request is
# repeat_penalty 1.1: here it applies to the last 0 tokens. Without flash attention, which `chat` uses, sums are rounded
# differently: SmolLM2-135M then took another token after 60 of 100.
AS_EVALUATED = ("--last_n_tokens_size", "0", "--flash_attn", "true")
# Environment variables by which llama-cpp-python's server would ignore its options.
SERVER_VARIABLES = ("HOST", "PORT", "MODEL", "CONFIG_FILE")


@dataclass(frozen=True)
class ServerConfig:
    """Where a server listens."""

    host: str
    port: int

    @property
    def base_url(self) -> str:
        """The URL for clients on this machine; 0.0.0.0 and :: listen there too."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def server_command(source: ModelSource, config: ServerConfig) -> list[str]:
    """The command that serves a model: `llama-server` if it is on PATH, else llama-cpp-python's server.

    Both use the chat template in the GGUF. TapirError if neither is installed.
    """
    where = ["--host", config.host, "--port", str(config.port)]
    if program := shutil.which("llama-server"):
        adapter = ["--lora", str(source.adapter)] if source.adapter else []
        context = ["--ctx-size", str(source.context), "--alias", source.name]
        return [program, "--model", str(source.gguf), *adapter, *context, *where, "--jinja"]
    if missing := [name for name in SERVER_MODULES if find_spec(name) is None]:
        raise TapirError(
            f"no server is installed: `llama-server` is not on PATH, and llama-cpp-python's server needs {missing[0]}",
            fix=f"{sys.executable} -m pip install 'llama-cpp-python[server]=={llama_version()}', or install llama.cpp.",
        )
    adapter = ["--lora_path", str(source.adapter)] if source.adapter else []
    context = ["--n_ctx", str(source.context), "--model_alias", source.name, "--verbose", "false"]
    threads = str(thread_count())  # its own default is half of the processors
    context += ["--n_threads", threads, "--n_threads_batch", threads]
    command = [sys.executable, "-P", "-m", "llama_cpp.server", "--model", str(source.gguf), "--n_gpu_layers", "-1"]
    return [*command, *AS_EVALUATED, *adapter, *context, *where]


def llama_version() -> str:
    """The version of llama-cpp-python, so that its server is installed without another version of it."""
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return "0.3.36"


def server_environment(config: ServerConfig) -> Mapping[str, str]:
    """A child's environment, without the variables that would override the server's options."""
    kept = {name: value for name, value in child_environment().items() if name not in SERVER_VARIABLES}
    return {**kept, "HOST": config.host, "PORT": str(config.port)}


def check_address(config: ServerConfig) -> None:
    """TapirError if another program listens at the address, or this machine does not have it."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.socket(family) as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind((config.host, config.port))
    except OSError as error:
        raise TapirError(
            f"cannot listen at {config.host}:{config.port}: {error.strerror or error}",
            fix="Choose another --port, or end the program that uses this one.",
        ) from error


@contextmanager
def open_server(source: ModelSource, config: ServerConfig) -> Iterator["subprocess.Popen[bytes]"]:
    """A server that answers; it is stopped at the end of the block, and dies if this process does.

    What it prints goes to standard error. TapirError if it ends before it answers.
    """
    command = server_command(source, config)
    check_address(config)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,
        env=server_environment(config),
        start_new_session=True,  # Ctrl-C reaches only this process, which stops the server
        preexec_fn=end_with_parent_process,
    )
    try:
        wait_until_it_answers(child, config)
        yield child
    finally:
        stop_child(child)


def end_with_parent_process() -> None:
    """In a child before it starts its program: have the kernel end it when its parent dies, also by SIGKILL."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def wait_until_it_answers(child: "subprocess.Popen[bytes]", config: ServerConfig) -> None:
    """Wait until the server lists its model; TapirError if it ends before, or is not ready in time."""
    import httpx2

    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if child.poll() is not None:
            raise server_ended(child.returncode)
        with suppress(httpx2.HTTPError):
            # Not through a proxy: the server is on this machine. 401 is an answer too.
            if httpx2.get(f"{config.base_url}/models", trust_env=False, timeout=5).status_code in (200, 401):
                return
        time.sleep(POLL_SECONDS)
    raise TapirError(f"the server does not answer after {START_SECONDS:,.0f} s", where=config.base_url)


def server_ended(code: int) -> TapirError:
    """The error for a server that ended by itself."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return TapirError(
        f"the server {how}",
        fix="Its own messages are above. If memory ran out, serve a smaller GGUF or lower --context.",
    )


def usage_lines(source: ModelSource, config: ServerConfig) -> list[str]:
    """How to use a running server: its base_url, a curl command, the lines for the openai package."""
    model, url = source.name, config.base_url
    asked = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    return [
        f"{model} answers at {url} until you press Ctrl-C.",
        f"  curl {url}/chat/completions -H 'Content-Type: application/json' \\",
        f"    -d {shlex.quote(json.dumps(asked, ensure_ascii=False))}",
        f'  OpenAI(base_url="{url}", api_key="none").chat.completions.create(model={model!r}, messages=…)',
    ]


def serve_until_stopped(child: "subprocess.Popen[bytes]") -> None:
    """Wait for the server; TapirError if it ends by itself."""
    raise server_ended(child.wait())
