"""A GGUF opened with llama.cpp: its weights, its adapter and its context."""

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from tapir_local.errors import TapirError
from tapir_local.inference.config import UBATCH, ContextConfig
from tapir_local.inference.device_choice import deferred_interrupts, greedy_samplers
from tapir_local.inference.lib import LLAMA_LOG, free_gpu_memory, library, llama_error, thread_count
from tapir_local.memory import format_bytes as bytes_of
from tapir_local.memory import free_memory

MAX_TEXT_BYTES = 1 << 16  # bytes read of a text in a GGUF, whose stated length may be damaged
REMAKE_ADVICE = "Delete it and run again; it is then made again."
NORMALIZER_KEY = "tapir_local.normalizer"  # a metadata key of our exports
UnicodeForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
UNICODE_FORMS: tuple[UnicodeForm, ...] = get_args(UnicodeForm)
# of families that use NFC
NFC_PRE_TOKENIZERS = ("qwen2", "qwen35", "deepseek-r1-qwen", "stablelm2", "olmo")
NO_DEVICES = (ctypes.c_void_p * 1)()  # llama.h: a list of devices ends with NULL
# llama.cpp's flash attention is slow on a CPU when there is much to attend to. SmolLM2-135M in q8_0, two cores, tokens
# written per second with and without it (llama-batched-bench): 16 answers, 41 tokens read and 64 written 205, 200;
# 8 answers, 300 read and 32 written 90, 147; 600 read 52, 122. The pocket student: 48 read 2,800, 2,000; 220 read
# 1,590, 2,220.
FLASH_TOKENS_ON_CPU = 256  # the cells of a conversation are a multiple of this
GPU_SHARE = 0.8  # the maximum share of a GPU's free memory for weights: the rest is for answers


def ignore_message(words: str) -> None:
    """A function for messages that nobody wants."""


class ContextError(TapirError):
    """llama.cpp could not make a context, usually because memory is too small."""


@dataclass(frozen=True)
class Advice:
    """What the user can do about a GGUF that cannot be used; the defaults are for a student that this program made."""

    unusable: str = REMAKE_ADVICE
    too_large: str = "Set student.concurrency or student.max_length lower."
    no_template: str = "Export the student again, from a folder with a chat_template.jinja."
    too_heavy: str = "Close other programs, or choose a smaller export.quant or a smaller student."
    other_base: str = "Make it again for this base, or give the base that it was made for."


STUDENT_ADVICE = Advice()


@dataclass(frozen=True)
class Model:
    """An open GGUF. `template`, `bos` and `eos` are texts from its metadata, empty if it has none.

    `memory_left` is the main memory in bytes that its weights leave free, `on_gpu` the share of its layers on a GPU.
    `form` is the Unicode form that a text must have before it is tokenized, None for any. `pieces`, `ends` and `lists`
    cache what tokens.py has read of its tokens.
    """

    gguf: Path
    handle: Any
    vocab: Any
    adapter: Any
    template: str
    bos: str
    eos: str
    advice: Advice
    memory_left: int
    on_gpu: float
    form: UnicodeForm | None = None
    lists: list[Any] = field(default_factory=list, compare=False, repr=False)
    pieces: dict[int, bytes] = field(default_factory=dict, compare=False, repr=False)
    ends: dict[int, bool] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Engine:
    """A model and a context of `cells` tokens for `sequences` conversations, with at most `batch` tokens per call.

    The conversations share the cells; with `split`, each has an equal part of them. With `on_device`, a decoding gives
    the likeliest tokens instead of logits.
    """

    model: Model
    context: Any
    memory: Any
    cells: int
    sequences: int
    batch: int
    split: bool = False
    on_device: bool = False


def check_gguf(path: Path, what: str, fix: str) -> None:
    """TapirError unless the file exists and starts as a GGUF does."""
    if not path.is_file():
        raise TapirError(f"the {what} is missing", where=str(path), fix=fix)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise TapirError(f"the {what} is not a GGUF", where=str(path), fix=fix)


def is_adapter(gguf: Path) -> bool:
    """Whether a GGUF is a LoRA adapter, by its `general.type`; gguf.GGUFWriter writes it among the first keys.

    False also for a missing file or one that is not a GGUF: opening it gives the error.
    """
    if not gguf.is_file():
        return False
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            return False
        file.read(12)  # version, number of tensors
        return dict(read_leading_texts(file, read_unsigned(file, 8))).get("general.type") == "adapter"


def read_leading_texts(file: BinaryIO, keys: int) -> Iterable[tuple[str, str]]:
    """The first keys of a GGUF and their values, up to the first value that is not a text (type 8 of the format)."""
    for _ in range(keys):
        key = file.read(min(read_unsigned(file, 8), MAX_TEXT_BYTES)).decode("utf-8", "replace")
        if read_unsigned(file, 4) != 8:
            return
        yield key, file.read(min(read_unsigned(file, 8), MAX_TEXT_BYTES)).decode("utf-8", "replace")


def read_unsigned(file: BinaryIO, count: int) -> int:
    """Read an unsigned number of `count` bytes, of fewer bytes if the file ends first; 0 at its end."""
    return int.from_bytes(file.read(count), "little")


@contextmanager
def open_model(
    gguf: Path,
    *,
    adapter: Path | None = None,
    vocab_only: bool = False,
    on_cpu: bool = False,
    advice: Advice = STUDENT_ADVICE,
    warn: Callable[[str], None] = ignore_message,
) -> Iterator[Model]:
    """Load the weights, on the GPU if llama.cpp was built for one, and free them at the end.

    If not all layers fit on the GPU, as many as fit are loaded there, and `warn` gets a message. With `on_cpu` or
    `vocab_only`, no GPU is used or opened. TapirError with the numbers if main memory is too small for the weights.
    """
    check_gguf(gguf, "GGUF", advice.unusable)
    if is_adapter(gguf):
        fix = "Give the GGUF of its base model, and this one as the adapter."
        raise TapirError("the GGUF is a LoRA adapter, not a model", where=str(gguf), fix=fix)
    if adapter is not None:
        check_gguf(adapter, "adapter", advice.other_base)
    llama = library()
    LLAMA_LOG.clear()
    params = llama.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = 0
    if on_cpu or vocab_only:
        # Without a list, llama.cpp asks each GPU for its free memory, which opens a CUDA context for as long as the
        # process lives, and computes large batches on a GPU even if it holds no layer.
        params.devices = ctypes.addressof(NO_DEVICES)
    free, on_gpu = free_memory(), 0.0
    weights = 0 if vocab_only else sum(file.stat().st_size for file in (gguf, adapter) if file)
    if not vocab_only:
        if not on_cpu:
            params.n_gpu_layers, on_gpu = gpu_layers(gguf, weights, warn)
        check_weights(gguf, int(weights * (1 - on_gpu)), free, advice)
    handle = llama.llama_model_load_from_file(os.fsencode(gguf), params)
    if not handle:
        raise llama_error("llama.cpp cannot load the GGUF", gguf, advice.unusable)
    try:
        left = free - int(weights * (1 - on_gpu))
        yield describe_model(gguf, handle, load_adapter(handle, adapter, advice), advice, left, on_gpu)
    finally:
        llama.llama_model_free(handle)  # frees its adapters too


def check_weights(gguf: Path, weights: int, free: int, advice: Advice) -> None:
    """TapirError unless the weights fit into main memory: otherwise every token would read them from the disk."""
    if weights > free:
        raise TapirError(
            f"no memory for the model: its weights take {bytes_of(weights)}, and {bytes_of(free)} are free",
            where=str(gguf),
            fix=advice.too_heavy,
        )


def gpu_layers(gguf: Path, weights: int, warn: Callable[[str], None]) -> tuple[int, float]:
    """How many layers go to the GPU, as llama.cpp counts them (-1 is all), and their share of the weights."""
    free = free_gpu_memory()
    if not free:  # none, or one that shares main memory
        return (-1 if library().llama_supports_gpu_offload() else 0), 0.0
    if weights < free * GPU_SHARE:
        return -1, 1.0
    with open_model(gguf, vocab_only=True) as model:
        layers = metadata_number(model, "block_count", 1) + 1  # llama.cpp counts the output as one
    fitting = int(layers * free * GPU_SHARE / weights)
    warn(
        f"{fitting} of {layers} layers on the GPU: the weights take {bytes_of(weights)}, and {bytes_of(free)} are free"
    )
    return fitting, fitting / layers


def load_adapter(handle: Any, adapter: Path | None, advice: Advice) -> Any:
    """Load a LoRA GGUF, if one is given. On failure llama-cpp-python 0.3.36 returns an unchecked NULL pointer."""
    if adapter is None:
        return None
    loaded = library().llama_adapter_lora_init(handle, os.fsencode(adapter))
    if not loaded:
        raise llama_error("llama.cpp cannot load the adapter over this model", adapter, advice.other_base)
    return loaded


def describe_model(gguf: Path, handle: Any, adapter: Any, advice: Advice, left: int, on_gpu: float) -> Model:
    """The model with the texts of its metadata; `left` is its `memory_left`."""
    llama = library()
    vocab = llama.llama_model_get_vocab(handle)
    template = (llama.llama_model_chat_template(handle, None) or b"").decode()
    bos, eos = (token_text(vocab, number) for number in (llama.llama_vocab_bos(vocab), llama.llama_vocab_eos(vocab)))
    return Model(gguf, handle, vocab, adapter, template, bos, eos, advice, left, on_gpu, unicode_form(handle))


def unicode_form(handle: Any) -> UnicodeForm | None:
    """The Unicode form that the tokenizer's normalizer produces; llama.cpp does not normalize.

    Our exports have a key for it. In other GGUFs, the pre-tokenizer's name identifies the families that use NFC.
    """
    said = read_metadata(handle, NORMALIZER_KEY)
    if said:
        return next((form for form in UNICODE_FORMS if form == said), None)
    return "NFC" if read_metadata(handle, "tokenizer.ggml.pre") in NFC_PRE_TOKENIZERS else None


def token_text(vocab: Any, number: int) -> str:
    """The text of a special token in a rendered prompt; empty for -1, which means none."""
    return "" if number < 0 else library().llama_vocab_get_text(vocab, number).decode("utf-8", "replace")


@contextmanager
def open_context(model: Model, config: ContextConfig) -> Iterator[Engine]:
    """A context of `cells` tokens for `sequences` conversations, with the model's adapter applied.

    The conversations share one pool of cells (kv_unified), so that a common prefix is held once. With `split`, each has
    its part of the cells, and no conversation scans the others' cells: with 320 tokens each, the pocket student then
    wrote 1.4 times as fast with 32 answers in progress, and read prompts twice as fast. `exact` keeps keys and values
    in f32 and uses no flash attention: logits then differ from transformers' by 1e-5 instead of 5e-3, and do not depend
    on what else is in the batch; with 32 answers in progress it takes twice as long. `on_device` is ignored if
    llama.cpp cannot choose tokens. ContextError if llama.cpp finds no memory for the context.
    """
    llama = library()
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = config.cells, config.batch, min(config.batch, UBATCH)
    params.n_seq_max, params.kv_unified = config.sequences, not config.split
    params.n_threads = params.n_threads_batch = config.threads or thread_count()
    params.no_perf = True
    if config.exact:
        params.type_k = params.type_v = llama.GGML_TYPE_F32
    if config.exact or not config.flash:
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    with greedy_samplers(config.sequences if config.on_device else 0) as samplers:
        params.samplers, params.n_samplers = samplers, len(samplers)
        with deferred_interrupts() if samplers else nullcontext():
            context = llama.llama_init_from_model(model.handle, params)
        if not context:
            what = f"no context of {config.cells:,} tokens could be made"
            known = llama_error(what, model.gguf, model.advice.too_large)
            raise ContextError(known.what, where=known.where, fix=known.fix)
        try:
            if model.adapter is not None:
                apply_adapter(model, context)
            batch = llama.llama_n_batch(context)  # smaller in a small context; a larger batch ends the process
            memory, on_device = llama.llama_get_memory(context), bool(samplers)
            yield Engine(model, context, memory, config.cells, config.sequences, batch, config.split, on_device)
        finally:
            llama.llama_free(context)


def uses_flash_attention(model: Model, longest: int) -> bool:
    """Whether to use flash attention where the longest conversation has `longest` tokens: see FLASH_TOKENS_ON_CPU."""
    return model.on_gpu > 0 or longest <= FLASH_TOKENS_ON_CPU


def apply_adapter(model: Model, context: Any) -> None:
    """Apply the model's adapter at full strength."""
    llama = library()
    adapters = (llama.llama_adapter_lora_p_ctypes * 1)(model.adapter)
    if llama.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)):
        raise llama_error("llama.cpp cannot apply the adapter", model.gguf, REMAKE_ADVICE)


@contextmanager
def open_engine(
    gguf: Path, *, adapter: Path | None = None, context: int, parallel: int, threads: int | None = None
) -> Iterator[Engine]:
    """An open model with a context for `parallel` conversations of `context` tokens each."""
    with (
        open_model(gguf, adapter=adapter) as model,
        open_context(model, ContextConfig(context * parallel, parallel, threads=threads)) as engine,
    ):
        yield engine


def metadata(model: Model, key: str) -> str:
    """A value of the GGUF's metadata as text; empty if it has none."""
    return read_metadata(model.handle, key)


def read_metadata(handle: Any, key: str) -> str:
    """As `metadata`, for a model's llama.cpp handle."""
    buffer = ctypes.create_string_buffer(256)
    count = library().llama_model_meta_val_str(handle, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if count >= 0 else ""


def metadata_number(model: Model, key: str, default: int) -> int:
    """A whole number under the architecture's name in the GGUF's metadata, or the default."""
    text = metadata(model, f"{metadata(model, 'general.architecture')}.{key}")
    return int(text) if text.isdigit() else default


def trained_context(model: Model) -> int:
    """The length in tokens of the longest text that the model was trained for."""
    return int(library().llama_model_n_ctx_train(model.handle))


def read_gguf_template(gguf: Path) -> tuple[str, str, str]:
    """The chat template and the BOS and EOS texts of a GGUF; TapirError if it has no template."""
    with open_model(gguf, vocab_only=True) as model:
        return require_template(model), model.bos, model.eos


def require_template(model: Model) -> str:
    """The model's chat template; TapirError if it has none."""
    if not model.template:
        raise TapirError("the GGUF has no chat template", where=str(model.gguf), fix=model.advice.no_template)
    return model.template


def bits_per_weight(model: Model) -> float:
    """The size of all tensors in bits over the number of weights; the weights must be loaded."""
    llama = library()
    return float(8 * llama.llama_model_size(model.handle) / max(1, llama.llama_model_n_params(model.handle)))


def quantize_gguf(source: Path, out: Path, kind: str) -> None:
    """Write `out`, the GGUF `source` with its weights quantized to a llama.cpp type such as Q4_K_M."""
    llama = library()
    LLAMA_LOG.clear()
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = thread_count()
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(out), params):
        raise llama_error(
            f"llama.cpp cannot quantize to {kind}", out, "Choose another export.quant: q8_0 works for every model."
        )
