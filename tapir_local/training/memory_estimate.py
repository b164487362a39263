"""What a fine-tuning will take of the memory, reckoned from the files' headers before anything is loaded."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.memory import format_bytes
from tapir_local.recipe.schema import Train
from tapir_local.training.model import Hardware

STATE = 12  # bytes of a trained weight beside itself: its gradient and Adam's two moments, each in 32 bits
BITS = {"f32": 4, "bf16": 2, "f16": 2}  # bytes of a weight
FOUR_BITS = 0.53  # bytes of a weight in nf4, its blocks' scales quantised too: 4.127 bits (Dettmers et al. 2023, QLoRA)
KEPT = 68  # bytes of a token's hidden unit that the one layer being computed keeps (see `activation_bytes`)


@dataclass(frozen=True)
class Footprint:
    """Bytes of the weights, of what training keeps beside them, and of a batch's activations: all of them, or with
    gradient checkpointing. `parameters` counts the model's weights."""

    parameters: int
    weights: int
    state: int
    activations: int
    checkpointed: int

    @property
    def certain(self) -> int:
        """What no setting of the batch can make less."""
        return self.weights + self.state


def footprint(model: str, settings: Train, hardware: Hardware, tokens: int) -> Footprint | None:
    """What training a model in a folder takes with `tokens` in a batch; None without safetensors in it.

    TapirError for a shard that is missing, or a file that is no safetensors.
    """
    folder = Path(model)
    shapes = tensors(folder) if folder.is_dir() else {}
    if not shapes:
        return None
    count = sum(map(prod, shapes.values()))
    linear = {name: shape for name, shape in shapes.items() if is_linear(name, shape)}
    quantised = sum(map(prod, linear.values())) if settings.method == "qlora" else 0
    bytes_each = 4 if settings.method == "full" else BITS[hardware.precision]
    weights = (count - quantised) * bytes_each + int(quantised * FOUR_BITS)
    adapter = sum(settings.lora_rank * sum(shape) for shape in linear.values())
    state = STATE * count if settings.method == "full" else (STATE + 4) * adapter
    config = json.loads((folder / "config.json").read_bytes())
    text = {**config, **config.get("text_config", {})}
    layers, hidden, vocabulary = (int(text.get(key) or 0) for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    kept = tokens * hidden * (2 * layers + KEPT)
    return Footprint(count, weights, state, activation_bytes(layers, hidden, vocabulary, tokens), kept)


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether LoRA is put on a weight: a matrix, but neither the embedding nor the head."""
    return len(shape) == 2 and not any(part in name for part in ("embed", "lm_head", "wte", "wpe"))


def tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model, by its name; {} where it is not in safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise TapirError(
                f"{len(missing)} of the model's {len(files)} files of weights are missing: {', '.join(missing[:3])}",
                where=str(folder),
                fix="Download or copy the model again.",
            )
    else:
        files = [file for file in [folder / "model.safetensors"] if file.exists()]
    return {name: shape for file in files for name, shape in header(file).items()}


def header(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes in a safetensors file: 8 bytes say how long the JSON is that follows; TapirError for another file."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            found: Mapping[str, Any] = json.loads(opened.read(length))
        ends = max((item["data_offsets"][1] for name, item in found.items() if name != "__metadata__"), default=0)
        whole = file.stat().st_size >= 8 + length + ends
    except (ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
        raise TapirError("no safetensors file", where=str(file), fix="Download or copy the model again.") from error
    if not whole:
        raise TapirError("the file ends too early", where=str(file), fix="Download or copy the model again.")
    return {name: tuple(item["shape"]) for name, item in found.items() if name != "__metadata__"}


def activation_bytes(layers: int, hidden: int, vocabulary: int, tokens: int) -> int:
    """Roughly what a forward pass keeps for the backward one, in 32 bits.

    34 bytes for each token, layer and hidden unit in 16 bits, attention's scores not kept (Korthikanti et al. 2022,
    "Reducing Activation Recomputation in Large Transformer Models", section 4); the logits three times over.
    """
    return 2 * 34 * tokens * layers * hidden + 3 * 4 * tokens * vocabulary


def checkpointing(settings: Train, hardware: Hardware, needs: Footprint | None) -> bool:
    """Whether activations are computed twice instead of kept: as the settings say, or `auto`, where they would fill
    more than half of the memory left beside the weights."""
    if settings.gradient_checkpointing != "auto":
        return bool(settings.gradient_checkpointing)
    return needs is not None and 2 * needs.activations > hardware.free - needs.certain


def check_room(needs: Footprint, settings: Train, hardware: Hardware, twice: bool, say: Callable[[str], None]) -> None:
    """TapirError where weights and optimiser alone do not fit; a remark where it will be close.

    On a GPU `say` is told in any case what is free and what will be taken.
    """
    batch = needs.checkpointed if twice else needs.activations
    wanted, free = needs.certain + batch, hardware.free
    where = f"the GPU's {format_bytes(hardware.total)}" if hardware.device == "cuda" else "main memory"
    numbers = (
        f"the weights take {format_bytes(needs.weights)}, gradients and optimiser {format_bytes(needs.state)}, "
        f"a batch about {format_bytes(batch)}; {format_bytes(free)} of {where} are free"
    )
    if needs.certain > free:
        smaller = "" if settings.method == "qlora" else ", write train.method: qlora"
        smaller = ", write train.method: lora" if settings.method == "full" else smaller
        fix = f"End what else holds memory there{smaller}, or take a smaller student."
        raise TapirError(f"training does not fit: {numbers}", where=f"train ({settings.method})", fix=fix)
    if wanted > free:
        say(f"Memory will be short: {numbers}. A smaller batch is tried where it runs out.")
    elif hardware.device == "cuda":
        say(f"Memory: {numbers}.")
