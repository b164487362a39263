"""Choose the parents of new instructions: how many rows each task's have, and the row used least so far for each."""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence

from tapir_local.recipe.curriculum_settings import Curriculum
from tapir_local.records import Expansion


class ParentQueue:
    """The parents of one expansion in a round, with the drafts asked for and kept from each.

    Each of `first` is used for up to `children` drafts in turn, then each of `others`, then again from the start. A
    parent with `children` kept rows is not used again.
    """

    def __init__(self, first: Sequence[str], others: Sequence[str], children: int) -> None:
        self.ids = list(dict.fromkeys([*first, *others]))
        self.first, self.children = len(dict.fromkeys(first)), children
        self.asked: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()

    def turn(self, place: int) -> tuple[int, bool, int, int]:
        """The priority of a parent: the lowest is used next."""
        asked = self.asked[self.ids[place]]
        return asked // self.children, place >= self.first, asked, place

    def take(self, count: int) -> list[str]:
        """The parents of the next `count` drafts; fewer if no more drafts can be kept."""
        waiting, chosen, taken = [self.turn(place) for place in range(len(self.ids))], list[str](), Counter[str]()
        heapq.heapify(waiting)
        while waiting and len(chosen) < count:
            place = heapq.heappop(waiting)[-1]
            id = self.ids[place]
            if self.kept[id] + taken[id] < self.children:
                chosen.append(id)
                taken[id] += 1
                self.asked[id] += 1
                heapq.heappush(waiting, self.turn(place))
        return chosen

    def keep(self, id: str) -> None:
        """Record that a draft of a parent was kept."""
        self.kept[id] += 1


def fill_tasks(
    by_task: Mapping[str, Sequence[str]],
    asked: Mapping[str, int],
    others: Mapping[str, Sequence[str]],
    settings: Curriculum,
) -> tuple[list[str], tuple[Expansion, ...]]:
    """(hard rows chosen, new rows to write) that together fill the requested rows of each task, if possible.

    A parent has at most settings.children new rows, since ten from one parent would be ten variants of one question. If
    the hard rows are too few parents, `others` are parents too; if these are too few, more hard rows are taken.
    """
    chosen: list[str] = []
    expansions: list[Expansion] = []
    for task, ids in by_task.items():
        old = min(len(ids), asked[task] - round(settings.expand_share * asked[task]))
        new = asked[task] - old
        parents, more = tuple(ids), tuple(others.get(task, ())[:new])
        room = settings.children * (len(parents) + len(more))
        chosen += ids[: old + max(0, new - room)]
        if min(new, room) > 0:
            expansions.append(Expansion(task, min(new, room), parents, others=more))
    return chosen, tuple(expansions)


def parent_notes(expansions: Sequence[Expansion], short: Mapping[str, int], settings: Curriculum) -> tuple[str, ...]:
    """Notes on the effects of the limit of new rows per parent."""
    beyond = {e.task: e.rows - settings.children * len(e.parents) for e in expansions}
    grown = [f"{task} {count:,}" for task, count in beyond.items() if count > 0]
    missing = [f"{task} {count:,}" for task, count in short.items() if expansions]
    said = {
        f"new rows that grow from less hard rows, the hard ones being too few: {', '.join(grown)}": grown,
        f"rows that curriculum.children ({settings.children}) leaves out, for want of parents: {', '.join(missing)}": (
            missing
        ),
    }
    return tuple(text for text, true in said.items() if true)
