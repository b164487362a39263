"""The settings of a curriculum: which rows a round trains on, and which the teacher writes."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tapir_local.recipe.types import Settings, Share, expand_switch

POOL_CURRICULA = frozenset({"tapir", "lion"})  # curricula that choose from the pool; the others choose from the seeds


class Curriculum(Settings):
    """The choice of the rows that a round trains on."""

    name: Literal["tapir", "uniform", "all", "lion", "reflection", "growth"] = Field(
        "tapir",
        description="method: `tapir`; `uniform`: random seeds; `all`: all seeds in each round; `lion`: "
        "new instructions modeled on hard rows, and rarer ones from the domains of easy rows; `reflection`: seeds that "
        "the teacher rewrites and the student selects; `growth`: seeds; the larger a task's gap on the holdout, the "
        "more of its rows",
    )
    difficulty: bool = Field(
        True, description="tapir: choose hard rows; if false, rows are chosen at random and nothing is judged"
    )
    balance: bool = Field(
        True, description="tapir: balance tasks by their shares; if false, tasks occur as often as among the hard rows"
    )
    refine: Annotated[Literal["hard", "all", "off"], BeforeValidator(expand_switch)] = Field(
        "hard",
        description="tapir: answers that the teacher rewrites in the task's style: `hard`: those of hard and new rows; "
        "`all`: also those of replayed rows; `off`: none",
    )
    rows: int = Field(1000, ge=1, description="training rows per round")
    first_rows: int | None = Field(
        None, ge=1, description="training rows of round 0, drawn from the seeds; null takes all seeds"
    )
    pool: int | None = Field(None, ge=1, description="rows judged per round, drawn at random; null judges all")
    alpha: Share = Field(0.3, description="challenge: share of hard rows in round 1")
    alpha_step: Share = Field(0.2, description="increase of the challenge per round, up to 1")
    mfd_threshold: float = Field(
        2.0,
        ge=0,
        le=9,
        description="a row is hard if the teacher's score exceeds the student's by more than this (delta in the paper)",
    )
    mfd_ceiling: float | None = Field(
        None,
        ge=0,
        le=9,
        description="a hard row whose MFD is above this in its last two judgements is set aside for the round, because "
        "it is beyond the student for now; null: no row is",
    )
    mastery: Share | None = Field(
        None,
        description="tapir: a task is mastered if the student's mean score is at least this share of the teacher's; "
        "hard and new rows go only to the weaker half of the tasks that are not mastered; null: to all tasks",
    )
    learnable: bool = Field(
        False,
        description="tapir: multiply a task's share of the hard rows by (fallen + 1) / (trained + 2): its hard rows of "
        "the last round that are judged again (trained), and those whose MFD is lower now (fallen)",
    )
    teacher_floor: float = Field(
        6.0, ge=1, le=10, description="minimum score of the teacher; a row below it is neither hard nor replayed"
    )
    expand_share: Share = Field(
        0.5, description="share of the hard rows that are new rows written by the teacher; the rest come from the pool"
    )
    drafts: int = Field(3, ge=1, description="maximum number of drafts per missing expansion")
    children: int = Field(
        3,
        ge=1,
        description="maximum number of new rows per parent and round; beyond it, less hard rows of the task become "
        "parents, and rows that these cannot supply are missing",
    )
    max_opening: Share | None = Field(
        0.2,
        description="maximum share of a task's new rows in a round that begin with the same four words (three rows are "
        "always allowed); null: no limit",
    )
    check_drafts: bool = Field(
        False,
        description="ask the teacher whether each new instruction is complete, answerable and of its task; costs one "
        "more call per instruction",
    )
    check_answers: bool = Field(
        False,
        description="let the judge score the answers written in a round and drop those below teacher_floor; costs one "
        "more call per answer",
    )
    max_rouge: Share = Field(0.7, description="ROUGE-L above which a draft is dropped as a near-duplicate")


def judges_pool(settings: Curriculum) -> bool:
    """Whether the curriculum needs the student's answers to the pool and a judge."""
    return settings.name == "lion" or (settings.name == "tapir" and settings.difficulty)
