"""A model's folder, with or without an adapter, to a GGUF that has passed the gate: what a person asks for by hand."""

import shutil
from pathlib import Path

from tapir_local.assets import model_folder
from tapir_local.errors import TapirError
from tapir_local.export import ExportJob, export
from tapir_local.gate import GateJob, GateReport, pass_gate
from tapir_local.process import Progress
from tapir_local.recipe import Export
from tapir_local.rundir import read_record, write_rows


def export_checked(
    model: str, out: Path, *, adapter: Path | None, quant: str, check: bool, progress: Progress | None = None
) -> GateReport | None:
    """Write `out` and, beside it, the gate's report (`<out>.gate.json`); None where `check` is off.

    The file has its name only once it has passed: until then, and for good where it fails, it is `<out>.unchecked`,
    and `<out>.work` has logs and the report. TapirError where the model, the adapter or the quant will not do, the
    file is there already, or the gate is not passed.
    """
    if out.exists():
        raise TapirError("the file is there already", where=str(out), fix="Name another, or delete it first.")
    folder, work = model_folder(model), out.with_name(out.name + ".work")
    written = out.with_name(out.name + ".unchecked")
    export(ExportJob(folder, written, quant, adapter), work, progress)
    report = None
    if check:
        write_rows(work / "rows.jsonl", [])
        kept = out.with_name(out.name + ".gate.json")
        pass_gate(GateJob(folder, written, work / "rows.jsonl", kept, Export().min_agreement, adapter), work, progress)
        report = read_record(GateReport, kept)
    written.rename(out)
    shutil.rmtree(work)
    return report
