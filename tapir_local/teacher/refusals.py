"""What it means when an endpoint sends no answer: try again, wait, leave this row out, or stop; and what to do."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple
from urllib.parse import urljoin

import orjson

from tapir_local.recipe.endpoints import Endpoint
from tapir_local.store.reply import MAX_QUOTED_CHARS, parse_reply_json, replace_lone_surrogates
from tapir_local.teacher.endpoint import OPENAI_URL, describe_key_source, endpoint_role

RERUN_SENTENCE = "Run the same command again: nothing paid for is lost."
RERUN_CLAUSE = "run the same command again: nothing paid for is lost."
RETRIED_STATUSES = frozenset({408, 409, 425})  # besides 429 and 5xx: the server had no time, or a lock in the way
UNREADABLE_TRIES = 2  # tries of a request whose reply came whole and is no chat completion: each may have been paid for

TOO_LONG_PATTERN = re.compile(
    r"context.?(length|window|size)|maximum context|max.?(input|seq|prompt|model).?(tokens|len)|sequence length"
    r"|(prompt|input|message|content|text|request)s?\b.{0,40}\b(is |are |was |were )?(too|to) (long|large|big|many)"
    r"|too many (input |prompt )?tokens|(input|prompt) (length|tokens?).{0,40}(exceed|greater|larger|more than|>)"
    r"|range of input length|string_above_max_length|reduce (the|your) (length|prompt|input|message)"
    r"|(longer|larger|greater) than (the )?(maximum|limit|context|model)|exceeds?.{0,40}(context|input|token limit)"
    r"|(request|payload|body)( entity)? too large|input.?too.?long|prompt.?too.?long|token limit|tokens? exceed",
    re.IGNORECASE | re.DOTALL,
)
CONTENT_FILTER_PATTERN = re.compile(
    r"content.?(filter|policy|management|moderation|exists risk)|data.?inspection|inappropriate|moderat|flagged|harmful"
    r"|unsafe|safety|(?<!case.)sensitive|prohibited|responsible.?ai|usage polic|violat|blocked (by|due|for)|guardrail"
    r"|jailbreak|toxic|invalid_prompt|risk control",
    re.IGNORECASE,
)
NO_BALANCE_PATTERN = re.compile(
    r"insufficient.{0,20}(balance|credit|fund|money)|balance.{0,20}(too low|negative|empty|exhaust|insufficient)"
    r"|(out of|not enough|no more) credits?|余额不足|欠费",
    re.IGNORECASE,
)
BILLING_PATTERN = re.compile(
    r"insufficient.{0,20}quota|billing|payment required|arrear|top.?up|recharge|overdue|spend(ing)? limit"
    r"|prepa(id|y)|exceeded your current quota|额度不足",
    re.IGNORECASE,
)
QUOTA_CODES = frozenset({"insufficient_quota", "insufficient_balance", "insufficient_credits", "billing_not_active"})
LOADING_PATTERN = re.compile(
    r"loading (the )?model|model.{0,60}\b(loading|not (yet )?(ready|loaded)|warming up|starting)|currently loading"
    r"|(server|engine|service) is (starting|loading|warming)|warming up|cold.?start",
    re.IGNORECASE,
)
LOADING_FAILED_PATTERN = re.compile(r"(error|fail\w*|unable|could not|cannot).{0,30}load", re.IGNORECASE)
UNSUPPORTED_PATTERN = re.compile(
    r"unsupported|not supported|does not support|doesn't support|only supports?|only the default|not permitted|unknown"
    r" (parameter|field|argument|name)|unrecognized|unexpected (keyword|field|parameter)|extra (inputs|fields)"
    r"|invalid parameter|instead",
    re.IGNORECASE,
)
TEMPERATURE_PATTERN = re.compile(
    r"temperature\b.{0,60}(support|default|must|should|between|range|permitted|allowed|deprecated|cannot)"
    r"|(unsupported|invalid|unknown|support).{0,60}\btemperature\b",
    re.IGNORECASE | re.DOTALL,
)
MODEL_PATTERN = re.compile(r"\bmodel\b", re.IGNORECASE)
HTML_TAG_PATTERN = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.IGNORECASE | re.DOTALL)
HTML_TITLE_PATTERN = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)


class RequestFailure(NamedTuple):
    """Why there is no answer, and what follows.

    `then`: "again" costs an attempt; "wait" (for the endpoint's allowance) and "load" (for its model) cost none; "row"
    is the server's last word on this row, its finish `finish`; "stop" is trouble for every row. `sure` says that the
    server named what is wrong with this row. `tries` are the attempts that it is worth, 0 for the endpoint's, and
    `last` is what follows when they are used up. `what` and `fix` are for a TapirError, `headers` the reply's.
    """

    then: Literal["again", "wait", "load", "row", "stop"]
    why: str
    body: bytes = b""
    fix: str = RERUN_SENTENCE
    headers: Mapping[str, str] = {}
    finish: Literal["refused", "content_filter", ""] = "refused"
    sure: bool = True
    tries: int = 0
    last: Literal["row", "stop"] = "stop"


def classify_error_response(response: Any, endpoint: Endpoint) -> RequestFailure:
    """What a reply with an error status means.

    `response` is httpx2's, or one of the likes: status_code, content, text, headers.
    """
    return classify_error(
        response.status_code, *error_message_and_code(response.content), response.content, response.headers, endpoint
    )


def classify_unreadable_reply(raw: bytes, headers: Mapping[str, str], endpoint: Endpoint) -> RequestFailure:
    """What a reply of status 200 means that is no chat completion: an error's object, a web page, anything else."""
    message, code = error_message_and_code(raw)
    body = parse_json_or_none(raw)
    if found := find_hidden_error(body):
        status = str(found.get("code") or found.get("status") or found.get("status_code"))
        number = int(status) if re.fullmatch("[45][0-9]{2}", status) else 0
        trouble = classify_error(number or 500, message, code, raw, headers, endpoint)
        return trouble._replace(why=f"an error in a reply of status 200: {f'{number}: ' if number else ''}{message}")
    if is_markup(raw):
        fix = f"base_url leads to a web page: write it as the endpoint's own manual says (often with /v1), and {LAST}"
        return RequestFailure("again", f"the reply is {message}", raw, fix, tries=UNREADABLE_TRIES)
    fix = f"See that base_url is an OpenAI-compatible endpoint's, as its own manual has it, and {LAST}"
    why = f"the reply is not a chat completion ({shape_of(body, raw)})"
    was_cut = body is None and raw.lstrip()[:1] == b"{"  # on its way, which another try may mend
    return RequestFailure(
        "again", why, raw, fix, finish="", sure=False, tries=0 if was_cut else UNREADABLE_TRIES, last="row"
    )


def find_hidden_error(body: Any) -> dict[str, Any] | None:
    """The error in a body without choices: under `error`, or the body itself, as gateways have it."""
    if found := find_error_object(body):
        return found
    if not isinstance(body, dict) or body.get("choices") is not None:
        return None
    if isinstance(base := body.get("base_resp"), dict):
        return {"message": base.get("status_msg"), "code": base.get("status_code")}
    return body if any(isinstance(body.get(name), str) for name in ("message", "msg", "detail", "error_msg")) else None


def describe_reply_shape(body: Any, raw: bytes) -> str:
    """What a body is that should have been a completion, in a few words, and how it begins."""
    if not raw.strip():
        return "it is empty"
    if body is None:
        shape = "no JSON"
    elif not isinstance(body, dict):
        shape = f"a JSON {type(body).__name__}"
    elif not body.get("choices"):
        shape = "without choices"
    else:
        shape = "its choice has no text that can be read"
    return f"{shape}: {replace_lone_surrogates(raw[:MAX_QUOTED_CHARS].decode(errors='replace')).strip()}"


def parse_json_or_none(raw: bytes) -> Any:
    """The JSON in a body, None where it is none."""
    try:
        return parse_reply_json(raw)
    except ValueError:
        return None


def is_markup(raw: bytes) -> bool:
    """Whether a body is a web page, or XML."""
    return raw.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<"


def error_message_and_code(raw: bytes) -> tuple[str, str]:
    """The (message, code) in the body of an error, whatever its shape."""
    body = parse_json_or_none(raw)
    if body is None:
        return (
            describe_web_page(raw) if is_markup(raw) else raw.decode(errors="replace").strip()[:MAX_QUOTED_CHARS]
        ), ""
    error = find_hidden_error(body) or body
    if isinstance(error, list) and error:
        error = error[0]
    if not isinstance(error, dict):
        return replace_lone_surrogates(str(error))[:MAX_QUOTED_CHARS], ""
    code = error.get("code") or error.get("type") or error.get("status") or ""
    return error_text(error)[:MAX_QUOTED_CHARS], replace_lone_surrogates(str(code))


def find_error_object(body: Any) -> dict[str, Any] | None:
    """The error object that a body holds: under `error` or `errors`, alone or in a list; None where there is none."""
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    found = (body.get("error") or body.get("errors")) if isinstance(body, dict) else None
    if isinstance(found, list) and found:
        found = found[0]
    if isinstance(found, str):
        beside = body if isinstance(body, dict) else {}
        return {"code": beside.get("code") or beside.get("status"), "message": beside.get("message") or found}
    return found if isinstance(found, dict) else None


def error_text(error: Mapping[str, Any]) -> str:
    """The words of an error object, and those of the endpoint behind a router's, which say more."""
    names = ("message", "detail", "msg", "error_msg", "errorMessage", "error_message", "title", "error", "description")
    found = next((error[name] for name in names if error.get(name)), error)
    if isinstance(found, list):
        found = "; ".join(error_text(item) if isinstance(item, dict) else str(item) for item in found)
    if isinstance(found, dict):
        found = error_text(found) if found is not error else orjson.dumps(found, default=str).decode()
    beside = error.get("metadata")
    raw = beside.get("raw") if isinstance(beside, dict) else None
    return replace_lone_surrogates(f"{found} ({raw})" if raw else str(found)).strip()


def describe_web_page(raw: bytes) -> str:
    """`a web page: Sign in`: a page's title, or else its words."""
    text = raw[:100_000].decode(errors="replace")
    title = HTML_TITLE_PATTERN.search(text)
    words = " ".join(html.unescape(HTML_TAG_PATTERN.sub(" ", title[1] if title else text)).split())
    return f"a web page: {words[:MAX_QUOTED_CHARS]}" if words else "a web page"


def classify_error(
    status: int, message: str, code: str, body: bytes, headers: Mapping[str, str], endpoint: Endpoint
) -> RequestFailure:
    """What an error with this status, message and code means."""
    why, text = f"{status}: {message}" if message else str(status), f"{code} {message}"
    if status in (301, 302, 303, 307, 308):
        return classify_redirect(status, str(headers.get("location") or ""), body, endpoint)
    if is_account_empty(status, text, code):
        return RequestFailure(
            "stop", why, body, f"Top up the account of the key in the {key_place(endpoint)}, then {LAST}"
        )
    if status == 429 and TOO_LONG_PATTERN.search(text):
        return RequestFailure("row", why, body)
    if status == 429:
        return RequestFailure("wait", why, body, headers=headers)
    if status >= 500 and LOADING_PATTERN.search(text) and not LOADING_FAILED_PATTERN.search(text):
        return RequestFailure("load", why, body, headers=headers)
    if status >= 500 and status != 501:
        return RequestFailure("again", why, body, headers=headers, sure=False, last="row")
    if status in RETRIED_STATUSES:
        return RequestFailure("again", why, body, headers=headers)
    if fix := advice_for_parameter(text, endpoint):
        return RequestFailure("stop", why, body, fix, sure=False, last="row")
    if status not in (401, 404, 405, 407) and (finish := finish_for_row(text)):
        return RequestFailure("row", why, body, advice_for_row(text, endpoint_role(endpoint)), finish=finish)
    return classify_other_refusal(status, why, body, text, endpoint)


def classify_other_refusal(status: int, why: str, body: bytes, text: str, endpoint: Endpoint) -> RequestFailure:
    """What a refusal means that names neither a row's fault nor a parameter's."""
    address = f"See that base_url ends as the endpoint's own manual says (often in /v1), and {LAST}"
    if status in (401, 403):
        fix = f"The key is read from the {key_place(endpoint)}: see that it is the endpoint's."
        return RequestFailure("stop", why, body, fix)
    if status == 404 and MODEL_PATTERN.search(text):
        return RequestFailure("stop", why, body, f"See that the endpoint knows the model {endpoint.model!r}: {address}")
    if status == 404:
        fix = f"There is no chat API at this address, or it does not know the model {endpoint.model!r}. {address}"
        return RequestFailure("stop", why, body, fix)
    if status == 405:
        return RequestFailure("stop", why, body, address)
    if status == 407:
        return RequestFailure(
            "stop", why, body, f"The proxy wants a name and a password: write them in HTTPS_PROXY, and {LAST}"
        )
    fix = "The endpoint does not accept this request: see `model` and `extra` in the recipe."
    return RequestFailure("row", why, body, fix, sure=False)


def is_account_empty(status: int, text: str, code: str) -> bool:
    """Whether the account is empty. Of a 429 only the code tells: allowances for a minute are called quotas too."""
    if status == 402 or code.lower() in QUOTA_CODES:
        return True
    if status == 429:
        return bool(NO_BALANCE_PATTERN.search(text))
    return (
        status in (400, 401, 403, 500)
        and not finish_for_row(text)
        and bool(NO_BALANCE_PATTERN.search(text) or BILLING_PATTERN.search(text))
    )


def finish_for_row(text: str) -> Literal["refused", "content_filter", ""]:
    """Which fault of a row's own a server names; "" for none."""
    if TOO_LONG_PATTERN.search(text):
        return "refused"
    return "content_filter" if CONTENT_FILTER_PATTERN.search(text) else ""


def advice_for_row(text: str, role: str) -> str:
    """What to do where a server says the same of every row."""
    if TOO_LONG_PATTERN.search(text):
        return f"Set {role}.max_tokens lower, or name a model that reads more."
    return "The endpoint's filter refuses these rows: take other seeds, or another endpoint."


def advice_for_parameter(text: str, endpoint: Endpoint) -> str:
    """The line of the recipe to write for a parameter that the model does not take; "" where none is named."""
    role, low = endpoint_role(endpoint), text.lower()
    if "stream" in low and ("mode" in low or "must" in low or "only" in low or UNSUPPORTED_PATTERN.search(text)):
        return f"Write in the recipe: {role}: {{stream: true}}"
    if "max_completion_tokens" in low and UNSUPPORTED_PATTERN.search(text):
        tokens = endpoint.max_tokens
        return f"Write in the recipe: {role}: {{extra: {{max_tokens: null, max_completion_tokens: {tokens}}}}}"
    if "max_tokens" in low and not TOO_LONG_PATTERN.search(text) and not CONTENT_FILTER_PATTERN.search(text):
        return f"Set {role}.max_tokens (now {endpoint.max_tokens}) as the endpoint wants it: see its words above."
    if TEMPERATURE_PATTERN.search(text):
        return f"Write in the recipe: {role}: {{extra: {{temperature: null}}}}"
    named = next((name for name in endpoint.extra if name.lower() in low), "")
    return f"Leave {named} out of {role}.extra in the recipe." if named and UNSUPPORTED_PATTERN.search(text) else ""


def classify_redirect(status: int, location: str, body: bytes, endpoint: Endpoint) -> RequestFailure:
    """The address to write, where the server sends us to another one: a POST that is redirected becomes a GET."""
    asked = f"{(endpoint.base_url or VENDOR).rstrip('/')}/chat/completions"
    place = urljoin(asked, location)
    base = place.partition("?")[0].removesuffix("/").removesuffix("/chat/completions")
    fix = f"Write in the recipe: {role_of(endpoint)}: {{base_url: {base}}}"
    if place == asked:
        fix = "Its reply does not say where: see the endpoint's own manual for base_url."
    return RequestFailure("stop", f"{status}: the endpoint has moved to {base}", body, fix)
