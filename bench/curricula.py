"""Curricula and ablations of TAPIR on the pocket world: same student, seeds, store, holdout and rows per round.

    python bench/curricula.py --folder DIR --workers 2              run what is missing, then report
    python bench/curricula.py --folder DIR --report                 only report what is there
    python bench/curricula.py --folder DIR --arms tapir-refine-all uniform-refined --set student.path=smollm2 ...
                                                                    the same tasks and checkers, another student

For each random seed the preparation and round 0 are done once and copied for every arm. All arms share one store. The
bench resumes: finished runs are only read, interrupted ones continue. Each worker has one thread and runs training,
export and the gate in its own process instead of new ones, so that torch and TRL are imported once. Every table has
the untrained student. Arms are compared with --reference. An arm with `train.schedule: wsd` has a round 0 of its own.
"""

import argparse
import importlib
import os
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SETTING: Mapping[str, Any] = {
    "rounds": 3,
    "seeds.holdout": 400,
    "curriculum.rows": 500,
    "curriculum.first_rows": 500,
    "curriculum.pool": 600,
    "curriculum.refine": "hard",  # the default; the quickstart has `all`, which is an arm of its own here
    "curriculum.drafts": 8,  # so that no arm lacks rows
}
# Ten times the default, as the quickstart's rate of the other rounds is.
DPO: Mapping[str, Any] = {"train.preference_learning_rate": 1e-4}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "tapir": {},
    "uniform": {"curriculum.name": "uniform"},
    "all": {"curriculum.name": "all"},
    "lion": {"curriculum.name": "lion"},
    "reflection": {"curriculum.name": "reflection"},
    "growth": {"curriculum.name": "growth"},
    "tapir-difficulty-off": {"curriculum.difficulty": False},
    "tapir-balance-off": {"curriculum.balance": False},
    "tapir-refine-off": {"curriculum.refine": "off"},
    "tapir-one-round": {"rounds": 1, "curriculum.rows": 1500, "curriculum.alpha": 0.7},
    "tapir-alpha-fixed": {"curriculum.alpha": 0.7, "curriculum.alpha_step": 0.0},
    # Answers of replayed rows are refined too; then the other parts are switched off.
    "tapir-refine-all": {"curriculum.refine": "all"},
    # A round more, which trains on the pairs of answers that the other rounds have judged.
    "tapir-refine-all-dpo": {"curriculum.refine": "all", "train.preference": "dpo", **DPO},
    "refine-all-difficulty-off": {"curriculum.refine": "all", "curriculum.difficulty": False},
    "refine-all-balance-off": {"curriculum.refine": "all", "curriculum.balance": False},
    "refine-all-one-round": {
        "curriculum.refine": "all",
        "rounds": 1,
        "curriculum.rows": 1500,
        "curriculum.alpha": 0.7,
    },
    # A constant learning rate, so that it does not rise and fall once per round.
    "refine-all-constant-rate": {"curriculum.refine": "all", "train.schedule": "constant"},
    "refine-all-one-round-constant-rate": {
        "curriculum.refine": "all",
        "rounds": 1,
        "curriculum.rows": 1500,
        "curriculum.alpha": 0.7,
        "train.schedule": "constant",
    },
    # Rows far beyond the student twice running are left for a later round; all rows are judged, so that twice happens.
    "refine-all-ceiling": {"curriculum.refine": "all", "curriculum.mfd_ceiling": 6.0, "curriculum.pool": None},
    # Hard and new rows only for the weaker half of the tasks that are not mastered.
    "refine-all-mastery": {"curriculum.refine": "all", "curriculum.mastery": 0.9},
    # Shares of the hard rows by what was learned in the last round; all rows are judged, so that they are judged again.
    "refine-all-learnable": {"curriculum.refine": "all", "curriculum.learnable": True, "curriculum.pool": None},
    # The rival of the arms that judge all rows.
    "refine-all-whole-pool": {"curriculum.refine": "all", "curriculum.pool": None},
    # One schedule over all rounds: warm-up in round 0, decay in the last, Adam's moments carried on.
    "tapir-wsd": {"train.schedule": "wsd"},
    "refine-all-wsd": {"curriculum.refine": "all", "train.schedule": "wsd"},
    "refine-all-one-round-wsd": {
        "curriculum.refine": "all",
        "rounds": 1,
        "curriculum.rows": 1500,
        "curriculum.alpha": 0.7,
        "train.schedule": "wsd",
    },
    "uniform-refined-wsd": {
        "curriculum.difficulty": False,
        "curriculum.balance": False,
        "curriculum.expand_share": 0.0,
        "curriculum.alpha": 1.0,
        "train.schedule": "wsd",
    },
    # No difficulty, no balance, no new rows: random seeds with refined answers.
    "uniform-refined": {
        "curriculum.difficulty": False,
        "curriculum.balance": False,
        "curriculum.expand_share": 0.0,
        "curriculum.alpha": 1.0,
    },
}
SEEDS = (1, 2, 3, 4, 5)
# Runs whose preparation and round 0 the arms start from. `rounds: 0` ends with round 0; with `wsd` round 0 is not the
# last, so that run has a round more, and the bench stops it.
BASES: Mapping[str, Mapping[str, Any]] = {"base": {"rounds": 0}, "base-wsd": {"rounds": 1, "train.schedule": "wsd"}}
HEAVY = ("training.classifier", "training.train", "export.export", "export.gate")


class EndOfBase(Exception):
    """Round 1 of a base begins."""


def base_of(arm: str) -> str:
    """The run that an arm starts from."""
    return "base-wsd" if ARMS[arm].get("train.schedule") == "wsd" else "base"


def recipe_of(arm: str, seed: int, changed: Mapping[str, Any]) -> Any:
    """The quickstart with the settings of the bench, of the arm, and of the command line."""
    from tapir_local.recipe.text import override, parse_recipe

    text = (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    own = ARMS[arm] if arm in ARMS else BASES[arm]
    changes = {"name": f"{arm}-{seed}", "random_seed": seed, **SETTING, **changed, **own}
    return override(parse_recipe(text, "quickstart.yaml"), changes)


def here(work: Any, job: Any, folder: Path, progress: Any = None, *_: Any) -> None:
    """Do in this process what process.run_in_process does in a new one."""
    from tapir_local.files import write_record

    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "job.json", job)
    work(folder, progress or (lambda done, total, note: None))


def run(folder: Path, arm: str, seed: int, changed: Mapping[str, Any]) -> tuple[str, int, float]:
    """Run one arm, or what is missing of it. Returns (arm, seed, seconds)."""
    from tapir_local.pipeline.loop import Watch, distill
    from tapir_local.run_dir import RunDir
    from tapir_local.stages.backends import real_backends

    for name in HEAVY:
        module = importlib.import_module(f"tapir_local.{name}")
        assert "run_in_process" in vars(module)
        vars(module)["run_in_process"] = here
    recipe, began = recipe_of(arm, seed, changed), time.monotonic()
    place = RunDir(folder, recipe.name)
    if arm in ARMS and not place.path.exists():
        base = RunDir(folder, f"{base_of(arm)}-{seed}")
        copy = place.path.with_name(f".{place.name}.partial")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(base.path, copy)
        (copy / "recipe.yaml").unlink()
        copy.rename(place.path)
    if not (place.path / "recipe.yaml").exists() and arm in ARMS:
        from tapir_local.files import write_text
        from tapir_local.recipe.text import to_yaml

        write_text(place.path / "recipe.yaml", to_yaml(recipe))

    def begins(step: Any) -> None:
        if arm in BASES and step.number == 1:
            raise EndOfBase

    quiet = Watch(begins, lambda done, total, said: None, lambda step, taken: None)
    with (
        suppress(EndOfBase),
        real_backends(recipe, place, lambda text: print(f"{recipe.name}: {text}", file=sys.stderr)) as backends,
    ):
        distill(recipe, place, backends, quiet)
    return arm, seed, time.monotonic() - began


def work(options: argparse.Namespace) -> None:
    """All runs: the bases first, then seed by seed, so that an interrupted bench has complete seeds."""
    from tapir_local.recipe.text import parse_changes

    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    bases, changed = sorted(set(map(base_of, options.arms))), parse_changes(options.set)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for arms in (bases, options.arms):
            jobs = [(arm, seed) for seed in options.seeds for arm in arms]
            waiting = [pool.submit(run, options.folder, arm, seed, changed) for arm, seed in jobs]
            for count, found in enumerate(as_completed(waiting), 1):
                arm, seed, seconds = found.result()
                print(f"{count}/{len(jobs)} {arm} {seed}: {seconds:.0f} s", file=sys.stderr, flush=True)


def read(folder: Path, arms: list[str], seeds: list[int]) -> dict[str, dict[int, Any]]:
    """The results of finished runs, by arm and seed."""
    from tapir_local.report.run_results import read_run_results
    from tapir_local.run_dir import RunDir

    found: dict[str, dict[int, Any]] = {}
    for arm in arms:
        runs = {seed: RunDir(folder, f"{arm}-{seed}") for seed in seeds}
        done = {seed: run for seed, run in runs.items() if run.record().get("status") == "done"}
        if done:
            found[arm] = {seed: read_run_results([run])[0] for seed, run in done.items()}
    return found


def report(folder: Path, arms: list[str], seeds: list[int], reference: str) -> None:
    """Print Markdown tables: each arm at its end and the untrained student compared with the reference, the arms'
    costs, accuracy by round and by task."""
    from statistics import fmean

    from tapir_local.method.stats import correct_p_values, estimate_difference, estimate_mean

    sides = read(folder, arms, seeds)
    asked, seeds = seeds, [seed for seed in seeds if all(seed in runs for runs in sides.values())]
    whole = {arm: {seed: runs[seed] for seed in seeds} for arm, runs in sides.items() if seeds}
    if reference not in whole:
        sys.exit(f"{reference} has no finished run for a seed that all arms have, of {asked}")
    finished = ", ".join(f"{arm} {len(runs)}" for arm, runs in sides.items())
    print(f"\nthe random seeds that all arms have: {seeds} of {asked}; finished: {finished}")
    for name, values in (("accuracy", "right"), ("win rate", "wins")):
        known = {
            arm: {seed: dict(getattr(side.last, values)) for seed, side in runs.items()} for arm, runs in whole.items()
        }
        untrained = {seed: side.untrained for runs in whole.values() for seed, side in runs.items() if side.untrained}
        if set(untrained) == set(seeds):
            known["untrained"] = {seed: dict(getattr(untrained[seed], values)) for seed in seeds}
        gaps = correct_p_values(
            {arm: estimate_difference(rows, known[reference]) for arm, rows in known.items() if arm != reference}
        )
        print(f"\n| curriculum | {name} | 95 % over seeds | less {reference} | 95 % over seeds | p, Holm | by seed |")
        print("|---" * 7 + "|")
        for arm in sorted(known, key=lambda arm: -estimate_mean(known[arm]).mean):
            mean, gap = estimate_mean(known[arm]), gaps.get(arm)
            told = (
                [f"{100 * gap.mean:+.1f}", spread(gap.over_seeds, "+.1f"), f"{gap.p_holm:.3f}"] if gap else ["", "", ""]
            )
            each = ", ".join(f"{100 * fmean(rows.values()):.1f}" for rows in known[arm].values())
            print(f"| {arm} | {mean.mean:.1%} | {spread(mean.over_seeds, '.1f')} | {' | '.join(told)} | {each} |")
    print("\n| curriculum | rows | training tokens | of all's | teacher calls | judge calls | accuracy by round |")
    print("|---" * 7 + "|")
    for arm, runs in whole.items():
        costs = [side.last.cost for side in runs.values()]
        tokens = fmean(cost.tokens for cost in costs)
        whole_tokens = fmean(side.last.cost.tokens for side in whole["all"].values()) if "all" in whole else tokens
        rounds = [
            fmean(fmean(side.rounds[n].right.values()) for side in runs.values())
            for n in range(len(next(iter(runs.values())).rounds))
        ]
        numbers = [fmean(cost.rows for cost in costs), tokens]
        calls = [fmean(cost.teacher_calls for cost in costs), fmean(cost.judge_calls for cost in costs)]
        cells = (
            [f"{number:,.0f}" for number in numbers]
            + [f"{tokens / whole_tokens:.2f}"]
            + [f"{number:,.0f}" for number in calls]
        )
        print(f"| {arm} | {' | '.join(cells)} | {', '.join(f'{100 * value:.1f}' for value in rounds)} |")
    by_task(whole)


def by_task(whole: Mapping[str, Mapping[int, Any]]) -> None:
    """Final accuracy by task over all seeds: tasks with at least 50 rows, and the mean of all tasks."""
    tasks: dict[str, dict[str, list[float]]] = {}
    for arm, runs in whole.items():
        for side in runs.values():
            for row in side.holdout:
                if row.id in side.last.right:
                    tasks.setdefault(row.task, {}).setdefault(arm, []).append(side.last.right[row.id])
    large = [task for task, found in sorted(tasks.items()) if len(next(iter(found.values()))) >= 50]
    print(f"\n| task | rows | {' | '.join(whole)} |")
    print("|---" * (len(whole) + 2) + "|")
    for task in large:
        cells = [f"{100 * sum(tasks[task][arm]) / len(tasks[task][arm]):.0f}" for arm in whole]
        print(f"| {task} | {len(next(iter(tasks[task].values())))} | {' | '.join(cells)} |")
    means = [sum(sum(found[arm]) / len(found[arm]) for found in tasks.values()) / len(tasks) for arm in whole]
    print(f"| mean of {len(tasks)} tasks | | {' | '.join(f'{100 * value:.1f}' for value in means)} |")


def spread(pair: tuple[float, float] | None, spelled: str) -> str:
    """An interval in percent."""
    return f"{100 * pair[0]:{spelled}} to {100 * pair[1]:{spelled}}" if pair else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--set", action="append", default=[], help="a setting of all arms, such as student.path=DIR")
    parser.add_argument("--reference", choices=list(ARMS), help="compare with this arm; else with tapir or the first")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if not options.report:
        work(options)
    reference = options.reference or ("tapir" if "tapir" in options.arms else options.arms[0])
    if reference not in options.arms:
        parser.error(f"--reference {reference} is not among --arms")
    report(options.folder, options.arms, options.seeds, reference)


if __name__ == "__main__":
    main()
