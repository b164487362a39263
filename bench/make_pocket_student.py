"""Make the pocket student: a tokenizer and a small Llama, pretrained on the pocket world's plain text.

Usage: python bench/make_pocket_student.py --minutes 40 --out tapir_local/assets/pocket_student
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from pocket_text import END, SPELLED, TURNS, documents, marked

VOCABULARY = 768
BLOCK = 256
BATCH = 16
SAVE = 240  # seconds
SPECIAL = (END, "<|pad|>", *TURNS)
# Qwen2's, so that llama.cpp's pre-tokenizer "qwen2" cuts text the same way; digits stand alone.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(rng: Random) -> Any:
    """A byte-level BPE over the plain text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = documents(rng)
    tokenizer.train_from_iterator(
        [*(next(text) for _ in range(20_000)), *(f" {word}" for word in SPELLED for _ in range(20))], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token="<|pad|>",
        additional_special_tokens=list(TURNS),
        model_max_length=1024,
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(tokenizer: Any, hidden: int, layers: int) -> Any:
    """An untrained Llama for this tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(tokenizer: Any, rng: Random) -> Iterator[Any]:
    """An endless iterator of (BATCH, BLOCK) token ids, documents concatenated."""
    import torch

    text, ids = documents(rng), list[int]()
    while True:
        pieces = [f"{marked(rng, next(text))}{END}" for _ in range(2000)]
        for encoded in tokenizer(pieces)["input_ids"]:
            ids.extend(encoded)
        size = BATCH * BLOCK
        for at in range(0, len(ids) - size, size):
            yield torch.tensor(ids[at : at + size]).view(BATCH, BLOCK)
        ids = ids[len(ids) // size * size :]


def orthogonal(matrix: Any) -> Any:
    """The nearest orthogonal matrices by five Newton-Schulz steps (Muon, K. Jordan 2024); shape (n, rows, columns)."""
    tall = matrix.size(1) > matrix.size(2)
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Muon:
    """Muon, for matrices of one shape together; in f32, because torch's own uses bf16, which is slow on a CPU."""

    def __init__(self, weights: Sequence[Any], lr: float) -> None:
        import torch

        self.param_groups = [{"lr": lr}]
        shapes = {weight.shape for weight in weights}
        self.sets = [[weight for weight in weights if weight.shape == shape] for shape in sorted(shapes)]
        self.momenta = [torch.zeros(len(weights), *weights[0].shape) for weights in self.sets]

    def step(self) -> None:
        """One step with Nesterov momentum 0.95."""
        import torch

        with torch.no_grad():
            for weights, momentum in zip(self.sets, self.momenta, strict=True):
                gradient = torch.stack([weight.grad for weight in weights])
                momentum.lerp_(gradient, 0.05)
                update = (
                    orthogonal(gradient.lerp(momentum, 0.95)) * max(1.0, weights[0].size(0) / weights[0].size(1)) ** 0.5
                )
                for weight, change in zip(weights, update, strict=True):
                    weight.add_(change, alpha=-self.param_groups[0]["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for weight in (weight for weights in self.sets for weight in weights):
            weight.grad = None


def optimisers(model: Any) -> Sequence[Any]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    import torch

    inner = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    outer = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    return (Muon(inner, lr=0.02), torch.optim.AdamW(outer, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0))


def rate(progress: float) -> float:
    """Share of the peak learning rate: a short warm-up, then a linear decay to the end."""
    return min(1.0, progress / 0.02) * max(0.02, 1 - progress)


def pretrain(model: Any, feed: Iterator[Any], seconds: float, save: Any) -> dict[str, float]:
    """Train until the time is up; the schedule follows elapsed time. Returns steps, tokens, seconds, last loss."""
    chosen = optimisers(model)
    peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in chosen]
    begun = saved = time.monotonic()
    step, smooth = 0, math.log(VOCABULARY)
    while (spent := time.monotonic() - begun) < seconds:
        for optimiser, peak in zip(chosen, peaks, strict=True):
            for group, top in zip(optimiser.param_groups, peak, strict=True):
                group["lr"] = top * rate(spent / seconds)
        ids = next(feed)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for optimiser in chosen:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step, smooth = step + 1, 0.98 * smooth + 0.02 * float(loss.detach())
        if step % 25 == 0:
            print(
                f"{step} steps, {step * BATCH * BLOCK / 1e6:.2f}M tokens, {spent:.0f} s, loss {smooth:.4f}", flush=True
            )
        if time.monotonic() - saved > SAVE:
            save()
            saved = time.monotonic()
    save()
    return {"steps": step, "tokens": step * BATCH * BLOCK, "seconds": time.monotonic() - begun, "loss": smooth}


def begin(chosen: argparse.Namespace) -> tuple[Any, Any]:
    """The tokenizer and the model: new ones, or those of an earlier run."""
    if not chosen.start:
        tokenizer = train_tokenizer(Random("tokenizer"))
        return tokenizer, make_model(tokenizer, chosen.hidden, chosen.layers)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chosen.start)
    tokenizer.chat_template = TEMPLATE
    return tokenizer, AutoModelForCausalLM.from_pretrained(chosen.start, dtype=torch.float32)


def settle(path: Path) -> None:
    """Keep the tokenizer settings that every version of transformers reads, and set that there is no BOS."""
    kept = ("eos_token", "pad_token", "extra_special_tokens", "model_max_length")
    found = json.loads(path.read_text())
    settings = {key: found[key] for key in kept if key in found}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    path.write_text(json.dumps(dict(sorted(settings.items())), indent=2) + "\n")


def main() -> None:
    """Read the options, make the tokenizer and the model, train, save."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument(
        "--peak", type=float, default=1.0, help="share of the learning rates; less than 1 when going on"
    )
    parser.add_argument("--start", type=Path, help="go on from this student")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    torch.manual_seed(1)
    tokenizer, model = begin(chosen)
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, {len(tokenizer)} tokens", flush=True)

    def save() -> None:
        model.save_pretrained(chosen.out)
        tokenizer.save_pretrained(chosen.out)
        settle(chosen.out / "tokenizer_config.json")

    facts = pretrain(model, batches(tokenizer, Random(f"text-{chosen.start}")), chosen.minutes * 60, save)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
