"""Refused requests: an odd row costs only itself, and what fails for every row stops the run with advice."""

import pytest
from server import ODD, WORDS, attempts, brings, completion, questions, raises, send, status, teacher

from tapir_local.recipe.endpoints import Judge
from tapir_local.teacher.ask import ask

pytestmark = pytest.mark.usefixtures("no_pauses")


# Refusals of one row


@pytest.mark.parametrize(
    ("name", "finish", "words", "sent"),
    [
        ("inspected", "content_filter", "may contain inappropriate content", 1),
        ("too long", "refused", "maximum context length is 64 tokens", 1),
        ("empty choices", "", "without choices", 2),
        ("null choices", "", "without choices", 2),
        ("content object", "", "no readable text", 2),
        ("empty body", "", "it is empty", 2),
        ("list", "", "a JSON list", 2),
    ],
)
def test_a_row_that_the_server_does_not_answer_costs_that_row(server, store, name, finish, words, sent):
    for _ in range(2):  # at the next start too
        server.faults["3"] = [ODD[name]] * sent
        answers = ask(questions(*WORDS), teacher(server), store, run="r")
        assert [answer.complete for answer in answers] == [word != "3" for word in WORDS]
        assert (answers[3].finish, answers[3].text) == (finish, "")
        assert words in answers[3].why
    assert len(server.bodies) == len(WORDS) - 1 + 2 * sent
    assert {row for row, _ in attempts(store)} == {"row-3"}


TOO_LONG = [
    (400, "This model's maximum context length is 4097 tokens. However, you requested 5000 tokens", ""),
    (400, "the request exceeds the available context size, try increasing it", "exceed_context_size_error"),
    (
        400,
        "'max_tokens' or 'max_completion_tokens' is too large: 9. This model's maximum context length is 8 tokens",
        "",
    ),
    (413, "Request Entity Too Large", ""),
    (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. Given: input tokens exceed", ""),
    (400, "Range of input length should be [1, 30720]", "InvalidParameter"),
    (400, "prompt is too long: 210000 tokens > 200000 maximum", "invalid_request_error"),
    (400, "Invalid 'messages[0].content': string too long.", "string_above_max_length"),
    (429, "Request too large for gpt-4o on tokens per min (TPM): Limit 10000, Requested 20000", "rate_limit_exceeded"),
]


FILTERED = [
    (400, "The response was filtered due to the prompt triggering Azure's content management policy", "content_filter"),
    (400, "Content Exists Risk", "invalid_request_error"),
    (400, "Your request was rejected as a result of our safety system.", "content_policy_violation"),
    (403, "Your chosen model requires moderation and your input was flagged for violence", "403"),
    (451, "harmful", ""),
]


OTHERS = [
    (400, "invalid unicode in messages[0]", ""),
    (422, "body.messages.0.content: wrong", ""),
    (400, "the server dislikes it", ""),
]


@pytest.mark.parametrize(
    ("code", "message", "kind", "finish"),
    [(*case, "refused") for case in (*TOO_LONG, *OTHERS)] + [(*case, "content_filter") for case in FILTERED],
)
def test_every_wording_of_a_refused_row(server, store, code, message, kind, finish):
    server.faults["3"] = [status(code, message, kind)]
    answers = ask(questions(*WORDS), teacher(server, concurrency=1), store, run="r")
    assert [answer.complete for answer in answers] == [word != "3" for word in WORDS]
    assert (answers[3].finish, answers[3].why) == (finish, f"{code}: {message}")
    assert len(server.bodies) == len(WORDS)


@pytest.mark.parametrize("shape", ["string", "detail", "details", "list", "errors", "code beside"])
def test_errors_of_every_shape_keep_the_servers_words(server, store, shape):
    words = "prompt is too long"
    bodies = {
        "string": {"error": words},
        "detail": {"detail": words},
        "details": {"detail": [{"loc": ["body"], "msg": words}]},
        "list": [{"error": {"message": words}}],
        "errors": {"errors": [{"message": words}]},
        "code beside": {"object": "error", "message": words, "code": 40303},
    }
    server.faults["1"] = [brings(bodies[shape], 400)]
    answers = ask(questions("0", "1"), teacher(server, concurrency=1), store, run="r")
    assert (answers[1].finish, answers[1].why) == ("refused", f"400: {words}")


def test_a_row_at_the_first_place_costs_that_row_too(server, store):
    server.faults["0"] = [status(400, "the server dislikes it")]
    answers = ask(questions(*WORDS), teacher(server, concurrency=1), store, run="r")
    assert [answer.complete for answer in answers] == [False] + [True] * 7


def test_odd_rows_left_alone_at_a_later_start_cost_themselves_again(server, store):
    server.faults = {word: [status(400, "the server dislikes it")] * 2 for word in WORDS[:6]}
    ask(questions(*reversed(WORDS)), teacher(server, concurrency=1), store, run="r")
    (answer,) = ask(questions("0"), teacher(server), store, run="r")
    assert answer.why == "400: the server dislikes it"


@pytest.mark.parametrize("name", ["inspected", "too long", "empty choices", "list", "empty body"])
def test_if_every_row_is_refused_it_stops_after_a_few(server, store, name):
    server.otherwise = ODD[name]
    words = [str(number) for number in range(100)]
    with raises(str(server.url)):
        ask(questions(*words), teacher(server, concurrency=2), store, run="r")
    assert len(server.bodies) <= (7 if name in ("inspected", "too long") else 22)


def test_an_unexplained_refusal_of_all_rows_stops_even_with_few_rows(server, store):
    server.otherwise = status(400, "the server dislikes it")
    with raises("400: the server dislikes it\n  The endpoint does not accept this request"):
        ask(questions("a", "b"), teacher(server), store, run="r")


def test_a_row_at_which_the_server_fails_every_time_costs_that_row(server, store):
    server.faults["3"] = [status(500, "index out of range")] * 6
    answers = ask(questions(*WORDS), teacher(server), store, run="r")
    assert [answer.complete for answer in answers] == [word != "3" for word in WORDS]
    assert answers[3].why == "500: index out of range"


def test_a_row_that_a_gateway_never_answers_while_it_answers_others_costs_that_row(server, store):
    server.faults["0"] = [status(502, "bad gateway")] * 6
    answers = ask(questions(*map(str, range(200))), teacher(server, concurrency=2), store, run="r")
    assert [answer.complete for answer in answers] == [False, *[True] * 199]


@pytest.mark.parametrize("code", [502, 503])
def test_a_server_that_is_away_when_few_rows_are_left_costs_none(server, store, code):
    for word in "67":
        server.faults[word] = [status(code, "no server is up")] * 6
    with raises("no server is up (tried 6 times)"):
        ask(questions(*WORDS), teacher(server), store, run="r")
    server.faults.clear()
    answers = ask(questions(*WORDS), teacher(server), store, run="r")
    assert [answer.text for answer in answers] == [f"re: {word}" for word in WORDS]


def test_a_server_that_fails_at_everything_stops(server, store):
    ask(questions(*WORDS), teacher(server), store, run="r")
    server.otherwise = status(500, "the engine is dead")
    with raises("the engine is dead (tried 3 times)"):
        ask(questions(*WORDS, *(f"{word}x" for word in WORDS)), teacher(server, attempts=3), store, run="r")


# Refusals of everything


@pytest.mark.parametrize(
    ("name", "words", "fix"),
    [
        ("error in 200", "Insufficient credits", "Add credit to the account"),
        ("no money", "402: Insufficient Balance", "Add credit to the account"),
        ("web page", "a web page: Sign in", "base_url"),
        (
            "new names",
            "Use 'max_completion_tokens'",
            "teacher: {extra: {max_tokens: null, max_completion_tokens: 1024}}",
        ),
        ("stream only", "only support stream mode", "teacher: {stream: true}"),
    ],
)
def test_failures_of_all_rows_quote_the_server_and_say_what_to_do(server, store, name, words, fix):
    server.otherwise = ODD[name]
    with raises(words) as caught:
        ask(questions(*map(str, range(50))), teacher(server, concurrency=2), store, run="r")
    assert fix in str(caught.value)
    assert len(server.bodies) <= 6


def test_the_proposed_recipe_lines_work(server, store):
    server.otherwise = ODD["new names"]
    extra = {"max_tokens": None, "max_completion_tokens": 64}
    with raises("teacher: {extra: {temperature: null}}"):
        ask(questions("a", temperature=0.7), teacher(server, extra=extra), store, run="r")
    (answer,) = ask(
        questions("a", temperature=0.7), teacher(server, extra={**extra, "temperature": None}), store, run="r"
    )
    assert answer.complete


def test_the_proposed_lines_for_a_judge_name_the_judge(server, store):
    server.otherwise = ODD["new names"]
    judge = Judge(kind="openai", base_url=server.url, model="m", max_tokens=99)
    with raises("judge: {extra: {max_tokens: null, max_completion_tokens: 99}}"):
        ask(questions("a"), judge, store, run="r")


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_another_address_is_named_or_the_request_stays_a_post(server, store, code):
    server.otherwise = lambda handler, body: (
        send(handler, 200, completion("there"))
        if "/v2/" in handler.path
        else send(handler, code, b"", {"location": "/api/v2/chat/completions"})
    )
    if code in (307, 308):
        assert ask(questions("a"), teacher(server), store, run="r")[0].text == "there"
        return
    with raises(f"teacher: {{base_url: http://127.0.0.1:{server.port}/api/v2}}"):
        ask(questions("a"), teacher(server), store, run="r")
    assert len(server.bodies) == 1


def test_the_key_is_not_sent_to_another_host(server, store, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    server.otherwise = brings(b"", 307, location="http://elsewhere.invalid/v1/chat/completions")
    with raises("teacher: {base_url: http://elsewhere.invalid/v1}"):
        ask(questions("a"), teacher(server), store, run="r")


@pytest.mark.parametrize(
    ("code", "message", "kind", "fix"),
    [
        (401, "Invalid token", "", "environment variable OPENAI_API_KEY"),
        (403, "Country not supported", "", "environment variable OPENAI_API_KEY"),
        (404, "404 page not found", "", "often ends in /v1"),
        (404, "The model `x` does not exist", "model_not_found", "a model named 'm'"),
        (405, "Method Not Allowed", "", "base_url"),
        (403, "Your account balance is insufficient", "", "Add credit"),
        (429, "Insufficient Balance", "1113", "Add credit"),
    ],
)
def test_statuses_give_their_own_advice_at_once(server, store, code, message, kind, fix):
    server.otherwise = status(code, message, kind)
    with raises(f"{code}: {message}") as caught:
        ask(questions(*WORDS), teacher(server, concurrency=1), store, run="r")
    assert fix in str(caught.value)
    assert len(server.bodies) == 1
