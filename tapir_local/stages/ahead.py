"""Ask the judge about the student's first answers while it writes the others; the judge's stage finds them stored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Protocol

from tapir_local.recipe.schema import Recipe
from tapir_local.records import Answer, Completion, Example, Progress, Request
from tapir_local.stages.context import AheadQueue, Work
from tapir_local.stages.judge import first_judge_requests, judge_endpoint
from tapir_local.store.store import Mode

if TYPE_CHECKING:
    from tapir_local.teacher.ahead import AheadAsker, AheadResults
    from tapir_local.teacher.session import EarlierTries


def asks_ahead(recipe: Recipe, mode: Mode = "on") -> bool:
    """Whether the judge is asked while the student answers.

    It must be an endpoint that answers live, and the store must be read and written, so that nothing is paid for twice.
    With `judge.ahead: auto`, an endpoint on this machine is left out.
    """
    from tapir_local.teacher.endpoint import is_loopback

    judge = judge_endpoint(recipe)
    if mode != "on" or getattr(judge, "kind", "") != "openai" or judge.batch:
        return False
    if recipe.judge.ahead == "auto":
        return judge.base_url is None or not is_loopback(judge.base_url)
    return recipe.judge.ahead


@dataclass
class WrittenAnswers:
    """The student's answers to `rows` that are in their file, and the `queue` that takes the requests about them.

    The requests are the first ones of the stage `stage`. Without a queue nothing is asked.
    """

    work: Work
    stage: str
    rows: Mapping[str, Example]
    queue: AheadQueue | None = None

    def judge(self, answers: Sequence[Completion]) -> None:
        """Ask the judge about answers, in their order."""
        if self.queue:
            texts = {answer.id: answer.text for answer in answers if answer.asked}
            self.queue.add(first_judge_requests(self.work, self.stage, [self.rows[id] for id in texts], texts))

    def summary(self) -> str:
        """`; 12 replies of the judge meanwhile`, or ""."""
        replies = self.queue.paid if self.queue else 0
        return f"; {replies:,} {'reply' if replies == 1 else 'replies'} of the judge meanwhile" if replies else ""


@contextmanager
def judging_ahead(work: Work, stage: str, rows: Sequence[Example], file: IO[str]) -> Iterator[WrittenAnswers]:
    """Ask the judge about the answers that are written to `file`, if the recipe allows it, until the block ends.

    The file is on the disk before they are asked about: an answer that is lost may be another one the next time, and
    its judgement would be paid for in vain.
    """
    written = WrittenAnswers(work, stage, {row.id: row for row in rows})
    if work.backends.judge_ahead is None or not stage:
        yield written
        return
    with work.backends.judge_ahead(before_asking=lambda: os.fsync(file.fileno())) as queue:
        written.queue = queue
        yield written
        work.progress(len(rows), len(rows), "waiting for the judge's replies in flight")


class LiveAsk(Protocol):
    """Answers to requests, in their order; `earlier` are attempts that count as those of this call."""

    def __call__(
        self, requests: Sequence[Request], progress: Progress, earlier: EarlierTries | None = None
    ) -> list[Answer]: ...


class JudgeAhead:
    """A judge that is asked ahead of its stage, and what the stage must know of that.

    `asker` makes an asker of what it calls before each group of requests; `ask` is how the judge's stage asks.
    """

    def __init__(self, asker: Callable[[Callable[[], None]], AheadAsker], ask: LiveAsk) -> None:
        self.asker, self.ask_live = asker, ask
        self.results: AheadResults | None = None

    def open(self, before_asking: Callable[[], None]) -> AbstractContextManager[AheadAsker]:
        """Ask ahead while the block runs."""
        from tapir_local.teacher.ahead import asking_ahead

        return asking_ahead(self.asker(before_asking), self.keep)

    def keep(self, found: AheadResults) -> None:
        """Keep what came ahead for the judge's stage."""
        self.results = found

    def ask(self, requests: Sequence[Request], progress: Progress) -> list[Answer]:
        """Ask the judge; replies that were paid for ahead count as paid for now, and refusals are not asked again."""
        ahead, self.results = self.results, None
        if ahead is None:
            return self.ask_live(requests, progress)
        if ahead.error:
            raise ahead.error
        left = [request for request in requests if request not in ahead.unstored]
        replies = iter(self.ask_live(left, progress, ahead.earlier) if left else [])
        found = [ahead.unstored.get(request) or next(replies) for request in requests]
        return [mark_paid(answer, ahead.paid) for answer in found]


def mark_paid(answer: Answer, paid: set[str]) -> Answer:
    """The answer; if it was paid for ahead it is not a hit, the first time."""
    if answer.hit and answer.key not in paid:
        return answer
    paid.discard(answer.key)
    return replace(answer, hit=False, ahead=answer.hit)
