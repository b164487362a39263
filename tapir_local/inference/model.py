"""A GGUF opened with llama.cpp: its weights, its adapter and its context."""

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from tapir_local.errors import TapirError
from tapir_local.inference.lib import LOG, cores, failure, gpu_memory, library
from tapir_local.memory import format_bytes as bytes_of
from tapir_local.memory import free_memory

LONGEST = 1 << 16  # bytes read of a text in a GGUF, whose length may be damaged
REMAKE = "Delete it and run again, so that it is made anew."
UBATCH, BATCH = 512, 2048  # tokens computed at once, and handed over at once: llama-batched-bench's
FORM_KEY = "tapir_local.normalizer"  # of our exports' metadata
Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
FORMS: tuple[Form, ...] = get_args(Form)
COMPOSING = ("qwen2", "qwen35", "deepseek-r1-qwen", "stablelm2", "olmo")  # pre-tokenizers of families that use NFC
GPU_SHARE = 0.8  # of a GPU's free memory for weights at the most: the rest is for answers


def unsaid(words: str) -> None:
    """Nobody is told."""


class NoContext(TapirError):
    """llama.cpp could not make a context, for want of memory as a rule."""


@dataclass(frozen=True)
class Advice:
    """What the user can do about a GGUF that will not serve; these words are for a student that this program made."""

    unusable: str = REMAKE
    too_large: str = "Set student.concurrency or student.max_length lower."
    no_template: str = "Export the student again, from a folder with a chat_template.jinja."
    too_heavy: str = "Stop what else holds memory, take a smaller export.quant, or a smaller student."
    other_base: str = "Make it anew for this base, or give the base it was made for."


STUDENT = Advice()


@dataclass(frozen=True)
class Model:
    """An open GGUF. `template`, `bos` and `eos` are texts out of its metadata, empty where it has none.

    `room` is the main memory in bytes that its weights leave free, `on_gpu` the share of its layers that a GPU holds.
    `form` is the Unicode form that a text must have before it is tokenized, None where any will do. `pieces`, `ends`
    and `lists` are what is known of its tokens, as far as that was asked (see tokens.py).
    """

    gguf: Path
    handle: Any
    vocab: Any
    adapter: Any
    template: str
    bos: str
    eos: str
    advice: Advice
    room: int
    on_gpu: float
    form: Form | None = None
    lists: list[Any] = field(default_factory=list, compare=False, repr=False)
    pieces: dict[int, bytes] = field(default_factory=dict, compare=False, repr=False)
    ends: dict[int, bool] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Engine:
    """A model and a context of `cells` tokens for `sequences` conversations, `batch` tokens a call.

    They share the cells, or, where it is `split`, each has as many of its own.
    """

    model: Model
    context: Any
    memory: Any
    cells: int
    sequences: int
    batch: int
    split: bool = False


def check_gguf(path: Path, what: str, fix: str) -> None:
    """TapirError unless the file is there and begins as a GGUF does."""
    if not path.is_file():
        raise TapirError(f"the {what} is missing", where=str(path), fix=fix)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise TapirError(f"the {what} is no GGUF", where=str(path), fix=fix)


def is_adapter(gguf: Path) -> bool:
    """Whether a GGUF is a LoRA adapter, by its `general.type`, which gguf.GGUFWriter puts among the first of its keys.

    False also for what is no GGUF, or is not there: who opens it will say so.
    """
    if not gguf.is_file():
        return False
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            return False
        file.read(12)  # version, number of tensors
        return dict(leading_texts(file, number(file, 8))).get("general.type") == "adapter"


def leading_texts(file: BinaryIO, keys: int) -> Iterable[tuple[str, str]]:
    """The first keys of a GGUF and their values, up to the first that is no text (type 8 of the GGUF format)."""

    for _ in range(keys):
        key = file.read(min(number(file, 8), LONGEST)).decode("utf-8", "replace")
        if number(file, 4) != 8:
            return
        yield key, file.read(min(number(file, 8), LONGEST)).decode("utf-8", "replace")


def number(file: BinaryIO, count: int) -> int:
    """An unsigned number of so many bytes; less of it, down to 0, where the file ends."""
    return int.from_bytes(file.read(count), "little")


@contextmanager
def open_model(
    gguf: Path,
    *,
    adapter: Path | None = None,
    vocab_only: bool = False,
    advice: Advice = STUDENT,
    tell: Callable[[str], None] = unsaid,
) -> Iterator[Model]:
    """Load the weights, on the GPU where llama.cpp was built for one, and free them at the end.

    Where the GPU has no room for all layers, as many as it has room for go there, and `tell` is told. TapirError with
    the numbers where main memory has no room for the weights.
    """
    check_gguf(gguf, "GGUF", advice.unusable)
    if is_adapter(gguf):
        fix = "Give the GGUF of the model that it lies over, and this one as its adapter."
        raise TapirError("the GGUF is a LoRA adapter, not a model", where=str(gguf), fix=fix)
    if adapter is not None:
        check_gguf(adapter, "adapter", advice.other_base)
    llama = library()
    LOG.clear()
    params = llama.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = 0
    free, on_gpu = free_memory(), 0.0
    weights = 0 if vocab_only else sum(file.stat().st_size for file in (gguf, adapter) if file)
    if not vocab_only:
        params.n_gpu_layers, on_gpu = gpu_layers(gguf, weights, tell)
        check_weights(gguf, int(weights * (1 - on_gpu)), free, advice)
    handle = llama.llama_model_load_from_file(os.fsencode(gguf), params)
    if not handle:
        raise failure("llama.cpp cannot load the GGUF", gguf, advice.unusable)
    try:
        room = free - int(weights * (1 - on_gpu))
        yield described(gguf, handle, load_adapter(handle, adapter, advice), advice, room, on_gpu)
    finally:
        llama.llama_model_free(handle)  # frees its adapters too


def check_weights(gguf: Path, weights: int, free: int, advice: Advice) -> None:
    """TapirError unless main memory has room for the weights: paged in from the disk they would be read every token."""
    if weights > free:
        raise TapirError(
            f"no memory for the model: its weights take {bytes_of(weights)}, and {bytes_of(free)} are free",
            where=str(gguf),
            fix=advice.too_heavy,
        )


def gpu_layers(gguf: Path, weights: int, tell: Callable[[str], None]) -> tuple[int, float]:
    """How many layers go to the GPU, as llama.cpp counts them (-1 is all), and what share of the weights that is."""
    free = gpu_memory()
    if not free:  # none, or one that shares main memory
        return (-1 if library().llama_supports_gpu_offload() else 0), 0.0
    if weights < free * GPU_SHARE:
        return -1, 1.0
    with open_model(gguf, vocab_only=True) as model:
        layers = number_of(model, "block_count", 1) + 1  # llama.cpp counts the output as one
    fitting = int(layers * free * GPU_SHARE / weights)
    tell(
        f"{fitting} of {layers} layers on the GPU: the weights take {bytes_of(weights)}, and {bytes_of(free)} are free"
    )
    return fitting, fitting / layers


def load_adapter(handle: Any, adapter: Path | None, advice: Advice) -> Any:
    """A LoRA GGUF, or None. A failure is a NULL pointer object: llama-cpp-python 0.3.36 does not look, and crashes."""
    if adapter is None:
        return None
    loaded = library().llama_adapter_lora_init(handle, os.fsencode(adapter))
    if not loaded:
        raise failure(
            "llama.cpp cannot load the adapter over this model",
            adapter,
            advice.other_base,
        )
    return loaded


def described(gguf: Path, handle: Any, adapter: Any, advice: Advice, room: int, on_gpu: float) -> Model:
    """The model with the texts of its metadata."""
    llama = library()
    vocab = llama.llama_model_get_vocab(handle)
    template = (llama.llama_model_chat_template(handle, None) or b"").decode()
    bos, eos = (token_text(vocab, number) for number in (llama.llama_vocab_bos(vocab), llama.llama_vocab_eos(vocab)))
    return Model(gguf, handle, vocab, adapter, template, bos, eos, advice, room, on_gpu, form_of(handle))


def form_of(handle: Any) -> Form | None:
    """The Unicode form that the tokenizer's normalizer makes, which llama.cpp does not.

    Our exports say it. In a GGUF that others made, the name of the pre-tokenizer tells of families that use NFC.
    """
    said = value_of(handle, FORM_KEY)
    if said:
        return next((form for form in FORMS if form == said), None)
    return "NFC" if value_of(handle, "tokenizer.ggml.pre") in COMPOSING else None


def token_text(vocab: Any, number: int) -> str:
    """A special token as it is written in a rendered prompt; empty for -1, none."""
    return "" if number < 0 else library().llama_vocab_get_text(vocab, number).decode("utf-8", "replace")


@contextmanager
def open_context(
    model: Model,
    *,
    cells: int,
    sequences: int,
    threads: int | None = None,
    batch: int = BATCH,
    exact: bool = False,
    split: bool = False,
) -> Iterator[Engine]:
    """A context of `cells` tokens for `sequences` conversations, with the model's adapter on.

    All share one pool of cells (kv_unified), so that a prefix that they have in common is held once; where it is
    `split`, each has its part of them, and no conversation looks over the others' cells: of 320 tokens each, the pocket
    student then wrote 1.4 times as fast with 32 in flight, and read prompts twice as fast. `exact` keeps keys and
    values in f32 and does without flash attention: logits then differ from transformers' by 1e-5 instead of 5e-3, and
    do not depend on what else is in the batch; with 32 in flight it takes twice as long. TapirError when
    llama.cpp finds no memory for it.
    """
    llama = library()
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = cells, batch, min(batch, UBATCH)
    params.n_seq_max, params.kv_unified = sequences, not split
    params.n_threads = params.n_threads_batch = threads or cores()
    params.no_perf = True
    if exact:
        params.type_k = params.type_v = llama.GGML_TYPE_F32
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama.llama_init_from_model(model.handle, params)
    if not context:
        known = failure(f"no context of {cells:,} tokens could be made", model.gguf, model.advice.too_large)
        raise NoContext(known.what, where=known.where, fix=known.fix)
    try:
        if model.adapter is not None:
            apply_adapter(model, context)
        batch = llama.llama_n_batch(context)  # llama.cpp takes less in a small context, and ends the process over it
        yield Engine(model, context, llama.llama_get_memory(context), cells, sequences, batch, split)
    finally:
        llama.llama_free(context)


def apply_adapter(model: Model, context: Any) -> None:
    llama = library()
    adapters = (llama.llama_adapter_lora_p_ctypes * 1)(model.adapter)
    if llama.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)):
        raise failure("llama.cpp cannot apply the adapter", model.gguf, REMAKE)


@contextmanager
def open_engine(
    gguf: Path, *, adapter: Path | None = None, context: int, parallel: int, threads: int | None = None
) -> Iterator[Engine]:
    """A model ready to answer `parallel` conversations of `context` tokens each."""
    with (
        open_model(gguf, adapter=adapter) as model,
        open_context(model, cells=context * parallel, sequences=parallel, threads=threads) as engine,
    ):
        yield engine


def metadata(model: Model, key: str) -> str:
    """A value of the GGUF's metadata as text; empty where it has none."""
    return value_of(model.handle, key)


def value_of(handle: Any, key: str) -> str:
    """As `metadata`, of a handle of llama.cpp's."""
    buffer = ctypes.create_string_buffer(256)
    count = library().llama_model_meta_val_str(handle, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if count >= 0 else ""


def number_of(model: Model, key: str, default: int) -> int:
    """A whole number under the architecture's name in the GGUF's metadata; the default where there is none."""
    text = metadata(model, f"{metadata(model, 'general.architecture')}.{key}")
    return int(text) if text.isdigit() else default


def made_for(model: Model) -> int:
    """The tokens of the longest text that the model was made for."""
    return int(library().llama_model_n_ctx_train(model.handle))


def template_of(gguf: Path) -> tuple[str, str, str]:
    """The chat template, BOS and EOS texts that a GGUF carries; TapirError when it has no template."""
    with open_model(gguf, vocab_only=True) as model:
        return template(model), model.bos, model.eos


def template(model: Model) -> str:
    if not model.template:
        raise TapirError("the GGUF has no chat template", where=str(model.gguf), fix=model.advice.no_template)
    return model.template


def quantise(source: Path, out: Path, kind: str) -> None:
    """Write `out` with the weights of `source` as a llama.cpp type such as Q4_K_M."""
    llama = library()
    LOG.clear()
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = cores()
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(out), params):
        raise failure(f"llama.cpp cannot quantise to {kind}", out, "Take another export.quant: q8_0 fits every model.")
