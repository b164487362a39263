"""A training job's rows as token ids, their packing, and the arguments of SFTConfig."""

from dataclasses import asdict, replace

import pytest
from models import CHATML, make_tokenizer
from training_rows import UNSLOTH_CHANGES, examples, make_job

from tapir_local.errors import TapirError
from tapir_local.records import Example, Message
from tapir_local.training.job import IGNORED_LABEL, TrainJob, pack_rows, sft_arguments, split_batch, token_rows
from tapir_local.training.model import Hardware

CPU = Hardware("cpu", "trl", "f32", 8 << 30)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    return make_job(tmp_path_factory.mktemp("job"))


def test_exactly_the_prompt_is_masked_and_the_end_of_turn_is_learned(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    rows = examples(5)
    for row, tokens in zip(rows, token_rows(rows, tokenizer, 128).rows, strict=True):
        turns = [asdict(turn) for turn in row.prompt]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        learned = [label for label in tokens["labels"] if label != IGNORED_LABEL]
        masked = tokens["input_ids"][: -len(learned)]
        assert tokens["labels"] == [IGNORED_LABEL] * len(masked) + learned
        assert tokens["input_ids"] == masked + learned
        assert tokenizer.decode(masked) == asked
        assert tokenizer.decode(learned) == f"{row.completion}<|im_end|>\n"
        assert masked == tokenizer(asked, add_special_tokens=False)["input_ids"]


LONG = "1 2 3 4 5 6 7 8 9 " * 20


def test_a_row_that_does_not_fit_is_left_out_and_reported(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    short, other = examples(2)
    answer, question = Example("a", short.prompt, LONG), Example("b", (Message("user", LONG),), "No.")
    tokens = token_rows([short, answer, question, other], tokenizer, 64)
    assert tokens.rows == token_rows([short, other], tokenizer, 64).rows
    assert [(row.id, row.kind) for row in tokens.left_out] == [(id, "longer than student.max_length") for id in "ab"]
    assert "tokens of prompt and" in tokens.left_out[0].detail
    assert tokens.counts == {"trained": 2, "dropped": 2}
    assert str(tokens) == "2 rows trained, 2 rows dropped"


def test_every_trained_row_is_complete_whatever_the_maximum_length(tmp_path):
    """With max_length equal to a row's length it is trained on in full; with one token less it is left out."""
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


def test_a_row_that_the_template_refuses_is_left_out_and_reported(tmp_path):
    tokenizer = make_tokenizer(tmp_path, template=PICKY)
    first, second, third = examples(3)
    refused = replace(second, prompt=(Message("user", "Be brief."),))
    tokens = token_rows([first, refused, third], tokenizer, 128)
    assert tokens.rows == token_rows([first, third], tokenizer, 128).rows
    (left,) = tokens.left_out
    assert (left.id, left.kind) == ("1", "refused by the student's chat template")
    assert "not these words" in left.detail


def test_a_token_across_the_boundary_does_not_change_the_prompt(tmp_path):
    template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(tmp_path, template=template)
    (tokens,) = token_rows([Example("a", (Message("user", "The qui"),), "ck")], tokenizer, 64).rows
    learned = [label for label in tokens["labels"] if label != IGNORED_LABEL]
    assert tokenizer.decode(learned) == "ck<|im_end|>"
    assert len(tokenizer("The quick")["input_ids"]) < len(tokens["input_ids"]) - 1


def test_every_default_that_unsloth_changes_is_set(job):
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


def test_packs_are_fewer_than_rows_and_within_the_maximum_length(tmp_path):
    rows = token_rows(examples(32), make_tokenizer(tmp_path), 128).rows
    packs = pack_rows(rows, 128)
    assert len(packs) < len(rows) / 2
    assert max(len(ids) for ids in packs["input_ids"]) <= 128
    assert sorted(length for pack in packs["seq_lengths"] for length in pack) == sorted(
        len(row["input_ids"]) for row in rows
    )


def test_a_batch_is_divided_among_processes_or_refused(job):
    two = sft_arguments(job, replace(CPU, processes=2), 32)
    assert (two["per_device_train_batch_size"], two["gradient_accumulation_steps"]) == (4, 1)
    with pytest.raises(TapirError, match="8 rows cannot be divided among 3 processes"):
        sft_arguments(job, replace(CPU, processes=3), 32)
