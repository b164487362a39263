"""The gate: verify that a GGUF tokenizes, stops and answers like the trained model in transformers.

`python -m tapir_local.export.gate FOLDER` runs the GateJob in FOLDER/job.json in its own process.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapir_local.data.special_tokens import tokenize_rendered, unguard_text
from tapir_local.errors import TapirError
from tapir_local.export.gguf_side import GATE_CONTEXT, GgufSide, GgufSideJob, run_gguf_side
from tapir_local.export.probes import FALLBACK_PROMPTS, gate_texts, render_prompt, sample_prompts
from tapir_local.export.reference import ReferenceModel, load_reference, reference_logits
from tapir_local.export.tokenizer import end_of_turn_id, read_tokenizer_json, special_token_texts
from tapir_local.export.weights import FloatArray
from tapir_local.files import read_record, read_rows, write_record
from tapir_local.process import child_main, run_in_process
from tapir_local.records import Example, Message, Progress
from tapir_local.training.model import load_tokenizer

# The largest mean KL divergence, in nats per token, allowed per type of weights. llama.cpp's figures for Llama-3-8B
# (tools/perplexity/README.md) are 0.0014 for q8_0, 0.0055 for q6_k, 0.011 for q5_k_m and 0.031 for q4_k_m; students of
# a few million parameters have about ten times as much. A wrong mapping gives 0.3 and more.
MAX_KL = {"f32": 1e-5, "f16": 1e-3, "bf16": 5e-3, "q8_0": 1e-2, "q6_k": 3e-2, "q5_k_m": 0.2, "q4_k_m": 0.2}
# The share of greedy tokens that must be equal. Llama-3-8B has 0.977 for q8_0, 0.960 for q6_k and 0.919 for q4_k_m
# (same source, "Same top p"); smaller students have less.
MIN_AGREEMENT = {
    "f32": 0.99,
    "f16": 0.98,
    "bf16": 0.95,
    "q8_0": 0.9,
    "q6_k": 0.88,
    "q5_k_m": 0.75,
    "q4_k_m": 0.75,
}
# The least share of an adapter's effect that a GGUF must show. Where the divergence by quantization is more than four
# times the effect, the share says nothing: SmolLM2-135M in q5_k_m showed 0.23 of a training of two steps, whose effect
# was a fourteenth of it. Gemma 3 270M, made from a quantized GGUF, showed 0.70 of it in q8_0, and 1.00 in f16.
MIN_ADAPTER_SHARE, MIN_VISIBLE_EFFECT = 0.25, 0.25
QUANT_OF_FILE_TYPE = {"0": "f32", "1": "f16", "7": "q8_0", "15": "q4_k_m", "17": "q5_k_m", "18": "q6_k", "32": "bf16"}


@dataclass(frozen=True)
class GateJob:
    """What one run of the gate compares. `rows` is a JSONL file of Example, the training rows.

    With `adapter_gguf`, `gguf` is the base and both are compared together. Without `min_agreement`, MIN_AGREEMENT for
    the type of the weights applies.
    """

    model_dir: Path
    gguf: Path
    rows: Path
    out: Path
    min_agreement: float | None = None
    adapter: Path | None = None
    adapter_gguf: Path | None = None


@dataclass(frozen=True)
class GateLimits:
    """Limits of the gate: the minimum share of equal greedy tokens (None: MIN_AGREEMENT), and the free memory in bytes
    (None: what the machine has)."""

    min_agreement: float | None = None
    free: int | None = None


DEFAULT_LIMITS = GateLimits()


@dataclass(frozen=True)
class Mismatch:
    """A text that transformers and llama.cpp tokenize differently."""

    text: str
    trained: tuple[int, ...]
    gguf: tuple[int, ...]


@dataclass(frozen=True)
class Figures:
    """How close a GGUF is to the trained model over `positions` tokens of its own greedy answers.

    `kl` is the mean KL divergence of the next-token distributions from the trained model's in nats, `kl_base` that from
    the model without the adapter, `largest_difference` the largest difference of two logits, and `agreement` the share
    of positions at which both choose the same token. `adapter_effect` is the mean squared distance between the trained
    model and the base, `adapter_share` how far the GGUF has gone from the base to the trained model: about 1 with the
    adapter, 0 without (see adapter_figures).
    """

    kl: float
    kl_base: float | None
    largest_difference: float
    agreement: float
    positions: int
    adapter_effect: float | None = None
    adapter_share: float | None = None


@dataclass(frozen=True)
class GateReport:
    """The result of the gate. `failed` names the failed checks; `describe_failures` explains them.

    `bos_trained` and `bos_gguf` count the BOS tokens of a prompt in training and with the GGUF. `streamed`: the
    reference model did not fit in memory and was read layer by layer. `bits_per_weight` is the size of the GGUF's
    tensors in bits over the number of its weights; 0 in reports of older versions.
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
    bits_per_weight: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return not self.failed


def verify_gguf(
    model_dir: Path,
    adapter: Path | None,
    gguf: Path,
    rows: Sequence[Example],
    *,
    adapter_gguf: Path | None = None,
    limits: GateLimits = DEFAULT_LIMITS,
) -> GateReport:
    """Compare a GGUF with the model it was made from: token ids of all `rows` and of many probe texts, and some
    answers.

    An adapter that is not merged is loaded on top: `adapter_gguf`. llama.cpp runs in a process of its own, and both
    models on the CPU, also if there is a GPU. The reference model is loaded in f32 if it fits in memory, otherwise read
    layer by layer. Raises TapirError if one of them cannot be loaded.
    """
    tokenizer = load_tokenizer(model_dir)
    texts = gate_texts(tokenizer, rows)
    prompt = render_prompt(tokenizer, (Message("user", FALLBACK_PROMPTS[0]),))
    template = tokenizer.get_chat_template()
    ends = end_of_turn_id(read_tokenizer_json(model_dir), template, special_token_texts(model_dir))
    prompts = sample_prompts(rows)
    job = GgufSideJob(gguf, adapter_gguf, tuple(texts), prompt, tuple(ends.values()), tuple(prompts))
    with run_gguf_side(job) as found:
        quant = named_quant(gguf, found.file_type)
        wrong = find_mismatches(tokenizer, found.ids, texts)
        bos_trained, bos_gguf = count_bos(tokenizer, prompt), found.bos_ids.count(tokenizer.bos_token_id)
        checks = {
            "tokens": not wrong,
            "bos": bos_trained == bos_gguf,
            "eos": bool(ends) and found.eos == (tokenizer.eos_token or "") and all(found.stops),
            "template": found.template == template,
        }
        reference = load_reference(model_dir, adapter, reserved=gate_memory(found.vocabulary), free=limits.free)
        figures = compare_answers(found, reference)
    wanted = MIN_AGREEMENT[quant] if limits.min_agreement is None else limits.min_agreement
    checks["logits"] = figures.kl <= MAX_KL[quant]
    checks["adapter"] = not lacks_adapter(figures, MAX_KL[quant])
    checks["agreement"] = figures.agreement >= wanted
    failed = tuple(name for name, fine in checks.items() if not fine)
    counts = (len(texts), len(wrong), tuple(wrong[:3]), bos_trained, bos_gguf)
    return GateReport(failed, *counts, figures, MAX_KL[quant], wanted, reference.streamed, found.bits_per_weight)


def gate_memory(vocabulary: int) -> int:
    """Bytes needed besides the reference model: the logits of a whole context on both sides."""
    return 2 * 4 * GATE_CONTEXT * vocabulary


def named_quant(gguf: Path, file_type: str) -> str:
    """The type of the weights, from its number in the metadata of the GGUF."""
    if file_type not in QUANT_OF_FILE_TYPE:
        fix = f"Export it as {', '.join(MAX_KL)}."
        what = f"the gate has no threshold for its type of weights ({file_type})"
        raise TapirError(what, where=str(gguf), fix=fix)
    return QUANT_OF_FILE_TYPE[file_type]


def find_mismatches(tokenizer: Any, found: Sequence[Sequence[int]], texts: Sequence[str]) -> list[Mismatch]:
    """The texts whose token ids differ from those `found` by llama.cpp."""
    pairs = zip(texts, tokenize_rendered(tokenizer, texts), found, strict=True)
    return [Mismatch(unguard_text(text), tuple(ids), tuple(other)) for text, ids, other in pairs if ids != list(other)]


def count_bos(tokenizer: Any, text: str) -> int:
    """BOS tokens in a prompt as trained."""
    return int(tokenizer(text, add_special_tokens=False)["input_ids"].count(tokenizer.bos_token_id))


def compare_answers(found: GgufSide, trained: ReferenceModel) -> Figures:
    """Compare both models at every position of the GGUF's greedy answers."""
    parts = [
        answer_figures(found.answer_logits(number), wanted, base)
        for number, (wanted, base) in enumerate(reference_logits(trained, found.answers))
    ]
    return pool_figures(parts)


def answer_figures(gguf: FloatArray, trained: FloatArray, base: FloatArray | None) -> Figures:
    """The figures of one answer. A tokenizer's spare rows may be present on one side only."""
    import numpy as np

    width = min(gguf.shape[1], trained.shape[1])
    gguf, trained = gguf[:, :width], trained[:, :width]
    largest = float(np.nan_to_num(np.abs(gguf - trained).max(), nan=1e9))
    agreement = float((gguf.argmax(axis=1) == trained.argmax(axis=1)).mean())
    found, end = log_softmax(gguf), log_softmax(trained)
    kl = mean_divergence(end, found)
    if base is None:
        return Figures(kl, None, largest, agreement, len(gguf))
    start = log_softmax(base[:, :width])
    return Figures(
        kl, mean_divergence(start, found), largest, agreement, len(gguf), *adapter_figures(found, end, start)
    )


def lacks_adapter(figures: Figures, max_kl: float) -> bool:
    """Whether the GGUF does not answer as the adapter does, as far as that can be told: see MIN_ADAPTER_SHARE.

    Quantization explains a divergence of `max_kl` at most; another adapter's may be larger.
    """
    share, effect = figures.adapter_share, figures.adapter_effect or 0.0
    visible = effect / 2 >= MIN_VISIBLE_EFFECT * min(figures.kl, max_kl)
    return visible and share is not None and share < MIN_ADAPTER_SHARE


def adapter_figures(gguf: FloatArray, trained: FloatArray, base: FloatArray) -> tuple[float, float | None]:
    """The adapter's effect, and the share of it that the GGUF shows (None if it has no effect), from log-probabilities.

    The projection <GGUF - base, trained - base> / |trained - base|² of log-probabilities, weighted by the trained
    model's probabilities and centered; half of such a squared distance is the KL divergence of two close distributions.
    The noise of quantization points along the adapter's effect by chance only.
    """
    import numpy as np

    weights = np.exp(trained)
    way, gone = trained - base, gguf - base
    way, gone = (part - (weights * part).sum(axis=1, keepdims=True) for part in (way, gone))
    effect = float((weights * way * way).sum(axis=1).mean())
    return effect, float((weights * way * gone).sum(axis=1).mean()) / effect if effect > 0 else None


def pool_figures(parts: Sequence[Figures]) -> Figures:
    """Combine the figures of all answers: means over all positions, and the largest difference."""
    positions = sum(part.positions for part in parts)

    def mean(values: Sequence[float]) -> float:
        weighed = zip(values, parts, strict=True)
        return sum(value * part.positions for value, part in weighed) / positions

    bases = [part.kl_base for part in parts if part.kl_base is not None]
    effects = [part.adapter_effect or 0.0 for part in parts]
    gone = mean([effect * (part.adapter_share or 0.0) for effect, part in zip(effects, parts, strict=True)])
    effect = mean(effects)
    return Figures(
        mean([part.kl for part in parts]),
        mean(bases) if bases else None,
        max(part.largest_difference for part in parts),
        mean([part.agreement for part in parts]),
        positions,
        effect if bases else None,
        gone / effect if effect > 0 else None,
    )


def mean_divergence(trained: FloatArray, gguf: FloatArray) -> float:
    """Mean over rows of KL(trained ‖ GGUF) in nats, from log-probabilities; 1e9 if it is not a number."""
    import numpy as np

    return float(np.nan_to_num((np.exp(trained) * (trained - gguf)).sum(axis=1).mean(), nan=1e9, posinf=1e9))


def log_softmax(values: FloatArray) -> FloatArray:
    import numpy as np

    shifted = values.astype(np.float64) - values.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def run_gate(job: GateJob, folder: Path, progress: Progress | None = None) -> None:
    """Run the gate in a separate process, which leaves job.json, report.json and gate.log in `folder`.

    `job.out` is written only if the GGUF passes; otherwise TapirError names the failed checks. It names the GGUF if
    llama.cpp aborted its process.
    """
    run_in_process(gate_main, job, folder, progress)


def gate_main(folder: Path, progress: Progress) -> None:
    """Run the job in `folder`: the entry point of the gate's process."""
    job = read_record(GateJob, folder / "job.json")
    rows = read_rows(Example, job.rows)
    report = verify_gguf(
        job.model_dir,
        job.adapter,
        job.gguf,
        rows,
        adapter_gguf=job.adapter_gguf,
        limits=GateLimits(job.min_agreement),
    )
    (folder / "report.json").unlink(missing_ok=True)
    write_record(folder / "report.json", report)
    if not report.passed:
        fix = f"The adapter is kept; {folder / 'report.json'} has the figures. Another export.quant may pass."
        what = f"the GGUF is not the trained model: {describe_failures(report)}"
        raise TapirError(what, where=str(job.gguf), fix=fix)
    write_record(job.out, report)


def describe_failures(report: GateReport) -> str:
    """Each failed check with its figure."""
    found = report.figures
    words = {
        "tokens": f"{report.mismatches} of {report.probes} texts are tokenized differently",
        "bos": f"{report.bos_gguf} BOS tokens instead of {report.bos_trained}",
        "eos": "it does not stop where training ended a turn",
        "template": "its chat template is different",
        "logits": f"divergence {found.kl:.3g} nats, at most {report.max_kl:g} allowed",
        "adapter": "it answers as the base does, without the adapter",
        "agreement": f"{found.agreement:.1%} of greedy tokens agree, {report.min_agreement:.1%} required",
    }
    return "; ".join(f"{name} ({words[name]})" for name in report.failed)


if __name__ == "__main__":
    sys.exit(child_main(gate_main))
