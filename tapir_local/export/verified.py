"""A model's folder, with or without an adapter, to a GGUF that has passed the gate: what a person asks for by hand."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.export.export import ExportJob, export
from tapir_local.export.gate import GateJob, GateReport, pass_gate
from tapir_local.files import check_output, read_record, write_rows
from tapir_local.inference.model import check_gguf
from tapir_local.records import Progress
from tapir_local.resources import find_model_folder, read_chat_template
from tapir_local.training.student import view_with_template

# What may be written beside the GGUF: while it is made, by the gate, and for Ollama.
BESIDE = (".work", ".unchecked", ".unchecked.partial", ".gate.json", ".Modelfile")


def export_checked(
    model: str,
    out: Path,
    *,
    adapter: Path | None,
    quant: str,
    check: bool,
    base: Path | None = None,
    adapter_only: bool = False,
    converter: Path | None = None,
    min_agreement: float | None = None,
    progress: Progress | None = None,
) -> GateReport | None:
    """Write `out` and, beside it, the gate's report (`<out>.gate.json`); None where `check` is off.

    With `adapter_only` it is the adapter's GGUF, which is checked over `base`, the model's. The file has its name only
    once it has passed: until then, and for good where it fails, it is `<out>.unchecked`, and `<out>.work` has logs and
    the report. TapirError where the model, the adapter or the quant will not do, the file is there already or is one
    that is read, or the gate is not passed.
    """
    check_output(out, [Path(model), adapter, base, converter], beside=BESIDE)
    if adapter_only:
        check_pair(adapter, base, check)
        refuse_unused({"--converter": converter}, "a whole model is converted, not an adapter alone")
    else:
        refuse_unused({"--base": base}, "a whole model is checked itself, not over a base")
    folder, work = find_model_folder(model), out.with_name(out.name + ".work")
    written = out.with_name(out.name + ".unchecked")
    try:
        export(ExportJob(folder, written, quant, adapter, adapter_only, converter), work, progress)
    except TapirError as error:
        if str(work) not in str(error):  # it does not send the user to a log there
            shutil.rmtree(work, ignore_errors=True)
        raise
    report = None
    if check:
        kept, over = out.with_name(out.name + ".gate.json"), written if adapter_only else None
        job = GateJob(folder, base or written, trained_rows(adapter, work), kept, min_agreement, adapter, over)
        pass_gate(job, work, progress)
        report = read_record(GateReport, kept)
    written.rename(out)
    shutil.rmtree(work)
    return report


@contextmanager
def with_template(model: str, template: str | None) -> Iterator[str]:
    """The model's folder or Hub name, or for as long as the block lasts a folder of links with another chat template.

    `template` is a Jinja file or the name of one that comes with the program. TapirError where there is none.
    """
    if template is None:
        yield model
        return
    text, folder = read_chat_template(template), find_model_folder(model)
    with tempfile.TemporaryDirectory() as place:
        view = Path(place) / (folder.resolve().name or "model")
        view_with_template(folder, text, view)
        yield str(view)


def trained_rows(adapter: Path | None, work: Path) -> Path:
    """The rows that an adapter was trained on, where it lies in a run's round; an empty file otherwise."""
    if adapter is not None and (adapter / "resolved.json").is_file():  # an adapter of ours
        rows = adapter.absolute().parent / "train.jsonl"
        if rows.is_file():
            return rows
    write_rows(work / "rows.jsonl", [])
    return work / "rows.jsonl"


def refuse_unused(given: Mapping[str, object], why: str) -> None:
    """TapirError where a setting is given that the command would not use."""
    for name, value in given.items():
        if value is not None:
            raise TapirError(f"it is of no use here: {why}", where=name, fix="Leave it out.")


def check_pair(adapter: Path | None, base: Path | None, check: bool) -> None:
    """TapirError unless an adapter alone is named, with the base that it is to be checked over."""
    if adapter is None:
        raise TapirError("there is no adapter to write", where="--adapter-only", fix="Name its folder with --adapter.")
    if check and base is None:
        raise TapirError(
            "an adapter alone is checked over its base as a GGUF, and none is named",
            where="--adapter-only",
            fix="Name it with --base (`tapir-local export MODEL BASE.gguf` makes it), or do without: --no-gate.",
        )
    if not check:
        refuse_unused({"--base": base}, "nothing is checked over it with --no-gate")
    if check and base is not None:
        check_gguf(base, "base's GGUF", "Make it with `tapir-local export MODEL BASE.gguf`.")
