"""Train on preference pairs: their rows, arguments and trainer, which is TRL's DPOTrainer (arXiv 2305.18290)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tapir_local.recipe.schema import Train
from tapir_local.records import PreferencePair
from tapir_local.training.job import IGNORED_LABEL, TokenRows, TrainJob, sft_arguments, token_rows
from tapir_local.training.model import Hardware

REFERENCE = "ref"  # DPOTrainer's name for its frozen copy of the adapter that training starts from
SFT_ARGUMENTS = ("dataset_kwargs", "packing", "packing_strategy", "padding_free")  # which DPOConfig does not need


def preference_settings(settings: Train) -> Train:
    """The settings of a training on pairs: with TRL and unpacked, at its own learning rate, in a schedule of its own.

    Unsloth replaces DPOTrainer too, but whether its reference is the adapter was never tried (see docs/gpu.md).
    """
    own = {"backend": "trl", "packing": False, "learning_rate": settings.preference_learning_rate}
    return settings.model_copy(update=own | ({"schedule": "cosine"} if settings.schedule == "wsd" else {}))


def pair_rows(pairs: Sequence[PreferencePair], tokenizer: Any, max_length: int) -> TokenRows:
    """Token ids of prompt, chosen and rejected answer of every pair of which both answers can be trained on, in order.

    The ids are those of `token_rows`. `input_ids` is the longer of the two sequences: rows are ordered by its length.
    """
    chosen = token_rows(pairs, tokenizer, max_length)
    rejected = token_rows([replace(pair, completion=pair.rejected) for pair in pairs], tokenizer, max_length)
    lost = {row.id: row for side in (rejected, chosen) for row in side.left_out}
    rows = []
    for good, bad in zip(*(kept_rows(pairs, side, lost) for side in (chosen, rejected)), strict=True):
        prompt = good["labels"].count(IGNORED_LABEL)
        rows.append(
            {
                "input_ids": max(good["input_ids"], bad["input_ids"], key=len),
                "prompt_ids": good["input_ids"][:prompt],
                "chosen_ids": good["input_ids"][prompt:],
                "rejected_ids": bad["input_ids"][prompt:],
            }
        )
    return TokenRows(rows, tuple(lost[pair.id] for pair in pairs if pair.id in lost))


def kept_rows(pairs: Sequence[PreferencePair], side: TokenRows, lost: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The token rows of one answer of each pair that is not lost."""
    own = {row.id for row in side.left_out}
    numbers = [pair.id for pair in pairs if pair.id not in own]
    return [row for id, row in zip(numbers, side.rows, strict=True) if id not in lost]


def dpo_arguments(job: TrainJob, hardware: Hardware, rows: int) -> dict[str, Any]:
    """The arguments of DPOConfig except `output_dir`. DPO needs no dropout, and TRL turns it off."""
    common = sft_arguments(job, hardware, rows)
    own = {"loss_type": ["sigmoid"], "beta": job.settings.preference_beta, "precompute_ref_log_probs": False}
    return {name: value for name, value in common.items() if name not in SFT_ARGUMENTS} | own


def dpo_classes() -> tuple[Any, Any]:
    """DPOConfig, and a DPOTrainer for rows that are token ids already.

    Given a PEFT model, it copies the adapter with its weights and takes the copy as the reference.
    """
    from trl import DPOConfig, DPOTrainer

    return DPOConfig, type("PairTrainer", (DPOTrainer,), {"_prepare_dataset": lambda self, rows, *_: rows})


def drop_reference(model: Any) -> None:
    """Delete the reference after training; it would be saved beside the adapter."""
    if REFERENCE in getattr(model, "peft_config", {}):
        model.delete_adapter(REFERENCE)
