"""Check whether this machine can run a recipe: its seeds, student, memory, disk, keys and endpoints."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tapir_local.data.dataset import parse_seeds
from tapir_local.data.files import read_table
from tapir_local.doctor.doctor import MachineCheck
from tapir_local.errors import TapirError
from tapir_local.export.base import converter_path
from tapir_local.export.export import check_exportable
from tapir_local.inference.model import check_gguf
from tapir_local.memory import format_bytes, free_disk_space, free_memory, list_visible_gpus
from tapir_local.pipeline.dry_run import dry_run_format
from tapir_local.printable import format_count
from tapir_local.recipe.endpoints import Endpoint
from tapir_local.recipe.schema import Recipe
from tapir_local.records import Message, Request
from tapir_local.resources import HUB_FILES, find_model_folder, find_seeds, is_hub_offline, named_student_gguf
from tapir_local.stages.judge import judge_endpoint
from tapir_local.stages.ship import describe_endpoint, is_hub_name
from tapir_local.training.memory_estimate import MemoryEstimate, estimate_memory, use_gradient_checkpointing
from tapir_local.training.model import Hardware, refuse_gpu_settings
from tapir_local.training.reporting import check_tracker

# Bytes per weight of a GGUF (ggml's block sizes; q4_k_m and q5_k_m keep some tensors in more bits).
QUANT_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q6_k": 0.83, "q5_k_m": 0.71, "q4_k_m": 0.61}
MANY_ROWS = 3  # rows of a round per seed above which most of them are variants of a few seeds
ASK_TIMEOUT = 60.0  # seconds
ASKED = "Answer with the single word: ready"


def check_recipe(recipe: Recipe, cache: Path, *, ask: bool = False) -> list[MachineCheck]:
    """The results of all checks that need the recipe. With `ask`, each endpoint gets one short request."""
    endpoints: dict[str, Endpoint] = {"teacher": recipe.teacher}
    if judge_endpoint(recipe) is recipe.judge:
        endpoints["judge"] = recipe.judge
    rows = count_table_rows(recipe)
    checks = [
        attempt("seeds", lambda: count_seeds(recipe)),
        check_rows(recipe, rows),
        *check_student_model(recipe),
        *(check_encoder(recipe) if not 0 < rows <= recipe.classifier.labelled else []),
        *check_training(recipe),
        check_run_disk(recipe, cache),
        describe_hub_mode(),
        *(check for role, endpoint in endpoints.items() for check in check_endpoint(role, endpoint, ask)),
    ]
    if recipe.train.report_to != "none":
        checks.append(attempt("tracker", partial(check_tracker, recipe.train), recipe.train.report_to))
    return [check for check in checks if check]


def attempt(name: str, work: Callable[[], object], found: str = "") -> MachineCheck:
    """A check that is good with `found`, or else with what `work` returns, and not if it raises a TapirError."""
    try:
        returned = work()
    except TapirError as error:
        return MachineCheck(name, False, f"{error.where}: {error.what}" if error.where else error.what, error.fix)
    return MachineCheck(name, True, found or str(returned))


def count_seeds(recipe: Recipe) -> str:
    """How many rows the seeds have; TapirError if they cannot be read, or the holdout leaves none."""
    if find_seeds(recipe.seeds.path) is None:
        if is_hub_offline():
            fix = "Unset HF_HUB_OFFLINE, or download the dataset and set seeds.path to its folder."
            raise TapirError("a dataset on the Hub, and HF_HUB_OFFLINE is set", where=recipe.seeds.path, fix=fix)
        return f"{recipe.seeds.path}, a dataset on the Hub, which is read when the run starts"
    found = parse_seeds(read_table(recipe.seeds), recipe.task_table())
    if not found.examples:
        found.refuse()
    rows, held = len(found.examples), recipe.seeds.holdout
    if rows <= held:
        what = f"not enough rows to train on: {rows:,} in all, and the holdout takes {held:,}"
        fix = f"Add rows or lower seeds.holdout: --set seeds.holdout={max(1, rows // 5)}"
        raise TapirError(what, where=found.table.where, fix=fix)
    faulty = f", {len(found.faulty):,} unreadable" if found.faulty else ""
    twice = f", {format_count(len(found.duplicates), 'duplicate')}" if found.duplicates else ""
    answered = sum(bool(row.completion) for row in found.examples)
    unused = answered and recipe.can_expand and recipe.seeds.answers == "teacher"
    advice = "the teacher writes its own (seeds.answers: file keeps yours)"
    said = f"; {answered:,} with answers, but {advice}" if unused else ""
    return f"{format_count(rows, 'row')}, {held:,} of them held out{twice}{faulty}{said}"


def count_table_rows(recipe: Recipe) -> int:
    """The rows of the seeds that a run uses at most; 0 if they cannot be read, or are on the Hub."""
    try:
        found = 0 if find_seeds(recipe.seeds.path) is None else len(read_table(recipe.seeds).rows)
    except TapirError:
        return 0
    return min(found, recipe.seeds.limit or found)


def check_rows(recipe: Recipe, rows: int) -> MachineCheck | None:
    """Rows per round that suit the number of seeds; None if they do, or nobody knows it."""
    advice = explain_many_rows(recipe, rows - recipe.seeds.holdout)
    return MachineCheck("rows per round", None, advice[0], advice[1]) if advice else None


def explain_many_rows(recipe: Recipe, seeds: int) -> tuple[str, str] | None:
    """(what is odd, what to do) if a round writes many rows from a few seeds to train on; None if it does not."""
    plan = recipe.curriculum
    if seeds <= 0 or plan.rows <= MANY_ROWS * seeds or plan.name not in ("tapir", "lion") or not recipe.can_expand:
        return None
    wanted = format_count(plan.rows, "row is", "rows are")
    found = f"{wanted} to come from {format_count(seeds, 'seed')}, so most will be variants of a few"
    return found, f"Add seeds, or set curriculum.rows to at most {MANY_ROWS * seeds:,}."


def check_student_model(recipe: Recipe) -> Iterator[MachineCheck]:
    """The student is there or can be downloaded, has a chat template, and can be exported."""
    named = recipe.student.path
    gguf = attempt("student", lambda: str(named_student_gguf(named) or ""))
    if not gguf.ok or gguf.found:
        yield attempt("student", lambda: check_student_gguf(recipe)) if gguf.ok else gguf
        return
    folder = local_model(named, recipe.student.revision)
    if folder is None:
        yield hub_check("student", named)
        return

    def look() -> str:
        dry_run_format(recipe)
        if recipe.student.chat_template is None:
            check_exportable(folder, converter_path(recipe))
        return f"{named}, with {recipe.student.chat_template or 'its own'} chat template"

    yield attempt("student", look)


def check_student_gguf(recipe: Recipe) -> str:
    """A student that is a GGUF, in words; TapirError if it cannot be trained or has no chat template."""
    from tapir_local.training.gguf_source import check_gguf_source, describe_types, open_gguf_source

    path = named_student_gguf(recipe.student.path)
    if path is None:
        raise TapirError("there is no such GGUF", where=recipe.student.path, fix="Correct student.path.")
    check_gguf(path, "student", "Correct student.path.")
    source = open_gguf_source(path)
    check_gguf_source(source)
    dry_run_format(recipe)
    return f"{path.name}, a GGUF with {describe_types(source)} weights"


def local_model(named: str, revision: str | None) -> Path | None:
    """The folder of a model, or of its copy in the Hub's cache; None if it would have to be downloaded."""
    if named == "pocket" or Path(named).is_dir():
        return find_model_folder(named)
    if not is_hub_name(named):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(named, revision=revision, allow_patterns=HUB_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def hub_check(name: str, named: str) -> MachineCheck:
    """The check of a model that has to be downloaded."""
    if not is_hub_name(named):
        return MachineCheck(name, False, f"{named}: there is no such folder", "Correct its path.")
    if is_hub_offline():
        fix = "Unset HF_HUB_OFFLINE for the first run, or download the model and set its folder in the recipe."
        return MachineCheck(name, False, f"{named} is not in the Hub's cache, and HF_HUB_OFFLINE is set", fix)
    return MachineCheck(name, None, f"{named} is not in the Hub's cache", "It is downloaded when the run starts.")


def check_encoder(recipe: Recipe) -> Iterator[MachineCheck]:
    """The encoder of the task classifier is there or can be downloaded; with few seeds the teacher labels all rows."""
    named = recipe.classifier.model
    if not recipe.can_expand or named == "small":
        return
    there = local_model(named, None)
    yield MachineCheck("classifier", True, named) if there else hub_check("classifier", named)


def check_training(recipe: Recipe) -> Iterator[MachineCheck]:
    """The settings suit the hardware, and the weights with their optimizer fit into memory."""
    cards = list_visible_gpus()
    if not cards:
        method = attempt("train.method", partial(refuse_gpu_settings, recipe.train))
        if not method.ok:
            yield method
            return
    free, total = (cards[0].free, cards[0].total) if cards else (free_memory(), 0)
    hardware = Hardware("cuda", "trl", "bf16", free, 1, total) if cards else Hardware("cpu", "trl", "f32", free)
    needs = training_needs(recipe, hardware)
    place = f"{format_bytes(free)} of {cards[0].name}" if cards else f"{format_bytes(free)} of main memory"
    if needs is None:
        found = f"unknown until the student is a folder of safetensors; {place} are free"
        yield MachineCheck("training memory", None, found, "`recipes/` says what students of some sizes need.")
        return
    recompute = use_gradient_checkpointing(recipe.train, hardware, needs)
    batch = needs.checkpointed if recompute else needs.activations
    said = f"needs {format_bytes(needs.fixed)}, and {format_bytes(batch)} for a batch; {place} are free"
    ok = False if needs.fixed > free else None if needs.fixed + batch > free else True
    fix = "Use a smaller student" + (", or train.method: qlora." if cards and recipe.train.method != "qlora" else ".")
    yield MachineCheck("training memory", ok, said, fix if ok is False else "Lower train.micro_batch_size.")


def training_needs(recipe: Recipe, hardware: Hardware) -> MemoryEstimate | None:
    """The memory of training by the recipe; None for a student that is not a folder of safetensors here."""
    folder = local_model(recipe.student.path, recipe.student.revision)
    if folder is None:
        return None
    tokens = min(recipe.train.micro_batch_size, recipe.train.batch_size) * recipe.student.max_length
    pairs = recipe.pairs_round is not None  # two answers for each row, the most of all rounds
    try:
        return estimate_memory(str(folder), recipe.train, hardware, tokens * (1 + pairs), whole_logits=pairs)
    except TapirError:
        return None


def check_run_disk(recipe: Recipe, cache: Path) -> MachineCheck:
    """Free space for the GGUFs of all rounds, the untrained student's and the one in model/."""
    free = free_disk_space(cache)
    needs = training_needs(recipe, Hardware("cpu", "trl", "f32", free))
    if needs is None:
        return MachineCheck("disk for the run", None, f"unknown for this student; {format_bytes(free)} free", "")
    whole = needs.parameters * QUANT_BYTES[recipe.export.quant]
    copies = 2 if recipe.export.rounds == "adapter" else recipe.rounds + 2  # model/ links to a merged round's GGUF
    wanted = round(copies * whole + 3 * needs.state)  # adapters and a training's checkpoints
    fix = "Free some space, or write export.rounds: adapter."
    said = f"about {format_bytes(wanted)}; {format_bytes(free)} free"
    return MachineCheck("disk for the run", wanted < free, said, fix)


def check_endpoint(role: str, endpoint: Endpoint, ask: bool) -> Iterator[MachineCheck]:
    """The key or the GGUF of a teacher or judge is there and, with `ask`, it answers one short request."""
    kind, name = getattr(endpoint, "kind", "openai"), describe_endpoint(endpoint)
    if kind not in ("openai", "gguf"):
        yield MachineCheck(role, True, name)
        return
    if kind == "gguf":
        check = attempt(role, partial(check_endpoint_gguf, role, endpoint), name)
    else:
        check = attempt(f"{role}'s key", partial(find_key, endpoint))
    yield check
    if ask and check.ok:
        yield attempt(f"{role} answers", partial(ask_once, endpoint))


def find_key(endpoint: Endpoint) -> str:
    """Where the key of an endpoint comes from, if it needs one; TapirError if that is missing."""
    from tapir_local.teacher.endpoint import PLACEHOLDER_KEY, describe_key_source, read_api_key

    found = read_api_key(endpoint) != PLACEHOLDER_KEY
    source = describe_key_source(endpoint) if found else "none set, and a server on this machine may need none"
    return f"{source}; for {describe_endpoint(endpoint)}"


def check_endpoint_gguf(role: str, endpoint: Endpoint) -> None:
    """TapirError unless the file of a teacher or judge is a GGUF."""
    from tapir_local.teacher.endpoint import gguf_path

    check_gguf(gguf_path(endpoint), role, f"Correct {role}.gguf.")


def ask_once(endpoint: Endpoint) -> str:
    """The reply of an endpoint to one short request, which is stored nowhere; TapirError if there is none."""
    from tapir_local.store.store import Store
    from tapir_local.teacher.ask import ask

    brief = endpoint.model_copy(update={"attempts": 1, "batch": False, "timeout": min(endpoint.timeout, ASK_TIMEOUT)})
    request = Request((Message("user", ASKED),), "doctor", "doctor", max_tokens=endpoint.max_tokens)
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "teacher.db") as store:
        (answer,) = ask([request], brief, store, run="doctor")
    if not answer.text.strip():
        what = f"it replied with nothing ({answer.finish}) {answer.why}".strip()
        raise TapirError(what, where=describe_endpoint(endpoint), fix="Raise max_tokens, or use another model.")
    return " ".join(answer.text.split())[:60]


def describe_hub_mode() -> MachineCheck:
    """Whether the variables of the Hub say that this machine is offline."""
    offline = is_hub_offline()
    found = "offline: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set" if offline else "asked where a recipe names it"
    return MachineCheck("Hub", True, found)
