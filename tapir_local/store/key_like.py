"""Find text that looks like a key or a password in the calls of a store, before the store is given away."""

import re
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tapir_local.store.compression import decompress_text
from tapir_local.store.queries import open_store
from tapir_local.store.recovery import iterate_by_id, samples_of

SHOWN_CHARS = 4  # of a found key; the rest stays hidden
# Kind of secret -> (a text that each of them contains, its form). Forms: the vendors' documented prefixes and lengths.
KEY_FORMS: dict[str, tuple[bytes, re.Pattern[bytes]]] = {
    "API key": (b"sk-", re.compile(rb"\bsk-[A-Za-z0-9_-]{20,}")),
    "Hugging Face token": (b"hf_", re.compile(rb"\bhf_[A-Za-z0-9]{30,}")),
    "GitHub token": (b"gh", re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})")),
    "AWS key": (b"IA", re.compile(rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    "Google API key": (b"AIza", re.compile(rb"\bAIza[0-9A-Za-z_-]{35}")),
    "Slack token": (b"xox", re.compile(rb"\bxox[abeprs]-[0-9A-Za-z-]{10,}")),
    "JSON Web Token": (b"eyJ", re.compile(rb"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}")),
    "private key": (b"PRIVATE KEY", re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
    "password in a URL": (b"://", re.compile(rb"\b[a-z][a-z0-9+.-]{1,20}://[^/\s:@\"\\]{1,64}:[^/\s:@\"\\]{3,64}@")),
}


class KeyLike(NamedTuple):
    """Text that looks like a secret: the call's key (64 hexadecimal digits), the kind, and its first characters."""

    call: str
    kind: str
    start: str


def find_key_like(text: bytes) -> Iterator[tuple[str, str]]:
    """(kind, first characters) of each text that looks like a secret, each kind once."""
    for kind, (part, form) in KEY_FORMS.items():
        if part in text and (found := form.search(text)):
            yield kind, found[0][:SHOWN_CHARS].decode("ascii", "replace") + "…"


def key_like_calls(path: Path) -> list[KeyLike]:
    """What looks like a secret in the requests and answers of a store; unreadable calls are skipped."""
    found: list[KeyLike] = []
    with open_store(path) as conn:
        conn.row_factory = sqlite3.Row
        samples = samples_of(conn)
        for row in iterate_by_id(conn, "calls"):
            with suppress(zlib.error, KeyError, TypeError):
                sample = samples[row["sample"]]
                texts = (decompress_text(row[name], sample[name]) for name in ("request", "answer"))
                each = {one for text in texts for one in find_key_like(text)}
                found += [KeyLike(row["key"].hex(), *one) for one in sorted(each)]
    return found
