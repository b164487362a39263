"""llama.cpp's side of the gate, in a process of its own.

`python -m tapir_local.export.gguf_side FOLDER` does the GgufSideJob in FOLDER/job.json. torch and llama.cpp do not
share a process: on an H200, with both built for CUDA 13.0 (torch 2.11), loading a GGUF after torch was imported
ended by SIGSEGV, and so did importing torch after llama.cpp.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.export.weights import FloatArray
from tapir_local.files import private_folder, read_record, remove_path, write_record
from tapir_local.inference.batch import compute_logits
from tapir_local.inference.config import ContextConfig, GenerationConfig
from tapir_local.inference.generate import answer_tokens, encode_prompt
from tapir_local.inference.lib import library
from tapir_local.inference.model import Engine, bits_per_weight, metadata, open_context, open_model
from tapir_local.inference.tokens import encode, is_end_token
from tapir_local.process import Crashed, Parent, call_in_process, exit_error, serve_parent
from tapir_local.records import Prompt

GATE_ANSWER_TOKENS = 48
GATE_CONTEXT = 1024
SCORED_TOKENS = 256


@dataclass(frozen=True)
class GgufSideJob:
    """What is asked of a GGUF, with an adapter on top or without.

    `texts` are to be tokenized, `bos_text` once more with the tokens that the metadata tells a runtime to add, and
    `prompts` answered; `ends` are the tokens at which it should stop. The logits of the first SCORED_TOKENS of BOS and
    `scored` follow those of the answers.
    """

    gguf: Path
    adapter: Path | None
    texts: tuple[str, ...]
    bos_text: str
    ends: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    scored: str = ""


@dataclass(frozen=True)
class GgufSide:
    """What the GGUF answered: `file_type`, `template` and `eos` of its metadata, `vocabulary` tokens, and token ids.

    `stops` is whether it stops at each of the job's `ends`. An answer is the token ids of prompt and answer, and the
    position that predicts the answer's first token; `answer_logits` has the logits from there on.
    """

    folder: Path
    file_type: str
    template: str
    eos: str
    vocabulary: int
    bits_per_weight: float
    ids: tuple[tuple[int, ...], ...]
    bos_ids: tuple[int, ...]
    stops: tuple[bool, ...]
    answers: tuple[tuple[tuple[int, ...], int], ...]

    def answer_logits(self, number: int) -> FloatArray:
        """The logits of an answer: float32 (positions, vocabulary), read from its file."""
        import numpy as np

        found: FloatArray = np.load(logits_file(self.folder, number))
        return found


@contextmanager
def run_gguf_side(job: GgufSideJob, beside: Path | None = None) -> Iterator[GgufSide]:
    """Do the job in a process of its own. Its files are `beside` that file until the block ends; by default beside the
    adapter, or the GGUF.

    If the process ends by a signal, TapirError names the GGUF and the log, which is then kept.
    """
    named = beside or job.adapter or job.gguf
    folder = named.with_name(named.name + ".gate")
    remove_path(folder)
    private_folder(folder)
    try:
        call_in_process(gguf_side_main, job, folder, {}, explain=partial(gguf_side_exit_error, job.gguf))
        yield read_record(GgufSide, folder / "found.json")
    except BaseException as error:
        if isinstance(error, TapirError) and str(folder) in str(error):
            for file in folder.glob("*.npy"):
                file.unlink()
        else:
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def gguf_side_exit_error(gguf: Path, module: str, code: int, log: Path) -> TapirError:
    """The error for a process that ended with `code` (negative: that signal) without reporting one."""
    error = exit_error(module, code, log)
    if not isinstance(error, Crashed):
        return error
    fix = f"{log} has the full message. Use the tokenizer that the model was published with."
    return TapirError(f"the GGUF cannot be used: {error.what}", where=str(gguf), fix=fix)


def gguf_side_main(folder: Path, parent: Parent) -> None:
    """Do the job in `folder`: the entry point of the process.

    On the CPU, because a GPU rounds differently: cuBLAS multiplies f32 in TF32, with 10 bits of mantissa, and the limit
    for an f32 GGUF is a divergence of 1e-5.
    """
    job = read_record(GgufSideJob, folder / "job.json")
    with open_model(job.gguf, adapter=job.adapter, on_cpu=True) as llama:
        with open_context(llama, ContextConfig(GATE_CONTEXT * 4, 5, exact=True)) as engine:
            answers = greedy_answers(engine, job.prompts) if job.prompts else []
            if job.scored:
                answers.append((tuple(encode(llama, llama.bos + job.scored)[:SCORED_TOKENS]), 0))
            save_logits(engine, answers, folder)
        found = GgufSide(
            folder,
            metadata(llama, "general.file_type"),
            llama.template,
            llama.eos,
            int(library().llama_vocab_n_tokens(llama.vocab)),
            bits_per_weight(llama),
            tuple(tuple(encode(llama, text)) for text in job.texts),
            tuple(encode(llama, job.bos_text, add_special=True)),
            tuple(is_end_token(llama, token) for token in job.ends),
            tuple(answers),
        )
    write_record(folder / "found.json", found)


def greedy_answers(engine: Engine, prompts: Sequence[Prompt]) -> list[tuple[tuple[int, ...], int]]:
    """Token ids of prompt and greedy answer, and the position that predicts the answer's first token."""
    tokens = [encode_prompt(engine.model, prompt) for prompt in prompts]
    config = GenerationConfig(GATE_ANSWER_TOKENS, GATE_CONTEXT)
    answers = answer_tokens(engine, tokens, config, [0] * len(tokens))
    texts = [
        ((*prompt, *written), len(prompt) - 1) for prompt, (written, _) in zip(tokens, answers, strict=True) if written
    ]
    return texts or [(tuple(tokens[-1]), len(tokens[-1]) - 1)]


def save_logits(engine: Engine, answers: Sequence[tuple[Sequence[int], int]], folder: Path) -> None:
    """Write the logits of every answer, from the position that predicts its first token on."""
    import numpy as np

    for number, (ids, start) in enumerate(answers):
        np.save(logits_file(folder, number), compute_logits(engine, ids)[start:])


def logits_file(folder: Path, number: int) -> Path:
    return folder / f"logits-{number:02d}.npy"


if __name__ == "__main__":
    sys.exit(serve_parent(gguf_side_main))
