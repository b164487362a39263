"""Fine-tuning a tiny random Llama: which rows are used, what is learned, what is saved, and what is refused."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from models import make_model, make_tokenizer
from training_rows import SETTINGS, UNSLOTH_CHANGES, examples, log, losses
from training_rows import resolved as settled

from tapir_local.errors import TapirError
from tapir_local.files import write_rows
from tapir_local.process import run_module
from tapir_local.recipe.text import parse_recipe
from tapir_local.records import Message, from_json, to_json
from tapir_local.run_dir import RunDir
from tapir_local.stages.backends import export_backend, gate_backend
from tapir_local.training.job import TrainJob
from tapir_local.training.model import choose_backend, linear_layer_names
from tapir_local.training.train import run_training, train_student

FULL = SETTINGS.model_copy(update={"method": "full", "learning_rate": 1e-3})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    write_rows(path, examples(32))
    return path


@pytest.fixture
def job(base, rows, tmp_path) -> TrainJob:
    return TrainJob(str(base), rows, tmp_path / "adapter", SETTINGS, 128, 7)


@pytest.fixture(scope="module")
def trained(base, rows, tmp_path_factory) -> Path:
    """An adapter trained in its own process."""
    folder = tmp_path_factory.mktemp("trained")
    job = TrainJob(str(base), rows, folder / "adapter", SETTINGS, 128, 7)
    seen: list[tuple[int, int, str]] = []
    run_training(job, folder, lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [*((n, 8) for n in range(1, 9)), (8, 8)]
    assert seen[-1][2].endswith("32 rows trained")
    return folder / "adapter"


def test_a_job_survives_its_file(job):
    assert from_json(TrainJob, to_json(job)) == job


def test_the_loss_falls_and_the_log_says_how(trained):
    found = losses(trained)
    assert len(found) == 8
    assert found[-1] < found[0] - 0.5
    steps = log(trained)
    assert steps[0].keys() >= {"step", "loss", "learning_rate", "tokens", "seconds"}
    assert steps[-1]["learning_rate"] < steps[2]["learning_rate"]
    assert all(step["peak_memory"] > 1e7 and step["tokens_per_second"] > 0 for step in steps)
    assert [step["micro_batch_size"] for step in steps] == [4] * 8


def test_the_folder_holds_the_adapter_and_what_it_was_made_with(trained):
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in trained.iterdir()} == weights | {"resolved.json", "train_log.jsonl"}
    resolved = json.loads((trained / "resolved.json").read_text())
    assert resolved["sft"].keys() >= UNSLOTH_CHANGES
    assert resolved["lora"]["target_modules"] == [f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v")]
    assert resolved["rows"] == {"trained": 32, "dropped": 0}
    assert resolved["versions"]["trl"]
    assert (resolved["device"], resolved["backend"]) == ("cpu", "trl")


def test_the_same_rows_and_seed_give_the_same_bytes(trained, job, tmp_path):
    train_student(job)
    for name in ("adapter_model.safetensors", "adapter_config.json", "resolved.json"):
        assert (job.out / name).read_bytes() == (trained / name).read_bytes()


def test_another_seed_gives_another_adapter(trained, base, rows, tmp_path):
    train_student(TrainJob(str(base), rows, tmp_path / "adapter", SETTINGS, 128, 8))
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() != (trained / name).read_bytes()


def test_continuing_from_an_adapter_starts_where_it_ended(trained, base, rows, tmp_path):
    train_student(TrainJob(str(base), rows, tmp_path / "adapter", SETTINGS, 128, 7, trained))
    assert losses(tmp_path / "adapter")[0] < losses(trained)[0] - 0.5


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"lora_rank": 8}, "r 4, but this training has 8"),
        ({"lora_alpha": 16}, "lora_alpha 8, but this training has 16"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(trained, base, rows, tmp_path, changed, complaint):
    settings = SETTINGS.model_copy(update=changed)
    with pytest.raises(TapirError, match=complaint):
        train_student(TrainJob(str(base), rows, tmp_path / "adapter", settings, 128, 7, trained))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_an_adapter_of_another_model_is_refused(trained, rows, tmp_path, change):
    other = make_model(tmp_path / "other", **change)
    with pytest.raises(TapirError, match="belongs to another model"):
        train_student(TrainJob(str(other), rows, tmp_path / "adapter", SETTINGS, 128, 7, trained))


def test_a_folder_without_an_adapter_is_refused(base, rows, tmp_path):
    with pytest.raises(TapirError, match="contains no adapter"):
        train_student(TrainJob(str(base), rows, tmp_path / "adapter", SETTINGS, 128, 7, tmp_path))


def test_lora_is_on_every_linear_layer_but_the_head(base):
    from transformers import AutoModelForCausalLM

    assert "lm_head" not in linear_layer_names(AutoModelForCausalLM.from_pretrained(base))


def refusals(tmp_path: Path) -> dict[str, Path]:
    """Folders that contain no student."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "weightless").mkdir()
    make_tokenizer(tmp_path / "weightless")
    (tmp_path / "weightless" / "config.json").write_text('{"model_type": "llama"}')
    make_model(tmp_path / "mute", template="{{ messages[0]['content'] }}{% if add_generation_prompt %}{% endif %}")
    make_model(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    return {name: tmp_path / name for name in ("nowhere", "empty", "weightless", "mute", "plain")}


def test_a_folder_without_a_student_is_refused_with_the_reason(rows, tmp_path):
    complaints = {
        "nowhere": "no such folder",
        "empty": "config.json is missing",
        "weightless": "model cannot be loaded",
        "mute": "chat template",
        "plain": "has no chat template",
    }
    for name, folder in refusals(tmp_path).items():
        with pytest.raises(TapirError, match=complaints[name]):
            train_student(TrainJob(str(folder), rows, tmp_path / "adapter", SETTINGS, 128, 7))
    assert not (tmp_path / "adapter").exists()


def test_rows_that_cannot_be_learned_from_are_refused(base, rows, tmp_path):
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(TapirError, match="no rows to train on"):
        train_student(TrainJob(str(base), tmp_path / "none.jsonl", tmp_path / "adapter", SETTINGS, 128, 7))
    with pytest.raises(TapirError, match=r"no row is left to train on: 32 longer than student\.max_length"):
        train_student(TrainJob(str(base), rows, tmp_path / "adapter", SETTINGS, 8, 7))


def test_settings_that_need_a_gpu_are_refused_without_one(job):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(TapirError, match="qlora needs a GPU"):
        train_student(replace(job, settings=SETTINGS.model_copy(update={"method": "qlora"})))
    with pytest.raises(TapirError, match="f16 needs a GPU"):
        train_student(replace(job, settings=SETTINGS.model_copy(update={"precision": "f16"})))
    with pytest.raises(TapirError, match="Unsloth needs a GPU"):
        train_student(replace(job, settings=SETTINGS.model_copy(update={"backend": "unsloth"})))


def test_an_error_in_the_process_reaches_the_caller_unchanged(tmp_path, base):
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(TapirError, match="no rows to train on") as caught:
        run_training(
            TrainJob(str(base), tmp_path / "none.jsonl", tmp_path / "adapter", SETTINGS, 128, 7), tmp_path / "job"
        )
    assert caught.value.where == str(tmp_path / "none.jsonl")


def test_packed_rows_do_not_attend_to_each_other(base, rows, tmp_path):
    """The first step's loss over packed rows equals that of the separate rows, and the packs contain all of them."""
    first = {}
    for packing in (False, True):
        settings = SETTINGS.model_copy(
            update={"packing": packing, "batch_size": 32, "micro_batch_size": 32, "epochs": 1}
        )
        out = tmp_path / str(packing)
        train_student(TrainJob(str(base), rows, out, settings, 128, 7))
        first[packing] = log(out)[0]
    assert settled(tmp_path / "True")["sft"]["packing"]
    assert first[True]["loss"] == pytest.approx(first[False]["loss"], abs=1e-5)
    assert first[True]["tokens"] == first[False]["tokens"]


@pytest.mark.parametrize("recompute", [True, False])
def test_gradient_checkpointing_does_not_change_the_gradients(trained, base, rows, tmp_path, recompute):
    settings = SETTINGS.model_copy(update={"gradient_checkpointing": recompute})
    train_student(TrainJob(str(base), rows, tmp_path / "adapter", settings, 128, 7))
    assert settled(tmp_path / "adapter")["sft"]["gradient_checkpointing"] is recompute
    assert losses(tmp_path / "adapter") == pytest.approx(losses(trained), abs=1e-4)


def test_bf16_on_a_cpu_learns_too(trained, base, rows, tmp_path):
    settings = SETTINGS.model_copy(update={"precision": "bf16"})
    train_student(TrainJob(str(base), rows, tmp_path / "adapter", settings, 128, 7))
    assert settled(tmp_path / "adapter")["precision"] == "bf16"
    assert losses(tmp_path / "adapter") == pytest.approx(losses(trained), abs=0.3)


@pytest.fixture(scope="module")
def whole(base, rows, tmp_path_factory) -> Path:
    """A model's folder with all weights trained."""
    out = tmp_path_factory.mktemp("whole") / "adapter"
    train_student(TrainJob(str(base), rows, out, FULL, 128, 7))
    return out


def test_full_fine_tuning_saves_a_complete_model(whole, base):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    assert not (whole / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(whole)
    before = load_file(base / "model.safetensors")
    assert not any(bool((weight == before[name]).all()) for name, weight in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(whole).chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_a_fully_trained_model_passes_export_and_gate(whole, base, rows, tmp_path):
    """As in a run: adapter/ contains the trained model, and there is no adapter."""
    recipe = parse_recipe(
        f"teacher: pocket\nstudent: {{path: {base}}}\ntrain: {{method: full}}\nexport: {{quant: f16}}", "r"
    )
    run, gguf = RunDir(tmp_path, "run"), tmp_path / "student.gguf"
    export_backend(recipe, run)(adapter=whole, out=gguf, progress=lambda done, total, note: None)
    gate_backend(recipe, run)(
        adapter=whole, gguf=gguf, rows=rows, out=tmp_path / "gate.json", progress=lambda done, total, note: None
    )
    found = json.loads((tmp_path / "gate.json").read_text())
    assert (found["failed"], found["figures"]["kl_base"]) == ([], None)


def test_full_fine_tuning_continues_from_the_last_rounds_weights(whole, base, rows, tmp_path):
    train_student(TrainJob(str(base), rows, tmp_path / "adapter", FULL, 128, 7, whole))
    assert losses(tmp_path / "adapter")[0] < losses(whole)[0] - 0.5


def test_an_earlier_training_of_another_kind_is_refused(whole, trained, base, rows, tmp_path):
    other = make_model(tmp_path / "other", num_hidden_layers=3)
    for student, settings, earlier, complaint in (
        (base, FULL, trained, "left an adapter, not a complete model"),
        (base, SETTINGS, whole, "contains no adapter"),
        (other, FULL, whole, "num_hidden_layers 2, but the student has 3"),
    ):
        with pytest.raises(TapirError, match=complaint):
            train_student(TrainJob(str(student), rows, tmp_path / "adapter", settings, 128, 7, earlier))


@pytest.mark.skipif(find_spec("unsloth") is not None, reason="Unsloth is installed")
def test_a_gpu_without_unsloth_is_reported_and_used():
    said: list[str] = []
    assert choose_backend(SETTINGS, "bf16", 1, said.append) == "trl"
    assert said == [
        "Training with TRL and PEFT instead of Unsloth: it is not installed (pip install 'tapir-local[gpu]')."
    ]
    with pytest.raises(TapirError, match="Unsloth cannot be used: it is not installed"):
        choose_backend(SETTINGS.model_copy(update={"backend": "unsloth"}), "bf16", 1, said.append)


def test_the_gguf_is_closed_after_generation(llama):
    """llama.cpp maps the file that it has open: the next training must have all the memory, and the GPU."""
    from tapir_local.inference.config import GenerationConfig
    from tapir_local.inference.generate import Callbacks, generate
    from tapir_local.inference.score import score_completions

    def is_open(*_: object) -> bool:
        return llama.gguf.name in Path("/proc/self/maps").read_text()

    prompt, seen = (Message("user", "Add 1 and 2."),), []
    generate(
        llama.gguf,
        [prompt],
        GenerationConfig(max_tokens=4, context=128),
        callbacks=Callbacks(progress=lambda *_: seen.append(is_open())),
    )
    score_completions(llama.gguf, [(prompt, "3")], context=128)
    assert any(seen)
    assert not is_open()


def test_a_damaged_job_is_named(tmp_path):
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(TapirError, match="not a TrainJob"):
        run_module("tapir_local.training.train", tmp_path, tmp_path / "log")
