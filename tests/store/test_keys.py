"""The key of a call: equal requests have one key, and any change of a request gives another key."""

import orjson
import pytest
from calls import BODY
from hypothesis import given, settings
from hypothesis import strategies as st

from tapir_local.errors import TapirError
from tapir_local.store import keys


def test_golden_key():
    """An upgrade must not change the keys of paid calls: if this fails, the key is wrong, not the test."""
    got = keys.request_key("https://api.openai.com/v1", {**BODY, "logit_bias": {50256: -100}, "seed": None}, 3)
    assert got.hex() == ("d2f9be7fd8e9429879307b1e8354dbcca6303053ee7a930c5f4946dcf5505879")


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "system", "content": "Be long."}, BODY["messages"][1]]},
        {"max_tokens": 257},
        {"top_p": 0.9},
        {"num_ctx": 4096},
        {"unheard_of": None},
        {"temperature": 0.71},
        {"model": "n"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_change_of_the_body_changes_the_key(change):
    assert keys.request_key("e", {**BODY, **change}) != keys.request_key("e", BODY)


def test_absent_differs_from_null_and_draws_differ():
    assert (
        len(
            {keys.request_key("e", BODY), keys.request_key("e", {**BODY, "stop": None}), keys.request_key("e", BODY, 1)}
        )
        == 3
    )


def test_the_same_model_on_two_servers_has_two_keys():
    assert keys.request_key("http://localhost:8000/v1", BODY) != keys.request_key("http://localhost:8001/v1", BODY)


def test_key_order_and_number_format_do_not_change_the_key():
    turned = {**dict(reversed(BODY.items())), "max_tokens": 256.0}
    assert keys.request_key("e", turned) == keys.request_key("e", BODY)
    assert keys.canonical_json([-0.0, 1e3, True, 0.5]) == b"[0,1000,true,0.5]"


def test_credentials_timeout_and_streaming_do_not_change_the_key():
    assert keys.request_key("e", {**BODY, "stream": True, "timeout": 3, "api_key": "sk-1"}) == keys.request_key(
        "e", BODY
    )
    assert b"sk-1" not in keys.request_text("e", {**BODY, "api_key": "sk-1"}, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", "\ud800", 2**70])
def test_values_that_are_not_json_are_refused(value):
    with pytest.raises(TapirError, match="request"):
        keys.request_key("e", {**BODY, "extra": value})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(json_values)
def test_canonical_json_is_a_fixed_point(value):
    text = keys.canonical_json(value)
    assert keys.canonical_json(orjson.loads(text)) == text
    assert text == orjson.dumps(keys.normalize_value(value), option=orjson.OPT_SORT_KEYS)  # also if no copy was made


@pytest.mark.parametrize(
    ("spelled", "one"),
    [
        ("HTTPS://API.OpenAI.com:443/v1/", "https://api.openai.com/v1"),
        ("http://localhost:80//v1/../v1", "http://localhost/v1"),
        ("http://me:secret@host:8000/v1", "http://host:8000/v1"),
        ("http://[::1]:8080/", "http://[::1]:8080"),
        ("https://host/v1?api-version=1", "https://host/v1?api-version=1"),
    ],
)
def test_base_urls_are_normalized(spelled, one):
    assert keys.normalize_base_url(spelled) == one


@pytest.mark.parametrize("wrong", ["localhost:8000", "ftp://host", "http://host:port", ""])
def test_invalid_base_urls_are_refused(wrong):
    with pytest.raises(TapirError, match="URL"):
        keys.normalize_base_url(wrong)
