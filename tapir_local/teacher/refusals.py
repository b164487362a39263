"""Classify errors of an endpoint (retry, wait, skip the row, or stop) and decide when a whole stage is given up."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple
from urllib.parse import urljoin

import orjson

from tapir_local.recipe.endpoints import Endpoint
from tapir_local.store.reply import MAX_QUOTED_CHARS, Reply, parse_reply_json, replace_lone_surrogates
from tapir_local.teacher.endpoint import OPENAI_URL, describe_key_source, endpoint_role

RERUN_SENTENCE = "Run the same command again: nothing paid for is lost."
RERUN_CLAUSE = "run the same command again: nothing paid for is lost."
UNAVAILABLE_STATUSES = frozenset({502, 503})  # the server is away, as a gateway or load balancer before it says
RETRIED_STATUSES = frozenset({408, 409, 425})  # besides 429 and 5xx: a timeout or a conflict in the server
UNREADABLE_TRIES = 2  # of a request whose reply is not a chat completion: each one may have been billed
MAX_FAILED_ROWS = 5  # refused before any row is answered, or failing in a row: then the rows are not the cause
MAX_USELESS_REPLIES = 20  # billed replies in a row without a complete answer: the next one will hardly be better
TOLERATED_USELESS_SHARE = 0.05  # of a stage's complete answers: a few odd rows that are retried together do not stop it
MIN_TRIES_TO_SKIP_ROW = 3  # of a request on which a server fails: fewer failures may be chance

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
    """Why a request got no answer, and what to do about it.

    `action`: "retry" uses up an attempt; "wait" (for the rate limit) and "wait_for_model" (while the server loads it)
    do not; "skip_row" means that the server refuses this row, which then gets the finish reason `finish`; "stop" means
    that every row would fail. `names_cause` says that the server stated what is wrong with this row. `max_tries` is how
    often the request is tried, 0 for the endpoint's `attempts`; `when_exhausted` is the action after the last try:
    "skip_if_others_answered" skips the row if another was answered since the try before, and stops otherwise.
    `why` and `fix` are for a TapirError, `headers` are the reply's.
    """

    action: Literal["retry", "wait", "wait_for_model", "skip_row", "stop"]
    why: str
    body: bytes = b""
    fix: str = RERUN_SENTENCE
    headers: Mapping[str, str] = {}
    finish: Literal["refused", "content_filter", ""] = "refused"
    names_cause: bool = True
    max_tries: int = 0
    when_exhausted: Literal["skip_row", "skip_if_others_answered", "stop"] = "stop"


class ServerError(NamedTuple):
    """An error as a server reports it: HTTP status, its message and error code, and the reply it came in."""

    status: int
    message: str
    code: str
    body: bytes
    headers: Mapping[str, str]


def classify_error_response(response: Any, endpoint: Endpoint) -> RequestFailure:
    """What a reply with an error status means.

    `response` is httpx's, httpx2's or similar: it has status_code, content and headers.
    """
    message, code = error_message_and_code(response.content)
    error = ServerError(response.status_code, message, code, response.content, response.headers)
    return classify_error(error, endpoint)


def classify_unreadable_reply(raw: bytes, headers: Mapping[str, str], endpoint: Endpoint) -> RequestFailure:
    """What a reply of status 200 means that is not a chat completion: an error object, a web page, anything else."""
    message, code = error_message_and_code(raw)
    body = parse_json_or_none(raw)
    if found := find_hidden_error(body):
        status = str(found.get("code") or found.get("status") or found.get("status_code"))
        number = int(status) if re.fullmatch("[45][0-9]{2}", status) else 0
        failure = classify_error(ServerError(number or 500, message, code, raw, headers), endpoint)
        return failure._replace(why=f"an error in a reply of status 200: {f'{number}: ' if number else ''}{message}")
    if is_markup(raw):
        fix = f"base_url leads to a web page. Look up the API's address (it often ends in /v1), and {RERUN_CLAUSE}"
        return RequestFailure("retry", f"the reply is {message}", raw, fix, max_tries=UNREADABLE_TRIES)
    fix = f"Check that base_url is the address of an OpenAI-compatible API, as in its documentation, and {RERUN_CLAUSE}"
    why = f"the reply is not a chat completion ({describe_reply_shape(body, raw)})"
    was_cut = body is None and raw.lstrip()[:1] == b"{"  # in transit; another try may bring it whole
    tries = 0 if was_cut else UNREADABLE_TRIES
    return RequestFailure(
        "retry", why, raw, fix, finish="", names_cause=False, max_tries=tries, when_exhausted="skip_row"
    )


def find_hidden_error(body: Any) -> dict[str, Any] | None:
    """The error in a body without choices: under `error`, or the body itself, as some gateways send it."""
    if found := find_error_object(body):
        return found
    if not isinstance(body, dict) or body.get("choices") is not None:
        return None
    if isinstance(base := body.get("base_resp"), dict):
        return {"message": base.get("status_msg"), "code": base.get("status_code")}
    return body if any(isinstance(body.get(name), str) for name in ("message", "msg", "detail", "error_msg")) else None


def describe_reply_shape(body: Any, raw: bytes) -> str:
    """In a few words, what a body is that should have been a completion, and how it begins."""
    if not raw.strip():
        return "it is empty"
    if body is None:
        shape = "not JSON"
    elif not isinstance(body, dict):
        shape = f"a JSON {type(body).__name__}"
    elif not body.get("choices"):
        shape = "without choices"
    else:
        shape = "its choice has no readable text"
    return f"{shape}: {replace_lone_surrogates(raw[:MAX_QUOTED_CHARS].decode(errors='replace')).strip()}"


def parse_json_or_none(raw: bytes) -> Any:
    """The JSON in a body, None if it is not JSON."""
    try:
        return parse_reply_json(raw)
    except ValueError:
        return None


def is_markup(raw: bytes) -> bool:
    """Whether a body is a web page or XML."""
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
    """The error object in a body: under `error` or `errors`, alone or in a list; None if there is none."""
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    found = (body.get("error") or body.get("errors")) if isinstance(body, dict) else None
    if isinstance(found, list) and found:
        found = found[0]
    if isinstance(found, str):
        outer = body if isinstance(body, dict) else {}
        return {"code": outer.get("code") or outer.get("status"), "message": outer.get("message") or found}
    return found if isinstance(found, dict) else None


def error_text(error: Mapping[str, Any]) -> str:
    """The message of an error object, with that of the endpoint behind a router, which is more specific."""
    names = ("message", "detail", "msg", "error_msg", "errorMessage", "error_message", "title", "error", "description")
    found = next((error[name] for name in names if error.get(name)), error)
    if isinstance(found, list):
        found = "; ".join(error_text(item) if isinstance(item, dict) else str(item) for item in found)
    if isinstance(found, dict):
        found = error_text(found) if found is not error else orjson.dumps(found, default=str).decode()
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    return replace_lone_surrogates(f"{found} ({raw})" if raw else str(found)).strip()


def describe_web_page(raw: bytes) -> str:
    """`a web page: Sign in`: a page's title, or its text if it has none."""
    text = raw[:100_000].decode(errors="replace")
    title = HTML_TITLE_PATTERN.search(text)
    words = " ".join(html.unescape(HTML_TAG_PATTERN.sub(" ", title[1] if title else text)).split())
    return f"a web page: {words[:MAX_QUOTED_CHARS]}" if words else "a web page"


def classify_error(error: ServerError, endpoint: Endpoint) -> RequestFailure:
    """What an error reported by a server means."""
    status, message, code, body, headers = error
    why, text = f"{status}: {message}" if message else str(status), f"{code} {message}"
    if status in (301, 302, 303, 307, 308):
        return classify_redirect(status, str(headers.get("location") or ""), body, endpoint)
    if is_account_empty(status, text, code):
        key = describe_key_source(endpoint)
        return RequestFailure(
            "stop", why, body, f"Add credit to the account of the key in the {key}, then {RERUN_CLAUSE}"
        )
    if status == 429 and TOO_LONG_PATTERN.search(text):
        return RequestFailure("skip_row", why, body)
    if status == 429:
        return RequestFailure("wait", why, body, headers=headers)
    if status >= 500 and LOADING_PATTERN.search(text) and not LOADING_FAILED_PATTERN.search(text):
        return RequestFailure("wait_for_model", why, body, headers=headers)
    if status in UNAVAILABLE_STATUSES:
        away: Literal["skip_if_others_answered"] = "skip_if_others_answered"
        return RequestFailure("retry", why, body, headers=headers, names_cause=False, when_exhausted=away)
    if status >= 500 and status != 501:
        return RequestFailure("retry", why, body, headers=headers, names_cause=False, when_exhausted="skip_row")
    if status in RETRIED_STATUSES:
        return RequestFailure("retry", why, body, headers=headers)
    if fix := advice_for_parameter(text, endpoint):
        return RequestFailure("stop", why, body, fix, names_cause=False, when_exhausted="skip_row")
    if status not in (401, 404, 405, 407) and (finish := finish_for_row(text)):
        return RequestFailure("skip_row", why, body, advice_for_row(text, endpoint_role(endpoint)), finish=finish)
    return classify_other_refusal(error, why, endpoint)


def classify_other_refusal(error: ServerError, why: str, endpoint: Endpoint) -> RequestFailure:
    """What a refusal means whose message names neither a fault of the row nor a parameter."""
    status, body = error.status, error.body
    address = f"Check base_url against the endpoint's documentation (it often ends in /v1), and {RERUN_CLAUSE}"
    if status in (401, 403):
        fix = f"Check the key in the {describe_key_source(endpoint)}: it must be a valid key of this endpoint."
        return RequestFailure("stop", why, body, fix)
    if status == 404 and MODEL_PATTERN.search(f"{error.code} {error.message}"):
        fix = f"Check that the endpoint has a model named {endpoint.model!r}. {address}"
        return RequestFailure("stop", why, body, fix)
    if status == 404:
        fix = f"There is no chat API at this address, or it has no model named {endpoint.model!r}. {address}"
        return RequestFailure("stop", why, body, fix)
    if status == 405:
        return RequestFailure("stop", why, body, address)
    if status == 407:
        fix = f"The proxy requires a name and a password: add them to HTTPS_PROXY, and {RERUN_CLAUSE}"
        return RequestFailure("stop", why, body, fix)
    role = endpoint_role(endpoint)
    fix = f"The endpoint does not accept this request: check {role}.model and {role}.extra in the recipe."
    return RequestFailure("skip_row", why, body, fix, names_cause=False)


def is_account_empty(status: int, text: str, code: str) -> bool:
    """Whether the account has no credit. For a 429 only the code tells: rate limits are called quotas too."""
    if status == 402 or code.lower() in QUOTA_CODES:
        return True
    no_balance = bool(NO_BALANCE_PATTERN.search(text))
    if status == 429:
        return no_balance
    if status not in (400, 401, 403, 500) or finish_for_row(text):
        return False
    return no_balance or bool(BILLING_PATTERN.search(text))


def finish_for_row(text: str) -> Literal["refused", "content_filter", ""]:
    """The finish reason of a row in which a server finds a fault; "" if the message names none."""
    if TOO_LONG_PATTERN.search(text):
        return "refused"
    return "content_filter" if CONTENT_FILTER_PATTERN.search(text) else ""


def advice_for_row(text: str, role: str) -> str:
    """What to do if a server finds the same fault in every row."""
    if TOO_LONG_PATTERN.search(text):
        return f"Lower {role}.max_tokens, or use a model with a longer context."
    return "The endpoint's content filter refuses these rows: use other seeds, or another endpoint."


def advice_for_parameter(text: str, endpoint: Endpoint) -> str:
    """What to write in the recipe for a parameter that the model does not accept; "" if the message names none."""
    role, low = endpoint_role(endpoint), text.lower()
    if "stream" in low and ("mode" in low or "must" in low or "only" in low or UNSUPPORTED_PATTERN.search(text)):
        return f"Write in the recipe: {role}: {{stream: true}}"
    if "max_completion_tokens" in low and UNSUPPORTED_PATTERN.search(text):
        tokens = endpoint.max_tokens
        return f"Write in the recipe: {role}: {{extra: {{max_tokens: null, max_completion_tokens: {tokens}}}}}"
    if "max_tokens" in low and not TOO_LONG_PATTERN.search(text) and not CONTENT_FILTER_PATTERN.search(text):
        return f"Change {role}.max_tokens (now {endpoint.max_tokens}) as the endpoint's message above asks."
    if TEMPERATURE_PATTERN.search(text):
        return f"Write in the recipe: {role}: {{extra: {{temperature: null}}}}"
    named = next((name for name in endpoint.extra if name.lower() in low), "")
    return f"Remove {named} from {role}.extra in the recipe." if named and UNSUPPORTED_PATTERN.search(text) else ""


def classify_redirect(status: int, location: str, body: bytes, endpoint: Endpoint) -> RequestFailure:
    """The base_url to write if the server redirects to another address; a redirected POST would become a GET."""
    requested = f"{(endpoint.base_url or OPENAI_URL).rstrip('/')}/chat/completions"
    target = urljoin(requested, location)
    base = target.partition("?")[0].removesuffix("/").removesuffix("/chat/completions")
    fix = f"Write in the recipe: {endpoint_role(endpoint)}: {{base_url: {base}}}"
    if target == requested:
        fix = "The reply does not say where. Look up base_url in the endpoint's documentation."
    return RequestFailure("stop", f"{status}: the endpoint has moved to {base}", body, fix)


class RequestOutcomes:
    """Counts what came of the requests so far, to decide whether a failure concerns one row or all of them.

    `count_before` returns how many complete answers the stage had before this call, `answered_before` whether the
    endpoint ever answered anything. Both read the store, so they are called only when needed.
    """

    def __init__(self, count_before: Callable[[], int], answered_before: Callable[[], bool]) -> None:
        self.count_before, self.answered_before = count_before, answered_before
        self.answered = self.complete = self.live = 0
        self.useless = 0  # replies in a row
        self.skipped = self.failing = 0  # rows; `failing` in a row
        self.unexplained: RequestFailure | None = None  # the first that does not state what is wrong with its row

    def count_hit(self, reply: Reply) -> None:
        """Count an answer found in the store."""
        self.answered += 1
        self.complete += reply.complete

    def count_reply(self, reply: Reply) -> None:
        """Count a completion that the endpoint sent: it accepts requests of this form."""
        self.answered += 1
        self.live += 1
        self.failing = 0
        self.complete += reply.complete
        self.useless = 0 if reply.complete else self.useless + 1

    def count_unreadable(self) -> None:
        """Count a reply that may have been billed and is not a completion."""
        self.useless += 1

    def may_skip_row(self, failure: RequestFailure, tries: int, answered_since: int) -> bool:
        """Whether a failure after `tries` attempts concerns only its row, so that the row is skipped.

        `answered_since` is how many completions came since the attempt before: with none, a server that is reported as
        unavailable is so for all rows, however few are left.
        """
        if failure.action == "stop":
            return failure.when_exhausted == "skip_row" and self.live > 0
        if failure.when_exhausted == "skip_if_others_answered" and not answered_since:
            return False
        refused_now = failure.action == "skip_row"
        min_tries = 1 if failure.max_tries else MIN_TRIES_TO_SKIP_ROW
        if not refused_now and (failure.when_exhausted == "stop" or tries < min_tries):
            return False
        self.skipped += 1
        self.failing += not refused_now
        if not failure.names_cause:
            self.unexplained = self.unexplained or failure
        return self.skipped < MAX_FAILED_ROWS or self.others_were_answered(failure)

    def others_were_answered(self, failure: RequestFailure) -> bool:
        """Whether other rows were answered, so that the failure is this row's own."""
        if failure.action != "skip_row" and self.failing >= MAX_FAILED_ROWS:
            return False
        return self.answered > 0 or self.count_before() > 0 or (failure.names_cause and self.answered_before())

    def failure_of_all(self) -> RequestFailure | None:
        """The failure of a call in which nothing was answered and no server stated what is wrong with a row."""
        return self.unexplained if self.unexplained and not self.answered and not self.count_before() else None

    def are_useless(self) -> bool:
        """Whether too many replies in a row were useless to pay for more."""
        if self.useless < MAX_USELESS_REPLIES:
            return False
        return self.useless > TOLERATED_USELESS_SHARE * max(self.complete, self.count_before())
