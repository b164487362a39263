"""Read a model's weights from disk one tensor at a time, with a LoRA adapter's change added."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.training.model import check_adapter_folder
from tapir_local.training.model_files import StoredTensor, read_header, read_model_json, read_model_tensors

FloatArray = Any  # numpy.ndarray; numpy is imported inside functions
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
PEFT_PREFIX = "base_model.model."
ALPHA_KEYS = ("alpha_pattern", "lora_alpha")


@dataclass(frozen=True)
class LoraDelta:
    """LoRA's addition to one weight: scale · B @ A, with A of shape (rank, columns) and B (rows, rank)."""

    a: StoredTensor
    b: StoredTensor
    scale: float


def model_weights(model_dir: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model by its name in transformers. Raises TapirError as `read_model_tensors` does, or for
    quantized weights."""
    return check_dtypes(read_model_tensors(model_dir))


def adapter_weights(adapter: Path) -> dict[str, StoredTensor]:
    """Every tensor of a PEFT adapter. Raises TapirError as `read_header` does, or for quantized weights."""
    return check_dtypes(read_header(adapter / "adapter_model.safetensors"))


def check_dtypes(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Raise TapirError if a tensor has a type that cannot be exported."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TapirError(
                f"tensor {name} is {tensor.dtype}",
                where=str(tensor.file),
                fix=f"Export a model saved as {', '.join(DTYPES)}, not a quantized one.",
            )
    return tensors


def load_tensor(source: StoredTensor, delta: LoraDelta | None = None, rows: Any = slice(None)) -> FloatArray:
    """The tensor in float32 with LoRA's change added; only a part of it if `rows` is a slice or row numbers."""
    import numpy as np

    raw = np.memmap(source.file, dtype=DTYPES[source.dtype], mode="r", offset=source.offset, shape=source.shape)[rows]
    if source.dtype == "BF16":  # numpy has no bfloat16; it is the upper half of a float32
        bits = raw.astype(np.uint32)
        bits <<= 16
        weight = bits.view(np.float32)
    else:
        weight = raw.astype(np.float32)
    if delta is not None:
        weight += (delta.scale * load_tensor(delta.b, rows=rows)) @ load_tensor(delta.a)
    return weight


def read_adapter_deltas(folder: Path, base: Mapping[str, StoredTensor]) -> dict[str, LoraDelta]:
    """The changes of a PEFT LoRA adapter by the name of the weight. Raises TapirError if it is not plain LoRA.

    Also if a tensor matches no weight in `base`: the adapter belongs to another model, or a change would be lost.
    """
    settings = read_adapter_config(folder)
    tensors = adapter_weights(folder)
    deltas = {}
    for name, a in tensors.items():
        target = name.removeprefix(PEFT_PREFIX).replace(".lora_A.", ".")
        if ".lora_A." in name:
            b = tensors.get(name.replace(".lora_A.", ".lora_B."))
            check_rank(a, settings, target, name)
            deltas[target] = make_delta(a, b, base.get(target), lora_scale(settings, target), name)
        elif ".lora_B." not in name:
            raise TapirError(
                f"it changes {name} by other means than LoRA",
                where=str(folder),
                fix="Train without modules_to_save and trainable tokens.",
            )
    if not deltas:
        raise TapirError("it changes nothing", where=str(folder), fix="Train the adapter again.")
    return deltas


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises TapirError if the folder contains no adapter, or one that is more than plain LoRA."""
    check_adapter_folder(folder, "Give the folder of an adapter saved with PEFT's save_pretrained.")
    settings: dict[str, Any] = read_model_json(folder / "adapter_config.json")
    check_plain_lora(settings, folder)
    return settings


def check_plain_lora(settings: Mapping[str, Any], folder: Path) -> None:
    """Raise TapirError if PEFT would do more than add B·A."""
    odd = [
        name
        for name in ("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "layer_replication")
        if settings.get(name)
    ]
    odd += ["bias"] if settings.get("bias", "none") != "none" else []
    if settings.get("peft_type") != "LORA" or odd:
        kind = ", ".join(odd) or str(settings.get("peft_type"))
        raise TapirError(
            f"only plain LoRA can be exported, not {kind}",
            where=str(folder / "adapter_config.json"),
            fix="Train without it.",
        )


def lora_scale(settings: Mapping[str, Any], target: str) -> float:
    """alpha / r, or alpha / √r for rank-stabilized LoRA; a module may have its own alpha and r."""
    module = target.removesuffix(".weight")
    rank, alpha = module_setting(settings, "rank_pattern", "r", module), module_setting(settings, *ALPHA_KEYS, module)
    return float(alpha / (sqrt(rank) if settings.get("use_rslora") else rank))


def check_rank(a: StoredTensor, settings: Mapping[str, Any], target: str, name: str) -> None:
    """Raise TapirError if config and weights do not belong together: the scale would be wrong."""
    rank = module_setting(settings, "rank_pattern", "r", target.removesuffix(".weight"))
    if a.shape[0] != rank:
        raise TapirError(
            f"its tensor {name} has rank {a.shape[0]}, but its adapter_config.json says {rank:g}",
            where=str(a.file),
            fix="Restore the adapter_config.json that was written with these weights.",
        )


def module_setting(settings: Mapping[str, Any], key: str, default: str, module: str) -> float:
    """A module's own value: a pattern matches the end of its name after a dot (peft 0.21, utils/other.py,
    get_pattern_key)."""
    import re

    patterns = settings.get(key) or {}
    found = next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)
    return float(settings[default] if found is None else patterns[found])


def make_delta(
    a: StoredTensor, b: StoredTensor | None, weight: StoredTensor | None, factor: float, name: str
) -> LoraDelta:
    """The LoraDelta of two tensors whose shapes fit the weight; TapirError if they do not."""
    if b is None or weight is None or (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
        raise TapirError(
            f"its tensor {name} does not match a weight of the base model",
            where=str(a.file),
            fix="Use the base that the adapter was trained on.",
        )
    return LoraDelta(a, b, factor)
