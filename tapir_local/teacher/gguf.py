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
from tapir_local.teacher.endpoint import gguf_of, identity_of, role_of
from tapir_local.teacher.session import Asking, Job

ASKED_ELSEWHERE = 0.5  # seconds between looks at requests that another process is answering


@dataclass(frozen=True)
class Group:
    """Jobs answered with the same settings, their prompts as tokens, and since when each of those under way is."""

    asking: Asking
    model: Model
    config: GenerationConfig
    jobs: Sequence[Job]
    prompts: Sequence[list[int]]
    began: dict[int, float] = field(default_factory=dict)


def answer_here(asking: Asking, jobs: Sequence[Job]) -> None:
    """Answer the jobs by the endpoint's GGUF; each answer goes into the store as soon as it is done.

    What another process is answering is left to it and then taken from the store. An answer is drawn with a seed made
    of its key: but for near ties it is the same whenever and beside whatever it is written. A prompt that leaves no
    room in the context has no answer (finish `too_long`), nor has one that the chat template refuses (`refused`), and
    one cut by the context's end (`length`) would end otherwise in a larger one: none is stored, all are noted as
    attempts. TapirError when the GGUF cannot be opened or has no template; what was answered before is stored.
    """
    while jobs:
        free = [job for job in jobs if is_free(asking, job)]
        if free:
            answer_free(asking, free)
        jobs = [job for job in jobs if asking.answers[job.places[0]] is None]
        if jobs:
            time.sleep(ASKED_ELSEWHERE)


def is_free(asking: Asking, job: Job) -> bool:
    """Whether nobody is answering the job; one that was answered meanwhile is served."""
    free = claim(asking, job)
    if free:
        asking.store.release(job.key)
    return free


def claim(asking: Asking, job: Job) -> bool:
    """True when the job is ours to answer now: not another's, nor answered meanwhile, in which case it is served."""
    if not asking.store.claim(job.key):
        return False
    raw = asking.store.get(job.key)
    if raw:
        asking.store.release(job.key)
        asking.finish(job, asking.read(job.body, raw), paid=False)
    return not raw


def answer_free(asking: Asking, jobs: Sequence[Job]) -> None:
    """Open the GGUF, answer the jobs, those of one manner together, and close it."""
    path, role = gguf_of(asking.endpoint), role_of(asking.endpoint)
    check_vocabulary(path, advice(role))
    with open_model(path, advice=advice(role), warn=asking.warn) as model:
        if identity_of(asking.endpoint) != asking.identity:  # its answers would be kept under another's keys
            raise TapirError(f"{path} was changed meanwhile", where=f"{role}.gguf", fix="Run the same command again.")
        require_template(model)
        context = min(asking.endpoint.context, trained_context(model))
        for alike in grouped(jobs):
            prompts = encode_prompts(model, [job.request.messages for job in alike], asking.warn)
            config = generation_config(alike[0], context, asking.endpoint.concurrency)
            answer_group(Group(asking, model, config, alike, prompts))


def advice(role: str) -> Advice:
    """What the user can do about a GGUF that is not of this program's making."""
    return Advice(
        unusable=f"See that {role}.gguf names a whole GGUF of a kind that this llama.cpp knows.",
        too_large=f"Set {role}.concurrency or {role}.context lower.",
        no_template=f"Name a GGUF of an instruct model in {role}.gguf.",
        too_heavy=f"Stop what else holds memory, or name a GGUF of a smaller quantisation in {role}.gguf.",
    )


def grouped(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs by all that their bodies ask besides the messages."""
    groups: dict[bytes, list[Job]] = {}
    for job in jobs:
        rest = {name: item for name, item in job.body.items() if name != "messages"}
        groups.setdefault(keys.canonical_json(rest), []).append(job)
    return list(groups.values())


def generation_config(job: Job, context: int, parallel: int) -> GenerationConfig:
    """The settings of a job's body, for a context of `context` tokens and at most `parallel` answers at once."""
    form = job.body.get("response_format")
    schema = form["json_schema"]["schema"] if form else None
    return GenerationConfig(job.body["max_tokens"], context, job.body["temperature"], schema=schema, parallel=parallel)


def refusal_of(model: Model, job: Job) -> str:
    """Why the chat template refuses a job's prompt."""
    try:
        encode_prompt(model, job.request.messages)
    except TapirError as error:
        return error.what
    return "the chat template writes nothing"


def answer_group(group: Group) -> None:
    """Answer the group's jobs, so many at once as the recipe says; claims that are left over are given up."""
    seeds = [int.from_bytes(job.key[:4]) >> 1 for job in group.jobs]  # 32 bits all set mean chance to llama.cpp
    try:
        with open_context_for(group.model, group.prompts, group.config, group.asking.warn) as (engine, _):
            answer_each(engine, group.prompts, partial(keep, group), group.config, seeds, partial(begin, group))
    finally:
        for number in group.began:
            group.asking.store.release(group.jobs[number].key)
            group.asking.release(group.jobs[number])


def begin(group: Group, number: int) -> bool:
    """Claim a job as its turn comes; False where it is another's by now, or the budget has no room for it just now.

    TapirError when the budget is spent.
    """
    asking, job = group.asking, group.jobs[number]
    if not claim(asking, job):
        return False
    if not asking.reserve(job):
        asking.store.release(job.key)
        if not asking.purse.waiting:
            raise asking.over_budget(job)
        return False
    group.began[number] = time.monotonic()
    return True


def keep(group: Group, number: int, written: Written) -> None:
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
        why = refusal_of(group.model, job) if refused else why
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


def completion(job: Job, model: str, text: str, finish: str, counts: tuple[int, int]) -> bytes:
    """The answer as an OpenAI endpoint would send it; `counts` are the prompt's and the answer's tokens."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*counts, sum(counts)), strict=True))
    head = {"id": f"chatcmpl-{job.key.hex()[:24]}", "object": "chat.completion", "created": int(time.time())}
    return orjson.dumps({**head, "model": model, "choices": [choice], "usage": usage})
