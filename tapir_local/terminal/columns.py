"""Columns of a progress bar that stay empty where there is nothing to tell."""

from rich.progress import MofNCompleteColumn, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text


class RateColumn(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.{0 if speed >= 100 else 1}f}/s" if speed else "", style="cyan")


class CountColumn(MofNCompleteColumn):
    """`12/150`; nothing until the total is known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text("")


class TimeLeftColumn(TimeRemainingColumn):
    """The time left; nothing until the total is known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text("")
