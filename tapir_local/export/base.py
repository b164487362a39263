"""What a round keeps as its student: a whole GGUF, or a LoRA GGUF of megabytes over its base's, which is made once."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.export.verified import export_checked
from tapir_local.export.weights import read_model
from tapir_local.files import remove_path, write_json
from tapir_local.inference.model import is_adapter
from tapir_local.memory import format_bytes, free_memory
from tapir_local.process import withhold_variables
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Progress
from tapir_local.run_dir import RunDir
from tapir_local.training.student import student_folder

FORM = "1"  # to be raised when the same model would be written as another base GGUF
BLOCKS, BLOCK = 64, 1 << 16
SMALL = ("*.json", "*.jinja", "tokenizer.model")


@dataclass(frozen=True)
class Student:
    """The GGUF to be opened, and the LoRA GGUF to be laid over it, where the student is one."""

    gguf: Path
    adapter: Path | None = None


def converter_of(recipe: Recipe) -> Path | None:
    """llama.cpp's own converter, where the recipe names it."""
    return Path(recipe.export.converter).expanduser() if recipe.export.converter else None


def student_of(recipe: Recipe, run: RunDir, gguf: Path) -> Student:
    """What to open for a round's student.gguf. An adapter's base is made anew where it is gone.

    TapirError where the base, or the model that it is made of, is no longer what the run began with.
    """
    return Student(base_of(recipe, run), gguf) if is_adapter(gguf) else Student(gguf)


def base_of(recipe: Recipe, run: RunDir, progress: Progress | None = None, *, anew: bool = False) -> Path:
    """The GGUF of the base that a run's adapters lie over, in cache/base.

    The run remembers which by base.json; `anew` writes it, for the first round that is exported. TapirError where the
    student's folder has changed since.
    """
    kept = run.path / "base.json"
    if anew or not kept.exists():
        name = digest(student_folder(recipe, run))
        write_json(kept, {"base": name, "quant": recipe.export.quant})
    name = json.loads(kept.read_bytes())["base"]
    path = base_path(run.cache, name, recipe.export.quant)
    if made(path):
        check(path)
        return path
    model = student_folder(recipe, run)
    if digest(model) != name:
        raise changed(model, run)
    return make_base(model, path, recipe, progress)


def check_base(recipe: Recipe, run: RunDir) -> None:
    """TapirError where the student's folder is not what the run's first round was exported over."""
    model, kept = student_folder(recipe, run), run.path / "base.json"
    if kept.exists() and json.loads(kept.read_bytes())["base"] != digest(model):
        raise changed(model, run)


def changed(model: Path, run: RunDir) -> TapirError:
    """What to say of a student's folder whose files are not those of the run's first round."""
    return TapirError(
        f"the student's weights, config or tokenizer, or the gguf package, have changed since run {run.name!r} began",
        where=str(model),
        fix=f"Put them back, or train anew over them: tapir-local redo {run.name} --round 0 --from train",
    )


def base_gguf(recipe: Recipe, run: RunDir, progress: Progress | None = None) -> Path:
    """The untrained student as a GGUF of the recipe's quant, made and gated once for all runs of the cache."""
    model, form = student_folder(recipe, run), recipe.export.quant + ("-converter" if recipe.export.converter else "")
    path = base_path(run.cache, digest(model), form)
    if not made(path):
        return make_base(model, path, recipe, progress)
    check(path)
    return path


def base_path(cache: Path, name: str, form: str) -> Path:
    """Where a base's GGUF is, by its model's digest and the type of its weights."""
    return cache / "base" / name / f"{form}.gguf"


def made(path: Path) -> bool:
    """A base's GGUF counts as made when its print is beside it."""
    return path.exists() and printed(path).exists()


def printed(path: Path) -> Path:
    """The file that says what a base's GGUF was when it had passed the gate."""
    return path.with_name(path.name + ".json")


def make_base(model: Path, path: Path, recipe: Recipe, progress: Progress | None) -> Path:
    """Export and gate; two runs that want the same base wait for each other."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"), withhold_variables(recipe.key_variables):
        if not made(path):
            remove_path(path)
            least = recipe.export.min_agreement
            export_checked(
                str(model),
                path,
                adapter=None,
                quant=recipe.export.quant,
                check=True,
                min_agreement=least,
                converter=converter_of(recipe),
                progress=progress,
            )
            write_json(printed(path), {"bytes": path.stat().st_size, "print": print_of([path])})
    check(path)
    return path


def check(path: Path) -> None:
    """TapirError where a base's GGUF is not the file that passed the gate, as far as its size and print can tell."""
    kept = json.loads(printed(path).read_bytes())
    if (path.stat().st_size, print_of([path])) != (kept["bytes"], kept["print"]):
        raise TapirError(
            "the base's GGUF is not the file that passed the gate: it was damaged or exchanged",
            where=str(path),
            fix="Delete it; the same command makes it anew.",
        )


def digest(model: Path) -> str:
    """Sixteen hexadecimal digits for a model's folder, how it is exported, and the version of gguf.

    Of config, tokenizer and template every byte counts. Of weights the names, sizes and BLOCKS pieces of each file,
    its header among them: training moves every weight, so that another model of the same shape differs in any piece,
    and gigabytes need not be read to know a model again. A file that differs only between the pieces is taken for the
    same; the gate, which compares what both models say, is there for that.
    """
    small = sorted({path for pattern in SMALL for path in model.glob(pattern)})
    found = hashlib.sha256(f"{FORM} gguf {version('gguf')}".encode())
    for path in small:
        found.update(f"\0{path.name}\0".encode() + path.read_bytes())
    found.update(print_of(sorted(model.glob("*.safetensors"))).encode())
    return found.hexdigest()[:16]


def print_of(files: Iterable[Path]) -> str:
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


def memory_words(model: Path) -> str:
    """What the gate will take of main memory, and what there is."""
    needed, free = format_bytes(4 * weights_of(model)), format_bytes(free_memory())
    return f"the model in 32 bits takes {needed} of memory, {free} are free"


def weights_of(model: Path) -> int:
    """The number of a model's weights."""
    return sum(prod(source.shape) for source in read_model(model).values())
