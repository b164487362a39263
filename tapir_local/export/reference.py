"""The trained model's own logits, by transformers and PEFT in 32 bits, even where memory is too small to hold it."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.export.weights import PEFT_PREFIX, Source, load, read_header, read_model
from tapir_local.memory import format_bytes, free_memory
from tapir_local.records import Array

AT_ONCE = 4  # texts that go through a streamed model together: each passage reads every weight again


@dataclass(frozen=True)
class Trained:
    """The model, and whether its weights are read anew for each passage. `adapted` says that it has an adapter on."""

    model: Any
    streamed: bool
    adapted: bool


def load_trained(model_dir: Path, adapter: Path | None, *, beside: int = 0, free: int | None = None) -> Trained:
    """The model in 32 bits; layer by layer from its files where memory does not hold it whole.

    `beside` is what else must have room, in bytes; `free` the memory there is, the machine's if left out. TapirError
    when the largest tensor does not fit either.
    """
    sizes = [4 * prod(source.shape) for source in read_model(model_dir).values()]
    room = (free_memory() if free is None else free) - beside
    if sum(sizes) <= room:
        return Trained(load_whole(model_dir, adapter), False, adapter is not None)
    said = f"{model_dir} takes {format_bytes(sum(sizes))} in 32 bits, and {format_bytes(max(room, 0))} are free"
    largest = 3 * max(sizes)  # as it is read, as torch computes with it, and the one that is going
    if largest > room:
        raise TapirError(
            f"no memory for the comparison: {said}; layer by layer it takes {format_bytes(largest)}",
            where=str(model_dir),
            fix="Close other programs, or compare on a larger machine.",
        )
    print(f"{said}: it is read layer by layer, which takes longer", file=sys.stderr)
    return Trained(load_streamed(model_dir, adapter), True, adapter is not None)


# Gemma 2 caps its attention's scores, which only `eager` does (transformers 5.17, models/gemma2): in a tiny model's
# logits a difference of 0.8.
def load_whole(model_dir: Path, adapter: Path | None) -> Any:
    """In memory, the adapter apart so that it can be switched off."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def load_streamed(model_dir: Path, adapter: Path | None) -> Any:
    """Weights are read from the safetensors files when their module is called, and dropped after it."""
    import torch
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        if adapter is not None:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig.from_pretrained(adapter))
    files = Files(model_dir, adapter)
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=files)
    return model.eval()


class Files(Mapping[str, Any]):
    """A model's parameters by PEFT's or transformers' name, read from their files each time one is asked for."""

    def __init__(self, model_dir: Path, adapter: Path | None) -> None:
        self.folder, self.base = model_dir, read_model(model_dir)
        self.lora = {} if adapter is None else read_header(adapter / "adapter_model.safetensors")

    def __getitem__(self, name: str) -> Any:
        import torch

        return torch.from_numpy(load(self.source(name)))

    def source(self, name: str) -> Source:
        """Where a parameter is; a tied output is the embedding."""
        if ".lora_" in name:
            return self.lora[name.replace(".default.", ".")]
        plain = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        if plain == "lm_head.weight" and plain not in self.base:
            plain = "model.embed_tokens.weight"
        if plain in self.base:
            return self.base[plain]
        raise TapirError(
            f"it cannot be read layer by layer: {plain} is in none of its files",
            where=str(self.folder),
            fix="Compare it where the memory holds it whole.",
        )

    def __iter__(self) -> Iterator[str]:
        return iter([*self.lora, *self.base])

    def __len__(self) -> int:
        return len(self.lora) + len(self.base)


def trained_logits(
    trained: Trained, texts: Sequence[tuple[Sequence[int], int]]
) -> Iterator[tuple[Array, Array | None]]:
    """For each (token ids, first position that counts) the logits from there on, shape (positions, vocabulary).

    Also those of the base, where there is an adapter to switch off.
    """
    step = AT_ONCE if trained.streamed else 1
    for start in range(0, len(texts), step):
        together = texts[start : start + step]
        found = passage(trained.model, together)
        if trained.adapted:
            with trained.model.disable_adapter():
                yield from zip(found, passage(trained.model, together), strict=True)
        else:
            yield from ((row, None) for row in found)


def passage(model: Any, texts: Sequence[tuple[Sequence[int], int]]) -> list[Array]:
    """Some texts at once. What pads the shorter ones comes after them, where no token of theirs looks."""
    import torch

    longest, first = max(len(ids) for ids, _ in texts), min(start for _, start in texts)
    padded = torch.tensor([[*ids, *([0] * (longest - len(ids)))] for ids, _ in texts])
    with torch.no_grad():  # PEFT cannot switch tensors of inference mode on again
        found = model(padded, use_cache=False, logits_to_keep=longest - first).logits
    return [
        row[start - first : len(ids) - first].float().numpy() for row, (ids, start) in zip(found, texts, strict=True)
    ]
