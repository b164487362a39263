"""An endpoint as the recipe has it: its identity for the key, the body it is sent, a client that reaches it."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from tapir_local.errors import TapirError
from tapir_local.files import file_sha256
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.records import Request
from tapir_local.store import keys

if TYPE_CHECKING:
    import httpx2
    import openai

VENDOR = "https://api.openai.com/v1"
SECRET = 8  # letters that a key has at least
KEY_WORDS = r"(?i:bearer|(?:api[ _-]?)?key(?: provided)?|token|authorization)"
NO_KEY = "none"  # sent to a server that wants none: the client insists on some word
OURS = frozenset({"messages", "n", "stream", *keys.NOT_ASKED})  # what `extra` may not set
FIRST_PART = re.compile(r"(.*)-00001-of-(\d{5})\.gguf")  # how llama.cpp names the parts of a split GGUF


def over_the_network(endpoint: Endpoint) -> httpx2.AsyncBaseTransport | None:
    """None: httpx2's own transport."""
    return None


def in_this_process(endpoint: Endpoint) -> httpx2.AsyncBaseTransport:
    """The embedded teacher, behind the same wire format."""
    from tapir_local.pocket.teacher import PocketTransport

    return PocketTransport()


SENDERS: Mapping[str, Callable[[Endpoint], httpx2.AsyncBaseTransport | None]] = {
    "openai": over_the_network,
    "pocket": in_this_process,
}


def identity_of(endpoint: Endpoint) -> str:
    """Who answers, for the key: the recipe's alias, the base URL in its one spelling, the embedded teacher, or a GGUF.

    A GGUF is known by its bytes, not by its name or place; its chat template is among them. So is what runs it.
    """
    if endpoint.alias:
        return endpoint.alias
    if kind_of(endpoint) == "pocket":
        return f"pocket {pocket_version()}"
    if kind_of(endpoint) == "gguf":
        return f"gguf {digest_of(endpoint)} llama.cpp {version('llama-cpp-python')}"
    return keys.address(endpoint.base_url or VENDOR)


@cache
def pocket_version() -> str:
    """A digest of the embedded teacher's source: changed, it is another teacher, and asking it again costs nothing."""
    files = sorted((Path(__file__).parents[1] / "pocket").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def gguf_of(endpoint: Endpoint) -> Path:
    """The GGUF that answers, `~` expanded; TapirError where there is no such file."""
    path = Path(endpoint.gguf or "")
    with suppress(RuntimeError):  # ~nobody: then it is a file of that name
        path = path.expanduser()
    if not path.is_file():
        raise TapirError(
            f"there is no such GGUF: {path}",
            where=f"{role_of(endpoint)}.gguf",
            fix="Name the file by its path from the current folder, or by its full path.",
        )
    return path


def role_of(endpoint: Endpoint) -> str:
    """The endpoint's section of the recipe."""
    return type(endpoint).__name__.lower()


def digest_of(endpoint: Endpoint) -> str:
    """The SHA-256 of a GGUF in hexadecimal digits; of one in parts, that of its parts' digests."""
    path = gguf_of(endpoint)
    split = FIRST_PART.fullmatch(path.name)
    names = [f"{split[1]}-{n:05d}-of-{split[2]}.gguf" for n in range(1, int(split[2]) + 1)] if split else [path.name]
    digests = []
    for part in (path.with_name(name) for name in names):
        try:
            found = part.stat()
            digests.append(sha256_of(part.absolute(), found.st_size, found.st_mtime_ns))
        except OSError as error:
            fix = "A split GGUF needs all its parts in one folder." if split else "See that it can be read."
            what = f"{part} cannot be read: {error.strerror}"
            raise TapirError(what, where=f"{role_of(endpoint)}.gguf", fix=fix) from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@cache
def sha256_of(path: Path, size: int, changed: int) -> str:
    """A file's digest, taken once for every size and time of change: a gigabyte takes a second."""
    return file_sha256(path)


def kind_of(endpoint: Endpoint) -> str:
    """The endpoint's kind; TapirError for those that answer nothing themselves."""
    kind, known = str(getattr(endpoint, "kind", "openai")), (*SENDERS, "gguf")
    if kind not in known:
        raise TapirError(
            f"a teacher or judge of kind {kind!r} cannot be asked", fix=f"Kinds that can: {', '.join(known)}."
        )
    return kind


def body_of(request: Request, endpoint: Endpoint) -> dict[str, Any]:
    """The body as sent. A null in `extra` leaves a parameter out, for models that do not take it."""
    if kind_of(endpoint) == "gguf":
        return body_here(request, endpoint)
    wrong = OURS & set(endpoint.extra)
    if wrong:
        fix = f"Write {role_of(endpoint)}.stream: true instead." if "stream" in wrong else "Leave it out of the recipe."
        raise TapirError(f"{', '.join(sorted(wrong))} cannot be set here", where="extra", fix=fix)
    body: dict[str, Any] = {
        "model": endpoint.model or ("pocket" if kind_of(endpoint) == "pocket" else None),
        "messages": [{"role": turn.role, "content": turn.content} for turn in request.messages],
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
    }
    if endpoint.send_seed:
        body["seed"] = request.draw
    body |= endpoint.extra
    if body["model"] is None:
        raise TapirError(
            "no model is named", where="teacher.model", fix="Give the model's name as the endpoint knows it."
        )
    return {name: value for name, value in body.items() if value is not None}


def body_here(request: Request, endpoint: Endpoint) -> dict[str, Any]:
    """What a GGUF is asked, as the same request would be sent; it has no `model`, for the identity says which file."""
    if endpoint.extra:
        role = role_of(endpoint)
        raise TapirError(
            f"a GGUF takes no {', '.join(sorted(endpoint.extra))} here",
            where=f"{role}.extra",
            fix=f"Leave it out: of a request's parameters there are {role}.temperature and {role}.max_tokens.",
        )
    body: dict[str, Any] = {
        "messages": [{"role": turn.role, "content": turn.content} for turn in request.messages],
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
    }
    if request.schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "reply", "schema": request.schema}}
    return body


def api_key(endpoint: Endpoint) -> str:
    """The key from its file or the environment; a server on this machine may do without."""
    if kind_of(endpoint) == "pocket":
        return NO_KEY
    if endpoint.api_key_file:
        return sendable(key_in(Path(endpoint.api_key_file).expanduser()), endpoint)
    found = sendable(os.environ.get(endpoint.api_key_env, "").strip(), endpoint)
    if not found and is_loopback(endpoint.base_url or VENDOR):
        return NO_KEY
    if not found:
        name = endpoint.api_key_env
        raise TapirError(
            f"no key for {identity_of(endpoint)}",
            where=name,
            fix=f"export {name}=… (any word, if the server wants no key), or name a file in api_key_file.",
        )
    return found


def sendable(key: str, endpoint: Endpoint) -> str:
    """A key that an HTTP header can carry; TapirError for others."""
    if not key.isascii() or not key.isprintable():
        fix = "Copy the key again, without quotation marks of a text program or line breaks."
        raise TapirError("the key has letters that no HTTP header can carry", where=key_place(endpoint), fix=fix)
    return key


def key_place(endpoint: Endpoint) -> str:
    """Where the key comes from, for people."""
    file = endpoint.api_key_file
    return f"file {file}" if file else f"environment variable {endpoint.api_key_env}"


def key_in(file: Path) -> str:
    """The key that a file holds and nothing else."""
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TapirError(
            f"the key's file cannot be read: {error}", where="api_key_file", fix="Mend its path."
        ) from error
    if not key or len(key.split()) > 1:
        raise TapirError("the file should hold the key and nothing else", where=str(file))
    return key


def is_loopback(base_url: str) -> bool:
    """Whether a URL is of this machine."""
    try:
        host = urlsplit(base_url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def http_of(endpoint: Endpoint, transport: httpx2.AsyncBaseTransport | None) -> httpx2.AsyncClient:
    """What carries the requests: over the network HTTP by aiohttp, else `transport`.

    httpx2's own pool looks at each of its connections, and there at each again, for every request; with 64 of them a
    request took ten times the processor's time.
    """
    import httpx2
    import openai

    given = transport or SENDERS[kind_of(endpoint)](endpoint)
    local, secure = is_loopback(endpoint.base_url or VENDOR), (endpoint.base_url or VENDOR).startswith("https")
    if not given and not local:
        refuse_socks(endpoint)
    settings: dict[str, Any] = {
        "timeout": httpx2.Timeout(endpoint.timeout, connect=min(10.0, endpoint.timeout)),
        "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=endpoint.concurrency),
        "trust_env": not local,  # a proxy knows nothing of this machine's servers
        "follow_redirects": True,
    }
    if given:
        return httpx2.AsyncClient(transport=given, **settings)
    with told_of_environment():
        if secure and local:
            settings["verify"] = httpx2.create_ssl_context()  # by SSL_CERT_FILE, as it is done where trust_env is set
        return openai.DefaultAioHttpClient(**settings)


def refuse_socks(endpoint: Endpoint) -> None:
    """TapirError where the environment names a SOCKS proxy for an endpoint: aiohttp knows only those of HTTP."""
    parts = urlsplit(endpoint.base_url or VENDOR)
    proxies, host = getproxies(), parts.hostname or ""
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    if proxy.lower().startswith("socks") and not proxy_bypass(host):
        fix = f"Name an HTTP proxy in HTTPS_PROXY or HTTP_PROXY, or reach {host} without one: export NO_PROXY={host}"
        raise TapirError("the environment names a SOCKS proxy (ALL_PROXY), which cannot be used", where=host, fix=fix)


@contextmanager
def told_of_environment() -> Iterator[None]:
    """TapirErrors for a proxy or a file of certificates in the environment that cannot be used."""
    import httpx2

    try:
        yield
    except (OSError, ssl.SSLError) as error:
        fix = "See that SSL_CERT_FILE, or SSL_CERT_DIR, names certificates in PEM form that can be read."
        raise TapirError(f"the trusted certificates cannot be read: {error}", where="SSL_CERT_FILE", fix=fix) from error
    except (ValueError, httpx2.InvalidURL) as error:
        fix = "Write it as http://host:port in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY."
        raise TapirError(
            f"the environment names a proxy that cannot be used: {error}", where="proxy", fix=fix
        ) from error


def client_of(endpoint: Endpoint, http: httpx2.AsyncClient) -> openai.AsyncOpenAI:
    """The endpoint as openai's client knows it. It never retries: what is tried again, and when, is decided here."""
    import httpx2
    import openai

    base_url, key = endpoint.base_url or VENDOR, api_key(endpoint)
    try:
        return openai.AsyncOpenAI(api_key=key, base_url=base_url, http_client=http, max_retries=0)
    except (ValueError, httpx2.InvalidURL) as error:
        fix = "Write it as http://host:port/v1"
        raise TapirError(f"not a URL: {error}", where=f"{role_of(endpoint)}.base_url", fix=fix) from error


def chat_of(client: openai.AsyncOpenAI) -> tuple[httpx2.URL, dict[str, str]]:
    """Where chat requests go and under which headers, once for all: openai's client takes a millisecond for each."""
    url = client.base_url
    headers = {"content-type": "application/json", **client.default_headers, **client.auth_headers}
    known = {name: value for name, value in headers.items() if isinstance(value, str)}
    return url.copy_with(path=f"{url.path.rstrip('/')}/chat/completions"), known


def in_the_clear(endpoint: Endpoint, key: str) -> str:
    """A warning where the key goes over a network unencrypted; "" where it does not, or is too short to be a secret."""
    parts = urlsplit(endpoint.base_url or VENDOR)
    if parts.scheme != "http" or is_loopback(endpoint.base_url or VENDOR) or len(key) < SECRET:
        return ""
    return (
        f"the key in the {key_place(endpoint)} goes unencrypted over the network to {parts.hostname}: "
        f"write https:// in {role_of(endpoint)}.base_url, or give a server that wants no key a short word"
    )


def hidden(text: str, client: openai.AsyncOpenAI) -> str:
    """A server's words without our key, should it repeat it.

    A key of fewer than SECRET letters is no secret but any word, as servers on this machine take it; it is masked only
    where the words around it say that it is a key.
    """
    key = client.api_key
    if key == NO_KEY or not key:
        return text
    if len(key) >= SECRET:
        return text.replace(key, "***")
    return re.sub(rf"({KEY_WORDS}[^A-Za-z0-9]{{1,4}}){re.escape(key)}(?![A-Za-z0-9])", r"\1***", text)


def hidden_in(body: bytes, client: openai.AsyncOpenAI) -> bytes:
    """The same for a body."""
    return hidden(body.decode(errors="surrogateescape"), client).encode(errors="surrogateescape")
