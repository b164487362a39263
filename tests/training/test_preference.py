"""Training on preference pairs: DPO from the last adapter, which is also its reference."""

from dataclasses import replace
from math import log as ln
from pathlib import Path

import pytest
from training_rows import SETTINGS, WEIGHTS, examples, log, losses, make_job, resolved

from tapir_local.files import read_rows, write_rows
from tapir_local.records import Example, PreferencePair
from tapir_local.training.job import TrainJob
from tapir_local.training.model import load_tokenizer
from tapir_local.training.preference import pair_rows, preference_settings
from tapir_local.training.train import train_student

EACH_STEP = 1e-9  # minutes between checkpoints


def pairs(number: int) -> list[PreferencePair]:
    """The sums that a first training memorizes, against other answers."""
    return [
        PreferencePair(
            row.id, row.prompt, row.completion, rejected=f"No idea, {at}.", teacher=9, student=2, judged_in=1
        )
        for at, row in enumerate(examples(number))
    ]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A training of four steps on pairs, from an adapter that has learned something else than the base knows."""
    folder = tmp_path_factory.mktemp("preference")
    first = make_job(folder, epochs=1)
    train_student(first)
    write_rows(folder / "pairs.jsonl", pairs(16))
    settings = SETTINGS.model_copy(
        update={"preference": "dpo", "preference_learning_rate": 1e-3, "checkpoint_minutes": EACH_STEP}
    )
    return replace(
        first,
        rows=folder / "pairs.jsonl",
        out=folder / "dpo",
        settings=preference_settings(settings),
        adapter_from=first.out,
        part="preference",
    )


@pytest.fixture(scope="module")
def trained(job: TrainJob) -> Path:
    train_student(job)
    return job.out


def tensors(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)


def test_the_reference_is_the_last_adapter_and_not_the_base(job: TrainJob, trained: Path) -> None:
    """Policy and reference are the same model before the first step: every log-ratio is 0 and the loss ln 2."""
    found = losses(trained)
    assert len(found) == 4
    assert found[0] == pytest.approx(ln(2), abs=1e-5)
    assert found[-1] < found[0] - 0.01
    assert log(trained)[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert log(trained)[-1]["rewards/accuracies"] == 1
    assert job.adapter_from
    before, after = tensors(job.adapter_from), tensors(trained)
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)
    settings = resolved(trained)["dpo"]
    assert (settings["beta"], settings["learning_rate"], settings["loss_type"]) == (0.1, 1e-3, ["sigmoid"])
    files = {"adapter_config.json", "adapter_model.safetensors", "resolved.json", "train_log.jsonl"}
    assert {file.name for file in trained.iterdir()} == files


def test_an_interrupted_training_on_pairs_ends_in_the_same_bytes(job: TrainJob, trained: Path, tmp_path: Path) -> None:
    cut, folder = replace(job, out=tmp_path / "dpo"), tmp_path / "train"

    def stop(done: int, total: int, note: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_student(cut, stop, folder)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    seen: list[int] = []
    train_student(cut, lambda done, total, note: seen.append(done), folder)
    assert seen == [3, 4, 4]
    assert (cut.out / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    assert losses(cut.out) == losses(trained)


def test_a_pair_has_the_tokens_of_two_rows_and_is_left_out_if_one_is_too_long(job: TrainJob) -> None:
    tokenizer = load_tokenizer(job.model)
    some = pairs(4)
    long = replace(some[1], rejected="word " * 200)
    found = pair_rows([some[0], long, *some[2:]], tokenizer, 128)
    assert [row.id for row in found.left_out] == ["1"]
    assert len(found.rows) == 3
    for pair, row in zip([some[0], *some[2:]], found.rows, strict=True):
        texts = [tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        assert pair.prompt[0].content in texts[0]
        assert pair.completion in texts[1]
        assert pair.rejected in texts[2]
        assert len(row["input_ids"]) == len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def test_pairs_are_read_as_rows_too(job: TrainJob) -> None:
    rows = read_rows(Example, job.rows)
    assert [row.completion for row in rows] == [pair.completion for pair in read_rows(PreferencePair, job.rows)]


def test_the_settings_of_the_training_on_pairs_are_its_own() -> None:
    wsd = SETTINGS.model_copy(update={"schedule": "wsd", "packing": True, "preference_learning_rate": 7e-6})
    own = preference_settings(wsd)
    assert (own.backend, own.packing, own.learning_rate, own.schedule) == ("trl", False, 7e-6, "cosine")
    assert preference_settings(SETTINGS.model_copy(update={"schedule": "linear"})).schedule == "linear"
