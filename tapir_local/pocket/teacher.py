"""The embedded teacher: a programme, not an LLM, that answers OpenAI chat requests about the pocket world exactly.

It stands where a real teacher stands: it reads the very messages that prompts.py makes and replies on the wire format
of the API, so that all between, client, store and parsers, is the real thing. Outside its world it knows nothing, and
says so.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import httpx2

from tapir_local.method.prompts import (
    CHECK,
    CLASSIFY,
    EXPAND,
    JUDGE,
    JUDGE_SINGLE,
    RARER,
    REFINE,
    REFLECT_ANSWER,
    REFLECT_INSTRUCTION,
)
from tapir_local.pocket.world import grade, harder, parse, rarer, solve, variant
from tapir_local.store.reply import build_chat_completion

MODEL = "pocket-teacher"
FINGERPRINT = "pocket-1"  # to be raised with every change of what the teacher says
IGNORANCE = "I am a small programme that knows only the pocket world, and this is not part of it."


class BadRequest(ValueError):
    """The request is not one of the API; the text says why."""


def enclosed(tag: str, text: str) -> str:
    """What stands between <tag> and </tag>; prompts.fenced has kept these tags out of it."""
    _, begun, rest = text.partition(f"<{tag}>\n")
    inside, ended, _ = rest.partition(f"\n</{tag}>")
    if not (begun and ended):
        raise BadRequest(f"the message has no <{tag}>")
    return inside


def classify(asked: str, rng: Random) -> str:
    """{"task": label}; Others for what is not of the pocket world, or has a label that the request does not offer."""
    problem = parse(enclosed("instruction", asked))
    offered = {line.partition(":")[0] for line in enclosed("tasks", asked).splitlines()}
    label = problem.family.task if problem else "Others"
    return json.dumps({"task": label if label in offered else "Others"})


def judge(asked: str, rng: Random) -> str:
    """{"answer_1": x, "answer_2": y}, each graded by itself, so that their order means nothing."""
    instruction = enclosed("instruction", asked)
    return json.dumps({tag: grade(instruction, enclosed(tag, asked)) for tag in ("answer_1", "answer_2")})


def judge_single(asked: str, rng: Random) -> str:
    """{"score": x}: the grade that `judge` gives the same answer beside any other."""
    return json.dumps({"score": grade(enclosed("instruction", asked), enclosed("answer", asked))})


def expand(asked: str, rng: Random) -> str:
    """A new instruction of the same family and about the same size."""
    problem = parse(enclosed("instruction", asked))
    return f"<new_instruction>\n{variant(problem, rng).instruction}\n</new_instruction>" if problem else IGNORANCE


def check_draft(asked: str, rng: Random) -> str:
    """Whether an instruction is of the pocket world, and of the task named."""
    problem = parse(enclosed("instruction", asked))
    label = enclosed("task", asked).partition(":")[0]
    known = problem is not None
    return json.dumps(
        {"complete": known, "answerable": known, "of_task": problem is not None and problem.family.task == label}
    )


def rarer_one(asked: str, rng: Random) -> str:
    """A new instruction of the same task and another family."""
    problem = parse(enclosed("instruction", asked))
    return f"<new_instruction>\n{rarer(problem, rng).instruction}\n</new_instruction>" if problem else IGNORANCE


def rewrite(asked: str, rng: Random) -> str:
    """A harder instruction of the same family, and its answer in style."""
    problem = parse(enclosed("instruction", asked))
    if not problem:
        return IGNORANCE
    new = harder(problem, rng)
    return (
        f"The instruction could ask for more.\n<new_instruction>\n{new.instruction}\n</new_instruction>\n"
        f"<new_answer>\n{new.solution.styled}\n</new_answer>"
    )


def refine(asked: str, rng: Random) -> str:
    """The answer in its task's style; a draft, right or wrong, makes no difference."""
    solution = solve(enclosed("instruction", asked))
    return solution.styled if solution else IGNORANCE


JOBS: Mapping[str, Callable[[str, Random], str]] = {
    CLASSIFY: classify,
    JUDGE: judge,
    JUDGE_SINGLE: judge_single,
    EXPAND: expand,
    CHECK: check_draft,
    RARER: rarer_one,
    REFLECT_INSTRUCTION: rewrite,
    REFLECT_ANSWER: refine,
    REFINE: refine,
}


def plain(messages: Sequence[Mapping[str, str]]) -> str:
    """The bare answer to the last thing a user said."""
    solution = solve(next(turn["content"] for turn in reversed(messages) if turn["role"] == "user"))
    return solution.plain if solution else IGNORANCE


def answer(body: Mapping[str, Any]) -> str:
    """What the teacher says to a request. A pure function: chance is drawn from the body itself, `seed` and all."""
    messages = messages_of(body)
    job = JOBS.get(messages[0]["content"]) if messages[0]["role"] == "system" else None
    if job is None:
        return plain(messages)
    asked = next(turn["content"] for turn in messages if turn["role"] == "user")
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return job(asked, Random(digest))


def messages_of(body: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    """The messages, found to be such, a user's turn among them; BadRequest if not."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message")
    for turn in messages:
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
            raise BadRequest("each message must have a role and a content, both text")
    if not any(turn["role"] == "user" for turn in messages):
        raise BadRequest("there must be a user's message")
    if body.get("stream") or body.get("n", 1) != 1:
        raise BadRequest("the pocket teacher gives one answer, whole")
    return messages


def completion(body: Mapping[str, Any]) -> dict[str, Any]:
    """The API's chat.completion object. Tokens are counted as four bytes each."""
    text = answer(body)
    asked = sum(len(turn["content"].encode()) // 4 + 1 for turn in body["messages"])
    written = len(text.encode()) // 4 + 1
    made_id = f"chatcmpl-{hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:24]}"
    found = build_chat_completion(text, MODEL, made=(made_id, 0), fingerprint=FINGERPRINT, usage=(asked, written))
    found["choices"][0]["logprobs"] = None
    return found


def refused(status: int, why: str) -> httpx2.Response:
    """An error in the API's form."""
    return httpx2.Response(
        status, json={"error": {"message": why, "type": "invalid_request_error", "param": None, "code": None}}
    )


def respond(method: str, path: str, content: bytes) -> httpx2.Response:
    """The teacher's response to an HTTP request."""
    if method != "POST" or not path.endswith("/chat/completions"):
        return refused(404, f"{method} {path}: the pocket teacher knows only POST …/chat/completions")
    try:
        body = json.loads(content)
    except ValueError as error:
        return refused(400, f"the body is not JSON: {error}")
    if not isinstance(body, dict):
        return refused(400, "the body must be a JSON object")
    try:
        return httpx2.Response(200, json=completion(body))
    except BadRequest as error:
        return refused(400, str(error))


class PocketTransport(httpx2.AsyncBaseTransport, httpx2.BaseTransport):
    """Give it to httpx2.AsyncClient or httpx2.Client as `transport`, and that to the openai client as `http_client`."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return respond(request.method, request.url.path, await request.aread())

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return respond(request.method, request.url.path, request.read())
