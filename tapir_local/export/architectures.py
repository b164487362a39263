"""The families of models that we map to GGUF: their settings and tensors as llama.cpp names and wants them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tapir_local.errors import TapirError
from tapir_local.export.tokenizer import read_json
from tapir_local.export.weights import Source
from tapir_local.records import Array

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls an architecture, and where it differs from transformers.

    `paired` says that llama.cpp rotates neighbouring pairs of a head's dimensions where transformers rotates halves,
    so that the rows of q and k must be put in another order; `norm_shift` is what a norm's weight lacks. `window` is
    the period of llama.cpp's own pattern of layers with a sliding window, None where it knows no such layers, and
    `large` the number of layers at which it scales attention by the embedding's share of a head. `defaults` are
    transformers' own, which a config.json may leave out. `refused` are settings that llama.cpp would not heed.
    """

    arch: str
    paired: bool = False
    norm_shift: float = 0.0
    activation: str = "silu"
    scalings: tuple[str, ...] = ("linear", "yarn")
    window: int | None = None
    large: int = 0
    refused: tuple[str, ...] = ()
    defaults: Config = field(default_factory=dict)


LLAMA = Family("llama", paired=True, scalings=("linear", "yarn", "llama3"))
GEMMA = {  # transformers 5.17, models/gemma2 and gemma3, configuration_*.py
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
CAPPED = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192}
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Family("qwen2", refused=("use_sliding_window",)),
    "Qwen3ForCausalLM": Family("qwen3", refused=("use_sliding_window", "attention_bias")),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        norm_shift=1.0,
        activation="gelu_pytorch_tanh",
        scalings=("linear",),
        window=2,
        large=46,
        refused=("use_bidirectional_attention", "attention_bias"),
        defaults=GEMMA | CAPPED,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3",
        norm_shift=1.0,
        activation="gelu_pytorch_tanh",
        scalings=("linear",),
        window=6,
        large=62,
        refused=("use_bidirectional_attention", "attention_bias", "attn_logit_softcapping"),
        defaults=GEMMA | {"max_position_embeddings": 131072},
    ),
}


def read_config(model_dir: Path) -> tuple[dict[str, Any], Family]:
    """config.json, with what it leaves out, and the family; TapirError for one that is not mapped.

    Also for a setting that llama.cpp would not heed.
    """
    where = model_dir / "config.json"
    config = read_json(where)
    name = (config.get("architectures") or ["?"])[0]
    if name not in FAMILIES:
        raise unmapped(name, where)
    family = FAMILIES[name]
    config = {**family.defaults, **config}
    check_settings(config, family, where)
    return config, family


def unmapped(name: str, where: Path) -> TapirError:
    """What to say of an architecture that is not in FAMILIES."""
    text = " A model with vision: take its text model (Gemma3ForCausalLM)." if "ConditionalGeneration" in name else ""
    return TapirError(
        f"the family {name} is not mapped to GGUF",
        where=str(where),
        fix=f"Those mapped are: {', '.join(FAMILIES)}. For others name a llama.cpp checkout's convert_hf_to_gguf.py: "
        f"`converter` in the recipe's `export`, or `tapir-local export --converter`.{text}",
    )


def check_settings(config: Config, family: Family, where: Path) -> None:
    """TapirError for what llama.cpp's graph of this architecture does otherwise, and no number in a GGUF changes."""
    act = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if act != family.activation:
        unheeded(f"hidden_act {act}", family, where)
    for setting in family.refused:
        if config.get(setting):
            unheeded(setting, family, where)
    if family.window:
        check_gemma(config, family, where)
    kinds = {settings["rope_type"] for settings in rotaries(config)}
    for kind in kinds - {"default", *family.scalings}:
        unheeded(f"rope scaling of type {kind}", family, where)
    if rotaries(config)[1]["rope_type"] != "default" and family.arch == "gemma3":
        unheeded("rope scaling of layers with a sliding window", family, where)
    check_yarn(rotaries(config)[0], family, where)


def check_gemma(config: Config, family: Family, where: Path) -> None:
    """llama.cpp reckons the attention's scale by itself (models/gemma2.cpp), and caps Gemma 2's logits always."""
    large = config["num_hidden_layers"] == family.large
    scalar = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    if config["query_pre_attn_scalar"] != scalar:
        unheeded(f"query_pre_attn_scalar {config['query_pre_attn_scalar']} (it takes {scalar})", family, where)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if family.arch == "gemma2" and not config.get(cap):
            unheeded(f"{cap} {config.get(cap)}", family, where)


def check_yarn(settings: Config, family: Family, where: Path) -> None:
    """llama.cpp has YaRN's own boundaries for these architectures: it reads others only for Grok and Mistral 3."""
    if settings["rope_type"] != "yarn":
        return
    for name, usual in (("beta_fast", 32), ("beta_slow", 1)):
        if (settings.get(name) or usual) != usual:
            unheeded(f"yarn's {name} {settings[name]}", family, where)
    if settings.get("truncate") is False:
        unheeded("yarn's truncate: false", family, where)


def unheeded(what: str, family: Family, where: Path) -> NoReturn:
    raise TapirError(
        f"{what} has no like in llama.cpp's {family.arch}", where=str(where), fix="Use a model without it."
    )


def head_dim(config: Config) -> int:
    """Dimensions of one head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def write_settings(writer: Any, config: Config, family: Family, rows: int) -> None:
    """The architecture's numbers, out of config.json."""
    heads = config["num_attention_heads"]
    writer.add_vocab_size(rows)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(context_length(config, family))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim(config))
    whole, sliding = rotaries(config)
    writer.add_rope_freq_base(whole["rope_theta"])
    write_rope_scaling(writer, whole)
    if family.window:
        write_windows(writer, config, family, sliding)


def context_length(config: Config, family: Family) -> int:
    """The tokens of a conversation; Mistral 7B v0.1's sliding window, which llama.cpp does not know, ends it."""
    longest = int(config["max_position_embeddings"])
    window = None if family.window or config.get("use_sliding_window") is False else config.get("sliding_window")
    return min(longest, int(window)) if window else longest


def write_windows(writer: Any, config: Config, family: Family, sliding: Config) -> None:
    """Gemma's soft caps, and which layers see a window only; the pattern where it is not llama.cpp's own."""
    windowed = layers_with_window(config, family)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(cap):
            getattr(writer, "add_" + cap)(config[cap])
    if any(windowed):
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    if windowed != usual_windows(len(windowed), family):
        writer.add_sliding_window_pattern(windowed)


def usual_windows(layers: int, family: Family) -> list[bool]:
    """All layers but each `window`-th one."""
    return [bool((number + 1) % (family.window or 1)) for number in range(layers)]


def layers_with_window(config: Config, family: Family) -> list[bool]:
    """Layer by layer, True where attention is confined to the sliding window."""
    kinds = config.get("layer_types")
    if kinds:
        return [kind == "sliding_attention" for kind in kinds]
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or family.window or 1
    return [bool((number + 1) % period) for number in range(config["num_hidden_layers"])]


def rotaries(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotary settings of layers that see everything, and of those with a sliding window: alike but for Gemma 3.

    transformers 5 has them in `rope_parameters`, for Gemma 3 by kind of layer; older models in `rope_theta`,
    `rope_scaling` and `rope_local_base_freq`.
    """
    newer = config.get("rope_parameters") or {}
    if "full_attention" in newer:
        return rotary(config, newer["full_attention"]), rotary(config, newer["sliding_attention"])
    local = "Gemma3ForCausalLM" in (config.get("architectures") or ())
    scaling = {**(config.get("rope_scaling") or {}), **newer}
    if local:
        base = {"rope_theta": config.get("rope_local_base_freq") or 10000.0, "rope_type": "default"}
        return rotary({"rope_theta": 1e6, **config}, scaling), base
    return rotary(config, scaling), rotary(config, scaling)


def rotary(config: Config, scaling: Config) -> dict[str, Any]:
    """One kind of layer's base and scaling."""
    settings = {"rope_theta": config.get("rope_theta") or 10000.0, **scaling}
    return {"rope_type": settings.get("type", "default"), **settings}


def write_rope_scaling(writer: Any, settings: Config) -> None:
    """Linear and YaRN scaling are numbers; Llama 3's is a tensor (see `rope_factors`)."""
    import gguf

    kind = settings["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(settings["factor"])
    if kind == "yarn":
        if settings.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(yarn_attention(settings))


def yarn_attention(settings: Config) -> float:
    """What the config's attention factor is of the paper's, 0.1 ln(factor) + 1, by which llama.cpp multiplies anyway.

    transformers 5.17, modeling_rope_utils.py; llama.cpp, llama-context.cpp and rope_yarn in ggml-cpu/ops.cpp.
    """

    def scaled(weight: float) -> float:
        return 0.1 * weight * math.log(settings["factor"]) + 1 if settings["factor"] > 1 else 1.0

    wanted = settings.get("attention_factor")
    if wanted is None:
        both = settings.get("mscale") and settings.get("mscale_all_dim")
        wanted = scaled(settings["mscale"]) / scaled(settings["mscale_all_dim"]) if both else scaled(1.0)
    return float(wanted / scaled(1.0))


def rope_factors(config: Config) -> Array:
    """What Llama 3.1's scaling divides each rotary frequency by, shape (head_dim / 2,).

    transformers 5.17, modeling_rope_utils.py: short wave lengths stay, long ones are divided by `factor`, those between
    are blended.
    """
    import numpy as np

    settings, dim = rotaries(config)[0], head_dim(config)
    waves = 2 * np.pi * settings["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    low, high, factor = settings["low_freq_factor"], settings["high_freq_factor"], settings["factor"]
    old = settings["original_max_position_embeddings"]
    smooth = np.clip((old / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def used(sources: Mapping[str, Source], config: Config) -> dict[str, Source]:
    """The tensors that llama.cpp takes: no frequencies, which it reckons itself, no output beside a tied embedding."""
    left_out = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    return {
        name: source
        for name, source in sources.items()
        if name not in left_out and not name.endswith("rotary_emb.inv_freq")
    }


def tensor_names(config: Config, family: Family) -> Any:
    """gguf's map from the names of transformers to those of llama.cpp."""
    import gguf

    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    return gguf.get_tensor_name_map(number, config["num_hidden_layers"])


def target_name(name: str, source: Source, names: Any, family: Family) -> str:
    """What llama.cpp calls a tensor; TapirError where it has no place for it."""
    target = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if target is None:
        raise TapirError(
            f"tensor {name} has no place in llama.cpp's {family.arch}",
            where=str(source.file),
            fix="Export a model without additions.",
        )
    return str(target)


def row_order(name: str, rows: int, config: Config, family: Family) -> Array | None:
    """Which row of transformers' tensor, or of its LoRA's B, is each of llama.cpp's; None where all stay in place."""
    import numpy as np

    heads = paired_heads(name, config) if family.paired else 0
    return pair(np.arange(rows), heads) if heads else None


def shift(name: str, family: Family) -> float:
    """What llama.cpp wants added to a tensor."""
    return family.norm_shift if name.endswith("norm.weight") else 0.0


def paired_heads(name: str, config: Config) -> int:
    """The number of heads in q's or k's rows; 0 for any other tensor."""
    heads = int(config["num_attention_heads"])
    if name.endswith(("q_proj.weight", "q_proj.bias")):
        return heads
    return int(config.get("num_key_value_heads") or heads) if name.endswith(("k_proj.weight", "k_proj.bias")) else 0


def pair(weight: Array, heads: int) -> Array:
    """Rows 0, 1, … n/2, n/2 + 1, … of each head put as 0, n/2, 1, n/2 + 1, …"""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
