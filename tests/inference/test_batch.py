"""A batch never takes more rows than it has, whichever answers start, stop and leave gaps."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from tapir_local.inference.batch import compute_logits, decode_batch, last_logits, make_batch
from tapir_local.inference.config import ContextConfig, GenerationConfig
from tapir_local.inference.model import Engine, open_context, open_model
from tapir_local.inference.sampling import GREEDY, Samplers
from tapir_local.inference.scheduler import Running, Scheduler, Written, answer_each

SIZE = 64
LENGTHS = some.lists(some.integers(1, 150), min_size=1, max_size=14)


@pytest.fixture(scope="module", params=[True, False], ids=["split", "shared"])
def engine(request, llama) -> Iterator[Engine]:
    """Ten sequences of 256 tokens, and batches of 64 rows, which are full in every step while prompts are read."""
    with (
        open_model(llama.gguf) as model,
        open_context(model, ContextConfig(cells=10 * 256, sequences=10, batch=SIZE, split=request.param)) as opened,
    ):
        assert opened.batch == SIZE
        yield opened


def test_a_full_batch_refuses_more_rows() -> None:
    batch = make_batch(5)
    batch.add([7, 8, 9], 0, 1, [2])
    batch.add([4], 6, 2)
    with pytest.raises(OverflowError, match="2 tokens do not fit into the 1 free rows"):
        batch.add([1, 2], 0, 3, [0, 1])
    assert batch.free_rows == 1
    batch.add([3], 9, 4, [0])
    assert batch.write() == 5
    assert (batch.token.tolist(), batch.pos.tolist()) == ([7, 8, 9, 4, 3], [0, 1, 2, 6, 9])
    assert (batch.seq.tolist(), batch.logits.tolist()) == ([1, 1, 1, 2, 4], [0, 0, 1, 0, 1])
    assert batch.free_rows == 5


def test_interleaved_rows_are_in_the_order_of_their_places() -> None:
    batch = make_batch(9)
    batch.add([1, 2, 3], 4, 0, [2])
    batch.add([5], 7, 1, [0])
    batch.add([6, 7], 0, 2, [1])
    batch.interleave()
    assert batch.write() == 6
    assert batch.token[:6].tolist() == [1, 5, 6, 2, 7, 3]
    assert batch.pos[:6].tolist() == [4, 7, 0, 5, 1, 6]
    assert batch.seq[:6].tolist() == [0, 1, 2, 0, 2, 0]
    assert batch.logits[:6].tolist() == [0, 1, 0, 0, 1, 1]


def test_a_batch_is_empty_after_it_was_decoded(engine: Engine) -> None:
    """The same text twice, the second time in two parts, each with only its last row wanted."""
    ids = list(range(20, 50))
    whole, batch = compute_logits(engine, ids), make_batch(engine.batch)
    for start in (0, 10):
        batch.add(ids[10 + start : 20 + start], 10 + start, 0, [9])
    decode_batch(with_beginning(engine, ids[:10]), batch)
    assert abs(last_logits(engine, 2) - whole[[19, 29]]).max() < 0.05


def with_beginning(engine: Engine, ids: list[int]) -> Engine:
    """The engine with a text in its first sequence."""
    compute_logits(engine, ids)
    return engine


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=LENGTHS,
    most=some.integers(1, 9),
    stops=some.lists(some.sampled_from("aeos t"), max_size=3),
    data=some.data(),
)
def test_any_lengths_and_stops_are_answered(engine: Engine, lengths, most: int, stops, data) -> None:
    """Prompts of all lengths, some with a common prefix, and answers cut at any token."""
    draw = data.draw(some.randoms(use_true_random=False))
    head = [5] * data.draw(some.sampled_from([0, 3, 40]))
    prompts = [[*head, *(draw.randrange(20, 300) for _ in range(length))] for length in lengths]
    found = dict[int, Written]()
    answer_each(engine, prompts, found.__setitem__, GenerationConfig(most, 200, stops=tuple(stops)), [0] * len(prompts))
    assert sorted(found) == list(range(len(prompts)))
    assert all(len(written.tokens) <= most for written in found.values())


@pytest.mark.parametrize("waiting", [1, 62, 63, 64, 300])
def test_gaps_are_filled_only_with_spare_rows(engine: Engine, waiting: int) -> None:
    """A sequence has just ended between one that writes and one whose prompt fills the rest of the batch."""
    scheduler = Scheduler(engine, [], GenerationConfig(9, 256), Samplers(engine.model, 0, []), print)
    scheduler.running = [Running(0, 0, [9], 3, 0, GREEDY), Running(2, 2, [8] * waiting, 0, 0, GREEDY)]
    ready = scheduler.fill_batch(scheduler.next_turns())
    taken = SIZE - scheduler.batch.free_rows
    assert taken == min(SIZE, 1 + waiting + engine.split)
    assert [run.number for run in ready] == ([0, 2] if waiting < SIZE else [0])
