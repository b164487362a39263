"""What the teacher writes for a round: new instructions, and answers in the style that each task needs."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tapir_local.data.dataset import Draft, Index, screen
from tapir_local.errors import TapirError
from tapir_local.files import read_record, read_rows, write_rows
from tapir_local.method import parsing, prompts
from tapir_local.method.curriculum import (
    BELOW_THRESHOLD,
    NOT_JUDGED,
    NOT_TAKEN,
    POOR_TEACHER,
    count_new_rows,
    count_not_hard,
)
from tapir_local.method.parents import ParentQueue
from tapir_local.method.screening import max_shared_openings, opening_words, prompt_sentences, screen_instruction
from tapir_local.pipeline.context import Work, answered
from tapir_local.pipeline.judge import score_answers
from tapir_local.pipeline.reflection import reflect_on_answers, reflect_on_instructions
from tapir_local.pipeline.rows import all_known, child_of, holdout_index, pool, seeds, with_room
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Answer, Example, Expansion, ExpansionManner, Judgement, RoundPlan, instruction_of
from tapir_local.unusable import MAX_REASONS_NAMED, MAX_TEXT_KEPT, Unusable, format_left_out

# A seed is expanded again in a later round: its draws must not repeat those of the rounds before.
DRAWS_PER_ROUND = 1000
FIRST = 50  # drafts of a round after which it is first asked whether more are worth their price
FEW, HOPELESS = 10, 0.8  # drafts, and the share of them rejected from which no more are asked for
FEW_STEPS = 10  # steps of training below which a round is said to have few
SAME_OPENING = "begins as too many others do"
# What to do where no row can be trained on, by the commonest reason.
ADVICE: Mapping[str, str] = {
    NOT_JUDGED: "Look at the judge's replies (`tapir-local calls list --stage judge`) and name a judge that keeps to "
    "JSON.",
    POOR_TEACHER: "The judge finds the teacher's answers poor: look at some of them; name another teacher or judge, or "
    "set curriculum.teacher_floor lower.",
    BELOW_THRESHOLD: "The student answers nearly as well as the teacher: a lower curriculum.mfd_threshold finds more "
    "hard rows.",
    NOT_TAKEN: "See what became of the drafts in expanded.jsonl of the round's folder.",
}


@dataclass
class Group:
    """One expansion of the plan at work: its parents, and how many new rows are still missing."""

    expansion: Expansion
    parents: ParentQueue
    missing: int


def expand(work: Work, out: Path) -> str:
    """New instructions grown from rows of the pool, and the drafts that were rejected."""
    planned = read_record(RoundPlan, work.folder / "plan.json")
    if planned.reflected:
        return reflect_on_instructions(work, planned, out)
    settings, rows = work.recipe.curriculum, {row.id: row for row in pool(work)}
    groups = [Group(e, ParentQueue(e.parents, e.others, settings.children), e.rows) for e in planned.expansions]
    screen, drafts, stopped = Screen(work, planned), list[Draft](), ""
    for _ in range(settings.drafts):
        wanted = [(group, rows[id]) for group in groups for id in group.parents.take(group.missing)]
        for part in (wanted[:FIRST], wanted[FIRST:]) if not drafts else (wanted,):
            found = draft_rows(work, part, drafts, screen)
            drafts += found
            if stopped := hopeless(found):
                break
        if stopped:
            break
    write_rows(out, drafts)
    return told(drafts, sum(group.missing for group in groups), stopped, screen.unchecked)


def draft_rows(
    work: Work, wanted: Sequence[tuple[Group, Example]], before: Sequence[Draft], screen: "Screen"
) -> list[Draft]:
    """One draft of each parent, screened; what is kept is counted where it was missing."""
    asked = [(row, group.expansion.manner) for group, row in wanted]
    found = ask_drafts(work, asked, before)
    found = [screen.look_at(draft, row) for draft, (_, row) in zip(found, wanted, strict=True)]
    if work.recipe.curriculum.check_drafts:
        found = screen.check(work, found)
    for draft, (group, row) in zip(found, wanted, strict=True):
        if not draft.reason:
            group.missing -= 1
            group.parents.keep(row.id)
    return found


class Screen:
    """What a round's drafts are held against: known rows, the holdout, words of ours, and what was kept before."""

    def __init__(self, work: Work, planned: RoundPlan) -> None:
        self.near, self.held = indices(work) if planned.expansions else (Index(1.0), Index(1.0))
        self.ours = prompt_sentences(work.recipe.task_table())
        share = work.recipe.curriculum.max_opening
        self.most = {
            task: max_shared_openings(share, rows) for task, rows in count_new_rows(planned.expansions).items()
        }
        self.openings: Counter[tuple[str, str]] = Counter()
        self.unchecked = 0

    def look_at(self, draft: Draft, parent: Example) -> Draft:
        """The draft with the reason why it is rejected; one without is kept from now on."""
        if draft.reason:
            return draft
        text, task = draft.example.prompt[-1].content, draft.example.task
        reason = screen_instruction(text, parent.prompt[-1].content, self.ours)
        if not reason and self.openings[task, opening_words(text)] >= self.most[task]:
            reason = f"{SAME_OPENING}: {opening_words(text)!r}"
        found = replace(draft, reason=reason) if reason else screen([draft.example], self.near, self.held)[0]
        self.openings[task, opening_words(text)] += not found.reason
        return found

    def check(self, work: Work, drafts: Sequence[Draft]) -> list[Draft]:
        """The drafts as the teacher finds them; where its reply cannot be read a draft is kept, and counted."""
        tasks, left = work.recipe.task_table(), [draft for draft in drafts if not draft.reason]
        asked = [prompts.check_draft_prompt(draft.example.prompt, tasks[draft.example.task]) for draft in left]
        requests = [
            work.request("expand", f"{draft.example.id}#check", messages, temperature=0.0)
            for draft, messages in zip(left, asked, strict=True)
        ]
        replies = iter(work.ask(work.tools.teacher, requests))
        return [draft if draft.reason else self.checked(draft, next(replies)) for draft in drafts]

    def checked(self, draft: Draft, reply: Answer) -> Draft:
        """A draft with what the teacher finds wrong with it."""
        fault = parsing.parse_draft_check(reply.text) if reply.complete else None
        self.unchecked += fault is None
        return replace(draft, reason=f"the teacher finds it {fault}") if fault else draft


def indices(work: Work) -> tuple[Index, Index]:
    """What a draft may not resemble: all rows that are known, and the holdout."""
    near, rows = Index(work.recipe.curriculum.max_rouge), all_known(work)
    near.learn(rows)
    for row in rows:
        near.add(row)
    return near, holdout_index(work)


def hopeless(found: Sequence[Draft]) -> str:
    """Why no more drafts are asked for after these, "" where they were worth it."""
    rejected = [draft for draft in found if draft.reason]
    if len(found) < FEW or len(rejected) < HOPELESS * len(found):
        return ""
    return f"no more asked for, because {len(rejected):,} of {len(found):,} drafts were rejected"


def told(drafts: Sequence[Draft], short: int, stopped: str = "", unchecked: int = 0) -> str:
    """What became of the drafts, in a phrase, with the commonest reasons why they were rejected."""
    rejected = Counter(draft.reason.partition(":")[0] for draft in drafts if draft.reason)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common(MAX_REASONS_NAMED))
    said = f"{len(drafts) - rejected.total():,} new instructions, {rejected.total():,} drafts rejected"
    said += f" ({reasons})" if reasons else ""
    said += f", {short:,} short" if short else ""
    said += f", {unchecked:,} unchecked: the teacher's reply could not be read" if unchecked else ""
    return said + (f"; {stopped}" if stopped else "")


def ask_drafts(work: Work, parents: Sequence[tuple[Example, ExpansionManner]], before: Sequence[Draft]) -> list[Draft]:
    """One draft for each parent; the n-th draft asked of the same parent in a round has the n-th draw."""
    tasks = work.recipe.task_table()
    asked = Counter(draft.example.parent for draft in before)
    requests = []
    for parent, manner in parents:
        draw = DRAWS_PER_ROUND * work.number + asked[parent.id]
        asked[parent.id] += 1
        messages = prompts.expand_prompt(parent.prompt, tasks[parent.task], manner)
        requests.append(work.request("expand", parent.id, messages, draw=draw))
    answers = work.ask(work.tools.teacher, requests)
    drafts = [
        read_draft(work.number, len(before) + n, parent, reply)
        for n, ((parent, _), reply) in enumerate(zip(parents, answers, strict=True))
    ]
    return with_room(work, drafts)


def read_draft(number: int, serial: int, parent: Example, reply: Answer) -> Draft:
    """The new instruction in a reply, or why there is none."""
    text = parsing.parse_instruction(reply.text) if reply.complete else None
    reason = (
        ""
        if text
        else ("no new instruction in the reply" if reply.complete else f"the reply is not whole ({reply.finish})")
    )
    return Draft(child_of(parent, number, serial, text or ""), reason)


def refine(work: Work, out: Path) -> str:
    """This round's rows with the answers that they are to be trained on, in random order."""
    planned = read_record(RoundPlan, work.folder / "plan.json")
    if planned.reflected:
        rows, said = reflect_on_answers(work, planned)
    elif planned.drawn:
        chosen = {row.id: row for row in seeds(work)}
        rows, said = [chosen[id] for id in planned.drawn], "the seeds' own answers"
    else:
        rows, said = hard_and_easy(work, planned)
    if not rows:
        raise nothing_to_train_on(work, planned)
    work.chance("refine").shuffle(rows)
    write_rows(out, rows)
    return "; ".join([f"{len(rows):,} rows, {said}", *few_rows(work.recipe, len(rows))])


def nothing_to_train_on(work: Work, planned: RoundPlan) -> TapirError:
    """The error of a round without a row: why none was taken, with what would change that."""
    judgements = read_rows(Judgement, work.folder / "judgements.jsonl")
    reasons = Counter[str]() if planned.to_write else count_not_hard(judgements, work.recipe.curriculum)
    counted = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    commonest = reasons.most_common(1)[0][0] if reasons else NOT_TAKEN
    why = (
        f"of {len(judgements):,} judged rows {counted}"
        if counted
        else f"{planned.to_write:,} new ones were to be written, and none was kept"
    )
    return TapirError(
        f"no row to train on: {why}",
        where=str(work.folder / "plan.json"),
        fix=f"{ADVICE[commonest]} `tapir-local why {work.run.name} ROW` tells of one row.",
    )


def few_rows(recipe: Recipe, rows: int) -> list[str]:
    """Warnings of a round that has far fewer rows than were asked, or makes few steps of training."""
    asked, few = recipe.curriculum.rows, []
    if recipe.curriculum.name != "all" and rows < asked / 2:
        few = [f"WARNING: {rows:,} of the {asked:,} rows asked (curriculum.rows), less than half"]
    return [*few, *few_steps(recipe, rows)]


def few_steps(recipe: Recipe, rows: int) -> list[str]:
    """A warning of a round whose rows make few steps of training; packed, their lengths decide that."""
    train = recipe.train
    steps = math.ceil(train.epochs * math.ceil(rows / train.batch_size))
    if steps >= FEW_STEPS or train.packing:
        return []
    return [
        f"{rows:,} rows make {steps:,} steps of train.batch_size ({train.batch_size}), too few to learn much: "
        "set it lower, or train.epochs higher"
    ]


def hard_and_easy(work: Work, planned: RoundPlan) -> tuple[list[Example], str]:
    """Hard and new rows with their answers, easy ones as they are or styled too; and what to say of them."""
    rows = {row.id: row for row in pool(work)}
    old, easy = [rows[id] for id in planned.hard], [rows[id] for id in planned.replay]
    new = [draft.example for draft in read_rows(Draft, work.folder / "expanded.jsonl") if not draft.reason]
    asked = len(new) if planned.styled == "none" else len(old) + len(new)
    found, unusable = (
        ask_plain(work, new) if planned.styled == "none" else ask_styled(work, before_styling(work, old) + new)
    )
    hard = old + found if planned.styled == "none" else found
    if planned.styled == "all":
        easy, unstyled = style_plain(work, easy)
        asked, unusable = asked + len(planned.replay), unusable + unstyled
    poor = poor_answers(work, [row for row in hard + easy if rows.get(row.id) != row])
    work.leave_out(unusable, asked, poor)
    hard, easy = (without(group, poor) for group in (hard, easy))
    share = len(hard) / max(1, len(hard) + len(easy))
    return hard + easy, f"{share:.0%} hard (asked {planned.alpha:.0%})" + format_left_out([*unusable, *poor])


def poor_answers(work: Work, rows: Sequence[Example]) -> list[Unusable]:
    """The rows whose new answers the judge scores below the floor, where the recipe asks for it.

    A row is not among them where no score could be read.
    """
    if not work.recipe.curriculum.check_answers:
        return []
    scores, floor = score_answers(work, "refine", rows), work.recipe.curriculum.teacher_floor
    kind = "new answer below curriculum.teacher_floor"
    return [
        Unusable(
            work.step, row.id, kind, f"{scores[row.id]:g} of {floor:g}", instruction_of(row.prompt)[:MAX_TEXT_KEPT]
        )
        for row in rows
        if scores.get(row.id, floor) < floor
    ]


def without(rows: Sequence[Example], left: Sequence[Unusable]) -> list[Example]:
    """The rows that are not left out."""
    ids = {row.id for row in left}
    return [row for row in rows if row.id not in ids]


def style_plain(work: Work, rows: Sequence[Example]) -> tuple[list[Example], list[Unusable]]:
    """Rows with a styled answer, what an earlier round has styled being left as it is; and those without one."""
    plain = {(row.id, row.completion) for row in seeds(work)}
    wanting = [row for row in rows if (row.id, row.completion) in plain]
    found, unusable = ask_styled(work, wanting)
    return found + [row for row in rows if (row.id, row.completion) not in plain], unusable


def before_styling(work: Work, rows: Sequence[Example]) -> list[Example]:
    """Rows as they were before any round styled them: seeds with the plain answer, rows that a round wrote with none.

    A row that is hard again is then the same request as before, and its styled answer is in the store.
    """
    plain = {row.id: row.completion for row in seeds(work)}
    return [replace(row, completion=plain.get(row.id, "")) for row in rows]


def ask_styled(work: Work, rows: Sequence[Example]) -> tuple[list[Example], list[Unusable]]:
    """Rows with the teacher's answer in their task's style, and those without a whole one."""
    tasks = work.recipe.task_table()
    return answered(
        work, "refine", rows, [prompts.refine_prompt(row.prompt, tasks[row.task], row.completion) for row in rows]
    )


def ask_plain(work: Work, rows: Sequence[Example]) -> tuple[list[Example], list[Unusable]]:
    """Rows with the teacher's plain answer, and those without a whole one."""
    return answered(work, "refine", rows, [prompts.answer_prompt(row.prompt) for row in rows])
