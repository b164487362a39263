"""A base model, with or without a LoRA adapter, to one GGUF: merged and quantised tensor by tensor.

`python -m tapir_local.export FOLDER` does the ExportJob in FOLDER/job.json, in a process of its own.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.gguf_vocab import read_json, read_vocab, write_vocab
from tapir_local.llama import quantise
from tapir_local.process import Progress, child_main, in_own_process
from tapir_local.rundir import read_record, whole
from tapir_local.weights import Delta, Source, load, read_adapter, read_model

Array = Any  # numpy.ndarray; numpy is imported where it is used


@dataclass(frozen=True)
class ExportJob:
    """A job: the base's folder, the adapter's if there is one, the type of the weights, the file to be written."""

    model_dir: Path
    out: Path
    quant: str
    adapter: Path | None = None


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls an architecture, and where its tensors differ from transformers'.

    `paired` says that llama.cpp rotates neighbouring pairs of a head's dimensions where transformers rotates halves,
    so that the rows of q and k must be put in another order. `refused` are settings that llama.cpp would not heed.
    """

    arch: str
    paired: bool = False
    refused: tuple[str, ...] = ()


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", paired=True),
    "MistralForCausalLM": Family("llama", paired=True),
    "Qwen2ForCausalLM": Family("qwen2", refused=("use_sliding_window",)),
    "Qwen3ForCausalLM": Family("qwen3", refused=("use_sliding_window",)),
}
NATIVE = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
K_QUANTS = {"q4_k_m": "Q4_K_M", "q5_k_m": "Q5_K_M", "q6_k": "Q6_K"}


@dataclass(frozen=True)
class Planned:
    """A tensor of the GGUF: its name, ggml type and shape, and how to make it in float32."""

    name: str
    quant: Any
    shape: tuple[int, ...]
    read: Callable[[], Array]


def export_gguf(
    model_dir: Path, out: Path, *, adapter: Path | None, quant: str, progress: Progress = lambda done, total, note: None
) -> None:
    """Write `out`, whole or not at all. Peak memory is a few copies of the largest tensor, not the model.

    `quant` is f32, f16, bf16, q8_0, q4_k_m, q5_k_m or q6_k; k-quants are made by llama.cpp from an f16 file beside
    `out`. Norms and biases stay in f32. `progress` gets (tensors written, tensors in all, name). TapirError for a
    family, tokenizer, adapter or setting that has no like in llama.cpp.
    """
    if quant not in {**NATIVE, **K_QUANTS}:
        raise TapirError(f"no such quant: {quant}", where="quant", fix=f"One of {', '.join({**NATIVE, **K_QUANTS})}.")
    with whole(out) as partial:
        if quant in NATIVE:
            write_gguf(model_dir, partial, adapter, NATIVE[quant], progress)
            return
        middle = out.with_name(out.name + ".f16.partial")
        try:
            write_gguf(model_dir, middle, adapter, "F16", progress)
            quantise(middle, partial, K_QUANTS[quant])
        finally:
            middle.unlink(missing_ok=True)


def write_gguf(model_dir: Path, path: Path, adapter: Path | None, quant: str, progress: Progress) -> None:
    """Metadata first, then every tensor as it is made."""
    import gguf

    config = read_json(model_dir / "config.json")
    family = family_of(config, model_dir)
    tensors = plan(model_dir, config, family, adapter, gguf.GGMLQuantizationType[quant])
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    writer = gguf.GGUFWriter(path, family.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model_dir.name)
    writer.add_file_type(file_type(quant))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_settings(writer, config, rows)
    write_vocab(writer, read_vocab(model_dir, rows))
    for tensor in tensors:
        shape = byte_shape(tensor)
        writer.add_tensor_info(tensor.name, shape, storage(tensor.quant), size_of(tensor), raw_dtype=tensor.quant)
    write_tensors(writer, tensors, progress)


def file_type(quant: str) -> int:
    """llama.cpp's number for what most of the weights are."""
    import gguf

    return int(gguf.LlamaFileType.ALL_F32 if quant == "F32" else gguf.LlamaFileType[f"MOSTLY_{quant}"])


def write_tensors(writer: Any, tensors: tuple[Planned, ...], progress: Progress) -> None:
    """The file itself. gguf keeps nothing of a tensor once it is written."""
    from gguf import quants

    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, tensor in enumerate(tensors, 1):
            writer.write_tensor_data(quants.quantize(tensor.read(), tensor.quant))
            progress(number, len(tensors), tensor.name)
        writer.flush()
    finally:
        writer.close()


def storage(quant: Any) -> Any:
    """The numpy type in which gguf hands over a ggml type: bytes for all but plain floats."""
    import numpy as np

    return np.dtype({"F32": np.float32, "F16": np.float16}.get(quant.name, np.uint8))


def byte_shape(tensor: Planned) -> tuple[int, ...]:
    """The shape as GGUFWriter wants it: of bytes where the type is not a plain float."""
    from gguf import quant_shape_to_byte_shape

    plain = tensor.quant.name in ("F32", "F16")
    return tensor.shape if plain else tuple(quant_shape_to_byte_shape(tensor.shape, tensor.quant))


def size_of(tensor: Planned) -> int:
    """Bytes of the tensor in the file."""
    from math import prod

    return int(prod(byte_shape(tensor))) * int(storage(tensor.quant).itemsize)


def family_of(config: Mapping[str, Any], model_dir: Path) -> Family:
    """The model's family; TapirError naming those mapped, or the setting that llama.cpp would not heed."""
    where = str(model_dir / "config.json")
    name = (config.get("architectures") or ["?"])[0]
    if name not in FAMILIES:
        raise TapirError(
            f"the family {name} is not mapped to GGUF", where=where, fix=f"Those mapped are: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[name]
    if config.get("hidden_act", "silu") != "silu":
        raise TapirError(
            f"hidden_act {config['hidden_act']} has no like in llama.cpp's {family.arch}",
            where=where,
            fix="Use a model with silu.",
        )
    for setting in family.refused:
        if config.get(setting):
            raise TapirError(
                f"{setting} has no like in llama.cpp's {family.arch}", where=where, fix="Use a model without it."
            )
    return family


def check_exportable(model_dir: Path) -> None:
    """TapirError when `export_gguf` would refuse the model's family, tokenizer or template; no weights are read."""
    config = read_json(model_dir / "config.json")
    family_of(config, model_dir)
    if "eot" not in read_vocab(model_dir, config["vocab_size"]).special:
        raise TapirError(
            "the chat template ends no answer with a token of the tokenizer, so a student would never stop",
            where=str(model_dir),
            fix="Set student.chat_template; `alpaca` ends answers with the tokenizer's own EOS.",
        )


def write_settings(writer: Any, config: Mapping[str, Any], rows: int) -> None:
    """The architecture's numbers, out of config.json."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_vocab_size(rows)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope(config)["rope_theta"])
    write_rope_scaling(writer, rope(config))


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings: `rope_parameters` in transformers 5; `rope_theta` and `rope_scaling` apart in older models."""
    settings = {"rope_theta": config.get("rope_theta") or 10000.0}
    settings |= config.get("rope_scaling") or {}
    settings |= config.get("rope_parameters") or {}
    return {"rope_type": settings.get("type", "default")} | settings


def write_rope_scaling(writer: Any, settings: Mapping[str, Any]) -> None:
    """Linear and YaRN scaling are numbers; Llama 3's is a tensor (see `rope_factors`)."""
    import gguf

    kind = settings["rope_type"]
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise TapirError(
            f"rope scaling of type {kind} is not mapped to GGUF",
            where="config.json",
            fix="Use a model with default, linear, yarn or llama3 rotary scaling.",
        )
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(settings["factor"])
    if kind == "yarn" and "original_max_position_embeddings" in settings:
        writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])


def rope_factors(config: Mapping[str, Any]) -> Array:
    """What Llama 3.1's scaling divides each rotary frequency by, shape (head_dim / 2,).

    transformers 5.17, modeling_rope_utils.py: short wave lengths stay, long ones are divided by `factor`, those between
    are blended.
    """
    import numpy as np

    settings = rope(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    waves = 2 * np.pi * settings["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    low, high, factor = settings["low_freq_factor"], settings["high_freq_factor"], settings["factor"]
    old = settings["original_max_position_embeddings"]
    smooth = np.clip((old / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def plan(
    model_dir: Path, config: Mapping[str, Any], family: Family, adapter: Path | None, quant: Any
) -> tuple[Planned, ...]:
    """Every tensor of the GGUF in the order of the base's names."""
    import gguf

    tied = bool(config.get("tie_word_embeddings"))
    sources = {
        name: source for name, source in read_model(model_dir).items() if not name.endswith("rotary_emb.inv_freq")
    }
    if tied:  # llama.cpp takes token_embd for the missing output
        sources.pop("lm_head.weight", None)
    deltas = {} if adapter is None else read_adapter(adapter, sources)
    names = gguf.get_tensor_name_map(arch_number(family.arch), config["num_hidden_layers"])
    tensors = [
        plan_tensor(name, source, deltas.get(name), names, config, family, quant)
        for name, source in sorted(sources.items())
    ]
    if rope(config)["rope_type"] == "llama3":
        factors = rope_factors(config)
        tensors.append(Planned("rope_freqs.weight", gguf.GGMLQuantizationType.F32, factors.shape, lambda: factors))
    return tuple(tensors)


def arch_number(arch: str) -> Any:
    """gguf's number of an architecture, by llama.cpp's name."""
    import gguf

    return next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)


def plan_tensor(
    name: str, source: Source, delta: Delta | None, names: Any, config: Mapping[str, Any], family: Family, quant: Any
) -> Planned:
    """Where a tensor goes, and how it is made."""
    target = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if target is None:
        raise TapirError(
            f"tensor {name} has no place in llama.cpp's {family.arch}",
            where=str(source.file),
            fix="Export a model without additions.",
        )
    heads = paired_heads(name, config) if family.paired else 0

    def read() -> Array:
        weight = load(source, delta)
        return pair(weight, heads) if heads else weight

    return Planned(target, type_of(target, source.shape, quant), source.shape, read)


def type_of(name: str, shape: tuple[int, ...], quant: Any) -> Any:
    """Vectors and norms in F32, as llama.cpp wants them; F16 where a row is no whole number of the type's blocks."""
    import gguf

    if len(shape) == 1 or name.endswith("_norm.weight"):
        return gguf.GGMLQuantizationType.F32
    block = gguf.GGML_QUANT_SIZES[quant][0]
    return quant if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def paired_heads(name: str, config: Mapping[str, Any]) -> int:
    """The number of heads in q's or k's rows; 0 for any other tensor."""
    heads = int(config["num_attention_heads"])
    if name.endswith(("q_proj.weight", "q_proj.bias")):
        return heads
    return int(config.get("num_key_value_heads") or heads) if name.endswith(("k_proj.weight", "k_proj.bias")) else 0


def pair(weight: Array, heads: int) -> Array:
    """Rows 0, 1, … n/2, n/2 + 1, … of each head put as 0, n/2, 1, n/2 + 1, …"""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def export(job: ExportJob, folder: Path, progress: Progress | None = None) -> None:
    """Run the job in a process of its own, which leaves job.json and export.log in `folder`.

    `progress` gets (tensors written, tensors in all, name). TapirError as from `export_gguf`, or when the process died.
    """
    in_own_process("tapir_local.export", job, folder, progress)


def run_folder(folder: Path, progress: Progress) -> None:
    """The child's side of `export`."""
    job = read_record(ExportJob, folder / "job.json")
    export_gguf(job.model_dir, job.out, adapter=job.adapter, quant=job.quant, progress=progress)


if __name__ == "__main__":
    sys.exit(child_main(run_folder))
