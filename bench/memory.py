"""Compute what the students of the recipes need from their shapes: the figures in the comments of recipes/*.yaml.

`python bench/memory.py`. No weights are read; the models are created on torch's `meta` device. A GB is 1e9 bytes.
"""

from typing import Any

from tapir_local.inference.context_plan import PARALLEL_ON_CPU
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import parse_recipe
from tapir_local.resources import find_recipe

SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)
QWEN = 151936
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {  # of config.json as published; every head has 128 dimensions
    "llama2-7b-alpaca": ("llama", (32000, 4096, 11008, 32, 32, 32)),
    "qwen2.5-1.5b-alpaca": ("qwen2", (QWEN, 1536, 8960, 28, 12, 2)),
    "qwen3-4b": ("qwen3", (QWEN, 2560, 9728, 36, 32, 8)),
    "local-teacher": ("qwen2", (QWEN, 1536, 8960, 28, 12, 2)),
}
HEAD = 128
Q8_0 = 34 / 32  # bytes of a weight: 32 of them in 34 bytes
ADAPTER = 16  # bytes of a LoRA weight in training: itself, its gradient and Adam's two moments, each in 32 bits
KEPT = 68  # bytes of a token's hidden unit that the layer being computed keeps (training/memory_estimate.py)


def counts(family: str, shape: dict[str, Any], rank: int) -> tuple[int, int]:
    """Parameters of the model, and of LoRA on all its linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
        weights = sum(part.numel() for part in model.parameters())
        lora = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    return weights, sum(part.numel() for part in lora.parameters() if part.requires_grad)


def needs(recipe: Recipe, family: str, shape: dict[str, Any]) -> dict[str, float]:
    """GB of each part at the longest allowed rows; the loss is computed in chunks, so no logits are kept."""
    weights, lora = counts(family, shape, recipe.train.lora_rank)
    layers, hidden, length = shape["num_hidden_layers"], shape["hidden_size"], recipe.student.max_length
    rows = recipe.train.micro_batch_size * length * hidden
    at_once = PARALLEL_ON_CPU if recipe.student.concurrency == "auto" else recipe.student.concurrency
    cache = 2 * 2 * layers * shape["num_key_value_heads"] * HEAD  # keys and values of a token in f16
    found = {
        "parameters": weights,
        "weights in 16 bits": 2 * weights,
        "LoRA in training": ADAPTER * lora,
        "activations, checkpointed": rows * (2 * layers + KEPT),
        "GGUF in q8_0": Q8_0 * weights,
        "answers in flight": at_once * length * cache,
        "gate, main memory": 4 * weights,
        "disk": 2 * weights + (recipe.rounds + 1) * (Q8_0 * weights + 4 * lora),
    }
    found["training"] = 2 * weights + ADAPTER * lora + rows * (2 * layers + KEPT)
    found["answering"] = found["GGUF in q8_0"] + found["answers in flight"]
    return {key: value / 1e9 for key, value in found.items()}


if __name__ == "__main__":
    for name, (family, numbers) in SHAPES.items():
        shape = {
            **dict(zip(SETTINGS, numbers, strict=True)),
            "head_dim": HEAD,
            "tie_word_embeddings": family != "llama",
        }
        path = find_recipe(name)
        print(name)
        recipe = parse_recipe(path.read_text(encoding="utf-8"), path.name)
        for key, value in needs(recipe, family, shape).items():
            print(f"  {key}: {value:.2f}")
