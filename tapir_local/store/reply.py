"""What came back from an endpoint, read: the text of an answer, and whether it is whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import orjson

from tapir_local.store.reply import parse_usage
from tapir_local.store.thinking import strip_thoughts

Thinking = Literal["strip", "keep"]

MAX_QUOTED_CHARS = 300  # characters of a server's message that are worth reading
BYTES_PER_TOKEN = 4  # where a server counts no tokens; English has a little more

# Servers' words for why a reply ended, as `plain_word` spells them: those of the OpenAI API, vLLM, SGLang, TGI,
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
    """How a reply becomes text, and what its request allowed: `max_tokens` is 0 where that is not known."""

    thinking: Thinking = "keep"
    max_tokens: int = 0
    role: str = "teacher"


DEFAULT_REPLY_OPTIONS = ReplyOptions()


class Reply(NamedTuple):
    """A chat completion.

    `finish` is `stop`, `length`, `content_filter`, `error` (the server broke it off), or the server's own word. `why`
    says why the text cannot be used; "" where it can, and where it was only cut. `again` says that the same request may
    bring a better reply.
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
        """Whether it may serve the same request again: any text that the server did not refuse or break off."""
        return self.finish not in ("content_filter", "refused", "error") and bool(self.text.strip())

    @property
    def complete(self) -> bool:
        """True when the text is whole: neither cut, nor filtered, nor empty."""
        return self.finish == "stop" and bool(self.text.strip())


def parse_reply(raw: bytes, reading: Reading = DEFAULT_REPLY_OPTIONS) -> Reply:
    """The first choice of a chat completion; ValueError when the bytes are none."""
    body = parse_reply_json(raw)
    try:
        choice = body["choices"][0]
        message = choice["message"]
        said = content_text(message.get("content"))
        refusal = message.get("refusal")
        thought = reasoning_text(message)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not a chat completion: {raw[:BRIEF]!r}") from error
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
    """The JSON of a reply, of which half a surrogate pair, a byte that is no UTF-8, or NaN does not cost the rest."""
    try:
        return orjson.loads(raw)
    except ValueError:
        try:
            return json.loads(raw.decode("utf-8-sig", errors="replace"), strict=False)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def replace_lone_surrogates(text: str) -> str:
    """The text, with U+FFFD in place of each half of a surrogate pair, which no file can hold."""
    if not LONE_SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def content_text(content: Any) -> str:
    """The text of a message: a string, or the text parts of a list of parts; TypeError for anything else."""
    if content is None:
        return ""
    if isinstance(content, str):
        return replace_lone_surrogates(content)
    if isinstance(content, list):
        return "".join(content_text(part.get("text") if isinstance(part, dict) else part) for part in content)
    raise TypeError(f"a content of type {type(content).__name__}")


def reasoning_text(message: Mapping[str, Any]) -> str:
    """What a server put beside the content as the model's thoughts."""
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(found := message.get(name), str) and found.strip():
            return found
    return ""


def server_text(value: Any) -> str:
    """A name that a server gives, as text."""
    return replace_lone_surrogates(str(value)) if value else ""


def finish_word(value: Any) -> str:
    """A server's word for why a reply ended; SGLang's own API has it in an object."""
    if isinstance(value, dict):
        value = value.get("type") or value.get("reason")
    return server_text(value)


def normalize_finish_word(word: str) -> str:
    """One spelling for `FINISH_REASON_STOP`, `eosFound`, `Stop-Sequence`."""
    plain = CAMEL_CASE_BOUNDARY.sub("_", word.strip()).lower().replace("-", "_").replace(" ", "_")
    return FINISH_PREFIX.sub("", plain)


def classify_finish(word: str, text: str, tokens: int, max_tokens: int) -> str:
    """`stop`, `length`, `content_filter`, `error`, or the word itself where nobody knows what it means.

    Where the server gives no word, a text is whole unless it has all the tokens that it was allowed.
    """
    plain = normalize_finish_word(word)
    if plain not in EMPTY_FINISH_WORDS:
        return FINISH_BY_WORD.get(plain, word)
    spent = tokens or len(text.encode()) // BYTES_PER_TOKEN
    return "length" if max_tokens and spent >= max_tokens else "stop"


def should_retry(reply: Reply, said: str) -> bool:
    """Whether to ask again: the server broke the reply off, or sent nothing at all, not even a thought."""
    return reply.finish == "error" or (reply.finish == "stop" and not reply.text.strip() and not said.strip())


def explain_unusable_reply(reply: Reply, word: str, thought: str, refusal: str, reading: ReplyOptions) -> str:
    """Why a reply has no text that can be used; "" where it has, also where that was cut."""
    empty, role = not reply.text.strip(), reading.role
    if reply.finish == "content_filter":
        return f"the server refused: {refusal[:BRIEF]}" if refusal else f"the server filtered it (finish {word!r})"
    if reply.finish == "error":
        return f"the server broke the reply off (finish {word!r})"
    if empty and thought and reply.finish == "length":
        return f"thinking used up all of max_tokens: raise {role}.max_tokens, or turn thinking off in {role}.extra"
    if empty and thought:
        return describe_thought_only_reply(thought, reading)
    if empty:
        return f"the server sent an empty reply (finish {word!r})" if word else "the server sent an empty reply"
    return "" if reply.finish in ("stop", "length") else f"the server ended it with finish_reason {word!r}"


def describe_thought_only_reply(thought: str, reading: ReplyOptions) -> str:
    """What to say of a reply that is nothing but a thought, and what to do about it."""
    return (
        f"the reply is only a thought, in reasoning_content or an unclosed tag, and no answer ({thought[:60]!r} …): "
        f"start the server without a reasoning parser, or turn thinking off, on vLLM and SGLang with "
        f"{reading.role}: {{extra: {{chat_template_kwargs: {{enable_thinking: false}}}}}}"
    )
