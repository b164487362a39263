"""Export a LoRA adapter by itself as a GGUF of a few megabytes, which llama.cpp loads on top of the base GGUF.

This writes the adapter alone; merging it into the base's weights is `load_tensor` in export/weights.py.
"""

from collections.abc import Mapping
from math import isclose
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.export.architectures import (
    TensorMapping,
    exported_tensors,
    gguf_name,
    read_model_config,
    row_order,
    tensor_mapping,
)
from tapir_local.export.weights import FloatArray, LoraDelta, load_tensor, model_weights, read_adapter_deltas
from tapir_local.export.writer import PlannedTensor, write_tensors
from tapir_local.files import atomic_write
from tapir_local.records import Progress, noop
from tapir_local.training.model_files import StoredTensor, read_model_json

ADAPTER_TYPES = {"f32": "F32", "f16": "F16"}


def export_adapter(
    model_dir: Path,
    adapter: Path,
    out: Path,
    *,
    quant: str = "f32",
    progress: Progress = noop,
) -> None:
    """Write the PEFT LoRA in the folder `adapter` to `out`, completely or not at all, for the base in `model_dir`.

    `quant` is f32 or f16. Only the config and the names and shapes of the base's tensors are read. `progress` receives
    (tensors written, total tensors, name). Raises TapirError if the adapter belongs to another base or rank or is more
    than plain LoRA, and if the base is not supported.
    """
    import gguf

    if quant not in ADAPTER_TYPES:
        raise TapirError(f"an adapter cannot be {quant}", where="quant", fix=f"Use one of {', '.join(ADAPTER_TYPES)}.")
    config, arch = read_model_config(model_dir)
    base = exported_tensors(model_weights(model_dir), config)
    tensors = plan_adapter(adapter, base, tensor_mapping(config, arch), gguf.GGMLQuantizationType[ADAPTER_TYPES[quant]])
    with atomic_write(out) as partial:
        writer = gguf.GGUFWriter(partial, arch.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter_alpha(adapter))
        writer.add_name(adapter.name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_tensors(writer, tensors, progress)


def adapter_alpha(adapter: Path) -> float:
    """The adapter's alpha; 1 instead of 0, because llama.cpp reads 0 as "no scaling"."""
    return float(read_model_json(adapter / "adapter_config.json")["lora_alpha"] or 1)


def plan_adapter(
    adapter: Path, base: Mapping[str, StoredTensor], mapping: TensorMapping, quant: Any
) -> tuple[PlannedTensor, ...]:
    """A and B of every changed weight, in the order of the base's names."""
    deltas = read_adapter_deltas(adapter, base)
    alpha = adapter_alpha(adapter)
    pairs = [plan_pair(name, delta, alpha, mapping, quant) for name, delta in sorted(deltas.items())]
    return tuple(tensor for pair in pairs for tensor in pair)


def plan_pair(
    name: str, delta: LoraDelta, alpha: float, mapping: TensorMapping, quant: Any
) -> tuple[PlannedTensor, PlannedTensor]:
    """A and B of one weight. llama.cpp scales by `alpha` / rank; if the module's own scale differs, the factor goes
    into B."""
    target = gguf_name(mapping, name, delta.a)
    factor = delta.scale * delta.a.shape[0] / alpha
    order = row_order(mapping, name, delta.b.shape[0])

    def read_a(start: int, stop: int) -> FloatArray:
        return load_tensor(delta.a, rows=slice(start, stop))

    def read_b(start: int, stop: int) -> FloatArray:
        weight = load_tensor(delta.b, rows=slice(start, stop) if order is None else order[start:stop])
        return weight if isclose(factor, 1.0) else weight * factor

    return (
        PlannedTensor(f"{target}.lora_a", quant, delta.a.shape, read_a),
        PlannedTensor(f"{target}.lora_b", quant, delta.b.shape, read_b),
    )
