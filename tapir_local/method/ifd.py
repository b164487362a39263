"""Instruction-following difficulty: how little an instruction helps a student to write its answer."""

import math

from tapir_local.records import Scored


def perplexity(scored: Scored) -> float:
    """exp of the mean negative log-probability of a token; NaN where there is none."""
    return math.exp(-scored.logprob / scored.tokens) if scored.tokens else math.nan


def ifd(given: Scored, alone: Scored) -> float:
    """ppl(answer | instruction) / ppl(answer): 1 where the instruction does not help at all (arXiv 2308.12032, eq. 5).

    With instruction and answer exchanged it is the reversed IFD (arXiv 2402.10110, section 3.3), low where the answer
    tells much of the instruction. NaN, which is neither above nor below anything, where a text did not fit the context.
    """
    return perplexity(given) / perplexity(alone)
