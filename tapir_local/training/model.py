"""The student for fine-tuning: hardware, tokenizer, weights, and the LoRA layers that are trained."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson

from tapir_local.data.chat_template import NO_TEMPLATE
from tapir_local.errors import TapirError
from tapir_local.memory import format_bytes, free_memory, list_visible_gpus
from tapir_local.process import Unsupported
from tapir_local.recipe.schema import Train

# What an error says of memory that ran out: the CPU's allocator; CUDA itself and Triton; cuBLAS.
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
SAME = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Hardware:
    """What the training runs on.

    `device` is cpu or cuda, `backend` trl or unsloth, `precision` f32, bf16 or f16, and `free` the bytes of memory that
    one process may fill, the GPU's where there is one, which has `total`. `processes` is how many train together under
    a launcher.
    """

    device: str
    backend: str
    precision: str
    free: int
    processes: int = 1
    total: int = 0


def look(settings: Train, say: Callable[[str], None]) -> Hardware:
    """The hardware, and the libraries to use on it. Unsloth is imported here, before what it patches.

    `say` is told where Unsloth is left out. TapirError when what is asked for cannot be had.
    """
    import torch

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.launcher and processes == 1:
        say("train.launcher has started one process: `accelerate launch` starts several with --multi_gpu.")
    if not torch.cuda.is_available():
        refuse_without_gpu(settings)
        tell_of_unused_gpus(torch.__version__, say)
        precision = "bf16" if settings.precision == "bf16" else "f32"
        return Hardware("cpu", "trl", precision, free_memory() // processes, processes)
    if settings.method == "qlora" and not find_spec("bitsandbytes"):
        fix = "pip install bitsandbytes, or tapir-local[gpu]."
        raise TapirError("train.method qlora needs bitsandbytes", where="train", fix=fix)
    best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "f16"
    precision = best if settings.precision == "auto" else settings.precision
    if precision == "bf16" and best != "bf16":
        raise TapirError("this GPU does not compute in bf16", where="train.precision", fix="Write f16, or auto.")
    free, total = torch.cuda.mem_get_info(local_rank())
    if torch.cuda.get_device_properties(local_rank()).is_integrated:  # it has main memory; CUDA counts caches as taken
        free = max(free, free_memory())
    return Hardware("cuda", library(settings, precision, processes, say), precision, int(free), processes, int(total))


def local_rank() -> int:
    """The number of this process's GPU under a launcher, 0 without one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def refuse_without_gpu(settings: Train) -> None:
    """TapirError for what only a GPU can do."""
    wants = {
        "train.method qlora": settings.method == "qlora",
        "Unsloth": settings.backend == "unsloth",
        "train.precision f16": settings.precision == "f16",
    }
    for what, wanted in wants.items():
        if wanted:
            fix = "Leave it out: LoRA then trains in 32 bits."
            raise TapirError(f"{what} needs a GPU, and torch sees none", where="train", fix=fix)


def tell_of_unused_gpus(torch_version: str, say: Callable[[str], None]) -> None:
    """Say of GPUs that their driver lists and torch cannot use that the CPU trains instead."""
    for card in list_visible_gpus()[:1]:
        say(
            f"The driver lists {card.name}, but torch {torch_version} cannot use it: the CPU trains, far more slowly. "
            "Install a CUDA build of torch for this driver and GPU; `tapir-local doctor` shows what torch finds."
        )


def library(settings: Train, precision: str, processes: int, say: Callable[[str], None]) -> str:
    """`unsloth`, imported, or `trl`; where `auto` does without Unsloth on a GPU, it says why and goes on."""
    if settings.backend == "trl":
        return "trl"
    why = without_unsloth(settings, precision, processes) or failed_import("unsloth")
    if not why:
        return "unsloth"
    if settings.backend == "unsloth":
        raise TapirError(f"Unsloth cannot be used: {why}", where="train.backend", fix="Mend that, or write `auto`.")
    say(f"Training with plain TRL and PEFT, not with Unsloth: {why}.")
    return "trl"


def failed_import(package: str) -> str:
    """Import Unsloth, which patches trl, transformers and peft, so that it must come before them; why that failed, ""
    where it did not. It looks at the driver, the GPU and a dozen packages, and raises what they raise."""
    try:
        import_module(package)
    except Exception as error:  # noqa: BLE001
        for name in [name for name in sys.modules if name.partition("_")[0].partition(".")[0] == package]:
            del sys.modules[name]
        return f"it cannot be imported ({type(error).__name__}: {first_line(error)})"
    return ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def ran_out(error: BaseException) -> bool:
    """Whether an error is of memory that ran out, the GPU's or main memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


def without_unsloth(settings: Train, precision: str, processes: int) -> str:
    """Why Unsloth does not serve, "" where it does. What it makes of packed token rows was never tried, so it is not
    given any."""
    if not find_spec("unsloth"):
        return "it is not installed (pip install 'tapir-local[gpu]')"
    if processes > 1:
        return "it trains on one GPU, and train.launcher started several processes"
    if settings.packing:
        return "train.packing goes through TRL"
    return "it does not compute in f32" if precision == "f32" else ""


def check_folder(model: str, setting: str = "student.path") -> None:
    """TapirError when `model` is a path that leads to no model; a Hub name passes. `setting` is the recipe's key."""
    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        raise TapirError(
            "this folder holds no model: config.json is missing",
            where=model,
            fix=f"Give {setting} a folder as transformers saves it.",
        )
    if not path.is_dir() and (
        path.is_absolute() or path.exists() or model.startswith((".", "~")) or model.count("/") > 1
    ):
        raise TapirError("there is no such folder", where=model, fix=f"Correct {setting}.")


def unloadable(model: str, part: str, error: Exception, setting: str = "student.path") -> TapirError:
    """What to say of a model that transformers cannot load: the first line of its reason."""
    reason = first_line(error)
    fix = f"Correct {setting}, or put the model on disk (`hf download NAME --local-dir FOLDER`) and name that folder."
    if "tiktoken" in reason:  # what transformers 5 falls back on for a SentencePiece file that it cannot read
        reason, fix = "its SentencePiece file needs two more packages to be read", "pip install sentencepiece protobuf"
    return TapirError(f"the {part} cannot be loaded: {reason}", where=model, fix=fix)


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer, with a padding token; TapirError without one, or without a chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise unloadable(model, "tokenizer", error) from error
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise TapirError("the tokenizer has no chat template", where=model, fix=NO_TEMPLATE) from error
    if tokenizer.pad_token is None:  # padding is masked and not attended to, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(
    model: str, hardware: Hardware, *, method: str, max_length: int, seed: int, checkpointing: bool = False
) -> Any:
    """The base; TapirError when transformers or Unsloth cannot load it, or the GPU has no room for it.

    Unsupported where Unsloth cannot load what transformers perhaps can.
    """
    try:
        if hardware.backend == "unsloth":
            return load_unsloth(model, hardware, method, max_length, seed, checkpointing)
        return load_plain(model, hardware, method)
    except Exception as error:
        if ran_out(error):
            what = f"the model does not fit into the {format_bytes(hardware.free)} of memory that were free"
            fix = "End what else is on the GPU, or write train.method: qlora."
            raise TapirError(what, where=model, fix=fix) from error
        if hardware.backend == "unsloth":
            raise without(error, model, "load") from error
        if isinstance(error, OSError | ValueError):
            raise unloadable(model, "model", error) from error
        raise


def without(error: Exception, model: str, work: str) -> Unsupported:
    """What to say of a model that Unsloth cannot load or train, whatever it or a package below it has raised."""
    what = f"Unsloth cannot {work} the model ({type(error).__name__}: {first_line(error)})"
    return Unsupported(what, where=model, fix="Write train.backend: trl.")


def load_plain(model: str, hardware: Hardware, method: str) -> Any:
    """Through transformers, in the precision of the hardware; in 32 bits where all weights are trained.

    A step changes a weight by less than 16 bits can tell: they are computed with in 16 bits, and kept in 32.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[hardware.precision]
    more = attention(model)
    if method == "full":
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **more)
    if method == "qlora":
        four = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        more |= {"quantization_config": four, "device_map": {"": local_rank()}}
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **more)


def attention(model: str) -> dict[str, Any]:
    """`eager` where attention's scores are capped, as Gemma 2's are: transformers' other ways leave the cap out."""
    from transformers import AutoConfig

    capped = getattr(AutoConfig.from_pretrained(model).get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}


def load_unsloth(model: str, hardware: Hardware, method: str, max_length: int, seed: int, checkpointing: bool) -> Any:
    """Through Unsloth; the very model named, not the repository of its own that it would put in its place."""
    import torch
    from unsloth import FastLanguageModel

    loaded, _ = FastLanguageModel.from_pretrained(
        model,
        max_seq_length=max_length,
        dtype=torch.bfloat16 if hardware.precision == "bf16" else torch.float16,
        load_in_4bit=method == "qlora",
        full_finetuning=method == "full",
        float32_mixed_precision=True if method == "full" else None,  # weights in 32 bits, as in `load_plain`
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        use_exact_model_name=True,
        random_state=seed,
    )
    return loaded


def positions(model: str) -> int | None:
    """Tokens that a model was made for; None where its config does not tell. TapirError for a config that is none."""
    from transformers import AutoConfig

    try:
        found = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    except (OSError, ValueError) as error:
        raise unloadable(model, "config", error) from error
    return found if isinstance(found, int) and found > 0 else None


def linear_names(model: Any) -> list[str]:
    """Names of all linear layers but the head, as LoRA's `target_modules`."""
    from torch.nn import Linear

    head = model.get_output_embeddings()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, part in model.named_modules()
            if isinstance(part, Linear) and part is not head
        }
    )


def add_lora(model: Any, shape: Mapping[str, Any], hardware: Hardware, seed: int, checkpointing: bool) -> Any:
    """The model with fresh LoRA layers, drawn from `seed`; `shape` holds arguments of LoraConfig."""
    if hardware.backend == "unsloth":
        from unsloth import FastLanguageModel

        twice = "unsloth" if checkpointing else False
        try:
            return FastLanguageModel.get_peft_model(model, **shape, use_gradient_checkpointing=twice, random_state=seed)
        except Exception as error:
            raise without(error, "train", "put LoRA on") from error
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    return get_peft_model(model, LoraConfig(**shape, task_type="CAUSAL_LM"))


def go_on_from(model: Any, folder: Path, shape: Mapping[str, Any]) -> None:
    """Put an earlier adapter's weights into the model's LoRA layers; TapirError when they do not fit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    check_shape(folder, shape)
    try:
        found = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        wrong = [*found.unexpected_keys, *(key for key in found.missing_keys if "lora_" in key)]
    except RuntimeError as error:  # torch lists the mismatched sizes from its second line on
        wrong = str(error).splitlines()[1:2]
    if wrong:
        raise TapirError(
            f"the earlier adapter is of another model: {wrong[0].strip()}",
            where=str(folder),
            fix="Go on with the student that it was trained on.",
        )


def check_adapter(folder: Path, fix: str) -> None:
    """TapirError when `folder` does not hold what PEFT writes of an adapter."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise TapirError(f"this folder holds no adapter: {name} is missing", where=str(folder), fix=fix)


def check_shape(folder: Path, shape: Mapping[str, Any]) -> None:
    """TapirError when `folder` holds no adapter, or one of another rank, scale or choice of layers."""
    check_adapter(folder, "Train that round again: `tapir-local redo`.")
    had = orjson.loads((folder / "adapter_config.json").read_bytes())
    for key in ("r", "lora_alpha", "target_modules"):
        before, now = (sorted(value) if isinstance(value, list) else value for value in (had[key], shape[key]))
        if before != now:
            fix = "Keep train.lora_rank, train.lora_alpha and the student through a run, or set train.start to `base`."
            raise TapirError(f"the earlier adapter has {key} {before}, this training {now}", where=str(folder), fix=fix)


def check_same_model(folder: Path, base: Path) -> None:
    """TapirError when `folder` holds no whole model, or one of another shape than the base."""
    config = folder / "config.json"
    if not config.exists():
        what = "an adapter, not a whole model" if (folder / "adapter_config.json").exists() else "no model"
        raise TapirError(
            f"the earlier training left {what}",
            where=str(folder),
            fix="Keep train.method through a run, or set train.start to `base`.",
        )
    before, now = (orjson.loads(path.read_bytes()) for path in (config, base / "config.json"))
    for key in SAME:
        if before.get(key) != now.get(key):
            what = f"the earlier model has {key} {before.get(key)}, the student {now.get(key)}"
            raise TapirError(what, where=str(folder), fix="Go on with the student that it was trained on.")
