"""The task classifier on synthetic instructions: what it learns, measures, writes and refuses."""

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tapir_local.errors import TapirError
from tapir_local.files import read_rows, write_rows
from tapir_local.recipe.schema import Classifier
from tapir_local.records import Example, Message, from_json, to_json
from tapir_local.training.classifier import (
    ClassifyJob,
    Prediction,
    batches_by_length,
    classifier_text,
    load_classifier,
    measure_agreement,
    predict_tasks,
    run_classifier,
    seed_torch,
    split_held_out,
    train_classifier,
)

WORDS = ("apple", "river", "stone", "garden", "winter", "copper", "violin", "market", "shadow", "ladder", "pepper")
FAMILIES = {
    "Math": ("What is {n} plus {m}?", "Multiply {n} by {m}.", "Tom has {n} pears and buys {m} more. How many has he?"),
    "Reasoning": (
        "Which is larger, {n} or {m}?",
        "Put these in order: {n}, {m}, {k}.",
        "What comes next: {n}, {m}, {k}?",
    ),
    "Grammar": ("Write the plural of {a}.", "Is '{a} are {b}' good English?", "Which letter does {a} begin with?"),
    "Paraphrase": ("Say this in other words: the {a} is near the {b}.", "Shorten: the {a}, the {b} and the {c}."),
    "Code Generation": ("Write a function that returns {a} {n} times.", "Write a Python loop that prints {a} and {b}."),
    "Writing": ("Write a poem about a {a} and a {b}.", "Write a letter to a {a} about a {b}."),
    "Complex Format": ("Give {a}, {b} and {c} as a JSON list.", "Make a table with {a} in row {n}."),
    "Multilingual": ("Translate '{a} and {b}' into French.", "How do you say {a} in German?"),
}
SETTINGS = Classifier(model="small", held_out=0.15, epochs=4, learning_rate=1e-3, batch_size=16, max_length=64)


def instructions(number: int, seed: str) -> list[Example]:
    """Rows of each family in turn."""
    chance = random.Random(seed)
    rows = []
    for n in range(number):
        task = list(FAMILIES)[n % len(FAMILIES)]
        numbers = {name: chance.randint(1, 999) for name in "nmk"}
        text = chance.choice(FAMILIES[task]).format(**numbers, **{name: chance.choice(WORDS) for name in "abc"})
        rows.append(Example(f"{seed}-{n}", (Message("user", text),), task=task))
    return rows


@pytest.fixture
def job(tmp_path) -> ClassifyJob:
    """Few rows and one epoch: enough for everything but the accuracy."""
    write_rows(tmp_path / "labelled.jsonl", instructions(40, "learn"))
    write_rows(tmp_path / "rows.jsonl", [replace(row, task="") for row in instructions(30, "read")])
    settings = SETTINGS.model_copy(update={"epochs": 1})
    return ClassifyJob(
        tmp_path / "labelled.jsonl", tmp_path / "rows.jsonl", tuple(FAMILIES), settings, 3, tmp_path / "out"
    )


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """A classifier trained on 600 rows in its own process, and its labels for 2,000 others."""
    folder = tmp_path_factory.mktemp("classifier")
    write_rows(folder / "labelled.jsonl", instructions(600, "learn"))
    write_rows(folder / "rows.jsonl", [replace(row, task="") for row in instructions(2000, "read")])
    job = ClassifyJob(folder / "labelled.jsonl", folder / "rows.jsonl", tuple(FAMILIES), SETTINGS, 3, folder / "out")
    run_classifier(job, folder)
    return folder / "out"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_job_survives_its_file(job):
    assert from_json(ClassifyJob, to_json(job)) == job


def test_it_agrees_with_the_labels_it_has_not_seen(taught):
    found = json.loads((taught / "agreement.json").read_text())
    assert found["agreement"] >= 0.9
    assert (found["rows"], found["trained"]) == (90, 510)
    assert sum(label["rows"] for label in found["by_label"].values()) == 90
    assert sum(sum(row.values()) for row in found["confusion"].values()) == 90


def test_it_labels_every_row_in_order(taught):
    predictions, truth = read(taught / "predictions.jsonl"), instructions(2000, "read")
    assert [row["id"] for row in predictions] == [row.id for row in truth]
    assert sum(row["task"] == true.task for row, true in zip(predictions, truth, strict=True)) >= 1800
    assert all(0 < row["confidence"] <= 1 for row in predictions)


def test_the_folder_is_a_model_that_transformers_loads(taught, job):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert AutoModelForSequenceClassification.from_pretrained(taught).config.id2label[0] == "Math"
    tokens = AutoTokenizer.from_pretrained(taught).tokenize("What is 123 plus 4?")
    assert "".join(tokens).replace("\u0120", " ").split() == ["what", "is", "1", "2", "3", "plus", "4", "?"]
    assert {"1", "2", "3"} <= {token.strip("\u0120") for token in tokens}
    train_classifier(replace(job, settings=job.settings.model_copy(update={"model": str(taught)})))
    assert json.loads((job.out / "agreement.json").read_text())["agreement"] >= 0.8


def test_the_same_rows_and_seed_give_the_same_files(job, tmp_path):
    train_classifier(job)
    train_classifier(replace(job, out=tmp_path / "again"))
    for name in ("model.safetensors", "predictions.jsonl", "agreement.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_another_seed_holds_other_rows_out(job, tmp_path):
    rows = instructions(80, "learn")
    one, two = (split_held_out(rows, 0.25, random.Random(seed))[1] for seed in (1, 2))
    assert len(one) == len(two) == 20
    assert one != two


def test_every_task_gives_its_share_and_keeps_a_row():
    rows = [Example(str(n), (Message("user", "x"),), task=task) for n, task in enumerate("A" * 20 + "B" * 11 + "C")]
    learned, held = split_held_out(rows, 0.2, random.Random(1))
    assert Counter(row.task for row in held) == {"A": 4, "B": 2}
    assert sorted(learned + held, key=lambda row: int(row.id)) == rows
    learned, held = split_held_out(rows, 1.0, random.Random(1))
    assert {row.task for row in learned} == {"A", "B", "C"}
    learned, held = split_held_out(rows, 0.0, random.Random(1))
    assert len(held) == 1


def test_progress_counts_steps(job):
    seen = []
    train_classifier(job, lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(1, 3), (2, 3), (3, 3), (30, 30)]  # steps, then rows
    assert seen[0][2].startswith("loss ")


def test_labels_that_are_not_the_recipes_are_not_learned(job):
    with pytest.raises(TapirError, match="fewer than two rows"):
        train_classifier(replace(job, labels=("Sport", "Law")))


@pytest.mark.parametrize(
    ("model", "complaint"),
    [("/nowhere/deberta", "no such folder"), ("microsoft/deberta-v3-none", "cannot be loaded"), (".", "config.json")],
)
def test_a_model_that_cannot_be_loaded_is_refused(job, monkeypatch, tmp_path, model, complaint):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TapirError, match=complaint) as caught:
        train_classifier(replace(job, settings=job.settings.model_copy(update={"model": model})))
    assert "classifier.model" in caught.value.fix
    assert not job.out.exists()


def test_a_single_class_is_not_learned(job):
    with pytest.raises(TapirError, match="every labelled row is Math: at least two labels"):
        train_classifier(replace(job, labels=("Math", "Law")))


def test_a_class_with_a_single_row_is_learned_and_not_measured(job):
    rows = [row for row in instructions(40, "learn") if row.task != "Grammar" or row.id == "learn-2"]
    write_rows(job.labelled, rows)
    train_classifier(job)
    found = json.loads((job.out / "agreement.json").read_text())
    assert "Grammar" not in found["by_label"]
    assert found["rows"] + found["trained"] == len(rows)


def test_agreement_has_an_interval_in_total_and_per_label():
    held = [Example(str(n), (Message("user", "x"),), task="A" if n < 8 else "B") for n in range(10)]
    found = measure_agreement(held, [Prediction(row.id, "A", 0.9) for row in held])
    assert (found["agreement"], found["agree"], found["rows"]) == (0.8, 8, 10)
    assert found["interval"] == pytest.approx((0.490162, 0.943318), abs=1e-6)  # Wilson's interval of 8 in 10
    assert found["by_label"]["B"] == {"rows": 2, "agree": 0, "interval": pytest.approx((0, 0.657620), abs=1e-6)}
    assert found["confusion"] == {"A": {"A": 8}, "B": {"A": 2}}


def test_a_row_that_is_labelled_is_not_predicted(job):
    write_rows(job.rows, [*instructions(40, "learn"), *instructions(3, "read")])
    train_classifier(job)
    assert [row["id"] for row in read(job.out / "predictions.jsonl")] == ["read-0", "read-1", "read-2"]


def test_rows_of_similar_length_share_a_batch_within_the_limit():
    lengths = [5, 300, 7, 6, 40, 38, 5]
    found = list(batches_by_length(lengths, 80))
    assert found == [[1], [4, 5], [2, 3, 0, 6]]


def test_a_batch_changes_no_label(job):
    """A row's label and probability do not depend on the other rows of its batch."""
    rows = read_rows(Example, job.rows)
    seed_torch(1)
    model, tokenizer = load_classifier(job, [classifier_text(row, job) for row in rows])
    together = predict_tasks(model, tokenizer, rows, job)
    alone = [predict_tasks(model, tokenizer, [row], job)[0] for row in rows[:8]]
    assert [row.task for row in together[:8]] == [row.task for row in alone]
    assert [row.confidence for row in together[:8]] == pytest.approx([row.confidence for row in alone], abs=1e-4)


def test_the_text_of_a_long_row_starts_with_its_last_turn(job):
    turns = (Message("system", "s" * 5000), Message("user", "old"), Message("user", "Translate this."))
    text = classifier_text(Example("a", turns), job)
    assert text.startswith("Translate this.\n\nsystem: sss")
    assert len(text) == 16 * job.settings.max_length
    assert classifier_text(Example("a", turns[-1:]), job) == "Translate this."


def test_a_very_long_row_is_read_from_its_start(job):
    book = Example("book", (Message("user", "What is 3 plus 4? " + "river stone " * 50_000),))
    write_rows(job.rows, [book])
    train_classifier(job)
    assert [row["id"] for row in read(job.out / "predictions.jsonl")] == ["book"]


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"hello")


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def of_other_sizes(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_size": 128', '"hidden_size": 64'))


def of_another_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "clip"}')


def emptied(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (garbage, "cannot be loaded"),
        (without_tokenizer, "its tokenizer has no vocabulary"),
        (of_other_sizes, "do not have the sizes in config.json"),
        (of_another_kind, "cannot be loaded"),
        (emptied, "model_type"),
    ],
)
def test_a_damaged_model_is_refused_and_not_initialized_at_random(taught, job, tmp_path, damage, complaint):
    shutil.copytree(taught, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(TapirError, match=complaint) as caught:
        train_classifier(replace(job, settings=job.settings.model_copy(update={"model": str(tmp_path / "model")})))
    assert "classifier.model" in caught.value.fix
    assert not job.out.exists()
