"""A plan has the requested shares, or says why not."""

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapir_local.method.baselines import CURRICULA, allocate_capped
from tapir_local.method.curriculum import PlanInput, allocate_rows, challenge_of_round, is_easy, is_hard
from tapir_local.recipe.curriculum_settings import Curriculum, judges_pool
from tapir_local.recipe.tasks import TASKS
from tapir_local.records import Example, Judgement, Message, RoundPlan, TaskLearning

GAPS = {"Math": 6.0, "Music": 2.0, "Art": -1.0}
TARGETS = {label: task.share for label, task in TASKS.items()}


def test_a_thousand_rows_of_one_task_stay_a_thousand() -> None:
    assert allocate_rows({"Math": 1000}, TARGETS, 1000) == {"Math": 1000}


def test_three_tasks_share_all_the_rows() -> None:
    assert sum(allocate_rows({"Math": 400, "Music": 300, "Art": 300}, TARGETS, 1000).values()) == 1000


def test_tasks_without_a_row_get_none() -> None:
    assert "Music" not in allocate_rows({"Math": 5, "Music": 0}, TARGETS, 10)


@given(st.dictionaries(st.sampled_from(sorted(TASKS)), st.integers(0, 50)), st.integers(0, 500))
def test_shares_are_exact_and_within_one_row(counts: dict[str, int], size: int) -> None:
    present = [task for task, count in counts.items() if count]
    rows = allocate_rows(counts, TARGETS, size)
    assert sum(rows.values()) == (size if present else 0)
    total = sum(TARGETS[task] for task in present)
    assert all(abs(rows[task] - size * TARGETS[task] / total) < 1 for task in present)


def test_shares_of_unnamed_tasks_are_equal() -> None:
    assert allocate_rows({"a": 1, "b": 1}, {}, 4) == {"a": 2, "b": 2}


def test_the_challenge_rises_to_one() -> None:
    settings = Curriculum(alpha=0.3, alpha_step=0.2)
    assert [round(challenge_of_round(settings, number), 2) for number in (1, 2, 3, 9)] == [0.3, 0.5, 0.7, 1.0]


def test_hard_is_above_the_threshold_where_the_teacher_is_good_enough() -> None:
    settings = Curriculum()
    assert is_hard(Judgement("a", 9, 6), settings)
    assert not is_hard(Judgement("a", 9, 7), settings)  # exactly delta
    assert not is_hard(Judgement("a", 5, 1), settings)  # the teacher's score is too low
    assert not is_easy(Judgement("a", 5, 5), settings)
    assert not is_hard(Judgement("a", None, None), settings)
    assert not is_easy(Judgement("a", None, None), settings)


def rows_and_judgements(hard: dict[str, int], easy: dict[str, int]) -> tuple[list[Example], list[Judgement]]:
    """`hard` hard and `easy` easy rows of each task."""
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
    known = PlanInput(rows, rows, judgements, TARGETS, Curriculum(**settings), 2, can_expand, random.Random(0), GAPS)  # type: ignore[arg-type]
    return CURRICULA[known.settings.name](known)


def new_rows(plan: RoundPlan) -> dict[str, int]:
    return {expansion.task: expansion.rows for expansion in plan.expansions}


def test_a_plan_has_the_challenge_and_the_shares_asked() -> None:
    plan = planned({"Math": 200, "Music": 200}, {"Math": 300}, rows=200)
    math = sum("Math" in id for id in plan.hard) + new_rows(plan)["Math"]
    assert len(plan.hard) + plan.to_write == 100  # alpha_2 = 0.5
    assert len(plan.replay) == 100
    assert math == round(100 * 0.167 / 0.184)
    assert plan.alpha_got == 0.5
    assert plan.asked == plan.got


def test_half_of_a_task_is_new_and_all_of_what_it_lacks() -> None:
    plan = planned({"Math": 200, "Music": 3}, {"Math": 300}, rows=200)
    assert sum("Music" in id for id in plan.hard) == 3
    assert new_rows(plan)["Music"] == 6
    assert set(plan.expansions[1].parents) == {f"hard-Music-{n}" for n in range(3)}


def test_a_parent_has_no_more_new_rows_than_the_recipe_says_and_what_is_missing_is_said() -> None:
    plan = planned({"Math": 200, "Music": 1}, {"Math": 300}, rows=200)
    assert (new_rows(plan)["Music"], plan.short) == (3, {"Music": 5})
    assert plan.notes[-1] == "rows that curriculum.children (3) leaves out, for want of parents: Music 5"
    assert new_rows(planned({"Math": 200, "Music": 1}, {"Math": 300}, rows=200, children=8))["Music"] == 8


def test_where_hard_rows_are_too_few_less_hard_ones_of_the_task_are_parents_too_and_it_is_said() -> None:
    plan = planned({"Math": 200, "Music": 1}, {"Math": 300, "Music": 20}, rows=200)
    found = next(e for e in plan.expansions if e.task == "Music")
    assert (found.rows, found.parents, len(found.others)) == (8, ("hard-Music-0",), 8)
    assert all(id.startswith("easy-Music") for id in found.others)
    assert not plan.short
    assert plan.notes[-1] == "new rows that grow from less hard rows, the hard ones being too few: Music 5"


def test_hard_rows_take_the_places_of_new_ones_that_no_parent_may_have() -> None:
    plan = planned({"Math": 10}, {"Math": 40}, rows=80, expand_share=1.0, children=1)
    assert (len(plan.hard), plan.to_write, plan.short) == (0, 40, {})
    plan = planned({"Math": 10}, {"Art": 40}, rows=80, expand_share=1.0, children=1)
    assert (len(plan.hard), plan.to_write, plan.short) == (10, 10, {"Math": 20})


@given(
    st.dictionaries(st.sampled_from(["Math", "Music", "Art"]), st.integers(1, 20), min_size=1),
    st.dictionaries(st.sampled_from(["Math", "Music", "Art"]), st.integers(0, 20)),
    st.integers(1, 100),
    st.integers(1, 5),
    st.floats(0, 1),
)
def test_a_plan_asks_no_more_than_its_parents_may_have_and_counts_what_is_short(
    hard: dict[str, int], easy: dict[str, int], rows: int, children: int, share: float
) -> None:
    plan = planned(hard, easy, rows=rows, children=children, expand_share=share)
    assert all(0 < e.rows <= children * (len(e.parents) + len(e.others)) for e in plan.expansions)
    wanted = max(round(0.5 * rows), rows - sum(easy.values()))
    assert len(plan.hard) + plan.to_write + sum(plan.short.values()) == wanted
    assert len(set(plan.hard)) == len(plan.hard)


def test_lion_keeps_to_the_limit_of_a_parent() -> None:
    plan = planned({"Math": 2}, {"Math": 3}, rows=50, name="lion")
    assert [e.rows for e in plan.expansions] == [6, 9]
    assert plan.notes == ("35 rows that curriculum.children (3) leaves out, for want of parents",)


def test_the_hardest_rows_come_first() -> None:
    plan = planned({"Math": 90}, {"Math": 90}, rows=60)
    assert {int(id.rpartition("-")[2]) % 3 for id in plan.hard} == {0}  # the rows on which the student scored 1


def plan_with_ceiling(earlier: dict[str, float], **settings: float) -> RoundPlan:
    """A plan of six hard rows; the student's scores are 1, 2, 3, 1, 2, 3, and `earlier` before; the teacher's are 9."""
    rows, judgements = rows_and_judgements({"Math": 6}, {"Math": 2})
    before = {id: Judgement(id, 9.0, student) for id, student in earlier.items()}
    set_up = Curriculum(rows=6, alpha=1.0, **settings)
    return CURRICULA["tapir"](
        PlanInput(rows, rows, judgements, TARGETS, set_up, 2, True, random.Random(1), earlier=before)
    )


def test_rows_far_beyond_the_student_twice_running_are_set_aside() -> None:
    before = {"hard-Math-0": 1.0, "hard-Math-1": 1.0, "hard-Math-2": 1.0, "hard-Math-3": 5.0}
    plan = plan_with_ceiling(before, mfd_ceiling=6.0)  # now 8, 7, 6, 8, 7, 6; before 8, 8, 8, 4
    assert plan.aside == ("hard-Math-0", "hard-Math-1")
    assert plan.pool_hard == 6
    assert not {*plan.hard, *plan.expansions[0].parents, *plan.expansions[0].others, *plan.replay} & {*plan.aside}
    assert plan.notes[0] == "2 hard rows set aside: MFD above 6 twice in a row"
    assert plan_with_ceiling(before).aside == ()
    assert plan_with_ceiling({}, mfd_ceiling=0.0).aside == ()


def plan_scores(scores: dict[str, list[tuple[float, float]]], *, can_expand: bool = True, **settings: Any) -> RoundPlan:
    """A plan of round 2 from the (teacher's, student's) scores of each task's rows."""
    rows = [Example(f"{task}-{n}", (), "x", task) for task, pairs in scores.items() for n in range(len(pairs))]
    judgements = [Judgement(f"{task}-{n}", *pair) for task, pairs in scores.items() for n, pair in enumerate(pairs)]
    set_up = Curriculum(**{"rows": 40, **settings})
    return CURRICULA["tapir"](
        PlanInput(rows, rows, judgements, dict.fromkeys(scores, 0.25), set_up, 2, can_expand, random.Random(1))
    )


SCORES = {
    "Law": [(9.0, 9.0)] * 9 + [(9.0, 1.0)],  # the student's mean is 0.91 of the teacher's
    "Music": [(9.0, 5.0)] * 10,
    "Art": [(9.0, 4.0)] * 10,
    "Math": [(9.0, 1.0)] * 10,
    "Sport": [(9.0, 9.0)] * 20,
}


def test_the_weaker_half_of_the_tasks_that_are_not_mastered_gets_the_hard_rows() -> None:
    plan = plan_scores(SCORES, mastery=0.9)
    found = {task: (one.gap, one.state) for task, one in plan.mastery.items()}
    assert found == {
        "Math": (8.0, "taught"),
        "Art": (5.0, "taught"),
        "Music": (4.0, "waiting"),
        "Law": (0.8, "mastered"),
    }
    assert list(found) == ["Math", "Art", "Music", "Law"]
    assert {id.partition("-")[0] for id in plan.hard} == {*new_rows(plan)} == {"Math", "Art"}
    assert (len(plan.hard) + plan.to_write, len(plan.replay), plan.got) == (20, 20, {"Art": 0.5, "Math": 0.5})
    assert {id.partition("-")[0] for id in plan.replay} == {"Law", "Sport"}
    assert plan.notes[:3] == (
        "hard and new rows go to the weakest tasks that are not mastered: Math (gap 8.0), Art (gap 5.0)",
        "not mastered either, but left for a later round: Music (gap 4.0)",
        "mastered, and so without hard and new rows: Law (gap 0.8)",
    )
    assert plan.notes[3] == "no hard row in Sport"
    assert {*plan_scores(SCORES).got} == {"Math", "Art", "Music", "Law"}


def test_without_expansion_too_hard_rows_of_other_tasks_are_left() -> None:
    plan = plan_scores(SCORES, mastery=0.9, can_expand=False, alpha=1.0)
    assert sorted(plan.hard) == sorted(f"{task}-{n}" for task in ("Math", "Art") for n in range(10))


@pytest.mark.parametrize(("mastery", "state"), [(0.55, "mastered"), (0.56, "taught")])
def test_a_student_at_exactly_the_share_has_mastered_the_task(mastery: float, state: str) -> None:
    plan = plan_scores({"Math": [(10.0, 5.0), (10.0, 6.0)]}, mastery=mastery)
    assert plan.mastery["Math"].state == state


def test_tasks_of_equal_gap_are_all_taught() -> None:
    plan = plan_scores({task: [(9.0, 2.0)] * 3 for task in "dcba"}, mastery=0.9)
    assert {task: one.state for task, one in plan.mastery.items()} == dict.fromkeys("abcd", "taught")


def test_if_every_task_is_mastered_all_get_rows_as_without_the_setting() -> None:
    plain, plan = plan_scores(SCORES), plan_scores(SCORES, mastery=0.1)
    assert {one.state for one in plan.mastery.values()} == {"mastered"}
    assert (plan.hard, plan.expansions, plan.replay) == (plain.hard, plain.expansions, plain.replay)
    assert plan.notes[0].startswith(
        "every task that has hard rows is mastered, so all of them get rows: Math (gap 8.0)"
    )


@given(
    st.dictionaries(
        st.sampled_from("abcdef"),
        st.lists(st.tuples(st.integers(6, 10), st.integers(1, 10)), min_size=1, max_size=6),
        min_size=1,
    ),
    st.floats(0, 1),
)
def test_mastery_never_leaves_a_round_without_hard_rows_and_teaches_the_largest_gaps(
    scores: dict[str, list[tuple[float, float]]], mastery: float
) -> None:
    plan, plain = plan_scores(scores, mastery=mastery), plan_scores(scores)
    assert bool(plan.hard or plan.to_write) == bool(plain.hard or plain.to_write)
    gaps = {state: [o.gap for o in plan.mastery.values() if o.state == state] for state in ("taught", "waiting")}
    assert len(gaps["taught"]) >= len(gaps["waiting"])
    assert not gaps["waiting"] or max(gaps["waiting"]) < min(gaps["taught"])


def plan_after_round(before: dict[str, float], trained: set[str], **settings: Any) -> RoundPlan:
    """A plan of round 2: four rows each of Math and Art, on which the student now scores 3 and the teacher 9.

    `before` are the student's scores in round 1.
    """
    rows = [Example(f"{task}-{n}", (), "x", task) for task in ("Art", "Math") for n in range(4)]
    judgements = [Judgement(row.id, 9.0, 3.0) for row in rows]
    set_up = Curriculum(**{"rows": 20, "alpha": 1.0, "learnable": True, **settings})
    known = PlanInput(rows, rows, judgements, {"Art": 0.1, "Math": 0.1}, set_up, 2, True, random.Random(1))
    earlier = {id: Judgement(id, 9.0, student) for id, student in before.items()}
    return CURRICULA["tapir"](replace(known, earlier=earlier, trained=trained, can_expand=set_up.expand_share > 0))


# Of Math's four rows three have a lower MFD now, of Art's none: one is as before, three are harder.
LEARNED = {"Math-0": 1.0, "Math-1": 2.0, "Math-2": 2.5, "Math-3": 4.0}
NOT_LEARNED = {"Art-0": 3.0, "Art-1": 4.0, "Art-2": 5.0, "Art-3": 5.0}


def test_a_task_whose_hard_rows_were_learned_gets_more_rows() -> None:
    plan = plan_after_round(LEARNED | NOT_LEARNED, {*LEARNED, *NOT_LEARNED})
    assert plan.learning == {"Art": TaskLearning(4, 0), "Math": TaskLearning(4, 3)}
    assert [one.factor for one in plan.learning.values()] == [1 / 6, 4 / 6]
    assert plan.asked == {"Art": 0.2, "Math": 0.8}
    assert plan.notes[0] == "hard rows of the last round whose MFD has fallen: Art 0 of 4, Math 3 of 4"
    assert plan_after_round(LEARNED, {*LEARNED}, learnable=False).asked == {"Art": 0.5, "Math": 0.5}


def test_where_nothing_is_expanded_rows_of_tasks_that_were_learned_come_first() -> None:
    plan = plan_after_round(LEARNED | NOT_LEARNED, {*LEARNED, *NOT_LEARNED}, expand_share=0.0, rows=4)
    assert {id.partition("-")[0] for id in plan.hard} == {"Math"}


@pytest.mark.parametrize(
    ("before", "trained"),
    [
        ({}, {*LEARNED}),  # new rows of the last round were not judged before it
        (LEARNED, set()),  # judged, but not trained on
        (dict.fromkeys(LEARNED, 8.0), {*LEARNED}),  # replayed: they were easy
        ({"other": 1.0}, {"other"}),  # not in this round's pool
    ],
)
def test_rows_that_say_nothing_about_learning_do_not_count(before: dict[str, float], trained: set[str]) -> None:
    plan, plain = plan_after_round(before, trained), plan_after_round({}, set(), learnable=False)
    assert plan.learning == dict.fromkeys(("Art", "Math"), TaskLearning(0, 0))
    assert plan.notes[0] == "no hard row of the last round was judged again, so learnable changes no share"
    assert (plan.hard, plan.expansions, plan.replay) == (plain.hard, plain.expansions, plain.replay)


def test_mastery_and_learnable_go_together() -> None:
    plan = plan_after_round(LEARNED | NOT_LEARNED, {*LEARNED, *NOT_LEARNED}, mastery=0.9)
    assert {one.state for one in plan.mastery.values()} == {"taught"}  # both have a gap of 6
    assert plan.asked == {"Art": 0.2, "Math": 0.8}


def test_no_row_is_repeated() -> None:
    plan = planned({"Math": 30, "Art": 3}, {"Math": 50}, rows=100)
    assert len({*plan.hard, *plan.replay}) == len(plan.hard) + len(plan.replay)


def test_without_expansion_difficulty_alone_decides_and_the_shortage_is_said() -> None:
    plan = planned({"Math": 10, "Music": 30}, {"Math": 90}, rows=100, can_expand=False)
    assert len(plan.hard) == 40
    assert not plan.expansions
    assert plan.short["Math"] > 0


def test_no_hard_row_only_replays_and_says_so() -> None:
    plan = planned({}, {"Math": 90}, rows=50)
    assert (len(plan.hard), plan.expansions, len(plan.replay)) == (0, (), 50)
    assert "no row is hard" in plan.notes[0]


def test_only_hard_rows_fill_the_round_and_say_so() -> None:
    plan = planned({"Math": 90}, {}, rows=50)
    assert "no row is easy" in plan.notes[0]
    assert (len(plan.hard) + plan.to_write, plan.alpha, plan.alpha_got) == (50, 0.5, 1.0)


def test_hard_rows_take_the_places_that_easy_ones_cannot_fill_and_it_is_said() -> None:
    plan = planned({"Math": 90}, {"Math": 10}, rows=50)
    assert (len(plan.hard) + plan.to_write, len(plan.replay), plan.alpha_got) == (40, 10, 0.8)
    assert plan.notes == ("15 easy rows fewer than asked, hard ones in their place",)


def test_a_plan_is_the_same_each_time() -> None:
    assert planned({"Math": 90, "Art": 4}, {"Math": 70}) == planned({"Math": 90, "Art": 4}, {"Math": 70})


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 30)), st.integers(0, 120), st.randoms())
def test_capped_shares_fill_up_and_never_ask_for_more_than_there_is(
    counts: dict[str, int], size: int, rng: random.Random
) -> None:
    rows = allocate_capped(counts, {task: rng.random() for task in counts}, size)
    assert sum(rows.values()) == min(size, sum(counts.values()))
    assert all(rows[task] <= counts[task] for task in counts)


def test_without_difficulty_rows_are_taken_at_random_and_none_is_judged() -> None:
    plan = planned({"Math": 100}, {"Math": 100}, rows=100, difficulty=False)
    assert not judges_pool(Curriculum(difficulty=False))
    assert {id.partition("-")[0] for id in plan.hard} == {"hard", "easy"}
    assert not {*plan.hard} & {*plan.replay}
    assert len(plan.hard) + plan.to_write + len(plan.replay) == 100


def test_without_balance_tasks_come_as_they_do_among_the_hard_rows() -> None:
    plan = planned({"Math": 50, "Music": 150}, {"Math": 100}, rows=100, balance=False)
    assert plan.got == {"Math": 0.24, "Music": 0.76}  # a quarter and three quarters of 50 rows


@pytest.mark.parametrize(("refine", "styled"), [("hard", "hard"), ("all", "all"), ("off", "none"), (False, "none")])
def test_whose_answers_are_styled_is_the_recipes_choice(refine: str | bool, styled: str) -> None:
    assert planned({"Math": 9}, {"Math": 9}, rows=4, refine=refine).styled == styled


def test_uniform_draws_as_many_seeds_as_a_round_has_rows() -> None:
    plan = planned({"Math": 60}, {"Art": 60}, rows=50, name="uniform")
    assert (len(set(plan.drawn)), plan.hard, plan.expansions, plan.replay) == (50, (), (), ())


def test_a_seed_file_smaller_than_a_round_is_said() -> None:
    assert planned({"Math": 20}, {}, rows=50, name="uniform").notes == ("only 20 seeds for 50 rows",)


def test_all_takes_every_seed() -> None:
    assert len(planned({"Math": 60}, {"Art": 60}, rows=50, name="all").drawn) == 120


def test_growth_shares_follow_the_gaps_on_the_holdout() -> None:
    plan = planned({"Math": 90, "Music": 90, "Art": 90}, {}, rows=80, name="growth")
    assert plan.got == {"Math": 0.75, "Music": 0.25}


def test_a_task_too_small_for_its_gap_leaves_the_rest_to_the_others() -> None:
    plan = planned({"Math": 10, "Music": 90}, {}, rows=80, name="growth")
    assert (len(plan.drawn), plan.short) == (80, {"Math": 50})


def test_without_a_gap_growth_draws_as_the_seeds_are() -> None:
    rows, _ = rows_and_judgements({"Math": 30, "Art": 10}, {})
    settings = Curriculum(name="growth", rows=20)
    plan = CURRICULA["growth"](PlanInput(rows, rows, [], TARGETS, settings, 1, True, random.Random(0)))
    assert plan.got == {"Art": 0.25, "Math": 0.75}


def test_lion_grows_half_from_hard_rows_and_half_from_easy_ones() -> None:
    plan = planned({"Math": 30}, {"Math": 10, "Art": 20}, rows=50, name="lion")
    by_manner = {manner: [e for e in plan.expansions if e.manner == manner] for manner in ("alike", "rarer")}
    assert [sum(e.rows for e in found) for found in by_manner.values()] == [25, 25]
    assert all(id.startswith("hard") for e in by_manner["alike"] for id in e.parents)
    assert all(id.startswith("easy") for e in by_manner["rarer"] for id in e.parents)
    assert (plan.hard, plan.replay, plan.styled) == ((), (), "none")


def test_lion_calls_a_row_hard_at_one_point_and_not_below() -> None:
    rows = [Example(id, (Message("user", id),), "x", "Math") for id in ("at", "below")]
    judgements = [Judgement("at", 9.0, 8.0), Judgement("below", 9.0, 8.1)]
    settings = Curriculum(name="lion", rows=2)
    plan = CURRICULA["lion"](PlanInput(rows, rows, judgements, TARGETS, settings, 1, True, random.Random(0)))
    assert [(e.manner, e.parents) for e in plan.expansions] == [("alike", ("at",)), ("rarer", ("below",))]


def test_reflection_takes_seeds_at_random() -> None:
    plan = planned({"Math": 60}, {"Art": 60}, rows=50, name="reflection")
    assert (len(set(plan.reflected)), plan.drawn) == (50, ())


@pytest.mark.parametrize("name", sorted(CURRICULA))
def test_every_curriculum_names_itself_and_plans_the_same_each_time(name: str) -> None:
    first, second = (planned({"Math": 30, "Art": 9}, {"Math": 30}, rows=20, name=name) for _ in range(2))
    assert (first.curriculum, first) == (name, second)
