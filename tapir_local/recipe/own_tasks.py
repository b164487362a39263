"""The tasks that a recipe defines: their shares, words and checkers, read, refused, and made a table of."""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tapir_local.recipe.tasks import TASKS, CheckerName, Task, normalize_label
from tapir_local.recipe.types import Settings


class OwnTask(Settings):
    """A task as a recipe has it; what it leaves out is the known task's of that label."""

    share: float = Field(
        ge=0, allow_inf_nan=False, description="of a balanced training set; shares are taken as parts of their sum"
    )
    description: str | None = Field(
        None, description="what the task is, for those who label; a label that is not known needs one"
    )
    style: str | None = Field(
        None, description='what follows "Write the answer ..."; a label that is not known needs one'
    )
    checker: CheckerName | None = Field(None, description="a check of some of its answers, for `checker: tasks`")


def expand_share_shorthand(value: Any) -> Any:
    """`Math: 0.5` means `Math: {share: 0.5}`."""
    return value if isinstance(value, dict | OwnTask) else {"share": value}


Tasks = Mapping[str, Annotated[OwnTask, BeforeValidator(expand_share_shorthand)]]
# Quotes, brackets and stars at its ends would be taken for a reply's wrapping; a dot parts the path of a setting.
LABEL_PATTERN = re.compile(r"""(?![\s`*_"'(\[])[^\n:<>.]+(?<![\s`*_"')\]])""")


def build_task_table(tasks: Tasks) -> dict[str, Task]:
    """A recipe's tasks by label, shares as parts of their sum."""
    total = math.fsum(own.share for own in tasks.values())
    return {label: build_task(label, own, own.share / total) for label, own in tasks.items()}


def unnormalized_sum(tasks: Tasks | None) -> float | None:
    """What a recipe's own shares sum to where that is not 1; within 0.001 it is a matter of rounding."""
    total = math.fsum(own.share for own in (tasks or {}).values())
    return total if tasks and abs(total - 1) > 0.001 else None


def build_task(label: str, own: OwnTask, share: float) -> Task:
    """A recipe's task; what it leaves out is the known task's."""
    known = TASKS.get(label)
    return Task(
        label,
        share,
        " ".join((own.description or (known.description if known else "")).split()),
        " ".join((own.style or (known.style if known else "")).split()),
        own.checker or (known.checker if known else None),
    )


def validate_tasks(tasks: Tasks) -> None:
    """ValueError where tasks cannot be told apart, described or balanced."""
    if not tasks:
        raise ValueError("tasks: there is none; leave the key out for the paper's 32, or name at least one")
    for label, own in tasks.items():
        if not LABEL_PATTERN.fullmatch(label):
            raise ValueError(
                f"tasks: {label!r} is no label: it is one line without `:`, `.`, `<` or `>`, and at its ends without a "
                "space, quote, bracket, star or underscore"
            )
        if label not in TASKS and not ((own.description or "").strip() and (own.style or "").strip()):
            near = difflib.get_close_matches(label, TASKS, 1, cutoff=0.75)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"tasks: no task {label!r} is known{meant}; one of your own needs a share, a description and a style. "
                f"Known are {', '.join(TASKS)}"
            )
    if len({normalize_label(label) for label in tasks}) < len(tasks):
        raise ValueError("tasks: two labels differ only in capitals, spaces, dashes or underscores")
    if not any(own.share for own in tasks.values()):
        raise ValueError("tasks: every share is 0; give at least one task a share above it")
