"""What a round keeps as its student: a whole GGUF, or a LoRA GGUF of megabytes over its base's, which is made once."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.export.gated_export import export_with_gate
from tapir_local.inference.model import is_adapter
from tapir_local.memory import free_memory, size
from tapir_local.process import Progress, withheld
from tapir_local.recipe.schema import Recipe
from tapir_local.rundir import RunDir, remove, write_json
from tapir_local.training.model_files import read_model_tensors
from tapir_local.training.student_folder import student_folder

BASE_FORMAT = "1"  # to be raised when the same model would be written as another base GGUF
BLOCKS, BLOCK = 64, 1 << 16
HASHED_FILES = ("*.json", "*.jinja", "tokenizer.model")


@dataclass(frozen=True)
class StudentFiles:
    """The GGUF to be opened, and the LoRA GGUF to be laid over it, where the student is one."""

    gguf: Path
    adapter: Path | None = None


def converter_path(recipe: Recipe) -> Path | None:
    """llama.cpp's own converter, where the recipe names it."""
    return Path(recipe.export.converter).expanduser() if recipe.export.converter else None


def student_files(recipe: Recipe, run: RunDir, gguf: Path) -> StudentFiles:
    """What to open for a round's student.gguf. An adapter's base is made anew where it is gone.

    TapirError where the base, or the model that it is made of, is no longer what the run began with.
    """
    return StudentFiles(run_base_gguf(recipe, run), gguf) if is_adapter(gguf) else StudentFiles(gguf)


def run_base_gguf(recipe: Recipe, run: RunDir, progress: Progress | None = None, *, anew: bool = False) -> Path:
    """The GGUF of the base that a run's adapters lie over, in cache/base.

    The run remembers which by base.json; `anew` writes it, for the first round that is exported. TapirError where the
    student's folder has changed since.
    """
    kept = run.path / "base.json"
    if anew or not kept.exists():
        name = model_digest(student_folder(recipe, run))
        write_json(kept, {"base": name, "quant": recipe.export.quant})
    name = json.loads(kept.read_bytes())["base"]
    path = base_gguf_path(run.cache, name, recipe.export.quant)
    if is_base_ready(path):
        check_base_gguf(path)
        return path
    model = student_folder(recipe, run)
    if model_digest(model) != name:
        raise student_changed_error(model, run)
    return make_base_gguf(model, path, recipe, progress)


def check_base_unchanged(recipe: Recipe, run: RunDir) -> None:
    """TapirError where the student's folder is not what the run's first round was exported over."""
    model, kept = student_folder(recipe, run), run.path / "base.json"
    if kept.exists() and json.loads(kept.read_bytes())["base"] != model_digest(model):
        raise student_changed_error(model, run)


def student_changed_error(model: Path, run: RunDir) -> TapirError:
    """What to say of a student's folder whose files are not those of the run's first round."""
    return TapirError(
        f"the student's weights, config or tokenizer, or the gguf package, have changed since run {run.name!r} began",
        where=str(model),
        fix=f"Put them back, or train anew over them: tapir-local redo {run.name} --round 0 --from train",
    )


def base_gguf(recipe: Recipe, run: RunDir, progress: Progress | None = None) -> Path:
    """The untrained student as a GGUF of the recipe's quant, made and gated once for all runs of the cache."""
    model, form = student_folder(recipe, run), recipe.export.quant + ("-converter" if recipe.export.converter else "")
    path = base_gguf_path(run.cache, model_digest(model), form)
    if not is_base_ready(path):
        return make_base_gguf(model, path, recipe, progress)
    check_base_gguf(path)
    return path


def base_gguf_path(cache: Path, name: str, form: str) -> Path:
    """Where a base's GGUF is, by its model's digest and the type of its weights."""
    return cache / "base" / name / f"{form}.gguf"


def is_base_ready(path: Path) -> bool:
    """A base's GGUF counts as made when its print is beside it."""
    return path.exists() and fingerprint_path(path).exists()


def fingerprint_path(path: Path) -> Path:
    """The file that says what a base's GGUF was when it had passed the gate."""
    return path.with_name(path.name + ".json")


def make_base_gguf(model: Path, path: Path, recipe: Recipe, progress: Progress | None) -> Path:
    """Export and gate; two runs that want the same base wait for each other."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"), withheld(recipe.key_variables):
        if not is_base_ready(path):
            remove(path)
            least = recipe.export.min_agreement
            export_with_gate(
                str(model),
                path,
                adapter=None,
                quant=recipe.export.quant,
                check=True,
                min_agreement=least,
                converter=converter_path(recipe),
                progress=progress,
            )
            write_json(fingerprint_path(path), {"bytes": path.stat().st_size, "print": fingerprint([path])})
    check_base_gguf(path)
    return path


def check_base_gguf(path: Path) -> None:
    """TapirError where a base's GGUF is not the file that passed the gate, as far as its size and print can tell."""
    kept = json.loads(fingerprint_path(path).read_bytes())
    if (path.stat().st_size, fingerprint([path])) != (kept["bytes"], kept["print"]):
        raise TapirError(
            "the base's GGUF is not the file that passed the gate: it was damaged or exchanged",
            where=str(path),
            fix="Delete it; the same command makes it anew.",
        )


def model_digest(model: Path) -> str:
    """Sixteen hexadecimal digits for a model's folder, how it is exported, and the version of gguf.

    Of config, tokenizer and template every byte counts. Of weights the names, sizes and BLOCKS pieces of each file,
    its header among them: training moves every weight, so that another model of the same shape differs in any piece,
    and gigabytes need not be read to know a model again. A file that differs only between the pieces is taken for the
    same; the gate, which compares what both models say, is there for that.
    """
    small = sorted({path for pattern in HASHED_FILES for path in model.glob(pattern)})
    found = hashlib.sha256(f"{FORM} gguf {version('gguf')}".encode())
    for path in small:
        found.update(f"\0{path.name}\0".encode() + path.read_bytes())
    found.update(fingerprint(sorted(model.glob("*.safetensors"))).encode())
    return found.hexdigest()[:16]


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over names, sizes and evenly spaced pieces of some files, the first and the last among them."""
    found = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        found.update(f"\0{path.name} {size}\0".encode())
        with path.open("rb") as file:
            for number in range(BLOCKS):
                file.seek(max(0, size - BLOCK) * number // (BLOCKS - 1))
                found.update(file.read(BLOCK))
    return found.hexdigest()


def gate_memory_text(model: Path) -> str:
    """What the gate will take of main memory, and what there is."""
    return f"the model in 32 bits takes {size(4 * weights_of(model))} of memory, {size(free_memory())} are free"


def count_weights(model: Path) -> int:
    """The number of a model's weights."""
    return sum(prod(source.shape) for source in read_model_tensors(model).values())
