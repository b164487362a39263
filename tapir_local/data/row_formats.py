"""Write rows in the formats that training programs read: messages, prompt and completion, Alpaca, ShareGPT."""

from collections.abc import Callable, Mapping
from typing import Any

from tapir_local.records import Example, Message, Prompt

SHAREGPT_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def turn_dicts(turns: Prompt) -> list[dict[str, str]]:
    """Turns as objects with `role` and `content`."""
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def answer_turn(text: str) -> list[dict[str, str]]:
    """An answer as a list of one message."""
    return turn_dicts((Message("assistant", text),))


def messages_row(row: Example) -> dict[str, Any]:
    """`messages`: the whole conversation, as TRL, Axolotl and Unsloth read it."""
    return {"messages": turn_dicts(row.prompt) + answer_turn(row.completion)}


def prompt_completion_row(row: Example) -> dict[str, Any]:
    """`prompt` and `completion`, both as messages: TRL then computes the loss on the completion only."""
    return {"prompt": turn_dicts(row.prompt), "completion": answer_turn(row.completion)}


def alpaca_row(row: Example) -> dict[str, Any] | None:
    """`instruction`, `input` (empty) and `output`, with LLaMA-Factory's `system` and `history` of pairs.

    None for a conversation that is not question and answer in turn, which the format cannot hold.
    """
    system = "".join(turn.content for turn in row.prompt[:1] if turn.role == "system")
    turns = row.prompt[1:] if row.prompt[0].role == "system" else row.prompt
    earlier = turns[:-1]
    if [turn.role for turn in earlier] != ["user", "assistant"] * (len(earlier) // 2):
        return None
    pairs = [[one.content, other.content] for one, other in zip(earlier[::2], earlier[1::2], strict=True)]
    asked = {"instruction": turns[-1].content, "input": "", "output": row.completion}
    return {**asked, "system": system, "history": pairs}


def sharegpt_row(row: Example) -> dict[str, Any]:
    """`conversations`, of objects with `from` and `value`."""
    turns = (*row.prompt, Message("assistant", row.completion))
    return {"conversations": [{"from": SHAREGPT_SPEAKERS[turn.role], "value": turn.content} for turn in turns]}


ROW_WRITERS: Mapping[str, Callable[[Example], dict[str, Any] | None]] = {
    "messages": messages_row,
    "prompt-completion": prompt_completion_row,
    "alpaca": alpaca_row,
    "sharegpt": sharegpt_row,
}
