"""Families that we do not map: llama.cpp's own converter, out of a checkout that the user names, makes the GGUF."""

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.export.tokenizer import read_json
from tapir_local.export.weights import adapter_settings, read_model
from tapir_local.files import private_file, remove_path
from tapir_local.inference.model import check_gguf
from tapir_local.memory import check_disk_space, check_memory, free_memory
from tapir_local.records import Progress

SCRIPT = "convert_hf_to_gguf.py"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf", ".pth")


def find_script(converter: Path) -> Path:
    """The script, out of its own path or its folder's; TapirError where there is none."""
    script = converter / SCRIPT if converter.is_dir() else converter
    if not script.is_file():
        raise TapirError(
            f"there is no converter: {script.name} is missing",
            where=str(converter),
            fix=f"Name {SCRIPT} in a checkout of llama.cpp: it needs the modules beside it.",
        )
    return script


def convert(
    model_dir: Path, adapter: Path | None, out: Path, kind: str, script: Path, log: Path, progress: Progress
) -> None:
    """Write `out` in the converter's outtype `kind` (f32, f16, bf16 or q8_0), the adapter merged by PEFT before.

    The merged model lies beside `out` until the converter is done. What the converter prints is in `log`. TapirError
    where the disk or the memory is too small, or that ends with the converter's last line.
    """
    scratch = out.with_name(out.name + ".model")
    remove_path(scratch)
    try:
        progress(0, 2, "the model as the converter reads it")
        lay_out(model_dir, scratch, with_weights=adapter is None)
        if adapter is not None:
            merge(model_dir, adapter, scratch)
        progress(1, 2, "converting")
        run_script(script, scratch, out, kind, log)
        progress(2, 2, "converted")
    except BaseException:
        remove_path(out)
        raise
    finally:
        remove_path(scratch)


def lay_out(model_dir: Path, scratch: Path, *, with_weights: bool) -> None:
    """Links to the model's files, and a tokenizer_config.json that adds no BOS: the template alone writes it."""
    scratch.mkdir(parents=True)
    for path in model_dir.iterdir():
        if path.is_file() and (with_weights or not path.name.endswith(WEIGHTS)):
            (scratch / path.name).symlink_to(path.resolve())
    settings = model_dir / "tokenizer_config.json"
    content = read_json(settings) | {"add_bos_token": False, "add_eos_token": False}
    (scratch / settings.name).unlink()
    (scratch / settings.name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def merge(model_dir: Path, adapter: Path, scratch: Path) -> None:
    """PEFT's merge of the whole model in memory: in f32 where memory and disk have room, else in the saved type."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter_settings(adapter)
    dtype = merge_type(model_dir, scratch)
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


def merge_type(model_dir: Path, scratch: Path) -> str:
    """`float32`, or `auto` where that does not fit; TapirError where neither does."""
    sources = read_model(model_dir).values()
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


def run_script(script: Path, model: Path, out: Path, kind: str, log: Path) -> None:
    """The converter in a process of its own, offline, with the gguf package beside it and not the one installed."""
    command = [sys.executable, str(script), str(model), "--outfile", str(out), "--outtype", kind]
    log.parent.mkdir(parents=True, exist_ok=True)
    private_file(log)
    with log.open("wb") as file:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment(script)
        ).returncode
    if code:
        raise TapirError(
            f"the converter failed (exit code {code}): {last_line(log)}",
            where=str(log),
            fix="Its whole message is in that file. A newer llama.cpp may know the model.",
        )
    check_gguf(out, "converter's GGUF", f"See what it said in {log}.")


def environment(script: Path) -> dict[str, str]:
    """The converter's: our own packages' paths come after its own."""
    paths = [str(script.parent / "gguf-py"), str(script.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
