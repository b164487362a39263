"""The task classifier, in its own process: DeBERTa-v3 learns the teacher's labels and gives them to the other rows."""

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
from tapir_local.records import Example, Progress, T, instruction_of
from tapir_local.training.model import check_folder, unloadable

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
SMALL = {
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
}  # the shape of microsoft/deberta-v3-base, made small
SMALL_VOCABULARY = 2000
WARMUP = 0.1
LETTERS = 16  # of a token at the most, as good as always: the longest pieces of DeBERTa's vocabulary
# Tokens of a batch that is read, padding among them. On two cores 2,048 took half the time of 8,192, and less memory.
AT_ONCE = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class ClassifyJob:
    """What the classifier learns from, reads and writes.

    `labelled` and `rows` are JSONL files of Example; `out` a folder, whole or absent, that gets the model,
    `agreement.json` and, for every one of `rows` that is not among the labelled, a line of `predictions.jsonl`.
    """

    labelled: Path
    rows: Path
    labels: tuple[str, ...]
    settings: Classifier
    random_seed: int
    out: Path


@dataclass(frozen=True)
class Prediction:
    """A label and its probability."""

    id: str
    task: str
    confidence: float


def classify(job: ClassifyJob, folder: Path, progress: Progress | None = None) -> None:
    """Run the job in a process of its own, which leaves job.json and classifier.log in `folder`.

    `progress` gets (steps done, steps in all, loss). TapirError as from `run_job`, or when the process died.
    """
    run_in_process("tapir_local.training.classifier", job, folder, progress)


def run_folder(folder: Path, progress: Progress) -> None:
    """The child's side of `classify`: the environment first, since the libraries read it when they are imported."""
    job = read_record(ClassifyJob, folder / "job.json")
    small = job.settings.model == "small" or Path(job.settings.model).is_dir()
    os.environ.update({"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"})
    os.environ.update({"HF_HUB_OFFLINE": "1"} if small else {})
    run_job(job, progress)


def untold(done: int, total: int, note: str) -> None:
    """No progress shown."""


def run_job(job: ClassifyJob, progress: Progress = untold) -> None:
    """Train, measure, predict, write. TapirError when there is too little to learn from or no model to teach."""
    labelled = [row for row in read_rows(Example, job.labelled) if row.task in job.labels]
    refuse_too_little(labelled, job)
    learned, held = split(labelled, job.settings.held_out, random.Random(f"{job.random_seed}-held-out"))
    known = {row.id for row in labelled}
    rows = [row for row in read_rows(Example, job.rows) if row.id not in known]
    seed_torch(job.random_seed)
    model, tokenizer = load(job, [head(row, job) for row in [*labelled, *rows]])
    fit(model, tokenizer, learned, job, progress)
    agreement = compare(held, predict(model, tokenizer, held, job))
    found = predict(model, tokenizer, rows, job, progress)
    with atomic_write(job.out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / "agreement.json", {**agreement, "trained": len(learned)})
        write_rows(partial / "predictions.jsonl", found)


def refuse_too_little(labelled: Sequence[Example], job: ClassifyJob) -> None:
    """TapirError where there is nothing to tell apart."""
    fix = "Raise classifier.labelled, or see in the calls why the teacher's labels could not be read."
    if len(labelled) < 2:
        raise TapirError("fewer than two rows have one of the recipe's labels", where=str(job.labelled), fix=fix)
    if len({row.task for row in labelled}) < 2:
        what = f"every labelled row is {labelled[0].task}: there is nothing to tell apart"
        raise TapirError(what, where=str(job.labelled), fix=fix)


def head(row: Example, job: ClassifyJob) -> str:
    """What the classifier reads of a row: the last turn, which sets the task, then what came before, from its start.

    So many letters that the tokens it may have are surely among them: a book in the input is not tokenised.
    """
    *before, last = row.prompt
    earlier = instruction_of(tuple(before)) if before else ""
    return "\n\n".join(filter(None, (last.content, earlier)))[: LETTERS * job.settings.max_length]


def split(rows: Sequence[Example], share: float, chance: random.Random) -> tuple[list[Example], list[Example]]:
    """Rows to learn from and rows held out, at least one of each, in their order.

    Every task gives its share of the held-out rows, and its last row never.
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
    """Make torch draw and add in the same way each time."""
    import torch

    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def load(job: ClassifyJob, texts: Sequence[str]) -> tuple[Any, Any]:
    """The model with a head for the job's labels, on its device, and its tokenizer; TapirError if it cannot be had."""
    import torch

    if job.settings.model == "small":
        model, tokenizer = small(job, texts)
    else:
        model, tokenizer = pretrained(job)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def labels_of(job: ClassifyJob) -> dict[str, Any]:
    """The labels as transformers' configs have them."""
    return {"id2label": dict(enumerate(job.labels)), "label2id": {label: n for n, label in enumerate(job.labels)}}


def pretrained(job: ClassifyJob) -> tuple[Any, Any]:
    """An encoder from a folder or the Hub, with a fresh head; TapirError where it, or its tokenizer, is not whole."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = job.settings.model
    check_folder(name, "classifier.model")
    options = {**labels_of(job), "ignore_mismatched_sizes": True, "dtype": "float32", "output_loading_info": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(name, **options)
        refuse_halves(model, tokenizer, loaded)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise unloadable(name, "classifier", error, "classifier.model") from error
    return model, tokenizer


def refuse_halves(model: Any, tokenizer: Any, loaded: Mapping[str, Any]) -> None:
    """ValueError where transformers has put chance or nothing in the place of an encoder or a tokenizer.

    Weights of other sizes it draws at random, and of a folder without a tokenizer it makes an empty one.
    """
    prefix = f"{model.base_model_prefix}."
    encoder = [name for name in model.state_dict() if name.startswith(prefix)]
    other = [key[0] if isinstance(key, tuple) else key for key in loaded["mismatched_keys"]]
    if wrong := [name for name in other if name.startswith(prefix)]:
        raise ValueError(f"its weights are not of the sizes that config.json says ({min(wrong)})")
    if sum(name.startswith(prefix) for name in loaded["missing_keys"]) > len(encoder) / 2:
        raise ValueError("its weights are those of another kind of model than config.json says")
    if tokenizer.pad_token_id is None:
        raise ValueError("its tokenizer has no padding token")
    if set(tokenizer("the task of a text")["input_ids"]) <= set(tokenizer.all_special_ids):
        raise ValueError("it has no tokenizer that knows a word")


def small(job: ClassifyJob, texts: Sequence[str]) -> tuple[Any, Any]:
    """A DeBERTa-v3 of under a million weights, untaught, and a tokenizer made from the texts; nothing is downloaded."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    tokenizer = small_tokenizer(texts, job.settings.max_length)
    positions = {"max_position_embeddings": max(512, job.settings.max_length), "pad_token_id": tokenizer.pad_token_id}
    config = DebertaV2Config(vocab_size=len(tokenizer), **SMALL, **positions, **labels_of(job))
    return DebertaV2ForSequenceClassification(config), tokenizer


def small_tokenizer(texts: Sequence[str], max_length: int) -> Any:
    """Byte-level BPE of at most SMALL_VOCABULARY tokens, without case; every digit is one token.

    Not WordPiece: its trainer numbers the continuing pieces in another order each time (tokenizers 0.23).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    special = list(SPECIAL.values())
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL_VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    sep, cls = ((SPECIAL[name], special.index(SPECIAL[name])) for name in ("sep_token", "cls_token"))
    tokenizer.post_processor = processors.BertProcessing(sep, cls)  # special tokens come first, in their order
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **SPECIAL)


def fit(model: Any, tokenizer: Any, rows: Sequence[Example], job: ClassifyJob, progress: Progress) -> None:
    """AdamW over all weights; the learning rate rises for a tenth of the steps and then falls to zero in a line."""
    import torch

    settings = job.settings
    steps = settings.epochs * -(-len(rows) // settings.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    rise = max(1, round(WARMUP * steps))
    slope = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    model.train()
    chance = random.Random(f"{job.random_seed}-classifier")
    epochs = (
        batch for _ in range(settings.epochs) for batch in batches(chance.sample(rows, len(rows)), settings.batch_size)
    )
    for step, batch in enumerate(epochs, 1):
        targets = torch.tensor([job.labels.index(row.task) for row in batch], device=model.device)
        inputs = padded(tokenizer, tokenised(tokenizer, batch, job), model.device)
        loss = model(**inputs, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        slope.step()
        optimizer.zero_grad()
        progress(step, steps, f"loss {loss.item():.3f}")


def batches(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The rows, `size` at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def tokenised(tokenizer: Any, rows: Sequence[Example], job: ClassifyJob) -> list[list[int]]:
    """The tokens of each row's head, the special ones at both ends included; those that a row quotes are text."""
    most = min(job.settings.max_length, tokenizer.model_max_length)  # BERT has 512 places and no more
    heads = [head(row, job) for row in rows]
    found = tokenizer(heads, truncation=True, max_length=most, split_special_tokens=True)
    return list(found["input_ids"])


def padded(tokenizer: Any, tokens: Sequence[Sequence[int]], device: Any) -> dict[str, Any]:
    """Tokens as tensors of rows x the longest row, with the mask that tells them from the padding."""
    import torch

    longest = max(map(len, tokens))
    ids = torch.tensor([[*row, *[tokenizer.pad_token_id] * (longest - len(row))] for row in tokens], device=device)
    lengths = torch.tensor([len(row) for row in tokens], device=device)
    mask = (torch.arange(longest, device=device)[None] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def predict(
    model: Any, tokenizer: Any, rows: Sequence[Example], job: ClassifyJob, progress: Progress = untold
) -> list[Prediction]:
    """The likeliest label of each row and its probability, in the order of the rows.

    Rows of like length are read together, as many as AT_ONCE tokens, the longest first: whether memory holds them is
    seen at once.
    """
    import torch

    model.eval()
    tokens = tokenised(tokenizer, rows, job) if rows else []
    found: dict[int, Prediction] = {}
    with torch.inference_mode():
        for places in by_length([len(row) for row in tokens], AT_ONCE[model.device.type]):
            inputs = padded(tokenizer, [tokens[place] for place in places], model.device)
            sure, best = model(**inputs).logits.float().softmax(-1).max(-1)
            for place, label, probability in zip(places, best.tolist(), sure.tolist(), strict=True):
                found[place] = Prediction(rows[place].id, job.labels[label], round(probability, 6))
            progress(len(found), len(rows), "rows labelled")
    return [found[place] for place in range(len(rows))]


def by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Places of rows in batches of `most` tokens with the padding, the longest first; a longer row stands alone."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    while order:
        size = max(1, most // max(1, lengths[order[0]]))
        yield order[:size]
        del order[:size]


def compare(held: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """How often the teacher's label is given, in all and by label, with Wilson's 95 % intervals.

    `confusion` has, for each of the teacher's labels, the rows by the label that the classifier gives.
    """
    pairs = Counter((row.task, found.task) for row, found in zip(held, predictions, strict=True))
    confusion: dict[str, dict[str, int]] = defaultdict(dict)
    for (label, found), rows in sorted(pairs.items()):
        confusion[label][found] = rows
    by_label = {label: share_of(row.get(label, 0), sum(row.values())) for label, row in confusion.items()}
    agree = sum(label["agree"] for label in by_label.values())
    whole_share = share_of(agree, len(held))
    return {"agreement": agree / len(held), **whole_share, "by_label": by_label, "confusion": confusion}


def share_of(agree: int, rows: int) -> dict[str, Any]:
    """So many of so many rows, and the interval of their share."""
    return {"rows": rows, "agree": agree, "interval": wilson_interval([n < agree for n in range(rows)])}


if __name__ == "__main__":
    sys.exit(child_main(run_folder, single_gpu_variables()))
