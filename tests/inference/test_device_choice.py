"""Tokens that llama.cpp chooses where the logits are computed are those that NumPy chooses from the logits."""

import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from students import PROMPTS

from tapir_local.errors import TapirError
from tapir_local.inference import device_choice
from tapir_local.inference.batch import make_batch, try_batch
from tapir_local.inference.config import ContextConfig, GenerationConfig
from tapir_local.inference.context_plan import chooses_on_device, open_planned_context
from tapir_local.inference.device_choice import Tensor
from tapir_local.inference.generate import answer_tokens, encode_prompt
from tapir_local.inference.model import Engine, Model, open_context, open_model
from tapir_local.inference.sampling import GREEDY, Samplers, next_tokens, open_samplers
from tapir_local.inference.scheduler import Scheduler, Written, answer_each, ignore_answer

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from gpu_generate import write_model

WIDE = 151_936  # Qwen's vocabulary
SIZE = 64  # rows of a batch: longer prompts take several


@pytest.fixture(scope="module")
def model(llama) -> Iterator[Model]:
    with open_model(llama.gguf) as opened:
        yield opened


def both_ways(model: Model, prompts: list[list[int]], config: GenerationConfig, plan: ContextConfig) -> list[object]:
    """The answers with tokens chosen by NumPy and by llama.cpp."""
    found = []
    for on_device in (False, True):
        with open_context(model, replace(plan, on_device=on_device)) as engine:
            assert engine.on_device == on_device
            found.append(answer_tokens(engine, prompts, config, [0] * len(prompts)))
    return found


def varied_prompts(model: Model) -> list[list[int]]:
    """Short ones, and some longer than a batch."""
    asked = [encode_prompt(model, prompt) for prompt in PROMPTS]
    long = [[token for ids in asked[:count] for token in ids] for count in (3, 5, 7)]
    assert SIZE < max(map(len, long)) < 240
    return [long[0], *asked[:5], long[1], *asked[5:], long[2], *asked[::-1]]


@pytest.mark.parametrize("split", [False, True], ids=["shared", "split"])
@pytest.mark.parametrize("sequences", [1, 3, 9])
def test_the_answers_are_the_same(model: Model, sequences: int, split: bool) -> None:
    """More prompts than sequences, so that prompts are read while others write, and sequences are idle at the end."""
    prompts, config = varied_prompts(model), GenerationConfig(30, 256)
    plan = ContextConfig(cells=256 * sequences, sequences=sequences, split=split, batch=SIZE)
    by_numpy, by_device = both_ways(model, prompts, config, plan)
    assert by_device == by_numpy
    assert len({tuple(tokens) for tokens, _ in by_numpy}) > 8


@pytest.mark.parametrize("split", [False, True], ids=["shared", "split"])
def test_a_common_prefix_is_shared(model: Model, split: bool) -> None:
    """The prefix is read in two batches that want no token."""
    head = list(range(20, 120))
    prompts = [head + encode_prompt(model, prompt) for prompt in PROMPTS]
    plan = ContextConfig(cells=256 * 5, sequences=5, split=split, batch=SIZE)
    with open_context(model, plan) as engine, open_samplers(model, 0.0, [0] * 10) as samplers:
        assert Scheduler(engine, prompts, GenerationConfig(9, 256), samplers, ignore_answer).shared > SIZE
    by_numpy, by_device = both_ways(model, prompts, GenerationConfig(9, 256), plan)
    assert by_device == by_numpy


def test_stop_strings_and_the_end_of_the_context(model: Model) -> None:
    prompts = varied_prompts(model)
    plan = ContextConfig(cells=256 * 3, sequences=3, split=True, batch=SIZE)
    for config in (GenerationConfig(40, 256, stops=("a", "e")), GenerationConfig(250, 200)):
        by_numpy, by_device = both_ways(model, prompts, config, plan)
        assert by_device == by_numpy
    assert {finish for _, finish in by_device} >= {"length", "too_long"}


def test_an_answer_without_cells_is_started_again(model: Model) -> None:
    """The engine claims more cells than there are; llama.cpp finds none, and answers go back into the queue."""
    prompts, config = varied_prompts(model), GenerationConfig(40, 250)
    found = []
    for on_device in (False, True):
        written: dict[int, list[int]] = {}

        def keep(number: int, answer: Written, written: dict[int, list[int]] = written) -> None:
            written[number] = answer.tokens

        with open_context(model, ContextConfig(cells=512, sequences=9, exact=True, on_device=on_device)) as engine:
            answer_each(replace(engine, cells=10_000), prompts, keep, config, [0] * len(prompts))
        found.append(written)
    assert found[0] == found[1]


def test_what_is_chosen_on_the_device(model: Model) -> None:
    """By default only a GPU's likeliest tokens; drawn tokens and those of a schema never."""
    greedy = GenerationConfig(4, 128)
    forced, on_gpu = replace(greedy, on_device=True), replace(model, on_gpu=1.0)
    assert not chooses_on_device(replace(model, on_gpu=0.0), greedy)
    assert not chooses_on_device(replace(model, on_gpu=0.6), greedy)
    assert chooses_on_device(on_gpu, greedy)
    assert not chooses_on_device(on_gpu, replace(greedy, on_device=False))
    for config in (replace(forced, temperature=0.7), replace(forced, schema={"type": "string"})):
        assert not chooses_on_device(on_gpu, config)
        with open_planned_context(model, [100], config) as (engine, _):
            assert not engine.on_device
    with open_planned_context(model, [100], forced) as (engine, _):
        assert engine.on_device
        with pytest.raises(ValueError, match="only the likeliest tokens"):
            answer_tokens(engine, [[5, 6, 7]], replace(greedy, temperature=0.7), [0])


def test_a_llama_cpp_that_cannot_choose_gives_logits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_choice, "graph_library", lambda: None)
    with open_context(model, ContextConfig(256, on_device=True)) as engine:
        assert not engine.on_device
        assert answer_tokens(engine, [[5, 6, 7]], GenerationConfig(4, 128), [0])[0][0]


def test_a_row_without_a_token_is_an_error(model: Model) -> None:
    """After a decoding that wants no token, there is none to read."""
    with open_context(model, ContextConfig(256, on_device=True)) as engine:
        batch = make_batch(engine.batch)
        batch.add([5, 6, 7], 0, 0)
        assert try_batch(engine, batch)
        with pytest.raises(TapirError, match="no token can be chosen"):
            next_tokens(engine, [GREEDY])


def test_ctrl_c_while_a_graph_is_built_is_not_lost(model: Model, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    prompts, config = varied_prompts(model), GenerationConfig(8, 256)
    own, built = device_choice.logits_of, [0]

    def interrupt(row: Tensor) -> Tensor | None:
        built[0] += 1
        if built[0] == 9:
            signal.raise_signal(signal.SIGINT)
        return own(row)

    with open_context(model, ContextConfig(256 * 3, 3, split=True, on_device=True)) as engine:
        expected = answer_tokens(engine, prompts, config, [0] * len(prompts))
        monkeypatch.setattr(device_choice, "logits_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            answer_tokens(engine, prompts, config, [0] * len(prompts))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert answer_tokens(engine, prompts, config, [0] * len(prompts)) == expected
    assert capfd.readouterr().err == ""


def test_every_family(students) -> None:
    for student in students.values():
        with open_model(student.gguf) as model:
            plan = ContextConfig(cells=256 * 3, sequences=3, split=True)
            by_numpy, by_device = both_ways(model, varied_prompts(model), GenerationConfig(12, 256), plan)
            assert by_device == by_numpy


def test_a_vocabulary_of_152_thousand_tokens(tmp_path: Path) -> None:
    """Answers of different lengths, so that prompts are read in every step while others write."""
    write_model(tmp_path / "wide.gguf", 1, 128, WIDE)
    chance = random.Random(0)
    prompts = [[chance.randrange(WIDE) for _ in range(chance.randrange(1, 40))] for _ in range(12)]
    with open_model(tmp_path / "wide.gguf") as wide:
        found = []
        for on_device in (False, True):
            plan = ContextConfig(cells=256 * 4, sequences=4, split=True, on_device=on_device)
            with open_context(wide, plan) as engine, open_samplers(wide, 0.0, [0] * 12) as samplers:
                found.append(answers_of_lengths(engine, prompts, samplers))
    assert found[0] == found[1]
    assert max(token for tokens in found[0].values() for token in tokens) > 100_000


def answers_of_lengths(engine: Engine, prompts: list[list[int]], samplers: Samplers) -> dict[int, list[int]]:
    """Answers of 2 to 6 tokens."""
    found: dict[int, list[int]] = {}
    keep = lambda number, written: found.update({number: written.tokens})  # noqa: E731
    scheduler = Scheduler(engine, prompts, GenerationConfig(8, 256), samplers, keep)
    while scheduler.unfinished:
        scheduler.step()
        for run in [run for run in scheduler.running if len(run.written) == 2 + run.number % 5]:
            scheduler.finish(run, "length")
    return found
