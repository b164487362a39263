"""Tokens per second of tapir_local's batching compared with other programs, on one GGUF.

    python bench/generate.py STUDENT.gguf [--prompt-tokens 16] [--max-tokens 64] [--parallel 32] [--waves 2]
        [--threads 2] [--repeats 3] [--choose device|numpy|both] [--uneven] [--batched-bench PATH] [--xllamacpp PYTHON]

Rivals: llama-cpp-python's high-level class in a loop; llama.cpp's own llama-batched-bench, which chooses no tokens
(build it from llama-cpp-python's sdist with the same flags); xllamacpp's server in-process, with as many answers in
progress, run by the interpreter of an environment that has it. All read prompts of random tokens of the same length and
write answers of the same length; end tokens are ignored. They take turns, and medians are printed, because the machine
may have other work. `generation` counts only steps that read no prompt, as llama-batched-bench does; `all` is the
tokens of prompts and answers over the whole time. Loading is in neither. Without a GGUF, a random Llama of 3M
parameters is made. Our tokens are chosen as the program does it on this machine, or with `--choose` by llama.cpp where
the logits are computed, by NumPy, or once by each, so that the two ways take turns. `--uneven` gives us, and no rival,
prompts of 1 token to --prompt-tokens, and answers that fill the rest: most steps then read prompts and write.

    python bench/generate.py STUDENT.gguf --seeds FILE …       instructions of a seed file, by its template
    python bench/generate.py JUDGE.gguf --prompt-tokens 600 --shared 480 --max-tokens 14 …     as a judge is asked

With `--seeds` the prompts have the lengths of real instructions, at most --prompt-tokens. With `--shared` so many first
tokens are the same in all prompts, which ours and the server compute once. llama-batched-bench knows neither: it reads
as many tokens as a prompt has on average, without the shared ones, and its rate `all` is given per token of a whole
request, as for the others.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from tapir_local.data.dataset import require_seeds
from tapir_local.data.files import read_path
from tapir_local.inference import scheduler
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.context_plan import open_planned_context, pad_cells
from tapir_local.inference.generate import encode_prompt
from tapir_local.inference.lib import library, thread_count
from tapir_local.inference.model import open_model
from tapir_local.inference.scheduler import Scheduler, Turn, answer_each, common_prefix_length, ignore_answer

CHOICES = {"default": None, "device": True, "numpy": False, "both": True}  # whether the device chooses our tokens
SERVER = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import xllamacpp
task = json.load(open(sys.argv[1]))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = task["gguf"], task["cells"], task["parallel"]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = task["threads"]
params.warmup = True
server = xllamacpp.Server(params)
def ask(prompt):
    found = server.handle_completions({"prompt": prompt, "n_predict": task["max_tokens"], "ignore_eos": True,
                                       "temperature": 0, "top_k": 1, "cache_prompt": task["shared"]})
    found = json.loads(found) if isinstance(found, str) else found
    return found.get("tokens_predicted") or found["usage"]["completion_tokens"]
with ThreadPoolExecutor(task["parallel"]) as pool:
    list(pool.map(ask, task["prompts"][:2]))
    started = time.perf_counter()
    written = sum(pool.map(ask, task["prompts"]))
    seconds = time.perf_counter() - started
print("RESULT", json.dumps({"written": written, "seconds": seconds, "version": xllamacpp.__version__}), flush=True)
import os
os._exit(0)
"""


@dataclass
class Clock:
    """Seconds of a run of ours: `generating` in steps that read no prompt (`written` tokens), and in `total`.

    `decoding`, `choosing` (which waits for a GPU) and `thread` (the whole run) are this thread's own time: other
    processes do not count.
    """

    generating: float = 0.0
    written: int = 0
    decoding: float = 0.0
    choosing: float = 0.0
    total: float = 0.0
    thread: float = 0.0
    reading: bool = field(default=False, repr=False)
    rows: int = field(default=0, repr=False)


@dataclass(frozen=True)
class Rates:
    """Tokens per second: written in steps that read no prompt (nan if unknown), and read or written in all."""

    generation: float
    all: float
    python: float = float("nan")  # microseconds of our own code per token written
    choosing: float = float("nan")  # microseconds of this thread for choosing it, on a GPU with the wait for its logits


def main() -> None:
    """Run all in turns, and print a table."""
    options = arguments()
    library()  # loaded before the clock starts, and before torch
    with tempfile.TemporaryDirectory() as folder:
        gguf = options.gguf or random_student(Path(folder))
        rivals, options.prompts = chosen_rivals(options), make_prompts(gguf, options)
        found: dict[str, list[Rates]] = {name: [] for name in rivals}
        for _ in range(options.repeats):
            for name, measure in rivals.items():
                found[name].append(measure(gguf, options, Path(folder)))
                if options.verbose:
                    print(f"  {name}: {found[name][-1]}", file=sys.stderr)
    read = sorted(map(len, options.prompts))
    mixed = f"{read[0]} to {read[-1]}, {statistics.mean(read):.0f} on average" if read[0] < read[-1] else read[0]
    common = f", the first {options.shared} in common" if options.shared else ""
    lengths = f"{mixed} tokens read{common}, {options.max_tokens} written, {options.parallel} in progress"
    print(f"{gguf.name}: {lengths}, {options.threads} threads")
    print(f"medians of {options.repeats}; {versions(options)}")
    print(table({name: median(rates) for name, rates in found.items()}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", nargs="?", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--parallel", type=int, default=32)
    parser.add_argument("--waves", type=int, default=2, help="prompts per answer in progress")
    parser.add_argument("--loop-prompts", type=int, default=8, help="prompts for the loop; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=thread_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--choose", choices=CHOICES, default="default", help="what chooses our tokens")
    parser.add_argument("--seeds", type=Path, help="read these instructions, not random tokens")
    parser.add_argument("--shared", type=int, default=0, help="first tokens that all prompts have in common")
    parser.add_argument("--uneven", action="store_true", help="answers of ours end at different times; without rivals")
    parser.add_argument("--batched-bench", type=Path, help="llama.cpp's llama-batched-bench")
    parser.add_argument("--xllamacpp", type=Path, help="a Python that has xllamacpp")
    parser.add_argument("--verbose", action="store_true", help="print every measurement as it is made")
    parser.add_argument("--gpu", action="store_true", help="all layers on the GPU, for the rivals too")
    options = parser.parse_args()
    if options.uneven and (options.loop_prompts or options.batched_bench or options.xllamacpp):
        parser.error("--uneven measures only ours: give --loop-prompts 0 and no rival")
    if options.shared >= options.prompt_tokens or (options.shared and options.seeds):
        parser.error("--shared is less than --prompt-tokens, and not used with --seeds")
    return options


def random_student(folder: Path) -> Path:
    """A Llama of 3M parameters in f32."""
    from models import make_model

    from tapir_local.export.export import export_gguf

    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}
    model = make_model(folder / "model", num_attention_heads=6, num_key_value_heads=6, **shape)
    export_gguf(model, folder / "student.gguf", adapter=None, quant="f32")
    return folder / "student.gguf"


def chosen_rivals(options: argparse.Namespace) -> dict[str, Callable[[Path, argparse.Namespace, Path], Rates]]:
    """Ours, and the rivals that the options name."""
    found: dict[str, Callable[[Path, argparse.Namespace, Path], Rates]] = {}
    found["tapir-local"] = partial(ours, on_device=CHOICES[options.choose])
    if options.choose == "both":
        found["tapir-local with NumPy"] = partial(ours, on_device=False)
    if options.loop_prompts:
        found["llama-cpp-python, a loop"] = loop
    if options.batched_bench:
        found["llama-batched-bench"] = batched_bench
    if options.xllamacpp:
        found["xllamacpp's server"] = server
    return found


def make_prompts(gguf: Path, options: argparse.Namespace) -> list[list[int]]:
    """All prompts as token ids: of a seed file, or random ones with a common beginning of --shared tokens."""
    count, length = options.parallel * options.waves, options.prompt_tokens
    with open_model(gguf, vocab_only=True) as model:
        if options.seeds:
            rows = require_seeds(read_path(options.seeds), ())[0]
            found = [encode_prompt(model, row.prompt) for row in rows[: 4 * count]]
            return [tokens for tokens in found if len(tokens) <= length][:count]
        width = library().llama_vocab_n_tokens(model.vocab)
    chance = random.Random(0)
    prompts = [[chance.randrange(width) for _ in range(length)] for _ in range(count)]
    if options.uneven:
        chance = random.Random(1)
        return [prompt[: chance.randint(1, length)] for prompt in prompts]
    return [prompts[0][: options.shared] + prompt[options.shared :] for prompt in prompts]


def ours(gguf: Path, options: argparse.Namespace, folder: Path, on_device: bool | None = None) -> Rates:
    """Continuous batching of all prompts, with their tokens chosen on the device, by NumPy, or as the program does."""
    length, prompts = options.prompt_tokens + options.max_tokens, options.prompts
    needs = [length if options.uneven else len(prompt) + options.max_tokens for prompt in prompts]
    with open_model(gguf) as model:
        model.ends.update(dict.fromkeys(range(library().llama_vocab_n_tokens(model.vocab)), False))
        most = length if options.uneven else options.max_tokens  # otherwise the context ends the answers
        config = GenerationConfig(most, length, parallel=options.parallel, threads=options.threads, on_device=on_device)
        shared = common_prefix_length(prompts)
        with open_planned_context(model, needs, config, shared=shared) as (engine, _), timed() as clock:
            assert on_device in (None, engine.on_device), "this llama.cpp chooses no tokens"
            written: list[int] = []
            warm = prompts[: options.parallel]
            answer_each(engine, warm, ignore_answer, replace(config, max_tokens=2), [0] * len(warm))
            clock.__init__()  # type: ignore[misc]
            started, own = time.perf_counter(), time.thread_time()
            answer_each(engine, prompts, lambda _, one: written.append(len(one.tokens)), config, [0] * len(prompts))
            clock.total, clock.thread = time.perf_counter() - started, time.thread_time() - own
    assert sum(written) == sum(needs) - sum(map(len, prompts))
    python = (clock.thread - clock.decoding - clock.choosing) / sum(written) * 1e6
    rate = clock.written / clock.generating if clock.written else float("nan")
    return Rates(rate, sum(needs) / clock.total, python, clock.choosing / sum(written) * 1e6)


@contextmanager
def timed() -> Iterator[Clock]:
    """A clock on the scheduler's steps and on the functions that they call."""
    clock, kept = Clock(), {name: getattr(scheduler, name) for name in PARTS}
    own_step, own_next_turns = Scheduler.step, Scheduler.next_turns

    def step(self: Scheduler) -> None:
        clock.reading, started = False, time.perf_counter()
        own_step(self)
        if not clock.reading:
            clock.generating += time.perf_counter() - started
            clock.written += clock.rows

    def next_turns(self: Scheduler) -> list[Turn]:
        turns = own_next_turns(self)
        clock.reading, clock.rows = any(not run.written for run, _ in turns), len(turns)
        return turns

    try:
        Scheduler.step, Scheduler.next_turns = step, next_turns  # type: ignore[method-assign]
        for name, part in PARTS.items():
            setattr(scheduler, name, adding(clock, part, kept[name]))
        yield clock
    finally:
        for name, function in kept.items():
            setattr(scheduler, name, function)
        Scheduler.step, Scheduler.next_turns = own_step, own_next_turns  # type: ignore[method-assign]


# llama_decode may return before a GPU is done; next_tokens waits for it
PARTS = {"try_batch": "decoding", "next_tokens": "choosing"}


def adding(clock: Clock, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its time added to a part of the clock."""

    def run(*arguments: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*arguments)
        finally:
            setattr(clock, part, getattr(clock, part) + time.thread_time() - started)

    return run


def loop(gguf: Path, options: argparse.Namespace, folder: Path) -> Rates:
    """llama_cpp.Llama, one prompt after the other."""
    import llama_cpp.llama as high_level

    length = options.prompt_tokens + options.max_tokens
    threads = {"n_threads": options.threads, "n_threads_batch": options.threads}
    model = high_level.Llama(
        str(gguf), n_ctx=pad_cells(length), n_gpu_layers=-1 if options.gpu else 0, verbose=False, **threads
    )
    library.cache_clear()
    library()  # Llama sets its own log
    ends, high_level.llama_cpp.llama_vocab_is_eog = high_level.llama_cpp.llama_vocab_is_eog, lambda *_: False
    try:
        prompts = options.prompts[: options.loop_prompts + 1]
        started, written = 0.0, 0
        for number, prompt in enumerate(prompts):
            if number == 1:  # the first is a warm-up
                started, written = time.perf_counter(), 0
            answer = model.create_completion(prompt, max_tokens=options.max_tokens, temperature=0)
            written += answer["usage"]["completion_tokens"]
        seconds = time.perf_counter() - started
    finally:
        high_level.llama_cpp.llama_vocab_is_eog = ends
        model.close()
    return Rates(float("nan"), (written + sum(map(len, prompts[1:]))) / seconds)


def batched_bench(gguf: Path, options: argparse.Namespace, folder: Path) -> Rates:
    """llama-batched-bench, with the same number of sequences and the same lengths."""
    mean = round(statistics.mean(map(len, options.prompts)))
    own = mean - options.shared
    cells = pad_cells(own + options.max_tokens) * options.parallel
    lengths = ["-npp", own, "-ntg", options.max_tokens, "-npl", options.parallel]
    size = ["-c", cells, "-t", options.threads, "-ngl", 99 if options.gpu else 0]
    words = [options.batched_bench, "-m", gguf, *lengths, *size, "--output-format", "jsonl"]
    for _ in range(3):  # a thread writes its log, and a line may be lost when the program ends
        said = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
        if lines := [line for line in said.stdout.splitlines() if line.startswith('{"n_kv_max"')]:
            break
    else:
        sys.exit(f"llama-batched-bench measured nothing:\n{said.stdout[-1000:]}\n{said.stderr[-2000:]}")
    found = json.loads(lines[-1])
    return Rates(found["speed_tg"], found["speed"] * (mean + options.max_tokens) / (own + options.max_tokens))


def server(gguf: Path, options: argparse.Namespace, folder: Path) -> Rates:
    """xllamacpp's server, with one client thread per answer in progress."""
    length, prompts = options.prompt_tokens + options.max_tokens, options.prompts
    task = {
        "gguf": str(gguf),
        "cells": pad_cells(length) * options.parallel,
        "parallel": options.parallel,
        "threads": options.threads,
        "max_tokens": options.max_tokens,
        "prompts": prompts,
        "shared": bool(options.shared),
    }
    (folder / "task.json").write_text(json.dumps(task))
    (folder / "server.py").write_text(SERVER)
    words = [str(options.xllamacpp), str(folder / "server.py"), str(folder / "task.json")]
    said = subprocess.run(words, capture_output=True, text=True)
    lines = [line for line in said.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"xllamacpp failed:\n{said.stderr[-2000:]}")
    found = json.loads(lines[-1].removeprefix("RESULT "))
    return Rates(float("nan"), (found["written"] + sum(map(len, prompts))) / found["seconds"])


def median(rates: list[Rates]) -> Rates:
    """The median of each figure."""
    return Rates(
        *(
            statistics.median(getattr(rate, name) for rate in rates)
            for name in ("generation", "all", "python", "choosing")
        )
    )


def table(found: dict[str, Rates]) -> str:
    """The rates, and ours divided by each rival's."""
    own = found["tapir-local"]
    lines = [f"{'':26} {'generation':>12} {'all':>12} {'ours, generation':>18} {'ours, all':>10}"]
    for name, rates in found.items():
        ratios = own.generation / rates.generation, own.all / rates.all
        lines.append(
            f"{name:26} {rates.generation:12,.0f} {rates.all:12,.0f} {ratios[0]:17.2f}x {ratios[1]:9.2f}x".replace(
                "nanx", "   -"
            ).replace("nan", "  -")
        )
    lines.append(f"our Python: {own.python:.1f} microseconds per token")
    chosen = [(name, rates.choosing) for name, rates in found.items() if name.startswith("tapir-local")]
    return "\n".join(
        [*lines, *(f"{name}, choosing: {own_time:.1f} microseconds per token" for name, own_time in chosen)]
    )


def versions(options: argparse.Namespace) -> str:
    """The versions of what was compared."""
    import llama_cpp

    found = [f"llama-cpp-python {llama_cpp.__version__}"]
    if options.batched_bench:
        said = subprocess.run([options.batched_bench, "--version"], capture_output=True, text=True)
        found.append("llama-batched-bench " + ((said.stdout + said.stderr).strip().splitlines() or ["?"])[0])
    if options.xllamacpp:
        code = "import xllamacpp; print(xllamacpp.__version__)"
        said = subprocess.run([options.xllamacpp, "-c", code], capture_output=True, text=True)
        found.append(f"xllamacpp {said.stdout.strip()}")
    return ", ".join(found)


if __name__ == "__main__":
    main()
