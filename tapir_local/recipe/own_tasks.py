"""The tasks that a recipe defines: their settings, validation, and the resulting task table."""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tapir_local.recipe.tasks import TASKS, CheckerName, Task, normalize_label
from tapir_local.recipe.types import Settings


class OwnTask(Settings):
    """A task in a recipe; settings left out come from the known task of that label."""

    share: float = Field(
        ge=0, allow_inf_nan=False, description="share in a balanced training set; shares are normalized to a sum of 1"
    )
    description: str | None = Field(
        None, description="what the task is, for labeling; required for a label that is not one of the paper's"
    )
    style: str | None = Field(
        None, description='completes "Write the answer ..."; required for a label that is not one of the paper\'s'
    )
    checker: CheckerName | None = Field(None, description="checker of its answers, for `checker: tasks`")


def expand_share_shorthand(value: Any) -> Any:
    """Read `Math: 0.5` as `Math: {share: 0.5}`."""
    return value if isinstance(value, dict | OwnTask) else {"share": value}


Tasks = Mapping[str, Annotated[OwnTask, BeforeValidator(expand_share_shorthand)]]
# Quotes, brackets and stars at its ends would be stripped from a reply; a dot separates the parts of a setting's path.
LABEL_PATTERN = re.compile(r"""(?![\s`*_"'(\[])[^\n:<>.]+(?<![\s`*_"')\]])""")


def build_task_table(tasks: Tasks) -> dict[str, Task]:
    """A recipe's tasks by label, with shares normalized to a sum of 1."""
    total = math.fsum(own.share for own in tasks.values())
    return {label: build_task(label, own, own.share / total) for label, own in tasks.items()}


def unnormalized_sum(tasks: Tasks | None) -> float | None:
    """The sum of a recipe's own shares if it is not 1, within 0.001; else None."""
    total = math.fsum(own.share for own in (tasks or {}).values())
    return total if tasks and abs(total - 1) > 0.001 else None


def build_task(label: str, own: OwnTask, share: float) -> Task:
    """A recipe's task; missing parts come from the known task of that label."""
    known = TASKS.get(label)
    return Task(
        label,
        share,
        " ".join((own.description or (known.description if known else "")).split()),
        " ".join((own.style or (known.style if known else "")).split()),
        own.checker or (known.checker if known else None),
    )


def validate_tasks(tasks: Tasks) -> None:
    """Raise ValueError if labels are invalid or ambiguous, descriptions are missing, or all shares are 0."""
    if not tasks:
        raise ValueError("tasks: empty; remove the key for the paper's 32 tasks, or define at least one")
    for label, own in tasks.items():
        if not LABEL_PATTERN.fullmatch(label):
            raise ValueError(
                f"tasks: {label!r} is not a valid label: a label is one line without `:`, `.`, `<` or `>`, and does "
                "not begin or end with a space, quote, bracket, star or underscore"
            )
        if label not in TASKS and not ((own.description or "").strip() and (own.style or "").strip()):
            near = difflib.get_close_matches(label, TASKS, 1, cutoff=0.75)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"tasks: unknown task {label!r}{meant}; a task of your own needs a share, a description and a style. "
                f"Known tasks: {', '.join(TASKS)}"
            )
    if len({normalize_label(label) for label in tasks}) < len(tasks):
        raise ValueError("tasks: two labels differ only in capitals, spaces, dashes or underscores")
    if not any(own.share for own in tasks.values()):
        raise ValueError("tasks: every share is 0; give at least one task a share above 0")
