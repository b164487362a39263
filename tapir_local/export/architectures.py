"""The supported model architectures: their settings and tensors with llama.cpp's names and conventions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tapir_local.errors import TapirError
from tapir_local.export.weights import FloatArray
from tapir_local.training.model_files import StoredTensor, read_model_json

ModelConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's name for an architecture, and where it differs from transformers.

    `interleaved`: llama.cpp rotates neighboring dimensions of a head where transformers rotates halves, so the rows of
    q and k must be reordered. `norm_offset` is added to every norm weight. `window` is the period of llama.cpp's
    default pattern of sliding-window layers (None: no such layers). `large`: a model with exactly this many layers
    gets its attention scale from the embedding size. `defaults` are transformers' defaults, which a config.json may
    omit. `unsupported` are settings that llama.cpp would ignore.
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    scalings: tuple[str, ...] = ("linear", "yarn")
    window: int | None = None
    large: int = 0
    unsupported: tuple[str, ...] = ()
    defaults: ModelConfig = field(default_factory=dict)


LLAMA = Architecture("llama", interleaved=True, scalings=("linear", "yarn", "llama3"))
GEMMA_DEFAULTS = {  # transformers 5.17, models/gemma2 and gemma3, configuration_*.py
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
GEMMA2_DEFAULTS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192}
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", unsupported=("use_sliding_window",)),
    "Qwen3ForCausalLM": Architecture("qwen3", unsupported=("use_sliding_window", "attention_bias")),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        scalings=("linear",),
        window=2,
        large=46,
        unsupported=("use_bidirectional_attention", "attention_bias"),
        defaults=GEMMA_DEFAULTS | GEMMA2_DEFAULTS,
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3",
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        scalings=("linear",),
        window=6,
        large=62,
        unsupported=("use_bidirectional_attention", "attention_bias", "attn_logit_softcapping"),
        defaults=GEMMA_DEFAULTS | {"max_position_embeddings": 131072},
    ),
}


def read_model_config(model_dir: Path) -> tuple[dict[str, Any], Architecture]:
    """config.json with its omitted defaults, and the architecture.

    Raises TapirError if the architecture is not supported or a setting would be ignored by llama.cpp.
    """
    where = model_dir / "config.json"
    config = read_model_json(where)
    name = (config.get("architectures") or ["?"])[0]
    if name not in ARCHITECTURES:
        raise unmapped_error(name, where)
    arch = ARCHITECTURES[name]
    config = {**arch.defaults, **config}
    check_supported(config, arch, where)
    return config, arch


def unmapped_error(name: str, where: Path) -> TapirError:
    """The error for an architecture that is not in ARCHITECTURES."""
    text = (
        " For a model with vision, use its text model (Gemma3ForCausalLM)." if "ConditionalGeneration" in name else ""
    )
    return TapirError(
        f"the architecture {name} is not supported for export to GGUF",
        where=str(where),
        fix=f"Supported: {', '.join(ARCHITECTURES)}. For others, give the path of convert_hf_to_gguf.py in a "
        f"llama.cpp checkout: `export.converter` in the recipe, or `tapir-local export --converter`.{text}",
    )


def check_supported(config: ModelConfig, arch: Architecture, where: Path) -> None:
    """Raise TapirError for settings that llama.cpp computes differently and that no GGUF metadata can change."""
    act = config.get("hidden_activation") or config.get("hidden_act") or arch.activation
    if act != arch.activation:
        refuse_unsupported(f"hidden_act {act}", arch, where)
    for setting in arch.unsupported:
        if config.get(setting):
            refuse_unsupported(setting, arch, where)
    if arch.window:
        check_gemma(config, arch, where)
    kinds = {settings["rope_type"] for settings in rope_settings(config)}
    for kind in kinds - {"default", *arch.scalings}:
        refuse_unsupported(f"rope scaling of type {kind}", arch, where)
    if rope_settings(config)[1]["rope_type"] != "default" and arch.name == "gemma3":
        refuse_unsupported("rope scaling of layers with a sliding window", arch, where)
    check_yarn(rope_settings(config)[0], arch, where)


def check_gemma(config: ModelConfig, arch: Architecture, where: Path) -> None:
    """llama.cpp computes Gemma's attention scale itself (models/gemma2.cpp) and always caps Gemma 2's logits."""
    large = config["num_hidden_layers"] == arch.large
    scalar = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    if config["query_pre_attn_scalar"] != scalar:
        refuse_unsupported(
            f"query_pre_attn_scalar {config['query_pre_attn_scalar']} (llama.cpp uses {scalar})", arch, where
        )
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if arch.name == "gemma2" and not config.get(cap):
            refuse_unsupported(f"{cap} {config.get(cap)}", arch, where)


def check_yarn(settings: ModelConfig, arch: Architecture, where: Path) -> None:
    """llama.cpp uses YaRN's default boundaries for these architectures: it reads other values only for Grok and Mistral
    3."""
    if settings["rope_type"] != "yarn":
        return
    for name, usual in (("beta_fast", 32), ("beta_slow", 1)):
        if (settings.get(name) or usual) != usual:
            refuse_unsupported(f"yarn's {name} {settings[name]}", arch, where)
    if settings.get("truncate") is False:
        refuse_unsupported("yarn's truncate: false", arch, where)


def refuse_unsupported(what: str, arch: Architecture, where: Path) -> NoReturn:
    raise TapirError(
        f"llama.cpp's {arch.name} does not support {what}", where=str(where), fix="Use a model without it."
    )


def head_dim(config: ModelConfig) -> int:
    """The number of dimensions of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def write_architecture(writer: Any, config: ModelConfig, arch: Architecture, vocab_size: int) -> None:
    """Write the architecture's hyperparameters from config.json."""
    heads = config["num_attention_heads"]
    writer.add_vocab_size(vocab_size)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(context_length(config, arch))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim(config))
    whole, sliding = rope_settings(config)
    writer.add_rope_freq_base(whole["rope_theta"])
    write_rope_scaling(writer, whole)
    if arch.window:
        write_attention_windows(writer, config, arch, sliding)


def context_length(config: ModelConfig, arch: Architecture) -> int:
    """The maximum number of tokens; limited by Mistral 7B v0.1's sliding window, which llama.cpp does not support."""
    longest = int(config["max_position_embeddings"])
    window = None if arch.window or config.get("use_sliding_window") is False else config.get("sliding_window")
    return min(longest, int(window)) if window else longest


def write_attention_windows(writer: Any, config: ModelConfig, arch: Architecture, sliding: ModelConfig) -> None:
    """Write Gemma's soft caps and sliding-window layers, with the pattern if it is not llama.cpp's default."""
    windowed = window_layers(config, arch)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(cap):
            getattr(writer, "add_" + cap)(config[cap])
    if any(windowed):
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    if windowed != default_windows(len(windowed), arch):
        writer.add_sliding_window_pattern(windowed)


def default_windows(layers: int, arch: Architecture) -> list[bool]:
    """llama.cpp's default: every layer except each `window`-th uses the sliding window."""
    return [bool((number + 1) % (arch.window or 1)) for number in range(layers)]


def window_layers(config: ModelConfig, arch: Architecture) -> list[bool]:
    """For each layer, whether its attention is limited to the sliding window."""
    kinds = config.get("layer_types")
    if kinds:
        return [kind == "sliding_attention" for kind in kinds]
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or arch.window or 1
    return [bool((number + 1) % period) for number in range(config["num_hidden_layers"])]


def rope_settings(config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rotary settings of full-attention layers and of sliding-window layers; they differ only for Gemma 3.

    transformers 5 stores them in `rope_parameters` (for Gemma 3 per layer type); older models use `rope_theta`,
    `rope_scaling` and `rope_local_base_freq`.
    """
    newer = config.get("rope_parameters") or {}
    if "full_attention" in newer:
        return layer_rope_settings(config, newer["full_attention"]), layer_rope_settings(
            config, newer["sliding_attention"]
        )
    local = "Gemma3ForCausalLM" in (config.get("architectures") or ())
    scaling = {**(config.get("rope_scaling") or {}), **newer}
    if local:
        base = {"rope_theta": config.get("rope_local_base_freq") or 10000.0, "rope_type": "default"}
        return layer_rope_settings({"rope_theta": 1e6, **config}, scaling), base
    return layer_rope_settings(config, scaling), layer_rope_settings(config, scaling)


def layer_rope_settings(config: ModelConfig, scaling: ModelConfig) -> dict[str, Any]:
    """Base frequency and scaling of one type of layer."""
    settings = {"rope_theta": config.get("rope_theta") or 10000.0, **scaling}
    return {"rope_type": settings.get("type", "default"), **settings}


def write_rope_scaling(writer: Any, settings: ModelConfig) -> None:
    """Linear and YaRN scaling are metadata; Llama 3's scaling is a tensor (see `rope_factors`)."""
    import gguf

    kind = settings["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(settings["factor"])
    if kind == "yarn":
        if settings.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(yarn_attention_factor(settings))


def yarn_attention_factor(settings: ModelConfig) -> float:
    """The config's attention factor divided by the paper's, 0.1 ln(factor) + 1, which llama.cpp always applies.

    Sources: transformers 5.17, modeling_rope_utils.py; llama.cpp, llama-context.cpp and rope_yarn in ggml-cpu/ops.cpp.
    """

    def scaled(weight: float) -> float:
        return 0.1 * weight * math.log(settings["factor"]) + 1 if settings["factor"] > 1 else 1.0

    wanted = settings.get("attention_factor")
    if wanted is None:
        both = settings.get("mscale") and settings.get("mscale_all_dim")
        wanted = scaled(settings["mscale"]) / scaled(settings["mscale_all_dim"]) if both else scaled(1.0)
    return float(wanted / scaled(1.0))


def rope_factors(config: ModelConfig) -> FloatArray:
    """The divisors of the rotary frequencies in Llama 3.1's scaling, shape (head_dim / 2,).

    Source: transformers 5.17, modeling_rope_utils.py. Short wavelengths stay as they are, long ones are divided by
    `factor`, those between are interpolated.
    """
    import numpy as np

    settings, dim = rope_settings(config)[0], head_dim(config)
    waves = 2 * np.pi * settings["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    low, high, factor = settings["low_freq_factor"], settings["high_freq_factor"], settings["factor"]
    old = settings["original_max_position_embeddings"]
    smooth = np.clip((old / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def exported_tensors(sources: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors that llama.cpp needs: without rotary frequencies, which it computes, and without the output of a
    model with tied embeddings."""
    left_out = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    return {
        name: source
        for name, source in sources.items()
        if name not in left_out and not name.endswith("rotary_emb.inv_freq")
    }


@dataclass(frozen=True)
class TensorMapping:
    """How one model's tensors map to llama.cpp's: its config, its architecture and gguf's table of names."""

    config: ModelConfig
    arch: Architecture
    names: Any


def tensor_mapping(config: ModelConfig, arch: Architecture) -> TensorMapping:
    """The mapping of a model's tensors, with gguf's table of names for its number of layers."""
    import gguf

    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    return TensorMapping(config, arch, gguf.get_tensor_name_map(number, config["num_hidden_layers"]))


def gguf_name(mapping: TensorMapping, name: str, tensor: StoredTensor) -> str:
    """llama.cpp's name for a tensor. Raises TapirError if there is none."""
    target = mapping.names.get_name(name, try_suffixes=(".weight", ".bias"))
    if target is None:
        raise TapirError(
            f"tensor {name} does not exist in llama.cpp's {mapping.arch.name}",
            where=str(tensor.file),
            fix="Export a model without additional layers.",
        )
    return str(target)


def row_order(mapping: TensorMapping, name: str, rows: int) -> FloatArray | None:
    """For each row in llama.cpp's order its row in transformers' tensor or LoRA B; None if the order is the same."""
    import numpy as np

    heads = interleaved_heads(name, mapping.config) if mapping.arch.interleaved else 0
    return interleave_halves(np.arange(rows), heads) if heads else None


def norm_offset(mapping: TensorMapping, name: str) -> float:
    """The value that llama.cpp expects to be added to a tensor."""
    return mapping.arch.norm_offset if name.endswith("norm.weight") else 0.0


def interleaved_heads(name: str, config: ModelConfig) -> int:
    """The number of heads in the rows of q or k; 0 for any other tensor."""
    heads = int(config["num_attention_heads"])
    if name.endswith(("q_proj.weight", "q_proj.bias")):
        return heads
    return int(config.get("num_key_value_heads") or heads) if name.endswith(("k_proj.weight", "k_proj.bias")) else 0


def interleave_halves(weight: FloatArray, heads: int) -> FloatArray:
    """Reorder the rows 0, 1, … n/2, n/2 + 1, … of each head to 0, n/2, 1, n/2 + 1, …"""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
