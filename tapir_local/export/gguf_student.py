"""A GGUF as a student: its weights, tokenizer and template as a folder that transformers reads, made once and checked.

`python -m tapir_local.export.gguf_student FOLDER` makes the folder of the GgufStudentJob in FOLDER/job.json.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from tapir_local.data.chat_template import NO_TEMPLATE
from tapir_local.errors import TapirError
from tapir_local.export.architectures import (
    ARCHITECTURES,
    TensorMapping,
    norm_offset,
    rope_factors,
    row_order,
    tensor_mapping,
)
from tapir_local.export.gate import answer_figures, find_mismatches
from tapir_local.export.gguf_side import GgufSideJob, run_gguf_side
from tapir_local.export.probes import FALLBACK_PROMPTS, gate_texts, probe_texts
from tapir_local.export.reference import load_reference, reference_logits
from tapir_local.export.tokenizer import PRE_TOKENIZERS
from tapir_local.export.weights import DTYPES, FloatArray
from tapir_local.export.writer import row_spans
from tapir_local.files import atomic_write, read_record, remove_path, write_record
from tapir_local.inference.model import (
    NFC_PRE_TOKENIZERS,
    NORMALIZER_KEY,
    Advice,
)
from tapir_local.inference.vocab_check import check_vocabulary
from tapir_local.memory import check_disk_space, check_memory, format_bytes
from tapir_local.printable import format_count
from tapir_local.process import child_main, run_in_process
from tapir_local.records import Progress
from tapir_local.training.gguf_source import GgufSource, describe_types, dtype_names, gguf_config, open_gguf_source
from tapir_local.training.model_files import SINGLE_FILE, read_model_json

STUDENT_RECORD = "gguf.json"  # in the made folder: what it was made from
# Mean KL divergence in nats between the GGUF and the folder's weights, which are the same: llama.cpp multiplies
# quantized weights by activations of 8 bits.
MAX_STUDENT_KL = 0.05
IGNORE_MERGES = ("llama-bpe", "tekken")  # a word of the vocabulary is taken whole (llama.cpp, llama-vocab.cpp)
CONTROL, USER_DEFINED, UNUSED, BYTE = 3, 4, 5, 6  # gguf.TokenType
ADVICE = Advice(unusable="Download or copy the GGUF again.")
OWN_TOKENIZER = "Use the model's own folder, with the tokenizer that it was published with."


@dataclass(frozen=True)
class GgufStudentJob:
    """The GGUF, the folder to make, and whether the GGUF must have a chat template."""

    gguf: Path
    out: Path
    template: bool


@dataclass(frozen=True)
class GgufStudentRecord:
    """What a folder was made from: the GGUF's name, its types of weights, and how well both agree.

    `texts` were tokenized alike; `kl` is the mean divergence in nats over `positions` tokens.
    """

    gguf: str
    weights: str
    texts: int
    kl: float
    positions: int


def make_gguf_student(gguf: Path, folder: Path, say: Callable[[str], None], *, template: bool) -> None:
    """Make and check a GGUF's folder in a process of its own, and say so.

    With `template`, a GGUF without a chat template is refused. TapirError in one sentence for a GGUF that cannot be a
    student.
    """
    check_vocabulary(gguf, ADVICE)
    say(f"{gguf.name}: making the folder that is trained, once: its weights dequantized, its tokenizer rebuilt")
    work = folder.with_name(folder.name + ".work")
    try:
        run_in_process(gguf_student_main, GgufStudentJob(gguf.absolute(), folder.absolute(), template), work)
    except TapirError as error:
        if str(work) not in str(error):  # the error does not refer to a log there
            shutil.rmtree(work, ignore_errors=True)
        remove_path(folder.with_name(folder.name + ".partial"))
        raise
    shutil.rmtree(work)
    made = read_record(GgufStudentRecord, folder / STUDENT_RECORD)
    say(
        f"{gguf.name}: {format_count(made.texts, 'text')} with the same token ids in both, "
        f"divergence {made.kl:.2g} nats. "
        f"Training starts from these weights, dequantized from {made.weights}, not from the original model's."
    )


def gguf_student_main(folder: Path, progress: Progress) -> None:
    """Run the job in `folder`: the entry point of the process."""
    job = read_record(GgufStudentJob, folder / "job.json")
    source = open_gguf_source(job.gguf)
    if job.template and not source.meta.get("tokenizer.chat_template"):
        raise TapirError("the GGUF has no chat template", where=str(job.gguf), fix=NO_TEMPLATE)
    with atomic_write(job.out) as partial:
        partial.mkdir()
        write_student(source, partial, progress)
        write_record(partial / STUDENT_RECORD, check_student_folder(source, partial))


def write_student(source: GgufSource, folder: Path, progress: Progress = lambda done, total, note: None) -> None:
    """Write config, tokenizer and weights. TapirError if a tensor is missing, unknown or of an odd shape."""
    write_student_tokenizer(source, folder)
    planned = plan_weights(source, read_model_json(folder / "config.json"))
    write_weights(source, planned, folder / SINGLE_FILE, progress)


def write_student_tokenizer(source: GgufSource, folder: Path) -> None:
    """Write config.json, and the tokenizer with its template: all that a row's tokens depend on."""
    from transformers import AutoConfig, PreTrainedTokenizerFast

    wanted = gguf_config(source)
    config = AutoConfig.for_model(wanted.pop("model_type"), **wanted, dtype=dtype_names(source)[1])
    config.save_pretrained(folder)
    meta = source.meta
    tokens, named = meta["tokenizer.ggml.tokens"], {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = meta.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            named[f"{name}_token"] = tokens[number]
    made = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(source), model_max_length=wanted["max_position_embeddings"], **named
    )
    made.chat_template = meta.get("tokenizer.chat_template")
    made.save_pretrained(folder)


# --- the tokenizer: transformers 5.17 reads SmolLM's as SentencePiece and Gemma's as Unigram without merges, so it is
# built here from what llama.cpp itself tokenizes by


def build_tokenizer(source: GgufSource) -> Any:
    """The GGUF's tokenizer as a `tokenizers.Tokenizer`. TapirError for one that this program cannot export again."""
    from tokenizers import AddedToken

    meta, kind = source.meta, source.meta.get("tokenizer.ggml.model")
    wanted = {"gpt2": ("tokens", "token_type", "merges"), "llama": ("tokens", "token_type", "scores")}
    if kind not in wanted:
        what = f"the GGUF's tokenizer is of the type {kind or 'none'}, which cannot be trained"
        raise TapirError(what, where=str(source.path), fix=f"Supported: {', '.join(wanted)}. {OWN_TOKENIZER}")
    lacking = [name for name in wanted[kind] if not isinstance(meta.get(f"tokenizer.ggml.{name}"), list)]
    if lacking:
        what = f"the GGUF's tokenizer has no {lacking[0]}"
        raise TapirError(what, where=str(source.path), fix=OWN_TOKENIZER)
    kinds = list(zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], strict=True))
    vocab = {text: number for number, (text, kind_of) in enumerate(kinds) if kind_of != UNUSED}
    inner = byte_level_tokenizer(source, vocab) if kind == "gpt2" else sentencepiece_tokenizer(source, vocab)
    for special, number in ((True, CONTROL), (False, USER_DEFINED)):
        texts = [AddedToken(text, special=special, normalized=False) for text, kind_of in kinds if kind_of == number]
        (inner.add_special_tokens if special else inner.add_tokens)(texts)
    return inner


def byte_level_tokenizer(source: GgufSource, vocab: Mapping[str, int]) -> Any:
    """Byte-level BPE with the pre-tokenizer that llama.cpp knows by name."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    meta, name = source.meta, source.meta.get("tokenizer.ggml.pre")
    steps = next((steps for steps, known in PRE_TOKENIZERS.items() if known == name), None)
    if steps is None:
        what = f"the GGUF's pre-tokenizer is {name or 'not named'}, which cannot be rebuilt"
        fix = f"Supported: {', '.join(PRE_TOKENIZERS.values())}. {OWN_TOKENIZER}"
        raise TapirError(what, where=str(source.path), fix=fix)
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE(vocab=dict(vocab), merges=merges, ignore_merges=name in IGNORE_MERGES))
    parts: list[Any] = []
    for step in steps:
        if step == "digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif step in ("gpt2", "bytes"):
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == "gpt2"))
        else:
            parts.append(pre_tokenizers.Split(Regex(step), behavior="isolated"))
    inner.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    inner.decoder = decoders.ByteLevel()
    form = meta.get(NORMALIZER_KEY) or ("NFC" if name in NFC_PRE_TOKENIZERS else "none")
    if form != "none":
        inner.normalizer = getattr(normalizers, form)()
    return inner


def sentencepiece_tokenizer(source: GgufSource, vocab: Mapping[str, int]) -> Any:
    """SentencePiece's BPE: the merges are the pairs of pieces that make a piece, the best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    meta = source.meta
    scores = dict(zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.scores"], strict=True))
    kinds = zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], strict=True)
    apart = {text for text, kind in kinds if kind in (CONTROL, UNUSED, BYTE)}
    merges = generate_merges(vocab, {text: scores[text] for text in vocab}, apart)
    number = meta.get("tokenizer.ggml.unknown_token_id")
    unknown = None if number is None else meta["tokenizer.ggml.tokens"][number]
    inner = Tokenizer(models.BPE(dict(vocab), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = meta.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefixed else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefixed else []))
    return inner


# --- the weights


@dataclass(frozen=True)
class PlannedWeight:
    """A weight of the folder: its name in transformers, its tensor in the GGUF, and how its rows and values differ.

    `order` has for each row in transformers its row in the GGUF (None: the same order); `offset` is subtracted.
    """

    name: str
    tensor: Any
    shape: tuple[int, ...]
    dtype: str
    order: FloatArray | None
    offset: float


def plan_weights(source: GgufSource, config: Mapping[str, Any]) -> list[PlannedWeight]:
    """Every weight of transformers' model with its tensor. TapirError if the GGUF has others, or other shapes."""
    mapping = tensor_mapping(config, ARCHITECTURES[config["architectures"][0]])
    planned, used = [], {"rope_freqs.weight"}
    for name, shape in model_shapes(config).items():
        target = mapping.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target not in source.tensors:
            what = f"the GGUF has no tensor {target or name}, which its architecture needs"
            raise TapirError(what, where=str(source.path), fix=ADVICE.unusable)
        if source.rows(target) != shape:
            what = f"tensor {target} has the shape {source.rows(target)}, but its metadata needs {shape}"
            raise TapirError(what, where=str(source.path), fix=ADVICE.unusable)
        used.add(target)
        planned.append(plan_weight(name, source.tensors[target], shape, mapping, dtype_names(source)[0]))
    if unknown := sorted(set(source.tensors) - used):
        what = f"tensor {unknown[0]} has no place in transformers' {config['architectures'][0]}"
        raise TapirError(what, where=str(source.path), fix=OWN_TOKENIZER)
    check_rope_factors(source, config)
    return planned


def plan_weight(
    name: str, tensor: Any, shape: tuple[int, ...], mapping: TensorMapping, matrix_type: str
) -> PlannedWeight:
    """One weight: the reverse of what the export does to it. Vectors stay in f32."""
    import numpy as np

    order = row_order(mapping, name, shape[0])
    back = None if order is None else np.argsort(order)
    return PlannedWeight(
        name, tensor, shape, matrix_type if len(shape) > 1 else "F32", back, norm_offset(mapping, name)
    )


def model_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight in transformers; nothing is allocated."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def check_rope_factors(source: GgufSource, config: Mapping[str, Any]) -> None:
    """Raise TapirError if the GGUF's rotary divisors are not those of Llama 3.1's scaling."""
    import numpy as np

    stored = source.tensors.get("rope_freqs.weight")
    if stored is not None and not np.allclose(stored.data, rope_factors(config), rtol=1e-3):
        what = "its rotary divisors (rope_freqs.weight) are not those of Llama 3.1's scaling"
        raise TapirError(what, where=str(source.path), fix=OWN_TOKENIZER)


def write_weights(source: GgufSource, planned: list[PlannedWeight], path: Path, progress: Progress) -> None:
    """Write the safetensors file block by block: memory holds some rows of a tensor, never the model."""
    import numpy as np

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in planned:
        start, end = end, end + prod(weight.shape) * np.dtype(DTYPES[weight.dtype]).itemsize
        header[weight.name] = {"dtype": weight.dtype, "shape": weight.shape, "data_offsets": [start, end]}
    check_disk_space(path, end, f"the student's weights in 16 bits ({format_bytes(end)})")
    check_memory(64 << 20, "reading the GGUF")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, weight in enumerate(planned, 1):
            write_blocks(source, weight, file)
            progress(number, len(planned), weight.name)


def write_blocks(source: GgufSource, weight: PlannedWeight, file: IO[bytes]) -> None:
    """Write one tensor. TapirError if its type is unknown to gguf, or a value is not finite in 16 bits."""
    import numpy as np

    for block in dequantized_blocks(source, weight):
        if weight.dtype == "BF16":
            kept = (block.view(np.uint32) + 0x8000 >> 16).astype("<u2")
        else:
            with np.errstate(over="ignore"):
                kept = block.astype(DTYPES[weight.dtype])
        if not np.isfinite(block if weight.dtype == "BF16" else kept).all():
            what = f"tensor {weight.tensor.name} has values that are not finite numbers of 16 bits"
            raise TapirError(what, where=str(source.path), fix=ADVICE.unusable)
        kept.tofile(file)


def dequantized_blocks(source: GgufSource, weight: PlannedWeight) -> Iterator[FloatArray]:
    """A tensor in f32, some rows at a time, in transformers' order and without llama.cpp's offset."""
    import numpy as np
    from gguf import quants

    data, kind = weight.tensor.data, weight.tensor.tensor_type
    for start, stop in row_spans(weight.shape):
        rows = data[start:stop] if weight.order is None else data[weight.order[start:stop]]
        try:
            block = quants.dequantize(rows, kind).reshape(-1, *weight.shape[1:])
        except NotImplementedError as error:
            what = f"weights of the type {kind.name} cannot be dequantized"
            raise TapirError(what, where=str(source.path), fix="Use a GGUF of another type, such as Q8_0.") from error
        yield np.ascontiguousarray(block - np.float32(weight.offset), dtype=np.float32)


# --- the check


def check_student_folder(source: GgufSource, folder: Path) -> GgufStudentRecord:
    """Compare the folder with its GGUF: token ids of the gate's probes, and logits of one text.

    TapirError if they differ: the folder would be another model.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rendered = gate_texts(tokenizer, []) if source.meta.get("tokenizer.chat_template") else []
    texts = probe_texts(tokenizer) + rendered
    scored = " ".join([*FALLBACK_PROMPTS, *texts[:60]])
    with run_gguf_side(GgufSideJob(source.path, None, tuple(texts), "", (), (), scored), folder) as found:
        if wrong := find_mismatches(tokenizer, found.ids, texts):
            what = f"its tokenizer cannot be rebuilt: {wrong[0].text[:40]!r} gets other token ids than in llama.cpp"
            raise TapirError(what, where=str(source.path), fix=OWN_TOKENIZER)
        ids, logits = found.answers[0][0], found.answer_logits(0)
        reference = load_reference(folder, None, reserved=2 * logits.nbytes)
        wanted, _ = next(reference_logits(reference, [(ids, 0)]))
    kl = answer_figures(logits, wanted, None).kl
    if kl > MAX_STUDENT_KL:
        what = f"transformers computes other answers with the GGUF's weights (divergence {kl:.3g} nats)"
        raise TapirError(what, where=str(source.path), fix=OWN_TOKENIZER)
    return GgufStudentRecord(source.path.name, describe_types(source), len(texts), kl, len(ids))


if __name__ == "__main__":
    sys.exit(child_main(gguf_student_main))
