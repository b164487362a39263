"""What came back from an endpoint, read: the text of an answer, and whether it is whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import orjson

from tapir_local.store.thinking import without_thoughts
from tapir_local.store.usage import counts_of

Thinking = Literal["strip", "keep"]

BRIEF = 300  # characters of a server's message that are worth reading
BYTES_A_TOKEN = 4  # where a server counts no tokens; English has a little more

# Servers' words for why a reply ended, as `plain_word` spells them: those of the OpenAI API, vLLM, SGLang, TGI,
# llama.cpp, LM Studio, TensorRT-LLM, Ollama, Anthropic, Gemini, Cohere, Bedrock, watsonx, Mistral, Zhipu, DeepSeek …
WHOLE = (
    "stop stopped eos eos_token eos_found eod eot end end_id end_turn end_of_turn end_of_text end_of_sequence endoftext"
    " stop_sequence stop_sequences stop_string stop_string_found stop_str stop_word stop_words stop_token stop_tokens"
    " stop_token_id stop_criteria_met word complete completed done finish finished success succeeded normal natural"
)
CUT = (
    "length max_length max_len limit max_tokens max_tokens_reached max_token maximum_tokens max_new_tokens max_output"
    " max_output_tokens max_completion_tokens token_limit token_limit_reached output_limit model_length error_limit"
    " max_predicted_tokens_reached context_length_reached context_length_exceeded context_window_exceeded"
    " model_context_window_exceeded max_context_length truncated incomplete not_finished"
)
FILTERED = (
    "content_filter content_filtered filter filtered safety recitation blocklist prohibited_content spii image_safety"
    " sensitive guardrail guardrails guardrail_intervened error_toxic toxic refusal refused blocked moderation"
    " moderated flagged policy_violation content_policy_violation content_policy content_moderation"
)
BROKEN = (
    "error failed failure abort aborted cancel cancelled canceled user_cancel user_cancelled user_stopped preempt"
    " preempted timeout time_limit network_error insufficient_system_resource model_unloaded load unload"
)
FINISHES: Mapping[str, str] = {
    word: finish
    for words, finish in ((WHOLE, "stop"), (CUT, "length"), (FILTERED, "content_filter"), (BROKEN, "error"))
    for word in words.split()
}
NO_WORD = frozenset({"", "none", "null", "unspecified", "unknown"})
PREFIX = re.compile(r"(?:finish|stop|done)_?reason[._]")
HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
SURROGATE = re.compile(r"[\ud800-\udfff]")


class Reading(NamedTuple):
    """How a reply becomes text, and what its request allowed: `max_tokens` is 0 where that is not known."""

    thinking: Thinking = "keep"
    max_tokens: int = 0
    role: str = "teacher"


AS_IT_CAME = Reading()


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


def read_reply(raw: bytes, reading: Reading = AS_IT_CAME) -> Reply:
    """The first choice of a chat completion; ValueError when the bytes are none."""
    body = parsed(raw)
    try:
        choice = body["choices"][0]
        message = choice["message"]
        said = text_of(message.get("content"))
        refusal = message.get("refusal")
        thought = thought_of(message)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not a chat completion: {raw[:BRIEF]!r}") from error
    text = without_thoughts(said) if reading.thinking == "strip" else said
    tokens_in, tokens_out = counts_of(body.get("usage"))
    word = word_of(choice.get("finish_reason"))
    finish = finish_of(word, said, tokens_out, reading.max_tokens)
    if refusal and not text.strip():
        finish = "content_filter"
    found = Reply(text, finish, name_of(body.get("model")), name_of(body.get("system_fingerprint")))
    found = found._replace(tokens_in=tokens_in, tokens_out=tokens_out)
    why = why_unusable(found, word, thought or (said if said.strip() else ""), str(refusal or ""), reading)
    return found._replace(why=why, again=goes_again(found, thought or said))


def parsed(raw: bytes) -> Any:
    """The JSON of a reply, of which half a surrogate pair, a byte that is no UTF-8, or NaN does not cost the rest."""
    try:
        return orjson.loads(raw)
    except ValueError:
        try:
            return json.loads(raw.decode("utf-8-sig", errors="replace"), strict=False)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def well_formed(text: str) -> str:
    """The text, with U+FFFD in place of each half of a surrogate pair, which no file can hold."""
    if not SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_of(content: Any) -> str:
    """The text of a message: a string, or the text parts of a list of parts; TypeError for anything else."""
    if content is None:
        return ""
    if isinstance(content, str):
        return well_formed(content)
    if isinstance(content, list):
        return "".join(text_of(part.get("text") if isinstance(part, dict) else part) for part in content)
    raise TypeError(f"a content of type {type(content).__name__}")


def thought_of(message: Mapping[str, Any]) -> str:
    """What a server put beside the content as the model's thoughts."""
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(found := message.get(name), str) and found.strip():
            return found
    return ""


def name_of(value: Any) -> str:
    """A name that a server gives, as text."""
    return well_formed(str(value)) if value else ""


def word_of(value: Any) -> str:
    """A server's word for why a reply ended; SGLang's own API has it in an object."""
    if isinstance(value, dict):
        value = value.get("type") or value.get("reason")
    return name_of(value)


def plain_word(word: str) -> str:
    """One spelling for `FINISH_REASON_STOP`, `eosFound`, `Stop-Sequence`."""
    plain = HUMP.sub("_", word.strip()).lower().replace("-", "_").replace(" ", "_")
    return PREFIX.sub("", plain)


def finish_of(word: str, text: str, tokens: int, max_tokens: int) -> str:
    """`stop`, `length`, `content_filter`, `error`, or the word itself where nobody knows what it means.

    Where the server gives no word, a text is whole unless it has all the tokens that it was allowed.
    """
    plain = plain_word(word)
    if plain not in NO_WORD:
        return FINISHES.get(plain, word)
    spent = tokens or len(text.encode()) // BYTES_A_TOKEN
    return "length" if max_tokens and spent >= max_tokens else "stop"


def goes_again(reply: Reply, said: str) -> bool:
    """Whether to ask again: the server broke the reply off, or sent nothing at all, not even a thought."""
    return reply.finish == "error" or (reply.finish == "stop" and not reply.text.strip() and not said.strip())


def why_unusable(reply: Reply, word: str, thought: str, refusal: str, reading: Reading) -> str:
    """Why a reply has no text that can be used; "" where it has, also where that was cut."""
    empty, role = not reply.text.strip(), reading.role
    if reply.finish == "content_filter":
        return f"the server refused: {refusal[:BRIEF]}" if refusal else f"the server filtered it (finish {word!r})"
    if reply.finish == "error":
        return f"the server broke the reply off (finish {word!r})"
    if empty and thought and reply.finish == "length":
        return f"thinking used up all of max_tokens: raise {role}.max_tokens, or turn thinking off in {role}.extra"
    if empty and thought:
        return only_thought(thought, reading)
    if empty:
        return f"the server sent an empty reply (finish {word!r})" if word else "the server sent an empty reply"
    return "" if reply.finish in ("stop", "length") else f"the server ended it with finish_reason {word!r}"


def only_thought(thought: str, reading: Reading) -> str:
    """What to say of a reply that is nothing but a thought, and what to do about it."""
    return (
        f"the reply is only a thought, in reasoning_content or an unclosed tag, and no answer ({thought[:60]!r} …): "
        f"start the server without a reasoning parser, or turn thinking off, on vLLM and SGLang with "
        f"{reading.role}: {{extra: {{chat_template_kwargs: {{enable_thinking: false}}}}}}"
    )


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
