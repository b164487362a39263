"""Which row of the pool the next new instruction grows from: the one least asked, and none too often."""

import heapq
from collections import Counter
from collections.abc import Sequence


class ParentQueue:
    """The parents of one expansion in a round, and what has become of them.

    Each of `first` gives up to `children` drafts in turn, then each of `others`, then they begin again. A parent with
    `children` new rows is asked no more.
    """

    def __init__(self, first: Sequence[str], others: Sequence[str], children: int) -> None:
        self.ids = list(dict.fromkeys([*first, *others]))
        self.first, self.children = len(dict.fromkeys(first)), children
        self.asked: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()

    def turn(self, place: int) -> tuple[int, bool, int, int]:
        """When a parent is asked next: the lower, the sooner."""
        asked = self.asked[self.ids[place]]
        return asked // self.children, place >= self.first, asked, place

    def take(self, count: int) -> list[str]:
        """The parents of the next `count` drafts; fewer where no more can be kept."""
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
        """A draft of a parent was kept."""
        self.kept[id] += 1
