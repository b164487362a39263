"""A plan has the shares it was asked for, or says why not."""

import random

from hypothesis import given
from hypothesis import strategies as st

from tapir_local.curriculum import challenge, is_easy, is_hard, shares, tapir
from tapir_local.recipe import Curriculum
from tapir_local.records import Example, Judgement, Message, RoundPlan
from tapir_local.tasks import TASKS

TARGETS = {label: task.share for label, task in TASKS.items()}


def test_a_thousand_rows_of_one_task_stay_a_thousand() -> None:
    assert shares({"Math": 1000}, TARGETS, 1000) == {"Math": 1000}


def test_three_tasks_share_all_the_rows() -> None:
    assert sum(shares({"Math": 400, "Music": 300, "Art": 300}, TARGETS, 1000).values()) == 1000


def test_tasks_without_a_row_get_none() -> None:
    assert "Music" not in shares({"Math": 5, "Music": 0}, TARGETS, 10)


@given(st.dictionaries(st.sampled_from(sorted(TASKS)), st.integers(0, 50)), st.integers(0, 500))
def test_shares_are_exact_and_within_one_row(counts: dict[str, int], size: int) -> None:
    present = [task for task, count in counts.items() if count]
    rows = shares(counts, TARGETS, size)
    assert sum(rows.values()) == (size if present else 0)
    total = sum(TARGETS[task] for task in present)
    assert all(abs(rows[task] - size * TARGETS[task] / total) < 1 for task in present)


def test_shares_of_unnamed_tasks_are_equal() -> None:
    assert shares({"a": 1, "b": 1}, {}, 4) == {"a": 2, "b": 2}


def test_the_challenge_rises_to_one() -> None:
    settings = Curriculum(alpha=0.3, alpha_step=0.2)
    assert [round(challenge(settings, number), 2) for number in (1, 2, 3, 9)] == [0.3, 0.5, 0.7, 1.0]


def test_hard_is_above_the_threshold_where_the_teacher_is_good_enough() -> None:
    settings = Curriculum()
    assert is_hard(Judgement("a", 9, 6), settings)
    assert not is_hard(Judgement("a", 9, 7), settings)  # exactly delta
    assert not is_hard(Judgement("a", 5, 1), settings)  # the teacher fails too
    assert not is_easy(Judgement("a", 5, 5), settings)
    assert not is_hard(Judgement("a", None, None), settings)
    assert not is_easy(Judgement("a", None, None), settings)


def rows_and_judgements(hard: dict[str, int], easy: dict[str, int]) -> tuple[list[Example], list[Judgement]]:
    """Rows of each task, so many hard and so many easy."""
    rows, judgements = [], []
    for kind, counts in (("hard", hard), ("easy", easy)):
        for task, count in counts.items():
            for number in range(count):
                id = f"{kind}-{task}-{number}"
                rows.append(Example(id, (Message("user", id),), "x", task))
                judgements.append(Judgement(id, 9.0, 1.0 + number % 3 if kind == "hard" else 9.0))
    return rows, judgements


def planned(hard: dict[str, int], easy: dict[str, int], *, can_expand: bool = True, **settings: float) -> RoundPlan:
    rows, judgements = rows_and_judgements(hard, easy)
    return tapir(rows, judgements, TARGETS, Curriculum(**settings), 2, can_expand, random.Random(0))  # type: ignore[arg-type]


def test_a_plan_has_the_challenge_and_the_shares_asked() -> None:
    plan = planned({"Math": 200, "Music": 200}, {"Math": 300}, rows=200)
    math = sum("Math" in id for id in plan.hard) + plan.expand["Math"]
    assert len(plan.hard) + sum(plan.expand.values()) == 100  # alpha_2 = 0.5
    assert len(plan.replay) == 100
    assert math == round(100 * 0.167 / 0.184)
    assert plan.alpha_got == 0.5
    assert plan.asked == plan.got


def test_half_of_a_task_is_new_and_all_of_what_it_lacks() -> None:
    plan = planned({"Math": 200, "Music": 1}, {"Math": 300}, rows=200)
    assert sum("Music" in id for id in plan.hard) == 1
    assert plan.expand["Music"] == 8
    assert plan.parents["Music"] == ("hard-Music-0",)


def test_the_hardest_rows_come_first() -> None:
    plan = planned({"Math": 90}, {"Math": 90}, rows=60)
    assert {int(id.rpartition("-")[2]) % 3 for id in plan.hard} == {0}  # those on which the student scored 1


def test_no_row_is_repeated() -> None:
    plan = planned({"Math": 30, "Art": 3}, {"Math": 50}, rows=100)
    assert len({*plan.hard, *plan.replay}) == len(plan.hard) + len(plan.replay)


def test_without_expansion_difficulty_alone_decides_and_the_shortage_is_said() -> None:
    plan = planned({"Math": 10, "Music": 30}, {"Math": 90}, rows=100, can_expand=False)
    assert len(plan.hard) == 40
    assert not plan.expand
    assert plan.short["Math"] > 0


def test_no_hard_row_only_replays_and_says_so() -> None:
    plan = planned({}, {"Math": 90}, rows=50)
    assert (len(plan.hard), plan.expand, len(plan.replay)) == (0, {}, 50)
    assert "no row is hard" in plan.notes[0]


def test_only_hard_rows_fill_the_round_and_say_so() -> None:
    plan = planned({"Math": 90}, {}, rows=50)
    assert "no row is easy" in plan.notes[0]
    assert (len(plan.hard) + sum(plan.expand.values()), plan.alpha, plan.alpha_got) == (50, 0.5, 1.0)


def test_a_plan_is_the_same_each_time() -> None:
    assert planned({"Math": 90, "Art": 4}, {"Math": 70}) == planned({"Math": 90, "Art": 4}, {"Math": 70})
