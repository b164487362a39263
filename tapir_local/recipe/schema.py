"""Recipe: every setting of a distillation, in the one place where it has its name, type, default and help."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tapir_local.recipe.endpoints import Judge, Teacher
from tapir_local.recipe.own_tasks import Tasks, build_task_table, validate_tasks
from tapir_local.recipe.tasks import TASKS, Task
from tapir_local.recipe.types import (
    FilePath,
    OptionalPath,
    Settings,
    Share,
    expand_kind_shorthand,
    expand_path_shorthand,
    expand_switch,
    join_command,
)

ConcurrentAnswers = Annotated[int, Field(ge=1, le=256)]
POOL_CURRICULA = frozenset({"tapir", "lion"})  # curricula of the pool; the others take seeds, whatever was expanded


Column = Literal["instruction", "input", "context", "output", "response", "system", "history", "messages",
    "conversations", "prompt", "completion", "question", "answer", "task"]  # fmt: skip


class Seeds(Settings):
    """The instructions to start from."""

    path: FilePath = Field(
        "pocket",
        description="a file, a dataset's folder or its name on the Hub, or `pocket` for what comes with the program",
    )
    split: str | None = Field(None, description="of a dataset; the only one, or `train`, if left out")
    subset: str | None = Field(None, description="of a dataset on the Hub that has several")
    columns: Mapping[Column, str] = Field(
        default_factory=dict, description="names of the file's columns, as in {instruction: frage, output: antwort}"
    )
    unusable: Literal["skip", "refuse"] = Field(
        "skip", description="leave out rows that cannot be read (see limits.unusable), or refuse the first"
    )
    # Near-duplicates that straddle holdout and training would flatter the student. At 0.9 one exchanged word makes
    # two instructions different where they have up to ten; of Alpaca's and self-instruct's rows at hand none is lost.
    max_rouge: Share | None = Field(
        0.9, description="ROUGE-L above which a seed is a near-duplicate of an earlier one; null: none is"
    )
    limit: int | None = Field(None, ge=1, description="read only so many rows, drawn at random")
    holdout: int = Field(200, ge=1, description="rows set apart for evaluation, never trained on nor expanded")
    answers: Literal["teacher", "file"] = Field(
        "teacher", description="who answers the seeds: the teacher, or the file's own answers are trusted"
    )


class Student(Settings):
    """The model to be trained."""

    path: FilePath = Field(
        "pocket",
        description="a folder or Hub name of a causal language model, or `pocket`: the one that comes with the program",
    )
    revision: str | None = Field(
        None,
        description="a branch, tag or commit of a student on the Hub, its main branch if left out; a run keeps the "
        "commit that it began with",
    )
    chat_template: OptionalPath = Field(
        None,
        description="a Jinja file, or one that comes with the program: `alpaca`, for bases without chat tokens such as "
        "LLaMA-2, or `chatml`, for Qwen's; the student's own if left out",
    )
    max_length: int = Field(2048, ge=32, description="tokens of a training row and of the context when answering")
    max_tokens: int = Field(512, ge=1, description="tokens of an answer at the most")
    parallel: ConcurrentAnswers | Literal["auto"] = Field(
        32,
        description="answers written at once by llama.cpp at the most; `auto` is 32, or 128 on a GPU; fewer where "
        "memory is short",
    )


class Classifier(Settings):
    """The task classifier."""

    model: FilePath = Field(
        "microsoft/deberta-v3-base",
        description="a folder or Hub name of an encoder, or `small` for one made from a config",
    )
    labelled: int = Field(
        2000,
        ge=1,
        description="seeds that the teacher labels to train it; with fewer seeds than this the teacher labels all",
    )
    held_out: Share = Field(
        0.1, description="share of the labelled rows on which its agreement with the teacher is measured"
    )
    epochs: int = Field(3, ge=1, description="passes over the labelled rows")
    learning_rate: float = Field(2e-5, gt=0, description="of its training")
    batch_size: int = Field(16, ge=1, description="rows of a step")
    max_length: int = Field(256, ge=16, description="tokens of an instruction that it reads, from its beginning")
    min_agreement: Share = Field(
        0.6, description="agreement with the teacher below which the run warns; it goes on all the same"
    )
    ask_below: Share = Field(
        0.5, description="probability of its label below which the teacher is asked for the row's; 0 asks for none"
    )
    ask_at_most: int = Field(1000, ge=0, description="rows so asked for at the most, those that it is least sure of")


class Curriculum(Settings):
    """Which rows a round trains on."""

    name: Literal["tapir", "uniform", "all", "lion", "reflection", "growth"] = Field(
        "tapir",
        description="`tapir`; `uniform`: seeds drawn at random; `all`: all seeds each round; `lion`: new instructions "
        "in the image of hard and easy rows; `reflection`: seeds that the teacher rewrites and the student selects; "
        "`growth`: seeds, a task's share by its gap on the holdout",
    )
    difficulty: bool = Field(
        True, description="tapir: off takes rows at random instead of hard ones, nothing is judged"
    )
    balance: bool = Field(True, description="tapir: off takes tasks as they come among the hard rows, not by shares")
    refine: Annotated[Literal["hard", "all", "off"], BeforeValidator(expand_switch)] = Field(
        "hard",
        description="tapir: whose answers the teacher rewrites in the task's style: those of hard and new rows, of "
        "replayed rows too (`all`), or nobody's (`off`)",
    )
    rows: int = Field(1000, ge=1, description="training rows of a round")
    first_rows: int | None = Field(
        None, ge=1, description="training rows of round 0, drawn from the seeds; all of them if left out"
    )
    pool: int | None = Field(None, ge=1, description="rows judged in a round, drawn at random; all of them if left out")
    alpha: Share = Field(0.3, description="challenge: the share of hard rows in round 1")
    alpha_step: Share = Field(0.2, description="what the challenge grows by each round, up to 1")
    mfd_threshold: float = Field(
        2.0,
        ge=0,
        le=9,
        description="delta: a row is hard when the teacher's score exceeds the student's by more than this",
    )
    teacher_floor: float = Field(
        6.0, ge=1, le=10, description="a row on which the teacher scores less teaches nothing and is never hard"
    )
    expand_share: Share = Field(
        0.5, description="share of the hard rows that the teacher writes anew; the rest are hard rows of the pool"
    )
    drafts: int = Field(3, ge=1, description="drafts asked for every expansion still missing, at the most")
    children: int = Field(
        3,
        ge=1,
        description="new rows of a round that may grow from one parent; then less hard rows of the task are parents, "
        "and what they cannot fill is left out",
    )
    max_opening: Share | None = Field(
        0.2,
        description="share of a task's new rows in a round that may begin with the same four words (three rows may in "
        "any case); null: no limit",
    )
    check_drafts: bool = Field(
        False,
        description="ask the teacher of every new instruction whether it is complete, answerable and of its task: one "
        "call more for each",
    )
    check_answers: bool = Field(
        False,
        description="have the judge score the answers written in a round and leave out those below teacher_floor: one "
        "call more for each",
    )
    max_rouge: Share = Field(0.7, description="ROUGE-L above which a draft is a near-duplicate")


def judges_pool(settings: Curriculum) -> bool:
    """Whether the curriculum asks for the student's answers to the pool and for a judge."""
    return settings.name == "lion" or (settings.name == "tapir" and settings.difficulty)


class Train(Settings):
    """Fine-tuning."""

    method: Literal["lora", "qlora", "full"] = Field(
        "lora",
        description="`lora`: small matrices beside the base's weights; `qlora`: the same over a base in 4 bits (a GPU "
        "is needed); `full`: all weights, and a round's adapter/ is then the whole model",
    )
    backend: Literal["auto", "unsloth", "trl"] = Field(
        "auto", description="`auto`: Unsloth where a GPU and the package are there, else plain TRL and PEFT"
    )
    precision: Literal["auto", "bf16", "f16", "f32"] = Field(
        "auto", description="what is computed in; `auto`: bf16 where the GPU knows it, else f16; f32 on a CPU"
    )
    start: Literal["previous", "base"] = Field(
        "previous", description="a round goes on from what the last round trained, or begins at the base"
    )
    epochs: float = Field(2.0, gt=0, description="passes over a round's rows")
    learning_rate: float = Field(2e-4, gt=0, description="peak, after the warm-up")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="of the learning rate within a round"
    )
    warmup: Share = Field(0.03, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to it")
    batch_size: int = Field(16, ge=1, description="rows of an optimiser step")
    micro_batch_size: int = Field(
        4, ge=1, description="rows that are in memory at once; fewer are tried where the memory runs out"
    )
    packing: bool = Field(
        False,
        description="several rows one after another in one of student.max_length tokens, blind to each other; batch "
        "sizes then count such rows",
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="compute activations twice instead of keeping them: about a third slower, far less memory; `auto`: "
        "where they would fill more than half of what is left beside the weights",
    )
    checkpoint_minutes: float = Field(
        10.0, ge=0, description="minutes of training between checkpoints, from which a cut round goes on; 0: none"
    )
    launcher: Annotated[str | None, BeforeValidator(join_command)] = Field(
        None,
        description="a command that starts the training's processes on several GPUs, such as `accelerate launch "
        "--multi_gpu --num_processes 2`; batch_size is that of all together",
    )
    lora_rank: int = Field(16, ge=1, description="r of LoRA, on all linear layers but the head")
    lora_alpha: int = Field(32, ge=1, description="LoRA's scale is alpha / r")
    lora_dropout: Share = Field(0.0, description="dropout of LoRA's input")

    @model_validator(mode="before")
    @classmethod
    def renamed(cls, value: Any) -> Any:
        """Recipes that runs have kept may still say `load_in_4bit`, which is now a method."""
        if not isinstance(value, dict) or "load_in_4bit" not in value:
            return value
        four = {"method": "qlora"} if value["load_in_4bit"] else {}
        return {**four, **{name: item for name, item in value.items() if name != "load_in_4bit"}}


class Export(Settings):
    """The GGUF."""

    rounds: Literal["adapter", "merged"] = Field(
        "merged",
        description="what a round keeps as its student.gguf: `merged`, the whole model, or `adapter`, a LoRA GGUF of "
        "megabytes over the base's, which is made once in cache/base; a run's model/ is whole either way",
    )
    quant: Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"] = Field(
        "q8_0", description="type of the GGUF's weights"
    )
    converter: OptionalPath = Field(
        None,
        description="convert_hf_to_gguf.py in a checkout of llama.cpp, or its folder, for a student of a family that "
        "is not mapped; our own export if left out",
    )
    min_agreement: Share | None = Field(
        None,
        description="share of greedy tokens in which the GGUF and the trained model must agree; if left out it goes by "
        "the quant, from 0.99 for f32 over 0.9 for q8_0 to 0.8 for q4_k_m",
    )


class Budget(Settings):
    """What a run may spend; a limit that is reached stops it at a row, and a higher one lets it go on."""

    money: float | None = Field(None, ge=0, description="in the money of the prices")
    tokens: int | None = Field(None, ge=0, description="of prompts and replies together")
    calls: int | None = Field(None, ge=0, description="requests that were answered, or may have been billed")


class Limits(Settings):
    """How much may go wrong before a run stops."""

    unusable: Share = Field(
        0.05,
        description="share of a stage's rows that may be left out because they cannot be used (refused by the server, "
        "cut, not taken by the chat template); a stage with more of them stops (over a single row only "
        "at 0). They are listed in unusable.jsonl",
    )


class Card(Settings):
    """What a model card says and the program cannot know; left out, it says `not stated`."""

    licence: str | None = Field(None, description="of the student that comes out")
    base_licence: str | None = Field(None, description="of the model that is trained")
    data_licence: str | None = Field(None, description="of the seeds")
    terms: str | None = Field(None, description="the teacher's terms for what may be made of its answers")
    language: str | None = Field(None, description="of the data, such as `en`")


class Recipe(Settings):
    """One distillation. Defaults are meant for a student of LLaMA-2's class on one GPU."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run and its folder")
    about: str = Field("", description="a sentence for people")
    random_seed: int = Field(1, ge=0, description="every draw of chance derives from it")
    rounds: int = Field(3, ge=0, description="rounds after the baseline, round 0")
    seeds: Annotated[Seeds, BeforeValidator(expand_path_shorthand)] = Seeds()
    student: Annotated[Student, BeforeValidator(expand_path_shorthand)] = Student()
    teacher: Annotated[Teacher, BeforeValidator(expand_kind_shorthand)] = Teacher()
    judge: Annotated[Judge, BeforeValidator(expand_kind_shorthand)] = Judge()
    classifier: Classifier = Classifier()
    curriculum: Curriculum = Curriculum()
    train: Train = Train()
    export: Export = Export()
    budget: Budget = Budget()
    limits: Limits = Limits()
    card: Card = Card()
    checker: Literal["pocket", "tasks"] | None = Field(
        None,
        description="a programme that tells right answers from wrong ones, for `accuracy`: `pocket` knows its own "
        "world; `tasks` verifies by each task's checker what needs no LLM (a plain sum's value; that Python compiles; "
        "that JSON, YAML, CSV or a table is one; a language's script; a limit of words), and accuracy then covers only "
        "the rows of which a checker can tell",
    )
    tasks: Tasks | None = Field(
        None, description="share by label, or share, description, style and checker; the paper's 32 if left out"
    )

    def task_table(self) -> Mapping[str, Task]:
        """The tasks that this recipe sorts by; its own shares, where it names them, as parts of their sum."""
        return TASKS if self.tasks is None else build_task_table(self.tasks)

    @model_validator(mode="after")
    def consistent(self) -> "Recipe":
        """Settings that exclude each other."""
        if self.tasks is not None:
            validate_tasks(self.tasks)
        if self.teacher.kind == "openai" and not self.teacher.model:
            raise ValueError(
                "teacher: model is missing; name it as the server knows it (teacher.model), or name a GGUF"
            )
        for name, endpoint in (("teacher", self.teacher), ("judge", self.judge)):
            if (endpoint.kind == "gguf") != bool(endpoint.gguf):
                raise ValueError(f"{name}: `kind: gguf` goes with `gguf: PATH`")
            if self.budget.money is not None and endpoint.kind == "openai" and endpoint.price is None:
                raise ValueError(f"budget: money needs {name}.price (input and output, for a million tokens)")
        if self.teacher.kind == "recorded" and self.judge.kind == "teacher":
            raise ValueError("judge: a recorded teacher cannot judge; write `judge: reference` or name an endpoint")
        if self.teacher.kind == "recorded" and self.curriculum.name in ("lion", "reflection"):
            raise ValueError(
                f"curriculum: {self.curriculum.name} needs a teacher to ask; recorded answers cannot write"
            )
        if self.judge.kind == "openai" and not self.judge.model:
            raise ValueError("judge: model is missing; name it as the server knows it (judge.model)")
        if self.train.backend == "unsloth" and (self.train.launcher or self.train.packing):
            raise ValueError("train: `launcher` and `packing` go with plain TRL, not with `backend: unsloth`")
        if self.export.rounds == "adapter" and (self.train.method == "full" or self.export.converter):
            raise ValueError("export: `rounds: adapter` goes neither with `train.method: full` nor with a `converter`")
        return self

    @model_validator(mode="after")
    def checked(self) -> "Recipe":
        """Checks of what a round writes need somebody who writes, and answers a judge."""
        if self.curriculum.check_answers and self.judge.kind == "reference":
            raise ValueError("curriculum: `check_answers` needs a judge to score answers; `judge: reference` has none")
        for name in ("check_drafts", "check_answers"):
            if getattr(self.curriculum, name) and not (self.can_expand and self.curriculum.name in ("tapir", "lion")):
                raise ValueError(f"curriculum: `{name}` goes with `tapir` and `lion` and a teacher that can be asked")
        return self

    @property
    def key_variables(self) -> frozenset[str]:
        """Environment variables that hold the keys of the recipe's endpoints."""
        return frozenset({self.teacher.api_key_env, self.judge.api_key_env})

    @property
    def can_expand(self) -> bool:
        """Whether the teacher can be asked: recorded answers can be neither expanded nor refined."""
        return self.teacher.kind != "recorded"
