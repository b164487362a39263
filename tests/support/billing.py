"""A server on loopback that keeps its own bill: all its work is billed, whether or not the reply arrives."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from threading import Lock
from typing import Any

from server import Server, dropped, send

from tapir_local.recipe.endpoints import Price
from tapir_local.teacher.budget import Cost

PRICE = Price(input=2.0, output=8.0)
LATE = 0.3  # seconds that a late reply takes, longer than the tests wait
WORDS = "an answer of some words, made up of this and that "

Handler = BaseHTTPRequestHandler
Behavior = Callable[["Biller", Handler, dict[str, Any]], None]


@dataclass
class Biller:
    """The bill: calls, tokens, and what they cost at PRICE. `chance` decides how much is generated."""

    chance: random.Random = field(default_factory=lambda: random.Random(1))
    tokens_in: int = 0
    tokens_out: int = 0
    calls: int = 0
    lock: Lock = field(default_factory=Lock)

    @property
    def cost(self) -> Cost:
        money = (self.tokens_in * PRICE.input + self.tokens_out * PRICE.output) / 1e6
        return Cost(self.calls, self.tokens_in + self.tokens_out, money)

    def work(self, body: dict[str, Any], least: int = 1) -> tuple[int, int]:
        """Work on a request: (prompt, generated) tokens, which are billed."""
        prompt = sum(len(turn["content"].encode()) // 3 + 8 for turn in body["messages"])
        most = body.get("max_tokens") or body["max_completion_tokens"]
        with self.lock:
            written = self.chance.randint(min(least, most), most)
            self.calls += 1
            self.tokens_in += prompt
            self.tokens_out += written
        return prompt, written


def usage(prompt: int, written: int, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written, **more}


def reply(handler: Handler, counts: Any, text: str = WORDS, finish: str = "stop") -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    body = {"object": "chat.completion", "model": "m-1", "choices": [choice]}
    send(handler, 200, body if counts is Ellipsis else {**body, "usage": counts})


def answering(counts: Callable[[int, int], Any], least: int = 1, **fields: Any) -> Behavior:
    """Send a complete answer whose usage is computed by `counts`."""

    def behave(biller: Biller, handler: Handler, body: dict[str, Any]) -> None:
        reply(handler, counts(*biller.work(body, least)), **fields)

    return behave


def worked_then(fault: Callable[[Handler], None]) -> Behavior:
    """Do the work, then fail to answer."""

    def behave(biller: Biller, handler: Handler, body: dict[str, Any]) -> None:
        biller.work(body)
        fault(handler)

    return behave


def refused(status: int, **headers: str) -> Behavior:
    """Refuse before any work."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda biller, handler, body: send(handler, status, {"error": {"message": "no"}}, named)


def late(handler: Handler) -> None:
    time.sleep(LATE)
    reply(handler, usage(9, 9))


def broken_body(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.close()


def failing(status: int) -> Behavior:
    return worked_then(lambda handler: send(handler, status, {"error": {"message": "failed after the work"}}))


HALF = 2  # divisor: the part of the generated tokens that is hidden reasoning

BEHAVIOURS: dict[str, Behavior] = {
    "answers": answering(usage),
    "late": worked_then(late),
    "connection breaks": worked_then(lambda handler: dropped(handler, {})),
    "reply breaks": worked_then(broken_body),
    "unreadable": worked_then(lambda handler: send(handler, 200, b'{"choices": [{"mess')),
    "a web page": worked_then(lambda handler: send(handler, 200, b"<html>busy</html>")),
    "no choices": worked_then(lambda handler: send(handler, 200, {"choices": [], "usage": usage(9, 9)})),
    "usage null": answering(lambda prompt, written: None),
    "usage absent": answering(lambda prompt, written: Ellipsis),
    "usage zero": answering(lambda prompt, written: usage(0, 0)),
    "generated zero": answering(lambda prompt, written: usage(prompt, 0)),
    "usage 2**62": answering(lambda prompt, written: usage(2**62, 2**62)),
    "usage negative": answering(lambda prompt, written: usage(prompt, -written)),
    "usage in words": answering(lambda prompt, written: usage(prompt, "many")),  # type: ignore[arg-type]
    "usage infinite": answering(lambda prompt, written: usage(prompt, 1e300)),  # type: ignore[arg-type]
    "usage a list": answering(lambda prompt, written: [prompt, written]),
    "reasoning in the total alone": answering(
        lambda prompt, written: {**usage(prompt, written), "completion_tokens": written // HALF}
    ),
    "reasoning beside": answering(
        lambda prompt, written: {
            "prompt_tokens": prompt,
            "completion_tokens": written // HALF,
            "completion_tokens_details": {"reasoning_tokens": written - written // HALF},
        }
    ),
    "reasoning beside, more than the answer": answering(
        lambda prompt, written: usage(
            prompt, written // 4, completion_tokens_details={"reasoning_tokens": written - written // 4}
        ),
        least=9,
    ),
    "cached beside": answering(
        lambda prompt, written: {
            "input_tokens": 3,
            "cache_read_input_tokens": prompt - 5,
            "cache_creation_input_tokens": 2,
            "output_tokens": written,
        }
    ),
    "cached apart": answering(
        lambda prompt, written: usage(3, written, prompt_tokens_details={"cached_tokens": prompt - 3})
    ),
    "hits and misses": answering(
        lambda prompt, written: {
            "prompt_cache_hit_tokens": prompt - 1,
            "prompt_cache_miss_tokens": 1,
            "completion_tokens": written,
        }
    ),
    "empty": answering(usage, text=""),
    "cut": answering(usage, least=10**6, finish="length"),
    "cut and empty": answering(lambda prompt, written: None, text="", finish="length"),
    "filtered": answering(usage, text="", finish="content_filter"),
    "500 after work": failing(500),
    "502 after work": failing(502),
    "503 after work": failing(503),
    "504 after work": failing(504),
    "408 after work": failing(408),
    "429": refused(429, retry_after="0.01"),
    "503 with a time": refused(503, retry_after="0.01"),
    "400": refused(400),
}


def behaving(server: Server, biller: Biller, *behaviours: Behavior, seed: int = 1) -> None:
    """Let the server do one of these behaviors, drawn at random for each request."""
    chance = random.Random(seed)
    server.otherwise = lambda handler, body: chance.choice(behaviours)(biller, handler, body)
