"""Which library and device train: Unsloth if it works, else TRL; one of several GPUs; the CPU with a warning."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from training_rows import WEIGHTS, make_job, resolved

from tapir_local.doctor.doctor import check_gpu
from tapir_local.errors import TapirError
from tapir_local.memory import allocator_variables, list_visible_gpus, single_gpu_variables
from tapir_local.training.train import run_training, train_student

DRIVER = """#!/bin/sh
case "$*" in
  *-L*)
    echo 'GPU 0: NVIDIA A (UUID: GPU-aaaa-0)'
    echo 'GPU 1: NVIDIA B (UUID: GPU-bbbb-1)'
    echo 'GPU 2: NVIDIA C (UUID: GPU-cccc-2)'
    echo '  MIG 1g.10gb     Device  0: (UUID: MIG-dddd-3)' ;;
  *)
    echo 'NVIDIA A, 2048, 24576'
    echo 'NVIDIA B, 20480, 24576'
    echo 'NVIDIA C, 4096, 24576' ;;
esac
"""
OLD_DRIVER = """#!/bin/sh
case "$*" in
  *driver_version*) echo 550.54.14; echo 550.54.14 ;;
  *) echo 'NVIDIA A, 20480, 24576' ;;
esac
"""
# Runs `import unsloth` in its own process: prints the backend or the error, and the remarks.
IMPORT = """
import json, sys
from tapir_local.errors import TapirError
from tapir_local.training.model import choose_backend
from tapir_local.recipe.schema import Train
said = []
try:
    found = choose_backend(Train(backend=sys.argv[1]), "bf16", 1, said.append)
except TapirError as error:
    found = str(error)
print(json.dumps([found, said, sorted(name for name in sys.modules if name.startswith("unsloth"))]))
"""
ERRORS = {
    "ImportError('no bitsandbytes')": "ImportError: no bitsandbytes",
    "NotImplementedError('Unsloth: no NVIDIA GPU found?')": "NotImplementedError: Unsloth: no NVIDIA GPU found?",
    "RuntimeError('the driver is too old\\nand more')": "RuntimeError: the driver is too old",
    "AttributeError('torch has no _inductor')": "AttributeError: torch has no _inductor",
    "OSError('libcuda.so: cannot open')": "OSError: libcuda.so: cannot open",
    "AssertionError()": "AssertionError: AssertionError",
}


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put an nvidia-smi on the PATH."""

    def put(script: str) -> None:
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(script)
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}:/bin:/usr/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return put


def imported(place: Path, body: str, backend: str) -> tuple[str, list[str], list[str]]:
    """What choose_backend() returns for an `unsloth` with this body, which first imports a submodule of its own."""
    (place / "unsloth").mkdir(exist_ok=True)
    (place / "unsloth" / "part.py").write_text("")
    (place / "unsloth" / "__init__.py").write_text(f"import unsloth.part\n{body}\n")
    out = subprocess.run(
        [sys.executable, "-c", IMPORT, backend],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(place), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    found, said, modules = json.loads(out.stdout)
    return found, said, modules


@pytest.mark.parametrize("error", ERRORS)
def test_an_unsloth_that_cannot_be_imported_is_not_used_and_reported(tmp_path: Path, error: str) -> None:
    found, said, modules = imported(tmp_path, f"raise {error}", "auto")
    assert (found, modules) == ("trl", [])
    remark = "Training with TRL and PEFT instead of Unsloth: it cannot be imported"
    assert said == [f"{remark} ({ERRORS[error]})."]
    found, said, _ = imported(tmp_path, f"raise {error}", "unsloth")
    assert found.startswith(f"train.backend: Unsloth cannot be used: it cannot be imported ({ERRORS[error]})")
    assert said == []


def test_an_unsloth_that_can_be_imported_is_used(tmp_path: Path) -> None:
    for backend in ("auto", "unsloth"):
        assert imported(tmp_path, "", backend) == ("unsloth", [], ["unsloth", "unsloth.part"])


# Only the first child process sees a GPU; its Unsloth cannot load a model.
FIRST_CHILD = """
import sys
from pathlib import Path
from types import SimpleNamespace

mark = Path(__file__).with_name("mark")
if "tapir_local.training.train" in sys.orig_argv and not mark.exists():
    mark.touch()
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda **_: True
    torch.cuda.mem_get_info = lambda *_: (8 << 30, 8 << 30)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(is_integrated=False)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_arch_list = lambda: ["sm_75", "sm_90"]
"""
UNSLOTH = """
import peft, transformers, trl

def fail(*_, **__):
    raise {error}

class FastLanguageModel:
    @staticmethod
    def from_pretrained(model, **_):
        return transformers.AutoModelForCausalLM.from_pretrained(model), None

    @staticmethod
    def get_peft_model(model, use_gradient_checkpointing, random_state, **shape):
        return peft.get_peft_model(model, peft.LoraConfig(**shape))

{where} = fail
"""
LOAD, LORA, TRAIN = "FastLanguageModel.from_pretrained", "FastLanguageModel.get_peft_model", "trl.SFTConfig"
FAILURES = {
    "load the model (ImportError: Unsloth: please install bitsandbytes)": (
        LOAD,
        "ImportError('Unsloth: please install bitsandbytes\\nand more')",
    ),
    "load the model (RuntimeError: Unsloth: this tokenizer has no token to pad with)": (
        LOAD,
        "RuntimeError('Unsloth: this tokenizer has no token to pad with')",
    ),
    "add LoRA to the model (RuntimeError: no layers)": (LORA, "RuntimeError('no layers')"),
    "train the model (ValueError: Unsloth: untrained tokens found)": (
        TRAIN,
        "ValueError('Unsloth: untrained tokens found')",
    ),
}


# TRL's turn takes as long as three others, so it is taken after the first and the last kind of failure.
@pytest.mark.parametrize(
    ("failure", "backend"),
    [*((failure, "unsloth") for failure in FAILURES), (min(FAILURES), "auto"), (max(FAILURES), "auto")],
)
def test_trl_replaces_an_unsloth_that_fails_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, backend: str
) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(FIRST_CHILD)
    where, error = FAILURES[failure]
    (tmp_path / "path" / "unsloth.py").write_text(UNSLOTH.format(where=where, error=error))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "path"), *sys.path]))
    job, said = make_job(tmp_path, backend=backend, epochs=1.0), list[str]()
    why = f"Unsloth cannot {failure}"
    if backend == "unsloth":
        with pytest.raises(TapirError, match="Unsloth cannot") as caught:
            run_training(job, tmp_path / "train", None, said.append)
        assert caught.value.what == why
        assert not job.out.exists()
        return
    run_training(job, tmp_path / "train", None, said.append)
    assert f"Training with TRL and PEFT instead of Unsloth: {why}." in said
    assert resolved(job.out)["backend"] == "trl"
    assert (job.out / WEIGHTS).exists()


# Records where Unsloth would keep its code, and what is there already.
RECORDING = """
import json, os
from pathlib import Path

place = Path(os.environ["UNSLOTH_COMPILE_LOCATION"])
Path({record!r}).write_text(json.dumps([str(place), sorted(file.name for file in place.iterdir())]))
(place / "UnslothSFTTrainer.py").touch()
"""


def test_the_code_that_unsloth_generates_is_kept_from_one_training_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder may be deleted; a temporary one replaces it where it cannot be made."""
    path, cache = tmp_path / "path", tmp_path / "cache" / "unsloth"
    (path / "unsloth-1.2.dist-info").mkdir(parents=True)
    (path / "unsloth-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: unsloth\nVersion: 1.2\n")
    (path / "sitecustomize.py").write_text(FIRST_CHILD)
    body = RECORDING.format(record=str(tmp_path / "seen")) + "raise RuntimeError('no')"
    (path / "unsloth.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path), *sys.path]))
    job = replace(make_job(tmp_path, backend="unsloth"), unsloth_cache=cache)

    def location() -> tuple[Path, list[str]]:
        """Where the code is, and what was there before. The training ends where Unsloth is imported."""
        (path / "mark").unlink(missing_ok=True)
        with pytest.raises(TapirError, match="RuntimeError: no"):
            run_training(job, tmp_path / "train", None, lambda _: None)
        place, before = json.loads((tmp_path / "seen").read_text())
        return Path(place), before

    place, before = location()
    assert (place.parent, before) == (cache, [])
    assert place.name.startswith("unsloth-1.2_torch-")
    assert location() == (place, ["UnslothSFTTrainer.py"])
    shutil.rmtree(cache)
    assert location() == (place, [])
    shutil.rmtree(cache)
    cache.touch()
    place, before = location()
    assert (place.name.startswith("tapir-train-"), before) == (True, [])
    assert not place.exists()


# GPUs


def test_a_training_sees_the_one_gpu_with_the_most_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Callable[[str], None]
) -> None:
    """The variables are those of the child process, which writes them to a file when it ends."""
    driver(DRIVER)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(
        "import atexit, json, os, sys\n"
        "if 'tapir_local.training.train' in sys.orig_argv:\n"
        f"    atexit.register(lambda: open({str(tmp_path / 'seen')!r}, 'w').write(json.dumps(dict(os.environ))))\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "path"), *sys.path]))
    job = make_job(tmp_path)
    with pytest.raises(TapirError, match="no such folder"):
        run_training(replace(job, model=str(tmp_path / "nowhere")), tmp_path / "train", None, lambda _: None)
    seen = json.loads((tmp_path / "seen").read_text())
    assert (seen["CUDA_DEVICE_ORDER"], seen["CUDA_VISIBLE_DEVICES"]) == ("PCI_BUS_ID", "1")
    assert seen.get("PYTORCH_ALLOC_CONF") == allocator_variables().get("PYTORCH_ALLOC_CONF")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(
    ("named", "visible", "chosen"),
    [
        (None, "ABC", "1"),
        ("0,2", "AC", "2"),
        ("2, 0", "CA", "2"),
        ("0,1,2", "ABC", "1"),
        ("1", "B", None),
        ("0", "A", None),
        ("", "", None),
        ("-1", "", None),
        ("0,-1,1", "A", None),
        ("GPU-aaaa,GPU-cccc-2", "AC", "2"),
        ("GPU-bbbb", "B", None),
        ("MIG-dddd-3", "C", None),
        ("MIG-none", "", None),
    ],
)
def test_a_gpu_is_chosen_among_those_that_the_user_left_visible(
    monkeypatch: pytest.MonkeyPatch, driver: Callable[[str], None], named: str | None, visible: str, chosen: str | None
) -> None:
    driver(DRIVER)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert "".join(gpu.name[-1] for gpu in list_visible_gpus()) == visible
    expected = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": chosen} if chosen else {}
    assert single_gpu_variables() == expected


def test_a_launchers_processes_keep_all_gpus(monkeypatch: pytest.MonkeyPatch, driver: Callable[[str], None]) -> None:
    driver(DRIVER)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert single_gpu_variables() == {}


def test_a_gpu_that_torch_cannot_use_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Callable[[str], None]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    driver(OLD_DRIVER)
    said: list[str] = []
    job = make_job(tmp_path, epochs=1.0)
    train_student(job, lambda done, total, note: said.append(note) if not total else None)
    (remark,) = said
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    found = f"The driver 550.54.14 lists NVIDIA A, but torch {torch.__version__} ({build}) cannot use it"
    assert remark.startswith(f"{found}. Training runs on the CPU")
    assert resolved(job.out)["device"] == "cpu"
    assert check_gpu().found == f"{found}: training and generation run on the CPU"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_gpu().found == "none: training and generation run on the CPU"


def test_rows_longer_than_the_student_supports_are_left_out(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    said: list[str] = []
    train_student(replace(job, max_length=4096), lambda done, total, note: said.append(note) if not total else None)
    assert said == ["The student supports 40 tokens: longer rows are left out (student.max_length is 4,096)."]
    assert resolved(job.out)["sft"]["max_length"] == 40
    assert resolved(job.out)["rows"] == {"trained": 25, "dropped": 7}
