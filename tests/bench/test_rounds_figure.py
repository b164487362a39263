"""The figure of rounds is drawn from what `status --json` prints; without matplotlib there is nothing to test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
BENCH = Path(__file__).parents[2] / "bench"


def metrics(rate: float | None) -> dict[str, object] | None:
    """A round's metrics, or null for a round that is not evaluated yet."""
    return rate and {"accuracy": rate, "accuracy_interval": [rate - 0.1, rate + 0.1], "win_rate": None}


def test_the_same_status_gives_the_same_figure(tmp_path: Path) -> None:
    rounds = [{"number": number, "metrics": metrics(rate)} for number, rate in enumerate((0.2, 0.5, None))]
    (tmp_path / "status.json").write_text(json.dumps({"run": "r", "rounds": rounds, "untrained": metrics(0.1)}))
    command = [sys.executable, str(BENCH / "rounds_figure.py"), str(tmp_path / "status.json"), "--title", "a run"]
    environment = os.environ | {"PYTHONPATH": str(BENCH.parent)}
    for name in ("one.svg", "two.svg"):
        subprocess.run([*command, "--out", str(tmp_path / name)], check=True, env=environment)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    svg = (tmp_path / "one.svg").read_text()
    assert svg.startswith("<?xml")
    assert ("<!-- untrained -->" in svg, "<!-- round 1 -->" in svg, "<!-- round 2 -->" in svg) == (True, True, False)
