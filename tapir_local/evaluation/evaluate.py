"""Evaluate a student: answer the questions, compare or grade the answers, and sum up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tapir_local.errors import TapirError
from tapir_local.evaluation.annotations import Annotation, read_annotations, write_annotations
from tapir_local.evaluation.answers import AnswerPlace, Player, answer_questions, safe_name, short_digest
from tapir_local.evaluation.questions import Question, QuestionSet, without_reference
from tapir_local.evaluation.rates import (
    EvaluationResult,
    compare_lengths,
    grade_means,
    length_notes,
    means_by_category,
    pair_rates,
    rates_by_category,
)
from tapir_local.evaluation.verdicts import (
    EvaluationDir,
    EvaluationWork,
    ask_teacher,
    grade_answers,
    judge_against,
    refuse_unreadable,
)
from tapir_local.files import file_sha256, write_rows
from tapir_local.inference.config import GenerationConfig
from tapir_local.inference.llama_process import LlamaPlace
from tapir_local.method.judge_quality import measure_judge
from tapir_local.method.length_control import GamedBaselines
from tapir_local.method.metrics import win_value
from tapir_local.printable import format_count
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Completion, Judgement, Progress, instruction_of
from tapir_local.run_dir import lock_run
from tapir_local.stages.context import Backends, Work
from tapir_local.stages.judge import judge_endpoint, judge_name
from tapir_local.teacher.endpoint import askable_kind

TEACHER, FILE_ANSWERS = "teacher", "file"  # opponents that are no model on this machine
IDS_NAMED = 5  # questions that a note names
AnswersByTurn = Sequence[dict[str, Completion]]


@dataclass(frozen=True)
class EvaluationJob:
    """What to evaluate, and how.

    `against` is a model on this machine, TEACHER, FILE_ANSWERS, or None to grade each answer alone. `recipe` has the
    judge, the teacher and the budget. `gamed` is alpaca_eval's fixed data, for its own instructions.
    """

    student: Player
    questions: QuestionSet
    against: Player | str | None
    recipe: Recipe
    config: GenerationConfig
    cache: Path
    gamed: GamedBaselines | None = None

    @property
    def place(self) -> EvaluationDir:
        """The evaluation's folder: one for each file of questions, for all models that answer it."""
        path, ids = self.questions.path, [question.id for question in self.questions.questions]
        return EvaluationDir(self.cache, f"{safe_name(path.stem)}-{short_digest(file_sha256(path), ids)}")

    @property
    def opponent(self) -> str | None:
        """The opponent's name for people."""
        if self.against == FILE_ANSWERS:
            return self.questions.answered_by
        if self.against == TEACHER:
            return Path(self.recipe.teacher.gguf or self.recipe.teacher.model or "the pocket teacher").name
        return self.against.name if isinstance(self.against, Player) else None

    def key(self) -> str:
        """The beginning of the names of the result's files."""
        against = self.against.key(self.config) if isinstance(self.against, Player) else self.opponent
        return f"{self.student.key(self.config)}-vs-{safe_name(against)}" if against else self.student.key(self.config)


def check_job(job: EvaluationJob) -> None:
    """TapirError if the questions and the opponent do not fit each other."""
    questions = job.questions.questions
    if job.gamed and (job.against is None or job.questions.total != len(job.gamed.difficulty)):
        raise TapirError(
            f"--gamed is for comparisons on AlpacaEval's own {len(job.gamed.difficulty):,} instructions",
            where=str(job.questions.path),
            fix="Leave it out: the rate is then controlled for length without the difficulty of the instructions.",
        )
    if job.against is None:
        return
    if job.questions.turns > 1:
        raise TapirError(
            "questions of several turns are graded, not compared: each model's later turns depend on its own answers",
            where=str(job.questions.path),
            fix="Leave out --against; --grade is then the default. To compare, grade both models.",
        )
    if job.against == FILE_ANSWERS and (bare := [one.id for one in questions if not one.answer]):
        raise TapirError(
            f"{len(bare):,} of {format_count(len(questions), 'question')} without an answer to compare with; "
            f"the first: {bare[0]}",
            where=str(job.questions.path),
            fix="Name an opponent with --against (teacher, base, a run or a GGUF), or grade the answers with --grade.",
        )


def make_answers(job: EvaluationJob, show: Progress) -> AnswersByTurn:
    """The student's answers; those of an opponent on this machine are made too. Both are kept in their files."""
    check_job(job)
    place, questions = answer_place(job, show), job.questions.questions
    with lock_run(job.place):
        if isinstance(job.against, Player):
            answer_questions(job.against, questions, job.config, place)
        return answer_questions(job.student, questions, job.config, place)


def evaluate(job: EvaluationJob, backends: Backends, show: Progress) -> EvaluationResult:
    """Have the answers judged, and sum up; what was answered or judged before is in the files and in the store.

    `show` is called with (done, total, note) while the teacher or the judge is asked.
    """
    answers = make_answers(job, show)
    work = EvaluationWork(job.recipe, job.place, backends, progress=show)
    place = answer_place(job, show)
    head = EvaluationResult(
        student=job.student.name,
        questions=str(job.questions.path),
        shape=job.questions.shape,
        against=job.opponent,
        judge=judge_name(job.recipe),
        folder=str(job.place.path),
        cut=sum(row.finish == "length" for turn in answers for row in turn.values()),
        notes=tuple(judge_notes(job)),
    )
    result = with_grades if job.against is None else with_rates
    found = result(job, head, work, answers, place)
    return replace(found, paid=work.tally["paid"], hits=work.tally["hits"])


def answer_place(job: EvaluationJob, show: Progress) -> AnswerPlace:
    """Where the job's answers are kept."""
    folder = job.place.path
    return AnswerPlace(folder, LlamaPlace(folder=folder / "llama"), show, lambda text: show(0, 0, text))


def opponent_answers(job: EvaluationJob, work: Work, place: AnswerPlace) -> dict[str, str]:
    """The opponent's answers by question id, without those that are missing."""
    questions = job.questions.questions
    if isinstance(job.against, Player):
        (found,) = answer_questions(job.against, questions, job.config, place)
        return asked_texts(found)
    if job.against == TEACHER:
        return ask_teacher(work, questions)
    return {one.id: one.answer for one in questions}


def asked_texts(answers: dict[str, Completion]) -> dict[str, str]:
    """The texts of answers by id, without questions that could not be asked."""
    return {id: row.text for id, row in answers.items() if row.asked}


def with_rates(
    job: EvaluationJob, head: EvaluationResult, work: Work, answers: AnswersByTurn, place: AnswerPlace
) -> EvaluationResult:
    """Have the student's answers judged against the opponent's, write the annotations, and compute the rates."""
    questions, own = job.questions.questions, asked_texts(answers[0])
    others = opponent_answers(job, work, place)
    judged, names = judge_against(work, questions, own, others), (job.student.name, job.opponent or "")
    refuse_unreadable([row.reason for row in judged], head.judge)
    rows = [
        annotate(one, (own.get(one.id, ""), others.get(one.id, "")), names, found, head.judge)
        for one, found in zip(questions, judged, strict=True)
    ]
    write_annotations(place.folder / f"{job.key()}.annotations.json", rows)
    controlled = compare_lengths(rows, job.gamed)
    rates, quality = pair_rates(rows, controlled), measure_judge(judged)
    return replace(
        head,
        pairs=rates,
        pairs_by_category=rates_by_category(rows, controlled),
        weights=controlled.weights if controlled else {},
        judge_quality=quality,
        notes=(*head.notes, *unjudged_notes(judged), *quality.notes, *length_notes(rates, controlled, rows)),
    )


def annotate(
    question: Question, outputs: tuple[str, str], generators: tuple[str, str], found: Judgement, judge: str
) -> Annotation:
    """A judgement as an annotation."""
    text = instruction_of(question.opening)
    return Annotation(text, outputs, generators, question.category, win_value(found), judge)


def with_grades(
    job: EvaluationJob, head: EvaluationResult, work: Work, answers: AnswersByTurn, place: AnswerPlace
) -> EvaluationResult:
    """Have the student's answers graded, write the grades, and compute the means."""
    grades = grade_answers(work, job.questions.questions, answers)
    refuse_unreadable([row.reason for row in grades], head.judge)
    write_rows(place.folder / f"{job.key()}.grades.jsonl", grades)
    bad = [row for row in grades if row.score is None]
    first = f"; the first, {bad[0].id} turn {bad[0].turn}: {bad[0].reason}" if bad else ""
    notes = [f"{len(bad):,} of {format_count(len(grades), 'answer')} without a grade{first}"] if bad else []
    if bare := without_reference(job.questions.questions) if job.questions.shape == "mt_bench" else []:
        ids = ", ".join(one.id for one in bare[:IDS_NAMED])
        notes.append(f"graded without a reference answer, which MT-Bench has for their category: {len(bare):,} ({ids})")
    return replace(
        head,
        grades=grade_means(grades, job.questions.turns),
        grades_by_category=means_by_category(grades, job.questions.turns),
        notes=(*head.notes, *notes),
    )


def judge_notes(job: EvaluationJob) -> list[str]:
    """A warning about a judge that knows only the pocket world, if a question is of another."""
    from tapir_local.pocket.world import parse_problem

    texts = [one.opening[-1].content for one in job.questions.questions]
    if askable_kind(judge_endpoint(job.recipe)) != "pocket" or all(map(parse_problem, texts)):
        return []
    return [
        "WARNING: the judge is the pocket teacher, a program that knows only the quickstart's world; its scores of "
        "other questions mean nothing"
    ]


def unjudged_notes(judged: Sequence[Judgement]) -> list[str]:
    """How many rows were not judged, and why the first was not."""
    bad = [row for row in judged if row.teacher is None]
    if not bad:
        return []
    return [
        f"{len(bad):,} of {format_count(len(judged), 'row')} could not be judged; "
        f"the first, {bad[0].id}: {bad[0].reason}"
    ]


def rates_of_annotations(path: Path, gamed: GamedBaselines | None = None) -> EvaluationResult:
    """The rates of a file of annotations; nothing is asked."""
    rows = read_annotations(path)
    controlled = compare_lengths(rows, gamed)
    rates = pair_rates(rows, controlled)
    return EvaluationResult(
        student=rows[0].generators[0],
        questions=str(path),
        shape="annotations",
        against=rows[0].generators[1],
        judge=rows[0].annotator,
        folder=None,
        pairs=rates,
        pairs_by_category=rates_by_category(rows, controlled),
        weights=controlled.weights if controlled else {},
        notes=tuple(length_notes(rates, controlled, rows)),
    )
