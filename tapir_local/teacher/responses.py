"""One HTTP request and its whole reply, within bounds, and what it means when there is none."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tapir_local.recipe.endpoints import Endpoint
from tapir_local.teacher.endpoint import OPENAI_URL, endpoint_role
from tapir_local.teacher.refusals import RERUN_CLAUSE, UNREADABLE_TRIES, RequestFailure

if TYPE_CHECKING:
    import httpx2

MAX_REPLY_BYTES = 32 << 20  # of a reply, unpacked: the longest are below a megabyte
MAX_REDIRECTS = 3  # redirections that are followed
ENCODING_HEADERS = frozenset(
    {"content-encoding", "content-length", "transfer-encoding"}
)  # true of a body as it was sent
CANNOT_CONNECT_PATTERN = re.compile(r"Cannot connect to host (\S+?)(?::\d+)? ssl:\S+ \[(.*)\]\Z", re.DOTALL)
UNTRUSTED_CERTIFICATE_PATTERN = re.compile(r"certificate verify failed: (.*?)(?:\s*\(_ssl|'|\Z)", re.DOTALL)


class ReplyTooLarge(Exception):
    """A reply of more than MOST_BYTES."""


def transport_errors() -> tuple[type[Exception], ...]:
    """All that is raised where a request brings no reply that is HTTP."""
    import aiohttp
    import httpx2

    from_http = (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError)
    garbled = (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, ValueError)
    return (TimeoutError, OSError, ReplyTooLarge, *from_http, *garbled)


async def post_request(http: httpx2.AsyncClient, request: httpx2.Request) -> httpx2.Response:
    """The reply to a request, its body read. Only redirections that keep the method and the key are followed."""
    reply = await post_without_redirects(http, request)
    for _ in range(MAX_REDIRECTS):
        following = reply.next_request
        if reply.status_code not in (307, 308) or not following or "authorization" not in following.headers:
            break
        reply = await post_without_redirects(http, following)
    return reply


async def post_without_redirects(http: httpx2.AsyncClient, request: httpx2.Request) -> httpx2.Response:
    """The reply to one request; TooLarge where its body has no end in sight."""
    import httpx2

    came = await http.send(request, stream=True, follow_redirects=False)
    try:
        body = bytearray()
        async for chunk in came.aiter_bytes():
            body += chunk
            if len(body) > MAX_REPLY_BYTES:
                raise ReplyTooLarge
    finally:
        await came.aclose()
    headers = [(name, value) for name, value in came.headers.multi_items() if name.lower() not in ENCODING_HEADERS]
    reply = httpx2.Response(came.status_code, headers=headers, content=bytes(body), request=request)
    reply.next_request = came.next_request
    return reply


def classify_transport_error(error: Exception, endpoint: Endpoint, reached: bool, tries: int) -> RequestFailure:
    """What it means that no reply came.

    A server that was never reached, or speaks no HTTP, is given up after two tries. `reached` says that the server
    has ever replied, `tries` how often this request was tried before.
    """
    import aiohttp
    import httpx2

    cause = error.__cause__ or error
    late = (TimeoutError, httpx2.ReadTimeout, httpx2.WriteTimeout, httpx2.PoolTimeout)
    if isinstance(error, ReplyTooLarge):
        why = f"the reply is larger than {MOST_BYTES >> 20} MiB"
        return RequestFailure("again", why, finish="", sure=False, tries=UNREADABLE_TRIES, last="row")
    if isinstance(error, late) and not isinstance(cause, aiohttp.ServerConnectionError):
        fix = f"Give it more time ({role_of(endpoint)}.timeout), and {LAST}"
        return RequestFailure("again", f"no answer within {endpoint.timeout:g} s", fix=fix, sure=False, last="row")
    why, fix = describe_transport_error(cause, endpoint)
    garbled = isinstance(cause, aiohttp.ClientResponseError | aiohttp.http_exceptions.HttpProcessingError)
    unreached = garbled or isinstance(cause, aiohttp.ClientConnectorError | httpx2.ConnectError)
    return RequestFailure("stop" if unreached and not reached and tries > 0 else "again", why, fix=fix)


def describe_transport_error(error: BaseException, endpoint: Endpoint) -> tuple[str, str]:
    """(what went wrong, what to do) where no connection was made, or what came over it is no HTTP."""
    import aiohttp

    place = urlsplit(endpoint.base_url or OPENAI_URL).netloc.rpartition("@")[2]
    named, text = CANNOT_CONNECT_PATTERN.match(str(error)), str(error) or type(error).__name__
    text = named[2] if named else text
    if found := UNTRUSTED_CERTIFICATE_PATTERN.search(text):
        fix = f"Name the certificate of the authority that signed it: export SSL_CERT_FILE=/path/to/ca.pem, and {LAST}"
        return f"the certificate of {place} is not trusted: {found[1].strip()}", fix
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER" in text or "UNKNOWN_PROTOCOL" in text:
        return f"{place} does not speak https", f"Write http:// in {role_of(endpoint)}.base_url, and {LAST}"
    if isinstance(error, aiohttp.ClientProxyConnectionError | aiohttp.ClientHttpProxyError):
        said = getattr(error, "message", "") or "nothing listens there"
        fix = f"Correct HTTPS_PROXY or HTTP_PROXY, or go without: export NO_PROXY={place.rpartition(':')[0] or place}"
        return f"the proxy that the environment names cannot be used ({said})", fix
    fix = f"Start the server or correct {role_of(endpoint)}.base_url, and {LAST}"
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.http_exceptions.HttpProcessingError):
        said = " ".join(str(getattr(error, "message", "") or error).split())[:120]
        return f"what answers at {place} is not HTTP, or damaged ({said})", fix
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"no connection: there is no host {place} ({text})", fix
    if "Connect call failed" in text or "refused" in text:
        return f"no connection: nothing listens at {place}", fix
    return f"no connection to {place} ({text})", fix
