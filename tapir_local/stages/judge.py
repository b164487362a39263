"""Have answers judged, in pairs and both orders or one at a time; an unreadable reply is asked for once more."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tapir_local.errors import TapirError
from tapir_local.files import write_rows
from tapir_local.method import judging, parsing, prompts
from tapir_local.method.judge_quality import NO_CHECKER, AnswersRight, check_both_answers, format_percent, measure_judge
from tapir_local.printable import format_count
from tapir_local.recipe.endpoints import Endpoint, Judge
from tapir_local.recipe.schema import Recipe
from tapir_local.records import (
    Answer,
    Completion,
    Example,
    Judgement,
    JudgeQuality,
    Progress,
    Prompt,
    Request,
)
from tapir_local.stages.context import AskBackend, Work
from tapir_local.unusable import Unusable, record_unusable

ScoreT = TypeVar("ScoreT")
BuildPrompt = Callable[[str], Prompt]  # the prompt, given the last unreadable reply or ""

QUOTED_CHARACTERS = 80  # of an unreadable reply, in a reason
SLOW_STAGE_SECONDS = 60.0  # a local judge is called slow only if the stage took longer than this,
SLOW_REQUEST_SECONDS = 2.0  # and each request longer than this
ROWS_NAMED = 5  # unjudged rows that an error names
# Why the student gave no answer, by its finish reason. These words and those below are in files of existing runs.
NO_ANSWER_REASONS = {
    "too_long": "no answer of the student: the prompt fills its context",
    "refused": "no answer of the student: its chat template refuses the prompt",
}
# The kinds of unreadable replies, each the beginning of a reason, the most serious first.
UNREADABLE_KINDS = (
    "no answer of the student",
    "refused by the server",
    "cut at judge.max_tokens",
    "empty",
    "not whole",
    "no score",
)
# The suffixes of a row's id in the names of its requests, and what they stand for.
PAIR_ORDERS = {"0": "the teacher's answer first", "1": "the student's answer first"}
SINGLE_ANSWERS = {"teacher": "the teacher's answer", "student": "the student's answer"}


@dataclass
class JudgeSpeed:
    """How fast a judge answers requests that are not in the store."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    def measured(self, ask: AskBackend) -> AskBackend:
        """`ask`, with its speed measured."""

        def timed(requests: Sequence[Request], progress: Progress) -> list[Answer]:
            began = time.monotonic()
            found = ask(requests, progress=progress)
            new = [answer for answer in found if not (answer.hit or answer.ahead)]
            self.seconds += time.monotonic() - began if new else 0.0
            self.requests += len(new)
            self.tokens_in += sum(answer.tokens_in for answer in new)
            self.tokens_out += sum(answer.tokens_out for answer in new)
            return found

        return timed

    def describe(self, judge: Judge) -> list[str]:
        """The speed, and advice if a slow GGUF reads both answers in two requests."""
        if not self.tokens_in or not self.seconds:
            return []
        read, written = (f"{tokens / self.seconds:,.0f}" for tokens in (self.tokens_in, self.tokens_out))
        said = [f"{format_count(self.requests, 'request')}, {read} tokens read and {written} written per second"]
        if judge.gguf and judge.mode == "pair" and self.is_slow:
            said.append(
                f"most of the {self.seconds:,.0f} s went into reading prompts: with `judge.mode: single` a request has "
                "one answer, and later rounds ask only about the student's"
            )
        return said

    @property
    def is_slow(self) -> bool:
        """Whether both the stage and each of its requests took long."""
        return self.seconds > max(SLOW_STAGE_SECONDS, SLOW_REQUEST_SECONDS * self.requests)


def write_judgements(
    work: Work, stage: str, rows: Sequence[Example], completions: Sequence[Completion], out: Path
) -> str:
    """Judge the student's answers to some rows, in the rows' order; unjudged rows are recorded.

    A row that the student could not be asked has no answer, so no judge is asked about it.
    """
    texts, speed = {completion.id: completion.text for completion in completions}, JudgeSpeed()
    unasked = {completion.id: completion.finish for completion in completions if not completion.asked}
    asked = [row for row in rows if row.id not in unasked]
    if work.recipe.judge.kind == "reference":
        judged = [judging.judge_by_rouge(row.id, row.completion, texts[row.id]) for row in asked]
    else:
        timed = replace(work, backends=replace(work.backends, judge=speed.measured(work.backends.judge)))
        judged = ask_judge(timed, stage, asked, texts)
    by_id = {judgement.id: judgement for judgement in judged}
    found = [
        replace(by_id[row.id], student_length=len(texts[row.id]), teacher_length=len(row.completion))
        if row.id in by_id
        else unasked_judgement(row, unasked[row.id])
        for row in rows
    ]
    record_unusable(work.run, work.step, unjudged_rows(work, rows, found))
    write_rows(out, found)
    right = check_both_answers(work.backends.check, rows, completions)
    return summarize_judgements(found, judge_name(work.recipe), speed.describe(judge_settings(work.recipe)), right)


def unasked_judgement(row: Example, finish: str) -> Judgement:
    """The judgement, without scores, of a row that the student could not be asked."""
    return Judgement(row.id, None, None, reason=NO_ANSWER_REASONS[finish], teacher_length=len(row.completion))


def judge_endpoint(recipe: Recipe) -> Endpoint:
    """The endpoint that judges."""
    return recipe.teacher if recipe.judge.kind == "teacher" else recipe.judge


def judge_settings(recipe: Recipe) -> Judge:
    """The judge's settings, with the teacher's GGUF if the teacher judges."""
    if recipe.judge.kind == "teacher":
        return recipe.judge.model_copy(update={"gguf": recipe.teacher.gguf})
    return recipe.judge


def unjudged_rows(work: Work, rows: Sequence[Example], judgements: Sequence[Judgement]) -> list[Unusable]:
    """Records of the rows without a judgement; their kind is the kind of the reply."""
    return [
        work.unusable(row, f"unjudged: {unreadable_kind(found.reason)}", found.reason)
        for row, found in zip(rows, judgements, strict=True)
        if found.teacher is None
    ]


def unreadable_kind(reason: str) -> str:
    """The first of UNREADABLE_KINDS in a reason."""
    return next((kind for kind in UNREADABLE_KINDS if kind in reason), "not readable")


def summarize_judgements(
    judgements: Sequence[Judgement],
    judge: str,
    speed: Sequence[str] = (),
    right: Mapping[str, AnswersRight] = NO_CHECKER,
) -> str:
    """How many rows were judged, by whom, how many could not be, how far the orders agree, and warnings."""
    found = measure_judge(judgements, right)
    share = f" ({format_percent(found.unjudged / len(judgements))})" if found.unjudged else ""
    agree = "" if found.agreement is None else f", the orders agree on {format_percent(found.agreement)}"
    rows = format_count(len(judgements), "row")
    said = f"{rows} judged by {judge}, {found.unjudged:,} unreadable{share}{agree}"
    return "; ".join([said, *speed, *found.notes])


def ask_judge(work: Work, stage: str, rows: Sequence[Example], texts: Mapping[str, str]) -> list[Judgement]:
    """A judgement of every row; `texts` are the student's answers by row id."""
    judge = judge_alone if work.recipe.judge.mode == "single" else judge_pairs
    return judge(work, stage, rows, texts)


def judge_pairs(work: Work, stage: str, rows: Sequence[Example], texts: Mapping[str, str]) -> list[Judgement]:
    """Both answers in one request, in both orders: two calls per row."""
    read, why = ask_twice(work, stage, pair_prompts(rows, texts), parsing.parse_scores, prompts.JUDGEMENT)
    return [
        judging.combine_orders(
            row.id, read.get(f"{row.id}#0"), read.get(f"{row.id}#1"), judgement_reason(row.id, PAIR_ORDERS, why)
        )
        for row in rows
    ]


def judge_alone(work: Work, stage: str, rows: Sequence[Example], texts: Mapping[str, str]) -> list[Judgement]:
    """Each answer in its own request; the one about the teacher's answer is the same in every round: paid for once."""
    read, why = ask_twice(work, stage, single_prompts(rows, texts), parsing.parse_score, prompts.SINGLE_JUDGEMENT)
    return [
        judging.combine_single(
            row.id,
            read.get(f"{row.id}#teacher"),
            read.get(f"{row.id}#student"),
            judgement_reason(row.id, SINGLE_ANSWERS, why),
        )
        for row in rows
    ]


def pair_prompts(rows: Sequence[Example], texts: Mapping[str, str]) -> dict[str, BuildPrompt]:
    """The prompts about both answers to each row, by request."""
    asked: dict[str, BuildPrompt] = {}
    for row in rows:
        asked[f"{row.id}#0"] = partial(prompts.judge_prompt, row.prompt, row.completion, texts[row.id])
        asked[f"{row.id}#1"] = partial(prompts.judge_prompt, row.prompt, texts[row.id], row.completion)
    return asked


def single_prompts(rows: Sequence[Example], texts: Mapping[str, str]) -> dict[str, BuildPrompt]:
    """The prompts about each answer to each row, by request."""
    asked: dict[str, BuildPrompt] = {}
    for row in rows:
        asked[f"{row.id}#teacher"] = partial(prompts.judge_single_prompt, row.prompt, row.completion)
        asked[f"{row.id}#student"] = partial(prompts.judge_single_prompt, row.prompt, texts[row.id])
    return asked


def first_judge_requests(work: Work, stage: str, rows: Sequence[Example], texts: Mapping[str, str]) -> list[Request]:
    """The requests that `ask_judge` will send first about these rows, in its order."""
    build, schema = (
        (single_prompts, prompts.SINGLE_JUDGEMENT)
        if work.recipe.judge.mode == "single"
        else (pair_prompts, prompts.JUDGEMENT)
    )
    return [judge_request(work, stage, name, prompt(""), schema) for name, prompt in build(rows, texts).items()]


def judge_request(work: Work, stage: str, name: str, messages: Prompt, schema: Mapping[str, Any]) -> Request:
    """A request to the judge with the recipe's settings; `name` is the row's id with the answers' suffix."""
    settings = work.recipe.judge
    return Request(
        messages,
        name,
        stage,
        work.number,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        schema=schema,
    )


def ask_twice(
    work: Work,
    stage: str,
    asked: Mapping[str, BuildPrompt],
    parse: Callable[[str], ScoreT | None],
    schema: Mapping[str, Any],
) -> tuple[dict[str, ScoreT], dict[str, str]]:
    """(parsed replies, reasons why the others could not be read), by request.

    An unreadable reply is asked for once more, with the reply in the prompt.
    """
    read: dict[str, ScoreT] = {}
    last: dict[str, Answer] = {}
    for _ in range(2):
        missing = [name for name in asked if name not in read and not (name in last and last[name].refused)]
        requests = [
            judge_request(work, stage, name, asked[name](last[name].text if name in last else ""), schema)
            for name in missing
        ]
        for name, reply in zip(missing, work.ask(work.backends.judge, requests), strict=True):
            last[name] = reply
            # A reply that was cut may end in a quotation of an answer that looks like scores: only complete ones count.
            if reply.complete and (found := parse(reply.text)) is not None:
                read[name] = found
            else:
                work.backends.meter.count("unreadable")
    return read, {name: unreadable_reason(last[name]) for name in asked if name not in read}


def score_answers(work: Work, stage: str, rows: Sequence[Example]) -> dict[str, float]:
    """The judge's score of each row's own answer, by row id, without rows whose reply could not be read."""
    asked: dict[str, BuildPrompt] = {
        f"{row.id}#teacher": partial(prompts.judge_single_prompt, row.prompt, row.completion) for row in rows
    }
    read, _ = ask_twice(work, stage, asked, parsing.parse_score, prompts.SINGLE_JUDGEMENT)
    return {name.removesuffix("#teacher"): score for name, score in read.items()}


def unreadable_reason(reply: Answer) -> str:
    """What is wrong with a judge's reply, and its first words."""
    begins = " ".join(reply.text.split())
    quoted = f": {begins[:QUOTED_CHARACTERS]!r}" if begins else ""
    if reply.refused and (reply.why or reply.finish == "refused"):
        return f"refused by the server: {reply.why}".removesuffix(": ")
    if reply.finish == "length":
        return f"cut at judge.max_tokens{quoted}"
    if not begins:
        return reply.why or f"empty ({reply.finish or 'no finish reason'})"
    return f"no score{quoted}" if reply.complete else f"not whole ({reply.finish or 'no finish reason'}){quoted}"


def judgement_reason(id: str, names: Mapping[str, str], why: Mapping[str, str]) -> str:
    """Which replies about a row could not be read, and why; "" if all could."""
    return "; ".join(f"{words}: {why[f'{id}#{name}']}" for name, words in names.items() if f"{id}#{name}" in why)


def judge_name(recipe: Recipe) -> str:
    """The judge's name for people. It is written into metrics.json, so its spelling stays as in existing runs."""
    if recipe.judge.kind == "reference":
        return "likeness to the teacher's answer (ROUGE-L, no judge)"
    who = recipe.teacher if recipe.judge.kind == "teacher" else recipe.judge
    alone = ", each answer alone" if recipe.judge.mode == "single" else ""
    if who.gguf:
        return Path(who.gguf).name + alone
    if who.kind == "pocket":
        return f"the pocket teacher (a program){alone}"
    return str(recipe.judge.model or who.model) + alone


def refuse_unjudged(work: Work, judgements: Sequence[Judgement]) -> None:
    """TapirError if more rows have no judgement than judge.max_unjudged allows."""
    unjudged, rows = [row for row in judgements if row.teacher is None], len(judgements)
    if len(unjudged) <= work.recipe.judge.max_unjudged * rows:
        return
    first = "; ".join(f"{row.id} ({row.reason})" for row in unjudged[:ROWS_NAMED])
    share = format_percent(len(unjudged) / rows)
    raise TapirError(
        f"{len(unjudged):,} of {format_count(rows, 'judgement')} ({share}) could not be read; "
        f"judge.max_unjudged allows {format_percent(work.recipe.judge.max_unjudged)}. The first: {first}",
        where=str(work.folder / "judgements.jsonl"),
        fix=f"`tapir-local calls list --run {work.run.name} --stage judge` shows the replies. Use a judge that "
        "reliably replies in JSON, or raise judge.max_tokens if replies were cut, and start a new run with --name: "
        "calls in the store are not paid again.",
    )


def refuse_useless_judge(work: Work, found: JudgeQuality, file: str) -> None:
    """TapirError if `judge.health` is `stop` and the scores in `file` say nothing about the answers."""
    if work.recipe.judge.health != "stop" or found.health != "useless":
        return
    raise TapirError(
        f"the judge's scores are useless: {found.notes[0]}",
        where=str(work.folder / file),
        fix="Use another judge and start a new run with --name: calls in the store are not paid again. Or go on with "
        f"these scores: tapir-local distill {work.run.name} --set judge.health=warn",
    )
