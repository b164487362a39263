"""Damage bytes at random, the same for the same seed, and watch a reader: no traceback, no hang, bounded memory."""

import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

HANG_SECONDS = 20
MAX_GROWTH_KB = 400_000  # of the process, while a reader reads some kilobytes
# Pieces that have confused readers before, or may.
PIECES = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 400,
    b"null",
    b"{}",
    b"[]",
    b'""',
    b"true",
    b"\r",
    b"\n",
    b"\t",
    b'"',
    b"'",
    b"{",
    b"}",
    b"]",
    b",",
    b":",
    b"[" * 5000,
    b'{"a":' * 3000,
    b"&a [*a, *a]",
    b"!!timestamp tomorrow",
    b"!!python/object:os.system",
    b"<think>" * 50,
    b"```" * 100,
    b" " * 3000,
    b"\xff" * 8,
    (2**63 - 1).to_bytes(8, "little"),
    (2**32 - 1).to_bytes(4, "little"),
    "\u2028\u202e\x1b[31m".encode(),
)


def damage(text: bytes, chance: random.Random) -> bytes:
    """The bytes with one to four changes: bits, cuts, repeats, exchanged parts, odd pieces."""
    found = bytearray(text)
    for _ in range(chance.randint(1, 4)):
        place, other = sorted(chance.randrange(len(found) + 1) for _ in range(2))
        act = chance.randrange(7)
        if act == 0 and found:
            found[min(place, len(found) - 1)] ^= 1 << chance.randrange(8)
        elif act == 1:
            del found[place:]
        elif act == 2:
            del found[place : min(other, place + 200)]
        elif act == 3:
            found[place:place] = found[place : min(other, place + 200)]
        elif act == 4:
            found[place : place + 8] = chance.randbytes(8)
        else:
            found[place:place] = chance.choice(PIECES)
    return bytes(found)


def damaged(texts: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies of some of the texts."""
    chance = random.Random(seed)
    for _ in range(count):
        yield damage(chance.choice(texts), chance)


@contextmanager
def watched() -> Iterator[None]:
    """Fails if the block takes longer than HANG_SECONDS, or the process grows by more than MAX_GROWTH_KB."""

    def too_long(number: int, frame: Any) -> None:
        raise TimeoutError(f"a reader took more than {HANG_SECONDS} s")

    before, old = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, too_long)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MAX_GROWTH_KB, f"the process has grown by {grown} KB"


def feed(read: Callable[[bytes], object], text: bytes, refusals: tuple[type[Exception], ...]) -> None:
    """Give a text to a reader, which may refuse it by an error of these kinds and no other."""
    try:
        read(text)
    except refusals:
        return
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error} for {text[:300]!r} ({len(text)} bytes)") from error
