"""The full screen: it fits every size, keeps what matters most, and says what is known and nothing else."""

import io
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fakes import World, fake_backends, make_recipe
from rich.console import Console
from run_display import Clock, finished_run, printed, record_console, set_taken, step_of

from tapir_local.recipe.text import override
from tapir_local.run_dir import RunDir
from tapir_local.store.store import Store
from tapir_local.teacher.budget import Cost
from tapir_local.teacher.rate_limit import CallMeter
from tapir_local.terminal.live_view import LiveView, who_does_what
from tapir_local.terminal.progress import RunDisplay
from tapir_local.terminal.run_state import RunState

LOSS = "loss 2.18 -> 1.09 ▇▆▅▃▃▂▂▁  1,920 tokens/s  GPU 9.1 of 24.0 GB"


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunDir]:
    """A run that stands before the training of round 2."""
    folder = tmp_path_factory.mktemp("view")
    _, run = finished_run(folder, until=(2, "train"))
    set_taken(run, {"round-01/train": {"seconds": 600.0}, "round-01/gate": {"seconds": 60.0}})
    return folder, run


def training(cut: tuple[Path, RunDir]) -> tuple[RunState, Clock]:
    """The state in the middle of a training that calls for attention."""
    folder, run = cut
    clock, meter = Clock(), CallMeter()
    state = RunState(override(make_recipe(folder), {"budget.money": 20.0}), run, clock)
    state.connect(meter, lambda: Cost(30_000, 9_000_000, 3.4123))
    state.begins(step_of(state, "round-02/train"))
    for done in range(1, 94):
        clock.now += 2.0
        state.progress(done, 188, LOSS)
    meter.limit(16)
    for name, more in (("replies", 1000), ("rate_limited", 42), ("retries", 7), ("unreadable", 3), ("in_flight", 12)):
        meter.count(name, more)
    state.note("judge: only 40% of the rows could be judged, because the replies of the judge are not JSON at all")
    return state, clock


def rendered(state: RunState, width: int, height: int) -> list[str]:
    console = record_console(width, height)
    console.print(LiveView(state), end="")
    return printed(console).splitlines()


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("height", [15, 24, 40])
def test_it_fits_and_keeps_what_matters(cut: tuple[Path, RunDir], width: int, height: int) -> None:
    lines = rendered(training(cut)[0], width, height)
    text = "\n".join(lines)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("run fake, 2 rounds")
    assert "round 2 of 2" in text
    assert re.search(r"▶ train +━+─+ +93/188  0.5/s  3:10 left", text)
    assert "loss 2.18 -> 1.09 ▇▆▅▃▃▂▂▁" in text
    assert "accuracy" in text
    assert "money 3.41 of 20.00" in text
    assert "12 of 16 in flight · 1,000 replies · 429: 42" in text
    assert "! judge: only 40% of the rows could be judged" in text
    assert re.search(r"· export, gate, holdout-answer", text)
    assert re.search(r"ends about (\w+ )?\d\d:\d\d$", lines[0])


def test_a_large_screen_has_everything(cut: tuple[Path, RunDir]) -> None:
    text = "\n".join(rendered(training(cut)[0], 140, 40))
    for part in (
        "the pocket student, taught and judged by the pocket teacher (a program)",
        "untrained   plain SFT     round 1",
        "win rate",
        "  95 %",
        "✓ refine",
        "7 sent again · 3 unreadable (0.3%)",
        "GPU 9.1 of 24.0 GB",
        "Ctrl-C stops",
        "started ",
        str(cut[1].path),
    ):
        assert part in text
    assert "4:10 left in all" in text  # 190 s of this stage, and 60 s of the gate
    assert text.count("─" * 140) == 3


def test_a_small_screen_drops_the_least_important_first(cut: tuple[Path, RunDir]) -> None:
    text = "\n".join(rendered(training(cut)[0], 60, 15))
    assert "Ctrl-C" not in text
    assert "─" * 60 not in text
    tiny = rendered(training(cut)[0], 40, 6)
    assert len(tiny) <= 6
    assert any("▶ train" in line for line in tiny)


def test_results_in_a_line_where_the_table_has_no_room(cut: tuple[Path, RunDir]) -> None:
    text = "\n".join(rendered(training(cut)[0], 60, 11))
    assert re.search(r"accuracy (\S+% → )+\S+%", text)
    assert "95 %" not in text


def test_a_stage_without_a_total_has_a_bar_that_moves(cut: tuple[Path, RunDir]) -> None:
    folder, run = cut
    clock = Clock()
    state = RunState(make_recipe(folder), run, clock)
    state.begins(step_of(state, "round-02/train"))
    state.progress(0, 0, "loading the student")
    seen = set()
    for _ in range(8):
        clock.now += 0.5
        (bar,) = [line for line in rendered(state, 80, 24) if "▶ train" in line]
        assert re.search(r"─*━━━━─*", bar)
        assert "/" not in bar
        seen.add(bar)
    assert len(seen) > 4
    assert any("loading the student" in line for line in rendered(state, 80, 24))


def test_what_is_unknown_is_not_said(tmp_path: Path) -> None:
    recipe, clock = make_recipe(tmp_path), Clock()
    state = RunState(recipe, RunDir(tmp_path / "cache", "fake"), clock)
    before = rendered(state, 80, 24)
    assert "starting" in "\n".join(before)
    state.begins(state.steps[0])
    clock.now += 75.0
    text = "\n".join(rendered(state, 80, 24))
    assert "for 1:15" in text
    for unknown in ("left", "ends about", "win rate", "money", "in flight", "429", "%"):
        assert unknown not in text


def test_many_rounds_show_the_first_and_the_last(cut: tuple[Path, RunDir]) -> None:
    state, _ = training(cut)
    state.results |= {number: {"win_rate": number / 100, "accuracy": None} for number in range(2, 12)}
    for width in (60, 80):
        (head,) = [line for line in rendered(state, width, 40) if line.startswith("held out")]
        assert "untrained" in head
        assert head.endswith("round 11")
        assert "round 5 " not in head
        assert len(head) <= width


def test_a_terminal_without_unicode_and_one_without_color(cut: tuple[Path, RunDir]) -> None:
    state, _ = training(cut)
    state.said = "loss 2"
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80, height=40, force_terminal=False)
    console.print(LiveView(state), end="")
    console.file.flush()
    text = raw.getvalue().decode("ascii")
    assert re.search(r"> train +#+-+ +93/188", text)
    colored, plain = (record_console(80, 40, True, _environ=env) for env in ({}, {"NO_COLOR": "1"}))
    for one in (colored, plain):
        one.print(LiveView(state), end="")
    colors = re.compile(r"\x1b\[[0-9;]*3[0-7][0-9;]*m")
    assert colors.search(printed(colored))
    assert not colors.search(printed(plain))


def test_a_pause_for_a_rate_limit_is_said(cut: tuple[Path, RunDir]) -> None:
    state, _ = training(cut)
    state.meter.pause(20.0)
    assert any(re.search(r"429: 42, waiting (19|20) s", line) for line in rendered(state, 80, 24))


def test_who_teaches_and_judges(tmp_path: Path) -> None:
    changes = {"teacher.kind": "openai", "teacher.model": "gpt-4o-mini", "student.path": "models/Qwen2.5-1.5B"}
    recipe = override(make_recipe(tmp_path), changes)
    assert who_does_what(recipe) == "Qwen2.5-1.5B, taught and judged by gpt-4o-mini"
    rough = override(recipe, {"judge.kind": "reference"})
    assert who_does_what(rough).endswith("taught by gpt-4o-mini, judged by similarity to the teacher's answers")


def test_the_money_to_come_is_the_dry_runs_and_shrinks_with_the_running_stage(cut: tuple[Path, RunDir]) -> None:
    folder, run = cut
    price = {"teacher.price": {"input": 2.5, "output": 10.0}}
    recipe = override(make_recipe(folder), {"teacher.kind": "openai", "teacher.model": "m", **price})
    free, state = RunState(make_recipe(folder), run), RunState(recipe, run)
    with Store(run.cache / "teacher.db"):
        pass
    for one in (free, state):
        one.begins(step_of(one, "round-02/train"))
    assert free.money_to_come() is None
    first = state.money_to_come()
    calls = 2 * 10  # of the holdout's judge, the only stage that asks
    tokens_in = 150 + 4 + 2 * 250  # about: the prompt's frame, the instruction, both answers
    assert first == pytest.approx(calls * (2.5 * tokens_in + 10 * 20) / 1e6, rel=0.02)
    assert f"the rest of the run about {first:.4f}" in "\n".join(rendered(state, 80, 24))
    state.begins(step_of(state, "round-02/holdout-judge"))
    assert state.money_to_come() == pytest.approx(first)
    state.progress(15, 20, "")
    assert state.money_to_come() == pytest.approx(first / 4)


def test_the_screen_is_left_as_it_was_and_warnings_are_printed_after_it(cut: tuple[Path, RunDir]) -> None:
    folder, run = cut
    console = record_console(80, 24, terminal=True)
    display = RunDisplay(console, "full", make_recipe(folder), run, Clock())

    def interrupted() -> None:
        with display.showing(fake_backends(World())) as watch:
            watch.begins(step_of(display.state, "round-02/train"))
            display.say("the judge is asked again")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown, _, after = printed(console).rpartition("\x1b[?1049l")
    assert shown.startswith("\x1b[?1049h")
    assert "the judge is asked again" in after
    assert "run.log" in after
    assert "the pocket student, taught" in shown
    assert "\x1b[?25h" in printed(console)  # the cursor is there again
    assert (run.path / "run.log").read_text().endswith("stopped in round-02/train: Ctrl-C\n")


def test_a_finished_run_opens_no_screen(tmp_path: Path) -> None:
    recipe, run = finished_run(tmp_path)
    console = record_console(80, 24, terminal=True)
    with RunDisplay(console, "full", recipe, run, Clock()).showing(fake_backends(World())):
        pass
    assert printed(console) == ""
    assert not (run.path / "run.log").exists()


def test_a_screen_that_is_drawn_while_the_run_goes_on_always_succeeds(cut: tuple[Path, RunDir]) -> None:
    state, _ = training(cut)
    steps = [step_of(state, f"round-02/{name}") for name in ("train", "export", "gate")]
    done = threading.Event()

    def draw() -> int:
        drawn = 0
        while not done.is_set():
            drawn += len(rendered(state, 80, 24)) > 10
        return drawn

    with ThreadPoolExecutor() as pool:
        drawing = pool.submit(draw)
        for turn in range(60):
            state.begins(steps[turn % 3])
            for count in range(20):
                state.progress(count, 20, "")
        done.set()
        assert drawing.result() > 5
