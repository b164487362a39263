"""What the teacher writes for a round: new instructions, and answers in the style that each task needs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tapir_local import judging, prompts
from tapir_local.dataset import Draft, Index, screen
from tapir_local.errors import TapirError
from tapir_local.records import Answer, Example, Manner, RoundPlan
from tapir_local.reflecting import reflect_on_answers, reflect_on_instructions
from tapir_local.rows import all_known, child_of, holdout_index, pool, seeds, with_room
from tapir_local.rundir import read_record, read_rows, write_rows
from tapir_local.unusable import Unusable, left_out
from tapir_local.work import Work, answered

# A seed is expanded again in a later round: its draws must not repeat those of the rounds before.
DRAWS_PER_ROUND = 1000


def expand(work: Work, out: Path) -> str:
    """New instructions grown from rows of the pool, and the drafts that were rejected."""
    planned = read_record(RoundPlan, work.folder / "plan.json")
    if planned.reflected:
        return reflect_on_instructions(work, planned, out)
    rows = {row.id: row for row in pool(work)}
    near, held = indices(work) if planned.expansions else (Index(1.0), Index(1.0))
    missing, drafts = [expansion.rows for expansion in planned.expansions], list[Draft]()
    for attempt in range(work.recipe.curriculum.drafts):
        wanted = [
            (place, rows[id])
            for place, expansion in enumerate(planned.expansions)
            for id in turns(expansion.parents, attempt, missing[place])
        ]
        asked = [(row, planned.expansions[place].manner) for place, row in wanted]
        for (place, _), draft in zip(wanted, ask_drafts(work, asked, drafts), strict=True):
            found = draft if draft.reason else screen([draft.example], near, held)[0]
            missing[place] -= not found.reason
            drafts.append(found)
    write_rows(out, drafts)
    return told(drafts, sum(missing))


def indices(work: Work) -> tuple[Index, Index]:
    """What a draft may not resemble: all rows that are known, and the holdout."""
    near = Index(work.recipe.curriculum.max_rouge)
    for row in all_known(work):
        near.add(row)
    return near, holdout_index(work)


def told(drafts: Sequence[Draft], short: int) -> str:
    """What became of the drafts, in a phrase."""
    kept = sum(not draft.reason for draft in drafts)
    said = f"{kept:,} new instructions, {len(drafts) - kept:,} drafts rejected"
    return said + (f", {short:,} short" if short else "")


def turns(ids: Sequence[str], attempt: int, count: int) -> list[str]:
    """`count` ids in turn, a later attempt beginning where it has not been."""
    return [ids[(attempt * count + number) % len(ids)] for number in range(count)]


def ask_drafts(work: Work, parents: Sequence[tuple[Example, Manner]], before: Sequence[Draft]) -> list[Draft]:
    """One draft for each parent; the n-th draft asked of the same parent in a round has the n-th draw."""
    tasks = work.recipe.task_table()
    asked = Counter(draft.example.parent for draft in before)
    requests = []
    for parent, manner in parents:
        draw = DRAWS_PER_ROUND * work.number + asked[parent.id]
        asked[parent.id] += 1
        messages = prompts.expand(parent.prompt, tasks[parent.task], manner)
        requests.append(work.request("expand", parent.id, messages, draw=draw))
    answers = work.ask(work.tools.teacher, requests)
    drafts = [
        read_draft(work.number, len(before) + n, parent, reply)
        for n, ((parent, _), reply) in enumerate(zip(parents, answers, strict=True))
    ]
    return with_room(work, drafts)


def read_draft(number: int, serial: int, parent: Example, reply: Answer) -> Draft:
    """The new instruction in a reply, or why there is none."""
    text = judging.parse_instruction(reply.text) if reply.complete else None
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
        raise TapirError(
            "no row to train on: none is hard and none is easy",
            where=str(work.folder / "plan.json"),
            fix=f"Look at the judgements with `tapir-local show {work.run.name} --round {work.number}`; a lower "
            "curriculum.mfd_threshold or teacher_floor finds more rows.",
        )
    work.chance("refine").shuffle(rows)
    write_rows(out, rows)
    return f"{len(rows):,} rows, {said}"


def hard_and_easy(work: Work, planned: RoundPlan) -> tuple[list[Example], str]:
    """Hard and new rows with their answers, easy ones as they are or styled too; and what to say of them."""
    rows = {row.id: row for row in pool(work)}
    old, easy = [rows[id] for id in planned.hard], [rows[id] for id in planned.replay]
    new = [draft.example for draft in read_rows(Draft, work.folder / "expanded.jsonl") if not draft.reason]
    asked = len(new) if planned.styled == "none" else len(old) + len(new)
    found, unusable = ask_plain(work, new) if planned.styled == "none" else ask_styled(work, unstyled(work, old) + new)
    hard = old + found if planned.styled == "none" else found
    if planned.styled == "all":
        easy, without = style_plain(work, easy)
        asked, unusable = asked + len(planned.replay), unusable + without
    work.leave_out(unusable, asked)
    share = len(hard) / max(1, len(hard) + len(easy))
    return hard + easy, f"{share:.0%} hard (asked {planned.alpha:.0%})" + left_out(unusable)


def style_plain(work: Work, rows: Sequence[Example]) -> tuple[list[Example], list[Unusable]]:
    """Rows with a styled answer, what an earlier round has styled being left as it is; and those without one."""
    plain = {(row.id, row.completion) for row in seeds(work)}
    wanting = [row for row in rows if (row.id, row.completion) in plain]
    found, unusable = ask_styled(work, wanting)
    return found + [row for row in rows if (row.id, row.completion) not in plain], unusable


def unstyled(work: Work, rows: Sequence[Example]) -> list[Example]:
    """Rows as they were before any round styled them: seeds with the plain answer, rows that a round wrote with none.

    A row that is hard again is then the same request as before, and its styled answer is in the store.
    """
    plain = {row.id: row.completion for row in seeds(work)}
    return [replace(row, completion=plain.get(row.id, "")) for row in rows]


def ask_styled(work: Work, rows: Sequence[Example]) -> tuple[list[Example], list[Unusable]]:
    """Rows with the teacher's answer in their task's style, and those without a whole one."""
    tasks = work.recipe.task_table()
    return answered(work, "refine", rows, [prompts.refine(row.prompt, tasks[row.task], row.completion) for row in rows])


def ask_plain(work: Work, rows: Sequence[Example]) -> tuple[list[Example], list[Unusable]]:
    """Rows with the teacher's plain answer, and those without a whole one."""
    return answered(work, "refine", rows, [prompts.answer(row.prompt) for row in rows])
