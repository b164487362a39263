"""A base model, with or without a LoRA adapter, to one GGUF: merged and quantised tensor by tensor.

`python -m tapir_local.export.export FOLDER` does the ExportJob in FOLDER/job.json, in a process of its own.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.export.adapter import export_adapter
from tapir_local.export.architectures import (
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
from tapir_local.export.converter import convert, find_script
from tapir_local.export.tokenizer import (
    Vocab,
    end_of_turn,
    read_template,
    read_tokenizer,
    read_vocab,
    special_texts,
    write_vocab,
)
from tapir_local.export.weights import Delta, Source, load, read_adapter, read_model
from tapir_local.export.writer import Planned, file_type, size_of, type_of, write_tensors
from tapir_local.files import atomic_write, read_record
from tapir_local.inference.model import quantise
from tapir_local.memory import check_disk_space, check_memory
from tapir_local.process import child_main, run_in_process
from tapir_local.records import Array, Progress, noop


@dataclass(frozen=True)
class ExportJob:
    """A job: the base's folder, the adapter's if there is one, the type of the weights, the file to be written.

    `adapter_only` asks for the adapter alone, for llama.cpp to lay over the base's GGUF; `quant` is then f32 or f16.
    `converter` is llama.cpp's own script, or its folder, which then makes the file.
    """

    model_dir: Path
    out: Path
    quant: str
    adapter: Path | None = None
    adapter_only: bool = False
    converter: Path | None = None


NATIVE = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
K_QUANTS = {"q4_k_m": "Q4_K_M", "q5_k_m": "Q5_K_M", "q6_k": "Q6_K"}
MEMORY = 64 << 20  # bytes beside those of the libraries: the vocabulary, and blocks of a megabyte in the making
BITS = {"q4_k_m": 5.5, "q5_k_m": 6.3, "q6_k": 7.0}  # a weight, of small models too, whose embedding has six


def export_gguf(
    model_dir: Path,
    out: Path,
    *,
    adapter: Path | None,
    quant: str,
    converter: Path | None = None,
    log: Path | None = None,
    progress: Progress = noop,
) -> None:
    """Write `out`, whole or not at all. Peak memory is some blocks of a tensor's rows, not the model.

    `quant` is f32, f16, bf16, q8_0, q4_k_m, q5_k_m or q6_k; k-quants are made by llama.cpp from a file of 16 bits
    beside `out`. Norms and biases stay in f32. With `converter`, llama.cpp's own script makes the file, whatever the
    family, and what it prints is in `log`. `progress` gets (tensors written, tensors in all, name). TapirError for a
    family, tokenizer, adapter or setting that has no like in llama.cpp, and where the disk is too small.
    """
    if quant not in {**NATIVE, **K_QUANTS}:
        raise TapirError(f"no such quant: {quant}", where="quant", fix=f"One of {', '.join({**NATIVE, **K_QUANTS})}.")
    script = find_script(converter) if converter else None
    kind = quant if quant in NATIVE else middle_type(model_dir, adapter)

    def write(path: Path) -> None:
        if script:
            convert(model_dir, adapter, path, kind, script, log or out.with_name(out.name + ".converter.log"), progress)
        else:
            write_gguf(model_dir, path, adapter, NATIVE[kind], progress, BITS.get(quant, 0))

    with atomic_write(out) as partial:
        if quant in NATIVE:
            write(partial)
            return
        middle = out.with_name(f"{out.name}.{kind}.partial")
        try:
            write(middle)
            quantise(middle, partial, K_QUANTS[quant])
        finally:
            middle.unlink(missing_ok=True)


def middle_type(model_dir: Path, adapter: Path | None) -> str:
    """What a k-quant is made from: bf16 where that is what the model is saved as and nothing is merged, else f16.

    Either holds the saved weights as they are; merged ones need the more digits that f16 has.
    """
    kinds = {source.dtype for source in read_model(model_dir).values() if len(source.shape) > 1}
    return "bf16" if kinds == {"BF16"} and adapter is None else "f16"


def write_gguf(
    model_dir: Path, path: Path, adapter: Path | None, quant: str, progress: Progress, more: float = 0
) -> None:
    """Metadata first, then every tensor. The disk must have room for it, and for a file of `more` bits a weight."""
    import gguf

    config, family = read_config(model_dir)
    tensors = plan(model_dir, config, family, adapter, gguf.GGMLQuantizationType[quant])
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    vocab = read_vocab(model_dir, rows)
    check_room(path, tensors, vocab, more)
    writer = gguf.GGUFWriter(path, family.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model_dir.name)
    writer.add_file_type(file_type(quant))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_settings(writer, config, family, rows)
    write_vocab(writer, vocab)
    write_tensors(writer, tensors, progress)


def check_room(path: Path, tensors: Sequence[Planned], vocab: Vocab, more: float) -> None:
    """TapirError where the file does not fit on the disk, or the k-quant of `more` bits a weight made from it.

    Also for too little memory: the export's own (see `MEMORY`), and what llama.cpp needs for a k-quant, which are the
    largest tensor in float32 and its quants.
    """
    largest = max(prod(tensor.shape) for tensor in tensors)
    check_memory(MEMORY + (8 * largest if more else 0), "the export")
    texts = sum(len(text.encode()) + 16 for text in (*(token.text for token in vocab.tokens), *vocab.merges))
    file = sum(size_of(tensor) + 128 for tensor in tensors) + texts + len(vocab.chat_template)
    weights = sum(prod(tensor.shape) for tensor in tensors)
    what = "the GGUF, and the one of 16 bits that it is made from" if more else "the GGUF"
    check_disk_space(path, file + round(weights * more / 8), what)


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


def check_exportable(model_dir: Path, converter: Path | None = None) -> None:
    """TapirError when `export_gguf` would refuse the model's family, tokenizer or template; no weights are read.

    With a converter of llama.cpp's, which knows other families, when there is none, or the template ends no answer.
    """
    if converter:
        find_script(converter)
        ends = end_of_turn(read_tokenizer(model_dir), read_template(model_dir), special_texts(model_dir))
    else:
        ends = dict(read_vocab(model_dir, read_config(model_dir)[0]["vocab_size"]).special)
    if "eot" not in ends:
        raise TapirError(
            "the chat template ends no answer with a token of the tokenizer, so a student would never stop",
            where=str(model_dir),
            fix="Set student.chat_template (of `tapir-local export`: --chat-template); `alpaca` ends answers with the "
            "tokenizer's own EOS.",
        )


def export(job: ExportJob, folder: Path, progress: Progress | None = None) -> None:
    """Run the job in a process of its own, which leaves job.json and export.log in `folder`.

    `progress` gets (tensors written, tensors in all, name). TapirError as from `export_gguf`, or when the process died.
    """
    run_in_process("tapir_local.export.export", job, folder, progress)


def run_folder(folder: Path, progress: Progress) -> None:
    """The child's side of `export`."""
    job = read_record(ExportJob, folder / "job.json")
    if job.adapter_only and job.adapter:
        export_adapter(job.model_dir, job.adapter, job.out, quant=job.quant, progress=progress)
        return
    export_gguf(
        job.model_dir,
        job.out,
        adapter=job.adapter,
        quant=job.quant,
        converter=job.converter,
        log=folder / "converter.log",
        progress=progress,
    )


if __name__ == "__main__":
    # Blocks are made by threads of ours; OpenBLAS's own would spin beside them: a 0.5B with LoRA took 8.7 s, not 4.6.
    sys.exit(child_main(run_folder, {"OPENBLAS_NUM_THREADS": "1"}))
