"""Tiny random students for the tests: real configs, a real byte-level BPE tokenizer, a chat template, LoRA adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tapir_local.export.tokenizer import TEKKEN_PATTERN

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Añade dos números: 12 + 34 = 46.",
    "def add(a, b):\n    return a + b  # the sum\n",
    "Привет, мир! 你好\uff0c世界。こんにちは 🙂 naïve café coöperate",
    "List the words in order: apple, banana, cherry. What is 7 times 8? 56.",
] * 20
TEXT = "<|im_start|>user\nAdd 12 and 34, naïve café 你好 🙂 <tool><|im_end|>\n<|im_start|>assistant\n46."
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_tokenizer(folder: Path, kind: str = "smollm", template: str = CHATML, vocab: int = 400) -> Any:
    """A byte-level BPE of about `vocab` tokens, split as SmolLM, Qwen2, Llama 3, Mistral (Nemo) or GPT-2 do."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    splits = {"qwen2": QWEN2_SPLIT, "llama3": LLAMA3_SPLIT, "mistral": TEKKEN_PATTERN}
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in splits)
    first = [pre_tokenizers.Digits(individual_digits=True)] if kind == "smollm" else []
    if kind in splits:
        first = [pre_tokenizers.Split(Regex(splits[kind]), behavior="isolated")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, plain]) if first else plain
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        "<|bos|>",
        "<|eos|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|pad|>",
        "<|endoftext|>",
    ]  # the last one Qwen2Tokenizer adds itself
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    fast.add_tokens(["<tool>"])
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


# Odd enough that nothing fits by chance: heads that are not hidden_size / heads, a window shorter than the probes.
OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}
MAKERS: dict[str, Callable[..., Any]] = {}  # of tokenizers by kind, beside make_tokenizer; see spm.py


def make_model(
    folder: Path, family: str = "llama", *, kind: str = "smollm", template: str = CHATML, seed: int = 0, **changes: Any
) -> Path:
    """A random model with its tokenizer, saved. Weights are drawn wide, so that greedy choices are not near ties."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = MAKERS.get(kind, make_tokenizer)(folder, kind, template)
    torch.manual_seed(seed)
    tied = {"tie_word_embeddings": family != "llama", "vocab_size": len(tokenizer) + 3, "max_position_embeddings": 512}
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(family, **{**SHAPE, **tied, **ends, **OWN.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config)
    scatter(model, 0.15)
    model.save_pretrained(folder)
    return folder


def scatter(model: Any, spread: float) -> None:
    """Every weight anew, biases and norms too, which start as 0 and 1, where a wrong mapping would not show."""
    import torch

    middle = 0.0 if "gemma" in model.config.model_type else 1.0  # Gemma adds 1 to a norm's weight itself
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(middle if "norm" in name else 0.0, spread)


def make_adapter(
    model_dir: Path, folder: Path, *, seed: int = 1, rank: int = 4, alpha: int = 16, **changes: Any
) -> Path:
    """A LoRA adapter on all linear layers whose B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    return folder


def merged_model(model_dir: Path, adapter: Path | None) -> Any:
    """The trained model as transformers and PEFT see it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    return model.eval() if adapter is None else PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


def largest_difference(model_dir: Path, adapter: Path | None, gguf: Path, lora: Path | None = None) -> float:
    """Of two logits over every token of TEXT: transformers' and PEFT's, merged, and llama.cpp's, `lora` over `gguf`."""
    import torch

    from tapir_local.inference.batch import compute_logits
    from tapir_local.inference.config import ContextConfig
    from tapir_local.inference.model import open_context, open_model
    from tapir_local.inference.tokens import encode

    with open_model(gguf, adapter=lora) as model, open_context(model, ContextConfig(256, exact=True)) as engine:
        ids = encode(model, TEXT)
        found = compute_logits(engine, ids)
    with torch.no_grad():
        wanted = merged_model(model_dir, adapter)(torch.tensor([ids])).logits[0].numpy()
    return float(abs(found - wanted).max())


def let_a_runtime_add_bos(monkeypatch: Any) -> None:
    """Exports say from now on that a runtime is to add BOS, which the template writes already."""
    from tapir_local.export import export

    write = export.write_vocabulary

    def with_bos(writer: Any, vocab: Any) -> None:
        write(writer, vocab)
        writer.kv_data[0]["tokenizer.ggml.add_bos_token"].value = True

    monkeypatch.setattr(export, "write_vocabulary", with_bos)
