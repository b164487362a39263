"""The estimates of the time left: from the rate of the running stage, and from earlier stages of the same run."""

from pathlib import Path

import pytest
from fakes import make_recipe
from run_display import Clock, finished_run, set_taken, step_of

from tapir_local.recipe.text import override
from tapir_local.run_dir import RunDir
from tapir_local.terminal.run_state import RunState
from tapir_local.terminal.run_time import RATE_SECONDS, RateMeter, StageTimes


def test_a_rate_is_that_of_the_last_two_minutes() -> None:
    meter = RateMeter()
    assert meter.rate(0.0) is None
    for second in range(0, 1000, 10):
        meter.add(float(second), second, 10_000)  # one a second
    assert meter.rate(990.0) == pytest.approx(1.0)
    for second in range(1000, 1400, 10):
        meter.add(float(second), 1000 + 5 * (second - 1000), 10_000)  # then five
    assert meter.rate(1390.0) == pytest.approx(5.0, rel=0.05)
    assert meter.seconds_left(1390.0) == pytest.approx((10_000 - 2950) / 5, rel=0.05)
    assert meter.samples[-1][0] - meter.samples[0][0] <= RATE_SECONDS + 20


def test_what_was_done_before_does_not_count_for_the_rate_and_a_pause_lowers_it() -> None:
    meter = RateMeter()
    meter.add(0.0, 900, 1000)  # a stage that goes on
    meter.add(10.0, 920, 1000)
    assert meter.rate(10.0) == pytest.approx(2.0)
    assert meter.seconds_left(10.0) == pytest.approx(40.0)
    assert meter.rate(40.0) == pytest.approx(0.5)  # half a minute of nothing


def test_one_item_promises_nothing_and_the_last_one_does() -> None:
    """Several are in progress at once, so the time of the first one is the time of several."""
    meter = RateMeter()
    meter.add(0.0, 0, 31)
    meter.add(70.0, 1, 31)
    assert meter.seconds_left(70.0) is None
    meter.add(75.0, 8, 31)
    assert meter.seconds_left(75.0) == pytest.approx(23 * 75 / 8)
    few = RateMeter()
    few.add(0.0, 0, 2)
    few.add(10.0, 2, 2)
    assert few.seconds_left(10.0) == 0


@pytest.mark.parametrize(("done", "total"), [(5, 100), (60, 200)])
def test_a_second_call_in_a_stage_has_a_rate_of_its_own(done: int, total: int) -> None:
    meter = RateMeter()
    meter.add(0.0, 0, 100)
    meter.add(10.0, 50, 100)
    meter.add(20.0, done, total)
    assert meter.rate(20.0) is None
    assert meter.seconds_left(20.0) is None


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunDir]:
    """A run that stands before the training of round 2, in which round 1 took known times."""
    folder = tmp_path_factory.mktemp("times")
    _, run = finished_run(folder, until=(2, "train"))
    seconds = {"train": 100.0, "export": 10.0, "gate": 20.0, "holdout-answer": 5.0, "holdout-judge": 4.0, "evaluate": 1}
    changes = {f"round-01/{name}": {"seconds": taken} for name, taken in seconds.items()}
    set_taken(run, changes | {"round-00/train": {"seconds": 1.0}})
    return folder, run


def test_the_rest_of_a_round_takes_what_the_last_round_took(cut: tuple[Path, RunDir]) -> None:
    folder, run = cut
    recipe, clock = make_recipe(folder), Clock()
    state = RunState(recipe, run, clock)
    state.begins(step_of(state, "round-02/train"))
    assert state.expected == pytest.approx(100.0)  # round 1's, with as many rows; not round 0's
    judged = 4.0  # as many calls as in round 1
    assert state.later == pytest.approx(10 + 20 + 5 + judged + 1)
    assert state.run_seconds_left() == pytest.approx(140.0)
    clock.now += 30.0
    assert state.stage_seconds_left() == pytest.approx(70.0)
    clock.now += 300.0
    assert state.stage_seconds_left() is None  # longer than expected
    assert state.run_seconds_left() is None
    state.progress(10, 100, "")
    clock.now += 10.0
    state.progress(20, 100, "")
    assert state.stage_seconds_left() == pytest.approx(80.0)  # by its rate: one a second
    assert state.ends_at() == pytest.approx(clock.now + 80 + 40)


def test_a_step_is_scaled_by_the_calls_or_rows_of_those_like_it(cut: tuple[Path, RunDir]) -> None:
    folder, run = cut
    recipe = override(make_recipe(folder), {"rounds": 3})
    state = RunState(recipe, run)
    records = state.read_records()
    times = StageTimes(recipe, state.steps, records)
    assert times.rows == 60
    assert times.size(step_of(state, "round-03/train")) == ("train", 20)
    assert times.size(step_of(state, "round-00/train")) == ("train", 10)
    assert times.size(step_of(state, "round-03/answer")) == ("answer", 50)
    assert times.size(step_of(state, "round-01/holdout-judge")) == ("ask", 20)
    assert times.size(step_of(state, "round-02/gate")) == ("gate", 1)
    only_first = {name: taken for name, taken in records.items() if not name.startswith("round-0")}
    only_first["round-00/train"] = {"seconds": 30.0}
    only_first["untrained-answer"] = {}
    early = StageTimes(recipe, state.steps, only_first | {"prepare/untrained-answer": {"seconds": 2.0}})
    assert early.expected_seconds(step_of(state, "round-01/train")) == pytest.approx(60.0)  # twice the rows of round 0
    assert early.expected_seconds(step_of(state, "round-01/answer")) == pytest.approx(10.0)  # 50 answers, not 10
    short = StageTimes(recipe, state.steps, only_first | {"round-01/refine": {"output": {"rows": 5}}})
    assert short.expected_seconds(step_of(state, "round-01/train")) == pytest.approx(15.0)  # not 20 rows, as wanted


def test_a_stage_that_asked_nothing_says_nothing_of_the_time_of_a_call(cut: tuple[Path, RunDir]) -> None:
    """Reading labels from the seed file takes no time, and may be for a thousand rows."""
    folder, run = cut
    state = RunState(make_recipe(folder), run)
    records = state.read_records()
    label = {"seconds": 300.0, "paid": 90, "hits": 10}
    nothing = {"prepare/seeds": {"seconds": 0.0, "paid": 0, "hits": 0}, "prepare/tasks": {"seconds": 0.0}}
    times = StageTimes(
        state.recipe, state.steps, {"prepare/read": records["prepare/read"], "prepare/label": label, **nothing}
    )
    judge = step_of(state, "prepare/untrained-judge")
    assert times.expected_seconds(judge) == pytest.approx(3.0 * times.size(judge)[1])


def test_what_was_never_done_is_unknown_and_quick_stages_are_not(cut: tuple[Path, RunDir]) -> None:
    folder, run = cut
    recipe = make_recipe(folder)
    state = RunState(recipe, run)
    nothing = StageTimes(recipe, state.steps, {})
    assert nothing.expected_seconds(step_of(state, "round-00/gate")) is None
    assert nothing.expected_seconds(step_of(state, "round-00/train")) is None
    assert nothing.expected_seconds(step_of(state, "round-00/mix")) == 0.0
    assert nothing.seconds_of(state.steps) is None
