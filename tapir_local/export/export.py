"""Export a base model, with or without a LoRA adapter, to one GGUF, tensor by tensor; or the adapter alone.

`python -m tapir_local.export.export FOLDER` runs the ExportJob in FOLDER/job.json in its own process.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose, prod
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.export.architectures import (
    TensorMapping,
    exported_tensors,
    gguf_name,
    norm_offset,
    read_model_config,
    rope_factors,
    rope_settings,
    row_order,
    tensor_mapping,
    write_architecture,
)
from tapir_local.export.converter import Converter, convert_with_llama_cpp, find_converter
from tapir_local.export.tokenizer import (
    Vocabulary,
    end_of_turn_id,
    read_model_template,
    read_model_vocabulary,
    read_tokenizer_json,
    special_token_texts,
    write_vocabulary,
)
from tapir_local.export.weights import FloatArray, LoraDelta, load_tensor, model_weights, read_adapter_deltas
from tapir_local.export.writer import (
    PlannedTensor,
    file_type_number,
    k_quant_bytes,
    tensor_bytes,
    tensor_type,
    write_tensors,
)
from tapir_local.files import atomic_write, read_record
from tapir_local.inference.model import quantize_gguf
from tapir_local.memory import check_disk_space, check_memory
from tapir_local.process import child_main, run_in_process
from tapir_local.records import Progress, noop
from tapir_local.training.model_files import StoredTensor, read_model_json


@dataclass(frozen=True)
class ExportJob:
    """The base model's folder, the adapter's folder if any, the type of the weights and the output file.

    With `adapter_only`, only the adapter is exported, for llama.cpp to load on top of the base GGUF; `quant` is then
    f32 or f16. `converter` is llama.cpp's script or its folder, which then makes the GGUF.
    """

    model_dir: Path
    out: Path
    quant: str
    adapter: Path | None = None
    adapter_only: bool = False
    converter: Path | None = None


NATIVE_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
K_QUANTS = {"q4_k_m": "Q4_K_M", "q5_k_m": "Q5_K_M", "q6_k": "Q6_K"}
ADAPTER_TYPES = {"f32": "F32", "f16": "F16"}
EXPORT_MEMORY = 64 << 20  # bytes besides the libraries: the vocabulary, and blocks of one megabyte each


def export_gguf(
    model_dir: Path,
    out: Path,
    *,
    adapter: Path | None,
    quant: str,
    converter: Converter | None = None,
    progress: Progress = lambda done, total, note: None,
) -> None:
    """Write `out`, completely or not at all. Peak memory is a few blocks of a tensor's rows, not the model.

    `quant` is f32, f16, bf16, q8_0, q4_k_m, q5_k_m or q6_k; llama.cpp makes k-quants from an intermediate 16-bit file
    beside `out`. Norms and biases stay in f32. With `converter`, llama.cpp's own script makes the file for any family.
    `progress` receives (tensors written, total tensors, name). Raises TapirError for a family, tokenizer, adapter or
    setting that llama.cpp does not support, and if the disk is too small.
    """
    if quant not in {**NATIVE_TYPES, **K_QUANTS}:
        known = ", ".join({**NATIVE_TYPES, **K_QUANTS})
        raise TapirError(f"no such quant: {quant}", where="quant", fix=f"Use one of {known}.")
    if converter:
        find_converter(converter.path)
    kind = quant if quant in NATIVE_TYPES else intermediate_type(model_dir, adapter)

    def write(path: Path) -> None:
        if converter:
            convert_with_llama_cpp(model_dir, adapter, path, kind, converter, progress)
        else:
            write_model_gguf(model_dir, path, adapter, NATIVE_TYPES[kind], progress, quant)

    with atomic_write(out) as partial:
        if quant in NATIVE_TYPES:
            write(partial)
            return
        intermediate = out.with_name(f"{out.name}.{kind}.partial")
        try:
            write(intermediate)
            quantize_gguf(intermediate, partial, K_QUANTS[quant])
        finally:
            intermediate.unlink(missing_ok=True)


def intermediate_type(model_dir: Path, adapter: Path | None) -> str:
    """The type that a k-quant is made from: bf16 if the model is saved in bf16 and nothing is merged, else f16.

    Both hold the saved weights exactly; merged weights need the higher precision of f16.
    """
    kinds = {source.dtype for source in model_weights(model_dir).values() if len(source.shape) > 1}
    return "bf16" if kinds == {"BF16"} and adapter is None else "f16"


def write_model_gguf(
    model_dir: Path, path: Path, adapter: Path | None, quant: str, progress: Progress, then: str = ""
) -> None:
    """Write the metadata, then every tensor. If a k-quant is made from it `then`, the disk must hold both files."""
    import gguf

    config, arch = read_model_config(model_dir)
    tensors = plan_model(model_dir, adapter, tensor_mapping(config, arch), gguf.GGMLQuantizationType[quant])
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    vocab = read_model_vocabulary(model_dir, rows)
    check_export_space(path, tensors, vocab, then if then in K_QUANTS else "")
    writer = gguf.GGUFWriter(path, arch.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model_dir.name)
    writer.add_file_type(file_type_number(quant))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_architecture(writer, config, arch, rows)
    write_vocabulary(writer, vocab)
    write_tensors(writer, tensors, progress)


def check_export_space(path: Path, tensors: Sequence[PlannedTensor], vocab: Vocabulary, then: str) -> None:
    """Raise TapirError if the disk has no room for the file, and for the k-quant that is made from it `then`.

    Also if memory is too small for the export itself (see `EXPORT_MEMORY`) and for llama.cpp's quantization, which
    holds the largest tensor in float32 and quantized.
    """
    largest = max(prod(tensor.shape) for tensor in tensors)
    check_memory(EXPORT_MEMORY + (8 * largest if then else 0), "the export")
    texts = sum(len(text.encode()) + 16 for text in (*(token.text for token in vocab.tokens), *vocab.merges))
    file = sum(tensor_bytes(tensor) + 128 for tensor in tensors) + texts + len(vocab.chat_template)
    what = "the GGUF and the 16-bit GGUF that it is made from" if then else "the GGUF"
    check_disk_space(path, file + (sum(k_quant_bytes(tensor, then) for tensor in tensors) + texts if then else 0), what)


def plan_model(model_dir: Path, adapter: Path | None, mapping: TensorMapping, quant: Any) -> tuple[PlannedTensor, ...]:
    """Every tensor of the GGUF, in the order of the base's names."""
    sources = exported_tensors(model_weights(model_dir), mapping.config)
    deltas = {} if adapter is None else read_adapter_deltas(adapter, sources)
    tensors = [plan_tensor(name, source, deltas.get(name), mapping, quant) for name, source in sorted(sources.items())]
    if rope_settings(mapping.config)[0]["rope_type"] == "llama3":
        tensors.append(plan_rope_factors(rope_factors(mapping.config)))
    return tuple(tensors)


def plan_rope_factors(factors: FloatArray) -> PlannedTensor:
    """Llama 3's rotary scaling, which llama.cpp reads as a tensor."""
    import gguf

    def read(start: int, stop: int) -> FloatArray:
        return factors[start:stop]

    return PlannedTensor("rope_freqs.weight", gguf.GGMLQuantizationType.F32, factors.shape, read)


def plan_tensor(
    name: str, source: StoredTensor, delta: LoraDelta | None, mapping: TensorMapping, quant: Any
) -> PlannedTensor:
    """The name, type and rows of one tensor in the GGUF."""
    target, offset = gguf_name(mapping, name, source), norm_offset(mapping, name)
    order = row_order(mapping, name, source.shape[0])

    def read(start: int, stop: int) -> FloatArray:
        weight = load_tensor(source, delta, slice(start, stop) if order is None else order[start:stop])
        return weight + offset if offset else weight

    return PlannedTensor(target, tensor_type(target, source.shape, quant), source.shape, read)


def check_exportable(model_dir: Path, converter: Path | None = None) -> None:
    """Raise TapirError if `export_gguf` would reject the model's family, tokenizer or template; no weights are read.

    With llama.cpp's converter, which supports other families, only the script and the template's end of turn are
    checked.
    """
    if converter:
        find_converter(converter)
        ends = end_of_turn_id(
            read_tokenizer_json(model_dir), read_model_template(model_dir), special_token_texts(model_dir)
        )
    else:
        ends = dict(read_model_vocabulary(model_dir, read_model_config(model_dir)[0]["vocab_size"]).special)
    if "eot" not in ends:
        raise TapirError(
            "the chat template does not end an answer with a token of the tokenizer, so a student would never stop",
            where=str(model_dir),
            fix="Set student.chat_template (of `tapir-local export`: --chat-template); `alpaca` ends answers with the "
            "tokenizer's own EOS.",
        )


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


def run_export(job: ExportJob, folder: Path, progress: Progress | None = None) -> None:
    """Export in a separate process, which leaves job.json and export.log in `folder`.

    `progress` receives (tensors written, total tensors, name). Raises TapirError as `export_gguf` does, or if the
    process died.
    """
    run_in_process(export_main, job, folder, progress)


def export_main(folder: Path, progress: Progress) -> None:
    """Run the job in `folder`: the entry point of the export process."""
    job = read_record(ExportJob, folder / "job.json")
    if job.adapter_only and job.adapter:
        export_adapter(job.model_dir, job.adapter, job.out, quant=job.quant, progress=progress)
        return
    export_gguf(
        job.model_dir,
        job.out,
        adapter=job.adapter,
        quant=job.quant,
        converter=Converter(job.converter, folder / "converter.log") if job.converter else None,
        progress=progress,
    )


if __name__ == "__main__":
    # Our threads compute the blocks; OpenBLAS's threads would compete with them: a 0.5B with LoRA took 8.7 s, not 4.6.
    sys.exit(child_main(export_main, {"OPENBLAS_NUM_THREADS": "1"}))
