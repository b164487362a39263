"""The gate on published weights: divergence and agreement of every quant, untrained and after a short training.

    python bench/gate.py --folder DIR --rows alpaca.json MODEL.gguf [MODEL.gguf ...] [--quants f16 q8_0 q4_k_m]

Each GGUF is made into the folder that is trained (as `student.path: MODEL.gguf` does), a LoRA of --steps steps of 8
rows is trained on the first rows, and both are exported in each quant and compared with transformers. A base model
without a chat template gets a plain one. Prints Markdown: the figures beside the gate's limits. The answers compared
are the model's own to the gate's prompts, 8 of them from rows that were not trained on. Finished lines are kept in
DIR/gate.jsonl, and the bench resumes.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tapir_local.data.dataset import require_seeds
from tapir_local.data.files import read_path
from tapir_local.errors import TapirError
from tapir_local.export.base import gguf_student_folder
from tapir_local.export.export import export_gguf
from tapir_local.export.gate import verify_gguf
from tapir_local.export.gated_export import make_template_view
from tapir_local.files import write_rows
from tapir_local.inference.model import read_gguf_template
from tapir_local.recipe.schema import Train
from tapir_local.records import Example
from tapir_local.resources import read_chat_template
from tapir_local.training.job import TrainJob
from tapir_local.training.train import run_training

SETTINGS = Train(epochs=1, learning_rate=5e-4, batch_size=8, micro_batch_size=4, lora_rank=16, lora_alpha=16)


def examples(path: Path) -> list[Example]:
    """The rows of a seed file that have an answer, not the longest."""
    found = require_seeds(read_path(path), ())[0]
    return [row for row in found if row.completion and len(row.prompt[-1].content) + len(row.completion) < 1200]


def student_folder(gguf: Path, folder: Path, template: str) -> Path:
    """The folder that is trained, with a chat template of ours where the GGUF has none."""
    try:
        read_gguf_template(gguf)
    except TapirError:
        view = folder / f"{gguf.stem}-template"
        make_template_view(
            gguf_student_folder(gguf, folder / "cache", template=False), read_chat_template(template), view
        )
        return view
    return gguf_student_folder(gguf, folder / "cache")


def train(model: Path, rows: list[Example], folder: Path, steps: int) -> Path:
    """An adapter after so many steps of 8 rows; made once."""
    adapter = folder / "adapter"
    if not adapter.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "train.jsonl", rows[: steps * SETTINGS.batch_size])
        run_training(TrainJob(str(model), folder / "train.jsonl", adapter, SETTINGS, 512, 1), folder / "train")
    return adapter


def exchange(reader: Any, first: str, second: str) -> None:
    """Exchange the data of two tensors of one shape and type."""
    known = {tensor.name: tensor.data for tensor in reader.tensors}
    kept = known[first].copy()
    known[first][:], known[second][:] = known[second], kept


def turn_heads(reader: Any) -> None:
    """Give the queries of one layer the other order of rotary halves: rows 0, 1, 2, … become 0, half, 1, …"""
    heads = int(reader.get_field("llama.attention.head_count").contents())
    data = next(tensor.data for tensor in reader.tensors if tensor.name == "blk.8.attn_q.weight")
    rows = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
    data[:] = rows.swapaxes(1, 2).reshape(data.shape).copy()


def set_number(reader: Any, key: str, value: float) -> None:
    """Overwrite a number of the metadata."""
    field = reader.get_field(key)
    field.parts[field.data[0]][0] = value


def exchange_tokens(reader: Any) -> None:
    """Exchange two tokens of the same length in the vocabulary: ` the` and ` and`."""
    field = reader.get_field("tokenizer.ggml.tokens")
    places = {bytes(field.parts[number]): field.parts[number] for number in field.data}
    first, second = places["Ġthe".encode()], places["Ġand".encode()]
    kept = first.copy()
    first[:], second[:] = second, kept


PLANTS: dict[str, Callable[[Any], None]] = {
    "two layers' ffn_up exchanged": lambda reader: exchange(reader, "blk.8.ffn_up.weight", "blk.9.ffn_up.weight"),
    "rotary order of one layer's queries": turn_heads,
    "another RMS epsilon, 1e-3": lambda reader: set_number(reader, "llama.attention.layer_norm_rms_epsilon", 1e-3),
    "rotary base a tenth": lambda reader: set_number(reader, "llama.rope.freq_base", 1e4),
    "two tokens exchanged": exchange_tokens,
}


def plant(gguf: Path, out: Path, change: Callable[[Any], None]) -> None:
    """A copy of a GGUF with a fault in it."""
    from gguf import GGUFReader

    shutil.copyfile(gguf, out)
    reader = GGUFReader(out, "r+")
    change(reader)
    reader.data.flush()


def measure(model: Path, adapter: Path | None, gguf: Path, rows: list[Example]) -> dict[str, Any]:
    """The gate's report on one file, and its seconds."""
    began = time.monotonic()
    report = verify_gguf(model, adapter, gguf, rows)
    return {**asdict(report), "examples": [], "seconds": time.monotonic() - began}


class Table:
    """The measured lines, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.lines = dict(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())

    def add(self, name: str, measured: Callable[[], dict[str, Any]]) -> None:
        """Measure a line unless it is known."""
        if name not in self.lines:
            self.lines[name] = measured()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, self.lines[name]]) + "\n")


@dataclass(frozen=True)
class Exported:
    """A model, its adapter, one quant, and where its GGUF is written."""

    name: str
    model: Path
    adapter: Path | None
    quant: str
    gguf: Path

    def check(self, rows: list[Example]) -> dict[str, Any]:
        """Export and measure."""
        if not self.gguf.exists():
            export_gguf(self.model, self.gguf, adapter=self.adapter, quant=self.quant)
        return measure(self.model, self.adapter, self.gguf, rows)

    def check_faulty(self, change: Callable[[Any], None], rows: list[Example]) -> dict[str, Any]:
        """Measure a copy with a fault."""
        faulty = self.gguf.with_name("faulty.gguf")
        plant(self.gguf, faulty, change)
        return measure(self.model, self.adapter, faulty, rows)


def measure_model(path: Path, rows: list[Example], options: argparse.Namespace, table: Table) -> None:
    """All lines of one model."""
    probes = [*rows[:4], *rows[-8:]]
    folder = options.folder / path.stem
    model = student_folder(path, options.folder, options.template)
    trained = train(model, rows, folder, options.steps)
    for quant in options.quants:
        bare = Exported(path.stem, model, None, quant, folder / f"{quant}.gguf")
        ours = Exported(path.stem, model, trained, quant, folder / f"{quant}-trained.gguf")
        for state, exported in (("untrained", bare), ("trained", ours)):
            table.add(f"{path.stem} | {state} | {quant}", partial(exported.check, probes))
        if options.plant:
            for name, change in PLANTS.items():
                table.add(f"{path.stem} | fault: {name} | {quant}", partial(ours.check_faulty, change, probes))
            left_out = partial(measure, model, trained, bare.gguf, probes)
            table.add(f"{path.stem} | fault: adapter left out | {quant}", left_out)
        for exported in (bare, ours):
            exported.gguf.unlink(missing_ok=True)


def show(known: dict[str, dict[str, Any]]) -> None:
    """The table as Markdown."""
    print("\n| model | state | quant | bits a weight | divergence, nats | limit | agreement | limit | failed | s |")
    print("|" + "---|" * 10)
    for name, report in known.items():
        figures = report["figures"]
        print(
            f"| {name} | {report['bits_per_weight']:.2f} | {figures['kl']:.2g} | {report['max_kl']:g} "
            f"| {figures['agreement']:.1%} of {figures['positions']} | {report['min_agreement']:.0%} "
            f"| {', '.join(report['failed']) or 'none'} | {report['seconds']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="a seed file with answers")
    parser.add_argument("--quants", nargs="+", default=["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"])
    parser.add_argument("--steps", type=int, default=4, help="training steps of 8 rows")
    parser.add_argument("--template", default="alpaca", help="for a base model without one")
    parser.add_argument("--plant", action="store_true", help="also plant faults in the trained model's files (a Llama)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    table, rows = Table(options.folder / "gate.jsonl"), examples(options.rows)
    for path in options.models:
        measure_model(path, rows, options, table)
    show(table.lines)


if __name__ == "__main__":
    main()
