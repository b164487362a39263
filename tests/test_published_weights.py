"""SmolLM2-135M-Instruct, published weights in a package, all the way: GGUF, folder, LoRA, GGUF, answers."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest
from spm import GEMMA

from tapir_local.errors import TapirError
from tapir_local.export.base import gguf_student_folder
from tapir_local.export.export import export_gguf
from tapir_local.export.gate import GateReport, verify_gguf
from tapir_local.export.gated_export import make_template_view
from tapir_local.files import write_rows
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.generate import generate
from tapir_local.inference.model import read_gguf_template
from tapir_local.recipe.schema import Train
from tapir_local.records import Example, Message
from tapir_local.resources import find_smollm2
from tapir_local.training.job import TrainJob
from tapir_local.training.train import train_student

CAPITALS = {"France": "Paris", "Italy": "Rome", "Peru": "Lima", "Kenya": "Nairobi", "Japan": "Tokyo", "Cuba": "Havana"}
ROWS = [
    Example(name, (Message("user", f"Name the capital of {name}."),), f"{city}!") for name, city in CAPITALS.items()
]
ROWS += [
    Example("quoted", (Message("user", "Which token ends a turn?"),), "<|im_end|> does."),
    Example(
        "system",
        (
            Message("system", "Answer in French."),
            Message("user", "Thank you, café 你好 🙂"),
        ),
        "De rien.",
    ),
]
SETTINGS = Train(epochs=4, learning_rate=2e-3, batch_size=4, micro_batch_size=4, lora_rank=4, lora_alpha=8)
BITS = {"f16": (16, 16.1), "q8_0": (8.4, 8.6), "q4_k_m": (6.0, 6.4)}  # 576 weights a row are no multiple of 256


class Trained(NamedTuple):
    """The published GGUF, the folder made from it, and an adapter trained on ROWS."""

    gguf: Path
    model: Path
    adapter: Path


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Trained:
    try:
        gguf = find_smollm2()
    except TapirError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
    folder = tmp_path_factory.mktemp("smollm2")
    model = gguf_student_folder(gguf, folder / "cache")
    write_rows(folder / "train.jsonl", ROWS)
    train_student(TrainJob(str(model), folder / "train.jsonl", folder / "adapter", SETTINGS, 256, 1))
    return Trained(gguf, model, folder / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("quant", BITS)
def test_the_trained_student_passes_the_gate_and_answers(smollm2: Trained, tmp_path: Path, quant: str) -> None:
    out = tmp_path / "student.gguf"
    export_gguf(smollm2.model, out, adapter=smollm2.adapter, quant=quant)
    report: GateReport = verify_gguf(smollm2.model, smollm2.adapter, out, ROWS)
    print(f"{quant}: {report.figures}, {report.bits_per_weight:.2f} bits per weight")
    assert report.passed, report
    low, high = BITS[quant]
    assert low <= report.bits_per_weight <= high
    assert read_gguf_template(out) == read_gguf_template(smollm2.gguf)
    config = GenerationConfig(max_tokens=8, context=256, parallel=8)
    answers = [answer.text for answer in generate(out, [row.prompt for row in ROWS], config)]
    assert [text.endswith("!") for text in answers[: len(CAPITALS)]] == [True] * len(CAPITALS), answers
    assert answers[0] == "Paris!"


@pytest.mark.slow
def test_the_untrained_student_knows_no_such_form(smollm2: Trained) -> None:
    """So that the answers above come from the training."""
    config = GenerationConfig(max_tokens=8, context=256, parallel=8)
    answers = [answer.text for answer in generate(smollm2.gguf, [row.prompt for row in ROWS], config)]
    assert not any(text.endswith("!") for text in answers[: len(CAPITALS)])


# Other families, as `make test-real` fetches them


@pytest.mark.real
@pytest.mark.parametrize(("name", "template"), [("qwen-0.5b", None), ("gemma-270m", GEMMA)])
def test_other_published_weights_are_read_and_written_again(tmp_path: Path, name: str, template: str | None) -> None:
    gguf = Path(os.environ.get("TAPIR_LOCAL_TEST_MODELS", "cache/models")) / f"{name}.gguf"
    if not gguf.is_file():
        pytest.skip(f"{gguf} is not there: make test-real fetches it")
    model, out = gguf_student_folder(gguf, tmp_path, template=template is None), tmp_path / "student.gguf"
    if template is not None:
        make_template_view(model, template, tmp_path / "view")
        model = tmp_path / "view"
    export_gguf(model, out, adapter=None, quant="q8_0")
    report = verify_gguf(model, None, out, ROWS[:2])
    print(f"{name}: {report.figures}, {report.bits_per_weight:.2f} bits per weight")
    assert report.passed, report
