"""A home-trained tokenizer like Gemma's: SentencePiece's pieces and byte fallback, spaces as ▁, no prefix."""

from pathlib import Path
from typing import Any

from models import CORPUS, MAKERS

GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' "
    "+ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
SPACES = ["▁" * count for count in range(2, 17)]  # as Gemma has them: added tokens that stand for runs of spaces


def train_pieces(vocab: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces within words, each with the space before it, and the merges that make them."""
    import json

    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*|[^▁]+"), behavior="isolated")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocab, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def make_gemma_tokenizer(folder: Path, kind: str = "gemma", template: str = GEMMA, vocab: int = 400) -> Any:
    """Saved as google's are: GemmaTokenizer, added tokens of spaces, bytes <0x00> to <0xFF>."""
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer

    pieces, merges = train_pieces(vocab)
    runs = [("▁" * left, "▁" * (count - left)) for count in range(2, 17) for left in range(1, count)]
    rows = dict.fromkeys([*SPECIAL, *SPACES, *(f"<0x{number:02X}>" for number in range(256)), *pieces])
    numbered = {text: number for number, text in enumerate(rows)}
    tokenizer = GemmaTokenizer(vocab=numbered, merges=list(dict.fromkeys([*runs, *merges])))
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL[5:]], special_tokens=True
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in [*SPACES, "<tool>"]])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


MAKERS["gemma"] = make_gemma_tokenizer
