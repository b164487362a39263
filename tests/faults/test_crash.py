"""Runs that are killed, stopped and harmed end as an uncut run does; the long campaign is bench/crash.py."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from billed_teacher import GOOD, SPOILS, BilledTeacher, serving
from campaign import (
    IN_FLIGHT,
    Case,
    Uncut,
    Worker,
    check_words,
    compare,
    finish,
    follow_advice,
    harmed_run,
    make_place,
    run_uncut,
    stored_keys,
    worker,
)
from fakes import outputs

from tapir_local.run_dir import RunDir


@pytest.fixture(scope="module")
def teacher() -> Iterator[BilledTeacher]:
    with serving(BilledTeacher()) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("campaign")
    made.chmod(0o755)
    return made


@pytest.fixture(scope="module")
def uncut(hand: Worker, teacher: BilledTeacher, folder: Path) -> Uncut:
    return run_uncut(hand, teacher, folder)


@pytest.fixture
def make_case(hand, teacher, folder, uncut, request) -> Callable[..., Case]:
    def make(seed: int = 1, **rates: float) -> Case:
        teacher.reset(seed, **rates)
        name = re.sub(r"\W+", "-", request.node.name)
        place = make_place(folder, teacher, name)
        return Case(place, hand, teacher, random.Random(seed), uncut)

    return make


def start_and_signal(case: Case, at: int, *numbers: signal.Signals) -> int:
    """Start the run and send it signals when the request with this number has come; the exit code."""
    pids: list[int] = []

    def act(number: int) -> None:
        if number == at:
            case.abandoned_at = time.monotonic()
            for one in numbers:
                os.kill(pids[0], one)

    case.teacher.on_request = act
    pids.append(case.hand.start(*case.place.distill(), log=case.place.log))
    code = case.hand.wait()
    case.teacher.on_request = lambda number: None
    if signal.SIGKILL in numbers and case.abandoned_at:
        case.may_repay |= case.teacher.in_flight(case.abandoned_at)
    return code


LONG = pytest.mark.campaign


@pytest.mark.parametrize("at", [60, pytest.param(15, marks=LONG), pytest.param(110, marks=LONG)])
def test_a_run_killed_with_requests_in_flight_pays_only_those_again(make_case, at):
    case = make_case()
    assert start_and_signal(case, at, signal.SIGKILL) == -signal.SIGKILL
    assert finish(case)
    compare(case)
    assert case.faults == []
    again = sum(count - 1 for count in case.teacher.paid().values())
    assert again <= 2 * IN_FLIGHT  # those in flight, and those whose answer waited for the disk


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=LONG), pytest.param(signal.SIGINT, marks=LONG)],
)
def test_a_run_stopped_by_a_signal_pays_nothing_again(make_case, number):
    case = make_case()
    assert start_and_signal(case, 60, number) == 128 + number
    check_words(case, 128 + number)
    assert finish(case)
    compare(case)
    assert case.faults == []
    assert set(case.teacher.paid().values()) == {1}


def test_spoiled_replies_change_nothing_but_the_bill(make_case):
    """Each kind of spoiled reply and each odd way to send a good one, in one run."""
    case = make_case(spoiled=0.15, odd=0.15)
    assert finish(case)
    compare(case)
    assert case.faults == []
    assert set(case.teacher.paid().values()) == {1}
    assert len(case.teacher.counts.keys() & SPOILS.keys()) > len(SPOILS) // 2
    assert case.teacher.counts.keys() & GOOD.keys() == GOOD.keys()


@pytest.mark.parametrize("seed", [4, pytest.param(3, marks=LONG)])
def test_a_run_under_mixed_fire_ends_as_an_uncut_one(make_case, seed):
    case = make_case(seed, spoiled=0.04, odd=0.04)
    harmed_run(case, 3)
    assert case.faults == []


def test_a_full_disk_and_missing_permissions_end_in_an_error_and_the_run_goes_on(make_case):
    case = make_case()
    for job in ({"file_bytes": 4000}, {"file_bytes": 60_000}, {"unprivileged": True}):
        case.place.log.unlink(missing_ok=True)
        code = case.hand.run(*case.place.distill(), log=case.place.log, **job)
        check_words(case, code)
        assert code in (0, 1)
    assert finish(case)
    compare(case)
    assert case.faults == []


def test_a_clock_that_moves_back_and_an_output_that_was_cut(make_case):
    """The error names a `redo` command, after which the run ends as before and pays nothing."""
    case = make_case()
    assert case.hand.run(*case.place.distill(), log=case.place.log, clock=9e7) == 0
    assert outputs(case.place.run) == case.uncut.files
    answers = case.place.run.round(1) / "answers.jsonl"
    answers.write_bytes(answers.read_bytes()[:-30])
    case.place.log.unlink()
    assert case.hand.run(*case.place.distill(), log=case.place.log, clock=-9e7) == 1
    follow_advice(case, case.place.last_words())
    assert finish(case)
    compare(case)
    assert case.faults == []
    assert set(case.teacher.paid().values()) == {1}


def start_and_do(case: Case, at: int, act: Callable[[], object], **job: Any) -> int:
    """Start the run and do something when the request with this number has come; the exit code."""

    def watch(number: int) -> None:
        if number == at:
            act()

    case.teacher.on_request = watch
    code = case.hand.run(*case.place.distill(), log=case.place.log, **job)
    case.teacher.on_request = lambda number: None
    check_words(case, code)
    return code


@LONG
def test_a_store_that_is_exchanged_for_another_during_a_run_loses_no_call_of_either(make_case, folder):
    """The other one is the uncut run's, so that nothing more is paid for with it."""
    case, other = make_case(), folder / "uncut" / "teacher.db"

    def exchange() -> None:
        shutil.copy(other, case.place.cache / "other.db")
        (case.place.cache / "other.db").replace(case.place.store)

    assert start_and_do(case, 60, exchange) == 1
    assert "deleted, moved or replaced" in " ".join(case.place.last_words().split())
    (saved,) = case.place.cache.glob("teacher.db.saved-*")
    assert stored_keys(saved)
    assert stored_keys(saved) < case.uncut.keys
    assert finish(case)
    compare(case)
    assert case.faults == []
    assert set(case.teacher.paid().values()) == {1}


@LONG
def test_permissions_that_are_revoked_during_a_run_end_in_an_error_and_the_run_goes_on(make_case):
    case = make_case()
    assert start_and_do(case, 60, lambda: case.place.run.path.chmod(0o500), obeys_modes=True) == 1
    assert "Permission denied" in " ".join(case.place.last_words().split())
    case.place.run.path.chmod(0o700)
    assert finish(case)
    compare(case)
    assert case.faults == []
    assert set(case.teacher.paid().values()) == {1}


@LONG
@pytest.mark.parametrize("turns", [1, 100])
def test_a_clock_that_goes_to_and_fro_during_a_run_changes_nothing(make_case, turns):
    case = make_case()
    assert case.hand.run(*case.place.distill(), log=case.place.log, clock=-9e7, clock_turns=turns) == 0
    compare(case)
    assert case.faults == []
    assert set(case.teacher.paid().values()) == {1}


NAME_SPACE = ("unshare", "--map-root-user", "--mount")


def can_mount(folder: Path) -> bool:
    """Whether this machine allows a mount in a name space of one's own."""
    try:
        command = [*NAME_SPACE, "mount", "-t", "tmpfs", "none", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.campaign
def test_a_small_file_system_that_fills_up_ends_in_an_error_and_a_larger_one_goes_on(teacher, folder, uncut, tmp_path):
    """A real one of 100 to 900 KB: every write may be the one that fails."""
    if not can_mount(tmp_path):
        pytest.skip("no mount name space here")
    place = make_place(folder, teacher, "small-disk")
    place.cache.mkdir()
    prefix = (*NAME_SPACE, "sh", "-c", 'mount -t tmpfs -o size=100k none "$0" && exec "$@"', str(place.cache))
    with worker(*prefix) as hand:
        teacher.reset(1)
        for size in [*range(100, 900, 100), 50_000]:
            place.log.unlink(missing_ok=True)
            larger = ["-o", f"remount,size={size}k", str(place.cache)]
            code = hand.run(*place.distill(), log=place.log, mount=larger)
            said = place.last_words()
            assert "Traceback" not in said
            assert (code == 0) == ("error:" not in said), said
        assert code == 0
        seen = Path(f"/proc/{hand.process.pid}/root{place.cache}")
        assert outputs(RunDir(seen, "fake")) == uncut.files
