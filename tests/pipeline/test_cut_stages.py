"""What a stage has written before it was cut is kept, and the run goes on with the rest."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from command_line import kill_llama
from fakes import QUIET, World, fake_backends, generate, outputs, score
from students import PROMPTS

from tapir_local.errors import TapirError
from tapir_local.files import read_rows
from tapir_local.inference.llama_process import LlamaPlace
from tapir_local.pipeline.dry_run import estimate_costs
from tapir_local.pipeline.loop import distill, redo
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override
from tapir_local.records import Completion, Example, Progress, Scored, noop
from tapir_local.run_dir import UNTRAINED_ROUND, RunDir
from tapir_local.stages.backends import generate_backend, score_backend
from tapir_local.stages.context import Work
from tapir_local.stages.reflection import score_by_last_student
from tapir_local.stages.rounds import generate_answers


def test_answers_that_a_cut_stage_has_written_are_not_written_again(recipe: Recipe, tmp_path: Path) -> None:
    whole, run, world = RunDir(tmp_path / "a", "fake"), RunDir(tmp_path / "b", "fake"), World()
    distill(recipe, whole, fake_backends(World()), QUIET)
    asked, made = list[str](), 0

    def stopping(*, gguf, on_result, **rest):  # type: ignore[no-untyped-def]
        """Interrupted after every 17 answers of the whole run."""

        def one(row: Completion) -> None:
            nonlocal made
            on_result(row)
            asked.append(f"{gguf.parent.name} {row.id}")
            made += 1
            if made % 17 == 0:
                raise KeyboardInterrupt

        return generate(gguf=gguf, on_result=one, **rest)

    cuts = 0
    while True:
        try:
            distill(recipe, run, replace(fake_backends(world), generate=stopping), QUIET)
            break
        except KeyboardInterrupt:
            cuts += 1
    assert cuts > 5
    files = [(run.round(n) / "holdout-answers.jsonl", n) for n in range(-1, 3)] + [
        (run.round(n + 1) / "answers.jsonl", n) for n in (0, 1)
    ]
    assert len(asked) == sum(len(read_rows(Completion, path)) for path, _ in files)
    assert outputs(run) == outputs(whole)
    assert "of them from an earlier attempt" in str(run.record()["stages"])


def test_another_student_or_other_rows_are_answered_from_the_start(recipe: Recipe, run: RunDir) -> None:
    counts = list[int]()

    def once(*, prompts, ids, **rest):  # type: ignore[no-untyped-def]
        counts.append(len(ids))
        if len(counts) == 1:
            generate(prompts=prompts[:4], ids=ids[:4], **rest)
            raise KeyboardInterrupt
        return generate(prompts=prompts, ids=ids, **rest)

    made = replace(fake_backends(World()), generate=once)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, run, made, QUIET)
    partial = run.round(UNTRAINED_ROUND) / "holdout-answers.jsonl.partial"
    assert len(partial.read_text().splitlines()) == 4
    redo(run, None, "untrained-answer")
    assert not partial.exists()
    distill(recipe, run, made, QUIET)
    assert counts[:2] == [10, 10]


def test_scores_of_a_cut_stage_are_kept(recipe: Recipe, tmp_path: Path) -> None:
    chosen = override(recipe, {"curriculum.name": "reflection"})
    whole, run, world = RunDir(tmp_path / "a", "fake"), RunDir(tmp_path / "b", "fake"), World()
    distill(chosen, whole, fake_backends(World()), QUIET)
    sizes = list[int]()

    def stopping(*, texts, on_result, **rest):  # type: ignore[no-untyped-def]
        """Gives the last text first, and is interrupted after ten."""
        sizes.append(len(texts))
        found: list[Scored] = score(texts=texts, on_result=lambda one: None, **rest)
        for n, one in enumerate(reversed(found)):
            if n == 10:
                raise KeyboardInterrupt
            on_result(one)
        return found

    while True:
        try:
            distill(chosen, run, replace(fake_backends(world), score=stopping), QUIET)
            break
        except KeyboardInterrupt:
            pass
    assert sizes[:3] == [sizes[0], sizes[0] - 10, sizes[0] - 20]
    assert outputs(run) == outputs(whole)


def test_a_dry_run_beside_a_run_leaves_what_it_is_writing_alone(recipe: Recipe, run: RunDir) -> None:
    def stop(*, prompts, ids, **rest):  # type: ignore[no-untyped-def]
        generate(prompts=prompts[:3], ids=ids[:3], **rest)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(recipe, run, replace(fake_backends(World()), generate=stop), QUIET)
    partial = run.round(UNTRAINED_ROUND) / "holdout-answers.jsonl.partial"
    with partial.open("a") as file:
        file.write('{"id":"torn')  # a line that is being written
    before = partial.read_bytes()
    estimate_costs(recipe, run)
    assert partial.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_answers_are_kept_if_llama_cpp_ends_and_the_stage_goes_on(
    recipe: Recipe, run: RunDir, llama, tmp_path: Path, number: int
) -> None:
    """One answer at a time: in batches, near ties may depend on what else is in a batch."""
    rows = [Example(f"row-{n}", prompt) for n, prompt in enumerate(PROMPTS * 6)]
    student, out = run.round(0), tmp_path / "answers.jsonl"
    student.mkdir(parents=True)
    shutil.copy(llama.gguf, student / "student.gguf")
    settings = override(recipe, {"student.max_tokens": 40, "student.max_length": 256, "student.concurrency": 1})

    def answer(place: LlamaPlace, seen: Progress, path: Path) -> str:
        backends = replace(fake_backends(World()), generate=generate_backend(settings, run, place))
        return generate_answers(Work(settings, run, backends, progress=seen), rows, student, path)

    apart, kill = LlamaPlace(apart=True, folder=tmp_path / "llama"), iter([partial(kill_llama, number)])
    with pytest.raises(TapirError, match=signal.Signals(number).name):
        answer(apart, lambda done, *_: next(kill)() if done == 10 else None, out)
    kept = out.with_name("answers.jsonl.partial").read_text().splitlines()
    assert 10 <= len(kept) < len(rows)
    begun: list[int] = []
    said = answer(apart, lambda done, *_: begun.append(done), out)
    assert min(begun) > len(kept) - 1
    assert f"{len(kept)} of them from an earlier attempt" in said
    answer(LlamaPlace(apart=False), noop, tmp_path / "whole.jsonl")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_scores_are_kept_if_llama_cpp_ends_and_the_stage_goes_on(
    recipe: Recipe, run: RunDir, llama, tmp_path: Path
) -> None:
    texts = [(prompt, f"answer {n} " * 8) for n, prompt in enumerate(PROMPTS * 40)]
    run.round(0).mkdir(parents=True)
    shutil.copy(llama.gguf, run.round(0) / "student.gguf")
    run.round(1).mkdir()
    settings = override(recipe, {"student.max_tokens": 40, "student.max_length": 256})

    def scored(place: LlamaPlace, seen: Progress = noop) -> list[Scored]:
        backends = replace(fake_backends(World()), score=score_backend(settings, run, place))
        return score_by_last_student(Work(settings, run, backends, 1, "round-01/refine", seen), texts)

    apart, kill = LlamaPlace(apart=True, folder=tmp_path / "llama"), iter([kill_llama])
    with pytest.raises(TapirError, match="SIGKILL"):
        scored(apart, lambda done, *_: next(kill, noop)() if done else None)
    (partial,) = run.round(1).glob("*.partial")
    kept = read_rows(Scored, partial)
    assert 0 < len(kept) < len(texts)
    found, whole = scored(apart), scored(LlamaPlace(apart=False))
    assert [one.id for one in found] == [one.id for one in whole] == [str(n) for n in range(len(texts))]
    assert [one.tokens for one in found] == [one.tokens for one in whole]
    # Other texts share the batches of a resumed scoring, and keys and values are in 16 bits.
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in whole], abs=0.05)


KILLED = """
import os, sys
from pathlib import Path
from dataclasses import replace
from fakes import QUIET, World, generate, make_recipe, fake_backends
from tapir_local.pipeline.loop import distill
from tapir_local.run_dir import RunDir
made = 0
def dying(*, on_result, **rest):
    def one(row):
        global made
        on_result(row)
        made += 1
        if made == 4:
            os.kill(os.getpid(), 9)
    return generate(on_result=one, **rest)
folder = Path(sys.argv[1])
distill(make_recipe(folder), RunDir(folder / "b", "fake"), replace(fake_backends(World()), generate=dying), QUIET)
"""


def test_a_run_killed_while_its_student_answers_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}/support"}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, env=environment, check=False, timeout=120).returncode == -9
    whole, run, counts = RunDir(tmp_path / "a", "fake"), RunDir(tmp_path / "b", "fake"), list[int]()
    assert len((run.round(UNTRAINED_ROUND) / "holdout-answers.jsonl.partial").read_text().splitlines()) == 4

    def counting(*, ids, **rest):  # type: ignore[no-untyped-def]
        counts.append(len(ids))
        return generate(ids=ids, **rest)

    distill(recipe, run, replace(fake_backends(World()), generate=counting), QUIET)
    distill(recipe, whole, fake_backends(World()), QUIET)
    assert counts[0] == 6
    assert outputs(run) == outputs(whole)
