"""Export a model's folder, with or without an adapter, to a GGUF that has passed the gate."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.export.export import ExportJob, run_export
from tapir_local.export.gate import GateJob, GateReport, run_gate
from tapir_local.files import atomic_write, check_output, read_record, remove_path, write_rows
from tapir_local.inference.model import check_gguf
from tapir_local.records import Progress
from tapir_local.resources import find_model_folder, read_chat_template

# Files that may be written beside the GGUF: during the export, by the gate, and for Ollama.
COMPANION_SUFFIXES = (".work", ".unchecked", ".unchecked.partial", ".unchecked.gate", ".gate.json", ".Modelfile")


NAME_ANOTHER = "Choose another name, or replace this file with --force."


@dataclass(frozen=True)
class ExportConfig:
    """How to export a model: the type of the weights, the adapter, and what to verify.

    With `adapter_only`, only the adapter is exported, and verified on top of `base`, the model's GGUF. `converter` is
    llama.cpp's script. `check` runs the gate, with `min_agreement` instead of its default. `force` replaces `out`.
    """

    quant: str
    adapter: Path | None = None
    adapter_only: bool = False
    base: Path | None = None
    converter: Path | None = None
    check: bool = True
    min_agreement: float | None = None
    force: bool = False


def export_with_gate(
    model: str, out: Path, config: ExportConfig, progress: Progress | None = None
) -> GateReport | None:
    """Write `out` and the gate's report beside it (`<out>.gate.json`), which is also returned; None if `check` is off.

    The file gets its name only after it passes: until then, or if it fails, it is `<out>.unchecked`, and `<out>.work`
    contains logs and the report. Raises TapirError if the model, the adapter or the quant cannot be used, the file
    exists or is one of the inputs, or the gate fails.
    """
    adapter, base = config.adapter, config.base
    check_output(
        out,
        [Path(model), adapter, base, config.converter],
        beside=COMPANION_SUFFIXES,
        force=config.force,
        fix=NAME_ANOTHER,
    )
    if config.adapter_only:
        check_adapter_options(adapter, base, config.check)
        refuse_unused({"--converter": config.converter}, "the converter makes a whole model, not an adapter alone")
    else:
        refuse_unused({"--base": base}, "a whole model is verified by itself, not on a base")
    folder, work = find_model_folder(model), out.with_name(out.name + ".work")
    written = out.with_name(out.name + ".unchecked")
    try:
        job = ExportJob(folder, written, config.quant, adapter, config.adapter_only, config.converter)
        run_export(job, work, progress)
    except TapirError as error:
        if str(work) not in str(error):  # the error does not refer to a log there
            shutil.rmtree(work, ignore_errors=True)
        raise
    report = None
    if config.check:
        path, on_top = out.with_name(out.name + ".gate.json"), written if config.adapter_only else None
        rows = adapter_training_rows(adapter, work)
        run_gate(GateJob(folder, base or written, rows, path, config.min_agreement, adapter, on_top), work, progress)
        report = read_record(GateReport, path)
    written.rename(out)
    shutil.rmtree(work)
    return report


@contextmanager
def model_with_template(model: str, template: str | None) -> Iterator[str]:
    """The model's folder or Hub name or, inside the block, a folder of links with another chat template.

    `template` is a Jinja file or the name of a shipped template. Raises TapirError if it does not exist.
    """
    if template is None:
        yield model
        return
    text, folder = read_chat_template(template), find_model_folder(model)
    with tempfile.TemporaryDirectory() as place:
        view = Path(place) / (folder.resolve().name or "model")
        make_template_view(folder, text, view)
        yield str(view)


def make_template_view(model: Path, template: str, view: Path) -> None:
    """Make `view` a folder of links to a model's files, with another chat template."""
    remove_path(view)
    with atomic_write(view) as folder:
        folder.mkdir()
        for file in model.iterdir():
            if file.is_file() and file.name != "chat_template.jinja":
                (folder / file.name).symlink_to(file.absolute())
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def adapter_training_rows(adapter: Path | None, work: Path) -> Path:
    """The rows that an adapter was trained on, if it is in the folder of a run's round; otherwise an empty file."""
    if adapter is not None and (adapter / "resolved.json").is_file():  # an adapter from a run
        rows = adapter.absolute().parent / "train.jsonl"
        if rows.is_file():
            return rows
    write_rows(work / "rows.jsonl", [])
    return work / "rows.jsonl"


def refuse_unused(given: Mapping[str, object], why: str) -> None:
    """Raise TapirError if an option is given that the command would not use."""
    for name, value in given.items():
        if value is not None:
            raise TapirError(f"the option has no effect here: {why}", where=name, fix="Remove it.")


def check_adapter_options(adapter: Path | None, base: Path | None, check: bool) -> None:
    """Raise TapirError unless an adapter is given, with the base GGUF to verify it on."""
    if adapter is None:
        raise TapirError("there is no adapter to export", where="--adapter-only", fix="Give its folder with --adapter.")
    if check and base is None:
        raise TapirError(
            "an adapter alone is verified on its base GGUF, but none is given",
            where="--adapter-only",
            fix="Give it with --base (`tapir-local export MODEL BASE.gguf` makes it), or skip the gate with --no-gate.",
        )
    if not check:
        refuse_unused({"--base": base}, "with --no-gate nothing is verified on it")
    if check and base is not None:
        check_gguf(base, "base GGUF", "Make it with `tapir-local export MODEL BASE.gguf`.")
