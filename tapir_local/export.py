"""A base model, with or without a LoRA adapter, to one GGUF: merged and quantised tensor by tensor.

`python -m tapir_local.export FOLDER` does the ExportJob in FOLDER/job.json, in a process of its own.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapir_local.adapter_gguf import export_adapter
from tapir_local.errors import TapirError
from tapir_local.families import (
    Config,
    Family,
    read_config,
    rope_factors,
    rotaries,
    row_order,
    shift,
    target_name,
    tensor_names,
    used,
    write_settings,
)
from tapir_local.gguf_file import Planned, file_type, type_of, write_tensors
from tapir_local.gguf_vocab import read_vocab, write_vocab
from tapir_local.llama import quantise
from tapir_local.process import Progress, child_main, in_own_process
from tapir_local.rundir import read_record, whole
from tapir_local.weights import Delta, Source, load, read_adapter, read_model

Array = Any  # numpy.ndarray; numpy is imported where it is used


@dataclass(frozen=True)
class ExportJob:
    """A job: the base's folder, the adapter's if there is one, the type of the weights, the file to be written.

    `adapter_only` asks for the adapter alone, for llama.cpp to lay over the base's GGUF; `quant` is then f32 or f16.
    """

    model_dir: Path
    out: Path
    quant: str
    adapter: Path | None = None
    adapter_only: bool = False


NATIVE = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
K_QUANTS = {"q4_k_m": "Q4_K_M", "q5_k_m": "Q5_K_M", "q6_k": "Q6_K"}


def export_gguf(
    model_dir: Path, out: Path, *, adapter: Path | None, quant: str, progress: Progress = lambda done, total, note: None
) -> None:
    """Write `out`, whole or not at all. Peak memory is some blocks of a tensor's rows, not the model.

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

    config, family = read_config(model_dir)
    tensors = plan(model_dir, config, family, adapter, gguf.GGMLQuantizationType[quant])
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    writer = gguf.GGUFWriter(path, family.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model_dir.name)
    writer.add_file_type(file_type(quant))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_settings(writer, config, family, rows)
    write_vocab(writer, read_vocab(model_dir, rows))
    write_tensors(writer, tensors, progress)


def plan(model_dir: Path, config: Config, family: Family, adapter: Path | None, quant: Any) -> tuple[Planned, ...]:
    """Every tensor of the GGUF in the order of the base's names."""
    sources = used(read_model(model_dir), config)
    deltas = {} if adapter is None else read_adapter(adapter, sources)
    names = tensor_names(config, family)
    tensors = [
        plan_tensor(name, source, deltas.get(name), names, config, family, quant)
        for name, source in sorted(sources.items())
    ]
    if rotaries(config)[0]["rope_type"] == "llama3":
        tensors.append(planned_factors(rope_factors(config)))
    return tuple(tensors)


def planned_factors(factors: Array) -> Planned:
    """Llama 3's rotary scaling, which llama.cpp reads as a tensor."""
    import gguf

    def read(start: int, stop: int) -> Array:
        return factors[start:stop]

    return Planned("rope_freqs.weight", gguf.GGMLQuantizationType.F32, factors.shape, read)


def plan_tensor(
    name: str, source: Source, delta: Delta | None, names: Any, config: Config, family: Family, quant: Any
) -> Planned:
    """Where a tensor goes, and how it is made."""
    target, added = target_name(name, source, names, family), shift(name, family)
    order = row_order(name, source.shape[0], config, family)

    def read(start: int, stop: int) -> Array:
        weight = load(source, delta, slice(start, stop) if order is None else order[start:stop])
        return weight + added if added else weight

    return Planned(target, type_of(target, source.shape, quant), source.shape, read)


def check_exportable(model_dir: Path) -> None:
    """TapirError when `export_gguf` would refuse the model's family, tokenizer or template; no weights are read."""
    config, _ = read_config(model_dir)
    if "eot" not in read_vocab(model_dir, config["vocab_size"]).special:
        raise TapirError(
            "the chat template ends no answer with a token of the tokenizer, so a student would never stop",
            where=str(model_dir),
            fix="Set student.chat_template; `alpaca` ends answers with the tokenizer's own EOS.",
        )


def export(job: ExportJob, folder: Path, progress: Progress | None = None) -> None:
    """Run the job in a process of its own, which leaves job.json and export.log in `folder`.

    `progress` gets (tensors written, tensors in all, name). TapirError as from `export_gguf`, or when the process died.
    """
    in_own_process("tapir_local.export", job, folder, progress)


def run_folder(folder: Path, progress: Progress) -> None:
    """The child's side of `export`."""
    job = read_record(ExportJob, folder / "job.json")
    if job.adapter_only and job.adapter:
        export_adapter(job.model_dir, job.adapter, job.out, quant=job.quant, progress=progress)
    else:
        export_gguf(job.model_dir, job.out, adapter=job.adapter, quant=job.quant, progress=progress)


if __name__ == "__main__":
    sys.exit(child_main(run_folder))
