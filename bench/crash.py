"""Kill small runs at random moments, harm their files, resume them, and compare them with a run that was left alone.

    python bench/crash.py [--kills 200] [--seed 1] [--spoiled 0.04] [--case N]

Each run has the real command line, store, HTTP and files; what trains, exports and generates is a fake, so that a run
takes seconds (tests/faults/). A teacher on loopback keeps its own bill. Starts are ended by SIGKILL, SIGTERM, SIGHUP,
SIGINT or SIGSTOP, or their store is taken away, with a moved clock, a full disk or no permissions; between two starts
stage files, partial files, run.json and the store are deleted, cut, exchanged or overwritten. Then the same command is
run, and what its errors advise is done, until the run is done. The table counts what happened and what did not hold.
A fault is printed with its case: `--case N` with the same seed repeats that run alone. Exit code 1 if there is a fault.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "faults")]

from billed_teacher import BilledTeacher, serving  # noqa: E402
from campaign import Case, Uncut, Worker, harmed_run, make_place, run_uncut, worker  # noqa: E402

KILLS_PER_RUN = 8


def main() -> int:
    """Run the campaign and print its table; 1 if a promise was broken."""
    asked, began = arguments(), time.monotonic()
    cases: list[Case] = []
    with (
        tempfile.TemporaryDirectory(dir=asked.folder) as scratch,
        serving(BilledTeacher()) as teacher,
        worker() as hand,
    ):
        folder = Path(scratch)
        folder.chmod(0o755)
        uncut = run_uncut(hand, teacher, folder, ("warm", "uncut"))
        print(f"uncut run: {uncut.seconds:.1f} s, {uncut.requests} requests, {len(uncut.files)} files", file=sys.stderr)
        number = asked.case or 0
        while sum(case.kills for case in cases) < asked.kills:
            cases.append(one_case(hand, teacher, folder, uncut, (number, asked)))
            number += 1
            if asked.case is not None:
                break
    print_table(cases, uncut, time.monotonic() - began)
    return int(any(case.faults for case in cases))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--spoiled", type=float, default=0.04, help="share of the teacher's replies that are spoiled")
    parser.add_argument("--case", type=int, help="repeat this run alone")
    parser.add_argument("--folder", type=Path, help="folder for temporary files")
    return parser.parse_args()


def one_case(
    hand: Worker, teacher: BilledTeacher, folder: Path, uncut: Uncut, which: tuple[int, argparse.Namespace]
) -> Case:
    """One run under fire; its folder is deleted."""
    number, asked = which
    teacher.reset(asked.seed * 100_000 + number, spoiled=asked.spoiled, odd=asked.spoiled)
    place = make_place(folder, teacher, f"case-{number}")
    case = Case(place, hand, teacher, random.Random(f"{asked.seed}-{number}"), uncut)
    harmed_run(case, KILLS_PER_RUN)
    print(f"case {number}: {case.kills} kills, {len(case.faults)} faults", file=sys.stderr)
    for fault in case.faults:
        print(f"case {number}: {fault}", file=sys.stderr)
    shutil.rmtree(place.cache, ignore_errors=True)
    return case


def print_table(cases: list[Case], uncut: Uncut, seconds: float) -> None:
    """Print what was done to the runs, and what did not hold."""
    harms = Counter(harm.partition(" (")[0] for case in cases for harm in case.harms)
    conditions = Counter(harm.partition(" (")[2].rstrip(")") for case in cases for harm in case.harms)
    kills = sum(case.kills for case in cases)
    whole, hurt = ([case for case in cases if case.store_harmed is harmed] for harmed in (False, True))
    print(f"{kills} disturbed starts of {len(cases)} runs in {seconds:.0f} s\n")
    print("| what happened | times |\n|---|---|")
    for name, count in [*harms.most_common(), *((name, count) for name, count in conditions.most_common() if name)]:
        print(f"| {name} | {count} |")
    print("\n| promise | held |\n|---|---|")
    ended = [case for case in cases if not case.faults]
    print(f"| ends in the uncut run's files and calls, without a traceback | {len(ended)} of {len(cases)} runs |")
    print(f"| answers paid for again after one kill, at most | {max((case.most_again for case in whole), default=0)} |")
    most = max((case.most_again for case in hurt), default=0)
    print(f"| the same, of the {len(hurt)} runs whose store was harmed | {most} |")


if __name__ == "__main__":
    sys.exit(main())
