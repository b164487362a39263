"""Drafts come from the parents used least, and no parent exceeds its limit of new rows."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tapir_local.method.parents import ParentQueue

IDS = [f"p{n}" for n in range(30)]


def test_a_second_attempt_begins_where_the_first_has_not_been() -> None:
    parents = ParentQueue(IDS, (), 3)
    first, second = parents.take(10), parents.take(4)
    assert first == IDS[:10]
    assert second == IDS[10:14]
    assert parents.take(18) == [*IDS[14:30], *IDS[:2]]


def test_others_come_after_the_first_have_given_their_share_of_drafts() -> None:
    parents = ParentQueue(["a", "b"], ["x", "y"], 2)
    assert parents.take(7) == ["a", "b", "a", "b", "x", "y", "x"]
    assert parents.take(3) == ["y", "a", "b"]  # nothing was kept: start again


def test_a_parent_with_enough_new_rows_is_asked_no_more() -> None:
    parents = ParentQueue(["a"], ["x"], 2)
    for id in parents.take(3):
        parents.keep(id)
    assert parents.take(9) == ["x"]
    parents.keep("x")
    assert parents.take(9) == []


@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 4), st.lists(st.integers(0, 12), max_size=4), st.randoms())
def test_whatever_is_kept_no_parent_has_too_many_and_asking_is_even(first, others, children, counts, rng) -> None:
    parents, kept = ParentQueue(IDS[:first], IDS[first : first + others], children), Counter[str]()
    for count in counts:
        taken = parents.take(count)
        room = sum(children - kept[id] for id in parents.ids)
        assert len(taken) == min(count, room)
        for id in taken:
            if rng.random() < 0.5:
                parents.keep(id)
                kept[id] += 1
    assert all(count <= children for count in kept.values())
