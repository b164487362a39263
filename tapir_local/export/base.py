"""A run's student as files: the folder that is trained, a round's GGUF, and the base GGUF under a LoRA GGUF."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.export.gated_export import ExportConfig, export_with_gate, make_template_view
from tapir_local.export.gguf_student import STUDENT_RECORD, GgufStudentRecord, make_gguf_student
from tapir_local.export.weights import model_weights
from tapir_local.files import private_folder, read_record, remove_path, write_json
from tapir_local.inference.model import check_gguf, is_adapter
from tapir_local.memory import format_bytes, free_memory
from tapir_local.process import withhold_variables
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Progress, noop
from tapir_local.resources import download_model, find_model_folder, named_student_gguf, read_chat_template
from tapir_local.run_dir import RunDir

BASE_FORMAT = "1"  # increase it if the same model would be exported to a different base GGUF
STUDENT_FORMAT = "1"  # increase it if the same GGUF would be made into another folder to train
FINGERPRINT_PIECES, PIECE_BYTES = 64, 1 << 16
HASHED_FILES = ("*.json", "*.jinja", "tokenizer.model")


@dataclass(frozen=True)
class StudentFiles:
    """The GGUF to open, and the LoRA GGUF to load on top of it, if any."""

    gguf: Path
    adapter: Path | None = None


def original_folder(recipe: Recipe, run: RunDir, say: Callable[[str], None] = noop) -> Path:
    """The student's own folder; for one from the Hub, at the commit recorded in run.json when the run started.

    That of a GGUF is made if it is not in the cache. TapirError if the GGUF is not the one that run.json records.
    """
    named, revision = recipe.student.path, recipe.student.revision
    noted = run.record().get("student", {})
    noted = noted if noted.get("path") == named else {}
    gguf = named_student_gguf(named)
    if gguf is not None:
        if revision is not None:
            what = f"student.revision ({revision}) applies to models on the Hub only, and this one is a GGUF"
            raise TapirError(what, where=named, fix="Remove student.revision.")
        template = recipe.student.chat_template is None
        return gguf_student_folder(gguf, run.cache, noted.get("gguf"), say, template=template)
    if noted:
        return download_model(named, noted["revision"], complete=True)
    return find_model_folder(named, revision)


def gguf_student_folder(
    gguf: Path, cache: Path, key: str | None = None, say: Callable[[str], None] = noop, *, template: bool = True
) -> Path:
    """The folder of a GGUF in cache/base, made if it is not there; processes that need the same one wait.

    `key` is the one that a run has recorded: the GGUF must still be that file, or be gone while its folder is there.
    With `template`, a GGUF without a chat template is refused. `say` gets a line before and after the making.
    """
    from filelock import FileLock

    if key is None or gguf.is_file():
        now = gguf_student_key(gguf)
        if key not in (None, now):
            what = "the student's GGUF is another file than when the run began"
            raise TapirError(what, where=str(gguf), fix="Restore it, or begin a new run with --name.")
        key = now
    folder = cache / "base" / str(key) / gguf.stem
    if not folder.is_dir():
        check_gguf(gguf, "student", "Correct student.path.")
        private_folder(folder.parent.parent)  # cache/base
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.parent / ".lock"):
            if not folder.is_dir():
                make_gguf_student(gguf, folder, say, template=template)
    return folder


def gguf_student_key(gguf: Path) -> str:
    """Sixteen hexadecimal digits that identify a GGUF by its name, its size and evenly spaced pieces of it."""
    check_gguf(gguf, "student", "Correct student.path.")
    return hashlib.sha256(f"{STUDENT_FORMAT} {fingerprint([gguf])}".encode()).hexdigest()[:16]


def prepare_student_folder(recipe: Recipe, run: RunDir, say: Callable[[str], None] = noop) -> Path:
    """Fix the student's folder for the run. The calling process must hold the run's lock.

    The commit of a Hub model, or the key of a GGUF, is recorded in run.json. Until round 0 is trained, a view is made
    again with the current chat template. `say` gets a line before and after a GGUF's folder is made.
    """
    model, named = original_folder(recipe, run, say), recipe.student.path
    if named != "pocket" and not Path(named).is_dir() and run.record().get("student", {}).get("path") != named:
        write_json(run.path / "run.json", {**run.record(), "student": {"path": named, **student_identity(model)}})
    if recipe.student.chat_template is not None and not (run.round(0) / "adapter").is_dir():
        make_template_view(model, read_chat_template(recipe.student.chat_template), student_view_path(recipe, run))
    return student_folder(recipe, run)


def student_identity(model: Path) -> dict[str, str]:
    """What run.json records of a student that is no folder: a GGUF's key, file and weights, or a Hub model's commit."""
    if not (model / STUDENT_RECORD).is_file():
        return {"revision": model.name}
    made = read_record(GgufStudentRecord, model / STUDENT_RECORD)
    return {"gguf": model.parent.name, "file": made.gguf, "weights": made.weights}


def student_folder(recipe: Recipe, run: RunDir) -> Path:
    """The folder that is trained, exported and compared: the student's own or, with another chat template, the run's
    view.

    The view consists of links to the student's files and the template as it was at the run's first training. So neither
    a student that other runs use nor a run in progress is changed.
    """
    if recipe.student.chat_template is None:
        return original_folder(recipe, run)
    view = student_view_path(recipe, run)
    if not view.is_dir():
        make_template_view(original_folder(recipe, run), read_chat_template(recipe.student.chat_template), view)
    return view


def student_view_path(recipe: Recipe, run: RunDir) -> Path:
    """Path of a run's view of its student."""
    return run.path / "student" / (Path(recipe.student.path).name.removesuffix(".gguf") or "student")


def converter_path(recipe: Recipe) -> Path | None:
    """The path of llama.cpp's converter, if the recipe sets it."""
    return Path(recipe.export.converter).expanduser() if recipe.export.converter else None


def student_files(recipe: Recipe, run: RunDir, gguf: Path) -> StudentFiles:
    """The files to open for a round's student.gguf. An adapter's base GGUF is made again if it was deleted.

    Raises TapirError if the base GGUF, or the model it is made from, has changed since the run started.
    """
    return StudentFiles(run_base_gguf(recipe, run), gguf) if is_adapter(gguf) else StudentFiles(gguf)


def run_base_gguf(recipe: Recipe, run: RunDir, progress: Progress | None = None, *, renew: bool = False) -> Path:
    """The base GGUF of a run's adapters, in cache/base.

    The run records which one in base.json; `renew` rewrites that record, for the first exported round. Raises
    TapirError if the student's folder has changed since.
    """
    kept = run.path / "base.json"
    if renew or not kept.exists():
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
    """Raise TapirError if the student's folder has changed since the run's first export."""
    model, kept = student_folder(recipe, run), run.path / "base.json"
    if kept.exists() and json.loads(kept.read_bytes())["base"] != model_digest(model):
        raise student_changed_error(model, run)


def student_changed_error(model: Path, run: RunDir) -> TapirError:
    """The error for a student folder whose files changed after the run's first round."""
    return TapirError(
        f"the student's weights, config or tokenizer, or the gguf package, have changed since run {run.name!r} began",
        where=str(model),
        fix=f"Restore them, or train again from them: tapir-local redo {run.name} --round 0 --from train",
    )


def base_gguf(recipe: Recipe, run: RunDir, progress: Progress | None = None) -> Path:
    """The untrained student as a GGUF of the recipe's quant, exported and verified once for all runs of the cache."""
    model, form = student_folder(recipe, run), recipe.export.quant + ("-converter" if recipe.export.converter else "")
    path = base_gguf_path(run.cache, model_digest(model), form)
    if not is_base_ready(path):
        return make_base_gguf(model, path, recipe, progress)
    check_base_gguf(path)
    return path


def base_gguf_path(cache: Path, name: str, form: str) -> Path:
    """Path of a base GGUF, by the digest of its model and the type of its weights."""
    return cache / "base" / name / f"{form}.gguf"


def is_base_ready(path: Path) -> bool:
    """Whether a base GGUF is complete: its fingerprint file exists."""
    return path.exists() and fingerprint_path(path).exists()


def fingerprint_path(path: Path) -> Path:
    """The file that records the size and fingerprint of a base GGUF that passed the gate."""
    return path.with_name(path.name + ".json")


def make_base_gguf(model: Path, path: Path, recipe: Recipe, progress: Progress | None) -> Path:
    """Export and verify a base GGUF; runs that need the same one wait for each other."""
    from filelock import FileLock

    private_folder(path.parent.parent)  # cache/base
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.parent / ".lock"), withhold_variables(recipe.key_variables):
        if not is_base_ready(path):
            remove_path(path)
            config = ExportConfig(
                recipe.export.quant, converter=converter_path(recipe), min_agreement=recipe.export.min_agreement
            )
            export_with_gate(str(model), path, config, progress)
            write_json(fingerprint_path(path), {"bytes": path.stat().st_size, "print": fingerprint([path])})
    check_base_gguf(path)
    return path


def check_base_gguf(path: Path) -> None:
    """Raise TapirError if the size or fingerprint of a base GGUF is not that of the file that passed the gate."""
    kept = json.loads(fingerprint_path(path).read_bytes())
    if (path.stat().st_size, fingerprint([path])) != (kept["bytes"], kept["print"]):
        raise TapirError(
            "the base GGUF is not the file that passed the gate: it was damaged or replaced",
            where=str(path),
            fix="Delete it; the same command creates it again.",
        )


def model_digest(model: Path) -> str:
    """Sixteen hexadecimal digits that identify a model's folder, the export format and the version of gguf.

    Config, tokenizer and template are hashed in full. Of each weight file, the name, the size and FINGERPRINT_PIECES
    pieces are hashed, including the header: training changes every weight, so any piece differs in another model of the
    same shape, and gigabytes need not be read. A file that differs only between the pieces is taken as the same; the
    gate compares the outputs of both models.
    """
    small = sorted({path for pattern in HASHED_FILES for path in model.glob(pattern)})
    found = hashlib.sha256(f"{BASE_FORMAT} gguf {version('gguf')}".encode())
    for path in small:
        found.update(f"\0{path.name}\0".encode() + path.read_bytes())
    found.update(fingerprint(sorted(model.glob("*.safetensors"))).encode())
    return found.hexdigest()[:16]


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 of names, sizes and evenly spaced pieces of some files, including the first and the last piece."""
    found = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        found.update(f"\0{path.name} {size}\0".encode())
        with path.open("rb") as file:
            for number in range(FINGERPRINT_PIECES):
                file.seek(max(0, size - PIECE_BYTES) * number // (FINGERPRINT_PIECES - 1))
                found.update(file.read(PIECE_BYTES))
    return found.hexdigest()


def gate_memory_text(model: Path) -> str:
    """The main memory that the gate needs, and the free memory."""
    needed, free = format_bytes(4 * count_weights(model)), format_bytes(free_memory())
    return f"the model in 32 bits needs {needed} of memory, {free} are free"


def count_weights(model: Path) -> int:
    """The number of a model's weights."""
    return sum(prod(source.shape) for source in model_weights(model).values())
