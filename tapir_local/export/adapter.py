"""A LoRA adapter alone as a GGUF of some megabytes, which llama.cpp lays over the base's."""

from math import isclose
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.export.architectures import Config, Family, read_config, row_order, target_name, tensor_names, used
from tapir_local.export.tokenizer import read_json
from tapir_local.export.weights import Delta, load, read_adapter, read_model
from tapir_local.export.writer import Planned, write_tensors
from tapir_local.files import atomic_write
from tapir_local.records import Progress, noop

TYPES = {"f32": "F32", "f16": "F16"}


def export_adapter(
    model_dir: Path,
    adapter: Path,
    out: Path,
    *,
    quant: str = "f32",
    progress: Progress = noop,
) -> None:
    """Write the PEFT LoRA in the folder `adapter` as `out`, whole or not at all, for the base in `model_dir`.

    `quant` is f32 or f16. Of the base only the config and the names and shapes of its tensors are read. `progress` gets
    (tensors written, tensors in all, name). TapirError for an adapter of another base or rank, one that is more than
    plain LoRA, and a base that is not mapped.
    """
    import gguf

    if quant not in TYPES:
        raise TapirError(f"an adapter cannot be {quant}", where="quant", fix=f"One of {', '.join(TYPES)}.")
    config, family = read_config(model_dir)
    tensors = plan(model_dir, adapter, config, family, gguf.GGMLQuantizationType[TYPES[quant]])
    with atomic_write(out) as partial:
        writer = gguf.GGUFWriter(partial, family.arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha(adapter))
        writer.add_name(adapter.name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_tensors(writer, tensors, progress)


def alpha(adapter: Path) -> float:
    """The adapter's alpha; 1 for 0, which llama.cpp would take for no scaling at all."""
    return float(read_json(adapter / "adapter_config.json")["lora_alpha"] or 1)


def plan(model_dir: Path, adapter: Path, config: Config, family: Family, quant: Any) -> tuple[Planned, ...]:
    """A and B of every changed weight, in the order of the base's names."""
    deltas = read_adapter(adapter, used(read_model(model_dir), config))
    names = tensor_names(config, family)
    tensors: list[Planned] = []
    for name, delta in sorted(deltas.items()):
        target = target_name(name, delta.a, names, family)
        tensors += pair_of(target, name, delta, alpha(adapter), config, family, quant)
    return tuple(tensors)


def pair_of(
    target: str, name: str, delta: Delta, shared: float, config: Config, family: Family, quant: Any
) -> tuple[Planned, Planned]:
    """A and B of one weight. llama.cpp scales by `shared` / rank; what the module's own scale differs goes into B."""
    factor = delta.scale * delta.a.shape[0] / shared
    order = row_order(name, delta.b.shape[0], config, family)

    def read_b(start: int, stop: int) -> Any:
        weight = load(delta.b, rows=slice(start, stop) if order is None else order[start:stop])
        return weight if isclose(factor, 1.0) else weight * factor

    return (
        Planned(f"{target}.lora_a", quant, delta.a.shape, lambda start, stop: load(delta.a, rows=slice(start, stop))),
        Planned(f"{target}.lora_b", quant, delta.b.shape, read_b),
    )
