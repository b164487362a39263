"""The embedded teacher's identity in keys: its calls stay hits as long as it replies the same."""

import hashlib
import json
from pathlib import Path

from tapir_local.method import prompts
from tapir_local.pocket.teacher import respond
from tapir_local.recipe.endpoints import Teacher
from tapir_local.recipe.tasks import TASKS
from tapir_local.records import Message
from tapir_local.teacher.endpoint import endpoint_identity

SEEDS = Path(__file__).parents[2] / "tapir_local" / "assets" / "pocket_seeds.json"
REPLIES_DIGEST = "184ee22f74bc22746fa5ac24ba6ccc3fcba12472dc1f2db860caca5c89bdbe52"


def digest_of_replies() -> str:
    """The SHA-256 of the replies to every 40th seed, in nine of the forms that a run asks."""
    digest = hashlib.sha256()
    for seed in json.loads(SEEDS.read_text(encoding="utf-8"))[::40]:
        prompt, answer, task = (Message("user", seed["instruction"]),), seed["output"], TASKS["Math"]
        forms = [
            prompts.answer_prompt(prompt),
            prompts.classify_prompt(prompt, TASKS),
            prompts.judge_prompt(prompt, answer, "No idea."),
        ]
        forms += [
            prompts.judge_single_prompt(prompt, answer),
            prompts.expand_prompt(prompt, task),
            prompts.expand_prompt(prompt, task, "rarer"),
        ]
        forms += [
            prompts.check_draft_prompt(prompt, task),
            prompts.refine_prompt(prompt, task),
            prompts.refine_prompt(prompt, task, answer),
        ]
        for number, messages in enumerate(forms):
            body = {"messages": [{"role": turn.role, "content": turn.content} for turn in messages], "seed": number}
            digest.update(respond("POST", "/v1/chat/completions", json.dumps(body).encode()).content)
    return digest.hexdigest()


def test_a_change_of_replies_needs_a_new_version() -> None:
    """If this fails, the teacher replies differently: change POCKET_VERSION, and the digest above."""
    assert endpoint_identity(Teacher(kind="pocket")) == "pocket 2d29f0ccf63c"
    assert digest_of_replies() == REPLIES_DIGEST
