"""Have the answers of an evaluation judged through the store: against another's, in both orders, or graded alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.evaluation.questions import Question
from tapir_local.evaluation.rates import Grade
from tapir_local.method import parsing, prompts
from tapir_local.printable import format_count
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Answer, Completion, Example, Judgement, Request
from tapir_local.run_dir import RunDir
from tapir_local.stages.context import AskBackend, Work
from tapir_local.stages.judge import NO_ANSWER_REASONS, BuildPrompt, ask_judge, ask_twice

ANSWER_STAGE, EVALUATE_STAGE = "evaluate-answer", "evaluate"  # of its calls in the store: the teacher's, the judge's


@dataclass(frozen=True)
class EvaluationDir(RunDir):
    """The folder cache/evaluations/<name>. In the store its calls belong to the run of this name."""

    @property
    def path(self) -> Path:
        return self.cache / "evaluations" / self.name


@dataclass
class EvaluationWork(Work):
    """What judging needs, for an evaluation: its calls are counted, but not recorded in a run's tapir.lock."""

    def ask(self, ask: AskBackend, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests, counted as paid or hits."""
        answers = ask(requests, progress=self.progress) if requests else []
        hits = sum(answer.hit for answer in answers)
        self.tally["hits"] += hits
        self.tally["paid"] += len(answers) - hits
        return answers


def require_judge(recipe: Recipe, where: str) -> None:
    """TapirError if the recipe has no judge: likeness to an answer is no comparison with it."""
    if recipe.judge.kind == "reference":
        raise TapirError(
            "there is no judge: `judge: reference` only measures likeness to an answer",
            where=where,
            fix="Name one: --set judge.model=NAME (with judge.base_url for a server of your own) or "
            "--set judge.gguf=FILE.",
        )


def refuse_unreadable(reasons: Sequence[str], judge: str) -> None:
    """TapirError if nothing could be judged; `reasons` are those of all rows, "" for a judged one."""
    if reasons and all(reasons):
        fix = "Use a judge that reliably replies in JSON, or raise judge.max_tokens if replies were cut."
        what = f"{judge} judged none of the {format_count(len(reasons), 'answer')}; the first: {reasons[0]}"
        raise TapirError(what, where="judge", fix=fix)


def ask_teacher(work: Work, questions: Sequence[Question]) -> dict[str, str]:
    """The teacher's answers to the first turns, by question id; without those that are incomplete.

    TapirError if the recipe's teacher is a file of recorded answers.
    """
    if work.recipe.teacher.kind == "recorded":
        what = "this recipe's teacher is a file of recorded answers, which cannot be asked"
        raise TapirError(
            what, where="--against teacher", fix="Compare with another model, or with the answers in FILE."
        )
    requests = [work.request(ANSWER_STAGE, one.id, prompts.answer_prompt(one.opening)) for one in questions]
    answers = work.ask(work.backends.teacher, requests)
    return {one.id: answer.text for one, answer in zip(questions, answers, strict=True) if answer.complete}


def judge_against(
    work: Work, questions: Sequence[Question], own: Mapping[str, str], others: Mapping[str, str]
) -> list[Judgement]:
    """A judgement of each question's two answers, by judge.mode; `teacher` in it is the opponent.

    A question with only one answer is not judged.
    """
    both = [one for one in questions if one.id in own and one.id in others]
    rows = [Example(one.id, one.opening, others[one.id]) for one in both]
    judged = {row.id: row for row in ask_judge(work, EVALUATE_STAGE, rows, own)} if rows else {}
    return [
        replace(judged[one.id], student_length=len(own[one.id]), teacher_length=len(others[one.id]))
        if one.id in judged
        else Judgement(one.id, None, None, reason="an answer is missing")
        for one in questions
    ]


def grade_answers(
    work: Work, questions: Sequence[Question], answers: Sequence[Mapping[str, Completion]]
) -> list[Grade]:
    """The grade of every turn of every question; a turn that the student could not be asked is not graded.

    Without a reference and an earlier turn the request is that of `judge.mode: single`, so that it is paid for once.
    """
    asked, why = dict[str, BuildPrompt](), dict[str, str]()
    for one in questions:
        for turn in range(one.turns):
            name, answer = f"{one.id}#{turn + 1}", answers[turn].get(one.id)
            if answer is None or not answer.asked:
                why[name] = NO_ANSWER_REASONS[answer.finish] if answer else "no answer to the turn before"
            else:
                said = [answers[before][one.id].text for before in range(turn)]
                asked[name] = build_grade_prompt(one, said, answer.text)
    read, unreadable = ask_twice(work, EVALUATE_STAGE, asked, parsing.parse_score, prompts.SINGLE_JUDGEMENT)
    why |= unreadable
    return [
        Grade(one.id, turn, one.category, read.get(f"{one.id}#{turn}"), why.get(f"{one.id}#{turn}", ""))
        for one in questions
        for turn in range(1, one.turns + 1)
    ]


def build_grade_prompt(question: Question, said: Sequence[str], answer: str) -> BuildPrompt:
    """The request for the grade of an answer, after the answers `said` to the turns before."""
    turn, conversation = len(said), question.conversation(said)
    reference = question.references[turn] if turn < len(question.references) else ""
    if not reference and not turn:
        return partial(prompts.judge_single_prompt, conversation, answer)
    return partial(prompts.grade_turn_prompt, conversation, answer, reference)
