"""How many answers fit into free memory at once: a context planned from the GGUF's numbers, made smaller on failure."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tapir_local.errors import TapirError
from tapir_local.inference.config import BATCH, UBATCH, ContextConfig, GenerationConfig
from tapir_local.inference.lib import LLAMA_LOG, free_gpu_memory, library
from tapir_local.inference.model import (
    ContextError,
    Engine,
    Model,
    ignore_message,
    metadata_number,
    open_context,
    uses_flash_attention,
)
from tapir_local.memory import format_bytes as bytes_of
from tapir_local.memory import free_memory

MAX_PARALLEL = 255  # answers at once: llama.cpp has 256 sequences, and one may hold the prompts' common prefix
PARALLEL_ON_CPU, PARALLEL_ON_GPU = 32, 128  # the defaults: two cores write hardly more with 64, a GPU does
CELL_PADDING = 256  # llama.cpp rounds the cells of a sequence up to a multiple of this
MAX_SPLIT_SHARE, MAX_SHARE = 0.5, 0.9  # of free memory, for split cells (which are quicker) and for any
NEXT_SHARE = 0.875  # of a plan's memory: llama.cpp found none for the plan, and a plan that takes more is not tried
MIN_PREFIX_TO_COPY = 32  # tokens: as long as one answer's cells take to copy on the pocket student, on others much less


@dataclass(frozen=True)
class ContextPlan:
    """A context of `cells` tokens for `answers` at once; it takes `taken` of `free` bytes.

    With `split`, each answer has its own cells. `sequences` is one more than `answers` if one sequence holds the
    prompts' common prefix. `flash` says whether flash attention is used, unless answers are exact.
    """

    answers: int
    sequences: int
    cells: int
    split: bool
    taken: int
    free: int
    flash: bool = True

    @property
    def summary(self) -> str:
        """The plan in words."""
        memory = f"{bytes_of(self.taken)} of {bytes_of(self.free)} free"
        return f"{self.answers} at once in a context of {self.cells:,} tokens ({memory})"


@contextmanager
def open_planned_context(
    model: Model,
    needs: Sequence[int],
    config: GenerationConfig,
    *,
    shared: int = 0,
    warn: Callable[[str], None] = ignore_message,
) -> Iterator[tuple[Engine, ContextPlan]]:
    """A context for answers that need `needs` tokens each, prompts included, of which the first `shared` are common.

    Holds at most `config.parallel` answers at once. Fewer if memory is short by the plan or by llama.cpp's own check;
    then `warn` gets a message. TapirError with the numbers if not even one answer fits.
    """
    wanted = choose_parallel(model, len(needs), config.parallel)
    plans = list(candidate_plans(model, needs, wanted, shared, config.exact))
    on_device = chooses_on_device(model, config)
    opened = open_first_fitting_context(model, plans, threads=config.threads, exact=config.exact, on_device=on_device)
    with opened as (engine, plan):
        if plan.answers < wanted:
            warn(f"{plan.summary}, not {wanted}: memory is short")
        yield engine, plan


def chooses_on_device(model: Model, config: GenerationConfig) -> bool:
    """Whether the device that computes the logits also chooses the tokens: only likeliest tokens, and only on a GPU.

    On two busy cores, a random model with 152,000 tokens wrote 0.85 times as fast so as with NumPy.
    """
    return config.greedy and (model.on_gpu == 1 if config.on_device is None else config.on_device)


@contextmanager
def open_first_fitting_context(
    model: Model,
    plans: Sequence[ContextPlan],
    *,
    threads: int | None = None,
    exact: bool = False,
    batch: int = BATCH,
    on_device: bool = False,
) -> Iterator[tuple[Engine, ContextPlan]]:
    """The first of the planned contexts that fits into memory, by its numbers and by llama.cpp's own check.

    After a plan that fails by llama.cpp's check, the next one tried takes at most NEXT_SHARE of its memory: each try
    takes time. TapirError with the numbers of the last plan if none fits.
    """
    most = float("inf")  # bytes
    with ExitStack() as stack:
        for plan in filter(fits_memory, plans):
            if plan.taken > most:
                continue
            LLAMA_LOG.clear()
            config = ContextConfig(plan.cells, plan.sequences, plan.split, exact, threads, batch, on_device, plan.flash)
            try:
                engine = stack.enter_context(open_context(model, config))
            except ContextError:
                most = plan.taken * NEXT_SHARE
                continue
            yield engine, plan
            return
    raise no_memory_error(model, plans[-1])


def choose_parallel(model: Model, answers: int, parallel: int | None) -> int:
    """The number of answers to write at once if memory allows."""
    return max(1, min(parallel or (PARALLEL_ON_GPU if model.on_gpu else PARALLEL_ON_CPU), answers, MAX_PARALLEL))


def candidate_plans(model: Model, needs: Sequence[int], wanted: int, shared: int, exact: bool) -> Iterator[ContextPlan]:
    """Contexts for `wanted` answers down to one, for each number first with split cells, then with shared ones."""
    longest, free = sorted(needs, reverse=True), free_context_memory(model)
    for answers in range(wanted, 0, -1):
        for split in (True, False):
            prefix = shared if is_worth_sharing(shared, split) else 0
            yield plan_context(model, longest[:answers], prefix, split, exact, free)


def is_worth_sharing(shared: int, split: bool) -> bool:
    """Whether to compute the prompts' common prefix once: in `split` cells each answer has to copy it."""
    return shared >= (MIN_PREFIX_TO_COPY if split else 1)


def plan_context(model: Model, needs: Sequence[int], shared: int, split: bool, exact: bool, free: int) -> ContextPlan:
    """The context for all these answers at once; `needs` are sorted, the longest first."""
    sequences = len(needs) + bool(shared)
    each = pad_cells(needs[0])
    cells = each * sequences if split else pad_cells(shared + sum(need - shared for need in needs))
    flash = not exact and uses_flash_attention(model, needs[0])
    taken = cells * cell_bytes(model, exact) + compute_bytes(model, each if split else cells, sequences, flash)
    return ContextPlan(len(needs), sequences, cells, split, taken, free, flash)


def plan_scoring_context(model: Model, cells: int, sequences: int) -> ContextPlan:
    """A context of shared cells in which the logits of every token are kept, 512 at a time."""
    padded = pad_cells(cells)
    taken = padded * cell_bytes(model) + compute_bytes(model, padded, UBATCH, flash=True)
    return ContextPlan(sequences, sequences, padded, False, taken, free_context_memory(model))


def pad_cells(cells: int) -> int:
    """The number of cells rounded up as llama.cpp does."""
    return -(-cells // CELL_PADDING) * CELL_PADDING


def cell_bytes(model: Model, exact: bool = False) -> int:
    """Bytes of a token's keys and values in all layers, in f16, or in f32 if `exact`.

    Models with sliding windows, such as Gemma, take fewer.
    """
    llama = library()
    heads = llama.llama_model_n_head_kv(model.handle)
    usual = llama.llama_model_n_embd(model.handle) // head_count(model)
    length = sum(metadata_number(model, f"attention.{of}_length", usual) for of in ("key", "value"))
    return int(llama.llama_model_n_layer(model.handle) * heads * length * (4 if exact else 2))


def head_count(model: Model) -> int:
    """The number of attention heads, at least 1."""
    return max(1, int(library().llama_model_n_head(model.handle)))


def compute_bytes(model: Model, seen: int, rows: int, flash: bool) -> int:
    """An upper bound of llama.cpp's compute buffers: a batch's layers, logits (`rows` of them kept) and scores.

    The logits of 512 tokens are most of it: 300 MB for Qwen's vocabulary of 152,000, where llama.cpp reported 300.25
    MiB. Scores are over `seen` cells; without `flash` attention they are kept for every head.
    """
    llama = library()
    vocabulary, embedding = llama.llama_vocab_n_tokens(model.vocab), llama.llama_model_n_embd(model.handle)
    inner = metadata_number(model, "feed_forward_length", 4 * embedding)
    row = vocabulary + 8 * embedding + 2 * inner + seen * (1 if flash else 1 + head_count(model))
    return int(4 * (UBATCH * row + rows * vocabulary))


def free_context_memory(model: Model) -> int:
    """Bytes free for the contexts of an open model: keys and values are stored where the model's layers are."""
    main = max(0, min(model.memory_left, free_memory()))
    if not model.on_gpu:
        return main
    on_gpu = int(free_gpu_memory() / model.on_gpu)
    return on_gpu if model.on_gpu == 1 else min(on_gpu, int(main / (1 - model.on_gpu)))


def fits_memory(plan: ContextPlan) -> bool:
    """Whether a plan leaves enough of the free memory unused."""
    return plan.taken <= plan.free * (MAX_SPLIT_SHARE if plan.split else MAX_SHARE)


def no_memory_error(model: Model, smallest: ContextPlan) -> TapirError:
    """The error if not even one answer fits."""
    log = "; ".join(LLAMA_LOG)
    return TapirError(
        f"no memory for one answer: a context of {smallest.cells:,} tokens takes {bytes_of(smallest.taken)}, and "
        f"{bytes_of(smallest.free)} are free" + (f" (llama.cpp: {log})" if log else ""),
        where=str(model.gguf),
        fix=model.advice.too_large,
    )
