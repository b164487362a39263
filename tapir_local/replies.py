"""What came back from an endpoint, read: an answer, a reason to try again, or a reason to stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import orjson

from tapir_local.usage import counts_of

BRIEF = 300  # characters of a server's message that are worth reading
AGAIN = frozenset({408, 409, 425})  # besides 429 and 5xx: the server had no time, or a lock in the way
ENDED = frozenset({"eos", "end_turn", "stop_sequence"})  # other servers' words for "stop"


class Reply(NamedTuple):
    """A chat completion. `finish` is `stop`, `length`, `content_filter`, or the server's own word, "" for none."""

    text: str
    finish: str
    model: str
    fingerprint: str
    tokens_in: int
    tokens_out: int

    @property
    def keeps(self) -> bool:
        """Whether it may serve the same request again: whole, or cut at this very max_tokens, and not empty."""
        return self.finish in ("stop", "length") and bool(self.text.strip())


def read_reply(raw: bytes) -> Reply:
    """The first choice of a chat completion; ValueError when the bytes are none."""
    body = orjson.loads(raw)
    try:
        choice = body["choices"][0]
        message = choice["message"]
        text = text_of(message.get("content"))
        refused = message.get("refusal") and not text
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not a chat completion: {raw[:BRIEF]!r}") from error
    finish = str(choice.get("finish_reason") or "")
    return Reply(
        text,
        "content_filter" if refused else "stop" if finish in ENDED else finish,
        str(body.get("model") or ""),
        str(body.get("system_fingerprint") or ""),
        *counts_of(body.get("usage")),
    )


def text_of(content: Any) -> str:
    """The text of a message: a string, or the text parts of a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return "" if content is None else str(content)


class Trouble(NamedTuple):
    """Why there is no answer, and what follows.

    `then`: "again" costs an attempt; "wait" does not; "filtered" is the server's last word on this row; "stop" is
    trouble for every row. `wait` are the seconds that the server asks for, `what` and `fix` for a TapirError.
    """

    then: Literal["again", "wait", "filtered", "stop"]
    why: str
    body: bytes = b""
    fix: str = "Run the same command again: nothing paid for is lost."
    headers: Mapping[str, str] = {}


def said(response: Any) -> tuple[str, str]:
    """The (message, code) in the body of an error, whatever its shape."""
    try:
        body = orjson.loads(response.content)
    except ValueError:
        return response.text[:BRIEF].strip(), ""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error)[:BRIEF], ""
    code = str(error.get("code") or error.get("type") or "")
    return str(error.get("message") or error.get("detail") or error)[:BRIEF], code


def trouble_of(response: Any, key_place: str, model: str) -> Trouble:
    """What an error status means. `key_place` says where the key came from.

    `response` is httpx2's, or one of the likes: status_code, content, text, headers.
    """
    status, (message, code) = response.status_code, said(response)
    why = f"{status}: {message}" if message else str(status)
    body = response.content
    if code == "insufficient_quota":
        return Trouble(
            "stop", why, body, "Top up the account, then run the same command again: nothing paid for is lost."
        )
    if status == 429:
        return Trouble("wait", why, body, headers=response.headers)
    if status >= 500 or status in AGAIN:
        return Trouble("again", why, body, headers=response.headers)
    if status in (401, 403):
        return Trouble(
            "stop",
            why,
            body,
            f"The key is read from the {key_place}: see that it is the endpoint's.",
        )
    if status == 404:
        return Trouble(
            "stop",
            why,
            body,
            f"See that the endpoint knows the model {model!r}, and that base_url ends as its own manual says.",
        )
    if code in ("content_filter", "content_policy_violation"):
        return Trouble("filtered", why, body)
    return Trouble(
        "stop", why, body, "The endpoint does not accept this request: see `model` and `extra` in the recipe."
    )
