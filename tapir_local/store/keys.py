"""Compute a call's key: the SHA-256 of everything in a request that can change the answer, in canonical form."""

import hashlib
import math
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import orjson
from rapidfuzz import process
from rapidfuzz.distance import Indel

from tapir_local.errors import TapirError

KEY_VERSION = 1  # a change gives every paid answer a new key, which the golden-key test prevents

# These fields say who pays, how long to wait and how the bytes arrive. They do not change the answer.
FIELDS_NOT_IN_KEY = frozenset({"api_key", "authorization", "timeout", "stream", "stream_options"})

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_EXACT_INTEGER = 2**53  # above it a float does not stand for a single integer


def normalize_value(value: Any) -> Any:
    """Write every number in one way: 1.0 becomes 1, -0.0 becomes 0. TapirError for NaN and infinity."""
    kind = type(value)
    if kind is str or kind is bool or kind is int or value is None:
        return value
    if kind is float:
        return normalize_number(value)
    if kind is dict or isinstance(value, Mapping):
        return {name if type(name) is str else str(name): normalize_value(item) for name, item in value.items()}
    if kind is list or (isinstance(value, Sequence) and not isinstance(value, str | bytes)):
        return [normalize_value(item) for item in value]
    raise TapirError(f"a request cannot hold a {kind.__name__}", where=repr(value)[:80])


def normalize_number(value: float) -> float | int:
    """The integer that a float stands for, else the float; TapirError for NaN and infinity."""
    if not math.isfinite(value):
        raise TapirError(
            f"a request cannot hold the number {value}", fix="Leave the parameter out, or give it a finite number."
        )
    return int(value) if value.is_integer() and abs(value) < MAX_EXACT_INTEGER else value


def has_normal_form(value: Any) -> bool:
    """Whether `normalize_value` would not change the value. This is so for most requests, and saves a copy."""
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return True
    if kind is dict:
        for name, item in value.items():  # noqa: SIM110  (`all` takes twice as long, which is a tenth of a whole lookup)
            if type(name) is not str or not has_normal_form(item):
                return False
        return True
    if kind is list:
        return all(map(has_normal_form, value))
    return kind is float and math.isfinite(value) and not value.is_integer()


def canonical_json(value: Any) -> bytes:
    """The canonical JSON of a value: sorted keys, no spaces, UTF-8, normalized numbers. TapirError if impossible."""
    try:
        return orjson.dumps(value if has_normal_form(value) else normalize_value(value), option=orjson.OPT_SORT_KEYS)
    except TypeError as error:  # a lone surrogate, or an integer beyond 64 bits
        raise TapirError(f"a request that is not JSON: {error}", where=repr(value)[:80]) from error


def request_text(identity: str, body: Mapping[str, Any], draw: int) -> bytes:
    """The text whose SHA-256 is the key: JSON of [key version, identity of the endpoint, body as sent, draw].

    All fields of the body count, unknown ones too, except FIELDS_NOT_IN_KEY. Absent fields stay absent, because a
    server's default may differ from any value.
    """
    kept = {name: item for name, item in body.items() if name not in FIELDS_NOT_IN_KEY}
    for name, item in kept.items():
        if type(item) is float:  # a temperature of 1.0: normalized here, so that the rest need not be copied
            kept[name] = normalize_number(item)
    return canonical_json([KEY_VERSION, identity, kept, draw])


def hash_request(text: bytes) -> bytes:
    """The key (32 bytes) of a text that `request_text` returned."""
    return hashlib.sha256(text).digest()


def request_key(identity: str, body: Mapping[str, Any], draw: int = 0) -> bytes:
    """The key (32 bytes) of a body sent to the endpoint `identity`. `draw` numbers several answers to one body."""
    return hash_request(request_text(identity, body, draw))


def normalize_base_url(base_url: str) -> str:
    """Normalize a base URL: lower-case scheme and host, no default port, no password, no trailing slash."""
    try:
        parts = urlsplit(base_url.strip())
        port = parts.port
    except ValueError as error:
        fix = "Write it as http://host:port/v1, an IPv6 address in brackets: http://[::1]:8000/v1"
        raise TapirError(f"not a URL: {base_url!r} ({error})", where="base_url", fix=fix) from error
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or len(parts.netloc.split()) > 1:
        raise TapirError(
            f"not the URL of a server: {base_url!r}", where="base_url", fix="Write it as http://host:port/v1"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    place = host if port in (None, DEFAULT_PORTS[parts.scheme]) else f"{host}:{port}"
    path = posixpath.normpath("/" + parts.path.lstrip("/")).rstrip("/")
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{place}{path}{query}"


def find_differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, value in one, value in the other) for each difference of two JSON values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in dict.fromkeys([*one, *other]):
            yield from find_differences(
                one.get(name, ABSENT), other.get(name, ABSENT), f"{path}.{name}" if path else name
            )
    elif isinstance(one, list) and isinstance(other, list):
        for place in range(max(len(one), len(other))):
            pair = (one[place] if place < len(one) else ABSENT, other[place] if place < len(other) else ABSENT)
            yield from find_differences(*pair, f"{path}[{place}]")
    elif one is not other and (type(one) is not type(other) or one != other):
        yield path, one, other


class Absent:
    """The value of a field that is absent, which is not the same as null."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


def request_fields(text: bytes) -> dict[str, Any]:
    """Parse a text of `request_text` into {"endpoint", the fields of the body, "draw"}."""
    _, identity, body, draw = orjson.loads(text)
    return {"endpoint": identity, **body, "draw": draw}


def find_nearest_request(text: bytes, others: Iterable[bytes]) -> bytes | None:
    """The most similar of other requests by Indel similarity, equal ones left out; None if there is no other."""
    found = process.extractOne(text, (other for other in others if other != text), scorer=Indel.normalized_similarity)
    return found[0] if found else None


def describe_difference(difference: tuple[str, Any, Any]) -> str:
    """Describe one of `find_differences` in a sentence; long texts are cut to where they begin to differ."""
    path, one, other = difference
    if isinstance(one, str) and isinstance(other, str):
        same = len(posixpath.commonprefix([one, other]))
        start = max(0, same - 20)
        return (
            f"{path} differs at character {same}: {one[start : same + 40]!r} here, {other[start : same + 40]!r} there"
        )
    return f"{path}: {str(one)[:80]} here, {str(other)[:80]} there"
