"""Parse a chat completion: the text of the answer, whether it is complete, and its token counts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import orjson

from tapir_local.store.thinking import strip_thoughts

Thinking = Literal["strip", "keep"]

MAX_QUOTED_CHARS = 300  # characters of a server's message that an error quotes
BYTES_PER_TOKEN = 4  # for servers that count no tokens; English has slightly more

# Finish reasons of servers, as `normalize_finish_word` writes them: those of the OpenAI API, vLLM, SGLang, TGI,
# llama.cpp, LM Studio, TensorRT-LLM, Ollama, Anthropic, Gemini, Cohere, Bedrock, watsonx, Mistral, Zhipu, DeepSeek …
COMPLETE_WORDS = (
    "stop stopped eos eos_token eos_found eod eot end end_id end_turn end_of_turn end_of_text end_of_sequence endoftext"
    " stop_sequence stop_sequences stop_string stop_string_found stop_str stop_word stop_words stop_token stop_tokens"
    " stop_token_id stop_criteria_met word complete completed done finish finished success succeeded normal natural"
)
CUT_WORDS = (
    "length max_length max_len limit max_tokens max_tokens_reached max_token maximum_tokens max_new_tokens max_output"
    " max_output_tokens max_completion_tokens token_limit token_limit_reached output_limit model_length error_limit"
    " max_predicted_tokens_reached context_length_reached context_length_exceeded context_window_exceeded"
    " model_context_window_exceeded max_context_length truncated incomplete not_finished"
)
FILTER_WORDS = (
    "content_filter content_filtered filter filtered safety recitation blocklist prohibited_content spii image_safety"
    " sensitive guardrail guardrails guardrail_intervened error_toxic toxic refusal refused blocked moderation"
    " moderated flagged policy_violation content_policy_violation content_policy content_moderation"
)
FAILURE_WORDS = (
    "error failed failure abort aborted cancel cancelled canceled user_cancel user_cancelled user_stopped preempt"
    " preempted timeout time_limit network_error insufficient_system_resource model_unloaded load unload"
)
FINISH_BY_WORD: Mapping[str, str] = {
    word: finish
    for words, finish in (
        (COMPLETE_WORDS, "stop"),
        (CUT_WORDS, "length"),
        (FILTER_WORDS, "content_filter"),
        (FAILURE_WORDS, "error"),
    )
    for word in words.split()
}
EMPTY_FINISH_WORDS = frozenset({"", "none", "null", "unspecified", "unknown"})
FINISH_PREFIX = re.compile(r"(?:finish|stop|done)_?reason[._]")
CAMEL_CASE_BOUNDARY = re.compile(r"(?<=[a-z])(?=[A-Z])")
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


class ReplyOptions(NamedTuple):
    """How to parse a reply. `max_tokens` is what the request allowed, 0 if unknown; `role` is named in messages."""

    thinking: Thinking = "keep"
    max_tokens: int = 0
    role: str = "teacher"


DEFAULT_REPLY_OPTIONS = ReplyOptions()


class Reply(NamedTuple):
    """A chat completion.

    `finish` is `stop`, `length`, `content_filter`, `error` (the server aborted), or the server's own word. `why` says
    why the text cannot be used; it is "" for usable and for truncated text. `again` is true if the same request may get
    a better reply.
    """

    text: str
    finish: str
    model: str = ""
    fingerprint: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    why: str = ""
    again: bool = False

    @property
    def keeps(self) -> bool:
        """Whether it may be stored: it has text, and the server neither refused nor aborted."""
        return self.finish not in ("content_filter", "refused", "error") and bool(self.text.strip())

    @property
    def complete(self) -> bool:
        """Whether the text is complete: not truncated, filtered or empty."""
        return self.finish == "stop" and bool(self.text.strip())


def parse_reply(raw: bytes, reading: ReplyOptions = DEFAULT_REPLY_OPTIONS) -> Reply:
    """Parse the first choice of a chat completion; ValueError if the bytes are not one."""
    body = parse_reply_json(raw)
    try:
        choice = body["choices"][0]
        message = choice["message"]
        said = content_text(message.get("content"))
        refusal = message.get("refusal")
        thought = reasoning_text(message)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not a chat completion: {raw[:MAX_QUOTED_CHARS]!r}") from error
    text = strip_thoughts(said) if reading.thinking == "strip" else said
    tokens_in, tokens_out = parse_usage(body.get("usage"))
    word = finish_word(choice.get("finish_reason"))
    finish = classify_finish(word, said, tokens_out, reading.max_tokens)
    if refusal and not text.strip():
        finish = "content_filter"
    found = Reply(text, finish, server_text(body.get("model")), server_text(body.get("system_fingerprint")))
    found = found._replace(tokens_in=tokens_in, tokens_out=tokens_out)
    why = explain_unusable_reply(found, word, thought or (said if said.strip() else ""), str(refusal or ""), reading)
    return found._replace(why=why, again=should_retry(found, thought or said))


def parse_reply_json(raw: bytes) -> Any:
    """Parse the JSON of a reply. Lone surrogates, bytes that are not UTF-8, and NaN are tolerated."""
    try:
        return orjson.loads(raw)
    except ValueError:
        try:
            return json.loads(raw.decode("utf-8-sig", errors="replace"), strict=False)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def replace_lone_surrogates(text: str) -> str:
    """Replace each lone surrogate, which no file can hold, by U+FFFD."""
    if not LONE_SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def content_text(content: Any) -> str:
    """The text of a message: a string, or the joined text of a list of parts; TypeError for anything else."""
    if content is None:
        return ""
    if isinstance(content, str):
        return replace_lone_surrogates(content)
    if isinstance(content, list):
        return "".join(content_text(part.get("text") if isinstance(part, dict) else part) for part in content)
    raise TypeError(f"a content of type {type(content).__name__}")


def reasoning_text(message: Mapping[str, Any]) -> str:
    """The model's reasoning, if the server sends it in a field of its own."""
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(found := message.get(name), str) and found.strip():
            return found
    return ""


def server_text(value: Any) -> str:
    """A value that a server sent, as text; "" for none."""
    return replace_lone_surrogates(str(value)) if value else ""


def finish_word(value: Any) -> str:
    """The server's finish reason; SGLang's own API puts it into an object."""
    if isinstance(value, dict):
        value = value.get("type") or value.get("reason")
    return server_text(value)


def normalize_finish_word(word: str) -> str:
    """Write a finish reason in lower case with underscores: `FINISH_REASON_STOP`, `eosFound`, `Stop-Sequence`."""
    plain = CAMEL_CASE_BOUNDARY.sub("_", word.strip()).lower().replace("-", "_").replace(" ", "_")
    return FINISH_PREFIX.sub("", plain)


def classify_finish(word: str, text: str, tokens: int, max_tokens: int) -> str:
    """`stop`, `length`, `content_filter`, `error`, or the word itself if it is unknown.

    Without a word, a text is complete unless it used all the tokens that it was allowed.
    """
    plain = normalize_finish_word(word)
    if plain not in EMPTY_FINISH_WORDS:
        return FINISH_BY_WORD.get(plain, word)
    spent = tokens or len(text.encode()) // BYTES_PER_TOKEN
    return "length" if max_tokens and spent >= max_tokens else "stop"


def should_retry(reply: Reply, said: str) -> bool:
    """Whether to send the request again: the server aborted, or sent neither text nor reasoning."""
    return reply.finish == "error" or (reply.finish == "stop" and not reply.text.strip() and not said.strip())


def explain_unusable_reply(reply: Reply, word: str, thought: str, refusal: str, reading: ReplyOptions) -> str:
    """Why a reply has no usable text; "" if it has, also for truncated text."""
    empty, role = not reply.text.strip(), reading.role
    if reply.finish == "content_filter":
        return (
            f"the server refused: {refusal[:MAX_QUOTED_CHARS]}"
            if refusal
            else f"the server filtered it (finish {word!r})"
        )
    if reply.finish == "error":
        return f"the server aborted the reply (finish {word!r})"
    if empty and thought and reply.finish == "length":
        return f"thinking used up all of max_tokens: raise {role}.max_tokens, or turn thinking off in {role}.extra"
    if empty and thought:
        return describe_thought_only_reply(thought, reading)
    if empty:
        return f"the server sent an empty reply (finish {word!r})" if word else "the server sent an empty reply"
    return "" if reply.finish in ("stop", "length") else f"the server ended it with finish_reason {word!r}"


def describe_thought_only_reply(thought: str, reading: ReplyOptions) -> str:
    """The message for a reply that contains only reasoning, with what to do."""
    return (
        f"the reply is only a thought, in reasoning_content or an unclosed tag, and no answer ({thought[:60]!r} …): "
        f"start the server without a reasoning parser, or turn thinking off, on vLLM and SGLang with "
        f"{reading.role}: {{extra: {{chat_template_kwargs: {{enable_thinking: false}}}}}}"
    )


# Token counts of a reply

MAX_TOKEN_COUNT = 10**9  # tokens; no request uses as many, so a larger count is an error of the server


def parse_usage(usage: Any) -> tuple[int, int]:
    """(prompt, generated) tokens from a `usage` object; 0 for a missing number, (0, 0) if a number is impossible.

    Servers count hidden reasoning in `completion_tokens`, in addition to it, or only in `total_tokens`, and cached
    prompt tokens in the prompt's count or in addition to it. If this is ambiguous, the larger count is used.
    """
    try:
        prompt = prompt_token_count(usage)
        written = max(token_count(usage, "completion_tokens"), token_count(usage, "output_tokens"))
        hidden = max(token_count(place, "reasoning_tokens") for place in usage_details(usage, "completion", "output"))
        total = token_count(usage, "total_tokens")
    except ValueError:
        return 0, 0
    outside = hidden > written or not total
    return prompt, max(written, total - prompt, written + hidden if outside else 0)


def prompt_token_count(usage: Any) -> int:
    """The number of prompt tokens, including cached ones."""
    prompt, named = token_count(usage, "prompt_tokens"), token_count(usage, "input_tokens")
    split = token_count(usage, "prompt_cache_hit_tokens") + token_count(usage, "prompt_cache_miss_tokens")
    beside = token_count(usage, "cache_read_input_tokens") + token_count(usage, "cache_creation_input_tokens")
    stated = max(prompt, named + (beside if named and not prompt else 0), split)
    cached = max(token_count(place, "cached_tokens") for place in usage_details(usage, "prompt", "input"))
    return stated + cached if cached > stated else stated


def usage_details(usage: Any, *names: str) -> list[Any]:
    """A `usage` object and those of its `*_tokens_details` that are named."""
    return [usage, *(usage.get(f"{name}_tokens_details") for name in names if isinstance(usage, Mapping))]


def token_count(place: Any, name: str) -> int:
    """A count in a `usage` object, 0 if absent or null; ValueError if it is not a number of tokens."""
    value = place.get(name) if isinstance(place, Mapping) else None
    if value is None:
        return 0
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= MAX_TOKEN_COUNT
        or value != int(value)
    ):
        raise ValueError(f"{name} is {value!r}")
    return int(value)


def build_chat_completion(
    text: str,
    model: str,
    *,
    finish: str = "stop",
    made: tuple[str, int] | None = None,
    fingerprint: str | None = None,
    usage: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """A reply with this text in the form of the OpenAI API; what is None is left out.

    `made` is its (id, time of creation in Unix seconds), `usage` the tokens of (prompt, reply).
    """
    made_id, created = made or (None, None)
    counts = (
        zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*usage, sum(usage)), strict=True) if usage else ()
    )
    body = {
        "id": made_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "system_fingerprint": fingerprint,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": dict(counts) or None,
    }
    return {name: item for name, item in body.items() if item is not None}
