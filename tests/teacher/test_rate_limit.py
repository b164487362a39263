"""How many requests are in flight: a few refusals do not slow them down, many do, and what is put back goes first."""

import asyncio

import pytest

from tapir_local.teacher.rate_limit import MAX_GAP_SECONDS, PACING_SPREAD, RequestPacer, SendQueue


def after(replies: str, most: int = 64) -> float:
    """The limit after a sequence of answers (.) and refusals (x)."""

    async def run() -> float:
        queue: SendQueue[int] = SendQueue([], most)
        for reply in replies:
            queue.count_answer() if reply == "." else queue.count_refusal()
        return queue.limit

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


def test_refusals_in_a_row_are_counted_in_rounds() -> None:
    async def run() -> list[int]:
        queue: SendQueue[int] = SendQueue([], 4)
        counts = [queue.count_refusal() for _ in range(9)]
        queue.count_answer()
        return [*counts, queue.count_refusal()]

    counts = asyncio.run(run())
    assert counts[0] == 0
    assert counts[8] > 1
    assert counts[9] == 0


def test_items_put_back_come_first() -> None:
    async def run() -> list[int | None]:
        queue: SendQueue[int] = SendQueue([1, 2, 3], 1)
        first = await queue.next(0)
        assert first is not None
        queue.put_back(first, 0.0)
        await asyncio.sleep(0.01)
        return [first, await queue.next(0), await queue.next(0)]

    assert asyncio.run(run()) == [1, 1, 2]


def test_a_worker_beyond_the_limit_waits_until_it_rises() -> None:
    async def run() -> bool:
        queue: SendQueue[int] = SendQueue([1, 2, 3], 2)
        for _ in range(4):
            queue.count_refusal()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await queue.next(1)
        for _ in range(10):
            queue.count_answer()
        return await queue.next(1) == 1

    assert asyncio.run(run())


def paced(seconds: float, count: int = 40) -> RequestPacer:
    """A pacer after `count` replies that took `seconds` each."""
    pacer = RequestPacer()
    for _ in range(count):
        pacer.add_duration(seconds)
    return pacer


def test_requests_are_spread_over_a_reply_but_never_delayed_further() -> None:
    pacer = paced(0.2)
    waits = [pacer.next_delay(100.0, 64) for _ in range(64)]
    assert waits == pytest.approx([number * PACING_SPREAD * 0.2 / 64 for number in range(64)])
    assert waits[-1] < 0.2
    assert pacer.next_delay(200.0, 64) == 0


def test_long_replies_do_not_make_long_gaps() -> None:
    pacer = paced(60.0)
    assert [pacer.next_delay(0.0, 4) for _ in range(3)] == pytest.approx([0.0, MAX_GAP_SECONDS, 2 * MAX_GAP_SECONDS])


def test_requests_are_not_spread_before_the_first_replies() -> None:
    pacer = paced(1.0, 5)
    assert [pacer.next_delay(0.0, 4) for _ in range(3)] == [0.0, 0.0, 0.0]
