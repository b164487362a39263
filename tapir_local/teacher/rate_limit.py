"""When the next request may be sent: what the server's headers ask for, and how many requests may be in flight."""

import asyncio
import re
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Generic, TypeVar

Item = TypeVar("Item")

DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION_PATTERN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
MAX_BACKOFF_SECONDS = 30.0
TOLERATED_REFUSALS = 0.15  # share of 429s that does not slow us down: they cost nothing, and 10 % of 5 may be chance
REPLIES_PER_MEAN = 20  # new replies until the mean duration is computed again
PACING_SPREAD = 0.8  # below 1, so that pacing never limits the rate
MAX_GAP_SECONDS = 0.01  # between two requests: more than it takes to read a reply and write a request
MIN_REFUSAL_RUN = 3  # refusals in a row; fewer mean little, however few requests are in flight


def parse_wait_seconds(text: str, now: float) -> float | None:
    """Seconds after `now` (Unix time) that a header means: "20", "6m0s", "20ms", an HTTP date, Unix time in s or ms."""
    text = text.strip()
    parts = DURATION_PATTERN.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return sum(float(number) * DURATION_UNITS[unit] for number, unit in parts)
    try:
        number = float(text)
    except ValueError:
        return seconds_until_date(text, now)
    moment = number / 1000 if number > 1e11 else number
    return max(0.0, moment - now if moment > 1e9 else number)


def seconds_until_date(date: str, now: float) -> float | None:
    """Seconds from `now` to an HTTP date; None if the text is not one."""
    try:
        return max(0.0, parsedate_to_datetime(date).timestamp() - now)
    except ValueError:
        return None


def requested_wait(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that the headers of a 429 or 503 ask to wait: Retry-After, or the reset of an exhausted allowance."""
    now = time.time() if now is None else now
    if "retry-after-ms" in headers:
        return parse_wait_seconds(f"{headers['retry-after-ms'].strip()}ms", now)
    if "retry-after" in headers:
        return parse_wait_seconds(headers["retry-after"], now)
    return allowance_wait(headers, now)


def allowance_wait(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds until the x-ratelimit-* allowance that stands at 0 is reset; None if no allowance is exhausted."""
    now = time.time() if now is None else now
    waits = []
    for ending in ("-requests", "-tokens", ""):
        if headers.get(f"x-ratelimit-remaining{ending}", "").strip() == "0":
            waits.append(parse_wait_seconds(headers.get(f"x-ratelimit-reset{ending}", ""), now))
    return max((wait for wait in waits if wait is not None), default=None)


def backoff_seconds(tries: int, chance: float) -> float:
    """Seconds before attempt number `tries` + 1: at least half of 0.25, 0.5, 1 … 30 s.

    `chance`, 0 to 1, adds its share of the other half. This jitter keeps requests that failed together from being sent
    together again.
    """
    longest: float = min(MAX_BACKOFF_SECONDS, 2.0 ** (tries - 3))
    return longest * (1 + chance) / 2


@dataclass(frozen=True, slots=True)
class CallCounts:
    """The requests of this process at one moment, for displays.

    `in_flight` requests wait for a reply, of at most `at_once`; the next one is sent in `pause` seconds. The others are
    counted since the start: replies, 429s (`rate_limited`), requests sent again, and replies that could not be used
    or read.
    """

    in_flight: int = 0
    at_once: int = 0
    pause: float = 0.0
    replies: int = 0
    rate_limited: int = 0
    retries: int = 0
    unreadable: int = 0


class CallMeter:
    """Counts the requests of a run for its display. Several threads may count at once."""

    def __init__(self) -> None:
        self._lock, self._counts, self._resumes = threading.Lock(), CallCounts(), 0.0

    def count(self, name: str, more: int = 1) -> None:
        """Add to a count of CallCounts."""
        with self._lock:
            self._counts = replace(self._counts, **{name: getattr(self._counts, name) + more})

    def limit(self, at_once: float) -> None:
        """Record how many requests may be in flight now."""
        if int(at_once) != self._counts.at_once:
            with self._lock:
                self._counts = replace(self._counts, at_once=int(at_once))

    def pause(self, seconds: float) -> None:
        """Record that the server is given `seconds` of rest."""
        self._resumes = max(self._resumes, time.monotonic() + seconds)

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a request within the block as in flight."""
        self.count("in_flight")
        try:
            yield
        finally:
            self.count("in_flight", -1)

    def read(self) -> CallCounts:
        """The counts at this moment."""
        return replace(self._counts, pause=max(0.0, self._resumes - time.monotonic()))


class RequestPacer:
    """Delays requests so that they are spread over the mean duration of a reply.

    Requests sent together are answered together, and each then waits until the others have been read. Spreading them
    avoids that, as TCP pacing spreads packets over a round trip.
    """

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=200)
        self._fresh = 0
        self._next = self._mean = 0.0

    def add_duration(self, seconds: float) -> None:
        """Record how long a reply took."""
        self._durations.append(seconds)
        self._fresh += 1
        if self._fresh >= REPLIES_PER_MEAN:
            self._fresh, self._mean = 0, statistics.fmean(self._durations)

    def next_delay(self, now: float, in_flight: float) -> float:
        """Seconds until the next request may be sent if `in_flight` of them are sent per mean duration."""
        at = max(now, self._next)
        self._next = at + min(MAX_GAP_SECONDS, PACING_SPREAD * self._mean / in_flight)
        return at - now


class SendQueue(Generic[Item]):
    """Items waiting to be sent, and how many workers may send at once: `limit`, at most `most`.

    The limit is adapted as DCTCP does for packets marked for congestion (RFC 8257): after every `limit` replies the
    share of 429s among them decides. Above TOLERATED_REFUSALS the limit shrinks by half that share. Below it grows by
    one, since a server that refuses a few at random is not full. Workers are numbered; those whose number is not below
    the limit are idle. While it `may_grow`, workers wait for more items when none is left.
    """

    def __init__(self, items: list[Item], most: int, may_grow: bool = False) -> None:
        self.ready, self.left, self.may_grow = deque(items), len(items), may_grow
        self.closed = False
        self.most, self.limit = most, float(most)
        self.refusals = 0  # in a row, without an answer between them
        self.failed: BaseException | None = None
        self._answered = self._refused = 0
        self._not_before = 0.0
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def next(self, worker: int) -> Item | None:
        """The next item for this worker, as soon as it may be sent; None if there will be no more."""
        while (self.left or self.may_grow) and not self.ended:
            wait = self._not_before - self._loop.time()
            if wait <= 0 and self.ready and worker < self.limit:
                return self.ready.popleft()
            self._changed.clear()
            await self._wait_for_change(wait if wait > 0 else None)
        return None

    @property
    def ended(self) -> bool:
        """Whether no further item is given out, whatever is left."""
        return self.closed or self.failed is not None

    def add(self, items: list[Item]) -> None:
        """Add items after those that wait."""
        self.ready.extend(items)
        self.left += len(items)
        self._changed.set()

    def close(self) -> None:
        """Give out no further item, without an error."""
        self.closed = True
        self._changed.set()

    def put_back(self, item: Item, seconds: float) -> None:
        """Return an item to the front of the queue after `seconds`, so that the last rows do not wait for it."""
        self._loop.call_later(seconds, self._make_ready, item)

    def mark_done(self) -> None:
        """Count an item as finished, with or without an answer."""
        self.left -= 1
        if not self.left:
            self._changed.set()

    def count_answer(self) -> None:
        """Count an answer and adapt the limit."""
        self.refusals = 0
        self._answered += 1
        self._adapt_limit()

    def count_refusal(self) -> int:
        """Count a 429 and adapt the limit.

        Returns how many times in a row everything that may be in flight has been refused; 0 after a few refusals.
        """
        self.refusals += 1
        self._refused += 1
        self._adapt_limit()
        return self.refusals // max(MIN_REFUSAL_RUN, int(self.limit))

    def pause(self, seconds: float) -> None:
        """Give out no item for `seconds`."""
        self._not_before = max(self._not_before, self._loop.time() + seconds)

    def stop(self, error: BaseException) -> None:
        """Give out no further item; the first error is kept."""
        self.failed = self.failed or error
        self._changed.set()

    def _adapt_limit(self) -> None:
        """After every `limit` replies: fewer in flight, or one more."""
        count = self._answered + self._refused
        if count < self.limit:
            return
        share = self._refused / count
        self._answered = self._refused = 0
        self.limit = max(1.0, self.limit * (1 - share / 2)) if share > TOLERATED_REFUSALS else self.limit + 1
        self.limit = min(self.limit, float(self.most))
        self._changed.set()

    def _make_ready(self, item: Item) -> None:
        self.ready.appendleft(item)
        self._changed.set()

    async def _wait_for_change(self, longest: float | None) -> None:
        try:
            async with asyncio.timeout(longest):
                await self._changed.wait()
        except TimeoutError:
            return
