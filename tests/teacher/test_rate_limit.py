"""How many requests fly: few refusals slow nothing, many do, and what is put back goes first."""

import asyncio

import pytest

from tapir_local.teacher.rate_limit import MAX_GAP_SECONDS, PACING_SPREAD, RequestPacer, SendQueue


def after(replies: str, most: int = 64) -> float:
    """The limit after answers (.) and refusals (x)."""

    async def run() -> float:
        line: SendQueue[int] = SendQueue([], most)
        for reply in replies:
            line.answered() if reply == "." else line.refused()
        return line.limit

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("replies", "least", "most"),
    [
        ("...................x" * 100, 64, 64),  # 5 % at random: the server is not full
        ("x" * 64, 32, 32),  # all of them: half
        ("x" * 1000, 1, 1),
        ("xx." * 100, 1, 24),
        ("x" * 1000 + "." * 5000, 64, 64),  # and up again
    ],
)
def test_the_share_of_refusals_decides(replies: str, least: int, most: int) -> None:
    assert least <= after(replies) <= most


def test_refusals_of_everything_are_counted_over() -> None:
    async def run() -> list[int]:
        line: SendQueue[int] = SendQueue([], 4)
        counts = [line.refused() for _ in range(9)]
        line.answered()
        return [*counts, line.refused()]

    counts = asyncio.run(run())
    assert counts[0] == 0
    assert counts[8] > 1
    assert counts[9] == 0


def test_what_is_put_back_goes_before_what_waits() -> None:
    async def run() -> list[int | None]:
        line: SendQueue[int] = SendQueue([1, 2, 3], 1)
        first = await line.next(0)
        assert first is not None
        line.later(first, 0.0)
        await asyncio.sleep(0.01)
        return [first, await line.next(0), await line.next(0)]

    assert asyncio.run(run()) == [1, 1, 2]


def test_a_worker_beyond_the_limit_rests_until_it_rises() -> None:
    async def run() -> bool:
        line: SendQueue[int] = SendQueue([1, 2, 3], 2)
        for _ in range(4):
            line.refused()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await line.next(1)
        for _ in range(10):
            line.answered()
        return await line.next(1) == 1

    assert asyncio.run(run())


def paced(seconds: float, count: int = 40) -> RequestPacer:
    """After so many replies that took so long."""
    pace = RequestPacer()
    for _ in range(count):
        pace.took(seconds)
    return pace


def test_requests_are_spread_over_a_reply_but_never_held_up() -> None:
    pace = paced(0.2)
    waits = [pace.turn(100.0, 64) for _ in range(64)]
    assert waits == pytest.approx([number * PACING_SPREAD * 0.2 / 64 for number in range(64)])
    assert waits[-1] < 0.2
    assert pace.turn(200.0, 64) == 0


def test_long_replies_do_not_make_long_gaps() -> None:
    pace = paced(60.0)
    assert [pace.turn(0.0, 4) for _ in range(3)] == pytest.approx([0.0, MAX_GAP_SECONDS, 2 * MAX_GAP_SECONDS])


def test_nothing_is_spread_until_some_replies_came() -> None:
    pace = paced(1.0, 5)
    assert [pace.turn(0.0, 4) for _ in range(3)] == [0.0, 0.0, 0.0]
