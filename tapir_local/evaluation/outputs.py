"""Write a student's answers as other programs read them: alpaca_eval's model_outputs.json, FastChat's answers."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tapir_local.evaluation.answers import short_digest
from tapir_local.evaluation.questions import QuestionSet
from tapir_local.files import atomic_write, write_json
from tapir_local.printable import safe_json
from tapir_local.records import Completion, instruction_of


def write_outputs(
    path: Path, questions: QuestionSet, answers: Sequence[Mapping[str, Completion]], generator: str
) -> None:
    """MT-Bench's answers in FastChat's format, others in alpaca_eval's."""
    write = write_fastchat_answers if questions.shape == "mt_bench" else write_model_outputs
    write(path, questions, answers, generator)


def write_model_outputs(
    path: Path, questions: QuestionSet, answers: Sequence[Mapping[str, Completion]], generator: str
) -> None:
    """A JSON list of objects with instruction, output, generator and dataset, in the order of the questions."""
    rows = [
        {
            "instruction": instruction_of(one.opening),
            "output": answers[0][one.id].text,
            "generator": generator,
            "dataset": one.category,
        }
        for one in questions.questions
    ]
    write_json(path, rows)


def write_fastchat_answers(
    path: Path, questions: QuestionSet, answers: Sequence[Mapping[str, Completion]], generator: str
) -> None:
    """JSON lines as FastChat's model_answer/<model>.jsonl has them; a turn that could not be asked is empty."""
    import orjson

    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        for one in questions.questions:
            turns = [answers[turn][one.id].text if one.id in answers[turn] else "" for turn in range(one.turns)]
            row = {
                "question_id": int(one.id) if one.id.isdecimal() else one.id,
                "answer_id": short_digest(one.id, generator, turns),
                "model_id": generator,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": time.time(),
            }
            file.write(safe_json(orjson.dumps(row).decode()) + "\n")
