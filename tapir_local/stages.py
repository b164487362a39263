"""BASELINE and ROUND: a round's stages in order. Each reads files and writes one output that is whole or absent."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tapir_local import judging, metrics, prompts
from tapir_local.curriculum import CURRICULA
from tapir_local.dataset import Draft, Index, screen
from tapir_local.errors import TapirError
from tapir_local.prepare import PREPARE
from tapir_local.recipe import Recipe
from tapir_local.records import Answer, Completion, Example, Judgement, Metrics, Request, RoundPlan
from tapir_local.rundir import read_record, read_rows, write_record, write_rows
from tapir_local.work import Stage, Work, lost

__all__ = ["BASELINE", "PREPARE", "ROUND"]

# A seed is expanded again in a later round: its draws must not repeat those of the rounds before.
DRAWS_PER_ROUND = 1000


def mix(work: Work, out: Path) -> str:
    """Round 0's rows: the seeds as the teacher answered them."""
    rows = read_rows(Example, work.run.path / "seeds.jsonl")
    wanted = work.recipe.curriculum.first_rows or len(rows)
    chosen = work.chance("mix").sample(rows, min(wanted, len(rows)))
    write_rows(out, chosen)
    return f"{len(chosen):,} rows"


def all_known(work: Work) -> list[Example]:
    """The seeds and all that earlier rounds trained on, each with the teacher's newest answer, by id."""
    rows = {row.id: row for row in read_rows(Example, work.run.path / "seeds.jsonl")}
    for number in range(1, work.number):
        rows |= {row.id: row for row in read_rows(Example, work.run.round(number) / "train.jsonl")}
    return sorted(rows.values(), key=lambda row: row.id)


def pool(work: Work) -> list[Example]:
    """The rows that this round judges: all that are known, or as many of them as the recipe says, drawn at random."""
    everything = all_known(work)
    size = work.recipe.curriculum.pool or len(everything)
    if size >= len(everything):
        return everything
    return sorted(work.chance("pool").sample(everything, size), key=lambda row: row.id)


def answer(work: Work, out: Path) -> str:
    """The last round's student answers the pool."""
    return student_answers(work, pool(work), work.run.round(work.number - 1), out)


def student_answers(work: Work, rows: Sequence[Example], student: Path, out: Path) -> str:
    """Completions of a round's GGUF for some rows."""
    found = work.tools.generate(
        student / "student.gguf", [row.prompt for row in rows], [row.id for row in rows], work.progress
    )
    write_rows(out, found)
    return f"{len(found):,} answers, {sum(row.tokens for row in found):,} tokens" + cut(found)


def cut(completions: Sequence[Completion]) -> str:
    """What to say of answers that did not end by themselves."""
    count = sum(row.finish != "stop" for row in completions)
    return f", {count:,} cut at the limit" if count else ""


def judge(work: Work, out: Path) -> str:
    """The pool's rows judged: the teacher's answer beside the student's, in both orders."""
    completions = read_rows(Completion, work.folder / "answers.jsonl")
    return write_judgements(work, "judge", pool(work), completions, out)


def write_judgements(
    work: Work, stage: str, rows: Sequence[Example], completions: Sequence[Completion], out: Path
) -> str:
    """Judgements of rows whose student's answers are given, in the rows' order."""
    texts = {completion.id: completion.text for completion in completions}
    if work.recipe.judge.kind == "reference":
        found = [judging.likeness(row.id, row.completion, texts[row.id]) for row in rows]
    else:
        found = ask_judge(work, stage, rows, texts)
    write_rows(out, found)
    unjudged = sum(row.teacher is None for row in found)
    return f"{len(found):,} rows judged by {judge_name(work.recipe)}, {unjudged:,} unreadable"


def ask_judge(work: Work, stage: str, rows: Sequence[Example], texts: Mapping[str, str]) -> list[Judgement]:
    """Both orders of every row; a reply that cannot be read is asked for once more with the error."""
    pairs = {(row.id, order): (row, *shown(row.completion, texts[row.id], order)) for row in rows for order in range(2)}
    scores: dict[tuple[str, int], judging.Scores] = {}
    replies: dict[tuple[str, int], str] = {}
    for _ in range(2):
        missing = [at for at in pairs if at not in scores]
        requests = [
            Request(
                prompts.judge(pairs[at][0].prompt, pairs[at][1], pairs[at][2], replies.get(at, "")),
                f"{at[0]}#{at[1]}",
                stage,
                work.number,
                temperature=work.recipe.judge.temperature,
                max_tokens=work.recipe.judge.max_tokens,
                schema=prompts.JUDGEMENT,
            )
            for at in missing
        ]
        for at, reply in zip(missing, work.ask(work.tools.judge, requests), strict=True):
            replies[at] = reply.text
            if found := judging.parse_scores(reply.text):
                scores[at] = found
    return [judging.combine(row.id, scores.get((row.id, 0)), scores.get((row.id, 1))) for row in rows]


def shown(teacher: str, student: str, order: int) -> tuple[str, str]:
    """Which answer is shown first: the teacher's in order 0, the student's in order 1."""
    return (teacher, student) if order == 0 else (student, teacher)


def judge_name(recipe: Recipe) -> str:
    """Who judges, in words for people."""
    if recipe.judge.kind == "reference":
        return "likeness to the teacher's answer (ROUGE-L, no judge)"
    who = recipe.teacher if recipe.judge.kind == "teacher" else recipe.judge
    if who.gguf:
        return Path(who.gguf).name
    return "the pocket teacher (a programme)" if who.kind == "pocket" else str(recipe.judge.model or who.model)


def plan(work: Work, out: Path) -> str:
    """What this round trains on."""
    rows, judgements = pool(work), read_rows(Judgement, work.folder / "judgements.jsonl")
    refuse_unjudged(work, judgements)
    targets = {label: task.share for label, task in work.recipe.task_table().items()}
    make = CURRICULA[work.recipe.curriculum.name]
    planned = make(
        rows, judgements, targets, work.recipe.curriculum, work.number, work.recipe.can_expand, work.chance("plan")
    )
    write_record(out, planned)
    counts = f"{len(planned.hard):,} of them chosen, {sum(planned.expand.values()):,} to write"
    chosen = (
        f"{planned.pool_hard:,} of {planned.pool:,} rows hard; {counts}, {len(planned.replay):,} easy ones replayed"
    )
    return "; ".join([chosen, *planned.notes])


def refuse_unjudged(work: Work, judgements: Sequence[Judgement]) -> None:
    """Stop where too many rows have no judgement for the plan to mean anything."""
    unjudged = sum(row.teacher is None for row in judgements)
    if unjudged > work.recipe.judge.max_unjudged * len(judgements):
        raise TapirError(
            f"{unjudged:,} of {len(judgements):,} judgements could not be read; judge.max_unjudged allows "
            f"{work.recipe.judge.max_unjudged:.0%}",
            where=str(work.folder / "judgements.jsonl"),
            fix="Name a judge that keeps to JSON and start a new run with --name: the store keeps what was paid for.",
        )


def expand(work: Work, out: Path) -> str:
    """New instructions in the image of hard ones, and the drafts that were rejected."""
    planned, rows = read_record(RoundPlan, work.folder / "plan.json"), {row.id: row for row in pool(work)}
    near, held = Index(work.recipe.curriculum.max_rouge), Index(work.recipe.curriculum.max_rouge)
    for row in all_known(work):
        near.add(row)
    for row in read_rows(Example, work.run.path / "holdout.jsonl"):
        held.add(row)
    missing, drafts = dict(planned.expand), list[Draft]()
    for attempt in range(work.recipe.curriculum.drafts):
        parents = [rows[id] for task, count in missing.items() for id in turns(planned.parents[task], attempt, count)]
        new = ask_drafts(work, parents, drafts)
        for draft in new:
            task = draft.example.task
            found = draft if draft.reason else screen([draft.example], near, held)[0]
            missing[task] -= not found.reason
            drafts.append(found)
    write_rows(out, drafts)
    kept = sum(not draft.reason for draft in drafts)
    short = sum(missing.values())
    return f"{kept:,} new instructions, {len(drafts) - kept:,} drafts rejected" + (
        f", {short:,} short" if short else ""
    )


def turns(ids: Sequence[str], attempt: int, count: int) -> list[str]:
    """`count` ids in turn, a later attempt beginning where it has not been."""
    return [ids[(attempt * count + number) % len(ids)] for number in range(count)]


def ask_drafts(work: Work, parents: Sequence[Example], before: Sequence[Draft]) -> list[Draft]:
    """One draft for each parent; the n-th draft asked of the same parent in a round has the n-th draw."""
    tasks = work.recipe.task_table()
    asked: dict[str, int] = {}
    for draft in before:
        asked[draft.example.parent] = asked.get(draft.example.parent, 0) + 1
    requests = []
    for parent in parents:
        draw = DRAWS_PER_ROUND * work.number + asked.get(parent.id, 0)
        asked[parent.id] = asked.get(parent.id, 0) + 1
        requests.append(work.request("expand", parent.id, prompts.expand(parent.prompt, tasks[parent.task]), draw=draw))
    answers = work.ask(work.tools.teacher, requests)
    return [
        read_draft(work.number, len(before) + n, parent, reply)
        for n, (parent, reply) in enumerate(zip(parents, answers, strict=True))
    ]


def read_draft(number: int, serial: int, parent: Example, reply: Answer) -> Draft:
    """The new instruction in a reply, or why there is none."""
    text = judging.parse_instruction(reply.text) if reply.complete else None
    reason = (
        ""
        if text
        else ("no new instruction in the reply" if reply.complete else f"the reply is not whole ({reply.finish})")
    )
    prompt = (*parent.prompt[:-1], replace(parent.prompt[-1], content=text or ""))
    return Draft(
        Example(f"r{number}-{serial:05d}", prompt, "", parent.task, parent.labelled_by, "expanded", parent.id, number),
        reason,
    )


def refine(work: Work, out: Path) -> str:
    """This round's rows: hard ones answered in their task's style, and easy ones replayed, in random order."""
    planned, rows = read_record(RoundPlan, work.folder / "plan.json"), {row.id: row for row in pool(work)}
    drafts = read_rows(Draft, work.folder / "expanded.jsonl")
    hard = [rows[id] for id in planned.hard] + [draft.example for draft in drafts if not draft.reason]
    refined = ask_styled(work, hard) if work.recipe.can_expand else hard
    train_rows = refined + [rows[id] for id in planned.replay]
    if not train_rows:
        raise TapirError(
            "no row to train on: none is hard and none is easy",
            where=str(work.folder / "plan.json"),
            fix="Look at the judgements.",
        )
    work.chance("refine").shuffle(train_rows)
    write_rows(out, train_rows)
    share = len(refined) / len(train_rows)
    return f"{len(train_rows):,} rows, {share:.0%} hard (asked {planned.alpha:.0%})" + lost(len(hard) - len(refined))


def ask_styled(work: Work, rows: Sequence[Example]) -> list[Example]:
    """Rows with the teacher's answer in their task's style; those without a whole one are left out."""
    tasks = work.recipe.task_table()
    requests = [
        work.request("refine", row.id, prompts.refine(row.prompt, tasks[row.task], row.completion)) for row in rows
    ]
    answers = work.ask(work.tools.teacher, requests)
    return [
        replace(row, completion=answer.text.strip())
        for row, answer in zip(rows, answers, strict=True)
        if answer.complete
    ]


def train(work: Work, out: Path) -> str:
    """The student, from the last round's adapter or from the base, on this round's rows."""
    go_on = work.number > 0 and work.recipe.train.start == "previous"
    previous = work.run.round(work.number - 1) / "adapter" if go_on else None
    work.tools.train(work.folder / "train.jsonl", previous, work.recipe.random_seed + work.number, out, work.progress)
    return "from the last round's adapter" if go_on else "from the base"


def export(work: Work, out: Path) -> str:
    """The student as GGUF."""
    work.tools.export(work.folder / "adapter", out, work.progress)
    return f"{out.stat().st_size / 1e6:,.1f} MB, {work.recipe.export.quant}"


def gate(work: Work, out: Path) -> str:
    """Whether the GGUF is the trained model: a report, or the run stops."""
    work.tools.gate(
        work.folder / "adapter", work.folder / "student.gguf", work.folder / "train.jsonl", out, work.progress
    )
    return "the GGUF agrees with the trained model"


def holdout_answer(work: Work, out: Path) -> str:
    """This round's student answers the holdout."""
    return student_answers(work, read_rows(Example, work.run.path / "holdout.jsonl"), work.folder, out)


def holdout_judge(work: Work, out: Path) -> str:
    """The holdout's answers judged."""
    completions = read_rows(Completion, work.folder / "holdout-answers.jsonl")
    return write_judgements(
        work, "holdout-judge", read_rows(Example, work.run.path / "holdout.jsonl"), completions, out
    )


def evaluate(work: Work, out: Path) -> str:
    """Win rate and accuracy on the holdout."""
    rows = read_rows(Example, work.run.path / "holdout.jsonl")
    completions = read_rows(Completion, work.folder / "holdout-answers.jsonl")
    judgements = read_rows(Judgement, work.folder / "holdout-judgements.jsonl")
    found = metrics.evaluate(
        work.number, rows, completions, judgements, checked(work, rows, completions), judge_name(work.recipe)
    )
    write_record(out, found)
    return headline(found)


def checked(work: Work, rows: Iterable[Example], completions: Iterable[Completion]) -> dict[str, bool | None]:
    """By id, whether the recipe's checker finds an answer right; None where it cannot tell or there is none."""
    check = work.tools.check
    return {row.id: check(row, text.text) if check else None for row, text in zip(rows, completions, strict=True)}


def headline(found: Metrics) -> str:
    """Win rate and accuracy in a phrase."""
    win_rate = "win rate unknown" if found.win_rate is None else f"win rate {found.win_rate:.1%}"
    return win_rate if found.accuracy is None else f"{win_rate}, accuracy {found.accuracy:.1%}"


STUDENT = (
    Stage("train", "adapter", train),
    Stage("export", "student.gguf", export),
    Stage("gate", "gate.json", gate),
    Stage("holdout-answer", "holdout-answers.jsonl", holdout_answer),
    Stage("holdout-judge", "holdout-judgements.jsonl", holdout_judge),
    Stage("evaluate", "metrics.json", evaluate),
)
BASELINE = (Stage("mix", "train.jsonl", mix), *STUDENT)
ROUND = (
    Stage("answer", "answers.jsonl", answer),
    Stage("judge", "judgements.jsonl", judge),
    Stage("plan", "plan.json", plan),
    Stage("expand", "expanded.jsonl", expand),
    Stage("refine", "train.jsonl", refine),
    *STUDENT,
)
