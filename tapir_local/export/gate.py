"""The gate: does a GGUF tokenise, stop and answer as the trained model does in transformers?

`python -m tapir_local.export.gate FOLDER` does the GateJob in FOLDER/job.json, in a process of its own.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapir_local.data.quoting import ids_of, plain
from tapir_local.errors import TapirError
from tapir_local.export.probes import QUESTIONS, rendered, sample, texts_of
from tapir_local.export.reference import Trained, load_trained, trained_logits
from tapir_local.export.tokenizer import end_of_turn, read_tokenizer, special_texts
from tapir_local.files import read_record, read_rows, write_record
from tapir_local.inference.batch import logits
from tapir_local.inference.generate import answer, encode_prompt
from tapir_local.inference.lib import library
from tapir_local.inference.model import Engine, Model, metadata, open_context, open_model
from tapir_local.inference.tokens import encode, is_end
from tapir_local.process import Crashed, child_main, run_in_process
from tapir_local.records import Array, Example, Message, Progress, Prompt

# The mean KL divergence, in nats per token, that a type of weights may cost. Llama-3-8B's own, published with llama.cpp
# (tools/perplexity/README.md), are 0.0014 for q8_0, 0.0055 for q6_k, 0.011 for q5_k_m and 0.031 for q4_k_m; students of
# a few million parameters lose about ten times as much. A wrong mapping costs 0.3 and more.
MAX_KL = {"f32": 1e-5, "f16": 1e-3, "bf16": 5e-3, "q8_0": 1e-2, "q6_k": 3e-2, "q5_k_m": 0.1, "q4_k_m": 0.2}
# The share of greedy tokens that must be the same. Llama-3-8B's own (same source, "Same top p") are 0.977 for q8_0,
# 0.960 for q6_k and 0.919 for q4_k_m; smaller students lose more.
MIN_AGREEMENT = {
    "f32": 0.99,
    "f16": 0.98,
    "bf16": 0.95,
    "q8_0": 0.9,
    "q6_k": 0.88,
    "q5_k_m": 0.85,
    "q4_k_m": 0.8,
}
FILE_TYPES = {"0": "f32", "1": "f16", "7": "q8_0", "15": "q4_k_m", "17": "q5_k_m", "18": "q6_k", "32": "bf16"}
ANSWER_TOKENS = 48
CONTEXT = 1024


@dataclass(frozen=True)
class GateJob:
    """What one passage through the gate compares. `rows` is a JSONL file of Example, as trained on.

    With `adapter_gguf`, an adapter alone, `gguf` is the base's and both together are what is compared. Without
    `min_agreement` it is MIN_AGREEMENT's for the type of the weights.
    """

    model_dir: Path
    gguf: Path
    rows: Path
    out: Path
    min_agreement: float | None = None
    adapter: Path | None = None
    adapter_gguf: Path | None = None


@dataclass(frozen=True)
class Mismatch:
    """A text that transformers and llama.cpp tokenise differently."""

    text: str
    trained: tuple[int, ...]
    gguf: tuple[int, ...]


@dataclass(frozen=True)
class Figures:
    """How near a GGUF is to the trained model over `positions` of its own greedy answers.

    `kl` is the mean divergence of its next-token distribution from the trained model's in nats, `kl_base` from that of
    the model without the adapter, `largest_difference` that of two logits, `agreement` the share of positions at which
    both would choose the same token.
    """

    kl: float
    kl_base: float | None
    largest_difference: float
    agreement: float
    positions: int


@dataclass(frozen=True)
class GateReport:
    """What was compared. `failed` names the checks not passed, out of those in `refusal`.

    `bos_trained` and `bos_gguf` count the BOS tokens of a prompt in training and with the GGUF. `streamed` says that
    the trained model did not fit in memory and was read layer by layer.
    """

    failed: tuple[str, ...]
    probes: int
    mismatches: int
    examples: tuple[Mismatch, ...]
    bos_trained: int
    bos_gguf: int
    figures: Figures
    max_kl: float
    min_agreement: float
    streamed: bool = False

    @property
    def passed(self) -> bool:
        """True when no check failed."""
        return not self.failed


def gate(
    model_dir: Path,
    adapter: Path | None,
    gguf: Path,
    rows: Sequence[Example],
    *,
    min_agreement: float | None = None,
    adapter_gguf: Path | None = None,
    free: int | None = None,
) -> GateReport:
    """Compare a GGUF with the model it was made of: the tokens of all `rows` and of many probes, answers to some.

    An adapter that is not merged into it is laid over it: `adapter_gguf`. The model is loaded in f32 on the CPU where
    `free` bytes of memory, what the machine has if left out, hold it, and read layer by layer where they do not.
    TapirError when one of them cannot be loaded.
    """
    with open_model(gguf, adapter=adapter_gguf) as llama:  # before torch, so that `patient_threads` is heeded
        quant, tokenizer = quant_of(llama), load_tokenizer(model_dir)
        texts = texts_of(tokenizer, rows)
        wrong = mismatches(tokenizer, llama, texts)
        asked = rendered(tokenizer, (Message("user", QUESTIONS[0]),))
        trained_bos, gguf_bos = bos_counts(tokenizer, llama, asked)
        checks = {
            "tokens": not wrong,
            "bos": trained_bos == gguf_bos,
            "eos": stops_as_trained(tokenizer, llama, model_dir),
            "template": llama.template == tokenizer.get_chat_template(),
        }
        trained = load_trained(model_dir, adapter, beside=working_memory(llama), free=free)
        with open_context(llama, cells=CONTEXT * 4, sequences=5, exact=True) as engine:
            found = compare(engine, trained, sample(rows))
    wanted = MIN_AGREEMENT[quant] if min_agreement is None else min_agreement
    checks["logits"] = found.kl <= MAX_KL[quant]
    checks["adapter"] = found.kl_base is None or found.kl <= found.kl_base
    checks["agreement"] = found.agreement >= wanted
    failed = tuple(name for name, fine in checks.items() if not fine)
    counts = (len(texts), len(wrong), tuple(wrong[:3]), trained_bos, gguf_bos)
    return GateReport(failed, *counts, found, MAX_KL[quant], wanted, trained.streamed)


def working_memory(llama: Model) -> int:
    """Bytes beside the trained model: the GGUF, and the logits of a whole context on either side."""
    words = int(library().llama_vocab_n_tokens(llama.vocab))
    return llama.gguf.stat().st_size + 2 * 4 * CONTEXT * words


def quant_of(llama: Model) -> str:
    """The type of the weights, as the GGUF says it."""
    number = metadata(llama, "general.file_type")
    if number not in FILE_TYPES:
        fix = f"Export it as {', '.join(MAX_KL)}."
        raise TapirError(f"its weights are of a type without a threshold ({number})", where=str(llama.gguf), fix=fix)
    return FILE_TYPES[number]


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer that the student was trained with."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)


def mismatches(tokenizer: Any, llama: Model, texts: Sequence[str]) -> list[Mismatch]:
    """The texts whose token ids are not the same on both sides."""
    pairs = zip(texts, ids_of(tokenizer, texts), (encode(llama, text) for text in texts), strict=True)
    return [Mismatch(plain(text), tuple(ids), tuple(other)) for text, ids, other in pairs if ids != other]


def bos_counts(tokenizer: Any, llama: Model, text: str) -> tuple[int, int]:
    """BOS tokens in a prompt as trained, and where a runtime lets the GGUF add what it says is to be added."""
    bos = tokenizer.bos_token_id
    trained = tokenizer(text, add_special_tokens=False)["input_ids"]
    return trained.count(bos), encode(llama, text, add_special=True).count(bos)


def stops_as_trained(tokenizer: Any, llama: Model, model_dir: Path) -> bool:
    """True when EOS is the same and llama.cpp stops at the token that ended each turn in training."""
    ends = end_of_turn(read_tokenizer(model_dir), tokenizer.get_chat_template(), special_texts(model_dir))
    return (
        bool(ends) and llama.eos == (tokenizer.eos_token or "") and all(is_end(llama, token) for token in ends.values())
    )


def compare(engine: Engine, trained: Trained, prompts: Sequence[Prompt]) -> Figures:
    """The GGUF's greedy answers, and what both make of every position in them."""
    texts = own_answers(engine, prompts)
    parts = [
        figures(logits(engine, ids)[start:], wanted, base)
        for (ids, start), (wanted, base) in zip(texts, trained_logits(trained, texts), strict=True)
    ]
    return pooled(parts)


def own_answers(engine: Engine, prompts: Sequence[Prompt]) -> list[tuple[list[int], int]]:
    """Prompt and greedy answer as token ids, and the position that foretells the answer's first token."""
    tokens = [encode_prompt(engine.model, prompt) for prompt in prompts]
    answers = answer(
        engine, tokens, max_tokens=ANSWER_TOKENS, context=CONTEXT, temperature=0.0, seeds=[0] * len(tokens)
    )
    texts = [
        (prompt + written, len(prompt) - 1) for prompt, (written, _) in zip(tokens, answers, strict=True) if written
    ]
    return texts or [(tokens[-1], len(tokens[-1]) - 1)]


def figures(gguf: Array, trained: Array, base: Array | None) -> Figures:
    """Of one answer. A tokenizer's spare rows may be on one side only."""
    import numpy as np

    width = min(gguf.shape[1], trained.shape[1])
    gguf, trained = gguf[:, :width], trained[:, :width]
    kl_base = None if base is None else divergence(base[:, :width], gguf)
    largest = float(np.nan_to_num(np.abs(gguf - trained).max(), nan=1e9))
    agreement = float((gguf.argmax(axis=1) == trained.argmax(axis=1)).mean())
    return Figures(divergence(trained, gguf), kl_base, largest, agreement, len(gguf))


def pooled(parts: Sequence[Figures]) -> Figures:
    """Of all answers: means over their positions, and the largest difference anywhere."""
    positions = sum(part.positions for part in parts)

    def mean(values: Sequence[float]) -> float:
        weighed = zip(values, parts, strict=True)
        return sum(value * part.positions for value, part in weighed) / positions

    bases = [part.kl_base for part in parts if part.kl_base is not None]
    return Figures(
        mean([part.kl for part in parts]),
        mean(bases) if bases else None,
        max(part.largest_difference for part in parts),
        mean([part.agreement for part in parts]),
        positions,
    )


def divergence(trained: Array, gguf: Array) -> float:
    """Mean over rows of KL(trained ‖ GGUF) of the two softmax distributions, in nats; 1e9 where it is no number."""
    import numpy as np

    p, q = log_softmax(trained), log_softmax(gguf)
    return float(np.nan_to_num((np.exp(p) * (p - q)).sum(axis=1).mean(), nan=1e9, posinf=1e9))


def log_softmax(values: Array) -> Array:
    import numpy as np

    shifted = values.astype(np.float64) - values.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def pass_gate(job: GateJob, folder: Path, progress: Progress | None = None) -> None:
    """Run the job in a process of its own, which leaves job.json, report.json and gate.log in `folder`.

    `job.out` is written only if the GGUF passes. TapirError that names the failed checks otherwise, or the GGUF where
    llama.cpp ended the process over it.
    """
    try:
        run_in_process("tapir_local.export.gate", job, folder, progress)
    except Crashed as error:
        fix = f"{error.where} has the whole message. Take the tokenizer that the model was published with."
        raise TapirError(f"the GGUF cannot be used: {error.what}", where=str(job.gguf), fix=fix) from error


def run_folder(folder: Path, progress: Progress) -> None:
    """The child's side of `pass_gate`."""
    job = read_record(GateJob, folder / "job.json")
    rows = read_rows(Example, job.rows)
    report = gate(
        job.model_dir,
        job.adapter,
        job.gguf,
        rows,
        min_agreement=job.min_agreement,
        adapter_gguf=job.adapter_gguf,
    )
    (folder / "report.json").unlink(missing_ok=True)
    write_record(folder / "report.json", report)
    if not report.passed:
        fix = f"The adapter is kept; {folder / 'report.json'} has the figures. Another export.quant may do better."
        raise TapirError(f"the GGUF is not the trained model: {refusal(report)}", where=str(job.gguf), fix=fix)
    write_record(job.out, report)


def refusal(report: GateReport) -> str:
    """Each failed check with its figure."""
    found = report.figures
    words = {
        "tokens": f"{report.mismatches} of {report.probes} texts are tokenised otherwise",
        "bos": f"{report.bos_gguf} BOS tokens instead of {report.bos_trained}",
        "eos": "it does not stop where training ended a turn",
        "template": "its chat template is another",
        "logits": f"divergence {found.kl:.3g} nats, at most {report.max_kl:g} allowed",
        "adapter": "it is nearer to the base than to the trained model",
        "agreement": f"{found.agreement:.1%} of greedy tokens agree, {report.min_agreement:.1%} wanted",
    }
    return "; ".join(f"{name} ({words[name]})" for name in report.failed)


if __name__ == "__main__":
    sys.exit(child_main(run_folder))
