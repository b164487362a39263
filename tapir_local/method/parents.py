"""Choose the parent of each new instruction: the row used least so far, within a limit per parent."""

import heapq
from collections import Counter
from collections.abc import Sequence


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
