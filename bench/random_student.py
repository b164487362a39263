"""Make a student with random weights in the shape of a real model, for benches and tests without downloads.

    python bench/random_student.py --family qwen2 --size 0.5b --out models/random-qwen2-0.5b
    python bench/random_student.py --family llama2 --size 7b --tokenizer FOLDER --out models/random-llama2-7b
    python bench/random_student.py --list

Shapes, vocabulary sizes and rotary settings are those of the published config.json files. Weights are normal with
standard deviation 0.02 in bf16 (norms about 1), written shard by shard, so a 7B takes 2 GB of memory. They are drawn
on a GPU if there is one, which is faster and gives other numbers than a CPU. The tokenizer is trained here on the
program's own sources: a few thousand tokens of the family's kind, with its chat tokens and template; the other rows of
the embedding are unused. `--tokenizer` copies the files of a real tokenizer instead.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHARD = 2_000_000_000  # bytes of a safetensors file at the most
LETTERS, REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>' + "
    "'\n\n' + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + "
    "('model' if message['role'] == 'assistant' else 'user') + '\n' + message['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Tongue:
    """A family's tokenizer: how it splits text, its chat template and its special tokens, BOS and EOS first."""

    split: str
    template: str
    special: tuple[str, ...]
    bos: bool = True


@dataclass(frozen=True)
class Shape:
    """Values of a published config.json. `numbers`: hidden, intermediate, layers, heads, KV heads, vocabulary."""

    numbers: tuple[int, int, int, int, int, int]
    tied: bool
    rest: dict[str, Any] = field(default_factory=dict)


QWEN = Tongue("qwen2", CHATML, ("<|endoftext|>", "<|im_end|>", "<|im_start|>"), bos=False)
TONGUES = {
    "qwen1.5": QWEN,
    "qwen2": QWEN,
    "qwen3": QWEN,
    "smollm2": Tongue("smollm", CHATML, ("<|im_start|>", "<|im_end|>", "<|endoftext|>")),
    "llama2": Tongue("sentencepiece", INST, ("<s>", "</s>", "<unk>")),
    "mistral": Tongue("sentencepiece", INST, ("<s>", "</s>", "<unk>")),
    "llama3": Tongue(
        "llama3", HEADERS, ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    ),
    "gemma2": Tongue("gemma", TURNS, ("<bos>", "<eos>", "<unk>", "<pad>", "<start_of_turn>", "<end_of_turn>")),
    "gemma3": Tongue("gemma", TURNS, ("<bos>", "<eos>", "<unk>", "<pad>", "<start_of_turn>", "<end_of_turn>")),
}
KINDS = {"qwen1.5": "qwen2", "llama2": "llama", "llama3": "llama", "smollm2": "llama", "gemma3": "gemma3_text"}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def theta(base: float, context: int, eps: float = 1e-6) -> dict[str, Any]:
    """Rotary base, context and norm epsilon."""
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
    }


def llama3(factor: float) -> dict[str, Any]:
    """Llama 3.1's and 3.2's rotary scaling."""
    return theta(0, 131072, 1e-5) | {"rope_parameters": LLAMA3 | {"factor": factor}}


GEMMA2 = theta(1e4, 8192) | {"head_dim": 256, "sliding_window": 4096, "query_pre_attn_scalar": 256}
GEMMA3 = {"head_dim": 256, "sliding_window": 512, "query_pre_attn_scalar": 256, "max_position_embeddings": 32768}
MISTRAL = theta(1e6, 32768, 1e-5) | {"sliding_window": None}
SHAPES: dict[str, dict[str, Shape]] = {
    "qwen1.5": {
        "0.5b": Shape((1024, 2816, 24, 16, 16, 151936), True, theta(1e6, 32768)),
        "1.8b": Shape((2048, 5504, 24, 16, 16, 151936), False, theta(1e6, 32768)),
    },
    "qwen2": {
        "0.5b": Shape((896, 4864, 24, 14, 2, 151936), True, theta(1e6, 32768)),
        "1.5b": Shape((1536, 8960, 28, 12, 2, 151936), True, theta(1e6, 32768)),
        "3b": Shape((2048, 11008, 36, 16, 2, 151936), True, theta(1e6, 32768)),
        "7b": Shape((3584, 18944, 28, 28, 4, 152064), False, theta(1e6, 32768)),
    },
    "qwen3": {
        "0.6b": Shape((1024, 3072, 28, 16, 8, 151936), True, theta(1e6, 40960) | {"head_dim": 128}),
        "1.7b": Shape((2048, 6144, 28, 16, 8, 151936), True, theta(1e6, 40960) | {"head_dim": 128}),
        "4b": Shape((2560, 9728, 36, 32, 8, 151936), True, theta(1e6, 40960) | {"head_dim": 128}),
        "8b": Shape((4096, 12288, 36, 32, 8, 151936), False, theta(1e6, 40960) | {"head_dim": 128}),
    },
    "smollm2": {
        "135m": Shape((576, 1536, 30, 9, 3, 49152), True, theta(1e5, 8192, 1e-5)),
        "360m": Shape((960, 2560, 32, 15, 5, 49152), True, theta(1e5, 8192, 1e-5)),
        "1.7b": Shape((2048, 8192, 24, 32, 32, 49152), True, theta(1.3e5, 8192, 1e-5)),
    },
    "llama2": {
        "7b": Shape((4096, 11008, 32, 32, 32, 32000), False, theta(1e4, 4096, 1e-5)),
        "13b": Shape((5120, 13824, 40, 40, 40, 32000), False, theta(1e4, 4096, 1e-5)),
    },
    "llama3": {
        "1b": Shape((2048, 8192, 16, 32, 8, 128256), True, llama3(32) | {"head_dim": 64}),
        "3b": Shape((3072, 8192, 28, 24, 8, 128256), True, llama3(32) | {"head_dim": 128}),
        "8b": Shape((4096, 14336, 32, 32, 8, 128256), False, llama3(8)),
    },
    "mistral": {"7b": Shape((4096, 14336, 32, 32, 8, 32000), False, MISTRAL)},
    "gemma2": {
        "2b": Shape((2304, 9216, 26, 8, 4, 256000), True, GEMMA2),
        "9b": Shape((3584, 14336, 42, 16, 8, 256000), True, GEMMA2),
    },
    "gemma3": {
        "270m": Shape((640, 2048, 18, 4, 1, 262144), True, GEMMA3),
        "1b": Shape((1152, 6912, 26, 4, 1, 262144), True, GEMMA3),
    },
}


def main() -> None:
    """Make the student that the options name, or list the known ones."""
    asked = arguments()
    if asked.list:
        print("\n".join(f"{family}: {', '.join(sizes)}" for family, sizes in SHAPES.items()))
        return
    if asked.size not in SHAPES[asked.family]:
        sys.exit(f"error: {asked.family} has the sizes {', '.join(SHAPES[asked.family])}")
    make_student(asked.out, asked.family, asked.size, seed=asked.random_seed, tokenizer=asked.tokenizer)
    weights = sum(file.stat().st_size for file in asked.out.glob("*.safetensors"))
    print(f"{asked.out}: {weights / 2e9:.2f} billion random weights in bf16")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=SHAPES, default="qwen2")
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a real tokenizer's files, to be copied")
    parser.add_argument("--random-seed", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="families and sizes")
    asked = parser.parse_args()
    if not (asked.list or asked.out):
        parser.error("--out is missing")
    return asked


def make_student(out: Path, family: str, size: str, *, seed: int = 1, tokenizer: Path | None = None) -> Path:
    """Write config, tokenizer and weights into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tongue = TONGUES[family]
    if tokenizer:
        for file in tokenizer.iterdir():
            if file.name != "config.json":
                shutil.copyfile(file, out / file.name)
        ends = read_ends(out, tongue)
    else:
        ends = make_tokenizer(out, tongue)
    config = make_config(family, SHAPES[family][size], ends)
    write_weights(config, out, seed)
    return out


def read_ends(out: Path, tongue: Tongue) -> dict[str, int | None]:
    """BOS and EOS of a copied tokenizer; it gets the family's template if it has none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    if not tokenizer.chat_template:
        (out / "chat_template.jinja").write_text(tongue.template)
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


def make_tokenizer(out: Path, tongue: Tongue, vocabulary: int = 4000) -> dict[str, int | None]:
    """Train a tokenizer on this repository's sources and save it with its template. Returns its BOS and EOS."""
    from tokenizers import trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer, extra = empty_tokenizer(tongue)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*tongue.special, *extra],
        initial_alphabet=alphabet(tongue),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if extra:
        tokenizer.pre_tokenizer = None  # words were split for training only; SentencePiece merges over a whole text
    bos, eos = tongue.special[:2]
    pad = "<pad>" if "<pad>" in tongue.special else tongue.special[0]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos if tongue.bos else None,
        eos_token=eos,
        pad_token=pad,
        unk_token="<unk>" if "<unk>" in tongue.special else None,
    )
    fast.chat_template = tongue.template
    fast.save_pretrained(out)
    return {"bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id}


def empty_tokenizer(tongue: Tongue) -> tuple[Any, list[str]]:
    """A byte-level BPE, or one in SentencePiece's form; the second value is its 256 byte tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if tongue.split in ("sentencepiece", "gemma"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        cut = pre_tokenizers.Split(Regex("▁?[^▁]+|▁+"), behavior="isolated")
        tokenizer.pre_tokenizer = cut
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        return tokenizer, [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE())
    digits = {"qwen2": r"\p{N}", "llama3": r"\p{N}{1,3}"}.get(tongue.split)
    first = (
        pre_tokenizers.Split(Regex(f"{CONTRACTIONS}|{LETTERS}|{digits}|{REST}"), behavior="isolated")
        if digits
        else pre_tokenizers.Digits(individual_digits=True)
    )
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not digits)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, plain])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, []


def alphabet(tongue: Tongue) -> list[str]:
    """The characters or bytes from which every text can be built."""
    from tokenizers import pre_tokenizers

    return [] if tongue.split in ("sentencepiece", "gemma") else pre_tokenizers.ByteLevel.alphabet()


def texts() -> Iterator[str]:
    """The repository's sources and Markdown pages."""
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "tapir_local").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]):
        yield path.read_text(encoding="utf-8")


def make_config(family: str, shape: Shape, ends: dict[str, int | None]) -> Any:
    """The configuration of transformers."""
    from transformers import AutoConfig

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    numbers = dict(zip((*names, "vocab_size"), shape.numbers, strict=True))
    return AutoConfig.for_model(
        KINDS.get(family, family), **numbers, tie_word_embeddings=shape.tied, **ends, **shape.rest
    )


def write_weights(config: Any, out: Path, seed: int) -> None:
    """Write random tensors to safetensors files of at most SHARD bytes, with an index if there are several."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}  # tied weights once
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(out)
    shards = list(split(shapes))
    chance = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
    norm = 0.0 if "gemma" in config.model_type else 1.0  # Gemma's norms multiply by 1 + weight
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file({name: draw(name, shapes[name], chance, norm) for name in names}, out / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": 2 * sum(map(prod, shapes.values()))}, "weight_map": where}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def draw(name: str, shape: tuple[int, ...], chance: Any, norm: float) -> Any:
    """One tensor in bf16."""
    import torch

    mean = norm if "norm" in name else 0.0
    drawn = torch.empty(shape, dtype=torch.float32, device=chance.device).normal_(mean, 0.02, generator=chance)
    return drawn.to(torch.bfloat16).cpu()


def split(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of the tensors that go into one file."""
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if group and size + 2 * prod(shape) > SHARD:
            yield group
            group, size = [], 0
        group.append(name)
        size += 2 * prod(shape)
    yield group


if __name__ == "__main__":
    main()
