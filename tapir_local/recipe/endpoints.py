"""The settings of the endpoints: teacher and judge."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from tapir_local.recipe.types import OptionalPath, Settings, Share, infer_kind


class Price(Settings):
    """The price of an endpoint."""

    input: float = Field(ge=0, description="price per million tokens of prompts")
    output: float = Field(ge=0, description="price per million tokens of replies")


class Endpoint(Settings):
    """An OpenAI-compatible endpoint or a GGUF, and how it is asked."""

    gguf: OptionalPath = Field(
        None,
        description="a GGUF file on this machine, instead of an endpoint; for a split GGUF, its first part",
    )
    context: int = Field(
        4096,
        ge=32,
        description="context of a GGUF: tokens of a prompt and its reply together, at most the model's own context",
    )
    base_url: str | None = Field(None, description="URL of an OpenAI-compatible server; null: OpenAI's")
    model: str | None = Field(None, description="name of the model at the endpoint")
    alias: str | None = Field(
        None, description="name of the endpoint in the keys of stored calls, instead of its base_url"
    )
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the API key")
    api_key_file: OptionalPath = Field(None, description="file that holds the API key, instead of the variable")
    temperature: float = Field(
        0.7, ge=0, le=2, description="sampling temperature of answers, expansions and refinements; labels use 0"
    )
    max_tokens: int = Field(1024, ge=1, description="maximum tokens of a reply")
    extra: Mapping[str, Any] = Field(
        default_factory=dict, description="more parameters of the request, sent unchanged; not for a GGUF"
    )
    thinking: Literal["strip", "keep"] = Field(
        "strip", description="reasoning before an answer (`<think>…</think>`): `strip` removes it, `keep` keeps it"
    )
    stream: bool = Field(False, description="stream replies, for endpoints that require it")
    send_seed: bool = Field(False, description="send the draw number as the API's `seed` parameter")
    concurrency: int = Field(
        16, ge=1, description="maximum number of requests in flight, or of replies that a GGUF generates in parallel"
    )
    timeout: float = Field(120.0, gt=0, description="seconds after which a request is retried")
    attempts: int = Field(6, ge=1, description="maximum attempts per request, not counting replies of status 429")
    batch: bool = Field(False, description="use OpenAI's Batch API: half the price; answers take up to a day")
    price: Price | None = Field(
        None, description="price of the endpoint, for cost reports, cost estimates and budget.money"
    )

    @model_validator(mode="before")
    @classmethod
    def kind_from_settings(cls, value: Any) -> Any:
        """Infer the kind: `{model: gpt-4o}` is an endpoint, `{gguf: x.gguf}` a file; a given `kind` is kept."""
        if not isinstance(value, dict) or value.get("kind") is not None:
            return value
        kind = infer_kind(value)
        return {**value, "kind": kind} if kind else {name: item for name, item in value.items() if name != "kind"}


class Teacher(Endpoint):
    """The teacher, which answers, labels, expands and refines."""

    kind: Literal["openai", "pocket", "recorded", "gguf"] = Field(
        "openai",
        description="kind of teacher, inferred from the other settings if left out: `openai`: an endpoint; `pocket`: a "
        "program, no LLM; `recorded`: the seed file's answers; `gguf`: a file on this machine",
    )


class Judge(Endpoint):
    """The judge, which scores answers."""

    kind: Literal["teacher", "openai", "reference", "gguf"] = Field(
        "teacher",
        description="kind of judge, inferred from `model`, `base_url` or `gguf` if left out: `teacher`: the teacher's "
        "model; `openai`: an endpoint; `reference`: ROUGE-L with the teacher's answer; `gguf`: a file on this machine",
    )
    mode: Literal["pair", "single"] = Field(
        "pair",
        description="`pair`: score both answers together, in both orders; `single`: score each answer alone (the "
        "teacher's is paid for once, later rounds cost one call per row)",
    )
    temperature: float = Field(0.0, ge=0, le=2, description="sampling temperature of judgements")
    max_tokens: int = Field(1024, ge=1, description="maximum tokens of a judgement, including reasoning")
    ahead: Literal["auto"] | bool = Field(
        "auto",
        description="ask a judge behind an endpoint about finished answers while the student still writes others; "
        "`auto`: if its base_url is not on this machine (localhost, 127.…, ::1), whose processors the student needs",
    )
    max_unjudged: Share = Field(
        0.05, description="share of rows without a readable judgement above which a round stops"
    )
    health: Literal["warn", "stop"] = Field(
        "warn",
        description="what happens if the scores are useless (all the same, or no better than chance by the checker): "
        "`warn`, or `stop` the round before it spends more",
    )
