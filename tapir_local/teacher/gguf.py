"""A GGUF on this machine as teacher or judge: answers what the store lacks, many prompts at once, with llama.cpp."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import orjson

from tapir_local.errors import TapirError
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.generate import PromptGroup, PromptReply, ReplyHooks
from tapir_local.inference.llama_process import ReplyJob, run_reply_job
from tapir_local.inference.model import Advice
from tapir_local.inference.vocab_check import check_vocabulary
from tapir_local.printable import format_count
from tapir_local.store import keys
from tapir_local.store.reply import build_chat_completion
from tapir_local.teacher.endpoint import endpoint_identity, endpoint_role, gguf_path
from tapir_local.teacher.session import AskSession, RequestJob

GGUF_POLL_SECONDS = 0.5  # between checks of requests that another process is answering


@dataclass
class GgufJobs:
    """Jobs that a GGUF answers, the context of each answer in tokens, and the start time of each job in progress."""

    session: AskSession
    gguf: Path
    jobs: Sequence[RequestJob]
    context: int
    began: dict[int, float] = field(default_factory=dict)


def answer_with_gguf(session: AskSession, jobs: Sequence[RequestJob]) -> None:
    """Answer the jobs with the endpoint's GGUF; each answer is stored as soon as it is done.

    Jobs that another process is answering are left to it, and their answers then taken from the store. An answer's
    random seed is derived from its key: except for near ties, the text does not depend on when it is generated or with
    which others. A prompt that does not fit the context has no answer (finish `too_long`), nor has one that the chat
    template refuses (`refused`). An answer cut by the end of the context (`length`) would continue in a larger one.
    None of these is stored as a call; all are recorded as attempts. TapirError if the GGUF cannot be opened or has no
    chat template; what was answered before is stored.
    """
    while jobs:
        free = [job for job in jobs if is_job_free(session, job)]
        if free:
            answer_free_jobs(session, free)
        jobs = [job for job in jobs if session.answers[job.places[0]] is None]
        if jobs:
            time.sleep(GGUF_POLL_SECONDS)


def is_job_free(session: AskSession, job: RequestJob) -> bool:
    """Whether no process is answering the job; if another one has answered it, its answer is set."""
    free = claim_job(session, job)
    if free:
        session.store.release(job.key)
    return free


def claim_job(session: AskSession, job: RequestJob) -> bool:
    """Claim a job; False if another process has it, or has answered it, in which case its answer is set."""
    if not session.store.claim(job.key):
        return False
    raw = session.store.get(job.key)
    if raw:
        session.store.release(job.key)
        session.finish_job(job, session.read_raw(job.body, raw), paid=False)
    return not raw


def answer_free_jobs(session: AskSession, jobs: Sequence[RequestJob]) -> None:
    """Open the GGUF, answer the jobs, those with the same settings together, and close it; release all claims.

    llama.cpp runs where `options.llama` says.
    """
    path, advice = gguf_path(session.endpoint), gguf_advice(endpoint_role(session.endpoint))
    check_vocabulary(path, advice)
    alike = group_by_settings(jobs)
    group = GgufJobs(session, path, [job for some in alike for job in some], session.endpoint.context)
    hooks = ReplyHooks(
        partial(note_opened, group), partial(begin_job, group), partial(store_gguf_answer, group), session.warn
    )
    job = ReplyJob(path, tuple(prompt_group(session, some) for some in alike), advice)
    try:
        run_reply_job(job, hooks, session.options.llama)
    finally:
        for number in group.began:
            session.store.release(group.jobs[number].key)
            session.release(group.jobs[number])


def prompt_group(session: AskSession, jobs: Sequence[RequestJob]) -> PromptGroup:
    """The prompts of jobs with the same settings; each answer's seed is made of its key."""
    seeds = tuple(int.from_bytes(job.key[:4]) >> 1 for job in jobs)  # llama.cpp takes 32 set bits as a random seed
    config = generation_settings(jobs[0], session.endpoint.context, session.endpoint.concurrency)
    return PromptGroup(tuple(job.request.messages for job in jobs), seeds, config)


def note_opened(group: GgufJobs, trained: int) -> None:
    """Limit the context to the model's own; TapirError if the file that was opened is not the one that was named."""
    session = group.session
    if endpoint_identity(session.endpoint) != session.identity:  # the answers would get another GGUF's keys
        what = f"{group.gguf} was changed while this command was running"
        raise TapirError(what, where=f"{endpoint_role(session.endpoint)}.gguf", fix="Run the same command again.")
    group.context = min(group.context, trained)


def gguf_advice(role: str) -> Advice:
    """What the user can do about a GGUF that cannot be used."""
    return Advice(
        unusable=f"Check that {role}.gguf names a complete GGUF of an architecture that this llama.cpp supports.",
        too_large=f"Lower {role}.concurrency or {role}.context.",
        no_template=f"Name a GGUF of an instruct model in {role}.gguf.",
        too_heavy=f"Stop other programs that use memory, or name a GGUF with a smaller quantization in {role}.gguf.",
    )


def group_by_settings(jobs: Sequence[RequestJob]) -> list[list[RequestJob]]:
    """The jobs grouped by everything in their bodies except the messages."""
    groups: dict[bytes, list[RequestJob]] = {}
    for job in jobs:
        rest = {name: item for name, item in job.body.items() if name != "messages"}
        groups.setdefault(keys.canonical_json(rest), []).append(job)
    return list(groups.values())


def generation_settings(job: RequestJob, context: int, parallel: int) -> GenerationConfig:
    """The generation settings in a job's body, for `context` tokens and up to `parallel` answers at once."""
    form = job.body.get("response_format")
    schema = form["json_schema"]["schema"] if form else None
    return GenerationConfig(job.body["max_tokens"], context, job.body["temperature"], schema=schema, parallel=parallel)


def begin_job(group: GgufJobs, number: int) -> bool:
    """Claim a job when its turn comes; False if another process has it, or it does not fit the budget now.

    TapirError if the budget is spent.
    """
    session, job = group.session, group.jobs[number]
    if not claim_job(session, job):
        return False
    if not session.reserve(job):
        session.store.release(job.key)
        if not session.budget.has_reservations:
            raise session.over_budget_error(job)
        return False
    group.began[number] = time.monotonic()
    return True


def store_gguf_answer(group: GgufJobs, number: int, found: PromptReply) -> None:
    """Store an answer, or record why it cannot be used again; then release the job's key and set its answer."""
    session, job = group.session, group.jobs[number]
    began = group.began.get(number)  # a prompt that is too long never begins, and is not claimed
    seconds = 0.0 if began is None else time.monotonic() - began
    raw = gguf_reply(group, number, found)
    reply, stored = session.read_raw(job.body, raw)._replace(finish=found.finish), None
    if found.finish == "stop" or found.tokens == job.body["max_tokens"]:
        stored = session.store_reply(job, raw, reply, seconds)
    else:
        tokens = format_count(found.prompt_tokens, "token")
        why = f"finish {found.finish}: the prompt has {tokens}, the context {group.context:,}"
        why = found.refusal or why
        reply = reply._replace(why="" if reply.text.strip() else why)
        bill = None if began is None else session.billing.bill_for(found.prompt_tokens, found.tokens)
        session.store_attempt(job, why, raw, seconds, bill)
    if stored:
        stored.add_done_callback(lambda _: session.store.release(job.key))
    elif began is not None:
        session.store.release(job.key)
    if group.began.pop(number, None) is not None:
        session.release(job)
    session.finish_job(job, reply, paid=True)
    if not reply.text.strip() and (error := session.useless_replies_error(job, reply.why)):
        raise error


def gguf_reply(group: GgufJobs, number: int, found: PromptReply) -> bytes:
    """An answer as an OpenAI endpoint would send it."""
    made = (f"chatcmpl-{group.jobs[number].key.hex()[:24]}", int(time.time()))
    usage = (found.prompt_tokens, found.tokens)
    return orjson.dumps(build_chat_completion(found.text, group.gguf.name, finish=found.finish, made=made, usage=usage))
