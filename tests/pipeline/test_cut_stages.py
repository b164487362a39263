"""What a stage has written before it was cut is kept, and the run goes on with the rest."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import QUIET, World, fake_backends, generate, outputs, score

from tapir_local.files import read_rows
from tapir_local.pipeline.dry_run import estimate_costs
from tapir_local.pipeline.loop import distill, redo
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override
from tapir_local.records import Completion, Scored
from tapir_local.run_dir import RunDir


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
    files = [(run.round(n) / "holdout-answers.jsonl", n) for n in range(3)] + [
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
    partial = run.round(0) / "holdout-answers.jsonl.partial"
    assert len(partial.read_text().splitlines()) == 4
    redo(run, 0, "train")
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
    partial = run.round(0) / "holdout-answers.jsonl.partial"
    with partial.open("a") as file:
        file.write('{"id":"torn')  # a line that is being written
    before = partial.read_bytes()
    estimate_costs(recipe, run)
    assert partial.read_bytes() == before


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
    assert len((run.round(0) / "holdout-answers.jsonl.partial").read_text().splitlines()) == 4

    def counting(*, ids, **rest):  # type: ignore[no-untyped-def]
        counts.append(len(ids))
        return generate(ids=ids, **rest)

    distill(recipe, run, replace(fake_backends(World()), generate=counting), QUIET)
    distill(recipe, whole, fake_backends(World()), QUIET)
    assert counts[0] == 6
    assert outputs(run) == outputs(whole)
