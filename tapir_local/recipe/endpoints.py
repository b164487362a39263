"""The settings of those who are asked: a teacher and a judge."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from tapir_local.recipe.types import OptionalPath, Settings, Share, infer_kind


class Price(Settings):
    """What an endpoint costs."""

    input: float = Field(ge=0, description="money for a million tokens of prompts")
    output: float = Field(ge=0, description="money for a million tokens of replies")


class Endpoint(Settings):
    """An OpenAI-compatible endpoint and how it is asked."""

    gguf: OptionalPath = Field(
        None,
        description="a GGUF file on this machine that answers, instead of an endpoint; of a split one, the first part",
    )
    context: int = Field(
        4096, ge=32, description="tokens of a prompt and its reply together, where a GGUF answers; its own at the most"
    )
    base_url: str | None = Field(None, description="of any OpenAI-compatible server; the vendor's own if left out")
    model: str | None = Field(None, description="the model's name as the endpoint knows it")
    alias: str | None = Field(None, description="a name for the endpoint in the store's keys, instead of its base_url")
    api_key_env: str = Field("OPENAI_API_KEY", description="the environment variable that holds the key")
    api_key_file: OptionalPath = Field(None, description="a file that holds the key, instead of the variable")
    temperature: float = Field(
        0.7, ge=0, le=2, description="of answers, expansions and refinements; labels are asked at 0"
    )
    max_tokens: int = Field(1024, ge=1, description="tokens of a reply at the most")
    extra: Mapping[str, Any] = Field(
        default_factory=dict, description="further parameters of the request, sent as they are; a GGUF takes none"
    )
    thinking: Literal["strip", "keep"] = Field(
        "strip", description="remove what a model thinks aloud before its answer (`<think>…</think>`), or keep it"
    )
    stream: bool = Field(False, description="have replies sent piece by piece, where an endpoint answers only so")
    send_seed: bool = Field(False, description="send the draw number as the API's `seed`, where the endpoint knows it")
    concurrency: int = Field(16, ge=1, description="requests in flight at the most; replies that a GGUF writes at once")
    timeout: float = Field(120.0, gt=0, description="seconds until a request is given up and sent again")
    attempts: int = Field(6, ge=1, description="tries of one request, answers of 429 not counted")
    batch: bool = Field(
        False, description="ask by OpenAI's Batch API: half the price, and up to a day until the answers are there"
    )
    price: Price | None = Field(None, description="of the endpoint, for receipts, forecasts and a budget of money")

    @model_validator(mode="before")
    @classmethod
    def kind_from_settings(cls, value: Any) -> Any:
        """`{model: gpt-4o}` is an endpoint and `{gguf: x.gguf}` a file; a `kind` that is written is kept."""
        if not isinstance(value, dict) or value.get("kind") is not None:
            return value
        kind = infer_kind(value)
        return {**value, "kind": kind} if kind else {name: item for name, item in value.items() if name != "kind"}


class Teacher(Endpoint):
    """Who answers, labels, expands and refines."""

    kind: Literal["openai", "pocket", "recorded", "gguf"] = Field(
        "openai",
        description="who is asked, told from the other settings if left out: `openai`: an endpoint; `pocket`: a "
        "program, no LLM; `recorded`: the seed file's answers; `gguf`: a file on this machine",
    )


class Judge(Endpoint):
    """Who scores answers."""

    kind: Literal["teacher", "openai", "reference", "gguf"] = Field(
        "teacher",
        description="who is asked; told from `model`, `base_url` or `gguf` if left out: `teacher`: the same model; "
        "`openai`: an endpoint; `reference`: likeness to the teacher's answer; `gguf`: a file on this machine",
    )
    mode: Literal["pair", "single"] = Field(
        "pair",
        description="`pair`: both answers side by side, asked in both orders; `single`: each answer alone, so that the "
        "teacher's is paid for once and later rounds pay one call a row",
    )
    temperature: float = Field(0.0, ge=0, le=2, description="of judgements")
    max_tokens: int = Field(1024, ge=1, description="tokens of a judgement at the most, with what is thought before it")
    max_unjudged: Share = Field(0.05, description="share of rows without a readable judgement at which a round stops")
