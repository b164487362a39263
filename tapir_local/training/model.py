"""Load the student for fine-tuning: hardware, tokenizer, weights, and the LoRA layers to train."""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson

from tapir_local.data.chat_template import NO_TEMPLATE
from tapir_local.errors import TapirError
from tapir_local.memory import describe_unused_gpus, format_bytes, free_memory
from tapir_local.process import Unsupported
from tapir_local.recipe.schema import Train

# Texts of out-of-memory errors, in lower case: the CPU's allocator; CUDA and Triton; CUDA's names; cuBLAS and cuDNN.
OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "out of memory", "out_of_memory", "alloc_failed")


@dataclass(frozen=True)
class Hardware:
    """What the training runs on.

    `device` is cpu or cuda, `backend` is trl or unsloth, and `precision` is f32, bf16 or f16. `free` is the memory in
    bytes that one process may use (of the GPU if there is one) and `total` is the GPU's memory. `processes` is the
    number of processes that a launcher started.
    """

    device: str
    backend: str
    precision: str
    free: int
    processes: int = 1
    total: int = 0


def detect_hardware(settings: Train, say: Callable[[str], None]) -> Hardware:
    """Detect the hardware and choose the libraries. Unsloth is imported here, before the packages that it patches.

    `say` receives the reason if Unsloth is not used. Raises TapirError if the settings cannot be met.
    """
    import torch

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.launcher and processes == 1:
        say("train.launcher started only one process: `accelerate launch` starts several with --multi_gpu.")
    if not torch.cuda.is_available():
        refuse_gpu_settings(settings)
        report_unused_gpus(torch.__version__, torch.version.cuda, say)
        precision = "bf16" if settings.precision == "bf16" else "f32"
        return Hardware("cpu", "trl", precision, free_memory() // processes, processes)
    refuse_old_gpu("train")
    if settings.method == "qlora" and not find_spec("bitsandbytes"):
        fix = "Install it: pip install bitsandbytes, or pip install 'tapir-local[gpu]'."
        raise TapirError("train.method qlora needs bitsandbytes", where="train", fix=fix)
    best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "f16"
    precision = best if settings.precision == "auto" else settings.precision
    if precision == "bf16" and best != "bf16":
        raise TapirError("this GPU does not support bf16", where="train.precision", fix="Set it to f16 or auto.")
    free, total = torch.cuda.mem_get_info(local_rank())
    if torch.cuda.get_device_properties(
        local_rank()
    ).is_integrated:  # it uses main memory, and CUDA counts caches as used
        free = max(free, free_memory())
    return Hardware(
        "cuda", choose_backend(settings, precision, processes, say), precision, int(free), processes, int(total)
    )


def local_rank() -> int:
    """The number of this process's GPU under a launcher, else 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def refuse_gpu_settings(settings: Train) -> None:
    """Raise TapirError for settings that need a GPU."""
    wants = {
        "train.method qlora": settings.method == "qlora",
        "Unsloth": settings.backend == "unsloth",
        "train.precision f16": settings.precision == "f16",
    }
    for what, wanted in wants.items():
        if wanted:
            fix = "Remove the setting: LoRA then trains in 32 bits."
            raise TapirError(f"{what} needs a GPU, but torch finds none", where="train", fix=fix)


def report_unused_gpus(torch_version: str, cuda: str | None, say: Callable[[str], None]) -> None:
    """Report GPUs that the driver lists but torch cannot use: training then runs on the CPU."""
    if found := describe_unused_gpus(torch_version, cuda):
        say(
            f"{found}. Training runs on the CPU, which is much slower. Install a CUDA build of torch for this driver "
            "and GPU; `tapir-local doctor` shows what torch finds."
        )


def refuse_old_gpu(where: str) -> None:
    """Raise TapirError if this process's GPU is older than all that torch was built for; `where` is the section."""
    import torch

    capability = torch.cuda.get_device_capability(local_rank())
    if old := old_gpu_fault(capability, torch.cuda.get_arch_list(), torch.__version__):
        fix = "Install a build of torch for an older CUDA; with CUDA_VISIBLE_DEVICES= (empty) the CPU is used."
        raise TapirError(f"this GPU is too old: {old}", where=where, fix=fix)


def old_gpu_fault(capability: tuple[int, int], built: Sequence[str], torch_version: str) -> str:
    """What is wrong with a GPU older than all that torch was built for, "" if it is not: torch lists such a GPU, but no
    operation runs on it.

    `built` is torch's list of architectures, such as sm_75; only names of NVIDIA's are compared.
    """
    known = [int(found[1]) for name in built if (found := re.fullmatch(r"sm_(\d+)[a-z]*", name))]
    here = 10 * capability[0] + capability[1]
    newer = known and here < min(known)
    return f"it is sm_{here}, but torch {torch_version} needs sm_{min(known)} or newer" if newer else ""


def choose_backend(settings: Train, precision: str, processes: int, say: Callable[[str], None]) -> str:
    """Import and return `unsloth`, or return `trl`; with `auto`, report why Unsloth is not used on a GPU."""
    if settings.backend == "trl":
        return "trl"
    why = unsloth_obstacle(settings, precision, processes) or import_failure("unsloth")
    if not why:
        return "unsloth"
    if settings.backend == "unsloth":
        raise TapirError(
            f"Unsloth cannot be used: {why}", where="train.backend", fix="Fix the cause, or set it to `auto`."
        )
    say(f"Training with TRL and PEFT instead of Unsloth: {why}.")
    return "trl"


def import_failure(package: str) -> str:
    """Import Unsloth and return why that failed, "" if it did not.

    Unsloth patches trl, transformers and peft, so it must be imported before them. It inspects the driver, the GPU and
    a dozen packages, and passes on whatever they raise.
    """
    try:
        import_module(package)
    except Exception as error:  # noqa: BLE001
        for name in [name for name in sys.modules if name.partition("_")[0].partition(".")[0] == package]:
            del sys.modules[name]
        return f"it cannot be imported ({type(error).__name__}: {first_error_line(error)})"
    return ""


def first_error_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that GPU or main memory ran out."""
    import torch

    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(words in said for words in OUT_OF_MEMORY_TEXTS)


def unsloth_obstacle(settings: Train, precision: str, processes: int) -> str:
    """Why Unsloth cannot be used, "" if it can. It is not used with packing, because its handling of packed token rows
    is untested."""
    if not find_spec("unsloth"):
        return "it is not installed (pip install 'tapir-local[gpu]')"
    if processes > 1:
        return "it trains on one GPU, but train.launcher started several processes"
    if settings.packing:
        return "train.packing needs TRL"
    return "it does not support f32" if precision == "f32" else ""


def check_model_path(model: str, setting: str = "student.path") -> None:
    """Raise TapirError if `model` is a path without a model; a Hub name passes. `setting` is the recipe's key."""
    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        raise TapirError(
            "this folder contains no model: config.json is missing",
            where=model,
            fix=f"Set {setting} to a model folder saved by transformers.",
        )
    if not path.is_dir() and (
        path.is_absolute() or path.exists() or model.startswith((".", "~")) or model.count("/") > 1
    ):
        raise TapirError("there is no such folder", where=model, fix=f"Correct {setting}.")


def load_error(model: str, part: str, error: Exception, setting: str = "student.path") -> TapirError:
    """The TapirError for a model that transformers cannot load, with the first line of the reason."""
    reason = first_error_line(error)
    fix = f"Correct {setting}, or download the model (`hf download NAME --local-dir FOLDER`) and set it to that folder."
    if "tiktoken" in reason:  # transformers 5 falls back to it if it cannot read a SentencePiece file
        reason, fix = "reading its SentencePiece file needs two more packages", "pip install sentencepiece protobuf"
    return TapirError(f"the {part} cannot be loaded: {reason}", where=model, fix=fix)


def load_tokenizer(model: str | Path) -> Any:
    """The model's tokenizer with a padding token. Raises TapirError if it is missing or has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise load_error(str(model), "tokenizer", error) from error
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise TapirError("the tokenizer has no chat template", where=str(model), fix=NO_TEMPLATE) from error
    if tokenizer.pad_token is None:  # padding is masked, so any token works
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(
    model: str, hardware: Hardware, *, method: str, max_length: int, seed: int, checkpointing: bool = False
) -> Any:
    """Load the base model. Raises TapirError if transformers or Unsloth cannot load it or the GPU has no room for it.

    Raises Unsupported if Unsloth cannot load a model that transformers might load.
    """
    try:
        if hardware.backend == "unsloth":
            return load_with_unsloth(model, hardware, method, max_length, seed, checkpointing)
        return load_with_transformers(model, hardware, method)
    except Exception as error:
        if is_out_of_memory(error):
            what = f"the model does not fit into the {format_bytes(hardware.free)} of free memory"
            fix = "Stop other programs that use the GPU, or set train.method to qlora."
            raise TapirError(what, where=model, fix=fix) from error
        if hardware.backend == "unsloth":
            raise unsloth_error(error, model, "load") from error
        if isinstance(error, OSError | ValueError):
            raise load_error(model, "model", error) from error
        raise


def unsloth_error(error: Exception, model: str, work: str) -> Unsupported:
    """The error for a model that Unsloth cannot load or train, whatever it or a package below it raised."""
    what = f"Unsloth cannot {work} the model ({type(error).__name__}: {first_error_line(error)})"
    return Unsupported(what, where=model, fix="Set train.backend to trl.")


def load_with_transformers(model: str, hardware: Hardware, method: str) -> Any:
    """Load with transformers in the hardware's precision; in 32 bits if all weights are trained.

    A training step changes a weight by less than 16 bits can represent, so full fine-tuning computes in 16 bits but
    keeps the weights in 32. The weights are read into the GPU directly, unless a launcher decides where they go.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[hardware.precision]
    more = attention_options(model)
    if hardware.device == "cuda" and (method == "qlora" or "LOCAL_RANK" not in os.environ):
        more["device_map"] = {"": local_rank()}
    if method == "full":
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **more)
    if method == "qlora":
        four = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        more["quantization_config"] = four
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **more)


def attention_options(model: str) -> dict[str, Any]:
    """`eager` attention for models with capped attention scores (Gemma 2): transformers' other implementations ignore
    the cap."""
    from transformers import AutoConfig

    capped = getattr(AutoConfig.from_pretrained(model).get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}


def load_with_unsloth(
    model: str, hardware: Hardware, method: str, max_length: int, seed: int, checkpointing: bool
) -> Any:
    """Load with Unsloth: exactly the named model, not the copy in Unsloth's own repository, and on one GPU.

    Full fine-tuning reads the weights in 32 bits: from bf16, Unsloth would round the last round's weights and only
    then widen them. f16 stays, because Unsloth then recognizes the models that overflow in it.
    """
    import torch
    from unsloth import FastLanguageModel

    dtype = torch.bfloat16 if hardware.precision == "bf16" else torch.float16
    loaded, _ = FastLanguageModel.from_pretrained(
        model,
        max_seq_length=max_length,
        dtype=torch.float32 if method == "full" and hardware.precision == "bf16" else dtype,
        load_in_4bit=method == "qlora",
        full_finetuning=method == "full",
        float32_mixed_precision=True
        if method == "full"
        else None,  # weights in 32 bits, as in `load_with_transformers`
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        device_map={"": local_rank()},  # otherwise it may spread the layers over all visible GPUs
        use_exact_model_name=True,
        random_state=seed,
    )
    return loaded


def max_positions(model: str) -> int | None:
    """The maximum sequence length in the model's config, None if there is none. Raises TapirError if the config cannot
    be read."""
    from transformers import AutoConfig

    try:
        found = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    except (OSError, ValueError) as error:
        raise load_error(model, "config", error) from error
    return found if isinstance(found, int) and found > 0 else None


def linear_layer_names(model: Any) -> list[str]:
    """Names of all linear layers except the output layer, for LoRA's `target_modules`."""
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
    """Add new LoRA layers, initialized from `seed`; `shape` holds arguments of LoraConfig."""
    if hardware.backend == "unsloth":
        from unsloth import FastLanguageModel

        recompute = "unsloth" if checkpointing else False
        options = {"use_gradient_checkpointing": recompute, "random_state": seed}
        try:
            return FastLanguageModel.get_peft_model(model, **shape, **options)
        except Exception as error:
            raise unsloth_error(error, "train", "add LoRA to") from error
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    return get_peft_model(model, LoraConfig(**shape, task_type="CAUSAL_LM"))


def load_adapter_weights(model: Any, folder: Path, shape: Mapping[str, Any]) -> None:
    """Load an earlier adapter's weights into the model's LoRA layers. Raises TapirError if they do not fit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    check_adapter_shape(folder, shape)
    try:
        found = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        wrong = [*found.unexpected_keys, *(key for key in found.missing_keys if "lora_" in key)]
    except RuntimeError as error:  # torch lists the mismatched sizes from the second line on
        wrong = str(error).splitlines()[1:2]
    if wrong:
        raise TapirError(
            f"the earlier adapter belongs to another model: {wrong[0].strip()}",
            where=str(folder),
            fix="Continue with the student that it was trained on.",
        )


def check_adapter_folder(folder: Path, fix: str) -> None:
    """Raise TapirError if `folder` does not contain a PEFT adapter."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise TapirError(f"this folder contains no adapter: {name} is missing", where=str(folder), fix=fix)


def check_adapter_shape(folder: Path, shape: Mapping[str, Any]) -> None:
    """Raise TapirError if `folder` contains no adapter, or one of another rank, alpha or choice of layers."""
    check_adapter_folder(folder, "Train that round again: `tapir-local redo`.")
    had = orjson.loads((folder / "adapter_config.json").read_bytes())
    for key in ("r", "lora_alpha", "target_modules"):
        before, now = (sorted(value) if isinstance(value, list) else value for value in (had[key], shape[key]))
        if before != now:
            fix = (
                "Keep train.lora_rank, train.lora_alpha and the student unchanged in a run, or set train.start to base."
            )
            what = f"the earlier adapter has {key} {before}, but this training has {now}"
            raise TapirError(what, where=str(folder), fix=fix)
