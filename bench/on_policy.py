"""On-policy distillation by TRL's own trainer, as an outside reference: same student, prompts, LoRA and tokens as ours.

    python bench/on_policy.py --folder DIR                      run what is missing, then report
    python bench/on_policy.py --folder DIR --report             only report what is there
    python bench/on_policy.py --folder DIR --seeds 1 --teacher-rows 400 \\
        --set curriculum.rows=64 --set seeds.holdout=100        a small try, which says nothing
    python bench/on_policy.py --folder DIR --teacher FOLDER --set student.path=FOLDER
                                                                other models; the tasks and checkers are the same

On-policy distillation needs a teacher's probabilities for every token, and the student's tokenizer. The pocket teacher
is a program and has none. So the bench first makes a teacher, once for all random seeds: the pocket student, of which
all weights are fine-tuned by our own training on many exact answers to problems that are not among the seeds. Its
accuracy is a line of the table; it is the limit of what the arms can learn.

For each random seed a holdout and curriculum.rows prompts are drawn from the pocket seeds, as a round of the curriculum
`uniform` draws them (a problem's task is known exactly here, so no classifier is trained). The teacher writes an answer
to each prompt by llama.cpp; prompts whose answer it does not end are left out of all arms. The arms start from the
untrained student:

    sft                 our training on the teacher's written answers, train.epochs epochs
    on-policy           trl.DistillationTrainer on the same prompts, until it has trained on as many tokens of answers
    sft-then-on-policy  half the epochs of sft, then on-policy for the other half of the tokens

All have the LoRA, batch size and peak learning rate of the quickstart; --rate sets another rate for on-policy. Answers
to the holdout are llama.cpp's, on our export; the exact checkers count the right ones. Finished parts are kept in
--folder; an interrupted training of TRL's begins again. Seconds are those of the training, for on-policy with the
student's writing; `written in` are the seconds of the teacher's writing.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from curricula import recipe_of
from on_policy_table import ARMS, Result, Trained, Written, arm_table, seed_table
from on_policy_trl import FIGURES, OnPolicyJob, train_on_policy

from tapir_local.errors import TapirError
from tapir_local.files import read_json_object, read_record, read_rows, write_json, write_record, write_rows
from tapir_local.recipe.schema import Recipe, Train
from tapir_local.records import Completion, Example, Message, instruction_of

ROOT = Path(__file__).parent.parent
TEACHER_RATE = 1e-3  # of all weights; half the quickstart's for LoRA


@dataclass(frozen=True)
class Setting:
    """One random seed: its recipe, the folders of both models, and TRL's own settings."""

    recipe: Recipe
    folder: Path
    student: Path
    teacher: Path
    beta: float
    rate: float | None

    @property
    def place(self) -> Path:
        return self.folder / f"seed-{self.recipe.random_seed}"


def main() -> None:
    options = arguments()
    try:
        if not options.report:
            work(options)
        report(options.folder, options.seeds)
    except TapirError as error:
        sys.exit(f"error: {error}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--teacher", type=Path, help="a model's folder with the student's tokenizer; else one is made")
    parser.add_argument("--teacher-rows", type=int, default=12_000, help="exact answers that the teacher learns from")
    parser.add_argument("--teacher-epochs", type=float, default=2.0)
    parser.add_argument("--rate", type=float, help="peak learning rate of on-policy; else train.learning_rate")
    parser.add_argument("--beta", type=float, default=1.0, help="TRL's: 0 forward KL, 1 reverse KL (its default)")
    parser.add_argument("--set", action="append", default=[], help="a setting of all arms, as in curricula.py")
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


def work(options: argparse.Namespace) -> None:
    """Make the teacher, then every arm, seed by seed."""
    from tapir_local.recipe.text import parse_changes

    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    options.folder.mkdir(parents=True, exist_ok=True)
    changed = parse_changes(options.set)
    student = student_folder(recipe_of("uniform", 1, changed), options.folder)
    if options.teacher:
        check_same_tokens(student, options.teacher)
    keep_settings(options)
    teacher = options.teacher or make_teacher(student, options, changed)
    for seed in options.seeds:
        recipe = recipe_of("uniform", seed, changed)
        run_seed(Setting(recipe, options.folder, student, teacher, options.beta, options.rate), options.arms)


def keep_settings(options: argparse.Namespace) -> None:
    """Keep the settings in the folder; exit if it was begun with others, because its parts would not fit together."""
    names = ("teacher", "teacher_rows", "teacher_epochs", "rate", "beta", "set")
    asked = json.loads(json.dumps({name: getattr(options, name) for name in names}, default=str))
    path = options.folder / "settings.json"
    had = read_json_object(path) if path.exists() else asked
    wrong = [f"--{name.replace('_', '-')} {had.get(name)}" for name in names if had.get(name) != asked[name]]
    if wrong:
        sys.exit(f"error: {options.folder} was begun with {', '.join(wrong)}; name another --folder")
    write_json(path, asked)


def student_folder(recipe: Recipe, folder: Path) -> Path:
    """The folder of the recipe's student; a GGUF is made into one."""
    from tapir_local.export.base import gguf_student_folder
    from tapir_local.resources import find_model_folder, named_student_gguf

    gguf = named_student_gguf(recipe.student.path)
    return gguf_student_folder(gguf, folder / "cache") if gguf else find_model_folder(recipe.student.path)


def check_same_tokens(student: Path, teacher: Path) -> None:
    """Exit if the two models have different tokens, chat templates or widths of their logits."""
    from tapir_local.training.model import check_model_path, load_tokenizer

    check_model_path(str(teacher), "--teacher")
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    sizes = [read_json_object(model / "config.json").get("vocab_size") for model in (student, teacher)]
    same = {
        "vocabulary": ours.get_vocab() == theirs.get_vocab(),
        "chat template": ours.get_chat_template() == theirs.get_chat_template(),
        f"vocab_size ({sizes[1]}, not {sizes[0]})": sizes[0] == sizes[1],
    }
    wrong = [name for name, equal in same.items() if not equal]
    if wrong:
        sys.exit(f"error: the teacher {teacher} has another {', '.join(wrong)} than the student {student}")


def make_teacher(student: Path, options: argparse.Namespace, changed: Mapping[str, Any]) -> Path:
    """The folder of the teacher: the student with all weights fine-tuned on exact answers; made once."""
    from tapir_local.training.job import TrainJob
    from tapir_local.training.train import run_training

    recipe, place = recipe_of("uniform", 1, changed), Path(options.folder) / "teacher"
    model, rows = place / "model", place / "rows.jsonl"
    if not rows.exists():
        avoided = {problem_key(row) for row in read_seeds(recipe)}
        write_rows(rows, draw_teacher_rows(read_seeds(recipe), avoided, options.teacher_rows))
    if not model.exists():
        settings = recipe.train.model_copy(
            update={"method": "full", "epochs": options.teacher_epochs, "learning_rate": TEACHER_RATE}
        )
        job = TrainJob(str(student), rows, model, settings, recipe.student.max_length, 1)
        say(f"the teacher: all weights of {student.name}, {len(read_rows(Example, rows)):,} exact answers")
        run_training(job, place / "train", tell_progress("the teacher"))
    return model


def read_seeds(recipe: Recipe) -> list[Example]:
    """The recipe's seeds with their tasks; exits if one is not of the pocket world, which has the exact checkers."""
    from tapir_local.data.dataset import require_seeds
    from tapir_local.data.files import read_table
    from tapir_local.pocket.world import parse_problem

    found = []
    for row in require_seeds(read_table(recipe.seeds), recipe.task_table())[0]:
        problem = parse_problem(instruction_of(row.prompt))
        if problem is None:
            sys.exit(f"error: {row.id} of {recipe.seeds.path} is not of the pocket world, so no checker can check it")
        found.append(replace(row, task=problem.family.task))
    return found


def problem_key(row: Example) -> str:
    """A text that is the same for all phrasings of a row's problem."""
    from tapir_local.pocket.world import parse_problem

    problem = parse_problem(instruction_of(row.prompt))
    assert problem
    return problem.key


def draw_teacher_rows(seeds: Sequence[Example], avoided: set[str], rows: int) -> list[Example]:
    """At most `rows` problems of the same families and sizes as the seeds, none of `avoided` and each once, with exact
    answers in style. Some families have few problems: after ten draws for each row it stops."""
    from tapir_local.pocket.world import draw_variant, parse_problem

    rng, found = random.Random("on-policy-teacher"), dict[str, Example]()
    for _ in range(10 * rows):
        like = parse_problem(instruction_of(rng.choice(seeds).prompt))
        problem = draw_variant(like, rng) if like else None
        if problem and problem.key not in avoided:
            row = Example(f"exact-{len(found):05d}", (Message("user", problem.instruction),), problem.solution.styled)
            found.setdefault(problem.key, row)
        if len(found) == rows:
            break
    return list(found.values())


def run_seed(setting: Setting, arms: Sequence[str]) -> None:
    """Every arm of one random seed, unless it is finished."""
    from tapir_local.data.dataset import split_holdout

    recipe, seed = setting.recipe, setting.recipe.random_seed
    held, seeds = split_holdout(read_seeds(recipe), recipe.seeds.holdout, random.Random(f"{seed}-holdout"))
    drawn = random.Random(f"{seed}-rows").sample(seeds, min(recipe.curriculum.rows, len(seeds)))
    if not (setting.place / "written.json").exists():
        write_answers(setting, drawn)
    for arm in arms:
        path = setting.place / f"{arm}.json"
        if path.exists():
            continue
        say(f"random seed {seed}: {arm}")
        trained, gguf = make_arm(setting, arm)
        write_record(path, Result(check_answers(setting, gguf, held), trained))


def write_answers(setting: Setting, drawn: Sequence[Example]) -> None:
    """Keep the prompts with the teacher's answers that end, and the tokens that an epoch of them trains on."""
    from tapir_local.training.job import token_rows
    from tapir_local.training.model import load_tokenizer

    gguf, began = make_gguf(setting, setting.teacher, None, setting.folder / "teacher.gguf"), time.monotonic()
    answers = answer(setting, gguf, drawn)
    seconds = time.monotonic() - began
    ended = [
        replace(row, completion=found.text)
        for row, found in zip(drawn, answers, strict=True)
        if found.finish == "stop" and found.text.strip()
    ]
    tokenizer = load_tokenizer(setting.student)
    tokens = token_rows(ended, tokenizer, setting.recipe.student.max_length)
    left_out = {row.id for row in tokens.left_out}
    ended = [row for row in ended if row.id not in left_out]
    check_same_prompts(ended, tokens.rows, tokenizer)
    if len(ended) < setting.recipe.train.batch_size:
        sys.exit(f"error: the teacher ended {len(ended)} of {len(drawn)} answers, which is less than one batch")
    write_rows(setting.place / "rows.jsonl", ended)
    written = Written(len(drawn), len(ended), answer_tokens(tokens.rows), seconds)
    write_record(setting.place / "written.json", written)


def answer_tokens(rows: Sequence[Mapping[str, Sequence[int]]]) -> int:
    """The tokens that one epoch trains on: those with a label."""
    from tapir_local.training.job import IGNORED_LABEL

    return sum(label != IGNORED_LABEL for row in rows for label in row["labels"])


def check_same_prompts(rows: Sequence[Example], tokens: Sequence[Mapping[str, list[int]]], tokenizer: Any) -> None:
    """Exit if TRL would ask the student other tokens than our training and llama.cpp do."""
    for row, known in zip(rows, tokens, strict=True):
        turns = [{"role": turn.role, "content": turn.content} for turn in row.prompt]
        theirs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        if known["input_ids"][: len(theirs)] != theirs or answer_tokens([known]) != len(known["labels"]) - len(theirs):
            sys.exit(f"error: TRL and our training make different tokens of the prompt of {row.id}")


def make_arm(setting: Setting, arm: str) -> tuple[Trained, Path]:
    """Train an arm, and export it as GGUF."""
    place, train = setting.place / arm, setting.recipe.train
    if arm in ("untrained", "teacher"):
        model = setting.student if arm == "untrained" else setting.teacher
        return Trained(), make_gguf(setting, model, None, setting.folder / f"{arm}.gguf")
    tokens = round(train.epochs * read_record(Written, setting.place / "written.json").tokens)
    if arm == "sft":
        trained, adapter = train_sft(setting, place, train, tokens), place / "adapter"
    elif arm == "on-policy":
        trained, adapter = train_with_trl(setting, place / "adapter", tokens), place / "adapter"
    else:
        half = train.model_copy(update={"epochs": train.epochs / 2})
        first = train_sft(setting, place / "first", half, tokens // 2)
        adapter = place / "adapter"
        trained = first + train_with_trl(setting, adapter, tokens - first.tokens, place / "first" / "adapter")
    return trained, make_gguf(setting, setting.student, adapter, place / "student.gguf")


def train_sft(setting: Setting, place: Path, settings: Train, tokens: int) -> Trained:
    """Our own training on the teacher's written answers, in `place`/adapter; its answers have so many tokens."""
    from tapir_local.training.job import TrainJob
    from tapir_local.training.train import run_training

    out, recipe = place / "adapter", setting.recipe
    if not out.exists():
        settings = settings.model_copy(update={"backend": "trl"})  # as the other arm, also with a GPU
        rows, length = setting.place / "rows.jsonl", recipe.student.max_length
        job = TrainJob(str(setting.student), rows, out, settings, length, recipe.random_seed)
        run_training(job, place / "train", tell_progress(place.parent.name))
    *steps, _ = map(json.loads, (out / "train_log.jsonl").read_text(encoding="utf-8").splitlines())
    return Trained(tokens, len(steps), steps[-1]["seconds"])


def train_with_trl(setting: Setting, out: Path, tokens: int, start: Path | None = None) -> Trained:
    """TRL's training, in a process of its own; returns what it took."""
    recipe = setting.recipe
    if not out.exists():
        rate = setting.rate or recipe.train.learning_rate
        job = OnPolicyJob(
            setting.student,
            setting.teacher,
            setting.place / "rows.jsonl",
            out,
            recipe.train.model_copy(update={"backend": "trl", "learning_rate": rate}),
            tokens,
            recipe.student.max_tokens,
            recipe.random_seed,
            setting.beta,
            start,
        )
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(train_on_policy, job).result()
    found = read_json_object(out / FIGURES)
    return Trained(found["tokens"], found["steps"], found["seconds"])


def make_gguf(setting: Setting, model: Path, adapter: Path | None, out: Path) -> Path:
    """Our export of a model, with an adapter merged if there is one; made once."""
    from tapir_local.export.export import ExportJob, run_export

    if not out.exists():
        run_export(ExportJob(model, out, setting.recipe.export.quant, adapter), out.with_suffix(".export"))
    return out


def answer(setting: Setting, gguf: Path, rows: Sequence[Example]) -> list[Completion]:
    """The likeliest answers by llama.cpp, as a run's student gives them."""
    from tapir_local.inference.config import GenerationConfig
    from tapir_local.inference.llama_process import GenerateJob, run_generate_job

    student = setting.recipe.student
    parallel = None if student.concurrency == "auto" else student.concurrency
    config = GenerationConfig(student.max_tokens, student.max_length, parallel=parallel)
    prompts, ids = tuple(row.prompt for row in rows), tuple(row.id for row in rows)
    return run_generate_job(GenerateJob(gguf, prompts, config, ids=ids))


def check_answers(setting: Setting, gguf: Path, held: Sequence[Example]) -> dict[str, float]:
    """1 for each row of the holdout that is answered right, else 0."""
    from tapir_local.pocket.world import check_answer

    answers = answer(setting, gguf, held)
    checked = (
        (row.id, check_answer(instruction_of(row.prompt), found.text)) for row, found in zip(held, answers, strict=True)
    )
    return {id: float(bool(right)) for id, right in checked}


def tell_progress(name: str) -> Any:
    """A callback that prints every hundredth step, and the last."""

    def tell(done: int, total: int, note: str) -> None:
        if total and (done % 100 == 0 or done == total):
            say(f"  {name}: step {done:,} of {total:,}  {note}")

    return tell


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report(folder: Path, asked: Sequence[int]) -> None:
    """Print both tables, the first for the random seeds that all arms have that were run."""
    found: dict[str, dict[int, Result]] = {}
    for arm in ARMS:
        paths = {seed: folder / f"seed-{seed}" / f"{arm}.json" for seed in asked}
        runs = {seed: read_record(Result, path) for seed, path in paths.items() if path.exists()}
        if runs:
            found[arm] = runs
    seeds = [seed for seed in asked if all(seed in runs for runs in found.values())]
    if not found or not seeds:
        sys.exit(f"error: {folder} has no random seed of {asked} that all arms have")
    written = {seed: folder / f"seed-{seed}" / "written.json" for seed in asked}
    known = {seed: read_record(Written, path) for seed, path in written.items() if path.exists()}
    print(f"\nthe random seeds that all arms have: {seeds} of {asked}\n")
    print("\n".join([*arm_table(found, seeds), "", *seed_table(found, known)]))


if __name__ == "__main__":
    main()
