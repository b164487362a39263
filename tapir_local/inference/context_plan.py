"""How many answers fit into free memory at once: a context planned by the GGUF's numbers, made smaller on failure."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tapir_local.errors import TapirError
from tapir_local.inference.lib import LOG, gpu_memory, library
from tapir_local.inference.model import BATCH, UBATCH, Engine, Model, NoContext, number_of, open_context, unsaid
from tapir_local.memory import format_bytes as bytes_of
from tapir_local.memory import free_memory

MOST = 255  # answers at once: llama.cpp knows 256 sequences, and one may hold what all prompts begin with
ON_CPU, ON_GPU = 32, 128  # answers at once where nobody says: two cores write hardly more with 64, a GPU does
PADDING = 256  # cells: llama.cpp rounds a sequence's up to it
SPLIT_SHARE, SHARE = 0.5, 0.9  # of free memory at the most: for cells of one's own, which are quicker, and for any
WORTH_COPYING = 32  # tokens: as long as one answer's cells take to copy on the pocket student, on others much less


@dataclass(frozen=True)
class Plan:
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
def open_planned(
    model: Model,
    needs: Sequence[int],
    *,
    parallel: int | None,
    shared: int = 0,
    threads: int | None = None,
    exact: bool = False,
    tell: Callable[[str], None] = unsaid,
) -> Iterator[tuple[Engine, Plan]]:
    """A context for answers that need so many tokens each with their prompts, of which all begin with `shared`.

    At most `parallel` at once; None is as many as are of use. Fewer where memory is short, by llama.cpp's word too:
    then `tell` is told. TapirError with the numbers where there is none for a single one.
    """
    wanted = wanted_at_once(model, len(needs), parallel)
    found = list(plans(model, needs, wanted, shared, exact))
    with open_first(model, found, threads=threads, exact=exact) as (engine, plan):
        if plan.answers < wanted:
            tell(f"{plan.words}, not {wanted}: memory is short")
        yield engine, plan


@contextmanager
def open_first(
    model: Model, found: Sequence[Plan], *, threads: int | None = None, exact: bool = False, batch: int = BATCH
) -> Iterator[tuple[Engine, Plan]]:
    """The first of the planned contexts that memory has room for, by its numbers and by llama.cpp's word.

    TapirError with the numbers of the last where there is none.
    """
    with ExitStack() as stack:
        for plan in filter(fits, found):
            LOG.clear()
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
            except NoContext:
                continue
            yield engine, plan
            return
    raise no_room(model, found[-1])


def wanted_at_once(model: Model, answers: int, parallel: int | None) -> int:
    """How many answers are written at once if memory allows."""
    return max(1, min(parallel or (ON_GPU if model.on_gpu else ON_CPU), answers, MOST))


def plans(model: Model, needs: Sequence[int], wanted: int, shared: int, exact: bool) -> Iterator[Plan]:
    """Contexts from the largest on; each of fewer answers has half as many."""
    longest = sorted(needs, reverse=True)
    free, answers = free_for(model), wanted
    while answers:
        for split in (True, False):
            yield planned(model, longest[:answers], shared if worth_sharing(shared, split) else 0, split, exact, free)
        answers //= 2


def worth_sharing(shared: int, split: bool) -> bool:
    """Whether the beginning of all prompts is computed once: in `split` cells each answer must copy it."""
    return shared >= (WORTH_COPYING if split else 1)


def planned(model: Model, needs: Sequence[int], shared: int, split: bool, exact: bool, free: int) -> Plan:
    """The context for these answers, the longest first, all at once."""
    sequences = len(needs) + bool(shared)
    each = padded(needs[0])
    cells = each * sequences if split else padded(shared + sum(need - shared for need in needs))
    taken = cells * cell_bytes(model, exact) + work_bytes(model, each if split else cells, sequences, exact)
    return Plan(len(needs), sequences, cells, split, taken, free)


def planned_reading(model: Model, cells: int, sequences: int) -> Plan:
    """A context of shared cells in which the logits of every token are kept, 512 at a time."""
    taken = padded(cells) * cell_bytes(model) + work_bytes(model, padded(cells), UBATCH, exact=False)
    return Plan(sequences, sequences, padded(cells), False, taken, free_for(model))


def padded(cells: int) -> int:
    return -(-cells // PADDING) * PADDING


def cell_bytes(model: Model, exact: bool = False) -> int:
    """Bytes of a token's keys and values in all layers, in f16, or f32 when `exact`.

    Sliding windows, as Gemma has, take fewer.
    """
    llama = library()
    heads = llama.llama_model_n_head_kv(model.handle)
    usual = llama.llama_model_n_embd(model.handle) // heads_of(model)
    length = sum(number_of(model, f"attention.{of}_length", usual) for of in ("key", "value"))
    return int(llama.llama_model_n_layer(model.handle) * heads * length * (4 if exact else 2))


def heads_of(model: Model) -> int:
    return max(1, int(library().llama_model_n_head(model.handle)))


def work_bytes(model: Model, seen: int, rows: int, exact: bool) -> int:
    """Bytes that llama.cpp computes in, from above: a batch's layers and logits, `rows` of them kept, and its scores.

    The logits of 512 tokens are most of it: 300 MB for Qwen's vocabulary of 152,000, where llama.cpp reported 300.25
    MiB. Scores are over `seen` cells, and kept for every head without flash attention, that is when `exact`.
    """
    llama = library()
    vocabulary, embedding = llama.llama_vocab_n_tokens(model.vocab), llama.llama_model_n_embd(model.handle)
    inner = number_of(model, "feed_forward_length", 4 * embedding)
    row = vocabulary + 8 * embedding + 2 * inner + seen * (1 + exact * heads_of(model))
    return int(4 * (UBATCH * row + rows * vocabulary))


def free_for(model: Model) -> int:
    """Bytes free for the contexts of an open model: where its layers are, keys and values are too."""
    main = max(0, min(model.room, free_memory()))
    if not model.on_gpu:
        return main
    on_gpu = int(gpu_memory() / model.on_gpu)
    return on_gpu if model.on_gpu == 1 else min(on_gpu, int(main / (1 - model.on_gpu)))


def fits(plan: Plan) -> bool:
    return plan.taken <= plan.free * (SPLIT_SHARE if plan.split else SHARE)


def no_room(model: Model, least: Plan) -> TapirError:
    """What is said where not even one answer fits."""
    words = "; ".join(LOG)
    return TapirError(
        f"no memory for one answer: a context of {least.cells:,} tokens takes {bytes_of(least.taken)}, and "
        f"{bytes_of(least.free)} are free" + (f" (llama.cpp: {words})" if words else ""),
        where=str(model.gguf),
        fix=model.advice.too_large,
    )
