"""A reply that comes as a stream of events, put together to the completion that would have come whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from tapir_local.store.reply import parse_reply_json, replace_lone_surrogates

BEGINNINGS = (b"data:", b"event:", b"id:", b"retry:", b":")


def streamed(body: Mapping[str, Any], usage: bool) -> dict[str, Any]:
    """A request's body that wants a stream; with `usage`, one that ends in the count of tokens."""
    asked = {**body, "stream": True}
    return {**asked, "stream_options": {"include_usage": True}} if usage else asked


def is_stream(raw: bytes) -> bool:
    """Whether a body is a stream of events; an endpoint may send a completion all the same."""
    return raw.lstrip(b"\xef\xbb\xbf\r\n").startswith(BEGINNINGS)


def joined(raw: bytes) -> bytes:
    """The one completion, as JSON, of a stream; its error where it has one. ValueError for a stream that was cut."""
    parts: dict[str, list[Any]] = {}
    told: dict[str, Any] = {}
    choice: dict[str, Any] = {"index": 0, "finish_reason": None}
    ended = False
    for data in events(raw):
        if data.strip() == "[DONE]":
            ended = True
            break
        chunk = parse_reply_json(data.encode(errors="surrogatepass"))
        if not isinstance(chunk, dict):
            raise ValueError(f"not a chunk of a stream: {data[:80]!r}")
        if chunk.get("error"):
            return orjson.dumps({"error": plain(chunk["error"])})
        told |= {name: item for name, item in chunk.items() if name not in ("choices", "object") and item is not None}
        for part in chunk.get("choices") or ():
            gather(part, parts, choice)
    if not ended and choice["finish_reason"] is None:
        raise ValueError("the stream broke off before its end")
    choice["message"] = {"role": "assistant", **{name: whole(items) for name, items in parts.items()}}
    choices = [choice] if parts or choice["finish_reason"] else []
    return orjson.dumps(plain({**told, "object": "chat.completion", "choices": choices}))


def events(raw: bytes) -> Iterator[str]:
    """The data of each event of a stream."""
    import httpx2

    headers, request = {"content-type": "text/event-stream; charset=utf-8"}, httpx2.Request("POST", "http://stream")
    response = httpx2.Response(200, headers=headers, content=raw, request=request)
    for event in httpx2.EventSource(response, max_event_size=None):
        if event.data:
            yield event.data


def gather(part: Any, parts: dict[str, list[Any]], choice: dict[str, Any]) -> None:
    """Add what a chunk brings to the first choice: pieces of its message's fields, and why it ended."""
    if not isinstance(part, dict) or part.get("index") not in (0, None):
        return
    delta = part.get("delta") or part.get("message") or {}
    for name, item in delta.items() if isinstance(delta, dict) else ():
        if item is not None and name != "role":
            parts.setdefault(name, []).append(item)
    if part.get("finish_reason") is not None:
        choice["finish_reason"] = part["finish_reason"]


def whole(items: list[Any]) -> Any:
    """The pieces of a field as one: texts and lists joined, of anything else the last."""
    if all(isinstance(item, str) for item in items):
        return "".join(items)
    if all(isinstance(item, list) for item in items):
        return [part for item in items for part in item]
    return items[-1]


def plain(value: Any) -> Any:
    """A JSON value whose texts have no half of a surrogate pair; halves that two chunks brought are joined by now."""
    if isinstance(value, str):
        return replace_lone_surrogates(value)
    if isinstance(value, dict):
        return {plain(name): plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value
