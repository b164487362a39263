"""The bench of length control prints our figures where alpaca_eval is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from annotations import make_annotations, write_gamed

BENCH = Path(__file__).parents[2] / "bench" / "length_control.py"


def test_the_bench_prints_a_line_for_each_regression(tmp_path: Path) -> None:
    write_gamed(tmp_path / "df_gamed.csv")
    (tmp_path / "worse.json").write_text(json.dumps(make_annotations()))
    command = [sys.executable, str(BENCH), "--gamed", str(tmp_path / "df_gamed.csv"), str(tmp_path / "worse.json")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout
    found = [json.loads(line) for line in printed.splitlines()]
    assert [row.get("regression", "").removeprefix("length_controlled_") for row in found][:3] == [
        "minimal",
        "noreg",
        "v1",
    ]
    assert found[2]["ours"]["rate"] == pytest.approx(33.680, abs=0.01)
