"""Send one HTTP request and read its reply, whole or streamed; classify what went wrong if none came."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from tapir_local.recipe.endpoints import Endpoint
from tapir_local.store.reply import parse_reply_json, replace_lone_surrogates
from tapir_local.teacher.endpoint import OPENAI_URL, endpoint_role
from tapir_local.teacher.refusals import RERUN_CLAUSE, UNREADABLE_TRIES, RequestFailure

if TYPE_CHECKING:
    import httpx2

MAX_REPLY_BYTES = 32 << 20  # after decompression; the longest replies are below a megabyte
MAX_REDIRECTS = 3
ENCODING_HEADERS = frozenset({"content-encoding", "content-length", "transfer-encoding"})  # describe the body as sent
CANNOT_CONNECT_PATTERN = re.compile(r"Cannot connect to host (\S+?)(?::\d+)? ssl:\S+ \[(.*)\]\Z", re.DOTALL)
UNTRUSTED_CERTIFICATE_PATTERN = re.compile(r"certificate verify failed: (.*?)(?:\s*\(_ssl|'|\Z)", re.DOTALL)
EVENT_PREFIXES = (b"data:", b"event:", b"id:", b"retry:", b":")


class ReplyTooLarge(Exception):
    """A reply of more than MAX_REPLY_BYTES."""


def transport_errors() -> tuple[type[Exception], ...]:
    """The exceptions raised when a request brings no valid HTTP reply."""
    import aiohttp
    import httpx2

    from_http = (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError)
    invalid = (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, ValueError)
    return (TimeoutError, OSError, ReplyTooLarge, *from_http, *invalid)


async def post_request(http: httpx2.AsyncClient, request: httpx2.Request) -> httpx2.Response:
    """The reply to a request, with its body. Follows only redirects that keep the method and the key."""
    reply = await post_without_redirects(http, request)
    for _ in range(MAX_REDIRECTS):
        following = reply.next_request
        if reply.status_code not in (307, 308) or not following or "authorization" not in following.headers:
            break
        reply = await post_without_redirects(http, following)
    return reply


async def post_without_redirects(http: httpx2.AsyncClient, request: httpx2.Request) -> httpx2.Response:
    """The reply to one request; ReplyTooLarge if its body exceeds MAX_REPLY_BYTES."""
    import httpx2

    stream = await http.send(request, stream=True, follow_redirects=False)
    try:
        body = bytearray()
        async for chunk in stream.aiter_bytes():
            body += chunk
            if len(body) > MAX_REPLY_BYTES:
                raise ReplyTooLarge
    finally:
        await stream.aclose()
    headers = [(name, value) for name, value in stream.headers.multi_items() if name.lower() not in ENCODING_HEADERS]
    reply = httpx2.Response(stream.status_code, headers=headers, content=bytes(body), request=request)
    reply.next_request = stream.next_request
    return reply


def classify_transport_error(error: Exception, endpoint: Endpoint, reached: bool, tries: int) -> RequestFailure:
    """What it means that no reply came.

    A server that was never reached, or does not speak HTTP, is given up after two tries. `reached` says whether the
    server has ever replied, `tries` how often this request was tried before.
    """
    import aiohttp
    import httpx2

    cause = error.__cause__ or error
    timeouts = (TimeoutError, httpx2.ReadTimeout, httpx2.WriteTimeout, httpx2.PoolTimeout)
    skip: dict[str, Any] = {"names_cause": False, "when_exhausted": "skip_row"}
    if isinstance(error, ReplyTooLarge):
        why = f"the reply is larger than {MAX_REPLY_BYTES >> 20} MiB"
        return RequestFailure("retry", why, finish="", max_tries=UNREADABLE_TRIES, **skip)
    if isinstance(error, timeouts) and not isinstance(cause, aiohttp.ServerConnectionError):
        fix = f"Raise {endpoint_role(endpoint)}.timeout, and {RERUN_CLAUSE}"
        return RequestFailure("retry", f"no answer within {endpoint.timeout:g} s", fix=fix, **skip)
    why, fix = describe_transport_error(cause, endpoint)
    invalid = isinstance(cause, aiohttp.ClientResponseError | aiohttp.http_exceptions.HttpProcessingError)
    unreached = invalid or isinstance(cause, aiohttp.ClientConnectorError | httpx2.ConnectError)
    return RequestFailure("stop" if unreached and not reached and tries > 0 else "retry", why, fix=fix)


def describe_transport_error(error: BaseException, endpoint: Endpoint) -> tuple[str, str]:
    """(what went wrong, what to do) if no connection was made, or what came over it is not HTTP."""
    import aiohttp

    place = urlsplit(endpoint.base_url or OPENAI_URL).netloc.rpartition("@")[2]
    named, text = CANNOT_CONNECT_PATTERN.match(str(error)), str(error) or type(error).__name__
    text = named[2] if named else text
    if found := UNTRUSTED_CERTIFICATE_PATTERN.search(text):
        fix = f"Name the certificate of the issuing authority: export SSL_CERT_FILE=/path/to/ca.pem, and {RERUN_CLAUSE}"
        return f"the certificate of {place} is not trusted: {found[1].strip()}", fix
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER" in text or "UNKNOWN_PROTOCOL" in text:
        fix = f"Write http:// in {endpoint_role(endpoint)}.base_url, and {RERUN_CLAUSE}"
        return f"{place} does not speak https", fix
    if isinstance(error, aiohttp.ClientProxyConnectionError | aiohttp.ClientHttpProxyError):
        reason = getattr(error, "message", "") or "nothing listens there"
        host = place.rpartition(":")[0] or place
        fix = f"Correct HTTPS_PROXY or HTTP_PROXY, or bypass the proxy: export NO_PROXY={host}"
        return f"the proxy named in the environment cannot be used ({reason})", fix
    fix = f"Start the server or correct {endpoint_role(endpoint)}.base_url, and {RERUN_CLAUSE}"
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.http_exceptions.HttpProcessingError):
        reason = " ".join(str(getattr(error, "message", "") or error).split())[:120]
        return f"the reply of {place} is not HTTP, or is damaged ({reason})", fix
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"no connection: there is no host {place} ({text})", fix
    if "Connect call failed" in text or "refused" in text:
        return f"no connection: nothing listens at {place}", fix
    if "Can not write request body" in text:  # aiohttp's words for a connection that ends while a request is sent
        return f"{place} closed the connection before it had read the request", fix
    return f"no connection to {place} ({text})", fix


def body_for_stream(body: Mapping[str, Any], usage: bool) -> dict[str, Any]:
    """The body of a request for a streamed reply; with `usage`, one that ends with the token counts."""
    streaming = {**body, "stream": True}
    return {**streaming, "stream_options": {"include_usage": True}} if usage else streaming


def is_event_stream(raw: bytes) -> bool:
    """Whether a body is a stream of events; an endpoint may send a whole completion although a stream was requested."""
    return raw.lstrip(b"\xef\xbb\xbf\r\n").startswith(EVENT_PREFIXES)


def join_stream(raw: bytes) -> bytes:
    """The completion, as JSON, that a stream contains, or its error. ValueError if the stream was cut."""
    pieces: dict[str, list[Any]] = {}
    fields: dict[str, Any] = {}
    choice: dict[str, Any] = {"index": 0, "finish_reason": None}
    ended = False
    for data in read_stream_events(raw):
        if data.strip() == "[DONE]":
            ended = True
            break
        chunk = parse_reply_json(data.encode(errors="surrogatepass"))
        if not isinstance(chunk, dict):
            raise ValueError(f"not a chunk of a stream: {data[:80]!r}")
        if chunk.get("error"):
            return orjson.dumps({"error": replace_half_surrogates(chunk["error"])})
        fields |= {name: item for name, item in chunk.items() if name not in ("choices", "object") and item is not None}
        for part in chunk.get("choices") or ():
            add_delta(part, pieces, choice)
    if not ended and choice["finish_reason"] is None:
        raise ValueError("the stream ended before the reply was complete")
    choice["message"] = {"role": "assistant", **{name: join_pieces(items) for name, items in pieces.items()}}
    choices = [choice] if pieces or choice["finish_reason"] else []
    return orjson.dumps(replace_half_surrogates({**fields, "object": "chat.completion", "choices": choices}))


def read_stream_events(raw: bytes) -> Iterator[str]:
    """The data of each event of a stream."""
    import httpx2

    headers, request = {"content-type": "text/event-stream; charset=utf-8"}, httpx2.Request("POST", "http://stream")
    response = httpx2.Response(200, headers=headers, content=raw, request=request)
    for event in httpx2.EventSource(response, max_event_size=None):
        if event.data:
            yield event.data


def add_delta(part: Any, pieces: dict[str, list[Any]], choice: dict[str, Any]) -> None:
    """Add what a chunk contributes to the first choice: pieces of its message's fields, and the finish reason."""
    if not isinstance(part, dict) or part.get("index") not in (0, None):
        return
    delta = part.get("delta") or part.get("message") or {}
    for name, item in delta.items() if isinstance(delta, dict) else ():
        if item is not None and name != "role":
            pieces.setdefault(name, []).append(item)
    if part.get("finish_reason") is not None:
        choice["finish_reason"] = part["finish_reason"]


def join_pieces(items: list[Any]) -> Any:
    """The pieces of a field as one value: texts and lists are concatenated; of anything else the last is kept."""
    if all(isinstance(item, str) for item in items):
        return "".join(items)
    if all(isinstance(item, list) for item in items):
        return [part for item in items for part in item]
    return items[-1]


def replace_half_surrogates(value: Any) -> Any:
    """A JSON value with U+FFFD for each unpaired surrogate; pairs that were split over two chunks are joined before."""
    if isinstance(value, str):
        return replace_lone_surrogates(value)
    if isinstance(value, dict):
        return {replace_half_surrogates(name): replace_half_surrogates(item) for name, item in value.items()}
    return [replace_half_surrogates(item) for item in value] if isinstance(value, list) else value
