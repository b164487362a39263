"""A model's weights as they lie on the disk, read one tensor at a time, with a LoRA adapter's change added."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.export.tokenizer import read_json
from tapir_local.records import Array
from tapir_local.training.model import check_adapter

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
PEFT_PREFIX = "base_model.model."
ALPHA = ("alpha_pattern", "lora_alpha")


@dataclass(frozen=True)
class Source:
    """A tensor in a safetensors file, not yet read."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Delta:
    """LoRA's addition to one weight: scale · B @ A, with A (rank, columns) and B (rows, rank)."""

    a: Source
    b: Source
    scale: float


def read_model(model_dir: Path) -> dict[str, Source]:
    """Every tensor of a model by its name in transformers, whatever number of files it is in.

    TapirError naming the files that the index knows and the folder lacks, or a tensor that its file lacks.
    """
    index = model_dir / "model.safetensors.index.json"
    if not index.is_file():
        return read_header(model_dir / "model.safetensors")
    wanted, fix = weight_map(index), "Download or copy the model again, every file of it."
    files = sorted(set(wanted.values()))
    missing = [file for file in files if not (model_dir / file).is_file()]
    if missing:
        names = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise TapirError(
            f"{len(missing)} of its {len(files)} files of weights are missing: {names}", where=str(model_dir), fix=fix
        )
    found = {name: source for file in files for name, source in read_header(model_dir / file).items()}
    absent = [name for name in wanted if name not in found]
    if absent:
        raise TapirError(f"tensor {absent[0]} is not in {wanted[absent[0]]}", where=str(model_dir), fix=fix)
    return found


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor. TapirError where the index is none, or names a file outside the model's own folder."""
    files = read_json(index).get("weight_map")
    fix = "Take a whole copy of the model from a source that you trust."
    if not isinstance(files, dict) or not files:
        raise TapirError("it has no weight_map", where=str(index), fix=fix)
    odd = [file for file in files.values() if not isinstance(file, str) or not is_plain(file)]
    if odd:
        raise TapirError(f"it names a file that is not in the model's folder: {odd[0]!r}", where=str(index), fix=fix)
    return files


def is_plain(name: str) -> bool:
    """Whether a name is a file's own, with no folder in it."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def read_header(file: Path) -> dict[str, Source]:
    """Where the tensors of a safetensors file are. TapirError for one that is missing, cut short or of odd types."""
    from gguf.utility import SafetensorsLocal

    fix = "Save the model there with transformers' save_pretrained, or copy the file again."
    try:
        tensors = SafetensorsLocal(file).tensors
        size = file.stat().st_size
    except (OSError, ValueError) as error:
        raise TapirError(f"the weights cannot be read: {error}", where=str(file), fix=fix) from error
    for name, tensor in tensors.items():
        if tensor.data_range.offset + tensor.data_range.size > size:
            raise TapirError(f"the file ends before tensor {name} does", where=str(file), fix=fix)
        if tensor.dtype not in DTYPES:
            raise TapirError(
                f"tensor {name} is {tensor.dtype}",
                where=str(file),
                fix=f"Export a model saved as {', '.join(DTYPES)}, not a quantised one.",
            )
    return {
        name: Source(file, tensor.data_range.offset, tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def load(source: Source, delta: Delta | None = None, rows: Any = slice(None)) -> Array:
    """The tensor in float32, LoRA's change added; of a part of it where `rows`, a slice or row numbers, says so."""
    import numpy as np

    raw = np.memmap(source.file, dtype=DTYPES[source.dtype], mode="r", offset=source.offset, shape=source.shape)[rows]
    if source.dtype == "BF16":  # numpy has no bfloat16, which is the upper half of a float32
        bits = raw.astype(np.uint32)
        bits <<= 16
        weight = bits.view(np.float32)
    else:
        weight = raw.astype(np.float32)
    if delta is not None:
        weight += (delta.scale * load(delta.b, rows=rows)) @ load(delta.a)
    return weight


def read_adapter(folder: Path, base: Mapping[str, Source]) -> dict[str, Delta]:
    """The changes of a PEFT LoRA adapter by the name of the weight. TapirError for anything that is not plain LoRA.

    Also for a tensor that fits nothing in `base`: an adapter of another model, or one that would be left out silently.
    """
    settings = adapter_settings(folder)
    tensors = read_header(folder / "adapter_model.safetensors")
    deltas = {}
    for name, a in tensors.items():
        target = name.removeprefix(PEFT_PREFIX).replace(".lora_A.", ".")
        if ".lora_A." in name:
            b = tensors.get(name.replace(".lora_A.", ".lora_B."))
            check_rank(a, settings, target, name)
            deltas[target] = fitting(a, b, base.get(target), scale(settings, target), name)
        elif ".lora_B." not in name:
            raise TapirError(
                f"it changes {name} in another way than LoRA's",
                where=str(folder),
                fix="Train without modules_to_save and trainable tokens.",
            )
    if not deltas:
        raise TapirError("it changes nothing", where=str(folder), fix="Train the adapter again.")
    return deltas


def adapter_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json; TapirError when the folder holds no adapter, or one that is more than plain LoRA."""
    check_adapter(folder, "Name the folder of an adapter as PEFT's save_pretrained writes it.")
    settings: dict[str, Any] = read_json(folder / "adapter_config.json")
    check_plain(settings, folder)
    return settings


def check_plain(settings: Mapping[str, Any], folder: Path) -> None:
    """TapirError when PEFT would do more than add B·A."""
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


def scale(settings: Mapping[str, Any], target: str) -> float:
    """alpha / r, or alpha / √r with rank-stabilised LoRA; a module may have its own alpha and r."""
    module = target.removesuffix(".weight")
    rank, alpha = patterned(settings, "rank_pattern", "r", module), patterned(settings, *ALPHA, module)
    return float(alpha / (sqrt(rank) if settings.get("use_rslora") else rank))


def check_rank(a: Source, settings: Mapping[str, Any], target: str, name: str) -> None:
    """TapirError when config and weights are not of one training: the scale would be wrong."""
    rank = patterned(settings, "rank_pattern", "r", target.removesuffix(".weight"))
    if a.shape[0] != rank:
        raise TapirError(
            f"its tensor {name} has rank {a.shape[0]}, its adapter_config.json says {rank:g}",
            where=str(a.file),
            fix="Put back the adapter_config.json that was written with these weights.",
        )


def patterned(settings: Mapping[str, Any], key: str, default: str, module: str) -> float:
    """peft 0.21 (utils/other.py get_pattern_key): a pattern matches the end of a module's name, from a dot on."""
    import re

    patterns = settings.get(key) or {}
    found = next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)
    return float(settings[default] if found is None else patterns[found])


def fitting(a: Source, b: Source | None, weight: Source | None, factor: float, name: str) -> Delta:
    """A Delta whose shapes fit the weight."""
    if b is None or weight is None or (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
        raise TapirError(
            f"its tensor {name} fits no weight of the base model",
            where=str(a.file),
            fix="Use the base that the adapter was trained on.",
        )
    return Delta(a, b, factor)
