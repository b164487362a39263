"""The quality of a judge from its scores, compared with figures computed by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapir_local.method.judge_quality import measure_judge
from tapir_local.method.judging import combine_orders, combine_single, judge_by_rouge, mfd
from tapir_local.records import Judgement
from tapir_local.report.status_tables import judge_table

SCORE = st.floats(1, 10)
ANSWERS = st.lists(st.tuples(SCORE, SCORE), min_size=1, max_size=30)


def test_figures_of_two_orders_by_hand() -> None:
    rows = [
        combine_orders("a", (8, 4), (6, 9)),  # teacher 8 and 9, student 4 and 6: the teacher wins twice
        combine_orders("b", (7, 5), (8, 6)),  # the first wins by 2 in both orders: teacher 7 and 6, student 5 and 8
        combine_orders("c", (5, 5), (5, 5)),  # two ties
        combine_orders("d", None, (5, 5)),
    ]
    found = measure_judge(rows)
    assert (found.rows, found.unjudged) == (3, 1)
    assert found.agreement == pytest.approx(2 / 3, abs=1e-6)
    assert found.order_difference == pytest.approx((1 + 2 + 1 + 3 + 0 + 0) / 6, abs=1e-6)
    assert found.position_bias == pytest.approx((4 - 3 + 2 + 2 + 0 + 0) / 6, abs=1e-6)
    assert found.ties == pytest.approx(2 / 3, abs=1e-6)  # b ties on average


@given(ANSWERS)
def test_a_judge_to_whom_order_means_nothing_gives_the_mfd_of_either_order(pairs: list[tuple[float, float]]) -> None:
    rows = [
        combine_orders(f"{n}", (teacher, student), (student, teacher)) for n, (teacher, student) in enumerate(pairs)
    ]
    assert [mfd(row) for row in rows] == pytest.approx([teacher - student for teacher, student in pairs])
    found = measure_judge(rows)
    assert (found.agreement, found.order_difference, found.position_bias) == (1.0, 0.0, pytest.approx(0.0))


@given(st.tuples(SCORE, SCORE), st.tuples(SCORE, SCORE))
def test_whatever_the_judge_exchanging_the_answers_turns_the_mfd_round(
    one: tuple[float, float], two: tuple[float, float]
) -> None:
    assert mfd(combine_orders("a", one, two)) == pytest.approx(-(mfd(combine_orders("a", two, one)) or 0.0))


@given(SCORE, SCORE, st.floats(-4, 4))
def test_a_bias_for_a_place_is_measured_and_leaves_the_mfd_alone(teacher: float, student: float, bias: float) -> None:
    row = combine_orders("a", (teacher + bias, student), (student + bias, teacher))
    assert measure_judge([row]).position_bias == pytest.approx(bias, abs=1e-5)
    assert mfd(row) == pytest.approx(teacher - student)


def of_length(n: int, student: float, length: int) -> Judgement:
    return Judgement(f"{n}", 5.0, student, student_length=length, teacher_length=100)


def test_a_judge_that_loves_length_has_a_length_bias_of_one() -> None:
    assert measure_judge([of_length(n, 1 + n / 4, 50 + n**2) for n in range(12)]).length_bias == 1.0
    assert measure_judge([of_length(n, 9 - n / 4, 50 + n**2) for n in range(12)]).length_bias == -1.0


@pytest.mark.parametrize(
    "rows",
    [
        [of_length(n, 1 + n, 50 + n) for n in range(9)],  # too few
        [of_length(n, 5, 50 + n) for n in range(20)],  # the same score
        [of_length(n, 1 + n % 9, 70) for n in range(20)],  # the same length
        [],
    ],
)
def test_where_length_and_score_cannot_be_compared_there_is_no_figure(rows: list[Judgement]) -> None:
    assert measure_judge(rows).length_bias is None


@pytest.mark.parametrize("rows", [[combine_single("a", 8, 4)], [judge_by_rouge("a", "the cat", "a cat")]])
def test_where_nothing_was_asked_in_two_orders_nothing_is_said_of_them(rows: list[Judgement]) -> None:
    found = measure_judge(rows)
    assert (found.rows, found.ties) == (1, 0.0)
    assert (found.agreement, found.order_difference, found.position_bias) == (None, None, None)


def test_a_judge_who_gives_every_answer_the_same_score_is_named() -> None:
    alone = [combine_single(f"{n}", 10, 10) for n in range(10)]
    pairs = [combine_orders(f"{n}", (10, 10), (10, 10)) for n in range(10)]
    for rows in (alone, pairs):
        assert measure_judge(rows).notes == ("the judge gives every answer 10: MFD says nothing",)
    assert measure_judge([*alone, combine_single("x", 10, 9)]).notes == ()


def test_a_judge_who_likes_the_first_answer_is_named_though_the_means_are_all_the_same() -> None:
    found = measure_judge([combine_orders(f"{n}", (8, 6), (8, 6)) for n in range(10)])
    assert (found.agreement, found.position_bias, found.ties) == (0.0, 2.0, 1.0)
    assert found.notes == (
        "the judge's two orders disagree on 100% of the rows: its scores are noise there; it prefers the answer shown "
        "first, by 2.0 points",
    )


def test_a_quarter_of_the_orders_may_disagree() -> None:
    agree, differ = [combine_orders("a", (8, 4), (4, 8))] * 9, [combine_orders("b", (8, 6), (8, 6))] * 3
    assert measure_judge([*agree, *differ]).notes == ()
    assert len(measure_judge([*agree, *differ, differ[0]]).notes) == 1


def of_lengths(rows: int, slope: float) -> list[Judgement]:
    """Rows whose scores correlate with the lengths of their answers, every fifth less so."""
    return [of_length(n, 5 + slope * (n if n % 5 else 10 + n / 2), 50 + 10 * n) for n in range(rows)]


@pytest.mark.parametrize(("slope", "which"), [(0.1, "longer"), (-0.1, "shorter")])
def test_a_judge_whose_scores_go_with_length_is_named(slope: float, which: str) -> None:
    found = measure_judge(of_lengths(40, slope))
    assert 0.7 <= abs(found.length_bias or 0) < 1
    assert len(found.notes) == 1
    assert (
        f"the scores go with length (rank correlation {found.length_bias:+.2f}): the {which} answer" in found.notes[0]
    )


def test_of_few_rows_or_a_weak_correlation_nothing_is_said() -> None:
    assert measure_judge(of_lengths(40, 0.1)[:19]).notes == ()
    weak = [of_length(n, 5 + 0.1 * (n * 17 % 40 + n / 2), 50 + n) for n in range(40)]
    assert 0 < (measure_judge(weak).length_bias or 0) < 0.7
    assert measure_judge(weak).notes == ()


def test_the_table_has_a_column_for_pool_and_holdout_and_a_dash_for_what_has_no_meaning() -> None:
    from dataclasses import asdict

    sets = {"pool": [combine_orders(f"{n}", (8, 6), (8, 6)) for n in range(10)], "holdout": [combine_single("a", 8, 4)]}
    table = judge_table("run r, round 1", {name: asdict(measure_judge(rows)) for name, rows in sets.items()})
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert cells[1][:5] == ["10", "0", "0.0%", "2.00", "+2.00"]
    assert cells[2][:5] == ["1", "0", "-", "-", "-"]
    assert str(table.caption).startswith("pool: the judge's two orders disagree")


# Health


def checked(
    rows: int, prefers: str, ties: int = 0
) -> tuple[list[Judgement], dict[str, tuple[bool | None, bool | None]]]:
    """Judgements of rows of which the teacher's answer is right on two of three, and what the checker says of them.

    The judge `prefers` the `right` answer, the `longer` one or the one shown `first`, or says `8` of all; on the first
    rows it ties. The longer answer is right on every second row.
    """
    found, right = [], {}
    for n in range(rows):
        teacher = n % 3 != 0
        right[f"{n}"] = (teacher, not teacher)
        longer = n % 2 == 0
        lengths = {"student_length": 100 if longer else 40 + n, "teacher_length": 50 + n if longer else 90}
        if prefers == "8" or n < ties:
            one = two = (8.0, 8.0)
        elif prefers == "first":
            one = two = (9.0, 4.0)
        else:
            wins = teacher if prefers == "right" else not longer
            one, two = ((9.0, 4.0), (4.0, 9.0)) if wins else ((4.0, 9.0), (9.0, 4.0))
        found.append(replace(combine_orders(f"{n}", one, two), **lengths))
    return found, right


@pytest.mark.parametrize(
    ("prefers", "health", "notes"),
    [
        ("right", "good", []),
        ("8", "useless", ["gives every answer 8", "no better than chance", "on only 50%"]),
        ("first", "useless", ["no better than chance", "it prefers the answer shown first, by 5.0", "on only 50%"]),
        ("longer", "useless", ["no better than chance", "the longer answer nearly always", "on only 50%"]),
    ],
)
def test_the_health_of_a_judge(prefers: str, health: str, notes: list[str]) -> None:
    found = measure_judge(*checked(60, prefers))
    assert (found.health, found.checker_rows) == (health, 60)
    assert [note in said for note, said in zip(notes, found.notes, strict=True)] == [True] * len(notes)


def test_few_rows_say_nothing_of_a_judge_and_a_mediocre_one_is_doubtful() -> None:
    assert measure_judge(*checked(9, "8")).health == "unknown"
    assert measure_judge(*checked(29, "first")).health == "doubtful"  # too few to call it chance
    found = measure_judge(*checked(60, "right", ties=40))
    assert (found.health, found.checker_agreement) == ("doubtful", pytest.approx(2 / 3, abs=1e-6))
    assert found.notes == ("the judge prefers the answer that the checker finds right on only 67% of 60 rows",)


def test_equal_scores_of_answers_that_are_all_right_are_no_fault() -> None:
    rows = [combine_single(f"{n}", 10, 10) for n in range(40)]
    assert measure_judge(rows, {row.id: (True, True) for row in rows}).health == "good"
    assert measure_judge(rows, {row.id: (True, None) for row in rows}).health == "useless"
    assert measure_judge(rows).health == "useless"


def test_unreadable_replies_are_a_warning() -> None:
    rows = [combine_single(f"{n}", 8, n % 9 + 1) for n in range(40)]
    assert measure_judge([*rows, *[combine_single("x", 8, None)] * 2]).notes == ()
    found = measure_judge([*rows, *[combine_single("x", 8, None)] * 3])
    assert (found.health, found.notes) == ("doubtful", ("7% of the rows have no readable score",))
