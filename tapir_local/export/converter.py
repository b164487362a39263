"""Export architectures that we do not support with llama.cpp's own converter, from a checkout that the user names."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.export.weights import model_weights, read_adapter_config
from tapir_local.files import private_file, remove_path
from tapir_local.inference.model import check_gguf
from tapir_local.memory import check_disk_space, check_memory, free_memory
from tapir_local.records import Progress
from tapir_local.training.model_files import read_model_json

CONVERTER_SCRIPT = "convert_hf_to_gguf.py"
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf", ".pth")


@dataclass(frozen=True)
class Converter:
    """llama.cpp's converter script, and the log file for its output."""

    path: Path
    log: Path


def find_converter(converter: Path) -> Path:
    """The script, given its path or folder. Raises TapirError if it is missing."""
    script = converter / CONVERTER_SCRIPT if converter.is_dir() else converter
    if not script.is_file():
        raise TapirError(
            f"the converter is missing: {script.name}",
            where=str(converter),
            fix=f"Give the path of {CONVERTER_SCRIPT} in a llama.cpp checkout: it needs the modules beside it.",
        )
    return script


def convert_with_llama_cpp(
    model_dir: Path, adapter: Path | None, out: Path, kind: str, converter: Converter, progress: Progress
) -> None:
    """Write `out` with the converter's outtype `kind` (f32, f16, bf16 or q8_0); PEFT merges the adapter first.

    The merged model is kept beside `out` until the converter ends. Raises TapirError if disk space or memory is too
    small, or with the last line of the converter's log if it fails.
    """
    scratch = out.with_name(out.name + ".model")
    remove_path(scratch)
    try:
        progress(0, 2, "preparing the model")
        link_model_files(model_dir, scratch, with_weights=adapter is None)
        if adapter is not None:
            merge_with_peft(model_dir, adapter, scratch)
        progress(1, 2, "converting")
        run_converter(find_converter(converter.path), scratch, out, kind, converter.log)
        progress(2, 2, "converted")
    except BaseException:
        remove_path(out)
        raise
    finally:
        remove_path(scratch)


def link_model_files(model_dir: Path, scratch: Path, *, with_weights: bool) -> None:
    """Link the model's files, and write a tokenizer_config.json that adds no BOS: only the template writes it."""
    scratch.mkdir(parents=True)
    for path in model_dir.iterdir():
        if path.is_file() and (with_weights or not path.name.endswith(WEIGHT_SUFFIXES)):
            (scratch / path.name).symlink_to(path.resolve())
    settings = model_dir / "tokenizer_config.json"
    content = read_model_json(settings) | {"add_bos_token": False, "add_eos_token": False}
    (scratch / settings.name).unlink()
    (scratch / settings.name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def merge_with_peft(model_dir: Path, adapter: Path, scratch: Path) -> None:
    """Merge the whole model in memory with PEFT: in f32 if memory and disk have room, else in the saved type."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    read_adapter_config(adapter)
    dtype = merge_dtype(model_dir, scratch)
    try:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(scratch / "merged")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TapirError(
            f"PEFT cannot merge the adapter: {str(error).strip().splitlines()[0]}",
            where=str(adapter),
            fix="Use the base that the adapter was trained on.",
        ) from error
    for path in (scratch / "merged").glob("*.safetensors*"):
        path.rename(scratch / path.name)


def merge_dtype(model_dir: Path, scratch: Path) -> str:
    """`float32`, or `auto` if that does not fit. Raises TapirError if neither fits."""
    sources = model_weights(model_dir).values()
    elements = sum(prod(source.shape) for source in sources)
    saved = sum(prod(source.shape) * (4 if source.dtype in ("F32", "F64") else 2) for source in sources)
    check_disk_space(scratch, saved, "the model with its adapter merged")
    try:
        check_disk_space(scratch, 2 * 4 * elements, "the merged model in 32 bits, and the GGUF")
        if 1.2 * 4 * elements < free_memory():
            return "float32"
    except TapirError:
        pass
    check_memory(saved, "the model with its adapter merged")
    return "auto"


def run_converter(script: Path, model: Path, out: Path, kind: str, log: Path) -> None:
    """Run the converter as an offline subprocess that uses the gguf package beside it, not the installed one."""
    command = [sys.executable, str(script), str(model), "--outfile", str(out), "--outtype", kind]
    log.parent.mkdir(parents=True, exist_ok=True)
    private_file(log)
    with log.open("wb") as file:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=converter_environment(script)
        ).returncode
    if code:
        raise TapirError(
            f"the converter failed (exit code {code}): {last_log_line(log)}",
            where=str(log),
            fix="The full message is in that file. A newer llama.cpp may support the model.",
        )
    check_gguf(out, "converter's GGUF", f"See its output in {log}.")


def converter_environment(script: Path) -> dict[str, str]:
    """The converter's environment: its own modules come before our package path."""
    paths = [str(script.parent / "gguf-py"), str(script.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


def last_log_line(log: Path) -> str:
    """The last line of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
