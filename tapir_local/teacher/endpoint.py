"""An endpoint of the recipe: its identity in the store's keys, the body it is sent, and a client that reaches it."""

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
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.records import Request
from tapir_local.store import keys

if TYPE_CHECKING:
    import httpx2
    import openai

OPENAI_URL = "https://api.openai.com/v1"
MIN_SECRET_LENGTH = 8  # characters; a shorter key is not a secret
MIN_ISSUED_LENGTH = 16  # characters; a shorter key may be a word that an answer contains too
KEY_WORDS_PATTERN = r"(?i:bearer|(?:api[ _-]?)?key(?: provided)?|token|authorization)"
PLACEHOLDER_KEY = "none"  # for a server that needs no key: the client requires some word
RESERVED_FIELDS = frozenset({"messages", "n", "stream", *keys.FIELDS_NOT_IN_KEY})  # what `extra` may not set
FIRST_SPLIT_PATTERN = re.compile(r"(.*)-00001-of-(\d{5})\.gguf")  # llama.cpp's name for the first part of a split GGUF
POCKET_VERSION = (
    "2d29f0ccf63c"  # change it whenever the embedded teacher replies differently: its calls are asked again
)


def network_transport(endpoint: Endpoint) -> httpx2.AsyncBaseTransport | None:
    """None, which stands for HTTP over the network."""
    return None


def pocket_transport(endpoint: Endpoint) -> httpx2.AsyncBaseTransport:
    """The embedded teacher, in this process, with the same wire format."""
    from tapir_local.pocket.teacher import PocketTransport

    return PocketTransport()


TRANSPORTS: Mapping[str, Callable[[Endpoint], httpx2.AsyncBaseTransport | None]] = {
    "openai": network_transport,
    "pocket": pocket_transport,
}


def endpoint_identity(endpoint: Endpoint) -> str:
    """Who answers, as part of a call's key: an alias, a normalized base URL, the embedded teacher, or a GGUF.

    A GGUF is identified by its bytes, which include its chat template, and by the version of llama.cpp; its name and
    folder do not count.
    """
    if endpoint.alias:
        return endpoint.alias
    if askable_kind(endpoint) == "pocket":
        return f"pocket {POCKET_VERSION}"
    if askable_kind(endpoint) == "gguf":
        return f"gguf {gguf_digest(endpoint)} llama.cpp {version('llama-cpp-python')}"
    return keys.normalize_base_url(endpoint.base_url or OPENAI_URL)


def gguf_path(endpoint: Endpoint) -> Path:
    """The GGUF that answers, with `~` expanded; TapirError if there is no such file."""
    path = Path(endpoint.gguf or "")
    with suppress(RuntimeError):  # an unknown user after the ~: then it is part of the file's name
        path = path.expanduser()
    if not path.is_file():
        raise TapirError(
            f"there is no such GGUF: {path}",
            where=f"{endpoint_role(endpoint)}.gguf",
            fix="Write its full path, or its path relative to the current folder.",
        )
    return path


def endpoint_role(endpoint: Endpoint) -> str:
    """The endpoint's section of the recipe: `teacher` or `judge`."""
    return type(endpoint).__name__.lower()


def gguf_digest(endpoint: Endpoint) -> str:
    """The SHA-256 of a GGUF in hexadecimal; of a split GGUF, that of its parts' digests."""
    path = gguf_path(endpoint)
    split = FIRST_SPLIT_PATTERN.fullmatch(path.name)
    names = [f"{split[1]}-{n:05d}-of-{split[2]}.gguf" for n in range(1, int(split[2]) + 1)] if split else [path.name]
    digests = []
    for part in (path.with_name(name) for name in names):
        try:
            found = part.stat()
            digests.append(sha256_of(part.absolute(), found.st_size, found.st_mtime_ns))
        except OSError as error:
            fix = "Put all parts of a split GGUF into one folder." if split else "Check the file and its permissions."
            what = f"{part} cannot be read: {error.strerror}"
            raise TapirError(what, where=f"{endpoint_role(endpoint)}.gguf", fix=fix) from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@cache
def sha256_of(path: Path, size: int, changed: int) -> str:
    """A file's digest, computed once for each size and time of change: a gigabyte takes a second."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def askable_kind(endpoint: Endpoint) -> str:
    """The endpoint's kind; TapirError for kinds that cannot answer requests."""
    kind, known = str(getattr(endpoint, "kind", "openai")), (*TRANSPORTS, "gguf")
    if kind not in known:
        what = f"a teacher or judge of kind {kind!r} cannot be asked"
        raise TapirError(what, where=f"{endpoint_role(endpoint)}.kind", fix=f"Use one of: {', '.join(known)}.")
    return kind


def request_body(request: Request, endpoint: Endpoint) -> dict[str, Any]:
    """The body as sent. A null in `extra` leaves a parameter out, for models that do not accept it."""
    if askable_kind(endpoint) == "gguf":
        return gguf_request_body(request, endpoint)
    check_extra(endpoint)
    body: dict[str, Any] = {
        "model": endpoint.model or ("pocket" if askable_kind(endpoint) == "pocket" else None),
        "messages": [{"role": turn.role, "content": turn.content} for turn in request.messages],
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
    }
    if endpoint.send_seed:
        body["seed"] = request.draw
    body |= endpoint.extra
    if body["model"] is None:
        role = endpoint_role(endpoint)
        raise TapirError(
            "no model is named", where=f"{role}.model", fix="Write the model's name as the endpoint has it."
        )
    return {name: value for name, value in body.items() if value is not None}


def check_extra(endpoint: Endpoint) -> None:
    """Raise TapirError if `extra` sets a field that the program sets itself."""
    wrong = RESERVED_FIELDS & set(endpoint.extra)
    if wrong:
        role = endpoint_role(endpoint)
        fix = f"Write {role}.stream: true instead." if "stream" in wrong else "Remove it from the recipe."
        raise TapirError(f"{', '.join(sorted(wrong))} cannot be set here", where=f"{role}.extra", fix=fix)


def gguf_request_body(request: Request, endpoint: Endpoint) -> dict[str, Any]:
    """What a GGUF is asked, in the form of an HTTP body. It has no `model`, since the identity names the file."""
    if endpoint.extra:
        role = endpoint_role(endpoint)
        raise TapirError(
            f"a GGUF does not accept {', '.join(sorted(endpoint.extra))} here",
            where=f"{role}.extra",
            fix=f"Remove it: a GGUF accepts only {role}.temperature and {role}.max_tokens.",
        )
    body: dict[str, Any] = {
        "messages": [{"role": turn.role, "content": turn.content} for turn in request.messages],
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
    }
    if request.schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "reply", "schema": request.schema}}
    return body


def read_api_key(endpoint: Endpoint) -> str:
    """The key from its file or the environment; a server on this machine may need none."""
    if askable_kind(endpoint) == "pocket":
        return PLACEHOLDER_KEY
    if endpoint.api_key_file:
        return check_key_characters(read_key_file(Path(endpoint.api_key_file).expanduser()), endpoint)
    found = check_key_characters(os.environ.get(endpoint.api_key_env, "").strip(), endpoint)
    if not found and is_loopback(endpoint.base_url or OPENAI_URL):
        return PLACEHOLDER_KEY
    if not found:
        name = endpoint.api_key_env
        raise TapirError(
            f"no API key for {endpoint_identity(endpoint)}",
            where=f"environment variable {name}",
            fix=f"export {name}=… (any word if the server needs no key), or name a file in "
            f"{endpoint_role(endpoint)}.api_key_file.",
        )
    return found


def check_key_characters(key: str, endpoint: Endpoint) -> str:
    """The key, if an HTTP header can contain it; otherwise TapirError."""
    if not key.isascii() or not key.isprintable():
        fix = "Copy the key again, without typographic quotation marks or line breaks."
        what = "the key contains characters that an HTTP header cannot carry"
        raise TapirError(what, where=describe_key_source(endpoint), fix=fix)
    return key


def describe_key_source(endpoint: Endpoint) -> str:
    """Where the key comes from: `file KEY` or `environment variable NAME`."""
    file = endpoint.api_key_file
    return f"file {file}" if file else f"environment variable {endpoint.api_key_env}"


def read_key_file(file: Path) -> str:
    """The key in a file that contains nothing else."""
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        what = f"the key file cannot be read: {error}"
        raise TapirError(what, where="api_key_file", fix="Correct its path.") from error
    if not key or len(key.split()) > 1:
        fix = "Write the key into it as a single word."
        raise TapirError("the file must contain the key and nothing else", where=str(file), fix=fix)
    return key


def is_loopback(base_url: str) -> bool:
    """Whether a URL points to this machine."""
    try:
        host = urlsplit(base_url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_http_client(endpoint: Endpoint, transport: httpx2.AsyncBaseTransport | None) -> httpx2.AsyncClient:
    """An HTTP client: aiohttp over the network, otherwise `transport`.

    httpx2's own pool compares every connection with every other one for each request; with 64 connections a request
    took ten times the CPU time.
    """
    import httpx2
    import openai

    given = transport or TRANSPORTS[askable_kind(endpoint)](endpoint)
    local, secure = is_loopback(endpoint.base_url or OPENAI_URL), (endpoint.base_url or OPENAI_URL).startswith("https")
    if not given and not local:
        refuse_socks(endpoint)
    settings: dict[str, Any] = {
        "timeout": httpx2.Timeout(endpoint.timeout, connect=min(10.0, endpoint.timeout)),
        "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=endpoint.concurrency),
        "trust_env": not local,  # a proxy cannot reach servers on this machine
        "follow_redirects": True,
    }
    if given:
        return httpx2.AsyncClient(transport=given, **settings)
    with explain_environment_errors():
        if secure and local:
            settings["verify"] = httpx2.create_ssl_context()  # reads SSL_CERT_FILE, as trust_env does
        return openai.DefaultAioHttpClient(**settings)


def refuse_socks(endpoint: Endpoint) -> None:
    """Raise TapirError if the environment names a SOCKS proxy for an endpoint: aiohttp supports only HTTP proxies."""
    parts = urlsplit(endpoint.base_url or OPENAI_URL)
    proxies, host = getproxies(), parts.hostname or ""
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    if proxy.lower().startswith("socks") and not proxy_bypass(host):
        fix = f"Name an HTTP proxy in HTTPS_PROXY or HTTP_PROXY, or bypass the proxy: export NO_PROXY={host}"
        what = "the environment names a SOCKS proxy (ALL_PROXY), which is not supported"
        raise TapirError(what, where=host, fix=fix)


@contextmanager
def explain_environment_errors() -> Iterator[None]:
    """Raise TapirError for a proxy or a certificate file in the environment that cannot be used."""
    import httpx2

    try:
        yield
    except (OSError, ssl.SSLError) as error:
        fix = "Check that SSL_CERT_FILE, or SSL_CERT_DIR, names readable certificates in PEM format."
        raise TapirError(f"the trusted certificates cannot be read: {error}", where="SSL_CERT_FILE", fix=fix) from error
    except (ValueError, httpx2.InvalidURL) as error:
        what = f"the proxy named in the environment cannot be used: {error}"
        fix = "Write it as http://host:port in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY."
        raise TapirError(what, where="proxy", fix=fix) from error


def open_openai_client(endpoint: Endpoint, http: httpx2.AsyncClient) -> openai.AsyncOpenAI:
    """openai's client for the endpoint. It never retries: retries are decided by this program."""
    import httpx2
    import openai

    base_url, key = endpoint.base_url or OPENAI_URL, read_api_key(endpoint)
    try:
        return openai.AsyncOpenAI(api_key=key, base_url=base_url, http_client=http, max_retries=0)
    except (ValueError, httpx2.InvalidURL) as error:
        fix = "Write it as http://host:port/v1"
        raise TapirError(f"not a URL: {error}", where=f"{endpoint_role(endpoint)}.base_url", fix=fix) from error


def chat_url_and_headers(client: openai.AsyncOpenAI) -> tuple[httpx2.URL, dict[str, str]]:
    """The URL and headers of chat requests, computed once: openai's client takes a millisecond for each request.

    Names are in lower case, so that none is there twice: the HTTP client would join the values with a comma, and
    FastAPI and vLLM refuse `application/json, application/json` as a type that is not JSON.
    """
    url = client.base_url
    headers = {"content-type": "application/json", **client.default_headers, **client.auth_headers}
    known = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
    return url.copy_with(path=f"{url.path.rstrip('/')}/chat/completions"), known


def unencrypted_key_warning(endpoint: Endpoint, key: str) -> str:
    """A warning if the key is sent over a network unencrypted; "" if it is not, or is too short to be a secret."""
    parts = urlsplit(endpoint.base_url or OPENAI_URL)
    if parts.scheme != "http" or is_loopback(endpoint.base_url or OPENAI_URL) or len(key) < MIN_SECRET_LENGTH:
        return ""
    return (
        f"the key in the {describe_key_source(endpoint)} is sent unencrypted over the network to {parts.hostname}: "
        f"write https:// in {endpoint_role(endpoint)}.base_url, or use a short word if the server needs no key"
    )


def mask_key(text: str, client: openai.AsyncOpenAI) -> str:
    """A server's message with our key masked, in case the server repeats it.

    A key of fewer than MIN_SECRET_LENGTH characters is not a secret but any word, as servers on this machine accept it;
    it is masked only where the words around it say that it is a key.
    """
    key = client.api_key
    if key == PLACEHOLDER_KEY or not key:
        return text
    if len(key) >= MIN_SECRET_LENGTH:
        return text.replace(key, "***")
    return re.sub(rf"({KEY_WORDS_PATTERN}[^A-Za-z0-9]{{1,4}}){re.escape(key)}(?![A-Za-z0-9])", r"\1***", text)


def mask_key_in_body(body: bytes, client: openai.AsyncOpenAI) -> bytes:
    """A body with our key masked."""
    return mask_key(body.decode(errors="surrogateescape"), client).encode(errors="surrogateescape")


def mask_key_in_answer(raw: bytes, client: openai.AsyncOpenAI) -> bytes:
    """An answer with our key masked, if the key was issued by a machine: it is long and has a digit.

    A server in debugging repeats a request's headers. A key such as `any-word` stays: it may be part of an answer.
    """
    key = client.api_key
    issued = len(key) >= MIN_ISSUED_LENGTH and any(letter.isdigit() for letter in key)
    return raw.replace(key.encode(), b"***") if issued and key.encode() in raw else raw
