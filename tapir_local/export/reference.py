"""Logits of the reference model: the trained model in transformers in 32 bits, even if memory cannot hold it."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.export.weights import PEFT_PREFIX, FloatArray, adapter_weights, load_tensor, model_weights
from tapir_local.memory import format_bytes, free_memory
from tapir_local.training.model_files import StoredTensor

STREAMED_TEXTS = 4  # texts per forward pass of a streamed model: each pass reads every weight again


@dataclass(frozen=True)
class ReferenceModel:
    """The model, whether its weights are read again for each forward pass, and whether it has an adapter."""

    model: Any
    streamed: bool
    adapted: bool


def load_reference(
    model_dir: Path, adapter: Path | None, *, reserved: int = 0, free: int | None = None
) -> ReferenceModel:
    """Load the model in 32 bits; if it does not fit in memory, read it layer by layer from its files.

    `reserved` is the memory in bytes needed for everything else; `free` is the available memory, by default the free
    memory of the machine. Raises TapirError if the largest tensor does not fit either.
    """
    sizes = [4 * prod(source.shape) for source in model_weights(model_dir).values()]
    room = (free_memory() if free is None else free) - reserved
    if sum(sizes) <= room:
        return ReferenceModel(load_in_memory(model_dir, adapter), False, adapter is not None)
    said = f"{model_dir} needs {format_bytes(sum(sizes))} in 32 bits, and {format_bytes(max(room, 0))} are free"
    largest = 3 * max(sizes)  # as read, as torch computes with it, and the previous one
    if largest > room:
        raise TapirError(
            f"not enough memory for the comparison: {said}; layer by layer it needs {format_bytes(largest)}",
            where=str(model_dir),
            fix="Close other programs, or compare on a larger machine.",
        )
    print(f"{said}: it is read layer by layer, which takes longer", file=sys.stderr)
    return ReferenceModel(load_streamed(model_dir, adapter), True, adapter is not None)


# Gemma 2 caps its attention scores, which only `eager` implements (transformers 5.17, models/gemma2): for a tiny model
# the logits differ by 0.8 otherwise.
def load_in_memory(model_dir: Path, adapter: Path | None) -> Any:
    """Load the whole model; the adapter is not merged, so that it can be switched off."""
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
    """Weights are read from the safetensors files when their module is called, and released afterwards."""
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
    files = StreamedWeights(model_dir, adapter)
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=files)
    return model.eval()


class StreamedWeights(Mapping[str, Any]):
    """A model's parameters by PEFT's or transformers' name, read from their files at each access."""

    def __init__(self, model_dir: Path, adapter: Path | None) -> None:
        self.folder, self.base = model_dir, model_weights(model_dir)
        self.lora = {} if adapter is None else adapter_weights(adapter)

    def __getitem__(self, name: str) -> Any:
        import torch

        return torch.from_numpy(load_tensor(self.source(name)))

    def source(self, name: str) -> StoredTensor:
        """Where a parameter is stored; a tied output is the embedding."""
        if ".lora_" in name:
            return self.lora[name.replace(".default.", ".")]
        plain = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        if plain == "lm_head.weight" and plain not in self.base:
            plain = "model.embed_tokens.weight"
        if plain in self.base:
            return self.base[plain]
        raise TapirError(
            f"it cannot be read layer by layer: {plain} is not in its files",
            where=str(self.folder),
            fix="Compare it on a machine whose memory holds the whole model.",
        )

    def __iter__(self) -> Iterator[str]:
        return iter([*self.lora, *self.base])

    def __len__(self) -> int:
        return len(self.lora) + len(self.base)


def reference_logits(
    trained: ReferenceModel, texts: Sequence[tuple[Sequence[int], int]]
) -> Iterator[tuple[FloatArray, FloatArray | None]]:
    """For each (token ids, first position) the logits from that position on, shape (positions, vocabulary).

    Also those of the base model, if there is an adapter to switch off.
    """
    step = STREAMED_TEXTS if trained.streamed else 1
    for start in range(0, len(texts), step):
        together = texts[start : start + step]
        found = forward_pass(trained.model, together)
        if trained.adapted:
            with trained.model.disable_adapter():
                yield from zip(found, forward_pass(trained.model, together), strict=True)
        else:
            yield from ((row, None) for row in found)


def forward_pass(model: Any, texts: Sequence[tuple[Sequence[int], int]]) -> list[FloatArray]:
    """Logits of several texts at once. Shorter ones are padded at the end, where attention does not look."""
    import torch

    longest, first = max(len(ids) for ids, _ in texts), min(start for _, start in texts)
    padded = torch.tensor([[*ids, *([0] * (longest - len(ids)))] for ids, _ in texts])
    with torch.no_grad():  # PEFT cannot re-enable an adapter in inference mode
        found = model(padded, use_cache=False, logits_to_keep=longest - first).logits
    return [
        row[start - first : len(ids) - first].float().numpy() for row, (ids, start) in zip(found, texts, strict=True)
    ]
