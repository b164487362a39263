"""Length-controlled win rates compared with alpaca_eval's own code, and what the fit does at its edges."""

import random
from pathlib import Path

import pytest
from annotations import ROWS, difficulty, make_annotations, write_gamed

from tapir_local.errors import TapirError
from tapir_local.evaluation.annotations import Annotation, read_annotation, read_gamed_baselines
from tapir_local.method.length_control import (
    CONSTANT_TERM,
    LENGTH_TERM,
    GamedBaselines,
    length_controlled_rate,
    lengths_overlap,
)

WORSE, BETTER = (-0.6, 0.4), (0.5, -0.2)
NO_GAMED = GamedBaselines({number: difficulty(number) for number in range(ROWS)}, [], [], [])
# (length_controlled_winrate, lc_standard_error) in percent, by alpaca_eval 0.6.6 with scikit-learn 1.5.2, made with:
#   python tests/support/annotations.py DIR
#   python bench/length_control.py --gamed DIR/df_gamed.csv DIR/worse.json DIR/better.json
ALPACA_EVAL = {
    (WORSE, "minimal"): (28.222440, 0.0),
    (WORSE, "noreg"): (30.901734, 1.091273),
    (WORSE, "v1"): (33.682974, 1.041336),
    (BETTER, "minimal"): (66.864283, 0.0),
    (BETTER, "noreg"): (65.411065, 1.030332),
    (BETTER, "v1"): (64.492139, 0.965857),
}
# The same with the tolerance of alpaca_eval's solver at 1e-9 instead of 1e-4.
ALPACA_EVAL_TIGHT = {
    (WORSE, "minimal"): 28.21887923,
    (WORSE, "noreg"): 30.89594011,
    (WORSE, "v1"): 33.68007453,
    (BETTER, "minimal"): 66.86498379,
    (BETTER, "noreg"): 65.41160990,
    (BETTER, "v1"): 64.49331690,
}


@pytest.fixture(scope="module")
def gamed(tmp_path_factory: pytest.TempPathFactory) -> GamedBaselines:
    path = tmp_path_factory.mktemp("gamed") / "df_gamed.csv"
    write_gamed(path)
    return read_gamed_baselines(path)


def read(rows: tuple[float, float]) -> list[Annotation]:
    return [read_annotation(row, "here") for row in make_annotations(*rows)]


@pytest.mark.parametrize(("rows", "regression"), ALPACA_EVAL)
def test_rates_are_those_of_alpaca_eval(rows: tuple[float, float], regression: str, gamed: GamedBaselines) -> None:
    annotations = read(rows)
    data = {"minimal": None, "noreg": NO_GAMED, "v1": gamed}[regression]
    found = length_controlled_rate([row.preference for row in annotations], [row.lengths for row in annotations], data)
    assert found
    rate, error = ALPACA_EVAL[rows, regression]
    assert 100 * found.win_rate == pytest.approx(rate, abs=0.01)
    assert 100 * found.standard_error == pytest.approx(error, abs=0.001)
    assert 100 * found.win_rate == pytest.approx(ALPACA_EVAL_TIGHT[rows, regression], abs=1e-6)
    low, high = found.interval
    assert low < found.win_rate < high


def test_the_length_effect_of_made_rows_is_taken_out() -> None:
    """Both answers are as good, but the judge prefers the longer one: the rate at equal length is a half."""
    chance = random.Random(1)
    lengths = [(chance.randint(100, 900), chance.randint(100, 600)) for _ in range(600)]
    wins = [float(chance.random() < (0.85 if own > other else 0.15)) for own, other in lengths]
    found = length_controlled_rate(wins, lengths)
    assert found
    assert sum(wins) / len(wins) > 0.57
    assert found.interval[0] < 0.5 < found.interval[1]
    assert found.interval[1] - found.interval[0] < 0.15
    assert found.weights[LENGTH_TERM] < -1  # of the opponent's length minus the evaluated one's
    assert set(found.weights) == {LENGTH_TERM, CONSTANT_TERM}


def test_rows_of_one_side_mirror_those_of_the_other() -> None:
    annotations = [row for row in read(WORSE) if row.preference is not None]
    one = length_controlled_rate([row.preference for row in annotations], [row.lengths for row in annotations])
    other = length_controlled_rate(
        [1 - (row.preference or 0.0) for row in annotations], [row.lengths[::-1] for row in annotations]
    )
    assert one
    assert other
    assert one.win_rate + other.win_rate == pytest.approx(1, abs=1e-9)


def test_without_enough_rows_or_any_difference_there_is_no_rate() -> None:
    lengths = [(number, 50) for number in range(60)]
    assert length_controlled_rate([1.0] * 49, lengths[:49]) is None
    assert length_controlled_rate([1.0] * 49 + [None] * 11, lengths) is None
    assert length_controlled_rate([1.0, 0.0] * 30, [(7, 5)] * 60) is None
    certain = length_controlled_rate([1.0] * 60, lengths)
    assert certain
    assert certain.win_rate > 0.9  # every row is won: the penalty keeps the rate below 1
    assert certain.interval[1] <= 1


def test_lengths_overlap_if_each_side_is_longer_on_a_tenth_of_the_rows() -> None:
    assert lengths_overlap([(2, 1)] * 9 + [(1, 2)])
    assert not lengths_overlap([(2, 1)] * 10 + [(1, 2)])
    assert not lengths_overlap([(1, 1)] * 10)


def test_rows_beyond_the_instructions_with_a_difficulty_are_refused(gamed: GamedBaselines) -> None:
    lengths = [(number, 50) for number in range(ROWS + 1)]
    with pytest.raises(TapirError, match=f"no difficulty of row {ROWS}"):
        length_controlled_rate([1.0] * (ROWS + 1), lengths, gamed)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "index,preference\n0,1\n"])
def test_another_file_than_the_gamed_baselines_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(TapirError, match="not alpaca_eval's file of gamed baselines"):
        read_gamed_baselines(tmp_path / "other.csv")
