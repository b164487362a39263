"""llama.cpp in a process of its own: the same answers, as they are made, and one clear error if the process ends."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import children, kill_llama
from gpus import put_driver
from models import make_adapter
from students import CONFIG, PROMPTS

from tapir_local.errors import TapirError
from tapir_local.export.export import export_adapter, export_gguf
from tapir_local.files import write_record
from tapir_local.inference.context_plan import ContextPlan
from tapir_local.inference.generate import Callbacks, PromptGroup, PromptReply, ReplyHooks
from tapir_local.inference.lib import library
from tapir_local.inference.llama_process import (
    GenerateJob,
    LlamaJob,
    LlamaPlace,
    ReplyJob,
    ScoreJob,
    run_generate_job,
    run_reply_job,
    run_score_job,
)
from tapir_local.inference.model import STUDENT_ADVICE, open_model
from tapir_local.inference.tokens import encode
from tapir_local.records import Completion, Message, Scored, noop

HERE = LlamaPlace(apart=False)
NAMES = tuple(f"row-{number}" for number in range(len(PROMPTS)))
TEXTS = tuple((prompt, f"answer {number} 🙂") for number, prompt in enumerate(PROMPTS))


@pytest.fixture
def apart(tmp_path: Path) -> LlamaPlace:
    return LlamaPlace(apart=True, folder=tmp_path / "llama")


def generate_job(gguf: Path, **changes) -> GenerateJob:  # type: ignore[no-untyped-def]
    return replace(GenerateJob(gguf, tuple(PROMPTS), CONFIG, ids=NAMES), **changes)


def long_job(gguf: Path) -> GenerateJob:
    """A job that takes some seconds, so that it can be interrupted."""
    names = tuple(f"row-{number}" for number in range(20 * len(PROMPTS)))
    config = replace(CONFIG, max_tokens=100, context=400, parallel=2)
    return GenerateJob(gguf, tuple(PROMPTS * 20), config, ids=names)


# The same as in this process


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel": 3},
        {"temperature": 1.0, "seed": 7},
        {"stops": ("e",), "max_tokens": 9},
        {"schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
    ],
)
def test_answers_are_the_same_in_either_place(llama, apart, changes) -> None:
    job = generate_job(llama.gguf, config=replace(CONFIG, **changes))
    found = run_generate_job(job, place=apart)
    assert found == run_generate_job(job, place=HERE)
    assert [one.id for one in found] == list(NAMES)


def test_an_adapter_is_applied_there_too(tmp_path: Path, llama, apart) -> None:
    export_gguf(llama.model, tmp_path / "base.gguf", adapter=None, quant="f32")
    export_adapter(llama.model, make_adapter(llama.model, tmp_path / "lora"), tmp_path / "lora.gguf")
    job = generate_job(tmp_path / "base.gguf", adapter=tmp_path / "lora.gguf")
    found = run_generate_job(job, place=apart)
    assert found == run_generate_job(job, place=HERE)
    assert found != run_generate_job(replace(job, adapter=None), place=HERE)


def test_scores_are_the_same_in_either_place(llama, apart) -> None:
    job = ScoreJob(llama.gguf, (*TEXTS, ((Message("user", "x"),), "y" * 400)), context=128)
    seen: dict[bool, list[Scored]] = {True: [], False: []}
    found = run_score_job(job, Callbacks(result=seen[True].append), apart)
    assert found == run_score_job(job, Callbacks(result=seen[False].append), HERE)
    assert seen[True] == seen[False]
    assert found[-1].tokens == 0


def test_results_come_as_they_are_made_with_progress_warnings_and_the_plan(llama, apart) -> None:
    seen: dict[bool, list[object]] = {True: [], False: []}
    long = (Message("user", "long " * 200),)  # more than the 512 tokens that the model was made for
    config = replace(CONFIG, parallel=2, context=2000)
    job = generate_job(llama.gguf, prompts=(*PROMPTS[:-1], long), config=config)
    for place in (apart, HERE):
        note = seen[place is apart].append
        callbacks = Callbacks[Completion](
            result=note,
            progress=lambda done, total, note=note: note((done, total)),
            warn=note,
            plan=lambda plan, note=note: note(replace(plan, free=0)),
        )
        run_generate_job(job, callbacks, place)
    assert seen[True] == seen[False]
    kinds = [type(one) for one in seen[True]]
    assert kinds[:2] == [str, ContextPlan]
    assert kinds[2:6] == [Completion, tuple] * 2
    assert seen[True][-1] == (len(PROMPTS), len(PROMPTS))


def new_children(before: Sequence[int]) -> list[int]:
    """The processes started since `before`; other tests' workers may be there too."""
    return [number for number in children() if number not in before]


def test_a_first_answer_is_there_while_others_are_written(llama, apart) -> None:
    at_work, before = list[int](), children()
    run_generate_job(
        generate_job(llama.gguf), Callbacks(result=lambda _: at_work.append(len(new_children(before)))), apart
    )
    assert at_work[0] == 1
    assert len(at_work) == len(PROMPTS)


def replies(gguf: Path, place: LlamaPlace, may_start: Callable[[int], bool]) -> list[object]:
    """What the hooks are called with while two groups of prompts are answered."""
    seen: list[object] = []
    groups = (
        PromptGroup(tuple(PROMPTS[:4]), (1, 2, 3, 4), replace(CONFIG, temperature=1.0)),
        PromptGroup((*PROMPTS[4:6], (Message("user", "long " * 400),)), (5, 6, 7), replace(CONFIG, max_tokens=3)),
    )

    def start(number: int) -> bool:
        seen.append(number)
        return may_start(number)

    hooks = ReplyHooks(seen.append, start, lambda number, found: seen.append((number, found)), seen.append)
    run_reply_job(ReplyJob(gguf, groups, STUDENT_ADVICE), hooks, place)
    return seen


def test_replies_are_the_same_and_start_only_if_they_may(llama, apart) -> None:
    found = replies(llama.gguf, apart, lambda number: number != 2)
    assert found == replies(llama.gguf, HERE, lambda number: number != 2)
    answers = dict(one for one in found if isinstance(one, tuple))
    assert sorted(answers) == [0, 1, 3, 4, 5, 6]
    assert answers[6] == PromptReply("", "too_long", 0, answers[6].prompt_tokens)
    assert found[0] == 512


def test_nothing_to_do_starts_nothing(apart) -> None:
    nowhere = Path("none.gguf")
    assert run_generate_job(GenerateJob(nowhere, (), CONFIG), place=apart) == []
    assert run_score_job(ScoreJob(nowhere, (), 128), place=apart) == []
    assert not (apart.folder or nowhere).exists()


# Where it runs


def test_a_process_is_used_only_for_a_gpu(llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, before = list[int](), children()

    def count(place: LlamaPlace) -> int:
        run_generate_job(
            generate_job(llama.gguf), Callbacks(result=lambda _: counts.append(len(new_children(before)))), place
        )
        return counts[-1]

    assert count(LlamaPlace()) == 0
    put_driver(tmp_path, monkeypatch)  # a GPU that this build of llama.cpp cannot use
    assert count(LlamaPlace()) == 0
    monkeypatch.setattr(library(), "llama_supports_gpu_offload", lambda: True)
    assert LlamaPlace().is_apart
    assert not HERE.is_apart
    assert count(LlamaPlace(folder=tmp_path / "llama")) == 1


IMPORTS = """
import json, sys
from pathlib import Path
from tapir_local.inference.llama_process import llama_main
from tapir_local.process import Parent
said = []
llama_main(Path(sys.argv[1]), Parent(said.append))
print(len(said), sorted({"torch", "transformers", "trl", "peft", "llama_cpp"} & set(sys.modules)))
"""


def test_the_process_imports_neither_torch_nor_transformers(llama, tmp_path: Path) -> None:
    write_record(tmp_path / "job.json", LlamaJob(generate=generate_job(llama.gguf)))
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert done == f"{2 * len(PROMPTS) + 1} ['llama_cpp']\n"


@pytest.mark.parametrize(("how", "opens"), [({}, True), ({"vocab_only": True}, False), ({"on_cpu": True}, False)])
def test_a_vocabulary_and_a_model_on_the_processor_open_no_gpu(llama, monkeypatch, how, opens: bool) -> None:
    """Without a list of devices, llama.cpp asks every GPU for its free memory; here there is none to ask."""
    load, lists = library().llama_model_load_from_file, list[int | None]()

    def loading(path: bytes, params: Any) -> Any:
        lists.append(params.devices)
        return load(path, params)

    monkeypatch.setattr(library(), "llama_model_load_from_file", loading)
    with open_model(llama.gguf, **how) as model:
        assert encode(model, "a word")
    assert [ctypes.c_void_p.from_address(found).value if found else "all" for found in lists] == [
        "all" if opens else None
    ]


# Errors


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV])
def test_a_process_that_a_signal_ends_is_one_clear_error(llama, apart, number: int) -> None:
    seen: list[Completion] = []

    def kill(one: Completion) -> None:
        seen.append(one)
        if len(seen) == 3:
            kill_llama(number)

    job = long_job(llama.gguf)
    with pytest.raises(TapirError) as caught:
        run_generate_job(job, Callbacks(result=kill), apart)
    assert caught.value.what.startswith(f"llama.cpp ended its process by {signal.Signals(number).name}")
    assert caught.value.where == str(apart.folder / "llama_process.log")
    assert Path(caught.value.where).is_file()
    for advice in ("goes on from there", "student.concurrency or student.max_length", "CUDA_VISIBLE_DEVICES="):
        assert advice in caught.value.fix
    whole = {one.id: one for one in run_generate_job(job, place=HERE)}
    assert 3 <= len(seen) < len(whole)
    assert all(whole[one.id] == one for one in seen)


def test_a_killed_process_is_said_to_have_run_out_of_memory(llama, apart) -> None:
    killing = iter([kill_llama])
    with pytest.raises(TapirError, match=r"killed \(SIGKILL\), probably because main memory ran out") as caught:
        run_generate_job(long_job(llama.gguf), Callbacks(result=lambda _: next(killing, noop)()), apart)
    assert "Close other programs" in caught.value.fix
    assert "goes on from there" in caught.value.fix


def test_a_fault_of_the_file_is_the_same_error(tmp_path: Path, llama, apart) -> None:
    (tmp_path / "cut.gguf").write_bytes(llama.gguf.read_bytes()[:20_000])
    for gguf, ids in ((tmp_path / "none.gguf", NAMES), (tmp_path / "cut.gguf", NAMES), (llama.gguf, NAMES[:2])):
        said = []
        for place in (HERE, apart):
            with pytest.raises(TapirError) as caught:
                run_generate_job(generate_job(gguf, ids=ids), place=place)
            said.append((caught.value.what, caught.value.where, caught.value.fix))
        assert said[0] == said[1]
    assert not apart.folder.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TapirError("the disk is full", where="answers.jsonl")])
def test_an_interrupt_or_an_error_here_ends_the_process(llama, apart, error: BaseException) -> None:
    before = children()

    def stop(*_: object) -> None:
        assert new_children(before)
        raise error

    with pytest.raises(type(error)) as caught:
        run_generate_job(long_job(llama.gguf), Callbacks(result=stop), apart)
    assert caught.value is error
    with pytest.raises(type(error)):
        replies(llama.gguf, apart, stop)
    assert new_children(before) == []
    assert not apart.folder.exists()


INTERRUPTED = """
import sys
from pathlib import Path
from students import CONFIG, PROMPTS
from tapir_local.inference.generate import Callbacks
from tapir_local.inference.llama_process import GenerateJob, LlamaPlace, run_generate_job
from command_line import children
def told(one):
    print(*children(), flush=True)
job = GenerateJob(Path(sys.argv[1]), tuple(PROMPTS * 100), CONFIG)
run_generate_job(job, Callbacks(result=told), LlamaPlace(apart=True))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_process_ends_with_the_program(llama, number: int) -> None:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests / "support")])
    parent = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(llama.gguf)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.send_signal(number)
    parent.communicate(timeout=20)
    for _ in range(200):
        if not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
            return
        signal.sigtimedwait([], 0.05)
    pytest.fail("llama.cpp's process still runs")


def test_the_log_and_the_job_are_private_and_gone_in_the_end(llama, apart) -> None:
    modes: list[int] = []

    def look(_: Completion) -> None:
        modes.append((apart.folder or Path()).stat().st_mode & 0o777)
        assert json.loads((apart.folder / "job.json").read_text())["generate"]["ids"] == list(NAMES)

    run_generate_job(generate_job(llama.gguf), Callbacks(result=look, progress=noop), apart)
    assert set(modes) == {0o700}
    assert not apart.folder.exists()
