"""The gate: does a GGUF tokenise, stop and answer as the trained model does in transformers?

`python -m tapir_local.gate FOLDER` does the GateJob in FOLDER/job.json, in a process of its own.
"""

import random
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapir_local.batching import logits
from tapir_local.errors import TapirError
from tapir_local.generate import answer, encode_prompt
from tapir_local.gguf_vocab import end_of_turn, read_json, special_texts
from tapir_local.llama import Engine, Model, encode, is_end, metadata, open_context, open_model
from tapir_local.process import Progress, child_main, in_own_process
from tapir_local.records import Example, Message, Prompt
from tapir_local.rundir import read_record, read_rows, write_record
from tapir_local.template import render

Array = Any  # numpy.ndarray; numpy is imported where it is used

# The mean KL divergence, in nats per token, that a type of weights may cost. Llama-3-8B's own, published with llama.cpp
# (tools/perplexity/README.md), are 0.0014 for q8_0, 0.0055 for q6_k, 0.011 for q5_k_m and 0.031 for q4_k_m; students of
# a few million parameters lose about ten times as much. A wrong mapping costs 0.3 and more.
MAX_KL = {"f32": 1e-5, "f16": 1e-3, "bf16": 5e-3, "q8_0": 1e-2, "q6_k": 3e-2, "q5_k_m": 0.1, "q4_k_m": 0.2}
FILE_TYPES = {"0": "f32", "1": "f16", "7": "q8_0", "15": "q4_k_m", "17": "q5_k_m", "18": "q6_k", "32": "bf16"}
PROBES = 600
ANSWERS = 16  # prompts answered; more tell no more
ANSWER_TOKENS = 48
CONTEXT = 1024

FRAGMENTS = (
    *(
        "Hello, world!",
        "The quick brown fox",
        "I'm, you're, it'll, WE'VE, don't",
        "naïve café, coöperate, façade",
        "ﬁne ½ ² Ⅷ",
    ),
    *(
        "Привет, мир",
        "Ελληνικά ΑΒΓ",
        "你好\uff0c世界。",
        "こんにちは カタカナ",
        "안녕하세요",
        "مرحبا بالعالم",
        "שלום",
        "नमस्ते दुनिया",
        "สวัสดีชาวโลก",
    ),
    *(
        "Tiếng Việt có dấu",
        "ქართული",
        "தமிழ்",
        "ᚠᛇᚻ",
        "Straße ẞ ǅ",
        "🙂🚀",
        "👩‍👩‍👧 🇩🇪",
        "0",
        "12",
        "345",
        "6789",
        "3.14159",
        "1,000,000",
        "-7 + 8 = 1",
    ),
    *(
        "٣٤٥",
        "१२३",
        " ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        " \n ",
        "\u00a0",
        "\u3000",
        "\u200b",
        "a  b   c",
        "end. \n\n\n Next",
    ),
    *(
        "def f(x):\n    return x ** 2  # square\n",
        "for (int i = 0; i < n; ++i) { a[i] += 1; }",
        '{"key": [1, 2.5e-3, null]}',
        "SELECT * FROM t;",
    ),
    *(
        "<p class='x'>&amp;</p>",
        "https://example.org/a?b=c&d=%20",
        "C:\\dir\\file.txt",
        "\\frac{a}{b} $x^2$",
        "- item\n* item\n1. item",
        "`code`",
    ),
    *(
        "!!!",
        "...",
        "—\u2013-",
        "“quoted” \u2018text\u2019",
        "(a)[b]{c}<d>",
        "@#$%^&*",
        "~|\\/",
        "CamelCase snake_case kebab-case",
        "ALLCAPS",
        "x" * 40,
        "ha" * 20,
    ),
)


@dataclass(frozen=True)
class GateJob:
    """What one passage through the gate compares. `rows` is a JSONL file of Example, whose prompts are asked."""

    model_dir: Path
    gguf: Path
    rows: Path
    out: Path
    min_agreement: float
    adapter: Path | None = None


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

    `bos_trained` and `bos_gguf` count the BOS tokens of a prompt in training and with the GGUF.
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

    @property
    def passed(self) -> bool:
        """True when no check failed."""
        return not self.failed


def gate(
    model_dir: Path, adapter: Path | None, gguf: Path, prompts: Sequence[Prompt], *, min_agreement: float
) -> GateReport:
    """Compare a GGUF with the model it was made of, on some of `prompts` and on PROBES texts of many scripts.

    Needs the memory of the whole model in f32 on the CPU. TapirError when one of them cannot be loaded.
    """
    asked = (*sample(prompts), (Message("user", "Say hello."),))
    with open_model(gguf) as llama:  # before torch, so that `patient_threads` is heeded
        tokenizer = load_tokenizer(model_dir)
        texts = [rendered(tokenizer, prompt) for prompt in (*prompts, *probes(tokenizer))]
        wrong = mismatches(tokenizer, llama, texts)
        trained_bos, gguf_bos = bos_counts(tokenizer, llama, texts[-1])
        checks = {
            "tokens": not wrong,
            "bos": trained_bos == gguf_bos,
            "eos": stops_as_trained(tokenizer, llama, model_dir),
            "template": llama.template == tokenizer.get_chat_template(),
        }
        with open_context(llama, cells=CONTEXT * 4, sequences=5, exact=True) as engine:
            found = compare(engine, load_trained(model_dir, adapter), asked, adapter is not None)
        allowed = MAX_KL[quant_of(llama)]
    checks["logits"] = found.kl <= allowed
    checks["adapter"] = found.kl_base is None or found.kl <= found.kl_base
    checks["agreement"] = found.agreement >= min_agreement
    failed = tuple(name for name, fine in checks.items() if not fine)
    return GateReport(
        failed, len(texts), len(wrong), tuple(wrong[:3]), trained_bos, gguf_bos, found, allowed, min_agreement
    )


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


def load_trained(model_dir: Path, adapter: Path | None) -> Any:
    """The trained model in f32, its adapter apart so that it can be switched off."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True).eval()
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).eval()


def sample(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Up to ANSWERS prompts from all over the list, the same ones each time."""
    chosen = random.Random("gate-prompts").sample(range(len(prompts)), min(ANSWERS, len(prompts)))
    return [prompts[number] for number in sorted(chosen)]


def probes(tokenizer: Any) -> list[Prompt]:
    """PROBES prompts of one or several fragments: every fragment, every added token in several places, and mixtures.

    A tokenizer that composes characters first (NFC, Qwen's) gets composed ones: llama.cpp does not compose.
    """
    chance = random.Random("gate-probes")
    added = [token.content for token in tokenizer.added_tokens_decoder.values()][:64]
    texts = [*FRAGMENTS, *(f"a{token}b {token} 1{token}" for token in added)]
    while len(texts) < PROBES:
        texts.append(chance.choice(["", " ", "\n"]).join(chance.choices([*FRAGMENTS, *added], k=chance.randint(2, 5))))
    return [(Message("user", text),) for text in texts]


def rendered(tokenizer: Any, prompt: Prompt) -> str:
    """A prompt as it was trained on."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    text = render(tokenizer.get_chat_template(), prompt, add_generation_prompt=True, bos_token=bos, eos_token=eos)
    composes = "NFC" in str(tokenizer.backend_tokenizer.normalizer)
    return unicodedata.normalize("NFC", text) if composes else text


def mismatches(tokenizer: Any, llama: Model, texts: Sequence[str]) -> list[Mismatch]:
    """The texts whose token ids are not the same on both sides."""
    trained = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    pairs = ((text, tuple(ids), tuple(encode(llama, text))) for text, ids in zip(texts, trained, strict=True))
    return [Mismatch(text, ids, other) for text, ids, other in pairs if ids != other]


def bos_counts(tokenizer: Any, llama: Model, text: str) -> tuple[int, int]:
    """BOS tokens in a prompt as trained, and where a runtime lets the GGUF add what it says is to be added."""
    bos = tokenizer.bos_token_id
    trained = tokenizer(text, add_special_tokens=False)["input_ids"]
    return trained.count(bos), encode(llama, text, add_special=True).count(bos)


def stops_as_trained(tokenizer: Any, llama: Model, model_dir: Path) -> bool:
    """True when EOS is the same and llama.cpp stops at the token that ended each turn in training."""
    ends = end_of_turn(read_json(model_dir / "tokenizer.json"), tokenizer.get_chat_template(), special_texts(model_dir))
    return (
        bool(ends) and llama.eos == (tokenizer.eos_token or "") and all(is_end(llama, token) for token in ends.values())
    )


def compare(engine: Engine, model: Any, prompts: Sequence[Prompt], adapted: bool) -> Figures:
    """The GGUF's greedy answers, and what both make of every position in them."""
    import numpy as np

    tokens = [encode_prompt(engine.model, prompt) for prompt in prompts]
    answers = answer(
        engine, tokens, max_tokens=ANSWER_TOKENS, context=CONTEXT, temperature=0.0, seeds=[0] * len(tokens)
    )
    rows = [
        (prompt + written, len(prompt) - 1) for prompt, (written, _) in zip(tokens, answers, strict=True) if written
    ]
    rows = rows or [(tokens[-1], len(tokens[-1]) - 1)]
    gguf = np.concatenate([logits(engine, ids)[start:] for ids, start in rows])
    trained = np.concatenate([trained_logits(model, ids)[start:] for ids, start in rows])[:, : gguf.shape[1]]
    gguf = gguf[:, : trained.shape[1]]
    kl_base = None
    if adapted:
        with model.disable_adapter():
            base = np.concatenate([trained_logits(model, ids)[start:] for ids, start in rows])
        kl_base = divergence(base, gguf)
    largest = float(np.nan_to_num(np.abs(gguf - trained).max(), nan=1e9))
    agreement = float((gguf.argmax(axis=1) == trained.argmax(axis=1)).mean())
    return Figures(divergence(trained, gguf), kl_base, largest, agreement, len(gguf))


def trained_logits(model: Any, ids: Sequence[int]) -> Array:
    """transformers' logits, shape (tokens, vocabulary)."""
    import torch

    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().numpy()


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

    `job.out` is written only if the GGUF passes. TapirError that names the failed checks otherwise.
    """
    in_own_process("tapir_local.gate", job, folder, progress)


def run_folder(folder: Path, progress: Progress) -> None:
    """The child's side of `pass_gate`."""
    job = read_record(GateJob, folder / "job.json")
    prompts = [row.prompt for row in read_rows(Example, job.rows)]
    report = gate(job.model_dir, job.adapter, job.gguf, prompts, min_agreement=job.min_agreement)
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
