"""How many answers fit into free memory at once: a context planned by the GGUF's numbers, made smaller on failure."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tapir_local.errors import TapirError
from tapir_local.inference.config import BATCH, UBATCH
from tapir_local.inference.lib import LLAMA_LOG, free_gpu_memory, library
from tapir_local.inference.model import ContextError, Engine, Model, ignore_message, metadata_number, open_context
from tapir_local.memory import free_memory
from tapir_local.memory import size as bytes_of

MAX_PARALLEL = 255  # answers at once: llama.cpp knows 256 sequences, and one may hold what all prompts begin with
ON_CPU, ON_GPU = 32, 128  # answers at once where nobody says: two cores write hardly more with 64, a GPU does
CELL_PADDING = 256  # cells: llama.cpp rounds a sequence's up to it
SPLIT_SHARE, SHARE = 0.5, 0.9  # of free memory at the most: for cells of one's own, which are quicker, and for any
MIN_PREFIX_TO_COPY = 32  # tokens: as long as one answer's cells take to copy on the pocket student, on others much less


@dataclass(frozen=True)
class ContextPlan:
    """A context of `cells` tokens for `answers` at once, that takes `taken` of `free` bytes.

    `split` gives each its own cells; `sequences` has one more than answers where one holds the shared beginning.
    """

    answers: int
    sequences: int
    cells: int
    split: bool
    taken: int
    free: int

    @property
    def words(self) -> str:
        """The numbers for people."""
        room = f"{bytes_of(self.taken)} of {bytes_of(self.free)} free"
        return f"{self.answers} at once in a context of {self.cells:,} tokens ({room})"


@contextmanager
def open_planned_context(
    model: Model,
    needs: Sequence[int],
    *,
    parallel: int | None,
    shared: int = 0,
    threads: int | None = None,
    exact: bool = False,
    tell: Callable[[str], None] = ignore_message,
) -> Iterator[tuple[Engine, ContextPlan]]:
    """A context for answers that need so many tokens each with their prompts, of which all begin with `shared`.

    At most `parallel` at once; None is as many as are of use. Fewer where memory is short, by llama.cpp's word too:
    then `tell` is told. TapirError with the numbers where there is none for a single one.
    """
    wanted = choose_parallel(model, len(needs), parallel)
    found = list(candidate_plans(model, needs, wanted, shared, exact))
    with open_first_fitting_context(model, found, threads=threads, exact=exact) as (engine, plan):
        if plan.answers < wanted:
            tell(f"{plan.words}, not {wanted}: memory is short")
        yield engine, plan


@contextmanager
def open_first_fitting_context(
    model: Model, found: Sequence[ContextPlan], *, threads: int | None = None, exact: bool = False, batch: int = BATCH
) -> Iterator[tuple[Engine, ContextPlan]]:
    """The first of the planned contexts that memory has room for, by its numbers and by llama.cpp's word.

    TapirError with the numbers of the last where there is none.
    """
    with ExitStack() as stack:
        for plan in filter(fits_memory, found):
            LLAMA_LOG.clear()
            opened = open_context(
                model,
                cells=plan.cells,
                sequences=plan.sequences,
                exact=exact,
                split=plan.split,
                threads=threads,
                batch=batch,
            )
            try:
                engine = stack.enter_context(opened)
            except ContextError:
                continue
            yield engine, plan
            return
    raise no_memory_error(model, found[-1])


def choose_parallel(model: Model, answers: int, parallel: int | None) -> int:
    """How many answers are written at once if memory allows."""
    return max(1, min(parallel or (ON_GPU if model.on_gpu else ON_CPU), answers, MAX_PARALLEL))


def candidate_plans(model: Model, needs: Sequence[int], wanted: int, shared: int, exact: bool) -> Iterator[ContextPlan]:
    """Contexts from the largest on; each of fewer answers has half as many."""
    longest = sorted(needs, reverse=True)
    free, answers = free_context_memory(model), wanted
    while answers:
        for split in (True, False):
            yield plan_context(
                model, longest[:answers], shared if is_worth_sharing(shared, split) else 0, split, exact, free
            )
        answers //= 2


def is_worth_sharing(shared: int, split: bool) -> bool:
    """Whether the beginning of all prompts is computed once: in `split` cells each answer must copy it."""
    return shared >= (MIN_PREFIX_TO_COPY if split else 1)


def plan_context(model: Model, needs: Sequence[int], shared: int, split: bool, exact: bool, free: int) -> ContextPlan:
    """The context for these answers, the longest first, all at once."""
    sequences = len(needs) + bool(shared)
    each = pad_cells(needs[0])
    cells = each * sequences if split else pad_cells(shared + sum(need - shared for need in needs))
    taken = cells * cell_bytes(model, exact) + compute_bytes(model, each if split else cells, sequences, exact)
    return ContextPlan(len(needs), sequences, cells, split, taken, free)


def plan_scoring_context(model: Model, cells: int, sequences: int) -> ContextPlan:
    """A context of shared cells in which the logits of every token are kept, 512 at a time."""
    taken = pad_cells(cells) * cell_bytes(model) + compute_bytes(model, pad_cells(cells), UBATCH, exact=False)
    return ContextPlan(sequences, sequences, pad_cells(cells), False, taken, free_context_memory(model))


def pad_cells(cells: int) -> int:
    return -(-cells // CELL_PADDING) * CELL_PADDING


def cell_bytes(model: Model, exact: bool = False) -> int:
    """Bytes of a token's keys and values in all layers, in f16, or f32 when `exact`.

    Sliding windows, as Gemma has, take fewer.
    """
    llama = library()
    heads = llama.llama_model_n_head_kv(model.handle)
    usual = llama.llama_model_n_embd(model.handle) // head_count(model)
    length = sum(metadata_number(model, f"attention.{of}_length", usual) for of in ("key", "value"))
    return int(llama.llama_model_n_layer(model.handle) * heads * length * (4 if exact else 2))


def head_count(model: Model) -> int:
    return max(1, int(library().llama_model_n_head(model.handle)))


def compute_bytes(model: Model, seen: int, rows: int, exact: bool) -> int:
    """Bytes that llama.cpp computes in, from above: a batch's layers and logits, `rows` of them kept, and its scores.

    The logits of 512 tokens are most of it: 300 MB for Qwen's vocabulary of 152,000, where llama.cpp reported 300.25
    MiB. Scores are over `seen` cells, and kept for every head without flash attention, that is when `exact`.
    """
    llama = library()
    vocabulary, embedding = llama.llama_vocab_n_tokens(model.vocab), llama.llama_model_n_embd(model.handle)
    inner = metadata_number(model, "feed_forward_length", 4 * embedding)
    row = vocabulary + 8 * embedding + 2 * inner + seen * (1 + exact * head_count(model))
    return int(4 * (UBATCH * row + rows * vocabulary))


def free_context_memory(model: Model) -> int:
    """Bytes free for the contexts of an open model: where its layers are, keys and values are too."""
    main = max(0, min(model.room, free_memory()))
    if not model.on_gpu:
        return main
    on_gpu = int(free_gpu_memory() / model.on_gpu)
    return on_gpu if model.on_gpu == 1 else min(on_gpu, int(main / (1 - model.on_gpu)))


def fits_memory(plan: ContextPlan) -> bool:
    return plan.taken <= plan.free * (SPLIT_SHARE if plan.split else SHARE)


def no_memory_error(model: Model, least: ContextPlan) -> TapirError:
    """What is said where not even one answer fits."""
    words = "; ".join(LLAMA_LOG)
    return TapirError(
        f"no memory for one answer: a context of {least.cells:,} tokens takes {bytes_of(least.taken)}, and "
        f"{bytes_of(least.free)} are free" + (f" (llama.cpp: {words})" if words else ""),
        where=str(model.gguf),
        fix=model.advice.too_large,
    )
