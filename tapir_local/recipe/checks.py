"""Find settings that contradict other settings of a recipe (errors) or have no effect because of them (notices)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import get_args
from urllib.parse import urlsplit

from tapir_local.printable import format_count
from tapir_local.recipe.curriculum_settings import POOL_CURRICULA, judges_pool
from tapir_local.recipe.endpoints import Endpoint, Judge, Teacher
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.types import KIND_BY_SETTING, Settings

ENDPOINT_ROLES = ("teacher", "judge")
LOCAL_KINDS = frozenset({"pocket", "gguf"})
ASKED_KINDS = LOCAL_KINDS | {"openai"}
JUDGE_KINDS = frozenset({"teacher", "openai", "gguf"})  # kinds of judges that reply in text
# The kinds of `teacher` and `judge` that use each setting; `recorded` and `reference` send no requests and use none.
KINDS_BY_SETTING: Mapping[str, frozenset[str]] = {
    "gguf": frozenset({"gguf"}),
    "context": frozenset({"gguf"}),
    "base_url": frozenset({"openai"}),
    "model": frozenset({"openai"}),
    "alias": ASKED_KINDS,
    "api_key_env": frozenset({"openai"}),
    "api_key_file": frozenset({"openai"}),
    "temperature": ASKED_KINDS | {"teacher"},
    "max_tokens": ASKED_KINDS | {"teacher"},
    "extra": frozenset({"openai"}),
    "send_seed": frozenset({"openai", "pocket"}),
    "concurrency": ASKED_KINDS,
    "timeout": frozenset({"openai", "pocket"}),
    "attempts": frozenset({"openai", "pocket"}),
    "batch": frozenset({"openai"}),
    "price": frozenset({"openai"}),
    "stream": frozenset({"openai"}),
    "thinking": frozenset({"openai", "gguf"}),
    "mode": JUDGE_KINDS,
    "ahead": frozenset({"teacher", "openai"}),
    "max_unjudged": JUDGE_KINDS,
    "health": JUDGE_KINDS,
}
KINDS_BY_ROLE: Mapping[str, frozenset[str]] = {
    role: frozenset(get_args(section.model_fields["kind"].annotation))
    for role, section in (("teacher", Teacher), ("judge", Judge))
}
MIN_PROMPT_TOKENS = 16  # about what a chat template alone takes

TAPIR_ONLY = (
    *("difficulty", "balance", "refine", "alpha", "alpha_step"),
    *("mfd_ceiling", "teacher_floor", "expand_share"),
)


@dataclass(frozen=True)
class IneffectiveRule:
    """Settings that have no effect in a recipe for which `when` is true.

    `why` is the reason, for the notice; `{them}` in it stands for the settings.
    """

    paths: tuple[str, ...]
    when: Callable[[Recipe], bool]
    why: str


def setting_paths(section: str, *names: str) -> tuple[str, ...]:
    """The paths of some settings of a section."""
    return tuple(f"{section}.{name}" for name in names)


def asks_no_endpoint(recipe: Recipe) -> bool:
    """Whether neither teacher nor judge is sent requests."""
    return recipe.teacher.kind == "recorded" and recipe.judge.kind == "reference"


def has_no_price(recipe: Recipe) -> bool:
    """Whether no endpoint with a price is asked."""
    return recipe.teacher.kind != "openai" and recipe.judge.kind != "openai"


INEFFECTIVE_RULES = (
    IneffectiveRule(
        setting_paths("train", "lora_rank", "lora_alpha", "lora_dropout"),
        lambda recipe: recipe.train.method == "full",
        "`train.method: full` trains all weights, without LoRA",
    ),
    IneffectiveRule(
        setting_paths("train", "preference_beta", "preference_learning_rate"),
        lambda recipe: recipe.train.preference == "none",
        "only `train.preference: dpo` uses {them}",
    ),
    IneffectiveRule(
        setting_paths("curriculum", *TAPIR_ONLY),
        lambda recipe: recipe.curriculum.name != "tapir",
        "only `curriculum.name: tapir` uses {them}",
    ),
    IneffectiveRule(
        setting_paths("curriculum", "mfd_threshold"),
        lambda recipe: recipe.curriculum.name != "tapir" and recipe.train.preference == "none",
        "only `curriculum.name: tapir` and `train.preference: dpo` use {them}",
    ),
    IneffectiveRule(
        setting_paths("curriculum", "mfd_threshold", "mfd_ceiling", "teacher_floor"),
        lambda recipe: recipe.curriculum.name == "tapir" and not recipe.curriculum.difficulty,
        "nothing is judged if `curriculum.difficulty` is false",
    ),
    IneffectiveRule(
        setting_paths("curriculum", "learnable"),
        lambda recipe: recipe.curriculum.learnable and recipe.rounds < 2,
        "no round comes after one that is judged",
    ),
    IneffectiveRule(
        setting_paths("curriculum", "teacher_floor"),
        lambda recipe: recipe.judge.kind == "reference",
        "`judge: reference` scores every answer of the teacher 10",
    ),
    IneffectiveRule(
        setting_paths("curriculum", "drafts", "children", "max_opening"),
        lambda recipe: recipe.curriculum.name not in ("tapir", "lion"),
        "this curriculum derives no new instructions from others",
    ),
    IneffectiveRule(
        setting_paths("curriculum", "max_rouge"),
        lambda recipe: recipe.curriculum.name not in ("tapir", "lion", "reflection"),
        "this curriculum writes no instructions",
    ),
    IneffectiveRule(
        setting_paths("curriculum", "pool"),
        lambda recipe: recipe.curriculum.name not in POOL_CURRICULA,
        "this curriculum chooses from the seeds and has no pool",
    ),
    IneffectiveRule(
        setting_paths("curriculum", "rows"),
        lambda recipe: recipe.curriculum.name == "all",
        "`curriculum.name: all` uses every seed",
    ),
    IneffectiveRule(
        setting_paths(
            "curriculum", "refine", "balance", "expand_share", "drafts", "children", "max_opening", "max_rouge"
        ),
        lambda recipe: recipe.teacher.kind == "recorded" and recipe.curriculum.name == "tapir",
        "recorded answers cannot be expanded, refined or balanced",
    ),
    IneffectiveRule(
        ("classifier",),
        lambda recipe: recipe.teacher.kind == "recorded",
        "no classifier is trained with recorded answers",
    ),
    IneffectiveRule(
        setting_paths("classifier", "ask_at_most"),
        lambda recipe: recipe.classifier.ask_below == 0,
        "`classifier.ask_below: 0` asks for no labels",
    ),
    IneffectiveRule(
        setting_paths("classifier", "ask_below"),
        lambda recipe: recipe.classifier.ask_at_most == 0,
        "`classifier.ask_at_most: 0` asks for no labels",
    ),
    IneffectiveRule(
        setting_paths("judge", "max_unjudged"),
        lambda recipe: not judges_pool(recipe.curriculum),
        "this curriculum judges no pool",
    ),
    IneffectiveRule(
        setting_paths("judge", "ahead"),
        lambda recipe: recipe.judge.kind == "teacher" and recipe.teacher.kind != "openai",
        "only a judge behind an endpoint can be asked while the student answers",
    ),
    IneffectiveRule(
        setting_paths("judge", "ahead"),
        lambda recipe: (recipe.teacher if recipe.judge.kind == "teacher" else recipe.judge).batch,
        "a batch is submitted when every answer is there",
    ),
    IneffectiveRule(("budget.money",), has_no_price, "no endpoint with a price is asked, so it is never reached"),
    IneffectiveRule(("budget",), asks_no_endpoint, "no endpoint is asked"),
)


def find_faults(recipe: Recipe) -> list[str]:
    """`path: what is wrong` for each setting that contradicts another one."""
    return [*find_unused(recipe), *find_impossible(recipe)]


def find_notices(recipe: Recipe) -> list[str]:
    """Notices for a run's first lines: settings without effect, pocket parts with a real teacher, hosts."""
    return [*find_ineffective(recipe), *find_pocket_parts(recipe), *find_key_recipients(recipe)]


def find_unused(recipe: Recipe) -> Iterator[str]:
    """Faults: settings of teacher and judge that their kinds do not use."""
    for role in ENDPOINT_ROLES:
        endpoint: Endpoint = getattr(recipe, role)
        kind = endpoint_kind(endpoint)
        for name in unused_settings(endpoint):
            yield f"{role}.{name}: `kind: {kind}` does not use it; {format_advice(role, kind, name)}"
        if {"api_key_env", "api_key_file"} <= endpoint.model_fields_set and endpoint.api_key_file:
            yield f"{role}.api_key_env: `{role}.api_key_file` takes precedence; remove one of them"


def endpoint_kind(endpoint: Endpoint) -> str:
    """The kind of a teacher or judge."""
    return str(getattr(endpoint, "kind", "openai"))


def unused_settings(endpoint: Endpoint) -> list[str]:
    """The settings given to a teacher or judge that its kind does not use."""
    kind = endpoint_kind(endpoint)
    given = [name for name in type(endpoint).model_fields if name in endpoint.model_fields_set and name != "kind"]
    return [
        name
        for name in given
        if kind not in KINDS_BY_SETTING.get(name, ASKED_KINDS | JUDGE_KINDS) and not is_blank(endpoint, name)
    ]


def is_blank(endpoint: Endpoint, name: str) -> bool:
    """Whether a setting is given as null or as an empty mapping."""
    value = getattr(endpoint, name)
    return value is None or value == {}


def format_advice(role: str, kind: str, name: str) -> str:
    """How to fix a setting that the kind does not use."""
    if (role, kind) == ("judge", "teacher"):
        if name in KIND_BY_SETTING:
            return f"the teacher judges; remove `kind` to use another judge with judge.{name}"
        same = f", or set teacher.{name}" if name in Teacher.model_fields else ""
        return f"the teacher judges; set another judge with judge.model or judge.gguf{same}, or remove it"
    if name in KIND_BY_SETTING:
        return f"remove it, or remove `kind: {kind}`"
    *others, last = [f"`{user}`" for user in sorted(KINDS_BY_SETTING[name] & KINDS_BY_ROLE[role])]
    users = f"{', '.join(others)} and {last}" if others else last
    return f"remove it (used by {users})"


def find_impossible(recipe: Recipe) -> Iterator[str]:
    """Faults: settings that make others impossible."""
    student, seeds = recipe.student, recipe.seeds
    for role, endpoint in (("teacher", recipe.teacher), ("judge", recipe.judge)):
        if endpoint.stream and endpoint.batch:
            yield f"{role}.stream: a batch cannot stream; remove `stream` or `batch`"
    if leaves_no_prompt(student.max_tokens, student.max_length):
        yield format_reply_too_long("student.max_tokens", student.max_tokens, "student.max_length", student.max_length)
    yield from find_long_replies(recipe)
    if seeds.limit is not None and seeds.limit <= seeds.holdout:
        yield (
            f"seeds.limit: {format_count(seeds.limit, 'row leaves', 'rows leave')} nothing to train on after "
            f"seeds.holdout ({seeds.holdout:,}); raise seeds.limit or lower seeds.holdout"
        )
    if recipe.classifier.held_out == 1:
        yield "classifier.held_out: 1 holds out every labeled row; use a smaller share, such as 0.1"
    if seeds.path == "pocket" and (seeds.split or seeds.subset):
        name = "split" if seeds.split else "subset"
        yield f"seeds.{name}: the pocket seeds have none; remove it, or set seeds.path to a dataset"
    if recipe.teacher.kind == "recorded" and seeds.answers == "teacher" and "answers" in seeds.model_fields_set:
        yield "seeds.answers: a recorded teacher's answers come from the file; write `seeds.answers: file` or remove it"
    yield from find_wrong_urls(recipe)


def leaves_no_prompt(reply: int, whole: int) -> bool:
    """Whether a reply of `reply` tokens leaves no space for a prompt in a context of `whole`."""
    return reply > whole - MIN_PROMPT_TOKENS


def format_reply_too_long(reply: str, tokens: int, whole: str, room: int) -> str:
    """The fault of a reply length that leaves no space for the prompt."""
    most = max(1, room // 2)
    return (
        f"{reply}: {tokens:,} tokens leave no space for a prompt within {whole} ({room:,}); "
        f"set {reply} to {most:,}, for example, or raise {whole}"
    )


def find_long_replies(recipe: Recipe) -> Iterator[str]:
    """Faults: replies of a GGUF that leave no space for the prompt in its context."""
    for role in ENDPOINT_ROLES:
        endpoint: Endpoint = getattr(recipe, role)
        by_teacher = role == "judge" and endpoint_kind(endpoint) == "teacher"
        writer, name = (recipe.teacher, "teacher") if by_teacher else (endpoint, role)
        if endpoint_kind(writer) == "gguf" and leaves_no_prompt(endpoint.max_tokens, writer.context):
            yield format_reply_too_long(f"{role}.max_tokens", endpoint.max_tokens, f"{name}.context", writer.context)


def find_wrong_urls(recipe: Recipe) -> Iterator[str]:
    """Faults: invalid URLs, and URLs with a login, which a published recipe would show."""
    for role in ENDPOINT_ROLES:
        if (url := getattr(recipe, role).base_url) is None:
            continue
        try:
            parts = urlsplit(url)
            server = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            server = None
        if not server:
            yield f"{role}.base_url: not the URL of a server; write it as http://host:port/v1"
        elif "@" in parts.netloc:
            yield (
                f"{role}.base_url: the URL contains a user name or password; remove them and put the key into "
                f"the variable that {role}.api_key_env names"
            )


def find_ineffective(recipe: Recipe) -> Iterator[str]:
    """Notices for given settings that have no effect, with the reason; each setting once."""
    seen = set[str]()
    for rule in INEFFECTIVE_RULES:
        if rule.when(recipe):
            paths = [path for path in rule.paths if path not in seen and is_given(recipe, path)]
            seen |= set(paths)
            if paths:
                verb, them = ("has", "this") if len(paths) == 1 else ("have", "them")
                yield f"{', '.join(paths)} {verb} no effect: {rule.why.format(them=them)}"
    yield from find_ineffective_checkers(recipe)


def is_given(recipe: Recipe, path: str) -> bool:
    """Whether a recipe sets a setting, or any setting of a section."""
    section, _, name = path.partition(".")
    found: Settings = getattr(recipe, section)
    return (
        name in found.model_fields_set if name else section in recipe.model_fields_set and bool(found.model_fields_set)
    )


def find_ineffective_checkers(recipe: Recipe) -> Iterator[str]:
    """Notices where `checker` and the tasks' checkers have no effect without each other."""
    own = [label for label, task in (recipe.tasks or {}).items() if task.checker]
    if own and recipe.checker != "tasks":
        yield f"tasks.{own[0]}.checker has no effect: only `checker: tasks` uses the tasks' checkers"
    if recipe.checker == "tasks" and not any(task.checker for task in recipe.task_table().values()):
        yield "checker has no effect: none of the recipe's tasks has a checker"


def find_pocket_parts(recipe: Recipe) -> Iterator[str]:
    """Warnings for the pocket student or seeds with a real teacher."""
    if recipe.teacher.kind == "pocket":
        return
    if recipe.student.path == "pocket":
        yield (
            "WARNING: student.path is `pocket`, a toy of a few million weights for a small artificial world; for a "
            "useful student, set a model's folder or its name on the Hub: --set student.path=…"
        )
    if recipe.seeds.path == "pocket":
        yield "WARNING: seeds.path is `pocket`, tasks of a small artificial world; for your own seeds: --seeds FILE"
    elif recipe.checker == "pocket":
        yield "WARNING: `checker: pocket` checks the pocket seeds only; its accuracy means nothing for other seeds"


def find_key_recipients(recipe: Recipe) -> Iterator[str]:
    """Notices that say which key is sent to which host, other than OpenAI's and this machine."""
    for role in ENDPOINT_ROLES:
        endpoint: Endpoint = getattr(recipe, role)
        if endpoint_kind(endpoint) != "openai" or not endpoint.base_url:
            continue
        host = urlsplit(endpoint.base_url).hostname or endpoint.base_url
        if host not in ("localhost", "127.0.0.1", "::1", "api.openai.com"):
            place = endpoint.api_key_file or endpoint.api_key_env
            yield f"{role}: the key in {place} is sent to {host}"


def find_unnamed(recipe: Recipe) -> list[str]:
    """`path: what to write` for a student or seeds that are not set, with a teacher other than the pocket one.

    They default to the pocket ones, so that `teacher: pocket` is a complete recipe; a real teacher would be paid to
    teach a toy.
    """
    if recipe.teacher.kind == "pocket":
        return []
    lines = {
        "student": "write `student: {path: …}`, a model's folder or Hub name, or `student: pocket` for the toy",
        "seeds": "write `seeds: {path: …}`, a file or a dataset (or add --seeds FILE), or `seeds: pocket` for the toy",
    }
    return [f"{name}.path: not set; {line}" for name, line in lines.items() if not is_given(recipe, f"{name}.path")]
