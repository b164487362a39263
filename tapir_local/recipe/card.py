"""The settings that no result depends on: tolerated failures, and facts for the model card."""

from pydantic import Field

from tapir_local.recipe.types import Settings, Share


class Limits(Settings):
    """How many failures a run tolerates before it stops."""

    unusable: Share = Field(
        0.05,
        description="maximum share of a stage's rows that are left out as unusable (refused by the server, cut off, "
        "rejected by the chat template); with more, the stage stops (a single row stops it only at 0); "
        "unusable.jsonl lists them",
    )


class Card(Settings):
    """Facts for the model card that the program cannot know; the card says `not stated` for null."""

    license: str | None = Field(None, description="license of the trained student")
    base_license: str | None = Field(None, description="license of the base model")
    data_license: str | None = Field(None, description="license of the seeds")
    terms: str | None = Field(None, description="the teacher's terms for the use of its answers")
    language: str | None = Field(None, description="language of the data, such as `en`")
