"""Estimate the memory that a fine-tuning needs from the headers of the weight files, before anything is loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.memory import format_bytes
from tapir_local.recipe.schema import Train
from tapir_local.training.model import Hardware
from tapir_local.training.model_files import has_safetensors, read_model_json, read_model_tensors

STATE_BYTES = 12  # per trained weight: its gradient and Adam's two moments, each in 32 bits
WEIGHT_BYTES = {"f32": 4, "bf16": 2, "f16": 2}  # per weight
NF4_BYTES = 0.53  # per weight in nf4 with double quantization: 4.127 bits (Dettmers et al. 2023, QLoRA)
LOSS_CHUNK = 256  # tokens whose logits are in memory at once (see `activation_bytes`)
LAYER_ACTIVATION_BYTES = 68  # per token and hidden unit, for the layer being computed (see `activation_bytes`)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the weights, of gradients and optimizer (`state`), and of one batch's activations without
    (`activations`) and with gradient checkpointing (`checkpointed`). `parameters` is the number of weights."""

    parameters: int
    weights: int
    state: int
    activations: int
    checkpointed: int

    @property
    def fixed(self) -> int:
        """The bytes needed whatever the batch size."""
        return self.weights + self.state


def estimate_memory(
    model: str, settings: Train, hardware: Hardware, tokens: int, *, whole_logits: bool = False
) -> MemoryEstimate | None:
    """Memory for training a model in a folder with `tokens` tokens per micro-batch; None if the folder has no
    safetensors.

    `whole_logits`: the loss takes the logits of all tokens at once, as in TRL's DPOTrainer. Raises TapirError if a
    weight file is missing or damaged.
    """
    folder = Path(model)
    if not has_safetensors(folder):
        return None
    shapes = {name: tensor.shape for name, tensor in read_model_tensors(folder).items()}
    count = sum(map(prod, shapes.values()))
    linear = {name: shape for name, shape in shapes.items() if is_lora_weight(name, shape)}
    quantized = sum(map(prod, linear.values())) if settings.method == "qlora" else 0
    bytes_each = 4 if settings.method == "full" else WEIGHT_BYTES[hardware.precision]
    weights = (count - quantized) * bytes_each + int(quantized * NF4_BYTES)
    adapter = sum(settings.lora_rank * sum(shape) for shape in linear.values())
    state = STATE_BYTES * count if settings.method == "full" else (STATE_BYTES + 4) * adapter
    config = read_model_json(folder / "config.json")
    text = {**config, **config.get("text_config", {})}
    layers, hidden, vocabulary = (int(text.get(key) or 0) for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    kept = tokens * hidden * (2 * layers + LAYER_ACTIVATION_BYTES)
    logits = logit_bytes(tokens, vocabulary) if whole_logits else 0
    activations = activation_bytes(layers, hidden, vocabulary, tokens)
    if whole_logits:
        activations += logits - logit_bytes(min(tokens, LOSS_CHUNK), vocabulary)
    return MemoryEstimate(count, weights, state, activations, kept + logits)


def is_lora_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight gets LoRA layers: a matrix that is neither the embedding nor the output layer."""
    return len(shape) == 2 and not any(part in name for part in ("embed", "lm_head", "wte", "wpe"))


def activation_bytes(layers: int, hidden: int, vocabulary: int, tokens: int) -> int:
    """Approximate bytes that a forward pass keeps for the backward pass, in 32 bits.

    34 bytes per token, layer and hidden unit in 16 bits, without attention scores (Korthikanti et al. 2022, "Reducing
    Activation Recomputation in Large Transformer Models", section 4), plus three copies of the logits of one chunk of
    the loss: TRL's `chunked_nll` takes 256 tokens at a time (sft_trainer.py), and Unsloth's fused cross entropy as many
    as fit into half of the memory that is free at its first step, at most 4 GB (unsloth_zoo/fused_losses).
    """
    return 2 * 34 * tokens * layers * hidden + logit_bytes(min(tokens, LOSS_CHUNK), vocabulary)


def logit_bytes(tokens: int, vocabulary: int) -> int:
    """Three copies of the logits of some tokens in 32 bits."""
    return 3 * 4 * tokens * vocabulary


def use_gradient_checkpointing(settings: Train, hardware: Hardware, needs: MemoryEstimate | None) -> bool:
    """Whether to use gradient checkpointing: as set, or with `auto` if the activations would fill more than half of the
    memory that weights and optimizer leave free."""
    if settings.gradient_checkpointing != "auto":
        return bool(settings.gradient_checkpointing)
    return needs is not None and 2 * needs.activations > hardware.free - needs.fixed


def check_training_memory(
    needs: MemoryEstimate, settings: Train, hardware: Hardware, recompute: bool, say: Callable[[str], None]
) -> None:
    """Raise TapirError if weights and optimizer alone do not fit; warn through `say` if the batch may not fit.

    On a GPU, `say` always receives the estimate and the free memory.
    """
    batch = needs.checkpointed if recompute else needs.activations
    wanted, free = needs.fixed + batch, hardware.free
    where = f"the GPU's {format_bytes(hardware.total)}" if hardware.device == "cuda" else "main memory"
    numbers = (
        f"the weights take {format_bytes(needs.weights)}, gradients and optimizer {format_bytes(needs.state)}, "
        f"a batch about {format_bytes(batch)}; {format_bytes(free)} of {where} are free"
    )
    if needs.fixed > free:
        smaller = "" if settings.method == "qlora" else ", write train.method: qlora"
        smaller = ", write train.method: lora" if settings.method == "full" else smaller
        fix = f"Stop other programs that use this memory{smaller}, or use a smaller student."
        raise TapirError(f"training does not fit: {numbers}", where=f"train ({settings.method})", fix=fix)
    if wanted > free:
        say(f"Memory may run out: {numbers}. If it does, a smaller micro-batch is tried.")
    elif hardware.device == "cuda":
        say(f"Memory: {numbers}.")
