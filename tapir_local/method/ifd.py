"""Instruction-following difficulty (IFD): how little an instruction helps a student to produce its answer."""

import math

from tapir_local.records import Scored


def perplexity(scored: Scored) -> float:
    """exp of the mean negative log-probability per token; NaN without tokens."""
    return math.exp(-scored.logprob / scored.tokens) if scored.tokens else math.nan


def ifd(given: Scored, alone: Scored) -> float:
    """ppl(answer | instruction) / ppl(answer): 1 if the instruction does not help at all (arXiv 2308.12032, eq. 5).

    With instruction and answer exchanged it is the reversed IFD (arXiv 2402.10110, section 3.3), which is low if the
    instruction can be inferred from the answer. NaN if a text did not fit the context.
    """
    return perplexity(given) / perplexity(alone)
