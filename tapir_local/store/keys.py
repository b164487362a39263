"""What makes two calls the same call: the SHA-256 of everything that can change the answer, spelled in one way only."""

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

KEY_VERSION = 1  # raising it re-keys every answer that users have paid for: the golden-key test stands in the way

# They say who pays, how long to wait and how the bytes arrive, not what is asked.
FIELDS_NOT_IN_KEY = frozenset({"api_key", "authorization", "timeout", "stream", "stream_options"})

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_EXACT_INTEGER = 2**53  # above it a float no longer stands for one integer


def normalize_value(value: Any) -> Any:
    """The value with one spelling of every number: 1.0 is 1, -0.0 is 0. TapirError where JSON has none (NaN)."""
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
    """An integer where the float is one."""
    if not math.isfinite(value):
        raise TapirError(
            f"a request cannot hold the number {value}", fix="Leave the parameter out, or give it a finite number."
        )
    return int(value) if value.is_integer() and abs(value) < MAX_EXACT_INTEGER else value


def has_normal_form(value: Any) -> bool:
    """Whether `plain` would give the value back unchanged; most requests are, and need no copy."""
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return True
    if kind is dict:
        for name, item in value.items():  # noqa: SIM110  (`all` takes twice as long: a tenth of a whole look-up)
            if type(name) is not str or not has_normal_form(item):
                return False
        return True
    if kind is list:
        return all(map(has_normal_form, value))
    return kind is float and math.isfinite(value) and not value.is_integer()


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: keys sorted, no blanks, UTF-8, numbers as `plain` spells them."""
    try:
        return orjson.dumps(value if has_normal_form(value) else normalize_value(value), option=orjson.OPT_SORT_KEYS)
    except TypeError as error:  # a lone surrogate, or an integer beyond 64 bits
        raise TapirError(f"a request that is not JSON: {error}", where=repr(value)[:80]) from error


def request_text(identity: str, body: Mapping[str, Any], draw: int) -> bytes:
    """The text whose SHA-256 is the key: [key version, identity of the endpoint, the body as sent, draw].

    All of the body counts, also parameters that this program has never heard of, less NOT_ASKED; what is absent
    stays absent, since a default may differ from any value written out.
    """
    kept = {name: item for name, item in body.items() if name not in FIELDS_NOT_IN_KEY}
    for name, item in kept.items():
        if type(item) is float:  # a temperature of 1.0: put right here, so that the rest need not be copied for it
            kept[name] = normalize_number(item)
    return canonical_json([KEY_VERSION, identity, kept, draw])


def hash_request(text: bytes) -> bytes:
    """The key, 32 bytes, of what `asked` returned or the store kept."""
    return hashlib.sha256(text).digest()


def request_key(identity: str, body: Mapping[str, Any], draw: int = 0) -> bytes:
    """The key, 32 bytes, of a body sent to the endpoint `identity`; `draw` tells apart several answers to one body."""
    return hash_request(request_text(identity, body, draw))


def normalize_base_url(base_url: str) -> str:
    """A base URL in its one spelling: lower-case scheme and host, no default port, no password, no trailing slash."""
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
    """Every place where two JSON values differ, as (path, in one, in the other), in the order of the first."""
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
    """Stands for a field that is not there, which is not the same as null."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


def request_fields(text: bytes) -> dict[str, Any]:
    """What `asked` wrote, as a mapping with the names that people read."""
    _, identity, body, draw = orjson.loads(text)
    return {"endpoint": identity, **body, "draw": draw}


def find_nearest_request(text: bytes, others: Iterable[bytes]) -> bytes | None:
    """The request among others, itself left out, whose text is most like this one's (Indel); None without others."""
    found = process.extractOne(text, (other for other in others if other != text), scorer=Indel.normalized_similarity)
    return found[0] if found else None


def describe_difference(difference: tuple[str, Any, Any]) -> str:
    """A difference in words, long texts cut to where they part."""
    path, one, other = difference
    if isinstance(one, str) and isinstance(other, str):
        same = len(posixpath.commonprefix([one, other]))
        start = max(0, same - 20)
        return (
            f"{path} differs at character {same}: {one[start : same + 40]!r} here, {other[start : same + 40]!r} there"
        )
    return f"{path}: {str(one)[:80]} here, {str(other)[:80]} there"
