"""Compare length-controlled win rates with those of alpaca_eval's own code, on the same annotations.

    python bench/length_control.py --gamed df_gamed.csv annotations.json...

Run it in an environment that has this package and alpaca_eval 0.6.6 (with scikit-learn below 1.6 and pandas below 3);
without alpaca_eval it prints our figures alone. alpaca_eval downloads df_gamed.csv; here it gets the file of --gamed.
For each file and each of alpaca_eval's regressions, a line of JSON: the rate in percent by alpaca_eval, the same with
its solver's tolerance at 1e-9, and ours; and the seconds of each. `noreg` is alpaca_eval's regression with the
difficulty but without the gamed baselines.
"""

import argparse
import importlib.util
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tapir_local.evaluation.annotations import read_annotations, read_gamed_baselines
from tapir_local.method.length_control import GamedBaselines, length_controlled_rate

REGRESSIONS = ("length_controlled_minimal", "length_controlled_noreg", "length_controlled_v1")
TIGHT = {"tol": 1e-9, "max_iter": 100_000}


def ours(path: Path, name: str, gamed: GamedBaselines) -> dict[str, float]:
    """Our rate in percent, its standard error as alpaca_eval defines it, and the seconds."""
    rows, began = read_annotations(path), time.perf_counter()
    given = {REGRESSIONS[0]: None, REGRESSIONS[1]: GamedBaselines(gamed.difficulty, [], [], []), REGRESSIONS[2]: gamed}
    found = length_controlled_rate([row.preference for row in rows], [row.lengths for row in rows], given[name])
    seconds = time.perf_counter() - began
    assert found, f"{path} has too few rows"
    return {"rate": 100 * found.win_rate, "error": 100 * found.standard_error, "seconds": round(seconds, 3)}


def theirs(path: Path, name: str, gamed: Path, **solver: Any) -> dict[str, float]:
    """The same by alpaca_eval's code; `solver` are more arguments of its scikit-learn model."""
    import pandas
    from alpaca_eval.metrics import glm_winrate

    glm: Any = glm_winrate
    glm.hf_hub_download = lambda **_: str(gamed)
    info = {**glm.GLM_INFO[name], "kwargs": {**glm.GLM_INFO[name]["kwargs"], **solver}}
    began = time.perf_counter()
    found = glm.get_length_controlled_winrate(
        pandas.DataFrame(json.loads(path.read_bytes())),
        glm_name=name,
        glm_info=info,
        save_weights_dir=None,
        is_warn_extreme_changes=False,
    )
    seconds = round(time.perf_counter() - began, 3)
    rate, error = found["length_controlled_winrate"], found["lc_standard_error"]
    return {"rate": float(rate), "error": float(error), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", nargs="+", type=Path)
    parser.add_argument("--gamed", required=True, type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    gamed, installed = read_gamed_baselines(given.gamed), importlib.util.find_spec("alpaca_eval") is not None
    worst = 0.0
    for path in given.annotations:
        for name in REGRESSIONS:
            found: dict[str, Any] = {"file": path.name, "regression": name, "ours": ours(path, name, gamed)}
            if installed:
                found["alpaca_eval"] = theirs(path, name, given.gamed)
                found["alpaca_eval_tight"] = theirs(path, name, given.gamed, **TIGHT)
                worst = max(worst, abs(found["alpaca_eval"]["rate"] - found["ours"]["rate"]))
            print(json.dumps(found), flush=True)
    if installed:
        print(json.dumps({"largest_difference_in_points": worst}))


if __name__ == "__main__":
    main()
