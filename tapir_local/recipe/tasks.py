"""The paper's 32 tasks: label, target share, description, style of answers, and checker."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

CheckerName = Literal["arithmetic", "python", "form", "script", "length"]
CHECKER_NAMES: tuple[CheckerName, ...] = get_args(CheckerName)


@dataclass(frozen=True)
class Task:
    """A kind of instruction.

    `share` is its target share in a balanced training set; `style` completes the sentence "Write the answer ...";
    `checker` names the function in checkers.py that verifies some of its answers without an LLM.
    """

    label: str
    share: float
    description: str
    style: str
    checker: CheckerName | None = None


def normalize_label(label: str) -> str:
    """A label in the form used for comparison: `common sense` matches Common-Sense."""
    return " ".join(re.split(r"[\s_-]+", label.casefold().strip()))


PLAIN_STYLE = "in clear, direct prose that answers exactly what was asked, with the main point first"
STEPS_STYLE = (
    "as numbered or line-by-line worked steps, each doing one small thing, and end with a line that states the result"
)
FACTS_STYLE = (
    "with the fact asked for first, then the reason or context that makes it understandable, and no speculation"
)

# Labels and shares are from task_resampling in modelscope/easydistill, which attributes them to the TAPIR paper. The
# descriptions and styles are ours: the paper only says that answers are rewritten in a task-dependent style.
TASKS: Mapping[str, Task] = {
    task.label: task
    for task in (
        Task(
            "Math",
            0.167,
            "arithmetic, algebra, geometry, statistics and word problems with numbers",
            STEPS_STYLE,
            "arithmetic",
        ),
        Task("Reasoning", 0.167, "logic, deduction, ordering, comparing, puzzles and patterns", STEPS_STYLE),
        Task(
            "Code Generation",
            0.083,
            "writing a program, function, query or script",
            "as commented code in one block, the comments saying why, followed only by what is needed to run it",
            "python",
        ),
        Task(
            "Code Debug",
            0.083,
            "finding or mending a fault in given code",
            "by naming the fault first, then giving the whole corrected code in one block with a comment at the change",
            "python",
        ),
        Task(
            "Writing",
            0.017,
            "stories, essays, letters, e-mails, advertisements and other prose",
            "with a voice and structure fit for the kind of text",
            "length",
        ),
        Task(
            "Computer Science",
            0.017,
            "algorithms, data structures, networks and systems, without writing code",
            FACTS_STYLE,
        ),
        Task(
            "Complex Format",
            0.017,
            "answers that must have a given form: JSON, a table, a list, a template",
            "in exactly the form asked for and nothing outside it",
            "form",
        ),
        Task("Common-Sense", 0.017, "everyday knowledge about things, people and the world", FACTS_STYLE),
        Task(
            "Counterfactual",
            0.017,
            "what would follow if something untrue were true",
            "by stating the supposition first, then following it strictly to its result",
        ),
        Task(
            "Multilingual",
            0.017,
            "translating, or answering in a language other than English",
            "in the language asked for, faithful and idiomatic",
            "script",
        ),
        Task(
            "Roleplay",
            0.017,
            "speaking as a given character or profession",
            "in the character's own voice from the first word to the last",
        ),
        Task("Biology", 0.017, "living things, cells, genetics and evolution", FACTS_STYLE),
        Task("Technology", 0.017, "devices, engineering, the internet and how things are made", FACTS_STYLE),
        Task(
            "Ethics",
            0.017,
            "right and wrong, fairness and dilemmas",
            "by weighing the sides fairly before drawing a careful conclusion",
        ),
        Task("Sport", 0.017, "games, athletes, rules and training", FACTS_STYLE),
        Task("Law", 0.017, "legal rules, rights and procedures", FACTS_STYLE),
        Task("Medicine", 0.017, "diseases, drugs and treatment", FACTS_STYLE),
        Task("Literature", 0.017, "books, poems, authors and their interpretation", PLAIN_STYLE),
        Task("Entertainment", 0.017, "films, television, celebrities and games for fun", PLAIN_STYLE),
        Task("Art", 0.017, "painting, sculpture, design and architecture", PLAIN_STYLE),
        Task("Music", 0.017, "songs, composers, instruments and theory of music", PLAIN_STYLE),
        Task(
            "Toxicity",
            0.017,
            "requests that are harmful, hateful or unsafe",
            "by declining what would do harm, kindly and briefly, and offering what help is safe",
        ),
        Task("Economy", 0.017, "money, markets, business and finance", FACTS_STYLE),
        Task("Physics", 0.017, "forces, energy, matter, light and space", FACTS_STYLE),
        Task("History", 0.017, "past events, people and dates", FACTS_STYLE),
        Task("Chemistry", 0.017, "elements, compounds and reactions", FACTS_STYLE),
        Task("Philosophy", 0.017, "ideas, arguments and thinkers", PLAIN_STYLE),
        Task("Health", 0.017, "well-being, food, exercise and habits", FACTS_STYLE),
        Task("Ecology", 0.017, "environment, climate, species and conservation", FACTS_STYLE),
        Task(
            "Grammar",
            0.017,
            "spelling, punctuation, word forms and sentence structure",
            "with the corrected text first, then the rule that was applied",
        ),
        Task(
            "Paraphrase",
            0.017,
            "saying, shortening or rearranging a given text in other words",
            "as the new text alone, with the meaning kept",
            "length",
        ),
        Task("Others", 0.041, "anything that fits no other task", PLAIN_STYLE),
    )
}
