"""A person judges pairs without knowing whose they are; verdicts are kept, resumed, and compared with the judge."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fakes import QUIET, World, fake_backends, make_recipe

from tapir_local.commands.main import cli
from tapir_local.files import read_rows, write_rows
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.text import override
from tapir_local.records import Completion, Example, Judgement
from tapir_local.report.person import VERDICTS_FILE, PersonVerdict, open_judge_check
from tapir_local.run_dir import RunDir


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with 20 held-out rows, on which the judge prefers the teacher's answer, the student's, or neither."""
    folder = tmp_path_factory.mktemp("check")
    run = RunDir(folder, "fake")
    distill(override(make_recipe(folder), {"rounds": 1, "seeds.holdout": 20}), run, fake_backends(World()), QUIET)
    rows = read_rows(Example, run.path / "holdout.jsonl")
    scores = [(9.0, 2.0), (2.0, 9.0), (5.0, 5.0)]
    write_rows(
        run.round(1) / "holdout-judgements.jsonl",
        [Judgement(row.id, *scores[n % 3]) for n, row in enumerate(rows)],
    )
    texts = [replace(row, text=f"student {n}\x1b[2J") for n, row in enumerate(answers(run))]
    write_rows(run.round(1) / "holdout-answers.jsonl", [*texts[:-1], replace(texts[-1], text="right")])
    return run


def answers(run: RunDir) -> list[Completion]:
    return read_rows(Completion, run.round(1) / "holdout-answers.jsonl")


@pytest.fixture
def run(finished: RunDir) -> RunDir:
    """The run without verdicts."""
    (finished.path / VERDICTS_FILE).unlink(missing_ok=True)
    return finished


def called(run: RunDir, *words: str, lines: str = "") -> Result:
    command = ["judge-check", "fake", "--cache", str(run.cache), *words]
    return CliRunner().invoke(cli, command, input=lines)


def report(run: RunDir) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(called(run, "--json").stdout)
    return found


def typed(run: RunDir, agree: int) -> list[str]:
    """What a person types who agrees with the judge on the first `agree` rows and else prefers the other answer."""
    found = []
    for number, pair in enumerate(open_judge_check(run, None).pairs):
        teacher = "1" if pair.shown_first == "teacher" else "2"
        student = "2" if teacher == "1" else "1"
        same = {"teacher": teacher, "student": student, "tie": "t"}[pair.judged]
        found.append(same if number < agree else {teacher: student, student: "tie", "t": teacher}[same])
    return found


def test_a_person_who_agrees_has_a_kappa_of_one_and_one_who_does_not_is_told_so(run: RunDir) -> None:
    lines = typed(run, 19)
    assert len(lines) == 19  # one row has two equal answers
    out = called(run, lines="\n".join(lines) + "\n")
    assert out.exit_code == 0, out.output
    found = report(run)
    assert (found["rows"], found["left"], found["agreement"], found["kappa"]) == (19, 0, 1.0, 1.0)
    assert found["win_rate"]["person"] == found["win_rate"]["judge"]
    assert "The judge agrees with you on 100% of 19 rows; beyond chance the agreement is almost perfect" in out.stdout
    (run.path / VERDICTS_FILE).unlink()
    called(run, lines="\n".join(typed(run, 6)) + "\n")
    found = report(run)
    assert found["agreement"] == pytest.approx(6 / 19, abs=1e-6)
    assert "it may be no better than chance" in found["meaning"]
    assert found["rows_needed"] > 19


def test_verdicts_are_kept_one_by_one_and_the_next_start_goes_on(run: RunDir) -> None:
    lines = typed(run, 19)
    first = called(run, lines=f"{lines[0]}\nmaybe\nS\n")
    assert "'maybe' is no verdict" in first.stderr
    assert "1 of 19" in first.stderr
    assert "Go on with:" in first.stderr
    assert (report(run)["rows"], report(run)["skipped"], report(run)["left"]) == (1, 1, 17)
    second = called(run, lines=f"{lines[2]}\nq\n{lines[3]}\n")
    assert "1 of 19" not in second.stderr
    assert "3 of 19" in second.stderr
    kept = read_rows(PersonVerdict, run.path / VERDICTS_FILE)
    assert len(kept) == 3
    assert len({verdict.row for verdict in kept}) == 3
    assert called(run, "--rows", "3").stdout  # nothing is left to ask


def test_the_answers_owners_are_hidden_and_escapes_are_visible(run: RunDir) -> None:
    shown = called(run, lines="q\n").stderr
    assert "teacher" not in shown
    assert "\x1b" not in shown
    assert "␛[2J" in shown
    firsts = [pair.shown_first for pair in open_judge_check(run, None).pairs]
    assert {"teacher", "student"} == set(firsts)
    assert firsts == [pair.shown_first for pair in open_judge_check(run, None).pairs]


def test_a_verdict_on_answers_that_have_changed_does_not_count(run: RunDir) -> None:
    called(run, lines="1\n1\n")
    row = open_judge_check(run, None).pairs[0].row
    before = answers(run)
    changed = [replace(answer, text="other") if answer.id == row.id else answer for answer in before]
    write_rows(run.round(1) / "holdout-answers.jsonl", changed)
    assert report(run)["rows"] == 1
    write_rows(run.round(1) / "holdout-answers.jsonl", before)
    assert report(run)["rows"] == 2


def test_show_says_how_far_a_person_agrees(run: RunDir) -> None:
    command = ["show", "fake", "--round", "1", "--cache", str(run.cache)]
    shown = CliRunner().invoke(cli, [*command, "--json"], catch_exceptions=False).stdout
    assert json.loads(shown)["judge_check"] is None
    called(run, lines="\n".join(typed(run, 19)) + "\n")
    shown = CliRunner().invoke(cli, command, catch_exceptions=False).stdout
    assert "judge-check: the judge agrees with you on 100% of 19 rows" in shown


def test_runs_without_a_judge_are_refused(run: RunDir, tmp_path: Path) -> None:
    assert "has no judged holdout of round 7" in str(called(run, "--round", "7").exception)
    other = RunDir(tmp_path, "fake")
    other.path.mkdir(parents=True)
    text = (run.path / "recipe.yaml").read_text().replace("kind: teacher", "kind: reference")
    (other.path / "recipe.yaml").write_text(text)
    assert "there is no judge to check" in str(called(other).exception)
