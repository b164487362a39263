"""How many answers are planned at once, and the messages if memory is short."""

import os
import resource
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from tapir_local.errors import TapirError
from tapir_local.inference import context_plan
from tapir_local.inference.config import ContextConfig, GenerationConfig
from tapir_local.inference.context_plan import (
    MAX_SPLIT_SHARE,
    ContextPlan,
    candidate_plans,
    cell_bytes,
    choose_parallel,
    compute_bytes,
    fits_memory,
    free_context_memory,
    no_memory_error,
    open_first_fitting_context,
    open_planned_context,
    plan_context,
)
from tapir_local.inference.model import (
    STUDENT_ADVICE,
    ContextError,
    Engine,
    Model,
    check_weights,
    open_context,
    open_model,
)

ROOT = Path(__file__).parents[2]


def test_a_cell_takes_what_llama_cpp_says(llama) -> None:
    """Two layers, two heads of keys and values of 16 numbers each, two bytes per number; f32 if exact."""
    with open_model(llama.gguf) as model:
        assert cell_bytes(model) == 2 * 2 * (16 + 16) * 2
        assert cell_bytes(model, exact=True) == 2 * cell_bytes(model)


def test_long_conversations_use_no_flash_attention_on_a_cpu(llama) -> None:
    with open_model(llama.gguf) as model:
        plans = [
            plan_context(model, [tokens, 100], 0, True, exact, 10**9)
            for exact in (False, True)
            for tokens in (256, 257)
        ]
        assert [plan.flash for plan in plans] == [True, False, False, False]
        assert plan_context(replace(model, on_gpu=0.5), [4000], 0, True, False, 10**9).flash


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tokens", [200, 500])
def test_the_plan_is_at_least_what_llama_cpp_reserves(llama, tokens: int, split: bool, exact: bool) -> None:
    """llama.cpp writes its own figures to its log, which a child process prints."""
    with open_model(llama.gguf) as model:
        plan = plan_context(model, [tokens] * 8, 0, split, exact, free_context_memory(model))
        keys = plan.cells * cell_bytes(model, exact)
    code = (
        "import sys, llama_cpp as l\n"
        "m = l.llama_model_load_from_file(sys.argv[1].encode(), l.llama_model_default_params())\n"
        "p = l.llama_context_default_params(); p.n_batch, p.n_ubatch = 2048, 512\n"
        "p.n_ctx, p.n_seq_max, p.kv_unified = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == 'False'\n"
        "if sys.argv[5] == 'True': p.type_k = p.type_v = 0\n"
        "if sys.argv[6] == 'False': p.flash_attn_type = 0\n"
        "l.llama_init_from_model(m, p)\n"
    )
    words = [llama.gguf, plan.cells, plan.sequences, split, exact, plan.flash]
    said = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True
    ).stderr
    sizes = {
        line.split("CPU")[1].split()[0]: float(line.split("=")[1].split()[0]) * 2**20
        for line in said.splitlines()
        if "buffer size =" in line and "CPU_Mapped" not in line
    }
    assert sizes["KV"] == pytest.approx(keys, rel=0.01)
    assert plan.taken >= sum(sizes.values())


def test_answers_at_once_are_limited_by_prompts_and_by_the_setting(llama) -> None:
    with open_model(llama.gguf) as model:
        assert [choose_parallel(model, *pair) for pair in ((9, None), (99, None), (99, 64), (0, 3), (999, 256))] == [
            9,
            32,
            64,
            1,
            255,
        ]


def test_split_cells_if_memory_allows_and_shared_cells_if_it_is_short(llama) -> None:
    with open_model(llama.gguf) as model:
        first, second, third, *_ = candidate_plans(model, [1000] + [100] * 31, 32, 0, False)
    assert (first.answers, first.split, first.cells) == (32, True, 32 * 1024)
    assert (second.answers, second.split, second.cells) == (32, False, 4352)
    assert (third.answers, third.split) == (31, True)
    assert fits_memory(ContextPlan(1, 1, 256, False, 90, 100))
    assert not fits_memory(ContextPlan(1, 1, 256, True, 90, 100))


def plans_with_memory_for(model: Model, answers: int, wanted: int) -> list[ContextPlan]:
    """The candidates of `wanted` answers of 2,000 tokens, with memory for the split cells of `answers` only."""
    taken = plan_context(model, [2000] * answers, 0, True, False, 0).taken
    plans = candidate_plans(model, [2000] * wanted, wanted, 0, False)
    return [replace(plan, free=int(taken / MAX_SPLIT_SHARE) + 1) for plan in plans]


def test_26_answers_that_fit_are_26(llama) -> None:
    """Split cells: shared cells of this model take too much for their attention mask to fit."""
    with (
        open_model(llama.gguf) as model,
        open_first_fitting_context(model, plans_with_memory_for(model, 26, 32)) as (engine, plan),
    ):
        assert (plan.answers, plan.split, engine.sequences) == (26, True, 26)


def test_32_answers_that_fit_are_the_first_plan(llama) -> None:
    with (
        open_model(llama.gguf) as model,
        open_first_fitting_context(model, plans_with_memory_for(model, 32, 32)) as (_, plan),
    ):
        assert (plan.answers, plan.split) == (32, True)


def test_after_a_plan_that_llama_cpp_refuses_a_clearly_smaller_one_is_tried(llama, monkeypatch) -> None:
    """llama.cpp refuses more than 24 answers: a few numbers are tried, not each from 32 down."""
    tried = list[int]()

    def open_or_refuse(model: Model, config: ContextConfig) -> AbstractContextManager[Engine]:
        tried.append(config.sequences)
        if config.sequences > 24:
            raise ContextError("no memory")
        return open_context(model, config)

    monkeypatch.setattr(context_plan, "open_context", open_or_refuse)
    with open_model(llama.gguf) as model:
        plans = [plan for plan in plans_with_memory_for(model, 32, 32) if plan.split]
        with open_first_fitting_context(model, plans) as (_, plan):
            assert plan.answers == tried[-1] <= 24
    assert len(tried) <= 4


def test_a_common_prefix_is_counted_once_in_shared_cells(llama) -> None:
    with open_model(llama.gguf) as model:
        together, apart = (plan_context(model, [1000] * 4, 900, split, False, 10**9) for split in (False, True))
    assert (together.sequences, together.cells) == (5, 1536)  # 900 + 4 · 100, in whole 256s
    assert (apart.sequences, apart.cells) == (5, 5 * 1024)


def test_fewer_at_once_when_llama_cpp_finds_no_memory(llama) -> None:
    """A limit on the process, which the kernel's figures do not include, makes llama.cpp's own request fail.

    It leaves more than half of the wanted memory: a small request of C++ that fails would end the process.
    """
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from tapir_local.inference.model import open_model\n"
        "from tapir_local.inference.context_plan import open_planned_context, candidate_plans\n"
        "from tapir_local.inference.config import GenerationConfig\n"
        "with open_model(Path(sys.argv[1])) as model:\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    wanted = next(candidate_plans(model, [30_000] * 64, 64, 0, False)).taken\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + wanted * 4 // 5, -1))\n"
        "    config = GenerationConfig(1, 30_000, parallel=64)\n"
        "    with open_planned_context(model, [30_000] * 64, config, warn=print) as (engine, plan):\n"
        "        print(plan.answers)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(llama.gguf)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    said, answers = found.stdout.splitlines()
    assert 1 <= int(answers) < 64
    assert said.startswith(f"{answers} at once in a context of ")
    assert said.endswith("not 64: memory is short")


def test_no_memory_for_a_single_answer_is_one_error_with_the_numbers(llama) -> None:
    with open_model(llama.gguf) as model:
        with (
            pytest.raises(
                TapirError, match=r"no memory for one answer: .* takes [\d,.]+ GB, and .* are free"
            ) as caught,
            open_planned_context(model, [2**31 - 1000] * 3, GenerationConfig(1, 2**31 - 1000, parallel=3)),
        ):
            pytest.fail("there is no such memory")
        assert caught.value.fix == STUDENT_ADVICE.too_large
        assert str(model.gguf) in str(no_memory_error(model, plan_context(model, [9], 0, False, False, 5)))


def test_weights_larger_than_memory_are_not_loaded(llama, tmp_path: Path) -> None:
    """A sparse file: 10 TB that take no space on the disk."""
    large = tmp_path / "large.gguf"
    large.write_bytes(llama.gguf.read_bytes())
    os.truncate(large, 10**13)
    with pytest.raises(TapirError, match=r"its weights take 10,000\.0 GB, and .* are free"), open_model(large):
        pytest.fail("it was loaded")
    with open_model(llama.gguf, vocab_only=True) as model:
        check_weights(model.gguf, 1, 1, STUDENT_ADVICE)


def test_a_context_that_cannot_be_is_an_error_and_no_crash(llama) -> None:
    with open_model(llama.gguf) as model:
        with (
            pytest.raises(TapirError, match="no context"),
            open_context(model, ContextConfig(cells=512, sequences=300)),
        ):
            pytest.fail("llama.cpp knows 256 sequences")
        assert compute_bytes(model, 512, 4, flash=False) > compute_bytes(model, 512, 4, flash=True)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
