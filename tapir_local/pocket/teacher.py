"""The embedded teacher: a program, not an LLM, that answers OpenAI chat requests about the pocket world exactly.

It takes the place of a real teacher: it reads the messages that prompts.py makes and replies in the API's wire format,
so that the client, the store and the parsers are the real ones. It knows nothing outside its world, and says so.
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
    JUDGE_TURN,
    RARER,
    REFINE,
    REFLECT_ANSWER,
    REFLECT_INSTRUCTION,
)
from tapir_local.pocket.world import (
    draw_harder,
    draw_rarer,
    draw_variant,
    grade_answer,
    parse_problem,
    solve_instruction,
)
from tapir_local.store.reply import build_chat_completion

POCKET_TEACHER_MODEL = "pocket-teacher"
FINGERPRINT = "pocket-1"  # raise it with every change of the replies
OUTSIDE_WORLD_REPLY = "I am a small programme that knows only the pocket world, and this is not part of it."


class BadRequest(ValueError):
    """The request is not valid for the API; the text says why."""


def text_in_tag(tag: str, text: str) -> str:
    """The text between <tag> and </tag>; prompts.fenced has removed these tags from the text itself."""
    _, opened, rest = text.partition(f"<{tag}>\n")
    inside, closed, _ = rest.partition(f"\n</{tag}>")
    if not (opened and closed):
        raise BadRequest(f"the message has no <{tag}>")
    return inside


def reply_to_classify(asked: str, rng: Random) -> str:
    """{"task": label}; Others for a problem outside the pocket world, or if the request does not offer its label."""
    problem = parse_problem(text_in_tag("instruction", asked))
    offered = {line.partition(":")[0] for line in text_in_tag("tasks", asked).splitlines()}
    label = problem.family.task if problem else "Others"
    return json.dumps({"task": label if label in offered else "Others"})


def reply_to_judge(asked: str, rng: Random) -> str:
    """{"answer_1": x, "answer_2": y}, each graded by itself, so that their order makes no difference."""
    instruction = text_in_tag("instruction", asked)
    return json.dumps({tag: grade_answer(instruction, text_in_tag(tag, asked)) for tag in ("answer_1", "answer_2")})


def reply_to_judge_single(asked: str, rng: Random) -> str:
    """{"score": x}, the grade that `reply_to_judge` gives the same answer beside any other; a reference is ignored."""
    return json.dumps({"score": grade_answer(text_in_tag("instruction", asked), text_in_tag("answer", asked))})


def reply_to_expand(asked: str, rng: Random) -> str:
    """A new instruction of the same family and of similar size."""
    problem = parse_problem(text_in_tag("instruction", asked))
    return (
        f"<new_instruction>\n{draw_variant(problem, rng).instruction}\n</new_instruction>"
        if problem
        else OUTSIDE_WORLD_REPLY
    )


def reply_to_check(asked: str, rng: Random) -> str:
    """Whether an instruction belongs to the pocket world and to the named task."""
    problem = parse_problem(text_in_tag("instruction", asked))
    label = text_in_tag("task", asked).partition(":")[0]
    known = problem is not None
    return json.dumps(
        {"complete": known, "answerable": known, "of_task": problem is not None and problem.family.task == label}
    )


def reply_to_expand_rarer(asked: str, rng: Random) -> str:
    """A new instruction of the same task and another family."""
    problem = parse_problem(text_in_tag("instruction", asked))
    return (
        f"<new_instruction>\n{draw_rarer(problem, rng).instruction}\n</new_instruction>"
        if problem
        else OUTSIDE_WORLD_REPLY
    )


def reply_to_reflect_instruction(asked: str, rng: Random) -> str:
    """A harder instruction of the same family, and its answer in style."""
    problem = parse_problem(text_in_tag("instruction", asked))
    if not problem:
        return OUTSIDE_WORLD_REPLY
    new = draw_harder(problem, rng)
    return (
        f"The instruction could ask for more.\n<new_instruction>\n{new.instruction}\n</new_instruction>\n"
        f"<new_answer>\n{new.solution.styled}\n</new_answer>"
    )


def reply_to_refine(asked: str, rng: Random) -> str:
    """The answer in its task's style; the draft makes no difference."""
    solution = solve_instruction(text_in_tag("instruction", asked))
    return solution.styled if solution else OUTSIDE_WORLD_REPLY


REPLIES_BY_SYSTEM_PROMPT: Mapping[str, Callable[[str, Random], str]] = {
    CLASSIFY: reply_to_classify,
    JUDGE: reply_to_judge,
    JUDGE_SINGLE: reply_to_judge_single,
    JUDGE_TURN: reply_to_judge_single,
    EXPAND: reply_to_expand,
    CHECK: reply_to_check,
    RARER: reply_to_expand_rarer,
    REFLECT_INSTRUCTION: reply_to_reflect_instruction,
    REFLECT_ANSWER: reply_to_refine,
    REFINE: reply_to_refine,
}


def plain_answer(messages: Sequence[Mapping[str, str]]) -> str:
    """The plain answer to the last user message."""
    solution = solve_instruction(next(turn["content"] for turn in reversed(messages) if turn["role"] == "user"))
    return solution.plain if solution else OUTSIDE_WORLD_REPLY


def reply_to_request(body: Mapping[str, Any]) -> str:
    """The teacher's reply to a request. A pure function: random draws are seeded by the whole body, `seed` included."""
    messages = checked_messages(body)
    job = REPLIES_BY_SYSTEM_PROMPT.get(messages[0]["content"]) if messages[0]["role"] == "system" else None
    if job is None:
        return plain_answer(messages)
    asked = next(turn["content"] for turn in messages if turn["role"] == "user")
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return job(asked, Random(digest))


def checked_messages(body: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    """The messages of a request; BadRequest unless they are valid and one is a user's."""
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


def chat_completion_object(body: Mapping[str, Any]) -> dict[str, Any]:
    """The API's chat.completion object; a token is counted as four bytes."""
    text = reply_to_request(body)
    asked = sum(len(turn["content"].encode()) // 4 + 1 for turn in body["messages"])
    written = len(text.encode()) // 4 + 1
    made_id = f"chatcmpl-{hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:24]}"
    found = build_chat_completion(
        text, POCKET_TEACHER_MODEL, made=(made_id, 0), fingerprint=FINGERPRINT, usage=(asked, written)
    )
    found["choices"][0]["logprobs"] = None
    return found


def error_response(status: int, why: str) -> httpx2.Response:
    """An error response in the API's format."""
    return httpx2.Response(
        status, json={"error": {"message": why, "type": "invalid_request_error", "param": None, "code": None}}
    )


def respond(method: str, path: str, content: bytes) -> httpx2.Response:
    """The teacher's response to an HTTP request."""
    if method != "POST" or not path.endswith("/chat/completions"):
        return error_response(404, f"{method} {path}: the pocket teacher knows only POST …/chat/completions")
    try:
        body = json.loads(content)
    except ValueError as error:
        return error_response(400, f"the body is not JSON: {error}")
    if not isinstance(body, dict):
        return error_response(400, "the body must be a JSON object")
    try:
        return httpx2.Response(200, json=chat_completion_object(body))
    except BadRequest as error:
        return error_response(400, str(error))


class PocketTransport(httpx2.AsyncBaseTransport, httpx2.BaseTransport):
    """A transport for httpx2.AsyncClient or httpx2.Client, which the openai client takes as `http_client`."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return respond(request.method, request.url.path, await request.aread())

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return respond(request.method, request.url.path, request.read())
