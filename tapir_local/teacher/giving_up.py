"""When a row is left out because of what its endpoint said, and when all of them are given up."""

from __future__ import annotations

from collections.abc import Callable

from tapir_local.store.reply import Reply
from tapir_local.teacher.refusals import Trouble

FEW = 5  # rows refused before any is answered, or failing one after another: then it is no fault of theirs
USELESS = 20  # replies in a row, all of them paid for, without a whole answer: the next will hardly be another
SHARE = 0.05  # of a stage's whole answers that may fail so: a few odd rows asked again together are no reason to stop
ENOUGH_TRIES = 3  # of a request at which a server fails: fewer may be chance


class Outcomes:
    """What came of a call's requests so far, by which a row's trouble is its own or everybody's.

    `before` tells how many whole answers the stage had before this call, `served` whether the endpoint ever answered
    anything; both look into the store, and are asked only where it matters.
    """

    def __init__(self, before: Callable[[], int], served: Callable[[], bool]) -> None:
        self.before, self.served = before, served
        self.answered = self.whole = self.live = 0
        self.useless = 0  # replies in a row
        self.refused = self.failing = 0  # rows, the latter in a row
        self.unsure: Trouble | None = None  # the first that does not say what is wrong with its row

    def hit(self, reply: Reply) -> None:
        """The store had an answer."""
        self.answered += 1
        self.whole += reply.complete

    def came(self, reply: Reply) -> None:
        """A completion came: the endpoint takes requests of this form."""
        self.answered += 1
        self.live += 1
        self.failing = 0
        self.whole += reply.complete
        self.useless = 0 if reply.complete else self.useless + 1

    def unread(self) -> None:
        """A reply came that may have been paid for, and is no completion."""
        self.useless += 1

    def is_rows_own(self, trouble: Trouble, tries: int) -> bool:
        """Whether what ended a request after so many tries is this row's own trouble, and not every row's."""
        if trouble.then == "stop":
            return trouble.last == "row" and self.live > 0
        if trouble.then != "row" and (trouble.last == "stop" or tries < (1 if trouble.tries else ENOUGH_TRIES)):
            return False
        self.refused += 1
        self.failing += trouble.then != "row"
        if not trouble.sure:
            self.unsure = self.unsure or trouble
        return self.refused < FEW or self.is_known(trouble)

    def is_known(self, trouble: Trouble) -> bool:
        """Whether others of its kind were answered, so that what is refused is this row."""
        if trouble.then != "row" and self.failing >= FEW:
            return False
        return self.answered > 0 or self.before() > 0 or (trouble.sure and self.served())

    def for_nothing(self) -> Trouble | None:
        """The trouble of a call in which nothing was answered, though no server named a row's fault."""
        return self.unsure if self.unsure and not self.answered and not self.before() else None

    def is_hopeless(self) -> bool:
        """Whether so many replies in a row were useless that nothing more should be paid for."""
        if self.useless < USELESS:
            return False
        return self.useless > SHARE * max(self.whole, self.before())
