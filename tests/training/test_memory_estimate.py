"""The memory of a training is estimated from file headers, and a training that does not fit is refused with the
figures."""

import json
import shutil
from pathlib import Path

import pytest
from models import make_model
from training_rows import SETTINGS

from tapir_local.errors import TapirError
from tapir_local.recipe.schema import Train
from tapir_local.training.memory_estimate import (
    LOSS_CHUNK,
    activation_bytes,
    check_training_memory,
    estimate_memory,
    use_gradient_checkpointing,
)
from tapir_local.training.model import Hardware

GPU = Hardware("cuda", "trl", "bf16", 24 << 30)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def shards(base, tmp_path) -> Path:
    """The model in several files."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "shards"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="100KB")
    return folder


def method(name: str) -> Train:
    return SETTINGS.model_copy(update={"method": name})


def test_parameters_and_lora_are_counted_as_torch_and_peft_do(base) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    count = sum(part.numel() for part in model.parameters())
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapter = sum(part.numel() for part in lora.parameters() if part.requires_grad)
    needs = estimate_memory(str(base), SETTINGS, GPU, 512)
    assert needs
    assert (needs.parameters, needs.weights, needs.state) == (count, 2 * count, 16 * adapter)


def test_full_takes_sixteen_bytes_a_weight_and_qlora_the_least(base) -> None:
    full, lora, four = (estimate_memory(str(base), method(name), GPU, 512) for name in ("full", "lora", "qlora"))
    assert full
    assert lora
    assert four
    assert full.fixed == 16 * full.parameters
    assert four.weights < lora.weights < full.weights


def test_shards_are_counted_as_one(base, shards) -> None:
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert estimate_memory(str(shards), SETTINGS, GPU, 512) == estimate_memory(str(base), SETTINGS, GPU, 512)


def test_missing_shards_are_named(shards) -> None:
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(TapirError, match=rf"1 of the model's \d weight files are missing: {gone.name}"):
        estimate_memory(str(shards), SETTINGS, GPU, 512)


@pytest.mark.parametrize(
    ("bytes_kept", "said"), [(-100, "ends before tensor"), (4, "cannot be read"), (0, "cannot be read")]
)
def test_a_damaged_file_of_weights_is_named(base, tmp_path, bytes_kept: int, said: str) -> None:
    shutil.copytree(base, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:bytes_kept])
    with pytest.raises(TapirError, match=said) as caught:
        estimate_memory(str(tmp_path / "m"), SETTINGS, GPU, 512)
    assert caught.value.where == str(file)


def test_there_is_no_estimate_for_a_hub_name_or_without_safetensors(tmp_path) -> None:
    assert estimate_memory("someone/model", SETTINGS, GPU, 512) is None
    assert estimate_memory(str(tmp_path), SETTINGS, GPU, 512) is None


def room(base: Path, free: int, settings: Train = SETTINGS, device: str = "cpu") -> list[str]:
    said: list[str] = []
    hardware = Hardware(device, "trl", "f32", free, total=24 << 30)
    needs = estimate_memory(str(base), settings, hardware, 512)
    assert needs
    check_training_memory(needs, settings, hardware, False, said.append)
    return said


def test_a_training_that_does_not_fit_is_refused_with_figures(base) -> None:
    with pytest.raises(
        TapirError, match=r"the weights take 0\.\d MB, .* optimizer 0\.\d MB, .*; 0\.1 MB of main memory"
    ):
        room(base, 100_000)
    with pytest.raises(TapirError) as caught:
        room(base, 100_000, method("full"))
    assert "train.method: lora" in caught.value.fix


def test_a_training_that_may_not_fit_is_reported(base) -> None:
    assert room(base, 1_000_000)[0].startswith("Memory may run out: the weights take 0.")


def test_the_estimate_is_always_reported_on_a_gpu(base) -> None:
    assert room(base, 1 << 34) == []
    assert "17.2 GB of the GPU's 25.8 GB are free" in room(base, 1 << 34, device="cuda")[0]


def test_gradient_checkpointing_follows_the_setting_or_the_free_memory(base) -> None:
    needs = estimate_memory(str(base), SETTINGS, GPU, 512)
    tight = Hardware("cuda", "trl", "bf16", needs.fixed + needs.activations if needs else 0)
    assert use_gradient_checkpointing(SETTINGS, tight, needs)
    assert not use_gradient_checkpointing(SETTINGS, GPU, needs)
    for asked in (True, False):
        assert (
            use_gradient_checkpointing(SETTINGS.model_copy(update={"gradient_checkpointing": asked}), tight, needs)
            is asked
        )


def test_activations_of_a_7b_student_need_checkpointing_on_24_gib_and_not_the_pocket_ones() -> None:
    assert activation_bytes(32, 4096, 32000, 4 * 2048) > 24 << 30
    assert activation_bytes(6, 224, 800, 16 * 128) < 1 << 30


def test_logits_count_for_one_chunk_of_the_loss_only() -> None:
    """Qwen2.5-1.5B with rows of 2,048 tokens: the second row takes what its layers keep."""
    one, two = (activation_bytes(28, 1536, 151936, rows * 2048) for rows in (1, 2))
    assert two - one == 68 * 2048 * 28 * 1536
    assert one - 68 * 2048 * 28 * 1536 == 12 * 256 * 151936


def test_trl_computes_the_loss_in_chunks_of_this_size() -> None:
    from trl.trainer import sft_trainer

    assert sft_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE == LOSS_CHUNK


def test_a_text_model_within_another_is_read_too(base, tmp_path) -> None:
    """Gemma 3's larger models have their sizes in `text_config`."""
    shutil.copytree(base, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({"text_config": config}))
    assert estimate_memory(str(tmp_path / "m"), SETTINGS, GPU, 512) == estimate_memory(str(base), SETTINGS, GPU, 512)


def test_logits_of_all_tokens_count_if_the_loss_takes_them_at_once(base) -> None:
    """As DPO does: three copies in 32 bits, also where activations are computed again."""
    part, whole = (estimate_memory(str(base), SETTINGS, GPU, 512, whole_logits=all) for all in (False, True))
    assert part
    assert whole
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    assert whole.activations - part.activations == 3 * 4 * (512 - 256) * vocabulary
    assert whole.checkpointed - part.checkpointed == 3 * 4 * 512 * vocabulary
