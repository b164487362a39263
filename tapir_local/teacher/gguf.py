"""A GGUF on this machine as teacher or judge: answers what the store lacks, many prompts at once, with llama.cpp."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import orjson

from tapir_local.errors import TapirError
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.generate import encode_prompt, encode_prompts, open_context_for
from tapir_local.inference.model import Advice, Model, open_model, require_template, trained_context
from tapir_local.inference.scheduler import Written, answer_each
from tapir_local.inference.vocab_check import check_vocabulary
from tapir_local.store import keys
from tapir_local.store.reply import build_chat_completion
from tapir_local.teacher.endpoint import endpoint_identity, endpoint_role, gguf_path
from tapir_local.teacher.session import AskSession, RequestJob

GGUF_POLL_SECONDS = 0.5  # between checks of requests that another process is answering


@dataclass(frozen=True)
class GgufJobs:
    """Jobs answered with the same settings, their prompts as tokens, and the start time of each job in progress."""

    session: AskSession
    model: Model
    config: GenerationConfig
    jobs: Sequence[RequestJob]
    prompts: Sequence[list[int]]
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
    """Open the GGUF, answer the jobs, those with the same settings together, and close it."""
    path, role = gguf_path(session.endpoint), endpoint_role(session.endpoint)
    check_vocabulary(path, gguf_advice(role))
    with open_model(path, advice=gguf_advice(role), warn=session.warn) as model:
        if endpoint_identity(session.endpoint) != session.identity:  # the answers would get another GGUF's keys
            what = f"{path} was changed while this command was running"
            raise TapirError(what, where=f"{role}.gguf", fix="Run the same command again.")
        require_template(model)
        context = min(session.endpoint.context, trained_context(model))
        for alike in group_by_settings(jobs):
            prompts = encode_prompts(model, [job.request.messages for job in alike], session.warn)
            config = generation_settings(alike[0], context, session.endpoint.concurrency)
            answer_gguf_jobs(GgufJobs(session, model, config, alike, prompts))


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


def template_refusal(model: Model, job: RequestJob) -> str:
    """Why the chat template refuses a job's prompt."""
    try:
        encode_prompt(model, job.request.messages)
    except TapirError as error:
        return error.what
    return "the chat template renders nothing"


def answer_gguf_jobs(group: GgufJobs) -> None:
    """Answer the group's jobs, `concurrency` of them at once; claims that are left over are released."""
    seeds = [int.from_bytes(job.key[:4]) >> 1 for job in group.jobs]  # llama.cpp takes 32 set bits as a random seed
    try:
        on_answer, may_start = partial(store_gguf_answer, group), partial(begin_job, group)
        with open_context_for(group.model, group.prompts, group.config, group.session.warn) as (engine, _):
            answer_each(engine, group.prompts, on_answer, group.config, seeds, may_start)
    finally:
        for number in group.began:
            group.session.store.release(group.jobs[number].key)
            group.session.release(group.jobs[number])


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


def store_gguf_answer(group: GgufJobs, number: int, written: Written) -> None:
    """Store an answer, or record why it cannot be used again; then release the job's key and set its answer."""
    session, job = group.session, group.jobs[number]
    counts = (len(group.prompts[number]), len(written.tokens))
    began = group.began.get(number)  # a prompt that is too long never begins, and is not claimed
    seconds = 0.0 if began is None else time.monotonic() - began
    refused = not group.prompts[number]
    finish = "refused" if refused else written.finish
    raw = gguf_reply(group, number, written, finish)
    reply, stored = session.read_raw(job.body, raw)._replace(finish=finish), None
    if written.finish == "stop" or len(written.tokens) == group.config.max_tokens:
        stored = session.store_reply(job, raw, reply, seconds)
    else:
        why = f"finish {finish}: the prompt has {counts[0]:,} tokens, the context {group.config.context:,}"
        why = template_refusal(group.model, job) if refused else why
        reply = reply._replace(why="" if reply.text.strip() else why)
        session.store_attempt(job, why, raw, seconds, None if began is None else session.billing.bill_for(*counts))
    if stored:
        stored.add_done_callback(lambda _: session.store.release(job.key))
    elif began is not None:
        session.store.release(job.key)
    if group.began.pop(number, None) is not None:
        session.release(job)
    session.finish_job(job, reply, paid=True)
    if not reply.text.strip() and (error := session.useless_replies_error(job, reply.why)):
        raise error


def gguf_reply(group: GgufJobs, number: int, written: Written, finish: str) -> bytes:
    """An answer as an OpenAI endpoint would send it."""
    made = (f"chatcmpl-{group.jobs[number].key.hex()[:24]}", int(time.time()))
    usage = (len(group.prompts[number]), len(written.tokens))
    text, name = written.text(group.model), group.model.gguf.name
    return orjson.dumps(build_chat_completion(text, name, finish=finish, made=made, usage=usage))
