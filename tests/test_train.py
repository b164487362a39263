"""Fine-tuning a tiny random Llama: what is learned from, what is learned, what is stored, and what is refused."""

import json
import os
import random
import signal
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from models import make_model, make_tokenizer

from tapir_local.errors import TapirError
from tapir_local.footprint import activation_bytes
from tapir_local.lora import Hardware, linear_names
from tapir_local.process import run_module
from tapir_local.recipe import Train
from tapir_local.records import Example, Message, from_json, to_json
from tapir_local.rundir import write_rows
from tapir_local.sft import MASKED, TrainJob, sft_arguments, split_batch, token_rows
from tapir_local.train import run_job, train

# What unsloth 2026.10.9 changes of SFTConfig's defaults (trl 1.15), found by importing both side by side.
UNSLOTH_CHANGES = {
    "optim", "gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "learning_rate", "warmup_steps", "weight_decay", "seed", "logging_steps", "padding_free", "bf16",
    "logging_nan_inf_filter", "torch_empty_cache_steps",
}  # fmt: skip
SETTINGS = Train(learning_rate=5e-3, batch_size=8, micro_batch_size=4, lora_rank=4, lora_alpha=8, warmup=0.1)
CPU = Hardware("cpu", "trl", "f32", 8 << 30)


def examples(number: int) -> list[Example]:
    """Sums to learn by heart, of several lengths."""
    chance = random.Random("sums")
    sums = [[chance.randint(1, 9) for _ in range(chance.randint(2, 5))] for _ in range(number)]
    return [
        Example(str(n), (Message("user", f"Add {' + '.join(map(str, terms))}."),), f"The sum is {sum(terms)}.")
        for n, terms in enumerate(sums)
    ]


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
    """An adapter from a process of its own."""
    folder = tmp_path_factory.mktemp("trained")
    job = TrainJob(str(base), rows, folder / "adapter", SETTINGS, 128, 7)
    seen: list[tuple[int, int, str]] = []
    train(job, folder, lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [*((n, 8) for n in range(1, 9)), (8, 8)]
    assert seen[-1][2].endswith("32 rows trained")
    return folder / "adapter"


def losses(adapter: Path) -> list[float]:
    entries = map(json.loads, (adapter / "train_log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_a_job_survives_its_file(job):
    assert from_json(TrainJob, to_json(job)) == job


def test_exactly_the_prompt_is_masked_and_the_end_of_turn_is_learned(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    rows = examples(5)
    for row, tokens in zip(rows, token_rows(rows, tokenizer, 128).rows, strict=True):
        turns = [asdict(turn) for turn in row.prompt]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        learned = [label for label in tokens["labels"] if label != MASKED]
        masked = tokens["input_ids"][: -len(learned)]
        assert tokens["labels"] == [MASKED] * len(masked) + learned
        assert tokens["input_ids"] == masked + learned
        assert tokenizer.decode(masked) == asked
        assert tokenizer.decode(learned) == f"{row.completion}<|im_end|>\n"
        assert masked == tokenizer(asked, add_special_tokens=False)["input_ids"]


def test_a_long_completion_loses_its_end_and_a_long_prompt_its_row(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    short, long = examples(2)
    answer = Example("a", short.prompt, "1 2 3 4 5 6 7 8 9 " * 20)
    question = Example("b", (Message("user", "1 2 3 4 5 6 7 8 9 " * 20),), "No.")
    tokens = token_rows([short, answer, question, long], tokenizer, 64)
    assert tokens.counts == {"trained": 3, "cut": 1, "dropped": 1}
    assert str(tokens) == "3 rows trained, 1 rows cut, 1 rows dropped"
    cut = tokens.rows[1]
    assert len(cut["input_ids"]) == len(cut["labels"]) == 64
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in cut["labels"]
    assert end in tokens.rows[0]["labels"]


def test_a_token_across_the_boundary_leaves_the_prompt_as_it_is_asked(tmp_path):
    template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(tmp_path, template=template)
    (tokens,) = token_rows([Example("a", (Message("user", "The qui"),), "ck")], tokenizer, 64).rows
    learned = [label for label in tokens["labels"] if label != MASKED]
    assert tokenizer.decode(learned) == "ck<|im_end|>"
    assert len(tokenizer("The quick")["input_ids"]) < len(tokens["input_ids"]) - 1


def test_the_loss_falls_and_the_log_says_how(trained):
    found = losses(trained)
    assert len(found) == 8
    assert found[-1] < found[0] - 0.5
    *steps, end = map(json.loads, (trained / "train_log.jsonl").read_text().splitlines())
    assert steps[0].keys() >= {"step", "loss", "learning_rate", "tokens", "tokens_per_second", "seconds"}
    assert steps[-1]["learning_rate"] < steps[2]["learning_rate"]
    assert end["peak_memory"] > 1e7


def test_the_folder_holds_the_adapter_and_what_it_was_made_with(trained):
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in trained.iterdir()} == weights | {"resolved.json", "train_log.jsonl"}
    resolved = json.loads((trained / "resolved.json").read_text())
    assert resolved["sft"].keys() >= UNSLOTH_CHANGES
    assert resolved["lora"]["target_modules"] == [f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v")]
    assert resolved["rows"] == {"trained": 32, "cut": 0, "dropped": 0}
    assert resolved["versions"]["trl"]
    assert (resolved["device"], resolved["backend"]) == ("cpu", "trl")


def test_the_same_rows_and_seed_give_the_same_bytes(trained, job, tmp_path):
    run_job(job)
    for name in ("adapter_model.safetensors", "adapter_config.json", "resolved.json"):
        assert (job.out / name).read_bytes() == (trained / name).read_bytes()


def test_another_seed_gives_another_adapter(trained, base, rows, tmp_path):
    run_job(TrainJob(str(base), rows, tmp_path / "adapter", SETTINGS, 128, 8))
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() != (trained / name).read_bytes()


def test_going_on_from_an_adapter_begins_where_that_ended(trained, base, rows, tmp_path):
    run_job(TrainJob(str(base), rows, tmp_path / "adapter", SETTINGS, 128, 7, trained))
    assert losses(tmp_path / "adapter")[0] < losses(trained)[0] - 0.5


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [({"lora_rank": 8}, "r 4, this training 8"), ({"lora_alpha": 16}, "lora_alpha 8, this training 16")],
)
def test_an_adapter_of_another_shape_is_refused(trained, base, rows, tmp_path, changed, complaint):
    settings = SETTINGS.model_copy(update=changed)
    with pytest.raises(TapirError, match=complaint):
        run_job(TrainJob(str(base), rows, tmp_path / "adapter", settings, 128, 7, trained))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_an_adapter_of_another_model_is_refused(trained, rows, tmp_path, change):
    other = make_model(tmp_path / "other", **change)
    with pytest.raises(TapirError, match="of another model"):
        run_job(TrainJob(str(other), rows, tmp_path / "adapter", SETTINGS, 128, 7, trained))


def test_a_folder_without_an_adapter_is_refused(base, rows, tmp_path):
    with pytest.raises(TapirError, match="holds no adapter"):
        run_job(TrainJob(str(base), rows, tmp_path / "adapter", SETTINGS, 128, 7, tmp_path))


def test_all_that_unsloth_changes_is_written_out(job):
    for hardware in (CPU, Hardware("cuda", "unsloth", "bf16", 80 << 30)):
        assert sft_arguments(job, hardware, 100).keys() >= UNSLOTH_CHANGES


def test_the_arguments_are_those_of_the_library(job, tmp_path):
    from trl import SFTConfig

    config = SFTConfig(output_dir=str(tmp_path), **sft_arguments(job, CPU, 32))
    assert (config.bf16, config.use_cpu, config.seed, config.optim) == (False, True, 7, "adamw_torch_fused")
    assert config.get_warmup_steps(8) == 1


def test_a_gpu_trains_in_its_best_precision(job):
    gpus = (Hardware("cuda", "trl", precision, 80 << 30) for precision in ("bf16", "f16"))
    bf16, f16 = (sft_arguments(job, gpu, 32) for gpu in gpus)
    assert (bf16["bf16"], bf16["fp16"], bf16["use_cpu"]) == (True, False, False)
    assert (f16["bf16"], f16["fp16"]) == (False, True)


@pytest.mark.parametrize(
    ("batch", "micro", "expected"),
    [(16, 4, (4, 4)), (16, 16, (16, 1)), (16, 32, (16, 1)), (10, 4, (2, 5)), (7, 4, (1, 7))],
)
def test_a_batch_is_split_without_changing_its_size(batch, micro, expected):
    assert split_batch(batch, micro) == expected


def test_activations_of_a_7b_student_need_checkpointing_on_24_gib_and_not_the_pocket_ones():
    assert activation_bytes(32, 4096, 32000, 4 * 2048) > 24 << 30
    assert activation_bytes(6, 224, 800, 16 * 128) < 1 << 30


def test_lora_is_on_every_linear_layer_but_the_head(base):
    from transformers import AutoModelForCausalLM

    assert "lm_head" not in linear_names(AutoModelForCausalLM.from_pretrained(base))


def refusals(tmp_path: Path) -> dict[str, Path]:
    """Folders that are no student."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "weightless").mkdir()
    make_tokenizer(tmp_path / "weightless")
    (tmp_path / "weightless" / "config.json").write_text('{"model_type": "llama"}')
    make_model(tmp_path / "mute", template="{{ messages[0]['content'] }}{% if add_generation_prompt %}{% endif %}")
    make_model(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    return {name: tmp_path / name for name in ("nowhere", "empty", "weightless", "mute", "plain")}


def test_what_is_no_student_is_refused_with_its_reason(rows, tmp_path):
    complaints = {
        "nowhere": "no such folder",
        "empty": "config.json is missing",
        "weightless": "model cannot be loaded",
        "mute": "chat template",
        "plain": "has no chat template",
    }
    for name, folder in refusals(tmp_path).items():
        with pytest.raises(TapirError, match=complaints[name]):
            run_job(TrainJob(str(folder), rows, tmp_path / "adapter", SETTINGS, 128, 7))
    assert not (tmp_path / "adapter").exists()


def test_rows_that_cannot_be_learned_from_are_refused(base, rows, tmp_path):
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(TapirError, match="no rows to train on"):
        run_job(TrainJob(str(base), tmp_path / "none.jsonl", tmp_path / "adapter", SETTINGS, 128, 7))
    with pytest.raises(TapirError, match="every prompt fills"):
        run_job(TrainJob(str(base), rows, tmp_path / "adapter", SETTINGS, 8, 7))


def test_what_needs_a_gpu_is_refused_without_one(job):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(TapirError, match="qlora needs a GPU"):
        run_job(replace(job, settings=SETTINGS.model_copy(update={"method": "qlora"})))
    with pytest.raises(TapirError, match="Unsloth needs a GPU"):
        run_job(replace(job, settings=SETTINGS.model_copy(update={"backend": "unsloth"})))


def test_a_refusal_in_the_process_arrives_as_it_is(tmp_path, base):
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(TapirError, match="no rows to train on") as caught:
        train(TrainJob(str(base), tmp_path / "none.jsonl", tmp_path / "adapter", SETTINGS, 128, 7), tmp_path / "job")
    assert caught.value.where == str(tmp_path / "none.jsonl")


def test_a_kill_in_mid_training_leaves_no_adapter_and_is_said_to_be_memory(job, tmp_path):
    def kill(done: int, total: int, note: str) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # a process that has ended meanwhile
                if str(tmp_path / "job").encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)

    with pytest.raises(TapirError, match="signal 9"):
        train(replace(job, settings=SETTINGS.model_copy(update={"epochs": 50})), tmp_path / "job", kill)
    assert not job.out.exists()


def test_a_damaged_job_is_named(tmp_path):
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(TapirError, match="not a TrainJob"):
        run_module("tapir_local.train", tmp_path, tmp_path / "log")
