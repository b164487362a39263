"""Have answers judged: in pairs and both orders, or each alone; asked once more where a reply cannot be read."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tapir_local.errors import TapirError
from tapir_local.files import write_rows
from tapir_local.method import judging, parsing, prompts
from tapir_local.method.judge_quality import format_percent, measure_judge
from tapir_local.pipeline.context import Ask, Work
from tapir_local.recipe.endpoints import Judge
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Answer, Completion, Example, Judgement, Progress, Prompt, Request, instruction_of
from tapir_local.unusable import MAX_TEXT_KEPT as CHARACTERS
from tapir_local.unusable import Unusable, record_unusable

S = TypeVar("S")
Asked = Callable[[str], Prompt]  # from a reply that could not be read, or "", to the request

BRIEF = 80  # characters of an unreadable reply that a reason quotes
SLOW, SLOW_REQUEST = 60.0, 2.0  # seconds of a stage and of each of its requests from which a local judge is slow
FEW = 5  # unreadable rows that a message names
UNASKED = {
    "too_long": "no answer of the student: the prompt fills its context",
    "refused": "no answer of the student: its chat template refuses the prompt",
}
# What is wrong with a judge's replies, each the beginning of a reason, the worst first.
KINDS = (
    "no answer of the student",
    "refused by the server",
    "cut at judge.max_tokens",
    "empty",
    "not whole",
    "no score",
)
# What follows a row's id in the names of its requests, and what it stands for.
SHOWN = {"0": "the teacher's answer first", "1": "the student's answer first"}
ALONE = {"teacher": "the teacher's answer", "student": "the student's answer"}


@dataclass
class Speed:
    """How fast a judge answers what is not in the store: requests, tokens read and written, seconds."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    def measured(self, ask: Ask) -> Ask:
        """The same way to ask, measured."""

        def timed(requests: Sequence[Request], progress: Progress) -> list[Answer]:
            began = time.monotonic()
            found = ask(requests, progress)
            new = [answer for answer in found if not answer.hit]
            self.seconds += time.monotonic() - began if new else 0.0
            self.requests += len(new)
            self.tokens_in += sum(answer.tokens_in for answer in new)
            self.tokens_out += sum(answer.tokens_out for answer in new)
            return found

        return timed

    def words(self, judge: Judge) -> list[str]:
        """The speed for people, and what would be faster where a slow GGUF reads both answers twice."""
        if not self.tokens_in or not self.seconds:
            return []
        read, written = (f"{tokens / self.seconds:,.0f}" for tokens in (self.tokens_in, self.tokens_out))
        said = [
            f"{self.requests:,} requests, {read} tokens read and {written} written a second",
        ]
        if judge.gguf and judge.mode == "pair" and self.seconds > max(SLOW, SLOW_REQUEST * self.requests):
            said.append(
                f"most of the {self.seconds:,.0f} s is reading prompts: with `judge.mode: single` a request has one "
                "answer, and later rounds ask about the student's alone"
            )
        return said


def write_judgements(
    work: Work, stage: str, rows: Sequence[Example], completions: Sequence[Completion], out: Path
) -> str:
    """Judgements of rows whose student's answers are given, in the rows' order; those without one are recorded.

    A row that the student could not be asked is not judged: there is no answer to pay a judge for.
    """
    texts, speed = {completion.id: completion.text for completion in completions}, Speed()
    unasked = {completion.id: completion.finish for completion in completions if not completion.asked}
    asked = [row for row in rows if row.id not in unasked]
    if work.recipe.judge.kind == "reference":
        judged = [judging.judge_by_rouge(row.id, row.completion, texts[row.id]) for row in asked]
    else:
        timed = replace(work, tools=replace(work.tools, judge=speed.measured(work.tools.judge)))
        judged = ask_judge(timed, stage, asked, texts)
    by_id = {judgement.id: judgement for judgement in judged}
    found = [
        replace(by_id[row.id], student_length=len(texts[row.id]), teacher_length=len(row.completion))
        if row.id in by_id
        else Judgement(row.id, None, None, reason=UNASKED[unasked[row.id]], teacher_length=len(row.completion))
        for row in rows
    ]
    record_unusable(work.run, work.step, unjudged_rows(work.step, rows, found))
    write_rows(out, found)
    return told(found, judge_name(work.recipe), speed.words(judge_settings(work.recipe)))


def judge_settings(recipe: Recipe) -> Judge:
    """The judge's settings, with the GGUF that judges also where that is the teacher's."""
    return (
        recipe.judge.model_copy(update={"gguf": recipe.teacher.gguf})
        if recipe.judge.kind == "teacher"
        else recipe.judge
    )


def unjudged_rows(step: str, rows: Sequence[Example], judgements: Sequence[Judgement]) -> list[Unusable]:
    """The rows without a judgement, for the record; the kind is what their reasons have in common."""
    return [
        Unusable(
            step, row.id, f"unjudged: {kind_of(found.reason)}", found.reason, instruction_of(row.prompt)[:CHARACTERS]
        )
        for row, found in zip(rows, judgements, strict=True)
        if found.teacher is None
    ]


def kind_of(reason: str) -> str:
    """The first of KINDS that a reason names."""
    return next((kind for kind in KINDS if kind in reason), "not readable")


def told(judgements: Sequence[Judgement], judge: str, speed: Sequence[str] = ()) -> str:
    """How many rows were judged and by whom, how many were not, whether the orders agree, and warnings."""
    found, rows = measure_judge(judgements), len(judgements)
    share = f" ({format_percent(found.unjudged / rows)})" if found.unjudged else ""
    agree = "" if found.agreement is None else f", the orders agree on {format_percent(found.agreement)}"
    said = f"{rows:,} rows judged by {judge}, {found.unjudged:,} unreadable{share}{agree}"
    return "; ".join([said, *speed, *found.notes])


def ask_judge(work: Work, stage: str, rows: Sequence[Example], texts: Mapping[str, str]) -> list[Judgement]:
    """A judgement of every row, `texts` being the student's answers by id."""
    judge = judge_alone if work.recipe.judge.mode == "single" else judge_pairs
    return judge(work, stage, rows, texts)


def judge_pairs(work: Work, stage: str, rows: Sequence[Example], texts: Mapping[str, str]) -> list[Judgement]:
    """Both answers in one request, in both orders: two calls a row."""
    asked: dict[str, Asked] = {}
    for row in rows:
        asked[f"{row.id}#0"] = partial(prompts.judge_prompt, row.prompt, row.completion, texts[row.id])
        asked[f"{row.id}#1"] = partial(prompts.judge_prompt, row.prompt, texts[row.id], row.completion)
    read, why = ask_twice(work, stage, asked, parsing.parse_scores, prompts.JUDGEMENT)
    return [
        judging.combine_orders(row.id, read.get(f"{row.id}#0"), read.get(f"{row.id}#1"), reason(row.id, SHOWN, why))
        for row in rows
    ]


def judge_alone(work: Work, stage: str, rows: Sequence[Example], texts: Mapping[str, str]) -> list[Judgement]:
    """Each answer in a request of its own; that of the teacher's is the same in every round, and paid for once."""
    asked: dict[str, Asked] = {}
    for row in rows:
        asked[f"{row.id}#teacher"] = partial(prompts.judge_single_prompt, row.prompt, row.completion)
        asked[f"{row.id}#student"] = partial(prompts.judge_single_prompt, row.prompt, texts[row.id])
    read, why = ask_twice(work, stage, asked, parsing.parse_score, prompts.SINGLE_JUDGEMENT)
    return [
        judging.combine_single(
            row.id, read.get(f"{row.id}#teacher"), read.get(f"{row.id}#student"), reason(row.id, ALONE, why)
        )
        for row in rows
    ]


def ask_twice(
    work: Work, stage: str, asked: Mapping[str, Asked], parse: Callable[[str], S | None], schema: Mapping[str, Any]
) -> tuple[dict[str, S], dict[str, str]]:
    """What was read, by request, and why the others were not: each of these has been asked once more with the error."""
    settings = work.recipe.judge
    read: dict[str, S] = {}
    last: dict[str, Answer] = {}
    for _ in range(2):
        missing = [name for name in asked if name not in read and not (name in last and last[name].refused)]
        requests = [
            Request(
                asked[name](last[name].text if name in last else ""),
                name,
                stage,
                work.number,
                temperature=settings.temperature,
                max_tokens=settings.max_tokens,
                schema=schema,
            )
            for name in missing
        ]
        for name, reply in zip(missing, work.ask(work.tools.judge, requests), strict=True):
            last[name] = reply
            # A reply that was cut may end in a candidate's own words, quoted: only a whole one counts.
            if reply.complete and (found := parse(reply.text)) is not None:
                read[name] = found
    return read, {name: why_unread(last[name]) for name in asked if name not in read}


def score_answers(work: Work, stage: str, rows: Sequence[Example]) -> dict[str, float]:
    """The judge's score of each row's own answer, by id; a row is not there where the reply could not be read."""
    asked: dict[str, Asked] = {
        f"{row.id}#teacher": partial(prompts.judge_single_prompt, row.prompt, row.completion) for row in rows
    }
    read, _ = ask_twice(work, stage, asked, parsing.parse_score, prompts.SINGLE_JUDGEMENT)
    return {name.removesuffix("#teacher"): score for name, score in read.items()}


def why_unread(reply: Answer) -> str:
    """What is wrong with a judge's reply, and how it begins."""
    begins = " ".join(reply.text.split())
    quoted = f": {begins[:BRIEF]!r}" if begins else ""
    if reply.refused and (reply.why or reply.finish == "refused"):
        return f"refused by the server: {reply.why}".removesuffix(": ")
    if reply.finish == "length":
        return f"cut at judge.max_tokens{quoted}"
    if not begins:
        return reply.why or f"empty ({reply.finish or 'no finish reason'})"
    return f"no score{quoted}" if reply.complete else f"not whole ({reply.finish or 'no finish reason'}){quoted}"


def reason(id: str, names: Mapping[str, str], why: Mapping[str, str]) -> str:
    """Which replies about a row could not be read, and why; "" where all were."""
    return "; ".join(f"{words}: {why[f'{id}#{name}']}" for name, words in names.items() if f"{id}#{name}" in why)


def judge_name(recipe: Recipe) -> str:
    """Who judges, in words for people."""
    if recipe.judge.kind == "reference":
        return "likeness to the teacher's answer (ROUGE-L, no judge)"
    who = recipe.teacher if recipe.judge.kind == "teacher" else recipe.judge
    alone = ", each answer alone" if recipe.judge.mode == "single" else ""
    if who.gguf:
        return Path(who.gguf).name + alone
    return (
        "the pocket teacher (a programme)" if who.kind == "pocket" else str(recipe.judge.model or who.model)
    ) + alone


def refuse_unjudged(work: Work, judgements: Sequence[Judgement]) -> None:
    """Stop where too many rows have no judgement for the plan to mean anything."""
    unjudged, rows = [row for row in judgements if row.teacher is None], len(judgements)
    if len(unjudged) > work.recipe.judge.max_unjudged * rows:
        first = "; ".join(f"{row.id} ({row.reason})" for row in unjudged[:FEW])
        raise TapirError(
            f"{len(unjudged):,} of {rows:,} judgements ({format_percent(len(unjudged) / rows)}) could not be read; "
            f"judge.max_unjudged allows {format_percent(work.recipe.judge.max_unjudged)}. The first: {first}",
            where=str(work.folder / "judgements.jsonl"),
            fix=f"`tapir-local calls list --run {work.run.name} --stage judge` shows the replies. Name a judge that "
            "keeps to JSON (or give it more judge.max_tokens, where replies were cut) and start a new run with "
            "--name: the store keeps what was paid for.",
        )
