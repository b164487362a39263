"""Stages in which the teacher writes a round's data: new instructions, and answers in the style of each task."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tapir_local.data.dataset import Draft, screen_drafts
from tapir_local.data.dedup import DedupIndex
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
from tapir_local.printable import format_count
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Answer, Example, Expansion, ExpansionManner, Judgement, RoundPlan
from tapir_local.stages.context import Work
from tapir_local.stages.judge import score_answers
from tapir_local.stages.reflection import reflect_on_answers, reflect_on_instructions
from tapir_local.stages.run_rows import (
    answer_rows,
    holdout_index,
    make_child,
    read_answered_seeds,
    read_known_rows,
    read_pool,
    reject_unfit,
)
from tapir_local.unusable import MAX_REASONS_NAMED, Unusable, format_left_out

# A row can be expanded again in a later round; its draw numbers must differ from those of earlier rounds.
DRAWS_PER_ROUND = 1000
FIRST_DRAFTS = 50  # after these drafts of a round, check whether more are worth their price
MIN_DRAFTS_TO_STOP = 10  # with fewer drafts than this, always go on
STOP_SHARE = 0.8  # no more drafts are asked for if this share of them is rejected
MIN_TRAINING_STEPS = 10  # with fewer training steps, warn that the student learns little
SAME_OPENING = "begins as too many others do"  # a reason in expanded.jsonl; existing files have it
# What to do if no row can be trained on, by the most frequent reason.
EMPTY_ROUND_ADVICE: Mapping[str, str] = {
    NOT_JUDGED: "See the judge's replies (`tapir-local calls list --stage judge`) and use a judge that "
    "reliably replies in JSON.",
    POOR_TEACHER: "The judge gives the teacher's answers low scores: read some of them; use another teacher or judge, "
    "or lower curriculum.teacher_floor.",
    BELOW_THRESHOLD: "The student answers nearly as well as the teacher: lower curriculum.mfd_threshold to get more "
    "hard rows.",
    NOT_TAKEN: "The reasons are in expanded.jsonl in the round's folder.",
}


@dataclass
class OpenExpansion:
    """An expansion of the plan in progress: its parents, and how many new rows are still missing."""

    expansion: Expansion
    parents: ParentQueue
    missing: int


def expand_stage(work: Work, out: Path) -> str:
    """New instructions made from rows of the pool, together with the rejected drafts."""
    planned = read_record(RoundPlan, work.folder / "plan.json")
    if planned.reflected:
        return reflect_on_instructions(work, planned, out)
    settings, rows = work.recipe.curriculum, {row.id: row for row in read_pool(work)}
    expansions = [
        OpenExpansion(e, ParentQueue(e.parents, e.others, settings.children), e.rows) for e in planned.expansions
    ]
    drafts_screen, drafts, stopped = DraftScreen(work, planned), list[Draft](), ""
    for _ in range(settings.drafts):
        wanted = [(group, rows[id]) for group in expansions for id in group.parents.take(group.missing)]
        for part in (wanted[:FIRST_DRAFTS], wanted[FIRST_DRAFTS:]) if not drafts else (wanted,):
            found = write_drafts(work, part, drafts, drafts_screen)
            drafts += found
            if stopped := stop_reason(found):
                break
        if stopped:
            break
    write_rows(out, drafts)
    return summarize_drafts(drafts, sum(group.missing for group in expansions), stopped, drafts_screen.unchecked)


def write_drafts(
    work: Work,
    wanted: Sequence[tuple[OpenExpansion, Example]],
    before: Sequence[Draft],
    drafts_screen: "DraftScreen",
) -> list[Draft]:
    """One screened draft for each parent; kept drafts are counted in their expansions."""
    parents = [(row, group.expansion.manner) for group, row in wanted]
    found = ask_drafts(work, parents, before)
    found = [drafts_screen.screen_draft(draft, row) for draft, (_, row) in zip(found, wanted, strict=True)]
    if work.recipe.curriculum.check_drafts:
        found = drafts_screen.check(work, found)
    for draft, (group, row) in zip(found, wanted, strict=True):
        if not draft.reason:
            group.missing -= 1
            group.parents.keep(row.id)
    return found


class DraftScreen:
    """Rejects drafts that resemble known rows, the holdout, the prompt's own words, or drafts kept before."""

    def __init__(self, work: Work, planned: RoundPlan) -> None:
        self.known, self.holdout = dedup_indexes(work) if planned.expansions else (DedupIndex(1.0), DedupIndex(1.0))
        self.own_words = prompt_sentences(work.recipe.task_table())
        share = work.recipe.curriculum.max_opening
        self.most = {
            task: max_shared_openings(share, rows) for task, rows in count_new_rows(planned.expansions).items()
        }
        self.openings: Counter[tuple[str, str]] = Counter()
        self.unchecked = 0

    def screen_draft(self, draft: Draft, parent: Example) -> Draft:
        """The draft, with a reason if it is rejected; a kept draft is known from now on."""
        if draft.reason:
            return draft
        text, task = draft.example.prompt[-1].content, draft.example.task
        reason = screen_instruction(text, parent.prompt[-1].content, self.own_words)
        if not reason and self.openings[task, opening_words(text)] >= self.most[task]:
            reason = f"{SAME_OPENING}: {opening_words(text)!r}"
        found = replace(draft, reason=reason) if reason else screen_drafts([draft.example], self.known, self.holdout)[0]
        self.openings[task, opening_words(text)] += not found.reason
        return found

    def check(self, work: Work, drafts: Sequence[Draft]) -> list[Draft]:
        """The drafts after a check by the teacher; a draft with an unreadable check is kept and counted."""
        tasks, left = work.recipe.task_table(), [draft for draft in drafts if not draft.reason]
        asked = [prompts.check_draft_prompt(draft.example.prompt, tasks[draft.example.task]) for draft in left]
        requests = [
            work.request("expand", f"{draft.example.id}#check", messages, temperature=0.0)
            for draft, messages in zip(left, asked, strict=True)
        ]
        replies = iter(work.ask(work.backends.teacher, requests))
        return [draft if draft.reason else self.checked(draft, next(replies)) for draft in drafts]

    def checked(self, draft: Draft, reply: Answer) -> Draft:
        """A draft, rejected if the teacher's reply names a fault."""
        fault = parsing.parse_draft_check(reply.text) if reply.complete else None
        self.unchecked += fault is None
        return replace(draft, reason=f"the teacher finds it {fault}") if fault else draft


def dedup_indexes(work: Work) -> tuple[DedupIndex, DedupIndex]:
    """Dedup indexes of the rows that a draft must not resemble: (all known rows, the holdout)."""
    known, rows = DedupIndex(work.recipe.curriculum.max_rouge), read_known_rows(work)
    known.learn(rows)
    for row in rows:
        known.add(row)
    return known, holdout_index(work)


def stop_reason(found: Sequence[Draft]) -> str:
    """Why no more drafts are asked for after these; "" if enough of them were kept."""
    rejected = [draft for draft in found if draft.reason]
    if len(found) < MIN_DRAFTS_TO_STOP or len(rejected) < STOP_SHARE * len(found):
        return ""
    return f"no more asked for, because {len(rejected):,} of {format_count(len(found), 'draft')} were rejected"


def summarize_drafts(drafts: Sequence[Draft], missing: int, stopped: str = "", unchecked: int = 0) -> str:
    """How many drafts were kept and rejected, with the most frequent reasons."""
    rejected = Counter(draft.reason.partition(":")[0] for draft in drafts if draft.reason)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common(MAX_REASONS_NAMED))
    kept = format_count(len(drafts) - rejected.total(), "new instruction")
    said = f"{kept}, {format_count(rejected.total(), 'draft')} rejected"
    said += f" ({reasons})" if reasons else ""
    said += f", {missing:,} missing" if missing else ""
    said += f", {unchecked:,} unchecked: the teacher's reply could not be read" if unchecked else ""
    return said + (f"; {stopped}" if stopped else "")


def ask_drafts(work: Work, parents: Sequence[tuple[Example, ExpansionManner]], before: Sequence[Draft]) -> list[Draft]:
    """One draft for each parent; the n-th draft of the same parent in a round has the n-th draw number."""
    tasks = work.recipe.task_table()
    asked = Counter(draft.example.parent for draft in before)
    requests = []
    for parent, manner in parents:
        draw = DRAWS_PER_ROUND * work.number + asked[parent.id]
        asked[parent.id] += 1
        messages = prompts.expand_prompt(parent.prompt, tasks[parent.task], manner)
        requests.append(work.request("expand", parent.id, messages, draw=draw))
    answers = work.ask(work.backends.teacher, requests)
    drafts = [
        parse_draft(work.number, len(before) + n, parent, reply)
        for n, ((parent, _), reply) in enumerate(zip(parents, answers, strict=True))
    ]
    return reject_unfit(work, drafts)


def parse_draft(number: int, serial: int, parent: Example, reply: Answer) -> Draft:
    """The new instruction in a reply, or why there is none."""
    if not reply.complete:
        return Draft(make_child(parent, number, serial, ""), f"the reply is not whole ({reply.finish})")
    text = parsing.parse_instruction(reply.text)
    return Draft(make_child(parent, number, serial, text or ""), "" if text else "no new instruction in the reply")


def refine_stage(work: Work, out: Path) -> str:
    """This round's training rows with their answers, in random order."""
    planned = read_record(RoundPlan, work.folder / "plan.json")
    if planned.reflected:
        rows, said = reflect_on_answers(work, planned)
    elif planned.drawn:
        chosen = {row.id: row for row in read_answered_seeds(work)}
        rows, said = [chosen[id] for id in planned.drawn], "the seeds' own answers"
    else:
        rows, said = hard_and_easy_rows(work, planned)
    if not rows:
        raise empty_round_error(work, planned)
    work.rng("refine").shuffle(rows)
    write_rows(out, rows)
    return "; ".join([f"{format_count(len(rows), 'row')}, {said}", *warn_few_rows(work.recipe, len(rows))])


def empty_round_error(work: Work, planned: RoundPlan) -> TapirError:
    """The error of a round without a row to train on: why no row was taken, and what would change that."""
    judgements = read_rows(Judgement, work.folder / "judgements.jsonl")
    reasons = Counter[str]() if planned.to_write else count_not_hard(judgements, work.recipe.curriculum)
    counted = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    commonest = reasons.most_common(1)[0][0] if reasons else NOT_TAKEN
    why = (
        f"of {format_count(len(judgements), 'judged row')} {counted}"
        if counted
        else f"{format_count(planned.to_write, 'new row')} planned, none kept"
    )
    return TapirError(
        f"no row to train on: {why}",
        where=str(work.folder / "plan.json"),
        fix=f"{EMPTY_ROUND_ADVICE[commonest]} `tapir-local why {work.run.name} ROW` explains one row.",
    )


def warn_few_rows(recipe: Recipe, rows: int) -> list[str]:
    """Warnings for a round with far fewer rows than the recipe asks for, or with few training steps."""
    wanted, warnings = recipe.curriculum.rows, []
    if recipe.curriculum.name != "all" and rows < wanted / 2:
        warnings = [f"WARNING: {rows:,} of the {format_count(wanted, 'wanted row')} (curriculum.rows), less than half"]
    return [*warnings, *warn_few_steps(recipe, rows)]


def warn_few_steps(recipe: Recipe, rows: int) -> list[str]:
    """A warning for a round with few training steps; with packing, their number depends on the rows' lengths."""
    train = recipe.train
    steps = math.ceil(train.epochs * math.ceil(rows / train.batch_size))
    if steps >= MIN_TRAINING_STEPS or train.packing:
        return []
    return [
        f"only {format_count(steps, 'training step')} for {format_count(rows, 'row')} (train.batch_size is "
        f"{train.batch_size}), too few to learn much: lower it, or raise train.epochs"
    ]


def hard_and_easy_rows(work: Work, planned: RoundPlan) -> tuple[list[Example], str]:
    """(hard, new and easy rows with their answers, a phrase about them)."""
    rows = {row.id: row for row in read_pool(work)}
    old, easy = [rows[id] for id in planned.hard], [rows[id] for id in planned.replay]
    new = [draft.example for draft in read_rows(Draft, work.folder / "expanded.jsonl") if not draft.reason]
    if planned.styled == "none":
        asked = len(new)
        found, unusable = ask_plain(work, new)
        hard = old + found
    else:
        asked = len(old) + len(new)
        hard, unusable = ask_refined(work, before_refinement(work, old) + new)
    if planned.styled == "all":
        easy, unrefined = refine_unrefined(work, easy)
        asked, unusable = asked + len(planned.replay), unusable + unrefined
    poor = low_scored_answers(work, [row for row in hard + easy if rows.get(row.id) != row])
    work.leave_out(unusable, asked, poor)
    hard, easy = (drop_rows(group, poor) for group in (hard, easy))
    share = len(hard) / max(1, len(hard) + len(easy))
    return hard + easy, f"{share:.0%} hard (target {planned.alpha:.0%})" + format_left_out([*unusable, *poor])


def low_scored_answers(work: Work, rows: Sequence[Example]) -> list[Unusable]:
    """Records of rows whose new answer the judge scores below the floor; [] unless curriculum.check_answers is set.

    A row whose score could not be read is not among them.
    """
    if not work.recipe.curriculum.check_answers:
        return []
    scores, floor = score_answers(work, "refine", rows), work.recipe.curriculum.teacher_floor
    kind = "new answer below curriculum.teacher_floor"
    return [
        work.unusable(row, kind, f"{scores[row.id]:g} of {floor:g}")
        for row in rows
        if scores.get(row.id, floor) < floor
    ]


def drop_rows(rows: Sequence[Example], dropped: Sequence[Unusable]) -> list[Example]:
    """The rows that are not among `dropped`."""
    ids = {row.id for row in dropped}
    return [row for row in rows if row.id not in ids]


def refine_unrefined(work: Work, rows: Sequence[Example]) -> tuple[list[Example], list[Unusable]]:
    """(rows with a refined answer, records of rows without one); answers refined in an earlier round are kept."""
    plain = {(row.id, row.completion) for row in read_answered_seeds(work)}
    unrefined = [row for row in rows if (row.id, row.completion) in plain]
    found, unusable = ask_refined(work, unrefined)
    return found + [row for row in rows if (row.id, row.completion) not in plain], unusable


def before_refinement(work: Work, rows: Sequence[Example]) -> list[Example]:
    """Rows as they were before any refinement: seeds with the plain answer, rows written in a round with none.

    A row that is hard again then makes the same request as before, and its refined answer is in the store.
    """
    plain = {row.id: row.completion for row in read_answered_seeds(work)}
    return [replace(row, completion=plain.get(row.id, "")) for row in rows]


def ask_refined(work: Work, rows: Sequence[Example]) -> tuple[list[Example], list[Unusable]]:
    """(rows with the teacher's answer in the style of their task, records of rows without a complete one)."""
    tasks = work.recipe.task_table()
    asked = [prompts.refine_prompt(row.prompt, tasks[row.task], row.completion) for row in rows]
    return answer_rows(work, "refine", rows, asked)


def ask_plain(work: Work, rows: Sequence[Example]) -> tuple[list[Example], list[Unusable]]:
    """(rows with the teacher's plain answer, records of rows without a complete one)."""
    return answer_rows(work, "refine", rows, [prompts.answer_prompt(row.prompt) for row in rows])
