"""Choose the likeliest tokens where their logits are computed, so that a GPU's logits are not copied to main memory.

llama.cpp can choose in its graph: `llama_context_params.samplers` has a sampler for each sequence, and the logits are
not copied if all wanted tokens have one. Its own greedy sampler is no use for that in llama-cpp-python 0.3.36: it also
gives back the row of logits that it was given, so each row is copied after all, and it computes the rows one after the
other, each on one of the GPU's processors. The sampler of this module computes all rows at once and gives back only the
tokens. Of equal logits, NumPy takes the first, ggml the last on a CPU and any on a GPU, always the same. For each row,
llama.cpp also reserves three more rows of main memory, which are not used.
"""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from tapir_local.inference.lib import ggml_library, library

OBJECT_BYTES = 32  # ggml.c: a tensor's header in its context
TOKEN_BYTES = 4


class Tensor(ctypes.Structure):
    """ggml.h's ggml_tensor in llama-cpp-python 0.3.36."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


@cache
def graph_library() -> Any:
    """ggml's functions for graphs; None if this llama.cpp has none or another tensor than `Tensor`."""
    try:
        ggml = ggml_library()
        ggml.ggml_tensor_overhead.argtypes, ggml.ggml_tensor_overhead.restype = [], ctypes.c_size_t
        for name, arguments in (("ggml_argmax", 0), ("ggml_view_1d", 2)):
            function = getattr(ggml, name)
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t][: 2 + arguments]
            function.restype = ctypes.c_void_p
        fields = [name for name, *_ in library().llama_sampler_i._fields_]
    except (ImportError, AttributeError):
        return None
    same = ggml.ggml_tensor_overhead() == ctypes.sizeof(Tensor) + OBJECT_BYTES
    return ggml if same and {"backend_init", "backend_apply", "backend_reset"} <= set(fields) else None


class GreedySampler:
    """A llama.cpp sampler of the likeliest token, for all sequences of one context.

    llama.cpp builds a graph by calling `reset` of all sequences, of which the first has one, and then `apply` for each,
    also for those that want no token: with a view of its row, or of row 0, of a padded copy of the logits. The first
    call adds the likeliest token of all rows of the logits, and each returns its own. With 128 sequences, these calls
    take about 1 ms a graph; llama.cpp uses a graph again while the same sequences write.
    """

    def __init__(self) -> None:
        llama, ggml = library(), graph_library()
        self.argmax, self.view = ggml.ggml_argmax, ggml.ggml_view_1d
        self.tokens: int | None = None  # the tensor with each row's likeliest token; 0 if each row has its own
        self.row_bytes = 0
        self.views: dict[int, int] = {}  # a row's view of `tokens`, by the row's offset in the logits
        functions = {
            "backend_init": llama.llama_sampler_i_backend_init(lambda *_: True),
            "backend_apply": llama.llama_sampler_i_backend_apply(self.apply),
        }
        reset = llama.llama_sampler_i_backend_reset(self.reset)
        self.first = llama.llama_sampler_i(**functions, backend_reset=reset)
        self.others = llama.llama_sampler_i(**functions)

    def reset(self, _: Any) -> None:
        """Forget the tensors of the graph before."""
        self.tokens = None
        self.views.clear()

    def apply(self, _: Any, context: int, graph: int, data: Any) -> None:
        """Replace the logits of a sequence by its likeliest token."""
        given = data[0]
        if self.tokens is None:
            logits = logits_of(Tensor.from_address(given.logits))
            self.tokens = 0 if logits is None else self.argmax(context, ctypes.addressof(logits))
            self.row_bytes = 0 if logits is None else logits.nb[1]
        if self.tokens:
            offset = ctypes.c_size_t.from_address(given.logits + Tensor.view_offs.offset).value
            if offset not in self.views:
                self.views[offset] = self.view(context, self.tokens, 1, offset // self.row_bytes * TOKEN_BYTES)
            given.sampled = self.views[offset]
        else:
            given.sampled = self.argmax(context, given.logits)
        given.logits = None  # otherwise they are copied

    def for_sequence(self, slot: int) -> Any:
        """A chain with this sampler; each sequence needs its own."""
        llama = library()
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        interface = self.others if slot else self.first
        llama.llama_sampler_chain_add(chain, llama.llama_sampler_init(ctypes.byref(interface), None))
        return chain


def logits_of(row: Tensor) -> Tensor | None:
    """The logits of which a row of a padded copy is given: float32 (rows, vocabulary); None for other tensors."""
    if not row.view_src or not row.view_src.contents.src[0]:
        return None
    logits = row.view_src.contents.src[0].contents
    width, rows = logits.ne[:2]
    contiguous = logits.nb[0] == ctypes.sizeof(ctypes.c_float) and logits.nb[1] == width * logits.nb[0]
    # a batch without wanted tokens has no rows, and llama.cpp then gives the padding
    return logits if rows and width == row.ne[0] and contiguous and logits.ne[2] == logits.ne[3] == 1 else None


@contextmanager
def greedy_samplers(sequences: int) -> Iterator[Any]:
    """`llama_context_params.samplers` of the likeliest token for so many sequences; empty if llama.cpp cannot do it.

    The context must be freed first.
    """
    if not graph_library():
        sequences = 0
    sampler = GreedySampler() if sequences else None
    chains = [sampler.for_sequence(slot) for slot in range(sequences)] if sampler else []
    config = library().llama_sampler_seq_config
    try:
        yield (config * len(chains))(
            *(config(slot, ctypes.cast(chain, ctypes.c_void_p)) for slot, chain in enumerate(chains))
        )
    finally:
        for chain in chains:
            library().llama_sampler_free(chain)


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait until the block ends: in a function that llama.cpp calls, Python would lose the exception."""
    own = signal.getsignal(signal.SIGINT)
    if not callable(own) or threading.current_thread() is not threading.main_thread():  # which Ctrl-C does not reach
        yield
        return
    came: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, own)
        if came:
            own(*came[0])


def tokens_from_device(context: Any, count: int) -> list[int]:
    """The tokens that the last decoding chose for its `count` wanted tokens, in order; -1 if a row has no numbers."""
    return [library().llama_get_sampled_token_ith(context, place - count) for place in range(count)]
