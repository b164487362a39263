"""A GGUF opened with llama.cpp: its weights, adapter and context, its tokens and its log."""

import ctypes
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from tapir_local.errors import TapirError

LOG: deque[str] = deque(maxlen=8)
LONGEST = 1 << 16  # bytes read of a text in a GGUF, whose length may be damaged
WARNING, CONTINUED = 3, 5  # ggml.h: GGML_LOG_LEVEL_WARN (errors are 4), GGML_LOG_LEVEL_CONT
REMAKE = "Delete it and run again, so that it is made anew."


@dataclass(frozen=True)
class Advice:
    """What the user can do about a GGUF that will not serve; these words are for a student that this program made."""

    unusable: str = REMAKE
    too_large: str = "Set student.parallel or student.max_length lower."
    no_template: str = "Export the student again, from a folder with a chat_template.jinja."


STUDENT = Advice()


@dataclass(frozen=True)
class Model:
    """An open GGUF. `template`, `bos` and `eos` are texts out of its metadata, empty where it has none."""

    gguf: Path
    handle: Any
    vocab: Any
    adapter: Any
    template: str
    bos: str
    eos: str
    advice: Advice


@dataclass(frozen=True)
class Engine:
    """A model and a context: `cells` tokens that `sequences` conversations share."""

    model: Model
    context: Any
    memory: Any
    cells: int
    sequences: int
    batch: int


@cache
def library() -> Any:
    """llama_cpp, with what it logs kept in LOG for a TapirError's text instead of printed."""
    with patient_threads():
        import llama_cpp

    llama_cpp.llama_log_set(log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@contextmanager
def patient_threads() -> Iterator[None]:
    """Let threads that OpenMP starts from here on sleep soon when they wait, instead of spinning.

    libgomp reads its settings when it is loaded; an environment that names its own is left alone. On two cores that
    others were using, the pocket student wrote 93 tokens a second with two spinning threads, 1,140 so, 1,060 with one.
    """
    names = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
    if not names:
        os.environ["GOMP_SPINCOUNT"] = "1000"
    try:
        yield
    finally:
        if not names:
            del os.environ["GOMP_SPINCOUNT"]


@cache
def log_callback(llama_cpp: Any) -> Any:
    """Cached, for llama.cpp calls it as long as the process lives."""
    said = [0]

    def keep(level: int, text: bytes, _: Any) -> None:
        said[0] = said[0] if level == CONTINUED else level
        if said[0] in (WARNING, WARNING + 1) and text.strip():
            LOG.append(text.decode("utf-8", "replace").strip())

    return llama_cpp.llama_log_callback(keep)


def failure(what: str, where: Path, fix: str) -> TapirError:
    """A TapirError that ends with llama.cpp's last words."""
    words = "; ".join(LOG)
    return TapirError(f"{what} (llama.cpp: {words})" if words else what, where=str(where), fix=fix)


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
    gguf: Path, *, adapter: Path | None = None, vocab_only: bool = False, advice: Advice = STUDENT
) -> Iterator[Model]:
    """Load the weights, on the GPU where llama.cpp was built for one, and free them at the end."""
    check_gguf(gguf, "GGUF", advice.unusable)
    if is_adapter(gguf):
        fix = "Give the GGUF of the model that it lies over, and this one as its adapter."
        raise TapirError("the GGUF is a LoRA adapter, not a model", where=str(gguf), fix=fix)
    if adapter is not None:
        check_gguf(adapter, "adapter", advice.unusable)
    llama = library()
    LOG.clear()
    params = llama.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = -1 if llama.llama_supports_gpu_offload() else 0
    handle = llama.llama_model_load_from_file(os.fsencode(gguf), params)
    if not handle:
        raise failure("llama.cpp cannot load the GGUF", gguf, advice.unusable)
    try:
        yield described(gguf, handle, load_adapter(handle, adapter), advice)
    finally:
        llama.llama_model_free(handle)  # frees its adapters too


def load_adapter(handle: Any, adapter: Path | None) -> Any:
    """A LoRA GGUF, or None. A failure is a NULL pointer object: llama-cpp-python 0.3.36 does not look, and crashes."""
    if adapter is None:
        return None
    loaded = library().llama_adapter_lora_init(handle, os.fsencode(adapter))
    if not loaded:
        raise failure(
            "llama.cpp cannot load the adapter over this model",
            adapter,
            "Make it anew for this base, or give the base it was made for.",
        )
    return loaded


def described(gguf: Path, handle: Any, adapter: Any, advice: Advice) -> Model:
    """The model with the texts of its metadata."""
    llama = library()
    vocab = llama.llama_model_get_vocab(handle)
    template = (llama.llama_model_chat_template(handle, None) or b"").decode()
    bos, eos = (token_text(vocab, number) for number in (llama.llama_vocab_bos(vocab), llama.llama_vocab_eos(vocab)))
    return Model(gguf, handle, vocab, adapter, template, bos, eos, advice)


def token_text(vocab: Any, number: int) -> str:
    """A special token as it is written in a rendered prompt; empty for -1, none."""
    return "" if number < 0 else library().llama_vocab_get_text(vocab, number).decode()


@contextmanager
def open_context(
    model: Model, *, cells: int, sequences: int, threads: int | None = None, batch: int = 512, exact: bool = False
) -> Iterator[Engine]:
    """A context of `cells` tokens for `sequences` conversations, with the model's adapter on.

    All share one pool of cells (kv_unified), so that a prefix that they have in common is held once. `exact` keeps keys
    and values in f32 and does without flash attention: logits then differ from transformers' by 1e-5 instead of 5e-3,
    and do not depend on what else is in the batch; with 32 in flight it takes three times as long.
    """
    llama = library()
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = cells, batch, batch
    params.n_seq_max, params.kv_unified = sequences, True
    params.n_threads = params.n_threads_batch = threads or cores()
    params.no_perf = True
    if exact:
        params.type_k = params.type_v = llama.GGML_TYPE_F32
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama.llama_init_from_model(model.handle, params)
    if not context:
        raise failure(f"no context of {cells} tokens could be made", model.gguf, model.advice.too_large)
    try:
        if model.adapter is not None:
            apply_adapter(model, context)
        yield Engine(model, context, llama.llama_get_memory(context), cells, sequences, batch)
    finally:
        llama.llama_free(context)


def cores() -> int:
    """Threads to use: OMP_NUM_THREADS where it is set, otherwise every core this process may run on."""
    return int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0] or len(os.sched_getaffinity(0)))


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
    buffer = ctypes.create_string_buffer(256)
    count = library().llama_model_meta_val_str(model.handle, key.encode(), buffer, len(buffer))
    return buffer.value.decode() if count >= 0 else ""


def is_end(model: Model, token: int) -> bool:
    """True for the tokens at which llama.cpp stops."""
    return bool(library().llama_vocab_is_eog(model.vocab, token))


def encode(model: Model, text: str, *, add_special: bool = False) -> list[int]:
    """Token ids of a rendered text: its special tokens are read as such, and none is added unless `add_special`."""
    llama, raw = library(), text.encode()
    room = len(raw) + 4  # a token is at least a byte, but for BOS, EOS and SentencePiece's leading space
    tokens = (llama.llama_token * room)()
    count = llama.llama_tokenize(model.vocab, raw, len(raw), tokens, room, add_special, True)
    if count < 0:
        raise failure(f"llama.cpp cannot tokenise {text[:40]!r}", model.gguf, model.advice.unusable)
    return list(tokens[:count])


def piece(model: Model, token: int) -> bytes:
    """The bytes a token stands for; none for a special one. A character may be spread over several tokens."""
    llama = library()
    buffer = ctypes.create_string_buffer(64)
    count = llama.llama_token_to_piece(model.vocab, token, buffer, len(buffer), 0, False)
    if count < 0:
        buffer = ctypes.create_string_buffer(-count)
        count = llama.llama_token_to_piece(model.vocab, token, buffer, len(buffer), 0, False)
    return buffer.raw[:count]


def decode(model: Model, tokens: Sequence[int]) -> str:
    """The text of an answer, just as written: no spaces tidied, bytes that are no UTF-8 shown as U+FFFD."""
    return b"".join(piece(model, token) for token in tokens).decode("utf-8", "replace")


def tokenize(gguf: Path, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
    """Token ids of several texts; only the vocabulary is loaded."""
    with open_model(gguf, vocab_only=True) as model:
        return [encode(model, text, add_special=add_special) for text in texts]


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
