"""Fine-tuning a tiny random Llama: what is learned from, what is learned, what is stored, and what is refused."""

import json
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from models import CHATML, make_model, make_tokenizer
from training_rows import SETTINGS, examples, log, losses
from training_rows import resolved as settled

from tapir_local.errors import TapirError
from tapir_local.files import write_rows
from tapir_local.pipeline.backends import exporter, gatekeeper
from tapir_local.process import run_module
from tapir_local.recipe.text import parse_recipe
from tapir_local.records import Example, Message, from_json, to_json
from tapir_local.run_dir import RunDir
from tapir_local.training.job import MASKED, TrainJob, pack, sft_arguments, split_batch, token_rows
from tapir_local.training.model import Hardware, library, linear_names
from tapir_local.training.train import run_job, train

# What unsloth 2026.10.9 changes of SFTConfig's defaults (trl 1.15), found by importing both side by side.
UNSLOTH_CHANGES = {
    "optim", "gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "learning_rate", "warmup_steps", "weight_decay", "seed", "logging_steps", "padding_free", "bf16",
    "logging_nan_inf_filter", "torch_empty_cache_steps",
}  # fmt: skip
FULL = SETTINGS.model_copy(update={"method": "full", "learning_rate": 1e-3})
CPU = Hardware("cpu", "trl", "f32", 8 << 30)


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


LONG = "1 2 3 4 5 6 7 8 9 " * 20


def test_a_row_that_does_not_fit_is_left_out_whole_and_told(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    short, other = examples(2)
    answer, question = Example("a", short.prompt, LONG), Example("b", (Message("user", LONG),), "No.")
    tokens = token_rows([short, answer, question, other], tokenizer, 64)
    assert tokens.rows == token_rows([short, other], tokenizer, 64).rows
    assert [(row.id, row.kind) for row in tokens.left_out] == [(id, "longer than student.max_length") for id in "ab"]
    assert "tokens of prompt and" in tokens.left_out[0].detail
    assert tokens.counts == {"trained": 2, "dropped": 2}
    assert str(tokens) == "2 rows trained, 2 rows dropped"


def test_every_row_that_is_trained_on_has_its_end_whatever_the_room(tmp_path):
    """At the length of a row it is trained on whole, at one token less it is left out."""
    tokenizer = make_tokenizer(tmp_path)
    rows = examples(6)
    lengths = [len(row["input_ids"]) for row in token_rows(rows, tokenizer, 128).rows]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for room in range(min(lengths) - 1, max(lengths) + 1):
        found = token_rows(rows, tokenizer, room)
        assert len(found.rows) == sum(length <= room for length in lengths)
        assert {row.id for row in found.left_out} == {str(n) for n, length in enumerate(lengths) if length > room}
        assert all(end in row["labels"] for row in found.rows)


PICKY = """{% if 'Be brief' in messages[0]['content'] %}{{ raise_exception('not these words') }}{% endif %}""" + CHATML


def test_a_row_that_the_template_refuses_is_left_out_and_told(tmp_path):
    tokenizer = make_tokenizer(tmp_path, template=PICKY)
    first, second, third = examples(3)
    refused = replace(second, prompt=(Message("user", "Be brief."),))
    tokens = token_rows([first, refused, third], tokenizer, 128)
    assert tokens.rows == token_rows([first, third], tokenizer, 128).rows
    (left,) = tokens.left_out
    assert (left.id, left.kind) == ("1", "refused by the student's chat template")
    assert "not these words" in left.detail


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
    with pytest.raises(TapirError, match=r"no row is left to train on: 32 longer than student\.max_length"):
        run_job(TrainJob(str(base), rows, tmp_path / "adapter", SETTINGS, 8, 7))


def test_what_needs_a_gpu_is_refused_without_one(job):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(TapirError, match="qlora needs a GPU"):
        run_job(replace(job, settings=SETTINGS.model_copy(update={"method": "qlora"})))
    with pytest.raises(TapirError, match="f16 needs a GPU"):
        run_job(replace(job, settings=SETTINGS.model_copy(update={"precision": "f16"})))
    with pytest.raises(TapirError, match="Unsloth needs a GPU"):
        run_job(replace(job, settings=SETTINGS.model_copy(update={"backend": "unsloth"})))


def test_a_refusal_in_the_process_arrives_as_it_is(tmp_path, base):
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(TapirError, match="no rows to train on") as caught:
        train(TrainJob(str(base), tmp_path / "none.jsonl", tmp_path / "adapter", SETTINGS, 128, 7), tmp_path / "job")
    assert caught.value.where == str(tmp_path / "none.jsonl")


def test_rows_packed_into_one_do_not_see_each_other(base, rows, tmp_path):
    """The first step's loss over all rows is that of the rows apart, and the packs hold them all."""
    first = {}
    for packing in (False, True):
        settings = SETTINGS.model_copy(
            update={"packing": packing, "batch_size": 32, "micro_batch_size": 32, "epochs": 1}
        )
        out = tmp_path / str(packing)
        run_job(TrainJob(str(base), rows, out, settings, 128, 7))
        first[packing] = log(out)[0]
    assert settled(tmp_path / "True")["sft"]["packing"]
    assert first[True]["loss"] == pytest.approx(first[False]["loss"], abs=1e-5)
    assert first[True]["tokens"] == first[False]["tokens"]


def test_packs_are_fewer_and_no_longer_than_a_row_may_be(tmp_path):
    rows = token_rows(examples(32), make_tokenizer(tmp_path), 128).rows
    packs = pack(rows, 128)
    assert len(packs) < len(rows) / 2
    assert max(len(ids) for ids in packs["input_ids"]) <= 128
    assert sorted(length for pack in packs["seq_lengths"] for length in pack) == sorted(
        len(row["input_ids"]) for row in rows
    )


@pytest.mark.parametrize("twice", [True, False])
def test_checkpointed_gradients_are_the_same_gradients(trained, base, rows, tmp_path, twice):
    settings = SETTINGS.model_copy(update={"gradient_checkpointing": twice})
    run_job(TrainJob(str(base), rows, tmp_path / "adapter", settings, 128, 7))
    assert settled(tmp_path / "adapter")["sft"]["gradient_checkpointing"] is twice
    assert losses(tmp_path / "adapter") == pytest.approx(losses(trained), abs=1e-4)


def test_bf16_on_a_cpu_learns_too(trained, base, rows, tmp_path):
    settings = SETTINGS.model_copy(update={"precision": "bf16"})
    run_job(TrainJob(str(base), rows, tmp_path / "adapter", settings, 128, 7))
    assert settled(tmp_path / "adapter")["precision"] == "bf16"
    assert losses(tmp_path / "adapter") == pytest.approx(losses(trained), abs=0.3)


@pytest.fixture(scope="module")
def whole(base, rows, tmp_path_factory) -> Path:
    """All weights trained: a model's folder."""
    out = tmp_path_factory.mktemp("whole") / "adapter"
    run_job(TrainJob(str(base), rows, out, FULL, 128, 7))
    return out


def test_full_fine_tuning_leaves_a_whole_model(whole, base):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    assert not (whole / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(whole)
    before = load_file(base / "model.safetensors")
    assert not any(bool((weight == before[name]).all()) for name, weight in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(whole).chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_a_wholly_trained_model_goes_through_export_and_gate_as_it_is(whole, base, rows, tmp_path):
    """As a run does it: what the trainer left in adapter/ is the model, and there is no adapter."""
    recipe = parse_recipe(
        f"teacher: pocket\nstudent: {{path: {base}}}\ntrain: {{method: full}}\nexport: {{quant: f16}}", "r"
    )
    run, gguf = RunDir(tmp_path, "run"), tmp_path / "student.gguf"
    exporter(recipe, run)(whole, gguf, lambda done, total, note: None)
    gatekeeper(recipe, run)(whole, gguf, rows, tmp_path / "gate.json", lambda done, total, note: None)
    found = json.loads((tmp_path / "gate.json").read_text())
    assert (found["failed"], found["figures"]["kl_base"]) == ([], None)


def test_full_fine_tuning_goes_on_from_the_last_rounds_weights(whole, base, rows, tmp_path):
    run_job(TrainJob(str(base), rows, tmp_path / "adapter", FULL, 128, 7, whole))
    assert losses(tmp_path / "adapter")[0] < losses(whole)[0] - 0.5


def test_an_earlier_training_of_another_kind_is_refused(whole, trained, base, rows, tmp_path):
    other = make_model(tmp_path / "other", num_hidden_layers=3)
    for student, settings, earlier, complaint in (
        (base, FULL, trained, "left an adapter, not a whole model"),
        (base, SETTINGS, whole, "holds no adapter"),
        (other, FULL, whole, "num_hidden_layers 2, the student 3"),
    ):
        with pytest.raises(TapirError, match=complaint):
            run_job(TrainJob(str(student), rows, tmp_path / "adapter", settings, 128, 7, earlier))


@pytest.mark.skipif(find_spec("unsloth") is not None, reason="Unsloth is installed")
def test_a_gpu_without_unsloth_says_so_and_goes_on():
    said: list[str] = []
    assert library(SETTINGS, "bf16", 1, said.append) == "trl"
    assert said == [
        "Training with plain TRL and PEFT, not with Unsloth: it is not installed (pip install 'tapir-local[gpu]')."
    ]
    with pytest.raises(TapirError, match="Unsloth cannot be used: it is not installed"):
        library(SETTINGS.model_copy(update={"backend": "unsloth"}), "bf16", 1, said.append)


def test_no_gguf_is_open_once_its_answers_are_there(llama):
    """llama.cpp maps the file it has open: a training that comes next has the memory, and the GPU, to itself."""
    from tapir_local.inference.generate import generate
    from tapir_local.inference.score import score

    def is_open(*_: object) -> bool:
        return llama.gguf.name in Path("/proc/self/maps").read_text()

    prompt, seen = (Message("user", "Add 1 and 2."),), []
    generate(llama.gguf, [prompt], max_tokens=4, context=128, progress=lambda *_: seen.append(is_open()))
    score(llama.gguf, [(prompt, "3")], context=128)
    assert any(seen)
    assert not is_open()


def test_a_batch_is_shared_by_processes_or_refused(job):
    two = sft_arguments(job, replace(CPU, processes=2), 32)
    assert (two["per_device_train_batch_size"], two["gradient_accumulation_steps"]) == (4, 1)
    with pytest.raises(TapirError, match="8 rows cannot be shared by 3 processes"):
        sft_arguments(job, replace(CPU, processes=3), 32)


def test_a_damaged_job_is_named(tmp_path):
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(TapirError, match="not a TrainJob"):
        run_module("tapir_local.training.train", tmp_path, tmp_path / "log")
