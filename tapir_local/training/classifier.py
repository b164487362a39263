"""The task classifier: DeBERTa-v3 learns the teacher's labels and predicts those of the other rows."""

import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any

from tapir_local.errors import TapirError
from tapir_local.files import atomic_write, read_record, read_rows, write_json, write_rows
from tapir_local.memory import single_gpu_variables
from tapir_local.method.metrics import wilson_interval
from tapir_local.process import child_main, run_in_process
from tapir_local.recipe.schema import Classifier
from tapir_local.records import Example, Progress, instruction_of
from tapir_local.training.model import check_model_path, load_error, refuse_old_gpu

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
SMALL_CONFIG = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "relative_attention": True,
    "position_buckets": 32,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
}  # a small version of microsoft/deberta-v3-base
SMALL_VOCABULARY_SIZE = 2000
WARMUP_SHARE = 0.1
MAX_CHARS_PER_PIECE = 16  # the longest pieces in DeBERTa's vocabulary
# Tokens per batch including padding. On two cores 2,048 took half the time of 8,192, and less memory.
PREDICTION_TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class ClassifyJob:
    """What the classifier reads and writes.

    `labelled` and `rows` are JSONL files of Example. `out` is the output folder, written completely or not at all: the
    model, `agreement.json`, and `predictions.jsonl` with one line per row of `rows` that is not in `labelled`.
    """

    labelled: Path
    rows: Path
    labels: tuple[str, ...]
    settings: Classifier
    random_seed: int
    out: Path


@dataclass(frozen=True)
class Prediction:
    """A predicted label and its probability."""

    id: str
    task: str
    confidence: float


def run_classifier(job: ClassifyJob, folder: Path, progress: Progress | None = None) -> None:
    """Train the classifier in its own process; job.json and classifier.log are left in `folder`.

    `progress` receives (steps done, total steps, loss). Raises TapirError as `train_classifier` does, or if the process
    died.
    """
    run_in_process(classifier_main, job, folder, progress)


def classifier_main(folder: Path, progress: Progress) -> None:
    """Run the job in `folder`: the entry point of the classifier's process."""
    job = read_record(ClassifyJob, folder / "job.json")
    small = job.settings.model == "small" or Path(job.settings.model).is_dir()
    # Set before the libraries are imported: they read the environment then.
    os.environ.update({"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"})
    os.environ.update({"HF_HUB_OFFLINE": "1"} if small else {})
    train_classifier(job, progress)


def train_classifier(job: ClassifyJob, progress: Progress = lambda done, total, note: None) -> None:
    """Train the classifier, measure its agreement with the teacher, predict, and write the output folder.

    Raises TapirError if there are too few labels to learn from or the model cannot be loaded.
    """
    labelled = [row for row in read_rows(Example, job.labelled) if row.task in job.labels]
    refuse_too_few_labels(labelled, job)
    learned, held = split_held_out(labelled, job.settings.held_out, random.Random(f"{job.random_seed}-held-out"))
    known = {row.id for row in labelled}
    rows = [row for row in read_rows(Example, job.rows) if row.id not in known]
    seed_torch(job.random_seed)
    model, tokenizer = load_classifier(job, [classifier_text(row, job) for row in [*labelled, *rows]])
    fit_classifier(model, tokenizer, learned, job, progress)
    agreement = measure_agreement(held, predict_tasks(model, tokenizer, held, job))
    found = predict_tasks(model, tokenizer, rows, job, progress)
    with atomic_write(job.out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / "agreement.json", {**agreement, "trained": len(learned)})
        write_rows(partial / "predictions.jsonl", found)


def refuse_too_few_labels(labelled: Sequence[Example], job: ClassifyJob) -> None:
    """Raise TapirError unless at least two rows with two different labels are given."""
    fix = "Raise classifier.labelled, or check in the calls why the teacher's labels could not be read."
    if len(labelled) < 2:
        raise TapirError("fewer than two rows have one of the recipe's labels", where=str(job.labelled), fix=fix)
    if len({row.task for row in labelled}) < 2:
        what = f"every labelled row is {labelled[0].task}: at least two labels are needed"
        raise TapirError(what, where=str(job.labelled), fix=fix)


def classifier_text(row: Example, job: ClassifyJob) -> str:
    """The text that the classifier reads: the last turn, which states the task, then the earlier turns.

    It is cut to a number of characters that always gives the maximum number of tokens, so that long inputs are not
    tokenized in full.
    """
    *before, last = row.prompt
    earlier = instruction_of(tuple(before)) if before else ""
    return "\n\n".join(filter(None, (last.content, earlier)))[: MAX_CHARS_PER_PIECE * job.settings.max_length]


def split_held_out(rows: Sequence[Example], share: float, chance: random.Random) -> tuple[list[Example], list[Example]]:
    """Split rows into training rows and held-out rows, at least one of each, keeping their order.

    Every task contributes its share of held-out rows but keeps at least one training row.
    """
    tasks: dict[str, list[Example]] = defaultdict(list)
    for row in rows:
        tasks[row.task].append(row)
    wanted = {task: min(share * len(group), len(group) - 1) for task, group in tasks.items()}
    counts = {task: floor(number) for task, number in wanted.items()}
    missing = round(sum(wanted.values())) - sum(counts.values())
    for task in sorted(wanted, key=lambda task: (counts[task] - wanted[task], task))[:missing]:
        counts[task] += 1
    held = {row.id for task, group in tasks.items() for row in chance.sample(group, counts[task])}
    held = held or {chance.choice(rows).id}
    return [row for row in rows if row.id not in held], [row for row in rows if row.id in held]


def seed_torch(seed: int) -> None:
    """Seed torch and make its operations deterministic."""
    import torch

    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def load_classifier(job: ClassifyJob, texts: Sequence[str]) -> tuple[Any, Any]:
    """Load the model, with a classification head for the job's labels, and its tokenizer. Raises TapirError if it
    cannot be loaded, or if the GPU is too old for torch."""
    import torch

    gpu = torch.cuda.is_available()
    if gpu:
        refuse_old_gpu("classifier")
    if job.settings.model == "small":
        model, tokenizer = make_small_classifier(job, texts)
    else:
        model, tokenizer = load_pretrained_classifier(job)
    return model.to("cuda" if gpu else "cpu"), tokenizer


def label_config(job: ClassifyJob) -> dict[str, Any]:
    """The labels as transformers' configs store them."""
    return {"id2label": dict(enumerate(job.labels)), "label2id": {label: n for n, label in enumerate(job.labels)}}


def load_pretrained_classifier(job: ClassifyJob) -> tuple[Any, Any]:
    """Load an encoder from a folder or the Hub and add a new head. Raises TapirError if the encoder or tokenizer is
    incomplete."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = job.settings.model
    check_model_path(name, "classifier.model")
    options = {**label_config(job), "ignore_mismatched_sizes": True, "dtype": "float32", "output_loading_info": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(name, **options)
        refuse_partial_load(model, tokenizer, loaded)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise load_error(name, "classifier", error, "classifier.model") from error
    return model, tokenizer


def refuse_partial_load(model: Any, tokenizer: Any, loaded: Mapping[str, Any]) -> None:
    """Raise ValueError if transformers replaced parts of the encoder or the tokenizer.

    It initializes weights of mismatched sizes at random, and creates an empty tokenizer for a folder that has none.
    """
    prefix = f"{model.base_model_prefix}."
    encoder = [name for name in model.state_dict() if name.startswith(prefix)]
    other = [key[0] if isinstance(key, tuple) else key for key in loaded["mismatched_keys"]]
    if wrong := [name for name in other if name.startswith(prefix)]:
        raise ValueError(f"its weights do not have the sizes in config.json ({min(wrong)})")
    if sum(name.startswith(prefix) for name in loaded["missing_keys"]) > len(encoder) / 2:
        raise ValueError("its weights belong to another type of model than config.json says")
    if tokenizer.pad_token_id is None:
        raise ValueError("its tokenizer has no padding token")
    if set(tokenizer("the task of a text")["input_ids"]) <= set(tokenizer.all_special_ids):
        raise ValueError("its tokenizer has no vocabulary")


def make_small_classifier(job: ClassifyJob, texts: Sequence[str]) -> tuple[Any, Any]:
    """Build an untrained DeBERTa-v3 with under a million weights and a tokenizer trained on the texts; nothing is
    downloaded."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    tokenizer = train_small_tokenizer(texts, job.settings.max_length)
    positions = {"max_position_embeddings": max(512, job.settings.max_length), "pad_token_id": tokenizer.pad_token_id}
    config = DebertaV2Config(vocab_size=len(tokenizer), **SMALL_CONFIG, **positions, **label_config(job))
    return DebertaV2ForSequenceClassification(config), tokenizer


def train_small_tokenizer(texts: Sequence[str], max_length: int) -> Any:
    """Train a lowercase byte-level BPE tokenizer of at most SMALL_VOCABULARY_SIZE tokens; every digit is one token.

    WordPiece is not used: its trainer numbers the continuation pieces differently each time (tokenizers 0.23).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    special = list(SPECIAL_TOKENS.values())
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL_VOCABULARY_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    sep, cls = ((SPECIAL_TOKENS[name], special.index(SPECIAL_TOKENS[name])) for name in ("sep_token", "cls_token"))
    tokenizer.post_processor = processors.BertProcessing(sep, cls)  # the ids of special tokens are their positions
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **SPECIAL_TOKENS)


def fit_classifier(model: Any, tokenizer: Any, rows: Sequence[Example], job: ClassifyJob, progress: Progress) -> None:
    """Train all weights with AdamW; the learning rate warms up for a tenth of the steps, then decays linearly."""
    import torch

    settings = job.settings
    steps = settings.epochs * -(-len(rows) // settings.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    rise = max(1, round(WARMUP_SHARE * steps))
    slope = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    model.train()
    chance = random.Random(f"{job.random_seed}-classifier")
    epochs = (
        batch
        for _ in range(settings.epochs)
        for batch in row_batches(chance.sample(rows, len(rows)), settings.batch_size)
    )
    for step, batch in enumerate(epochs, 1):
        targets = torch.tensor([job.labels.index(row.task) for row in batch], device=model.device)
        inputs = pad_batch(tokenizer, tokenize_rows(tokenizer, batch, job), model.device)
        loss = model(**inputs, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        slope.step()
        optimizer.zero_grad()
        progress(step, steps, f"loss {loss.item():.3f}")


def row_batches(rows: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """Yield `size` rows at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def tokenize_rows(tokenizer: Any, rows: Sequence[Example], job: ClassifyJob) -> list[list[int]]:
    """Token ids of each row's text with the tokenizer's special tokens added; special tokens quoted in a row are plain
    text."""
    most = min(job.settings.max_length, tokenizer.model_max_length)  # BERT has 512 positions
    heads = [classifier_text(row, job) for row in rows]
    found = tokenizer(heads, truncation=True, max_length=most, split_special_tokens=True)
    return list(found["input_ids"])


def pad_batch(tokenizer: Any, tokens: Sequence[Sequence[int]], device: Any) -> dict[str, Any]:
    """Token ids and attention mask as tensors of shape (rows, length of the longest row)."""
    import torch

    longest = max(map(len, tokens))
    ids = torch.tensor([[*row, *[tokenizer.pad_token_id] * (longest - len(row))] for row in tokens], device=device)
    lengths = torch.tensor([len(row) for row in tokens], device=device)
    mask = (torch.arange(longest, device=device)[None] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def predict_tasks(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    job: ClassifyJob,
    progress: Progress = lambda done, total, note: None,
) -> list[Prediction]:
    """The most likely label of each row and its probability, in the order of the rows.

    Rows of similar length are read together, up to PREDICTION_TOKENS tokens. The longest come first, so that a lack of
    memory shows at once.
    """
    import torch

    model.eval()
    tokens = tokenize_rows(tokenizer, rows, job) if rows else []
    found: dict[int, Prediction] = {}
    with torch.inference_mode():
        for places in batches_by_length([len(row) for row in tokens], PREDICTION_TOKENS[model.device.type]):
            inputs = pad_batch(tokenizer, [tokens[place] for place in places], model.device)
            sure, best = model(**inputs).logits.float().softmax(-1).max(-1)
            for place, label, probability in zip(places, best.tolist(), sure.tolist(), strict=True):
                found[place] = Prediction(rows[place].id, job.labels[label], round(probability, 6))
            progress(len(found), len(rows), "rows labelled")
    return [found[place] for place in range(len(rows))]


def batches_by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most `most` tokens including padding, longest rows first; a longer row is a batch by
    itself."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    while order:
        size = max(1, most // max(1, lengths[order[0]]))
        yield order[:size]
        del order[:size]


def measure_agreement(held: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """How often the classifier predicts the teacher's label, in total and per label, with Wilson's 95 % intervals.

    `confusion` maps each of the teacher's labels to the number of rows per predicted label.
    """
    pairs = Counter((row.task, found.task) for row, found in zip(held, predictions, strict=True))
    confusion: dict[str, dict[str, int]] = defaultdict(dict)
    for (label, found), rows in sorted(pairs.items()):
        confusion[label][found] = rows
    by_label = {label: agreement_share(row.get(label, 0), sum(row.values())) for label, row in confusion.items()}
    agree = sum(label["agree"] for label in by_label.values())
    whole_share = agreement_share(agree, len(held))
    return {"agreement": agree / len(held), **whole_share, "by_label": by_label, "confusion": confusion}


def agreement_share(agree: int, rows: int) -> dict[str, Any]:
    """The number of rows, how many of them agree, and the interval of that share."""
    return {"rows": rows, "agree": agree, "interval": wilson_interval([n < agree for n in range(rows)])}


if __name__ == "__main__":
    sys.exit(child_main(classifier_main, single_gpu_variables()))
