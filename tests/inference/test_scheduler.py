"""Answers that share the cells of a context, wait for them or leave gaps are those of a prompt asked alone."""

from dataclasses import replace

import pytest
from students import PROMPTS, SUBJECTS

from tapir_local.errors import TapirError
from tapir_local.inference.config import ContextConfig, GenerationConfig
from tapir_local.inference.generate import answer_tokens, encode_prompt, generate
from tapir_local.inference.model import Engine, Model, open_context, open_model
from tapir_local.inference.sampling import open_samplers
from tapir_local.inference.scheduler import Scheduler, Written, answer_each, common_prefix_length
from tapir_local.inference.tokens import decode
from tapir_local.records import Message


def test_a_prompt_can_be_refused_when_its_turn_comes(llama) -> None:
    found: dict[int, list[int]] = {}
    asked: list[tuple[int, int]] = []

    def begin(number: int) -> bool:
        asked.append((number, len(found)))
        return number not in (0, 4, 9)

    with open_model(llama.gguf) as model, open_context(model, ContextConfig(cells=1024, sequences=3)) as engine:
        tokens = [encode_prompt(model, prompt) for prompt in PROMPTS]
        config = GenerationConfig(24, 256)
        answer_each(engine, tokens, lambda n, written: found.update({n: written.tokens}), config, [0] * 10, begin)
        answer_each(engine, tokens, lambda *_: pytest.fail("none may be started"), config, [0] * 10, lambda _: False)
    assert sorted(found) == [1, 2, 3, 5, 6, 7, 8]
    assert [number for number, _ in asked] == list(range(10))
    assert max(number - 2 - done for number, done in asked) <= 3, "asked late, not all at the start"


@pytest.mark.parametrize("split", [False, True])
def test_shared_and_split_cells_give_the_same_answers(students, split: bool) -> None:
    """Prompts with a common prefix, which is copied, and more prompts than sequences."""
    head = "You are asked a question, and answer it in few words, or in one where one is enough. " * 2
    asked = [(Message("system", head), *prompt) for prompt in PROMPTS]
    for student in students.values():
        alone = generate(student.gguf, asked, GenerationConfig(parallel=1, exact=True, max_tokens=12, context=512))
        with open_model(student.gguf) as model:
            tokens = [encode_prompt(model, prompt) for prompt in asked]
            assert common_prefix_length(tokens) > 32
            with open_context(model, ContextConfig(cells=4 * 512, sequences=4, exact=True, split=split)) as engine:
                found = answer_tokens(
                    engine, tokens, GenerationConfig(max_tokens=12, context=512, temperature=0), [0] * 10
                )
            assert [decode(model, ids) for ids, _ in found] == [one.text for one in alone]


def test_gaps_left_by_ended_sequences_change_no_answer(llama) -> None:
    """Twelve sequences, answers of 1 to 12 tokens in mixed order, and no more prompts: narrow and wide gaps."""
    lengths = [3, 12, 1, 1, 9, 2, 2, 2, 2, 2, 11, 5]
    with open_model(llama.gguf) as model:
        tokens = [encode_prompt(model, PROMPTS[number % 10]) for number in range(12)]
        ends = [answers_of(model, [ids], 1)[0][:length] for ids, length in zip(tokens, lengths, strict=True)]
        found = dict[int, list[int]]()
        with open_context(model, ContextConfig(cells=12 * 256, sequences=12, exact=True, split=True)) as engine:
            cut_at(engine, tokens, lengths, found)
    assert [found[number] for number in range(12)] == ends


def answers_of(model: Model, tokens: list[list[int]], sequences: int) -> list[list[int]]:
    """Twelve tokens for each prompt; end tokens are ignored."""
    found = dict[int, list[int]]()
    with open_context(
        model, ContextConfig(cells=256 * sequences, sequences=sequences, exact=True, split=True)
    ) as engine:
        cut_at(engine, tokens, [12] * len(tokens), found)
    return [found[number] for number in range(len(tokens))]


def cut_at(engine: Engine, tokens: list[list[int]], lengths: list[int], found: dict[int, list[int]]) -> None:
    """Answers of these lengths; end tokens are ignored."""
    engine.model.ends.update(dict.fromkeys(range(500), False))
    with open_samplers(engine.model, 0.0, [0] * len(tokens)) as samplers:
        keep = lambda number, written: found.update({number: written.tokens})  # noqa: E731
        scheduler = Scheduler(engine, tokens, GenerationConfig(12, 256), samplers, keep)
        assert scheduler.shared == 0
        while scheduler.unfinished:
            scheduler.step()
            for run in [run for run in scheduler.running if len(run.written) == lengths[run.number]]:
                scheduler.finish(run, "length")


def test_without_cells_for_all_the_last_answer_is_started_again(llama) -> None:
    """The engine claims more cells than there are: llama.cpp finds none, and answers go back into the queue."""
    asked = [(Message("user", "Count the words. " * 6 + subject),) for subject in SUBJECTS]
    alone = generate(llama.gguf, asked, GenerationConfig(parallel=1, exact=True, max_tokens=40, context=250))
    began: list[int] = []
    found: dict[int, str] = {}
    with (
        open_model(llama.gguf) as model,
        open_context(model, ContextConfig(cells=256, sequences=9, exact=True)) as engine,
    ):
        tokens = [encode_prompt(model, prompt) for prompt in asked]
        assert sum(map(len, tokens[:8])) > 256

        def begin(number: int) -> bool:
            began.append(number)
            return True

        def keep(number: int, written: Written) -> None:
            found[number] = written.text(model)

        answer_each(replace(engine, cells=10_000), tokens, keep, GenerationConfig(40, 250), [0] * 10, begin)
    assert [found[number] for number in range(10)] == [one.text for one in alone]
    assert sorted(began) == list(range(10)), "`may_start` is called once per prompt"


def test_a_context_without_cells_for_one_is_an_error(llama) -> None:
    asked = (Message("user", "Count the words. " * 60),)
    with open_model(llama.gguf) as model, open_context(model, ContextConfig(cells=256, sequences=2)) as engine:
        tokens = [encode_prompt(model, asked)] * 2
        with pytest.raises(TapirError, match="no room in the context"):
            answer_each(replace(engine, cells=9999), tokens, print, GenerationConfig(5, 9999), [0, 0])


def test_the_common_prefix_of_prompts() -> None:
    assert common_prefix_length([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 9]]) == 2
    assert common_prefix_length([[1, 2], [1, 2, 3]]) == 1
    assert common_prefix_length([[1, 2], [1, 2]]) == 1
    assert common_prefix_length([[1, 2, 3]]) == common_prefix_length([]) == 0
