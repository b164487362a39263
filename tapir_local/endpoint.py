"""An endpoint as the recipe has it: its identity for the key, the body it is sent, a client that reaches it."""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tapir_local import keys
from tapir_local.errors import TapirError
from tapir_local.recipe import Endpoint
from tapir_local.records import Request

if TYPE_CHECKING:
    import httpx
    import openai

VENDOR = "https://api.openai.com/v1"
NO_KEY = "none"  # sent to a server that wants none: the client insists on some word
OURS = frozenset({"messages", "n", "stream", *keys.NOT_ASKED})  # what `extra` may not set


def over_the_network(endpoint: Endpoint) -> httpx.AsyncBaseTransport | None:
    """None: httpx's own transport."""
    return None


def in_this_process(endpoint: Endpoint) -> httpx.AsyncBaseTransport:
    """The embedded teacher, behind the same wire format."""
    from tapir_local.pocket import PocketTransport

    return PocketTransport()


SENDERS: Mapping[str, Callable[[Endpoint], httpx.AsyncBaseTransport | None]] = {
    "openai": over_the_network,
    "pocket": in_this_process,
}


def identity_of(endpoint: Endpoint) -> str:
    """Who answers, for the key: the recipe's alias, the base URL in its one spelling, or the embedded teacher."""
    if endpoint.alias:
        return endpoint.alias
    if kind_of(endpoint) == "pocket":
        return f"pocket {pocket_version()}"
    return keys.address(endpoint.base_url or VENDOR)


@cache
def pocket_version() -> str:
    """A digest of the embedded teacher's source: changed, it is another teacher, and asking it again costs nothing."""
    files = sorted(Path(__file__).parent.glob("pocket*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def kind_of(endpoint: Endpoint) -> str:
    """The endpoint's kind; TapirError for those that send nothing themselves."""
    kind = str(getattr(endpoint, "kind", "openai"))
    if kind not in SENDERS:
        raise TapirError(
            f"a teacher or judge of kind {kind!r} cannot be asked", fix=f"Kinds that can: {', '.join(SENDERS)}."
        )
    return kind


def body_of(request: Request, endpoint: Endpoint) -> dict[str, Any]:
    """The body as sent. A null in `extra` leaves a parameter out, for models that do not take it."""
    wrong = OURS & set(endpoint.extra)
    if wrong:
        raise TapirError(
            f"{', '.join(sorted(wrong))} cannot be set here", where="extra", fix="Leave it out of the recipe."
        )
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


def api_key(endpoint: Endpoint) -> str:
    """The key from the environment; a server on this machine may do without."""
    found = os.environ.get(endpoint.api_key_env, "")
    if kind_of(endpoint) == "pocket" or (not found and is_loopback(endpoint.base_url or VENDOR)):
        return "none"
    if not found:
        name = endpoint.api_key_env
        raise TapirError(
            f"no key for {identity_of(endpoint)}",
            where=name,
            fix=f"export {name}=… (any word, if the server wants no key)",
        )
    return found


def is_loopback(base_url: str) -> bool:
    """Whether a URL is of this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def client_of(endpoint: Endpoint, transport: httpx.AsyncBaseTransport | None) -> openai.AsyncOpenAI:
    """One client for all requests. It never retries: what is tried again, and when, is decided here."""
    import httpx
    import openai

    base_url = endpoint.base_url or VENDOR
    key = api_key(endpoint)
    http: Any = (
        httpx.AsyncClient(  # openai 3 takes httpx's client as well as its own httpx2's, though its types do not say so
            transport=transport or SENDERS[kind_of(endpoint)](endpoint),
            timeout=httpx.Timeout(endpoint.timeout, connect=min(10.0, endpoint.timeout)),
            limits=httpx.Limits(max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency),
            trust_env=not is_loopback(base_url),  # a proxy does not know this machine's own servers
        )
    )
    return openai.AsyncOpenAI(api_key=key, base_url=base_url, http_client=http, max_retries=0)


def hidden(text: str, client: openai.AsyncOpenAI) -> str:
    """A server's words without our key, should it repeat it."""
    key = client.api_key
    return text if key == NO_KEY else text.replace(key, "***")


def hidden_in(body: bytes, client: openai.AsyncOpenAI) -> bytes:
    """The same for a body."""
    return hidden(body.decode(errors="surrogateescape"), client).encode(errors="surrogateescape")
