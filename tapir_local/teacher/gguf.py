"""A GGUF on this machine as teacher or judge: answers what the store lacks, many at once, with llama.cpp."""

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
from tapir_local.teacher.endpoint import endpoint_identity, endpoint_role, gguf_path
from tapir_local.teacher.session import AskSession, RequestJob

GGUF_POLL_SECONDS = 0.5  # seconds between looks at requests that another process is answering


@dataclass(frozen=True)
class GgufJobs:
    """Jobs answered with the same settings, their prompts as tokens, and since when each of those under way is."""

    asking: AskSession
    model: Model
    config: GenerationConfig
    jobs: Sequence[RequestJob]
    prompts: Sequence[list[int]]
    began: dict[int, float] = field(default_factory=dict)


def answer_with_gguf(asking: AskSession, jobs: Sequence[RequestJob]) -> None:
    """Answer the jobs by the endpoint's GGUF; each answer goes into the store as soon as it is done.

    What another process is answering is left to it and then taken from the store. An answer is drawn with a seed made
    of its key: but for near ties it is the same whenever and beside whatever it is written. A prompt that leaves no
    room in the context has no answer (finish `too_long`), nor has one that the chat template refuses (`refused`), and
    one cut by the context's end (`length`) would end otherwise in a larger one: none is stored, all are noted as
    attempts. TapirError when the GGUF cannot be opened or has no template; what was answered before is stored.
    """
    while jobs:
        free = [job for job in jobs if is_job_free(asking, job)]
        if free:
            answer_free_jobs(asking, free)
        jobs = [job for job in jobs if asking.answers[job.places[0]] is None]
        if jobs:
            time.sleep(GGUF_POLL_SECONDS)


def is_job_free(asking: AskSession, job: RequestJob) -> bool:
    """Whether nobody is answering the job; one that was answered meanwhile is served."""
    free = claim_job(asking, job)
    if free:
        asking.store.release(job.key)
    return free


def claim_job(asking: AskSession, job: RequestJob) -> bool:
    """True when the job is ours to answer now: not another's, nor answered meanwhile, in which case it is served."""
    if not asking.store.claim(job.key):
        return False
    raw = asking.store.get(job.key)
    if raw:
        asking.store.release(job.key)
        asking.finish(job, asking.read(job.body, raw), paid=False)
    return not raw


def answer_free_jobs(asking: AskSession, jobs: Sequence[RequestJob]) -> None:
    """Open the GGUF, answer the jobs, those of one manner together, and close it."""
    path, role = gguf_path(asking.endpoint), endpoint_role(asking.endpoint)
    check_vocabulary(path, gguf_advice(role))
    with open_model(path, advice=gguf_advice(role), warn=asking.warn) as model:
        if endpoint_identity(asking.endpoint) != asking.identity:  # its answers would be kept under another's keys
            raise TapirError(f"{path} was changed meanwhile", where=f"{role}.gguf", fix="Run the same command again.")
        require_template(model)
        context = min(asking.endpoint.context, trained_context(model))
        for alike in group_by_settings(jobs):
            prompts = encode_prompts(model, [job.request.messages for job in alike], asking.warn)
            config = generation_config(alike[0], context, asking.endpoint.concurrency)
            answer_gguf_jobs(GgufJobs(asking, model, config, alike, prompts))


def gguf_advice(role: str) -> Advice:
    """What the user can do about a GGUF that is not of this program's making."""
    return Advice(
        unusable=f"See that {role}.gguf names a whole GGUF of a kind that this llama.cpp knows.",
        too_large=f"Set {role}.concurrency or {role}.context lower.",
        no_template=f"Name a GGUF of an instruct model in {role}.gguf.",
        too_heavy=f"Stop what else holds memory, or name a GGUF of a smaller quantisation in {role}.gguf.",
    )


def group_by_settings(jobs: Sequence[RequestJob]) -> list[list[RequestJob]]:
    """The jobs by all that their bodies ask besides the messages."""
    groups: dict[bytes, list[RequestJob]] = {}
    for job in jobs:
        rest = {name: item for name, item in job.body.items() if name != "messages"}
        groups.setdefault(keys.canonical_json(rest), []).append(job)
    return list(groups.values())


def generation_config(job: RequestJob, context: int, parallel: int) -> GenerationConfig:
    """The settings of a job's body, for a context of `context` tokens and at most `parallel` answers at once."""
    form = job.body.get("response_format")
    schema = form["json_schema"]["schema"] if form else None
    return GenerationConfig(job.body["max_tokens"], context, job.body["temperature"], schema=schema, parallel=parallel)


def template_refusal(model: Model, job: RequestJob) -> str:
    """Why the chat template refuses a job's prompt."""
    try:
        encode_prompt(model, job.request.messages)
    except TapirError as error:
        return error.what
    return "the chat template writes nothing"


def answer_gguf_jobs(group: GgufJobs) -> None:
    """Answer the group's jobs, so many at once as the recipe says; claims that are left over are given up."""
    seeds = [int.from_bytes(job.key[:4]) >> 1 for job in group.jobs]  # 32 bits all set mean chance to llama.cpp
    try:
        with open_context_for(group.model, group.prompts, group.config, group.asking.warn) as (engine, _):
            answer_each(
                engine, group.prompts, partial(store_gguf_answer, group), group.config, seeds, partial(begin_job, group)
            )
    finally:
        for number in group.began:
            group.asking.store.release(group.jobs[number].key)
            group.asking.release(group.jobs[number])


def begin_job(group: GgufJobs, number: int) -> bool:
    """Claim a job as its turn comes; False where it is another's by now, or the budget has no room for it just now.

    TapirError when the budget is spent.
    """
    asking, job = group.asking, group.jobs[number]
    if not claim_job(asking, job):
        return False
    if not asking.reserve(job):
        asking.store.release(job.key)
        if not asking.purse.waiting:
            raise asking.over_budget(job)
        return False
    group.began[number] = time.monotonic()
    return True


def store_gguf_answer(group: GgufJobs, number: int, written: Written) -> None:
    """Store an answer, or note why it cannot serve again; then let others have the key, and serve it."""
    asking, job = group.asking, group.jobs[number]
    counts = (len(group.prompts[number]), len(written.tokens))
    began = group.began.get(number)  # a prompt that is too long never began, and is not claimed
    seconds = 0.0 if began is None else time.monotonic() - began
    refused = not group.prompts[number]
    finish = "refused" if refused else written.finish
    raw = completion(job, group.model.gguf.name, written.text(group.model), finish, counts)
    reply, kept = asking.read(job.body, raw)._replace(finish=finish), None
    if written.finish == "stop" or len(written.tokens) == group.config.max_tokens:
        kept = asking.keep(job, raw, reply, seconds)
    else:
        why = f"finish {finish}: the prompt has {counts[0]:,} tokens, the context {group.config.context:,}"
        why = template_refusal(group.model, job) if refused else why
        reply = reply._replace(why="" if reply.text.strip() else why)
        asking.note(job, why, raw, seconds, None if began is None else asking.account.priced(*counts))
    if kept:
        kept.add_done_callback(lambda _: asking.store.release(job.key))
    elif began is not None:
        asking.store.release(job.key)
    if group.began.pop(number, None) is not None:
        asking.release(job)
    asking.finish(job, reply, paid=True)
    if not reply.text.strip() and (error := asking.hopeless(job, reply.why)):
        raise error


def completion(job: RequestJob, model: str, text: str, finish: str, counts: tuple[int, int]) -> bytes:
    """The answer as an OpenAI endpoint would send it; `counts` are the prompt's and the answer's tokens."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*counts, sum(counts)), strict=True))
    head = {"id": f"chatcmpl-{job.key.hex()[:24]}", "object": "chat.completion", "created": int(time.time())}
    return orjson.dumps({**head, "model": model, "choices": [choice], "usage": usage})
