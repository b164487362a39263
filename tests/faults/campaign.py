"""Runs that are killed and harmed at random moments and resumed, compared with a run that was left alone.

Nothing here is a fake of the program: tests/faults/run_worker.py says what is real.
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from billed_teacher import BilledTeacher
from fakes import make_recipe, outputs

from tapir_local.run_dir import RunDir

HERE = Path(__file__).parent
NAME = "fake"
IN_FLIGHT = 8  # teacher.concurrency of these runs
OPEN_SECONDS = 1.0  # that a start may take to open the store
OPENED_SECONDS = 0.2  # after which it holds the store, and not only checks it
FULL_SECONDS = 2.0  # before the end of a start on a full disk, in which an answer could not be written
WAIT_SECONDS = 120.0  # an attempt that takes longer hangs
CLOCK_SECONDS = (-400 * 86_400.0, -3_600.0, 3_600.0, 400 * 86_400.0)
UNREAD = ("run.json", "unusable.jsonl", "rejected-seeds.jsonl")  # no stage reads these
CARD_FILES = ("model/README.md", "model/SHA256SUMS")  # the card has figures of run.json, if that is there
RECIPE = """
name: {name}
rounds: 2
seeds: {{holdout: 8, limit: 36, path: {seeds}}}
student: {{path: pocket}}
teacher: {{base_url: {url}, model: m, alias: campaign, concurrency: {concurrency}, send_seed: true, timeout: 10}}
curriculum: {{rows: 12, first_rows: 8, drafts: 2}}
classifier: {{labelled: 20}}
"""


class Worker:
    """A process that starts the program by forking (tests/faults/run_worker.py)."""

    def __init__(self, *prefix: str, **environment: str) -> None:
        folders = [str(HERE), str(HERE.parent / "support"), str(HERE.parents[1])]
        keys = ("OPENAI_API_KEY", "CUDA_VISIBLE_DEVICES")
        env = {name: value for name, value in os.environ.items() if name not in keys}
        env |= {
            "PYTHONPATH": os.pathsep.join(folders),
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "200",
            "OPENBLAS_NUM_THREADS": "1",
            **environment,
        }
        command = [*prefix, sys.executable, str(HERE / "run_worker.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.pid = 0

    def start(self, *words: str, log: Path, **job: Any) -> int:
        """Start the command; its process id."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"words": words, "log": str(log), **job}) + "\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())
        return self.pid

    def wait(self) -> int:
        """Wait for the command; its exit code, or the negative number of the signal that ended it."""
        assert self.process.stdout
        return int(self.process.stdout.readline())

    def run(self, *words: str, log: Path, **job: Any) -> int:
        """The exit code of a command that nobody disturbs."""
        self.start(*words, log=log, **job)
        return self.wait()

    def close(self) -> None:
        """End the worker; it ends when its input does."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def worker(*prefix: str, **environment: str) -> Iterator[Worker]:
    """A worker that is ended at the end of the block; `prefix` is the beginning of its command."""
    made = Worker(*prefix, **environment)
    try:
        yield made
    finally:
        made.close()


@dataclass
class Place:
    """Where a run lives: its cache, its recipe, and the log of all its starts."""

    cache: Path
    recipe: Path
    log: Path

    @property
    def run(self) -> RunDir:
        return RunDir(self.cache, NAME)

    @property
    def store(self) -> Path:
        return self.cache / "teacher.db"

    def distill(self) -> tuple[str, ...]:
        """The command that starts and resumes the run."""
        return ("distill", str(self.recipe), "--cache", str(self.cache))

    def last_words(self) -> str:
        """What the last start printed."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def make_place(folder: Path, teacher: BilledTeacher, name: str) -> Place:
    """A new cache in `folder`, with the recipe that all runs there share."""
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        make_recipe(folder)
        seeds = folder / "seeds.json"
        recipe.write_text(RECIPE.format(name=NAME, seeds=seeds, url=teacher.url, concurrency=IN_FLIGHT))
    return Place(folder / name, recipe, folder / f"{name}.log")


def stored_keys(path: Path) -> set[bytes]:
    """The keys of the calls in a store."""
    with closing(sqlite3.connect(path)) as conn:
        return {row[0] for row in conn.execute("select key from calls")}


@dataclass(frozen=True)
class Uncut:
    """A run that was left alone: its files, its calls, the seconds it took, and how many requests it made."""

    files: dict[str, bytes]
    keys: set[bytes]
    seconds: float
    requests: int


def run_uncut(hand: Worker, teacher: BilledTeacher, folder: Path, names: tuple[str, ...] = ("uncut",)) -> Uncut:
    """The run to compare with, made once for each name: the first start is slower."""
    for name in names:
        teacher.reset(0)
        place, began = make_place(folder, teacher, name), time.monotonic()
        code = hand.run(*place.distill(), log=place.log)
        assert code == 0, place.last_words()
    seconds = time.monotonic() - began
    assert set(teacher.paid().values()) == {1}
    return Uncut(outputs(place.run), stored_keys(place.store), seconds, len(teacher.entries))


# What may happen to a run


@dataclass
class Case:
    """One run under fire, with what its harms allow: `may_repay` are bodies that may be paid again."""

    place: Place
    hand: Worker
    teacher: BilledTeacher
    chance: random.Random
    uncut: Uncut
    may_repay: set[str] = field(default_factory=set)
    store_harmed: bool = False
    record_lost: bool = False
    disk_full: bool = False
    harms: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    kills: int = 0
    abandoned_at: float | None = None  # when the last start was ended without waiting for its requests
    most_again: int = 0  # answers that one kill had paid for again
    undo: list[Callable[[], None]] = field(default_factory=list)

    def fault(self, what: str) -> None:
        """Write down that a promise was broken."""
        self.faults.append(f"{' > '.join(self.harms)}: {what}")


def kill(case: Case, pid: int) -> None:
    """kill -9."""
    case.abandoned_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)


def stop_with(number: signal.Signals) -> Callable[[Case, int], None]:
    """A signal after which requests in flight are waited for: nothing is paid twice."""
    return lambda case, pid: os.kill(pid, number)


def freeze(case: Case, pid: int) -> None:
    """Stopped for a moment, as by a laptop's lid."""
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.3)
    os.kill(pid, signal.SIGCONT)


def freeze_and_kill(case: Case, pid: int) -> None:
    """Stopped, then killed."""
    os.kill(pid, signal.SIGSTOP)
    case.abandoned_at = time.monotonic()
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)


def stop_twice(case: Case, pid: int) -> None:
    """Two signals: the second abandons what is in flight."""
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.005)
    case.abandoned_at = time.monotonic()
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def take_store(*endings: str) -> Callable[[Case, int], None]:
    """Delete the store's files while the run uses them; what it holds is saved when the run stops."""

    def act(case: Case, pid: int) -> None:
        end = time.monotonic() + OPEN_SECONDS
        while not has_open(pid, case.place.store) and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(OPENED_SECONDS)
        if not has_open(pid, case.place.store) or case.disk_full:
            case.store_harmed = True  # nobody holds it, or it cannot be saved: its calls are lost
        for ending in endings:
            Path(f"{case.place.store}{ending}").unlink(missing_ok=True)

    return act


def has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open."""
    with suppress(OSError):
        return any(link.readlink() == path for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


DURING: dict[str, tuple[int, Callable[[Case, int], None]]] = {
    "SIGKILL": (12, kill),
    "SIGTERM": (3, stop_with(signal.SIGTERM)),
    "SIGHUP": (3, stop_with(signal.SIGHUP)),
    "SIGINT": (2, stop_with(signal.SIGINT)),
    "SIGTERM twice": (1, stop_twice),
    "SIGSTOP, SIGCONT": (1, freeze),
    "SIGSTOP, SIGKILL": (2, freeze_and_kill),
    "store deleted": (1, take_store("", "-wal", "-shm")),
    "store's file deleted": (1, take_store("")),
    "store's log deleted": (1, take_store("-wal")),
}
POLITE = ("SIGTERM", "SIGHUP", "SIGINT")
EXITS = {"SIGTERM": 143, "SIGHUP": 129, "SIGINT": 130}


# What may happen to its files while nobody works on it


def nothing(case: Case) -> None:
    """Nothing."""


def finished_files(case: Case) -> list[Path]:
    """The files that finished stages have written; none if run.json was lost, which alone says what they held."""
    if case.record_lost:
        return []
    run = case.place.run.path
    found = [path for path in run.rglob("*.json*") if path.name not in UNREAD]
    return sorted(path for path in found if not is_hidden_or_partial(path))


def is_hidden_or_partial(path: Path) -> bool:
    return path.name.startswith(".") or ".partial" in path.name or "model" in path.parts


def delete_output(case: Case) -> None:
    """A finished file is gone."""
    if found := finished_files(case):
        case.chance.choice(found).unlink()


def cut_output(case: Case) -> None:
    """A finished file ends early."""
    if found := finished_files(case):
        path = case.chance.choice(found)
        os.truncate(path, case.chance.randrange(max(path.stat().st_size, 1)))


def exchange_outputs(case: Case) -> None:
    """Two finished files have changed places."""
    if len(found := finished_files(case)) > 1:
        one, two = case.chance.sample(found, 2)
        kept = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(kept)


def tear_partials(case: Case) -> None:
    """What was being written ends in the middle of a line, or in bytes that a power failure left there."""
    for path in sorted(case.place.run.path.rglob("*.partial")):
        if path.is_file():
            os.truncate(path, case.chance.randrange(path.stat().st_size + 1))
            if case.chance.random() < 0.5:
                with path.open("ab") as file:
                    file.write(case.chance.choice([b"\0" * 600, b'{"id": "sp', b"\xff\xfe\n", b"null\n", b"[]\n{}\n"]))


def delete_partials(case: Case) -> None:
    """What was being written is gone."""
    for path in sorted(case.place.run.path.rglob("*.partial*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def empty_record(case: Case) -> None:
    """run.json is empty, as after a power failure on some file systems. Its error says to delete it."""
    if (path := case.place.run.path / "run.json").exists():
        path.write_bytes(b"")
        case.record_lost = True


def delete_record(case: Case) -> None:
    """run.json is gone."""
    case.record_lost = True
    (case.place.run.path / "run.json").unlink(missing_ok=True)


def store_harm(work: Callable[[Case, Path], None]) -> Callable[[Case], None]:
    """A harm to the store's files: calls that it destroys may be paid again."""

    def act(case: Case) -> None:
        if case.place.store.exists():
            case.store_harmed = True
            work(case, case.place.store)

    return act


def scribble(case: Case, path: Path) -> None:
    """Some pages hold other bytes."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        for _ in range(case.chance.randint(1, 6)):
            file.seek(case.chance.randrange(max(size, 1)))
            file.write(case.chance.randbytes(case.chance.choice([1, 100, 4096])))


def cut_store(case: Case, path: Path) -> None:
    """The file ends early."""
    os.truncate(path, case.chance.randrange(path.stat().st_size))


def replace_store(case: Case, path: Path) -> None:
    """The file is of another program, or empty."""
    path.write_bytes(case.chance.choice([b"", b"not a store\n" * 50, b"SQLite format 3\0" + b"\0" * 4000]))


def delete_log(case: Case, path: Path) -> None:
    """The log is gone: the calls that only it held are lost."""
    Path(f"{path}-wal").unlink(missing_ok=True)


def scribble_log(case: Case, path: Path) -> None:
    """The log holds other bytes."""
    log = Path(f"{path}-wal")
    if log.exists() and log.stat().st_size:
        scribble(case, log)


def move_store_alone(case: Case, path: Path) -> None:
    """Someone moves teacher.db away, without its log."""
    path.rename(path.with_name("elsewhere.db"))


BETWEEN: dict[str, tuple[int, Callable[[Case], None]]] = {
    "": (60, nothing),
    "an output deleted": (2, delete_output),
    "an output cut": (2, cut_output),
    "two outputs exchanged": (2, exchange_outputs),
    "partial files torn": (4, tear_partials),
    "partial files deleted": (2, delete_partials),
    "run.json emptied": (1, empty_record),
    "run.json deleted": (1, delete_record),
    "store scribbled": (2, store_harm(scribble)),
    "store cut": (1, store_harm(cut_store)),
    "store replaced": (1, store_harm(replace_store)),
    "log deleted": (1, store_harm(delete_log)),
    "log scribbled": (1, store_harm(scribble_log)),
    "store moved without its log": (1, store_harm(move_store_alone)),
}
# Conditions of a whole start, beside which it may also be killed.
CONDITIONS: dict[str, tuple[int, Callable[[random.Random], dict[str, Any]]]] = {
    "": (20, lambda chance: {}),
    "clock moved": (3, lambda chance: {"clock": chance.choice(CLOCK_SECONDS)}),
    "clock moved again and again": (
        1,
        lambda chance: {"clock": chance.choice(CLOCK_SECONDS), "clock_turns": chance.choice([1, 20, 300])},
    ),
    "disk full": (2, lambda chance: {"file_bytes": chance.choice([200, 4_000, 30_000, 120_000, 400_000])}),
    "no permission": (1, lambda chance: {"unprivileged": True}),
}


def draw(chance: random.Random, table: dict[str, tuple[int, Any]]) -> str:
    """A name from a table of weights."""
    return chance.choices(list(table), [weight for weight, _ in table.values()])[0]


# A run under fire


def harmed_run(case: Case, kills: int) -> None:
    """Start the run until it is done; `kills` of the starts are disturbed. Broken promises are in case.faults."""
    for _ in range(kills):
        before = case.teacher.paid()
        code = disturbed_start(case)
        check_repaid(case, before)
        if code == 0:
            break
        between = draw(case.chance, BETWEEN)
        if between:
            case.harms.append(between)
        BETWEEN[between][1](case)
    for _ in range(12):
        if finish(case) or case.faults:
            break
    else:
        case.fault(f"it does not end: {case.place.last_words()[-600:]}")
    if not case.faults:
        compare(case)


def disturbed_start(case: Case) -> int:
    """Start the run, and disturb it at a random moment; its exit code."""
    during, condition = draw(case.chance, DURING), draw(case.chance, CONDITIONS)
    case.harms.append(f"{during} ({condition})" if condition else during)
    case.place.log.unlink(missing_ok=True)
    delay = case.chance.uniform(0.0, 0.45) * case.uncut.seconds
    pid = case.hand.start(*case.place.distill(), log=case.place.log, **CONDITIONS[condition][1](case.chance))
    case.abandoned_at, case.disk_full = None, condition == "disk full"
    time.sleep(delay)
    with suppress(ProcessLookupError):
        DURING[during][1](case, pid)
        case.kills += 1
    code = wait_or_kill(case, pid)
    if condition == "disk full" and case.abandoned_at is None:
        case.abandoned_at = time.monotonic() - FULL_SECONDS
    if case.abandoned_at is not None:
        case.may_repay |= case.teacher.in_flight(case.abandoned_at)
    check_words(case, code)
    if during in POLITE and not condition and code not in (EXITS[during], 0, 1, -int(getattr(signal, during))):
        case.fault(f"exit code {code} after {during}")
    return code


def wait_or_kill(case: Case, pid: int) -> int:
    """The exit code of a start; one that hangs is killed, and a fault."""
    end = subprocess.Popen(["sleep", str(WAIT_SECONDS)])
    try:
        import threading

        def watch() -> None:
            if end.wait() == 0:
                case.fault("it hangs")
                os.kill(pid, signal.SIGKILL)

        watcher = threading.Thread(target=watch)
        watcher.start()
        return case.hand.wait()
    finally:
        end.terminate()
        watcher.join()


def check_words(case: Case, code: int) -> None:
    """A start ends without a traceback; one that fails says why."""
    said = case.place.last_words()
    if "Traceback" in said or code == 99:
        case.fault(f"traceback: {said[-1500:]}")
    elif 0 < code < 128 and "error:" not in said and not case.disk_full:  # the limit holds for the log too
        case.fault(f"exit code {code} without an error: {said[-300:]!r}")


def check_repaid(case: Case, before: Counter[str]) -> None:
    """What was paid again was in flight at a kill."""
    now = case.teacher.paid()
    again = {key for key, count in now.items() if count > max(before[key], 1)}
    case.most_again = max(case.most_again, len(again))
    wrong = again - case.may_repay
    if wrong and not case.store_harmed:
        case.fault(f"{len(wrong)} answers were paid for again that were not in flight at a kill")


def finish(case: Case) -> bool:
    """Start the run undisturbed, and follow the advice of its error; whether it is done."""
    before = case.teacher.paid()
    case.place.log.unlink(missing_ok=True)
    pid = case.hand.start(*case.place.distill(), log=case.place.log)
    code = wait_or_kill(case, pid)
    check_words(case, code)
    check_repaid(case, before)
    if code == 0:
        return True
    follow_advice(case, case.place.last_words())
    return False


def follow_advice(case: Case, said: str) -> None:
    """Do what an error says: `redo`, or delete run.json."""
    plain = " ".join(said.split())
    if found := re.search(r"tapir-local (redo fake(?: --round \d+)? --from [\w-]+)", plain):
        words = [*shlex.split(found[1]), "--yes", "--cache", str(case.place.cache)]
        case.place.log.unlink(missing_ok=True)
        code = case.hand.run(*words, log=case.place.log)
        if code:
            case.fault(f"redo failed: {case.place.last_words()[-600:]}")
    elif "run.json" in plain and "delete it" in plain:
        (case.place.run.path / "run.json").unlink()
    elif "the same command" not in plain and "same command" not in plain:
        case.fault(f"an error without a way on: {plain[-600:]}")


def first_difference(case: Case, found: dict[str, bytes], name: str) -> str:
    """The first line in which a file differs from the uncut run's."""
    ours, theirs = (files.get(name, b"").splitlines() for files in (found, case.uncut.files))
    pairs = ((one, two) for one, two in zip_longest(ours, theirs, fillvalue=b"") if one != two)
    one, two = next(pairs, (b"", b""))
    return f"{one[:200]!r} instead of {two[:200]!r}"


def compare(case: Case) -> None:
    """The files are those of the uncut run, and the store holds each call once."""
    found = outputs(case.place.run)
    without = CARD_FILES if case.record_lost else ()
    every = found.keys() | case.uncut.files.keys()
    names = sorted(name for name in every if found.get(name) != case.uncut.files.get(name) and name not in without)
    if names:
        case.fault(f"other files than the uncut run's: {', '.join(names)}; {first_difference(case, found, names[0])}")
    keys = stored_keys(case.place.store)
    if keys - case.uncut.keys or (keys != case.uncut.keys and not case.store_harmed):
        case.fault(f"{len(case.uncut.keys - keys)} calls are not in the store, {len(keys - case.uncut.keys)} too many")
