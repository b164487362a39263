"""When the next request may go: what the server's headers ask for, and how many requests may be in flight."""

import asyncio
import re
import statistics
import time
from collections import deque
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Generic, TypeVar

Item = TypeVar("Job")

DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION_PATTERN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
MAX_BACKOFF_SECONDS = 30.0
TOLERATED_REFUSALS = (
    0.15  # share of 429s that does not slow us: they cost nothing but the asking, and chance brings 10 % of 5
)
REPLIES_PER_MEAN = 20  # replies that tell how long one takes
PACING_SPREAD = 0.8  # below 1, so that spreading never is what limits the rate
MAX_GAP_SECONDS = 0.01  # seconds between two requests: more than it takes to read a reply and write a request
MIN_REFUSAL_RUN = 3  # refusals in a row that mean little however few are in flight


def parse_wait_seconds(text: str, now: float) -> float | None:
    """How long after `now` (Unix seconds) a header means: "20", "6m0s", "20ms", an HTTP date, Unix time in s or ms."""
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
    """Seconds from `now` to an HTTP date; None if it is none."""
    try:
        return max(0.0, parsedate_to_datetime(date).timestamp() - now)
    except ValueError:
        return None


def requested_wait(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that the headers of a 429 or 503 ask to wait: Retry-After, or the reset of what is used up."""
    now = time.time() if now is None else now
    if "retry-after-ms" in headers:
        return parse_wait_seconds(f"{headers['retry-after-ms'].strip()}ms", now)
    if "retry-after" in headers:
        return parse_wait_seconds(headers["retry-after"], now)
    return allowance_wait(headers, now)


def allowance_wait(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds until the x-ratelimit-* allowance that stands at 0 is filled again; None while there is some left."""
    now = time.time() if now is None else now
    waits = []
    for ending in ("-requests", "-tokens", ""):
        if headers.get(f"x-ratelimit-remaining{ending}", "").strip() == "0":
            waits.append(parse_wait_seconds(headers.get(f"x-ratelimit-reset{ending}", ""), now))
    return max((wait for wait in waits if wait is not None), default=None)


def backoff_seconds(tries: int, chance: float) -> float:
    """Seconds before try number `tries` + 1: half of 0.25, 0.5, 1 … 30 s, and by `chance`, 0 to 1, of the other half.

    The jitter keeps requests that failed together from coming back together.
    """
    longest: float = min(MAX_BACKOFF_SECONDS, 2.0 ** (tries - 3))
    return longest * (1 + chance) / 2


class RequestPacer:
    """How long the last replies took, and from it when the next request may go.

    Requests that go together come back together, and each then waits for the others to be read: so they are spread
    over the time of a reply, as TCP's pacing spreads packets over a round trip.
    """

    def __init__(self) -> None:
        self._took: deque[float] = deque(maxlen=200)
        self._fresh = 0
        self._next = self._mean = 0.0

    def took(self, seconds: float) -> None:
        """A reply came after so many seconds."""
        self._took.append(seconds)
        self._fresh += 1
        if self._fresh >= REPLIES_PER_MEAN:
            self._fresh, self._mean = 0, statistics.fmean(self._took)

    def turn(self, now: float, in_flight: float) -> float:
        """Seconds until a request may go, so that `in_flight` of them are SPREAD over a reply's mean time."""
        at = max(now, self._next)
        self._next = at + min(MAX_GAP_SECONDS, PACING_SPREAD * self._mean / in_flight)
        return at - now


class SendQueue(Generic[Item]):
    """Jobs waiting to be sent, and how many workers may send: `limit`, at most `most`.

    As DCTCP does with packets marked for congestion (RFC 8257): after every `limit` replies the share of 429s among
    them decides. Above TOLERATED the limit shrinks by half that share; below, it grows by one, since a server that
    refuses a few at random is not full. Workers are numbered; those whose number is not below the limit rest.
    """

    def __init__(self, jobs: list[Item], most: int) -> None:
        self.ready, self.left = deque(jobs), len(jobs)
        self.most, self.limit = most, float(most)
        self.refusals = 0  # in a row, without an answer between them
        self.failed: BaseException | None = None
        self._answered = self._refused = 0
        self._not_before = 0.0
        self._bell = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def next(self, worker: int) -> Item | None:
        """The next job for this worker, as soon as it may be sent; None when there will be no more."""
        while self.left and not self.failed:
            wait = self._not_before - self._loop.time()
            if wait <= 0 and self.ready and worker < self.limit:
                return self.ready.popleft()
            self._bell.clear()
            await self._rung(wait if wait > 0 else None)
        return None

    def later(self, job: Item, seconds: float) -> None:
        """Put a job back, to be ready in so many seconds; then it is the first, lest the last rows wait for it."""
        self._loop.call_later(seconds, self._again, job)

    def done(self) -> None:
        """A job is finished, whatever came of it."""
        self.left -= 1
        if not self.left:
            self._bell.set()

    def answered(self) -> None:
        """An answer came."""
        self.refusals = 0
        self._answered += 1
        self._decide()

    def refused(self) -> int:
        """A 429 came; how many times over everything that may be in flight has been refused, 0 for a few."""
        self.refusals += 1
        self._refused += 1
        self._decide()
        return self.refusals // max(MIN_REFUSAL_RUN, int(self.limit))

    def hold(self, seconds: float) -> None:
        """Nobody sends for so many seconds."""
        self._not_before = max(self._not_before, self._loop.time() + seconds)

    def stop(self, error: BaseException) -> None:
        """No further job is given out; the first error stays."""
        self.failed = self.failed or error
        self._bell.set()

    def _decide(self) -> None:
        """Every `limit` replies: fewer in flight, or one more."""
        count = self._answered + self._refused
        if count < self.limit:
            return
        share = self._refused / count
        self._answered = self._refused = 0
        self.limit = max(1.0, self.limit * (1 - share / 2)) if share > TOLERATED_REFUSALS else self.limit + 1
        self.limit = min(self.limit, float(self.most))
        self._bell.set()

    def _again(self, job: Item) -> None:
        self.ready.appendleft(job)
        self._bell.set()

    async def _rung(self, longest: float | None) -> None:
        try:
            async with asyncio.timeout(longest):
                await self._bell.wait()
        except TimeoutError:
            return
