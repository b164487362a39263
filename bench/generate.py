"""Tokens per second of tapir_local.generate beside llama-cpp-python's own loop, on one GGUF in one run.

    python bench/generate.py STUDENT.gguf [--prompts 128] [--max-tokens 64] [--parallel 32] [--threads 2]

Without a GGUF a random Llama of the pocket student's shape (3M parameters) is made. The rate counts the tokens written;
loading is not in it for the loop and is for `generate`. OMP_NUM_THREADS bounds both.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from tapir_local.generate import generate
from tapir_local.llama import cores, library, template_of
from tapir_local.records import Message, Prompt
from tapir_local.template import render


def main() -> None:
    """Measure both and print one line each, then the ratio."""
    options = arguments()
    library()  # loaded before the clock starts, and before torch
    with tempfile.TemporaryDirectory() as folder:
        gguf = options.gguf or random_student(Path(folder))
        prompts = [
            (Message("user", f"What is {n} times {n * 7 % 13}? List the words."),) for n in range(options.prompts)
        ]
        loop = high_level(gguf, prompts[: max(1, options.prompts // 8)], options)
        ours = batched(gguf, prompts, options)
    print(f"one at a time  {loop:8,.0f} tokens/s")
    print(f"{options.parallel:3d} in flight  {ours:8,.0f} tokens/s")
    print(f"ratio          {ours / loop:8.2f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", nargs="?", type=Path)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--parallel", type=int, default=32)
    parser.add_argument("--threads", type=int, default=cores())
    return parser.parse_args()


def random_student(folder: Path) -> Path:
    """A Llama of 3M parameters in f32."""
    from models import make_model

    from tapir_local.export import export_gguf

    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}
    model = make_model(folder / "model", num_attention_heads=6, num_key_value_heads=6, **shape)
    export_gguf(model, folder / "student.gguf", adapter=None, quant="f32")
    return folder / "student.gguf"


def batched(gguf: Path, prompts: list[Prompt], options: argparse.Namespace) -> float:
    """Tokens per second of continuous batching."""
    started = time.perf_counter()
    settings = {
        "max_tokens": options.max_tokens,
        "context": 512,
        "parallel": options.parallel,
        "threads": options.threads,
    }
    answers = generate(gguf, prompts, **settings)
    return sum(answer.tokens for answer in answers) / (time.perf_counter() - started)


def high_level(gguf: Path, prompts: list[Prompt], options: argparse.Namespace) -> float:
    """Tokens per second of llama_cpp.Llama, prompt after prompt."""
    from llama_cpp import Llama

    template, bos, eos = template_of(gguf)
    model = Llama(str(gguf), n_ctx=512, n_threads=options.threads, n_threads_batch=options.threads, verbose=False)
    library()  # Llama sets a log of its own
    written, started = 0, time.perf_counter()
    for prompt in prompts:
        text = render(template, prompt, add_generation_prompt=True, bos_token=bos, eos_token=eos)
        tokens = model.tokenize(text.encode(), add_bos=False, special=True)
        written += model.create_completion(tokens, max_tokens=options.max_tokens, temperature=0)["usage"][
            "completion_tokens"
        ]
    rate = written / (time.perf_counter() - started)
    model.close()
    return rate


if __name__ == "__main__":
    main()
