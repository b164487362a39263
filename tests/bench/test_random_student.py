"""Random students have the shapes that their names promise, and a tokenizer that spells every text."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

spec = importlib.util.spec_from_file_location(
    "random_student", Path(__file__).parents[2] / "bench" / "random_student.py"
)
assert spec
assert spec.loader
students = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = students  # dataclasses look their module up
spec.loader.exec_module(students)

# Parameters of the published models, in millions, tied embeddings counted once.
PUBLISHED = {
    "qwen1.5": {"0.5b": 464, "1.8b": 1837},
    "qwen2": {"0.5b": 494, "1.5b": 1544, "3b": 3086, "7b": 7616},
    "qwen3": {"0.6b": 596, "1.7b": 1721, "4b": 4022, "8b": 8191},
    "smollm2": {"135m": 134.5, "360m": 361.8, "1.7b": 1711},
    "llama2": {"7b": 6738, "13b": 13016},
    "llama3": {"1b": 1236, "3b": 3213, "8b": 8030},
    "mistral": {"7b": 7242},
    "gemma2": {"2b": 2614, "9b": 9242},
    "gemma3": {"270m": 268, "1b": 1000},
}
EVERY = [(family, size) for family, sizes in students.SHAPES.items() for size in sizes]


@pytest.mark.parametrize(("family", "size"), EVERY)
def test_a_shape_has_as_many_weights_as_the_published_model(family: str, size: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ends = {"bos_token_id": 0, "eos_token_id": 1}
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(students.make_config(family, students.SHAPES[family][size], ends))
    assert model.num_parameters() / 1e6 == pytest.approx(PUBLISHED[family][size], rel=0.003)


@pytest.mark.parametrize("family", list(students.TONGUES))
def test_a_tokenizer_spells_every_text_and_its_template_ends_a_turn(family: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    students.make_config(
        family,
        next(iter(students.SHAPES[family].values())),
        students.make_tokenizer(tmp_path, students.TONGUES[family]),
    ).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "Hé 12 + 345 🙂 你好"}, {"role": "assistant", "content": "x = 1"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    ends = tokenizer.convert_tokens_to_ids([tokenizer.eos_token, "<end_of_turn>"])
    assert set(ends) & set(ids[-2:])


def test_weights_are_split_into_files_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    small = students.Shape((64, 128, 4, 4, 2, 4096), True, students.theta(1e4, 512))
    monkeypatch.setitem(students.SHAPES["qwen2"], "tiny", small)
    monkeypatch.setattr(students, "SHARD", 600_000)
    folder = students.make_student(tmp_path / "student", "qwen2", "tiny")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.05)
