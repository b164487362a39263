"""The quickstart with several random seeds: accuracy and win rate by round, seconds by stage, peak memory.

    python bench/quickstart.py --cache /tmp/bench 1 2 3

Each seed has its own store, so every call is made. The bench resumes: finished seeds are only read.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

CLI = [sys.executable, str(Path(__file__).parent.parent / "cli.py")]


def run(cache: Path, seed: int) -> dict[str, Any]:
    """The status of a finished quickstart with this seed."""
    place = ["--cache", str(cache / str(seed))]
    subprocess.run([*CLI, "distill", "quickstart", "--random-seed", str(seed), *place], check=True)
    shown = subprocess.run([*CLI, "status", "quickstart", "--json", *place], check=True, capture_output=True, text=True)
    return dict(json.loads(shown.stdout))


def by_stage(status: dict[str, Any]) -> dict[str, float]:
    """Seconds of each stage, all rounds together."""
    seconds: dict[str, float] = defaultdict(float)
    for part in [{"stages": status["prepare"]}, *status["rounds"], {"stages": status["end"]}]:
        for stage in part["stages"]:
            seconds[stage["name"]] += stage["seconds"]
    return dict(seconds)


def report(found: dict[int, dict[str, Any]]) -> None:
    """Markdown tables."""
    rounds = range(len(next(iter(found.values()))["rounds"]))
    print("\n| seed | " + " | ".join(f"round {n}: accuracy, win rate" for n in rounds) + " | seconds | paid |")
    print("|---" * (len(rounds) + 3) + "|")
    for seed, status in found.items():
        cells = [f"{row['metrics']['accuracy']:.1%}, {row['metrics']['win_rate']:.1%}" for row in status["rounds"]]
        print(f"| {seed} | {' | '.join(cells)} | {sum(by_stage(status).values()):.0f} | {status['calls']['paid']:,} |")
    gains = [s["rounds"][-1]["metrics"]["accuracy"] - s["rounds"][0]["metrics"]["accuracy"] for s in found.values()]
    print(f"\nmean gain in accuracy: {100 * sum(gains) / len(gains):.1f} points")
    stages = {seed: by_stage(status) for seed, status in found.items()}
    print("\n| stage | " + " | ".join(f"seed {seed}, s" for seed in stages) + " |")
    print("|---" * (len(stages) + 1) + "|")
    for name in next(iter(stages.values())):
        print(f"| {name} | " + " | ".join(f"{seconds[name]:.1f}" for seconds in stages.values()) + " |")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"\npeak memory of one process: {peak:.2f} GB; Python {platform.python_version()}, {platform.machine()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("seeds", type=int, nargs="+")
    options = parser.parse_args()
    report({seed: run(options.cache, seed) for seed in options.seeds})


if __name__ == "__main__":
    main()
