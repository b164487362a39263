"""A GGUF that is to be trained: its metadata, its tensors, and the config.json that transformers needs for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.inference.model import check_gguf

# llama.cpp's architecture: the class in transformers, its model_type, and the number of layers of the one size whose
# attention scale is made from the embedding's width instead of a head's (see export/architectures.py).
STUDENT_CLASSES: Mapping[str, tuple[str, str, int]] = {
    "llama": ("LlamaForCausalLM", "llama", 0),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", 0),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", 0),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", 46),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text", 62),
}
DEFAULT_WINDOWS = {"gemma2": 2, "gemma3": 6}  # llama.cpp's default period of layers without a sliding window
ENCODERS = ("bert", "embedding", "t5encoder", "encoder")
OWN_FOLDER = "Use the folder of a model that this program supports, as transformers' save_pretrained writes it."
COPY_FILE = "Download or copy the file again."


@dataclass(frozen=True)
class GgufSource:
    """An opened GGUF: its metadata by key, and gguf's ReaderTensor of each tensor by name."""

    path: Path
    meta: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def arch(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.meta.get("general.architecture", ""))

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the metadata below the architecture's name."""
        return self.meta.get(f"{self.arch}.{key}", default)

    def need(self, key: str) -> Any:
        """As `value`; TapirError if it is missing."""
        found = self.value(key)
        if found is None:
            raise TapirError(f"the GGUF has no {self.arch}.{key}", where=str(self.path), fix=COPY_FILE)
        return found

    def rows(self, name: str) -> tuple[int, ...]:
        """A tensor's shape as transformers counts it: rows first."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))


def open_gguf_source(path: Path) -> GgufSource:
    """Open a GGUF as a student; no weights are read. TapirError in one sentence if it cannot be one."""
    from gguf import GGUFReader

    check_gguf(path, "student", "Correct student.path.")
    try:
        reader = GGUFReader(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        what = f"the GGUF cannot be read: it is damaged or incomplete ({type(error).__name__})"
        raise TapirError(what, where=str(path), fix=COPY_FILE) from error
    source = GgufSource(path, meta, tensors)
    check_gguf_source(source)
    return source


def check_gguf_source(source: GgufSource) -> None:
    """Raise TapirError unless the GGUF is a whole language model of a supported architecture."""
    kind, arch, what, fix = source.meta.get("general.type"), source.arch, "", OWN_FOLDER
    parts = int(source.meta.get("split.count", 1))
    if kind == "adapter":
        what, fix = "the GGUF is a LoRA adapter, not a model", "Set student.path to its base model."
    elif parts > 1:
        what = f"the GGUF is one of {parts} parts of a split file"
        fix = "Join them with llama.cpp's `llama-gguf-split --merge FIRST-PART OUT.gguf`, and set student.path to OUT."
    elif kind == "mmproj" or arch == "clip":
        what, fix = (
            "the GGUF is the vision part of a model, not a language model",
            "Set student.path to the text model.",
        )
    elif source.value("pooling_type") or any(word in arch for word in ENCODERS):
        what = f"the GGUF is an embedding model ({arch}), which writes no text"
    elif arch not in STUDENT_CLASSES:
        what = f"a GGUF of the architecture {arch or 'unknown'} cannot be a student"
        fix = f"Supported: {', '.join(STUDENT_CLASSES)}. For others: {OWN_FOLDER[0].lower()}{OWN_FOLDER[1:]}"
    elif source.value("expert_count"):
        what = f"the GGUF is a mixture of {source.value('expert_count')} experts, which cannot be a student"
    elif "token_embd.weight" not in source.tensors:
        what, fix = "the GGUF holds only a vocabulary, no weights", "Set student.path to a GGUF of the whole model."
    if what:
        raise TapirError(what, where=str(source.path), fix=fix)


def describe_types(source: GgufSource) -> str:
    """The types of the matrices, the most frequent by weights first: `Q4_1, Q8_0`."""
    sizes: dict[str, int] = {}
    for tensor in source.tensors.values():
        if len(tensor.shape) > 1:
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return ", ".join(sorted(sizes, key=lambda name: -sizes[name]))


def dtype_names(source: GgufSource) -> tuple[str, str]:
    """The type of the folder's matrices, in safetensors and in config.json: 16 bits that hold the GGUF's weights.

    f16 has three more bits of mantissa than bf16, and a quantized weight needs them; a GGUF in bf16 stays bf16.
    """
    kinds = {tensor.tensor_type.name for tensor in source.tensors.values() if len(tensor.shape) > 1}
    return ("BF16", "bfloat16") if "BF16" in kinds else ("F16", "float16")


def gguf_config(source: GgufSource) -> dict[str, Any]:
    """config.json of the GGUF's model, made from its metadata: the reverse of export/architectures.py.

    TapirError for heads or rotary scaling that the supported architectures do not have.
    """
    heads, layers, dim = source.need("attention.head_count"), source.need("block_count"), head_size(source)
    grouped = source.value("attention.head_count_kv", heads)
    check_plain_heads(source, dim)
    name, model_type, _ = STUDENT_CLASSES[source.arch]
    return {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": source.rows("token_embd.weight")[0],
        "hidden_size": source.need("embedding_length"),
        "intermediate_size": source.need("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": grouped,
        "head_dim": dim,
        "max_position_embeddings": source.need("context_length"),
        # f32 of a decimal number: 1e-06 is stored as 9.999999974752427e-07
        "rms_norm_eps": float(f"{source.need('attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "attention_bias": source.arch == "llama" and "blk.0.attn_q.bias" in source.tensors,
        **(gemma_config(source, dim) if source.arch in DEFAULT_WINDOWS else {"rope_parameters": rope_config(source)}),
        **token_config(source.meta),
    }


def head_size(source: GgufSource) -> int:
    """The number of dimensions of an attention head."""
    found = source.value("attention.key_length") or source.value("rope.dimension_count")
    return int(found or source.need("embedding_length") // source.need("attention.head_count"))


def check_plain_heads(source: GgufSource, dim: int) -> None:
    """Raise TapirError if layers have different numbers of heads, or heads are rotated only in part."""
    numbers = [source.value(key) for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")]
    if any(isinstance(number, list) for number in numbers):
        what = "its layers have different widths or numbers of heads, which transformers' class does not support"
        raise TapirError(what, where=str(source.path), fix=OWN_FOLDER)
    for key in ("attention.value_length", "rope.dimension_count"):
        if source.value(key, dim) != dim:
            what = f"its {source.arch}.{key} is {source.value(key)}, but a head has {dim} dimensions"
            raise TapirError(what, where=str(source.path), fix=OWN_FOLDER)


def gemma_config(source: GgufSource, dim: int) -> dict[str, Any]:
    """Gemma's own settings: soft caps, attention scale, and the layers with a sliding window."""
    layers, hidden = source.need("block_count"), source.need("embedding_length")
    large = layers == STUDENT_CLASSES[source.arch][2]
    settings = {
        "query_pre_attn_scalar": hidden // source.need("attention.head_count") if large else dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": layer_types(source),
    }
    if source.value("attention.sliding_window"):
        settings["sliding_window"] = source.value("attention.sliding_window")
    for key, usual in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        settings[key] = source.value(key, usual if source.arch == "gemma2" else None)
    whole = rope_config(source)
    if source.arch == "gemma2":
        return settings | {"rope_parameters": whole}
    local = {"rope_type": "default", "rope_theta": float(source.value("rope.freq_base_swa", 10000.0))}
    return settings | {"rope_parameters": {"full_attention": whole, "sliding_attention": local}}


def layer_types(source: GgufSource) -> list[str]:
    """transformers' name for each layer's kind of attention."""
    layers = source.need("block_count")
    pattern = source.value("attention.sliding_window_pattern", DEFAULT_WINDOWS[source.arch])
    if not isinstance(pattern, list):
        pattern = [bool((number + 1) % int(pattern)) for number in range(layers)]
    if not source.value("attention.sliding_window"):
        pattern = [False] * layers
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern]


def rope_config(source: GgufSource) -> dict[str, Any]:
    """The rotary settings as transformers 5 stores them. TapirError for a scaling that has no name there."""
    kind, theta = source.value("rope.scaling.type", "none"), float(source.value("rope.freq_base", 10000.0))
    if "rope_freqs.weight" in source.tensors:
        return llama3_rope(source, theta)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise TapirError(f"its rotary scaling {kind} is not supported", where=str(source.path), fix=OWN_FOLDER)
    settings: dict[str, Any] = {
        "rope_type": kind,
        "rope_theta": theta,
        "factor": float(source.need("rope.scaling.factor")),
    }
    original = source.value("rope.scaling.original_context_length")
    if kind == "yarn" and original:
        settings["original_max_position_embeddings"] = original
    if kind == "yarn":  # llama.cpp multiplies its own value by the file's (see `yarn_attention_factor`)
        own = 0.1 * log(settings["factor"]) + 1 if settings["factor"] > 1 else 1.0
        settings["attention_factor"] = own * float(source.value("rope.scaling.attn_factor", 1.0))
    return settings


def llama3_rope(source: GgufSource, theta: float) -> dict[str, Any]:
    """Llama 3.1's scaling, which a GGUF has only as divisors: the largest is its factor, the rest is Meta's choice."""
    divisors = source.tensors["rope_freqs.weight"].data
    settings: dict[str, Any] = {"rope_type": "llama3", "rope_theta": theta, "factor": float(divisors.max())}
    known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return settings | known


def token_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of BOS, EOS and padding."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: meta.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
