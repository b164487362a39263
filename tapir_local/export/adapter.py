"""A LoRA adapter alone as a GGUF of some megabytes, which llama.cpp lays over the base's."""

from math import isclose
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.export.architectures import (
    Architecture,
    ModelConfig,
    exported_tensors,
    gguf_name,
    read_model_config,
    row_order,
    tensor_name_map,
)
from tapir_local.export.weights import LoraDelta, load_tensor, read_adapter_deltas
from tapir_local.export.writer import PlannedTensor, write_tensors
from tapir_local.process import Progress
from tapir_local.rundir import whole
from tapir_local.training.model_files import read_model_json, read_model_tensors

ADAPTER_TYPES = {"f32": "F32", "f16": "F16"}


def export_adapter(
    model_dir: Path,
    adapter: Path,
    out: Path,
    *,
    quant: str = "f32",
    progress: Progress = lambda done, total, note: None,
) -> None:
    """Write the PEFT LoRA in the folder `adapter` as `out`, whole or not at all, for the base in `model_dir`.

    `quant` is f32 or f16. Of the base only the config and the names and shapes of its tensors are read. `progress` gets
    (tensors written, tensors in all, name). TapirError for an adapter of another base or rank, one that is more than
    plain LoRA, and a base that is not mapped.
    """
    import gguf

    if quant not in ADAPTER_TYPES:
        raise TapirError(f"an adapter cannot be {quant}", where="quant", fix=f"One of {', '.join(TYPES)}.")
    config, family = read_model_config(model_dir)
    tensors = plan_adapter(model_dir, adapter, config, family, gguf.GGMLQuantizationType[ADAPTER_TYPES[quant]])
    with whole(out) as partial:
        writer = gguf.GGUFWriter(partial, family.arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter_alpha(adapter))
        writer.add_name(adapter.name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_tensors(writer, tensors, progress)


def adapter_alpha(adapter: Path) -> float:
    """The adapter's alpha; 1 for 0, which llama.cpp would take for no scaling at all."""
    return float(read_model_json(adapter / "adapter_config.json")["lora_alpha"] or 1)


def plan_adapter(
    model_dir: Path, adapter: Path, config: ModelConfig, family: Architecture, quant: Any
) -> tuple[PlannedTensor, ...]:
    """A and B of every changed weight, in the order of the base's names."""
    deltas = read_adapter_deltas(adapter, exported_tensors(read_model_tensors(model_dir), config))
    names = tensor_name_map(config, family)
    tensors: list[PlannedTensor] = []
    for name, delta in sorted(deltas.items()):
        target = gguf_name(name, delta.a, names, family)
        tensors += plan_pair(target, name, delta, adapter_alpha(adapter), config, family, quant)
    return tuple(tensors)


def plan_pair(
    target: str, name: str, delta: LoraDelta, shared: float, config: ModelConfig, family: Architecture, quant: Any
) -> tuple[PlannedTensor, PlannedTensor]:
    """A and B of one weight. llama.cpp scales by `shared` / rank; what the module's own scale differs goes into B."""
    factor = delta.scale * delta.a.shape[0] / shared
    order = row_order(name, delta.b.shape[0], config, family)

    def read_b(start: int, stop: int) -> Any:
        weight = load_tensor(delta.b, rows=slice(start, stop) if order is None else order[start:stop])
        return weight if isclose(factor, 1.0) else weight * factor

    return (
        PlannedTensor(
            f"{target}.lora_a", quant, delta.a.shape, lambda start, stop: load_tensor(delta.a, rows=slice(start, stop))
        ),
        PlannedTensor(f"{target}.lora_b", quant, delta.b.shape, read_b),
    )
