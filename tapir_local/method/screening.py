"""Screen new instructions written by a teacher: echoes of the request, copies, missing texts, and statements."""

import re
from collections.abc import Mapping, Sequence

from rapidfuzz.distance import Indel

from tapir_local.method import prompts
from tapir_local.recipe.tasks import Task
from tapir_local.records import Message

ECHO_REASON = "repeats words of the request"
PARENT_REASON = "repeats its parent"
MISSING_REASON = "the text to work on is missing"
STATEMENT_REASON = "sets no task"

MIN_ECHO_SIMILARITY = 0.8  # ROUGE-L with one of our sentences; no row of Alpaca and self-instruct exceeds 0.6
MIN_SENTENCE_WORDS = 4  # words of a sentence of ours that no instruction contains by chance
ECHO_RUN_WORDS = 8  # consecutive words of ours that an instruction does not contain by chance
MAX_COMPARED_WORDS = 300  # words of an instruction that are compared
OPENING_WORDS = 4  # words
MIN_SHARED_OPENINGS = 3  # new rows that may share an opening whatever the limit: two or three are not a pattern
MAX_STATEMENT_WORDS = 60  # words; a longer text may have its task anywhere

SCREENED_WORD = re.compile(r"\w+")
SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n+")
ANY_TAG = re.compile(r"</?\w+>")
# Words with which a model introduces an instruction.
HANDOVER_WORDS = frozenset(
    {"new", "instruction", "task", "question", "please", "kindly", "here", "is", "the", "following"}
)


def casefolded_words(text: str) -> list[str]:
    """The words of a text, case-folded, for comparisons."""
    return SCREENED_WORD.findall(text.casefold())


# --- echoes


def prompt_sentences(tasks: Mapping[str, Task]) -> list[list[str]]:
    """Every sentence of our prompts, as words: all prompts with empty contents, and the descriptions of tasks."""
    nothing = (Message("user", ""),)
    asked = [
        prompts.classify_prompt(nothing, tasks),
        prompts.judge_prompt(nothing, "", ""),
        prompts.judge_single_prompt(nothing, ""),
    ]
    for task in tasks.values():
        asked += [
            prompts.expand_prompt(nothing, task),
            prompts.expand_prompt(nothing, task, "rarer"),
            prompts.refine_prompt(nothing, task),
        ]
    lines = [ANY_TAG.sub(" ", turn.content) for messages in asked for turn in messages]
    lines += [text for task in tasks.values() for text in (task.description, task.style)]
    parts = [part for text in lines for line in text.split("\n") for part in (line, *SENTENCE.split(line))]
    found = {tuple(casefolded_words(part)) for part in parts}
    return [list(words) for words in sorted(found) if len(words) > 1]


def is_echo(words: Sequence[str], ours: Sequence[Sequence[str]]) -> bool:
    """Whether an instruction is part of a sentence of ours, contains one or a long part of it, or nearly equals it."""
    words = words[:MAX_COMPARED_WORDS]
    runs = [words[place : place + ECHO_RUN_WORDS] for place in range(len(words) - ECHO_RUN_WORDS + 1)]
    return any(
        contains_run(words, sentence)
        or any(contains_run(run, sentence) for run in runs)
        or (len(sentence) >= MIN_SENTENCE_WORDS and contains_run(sentence, words))
        or (len(sentence) >= MIN_SENTENCE_WORDS and Indel.normalized_similarity(words, sentence) >= MIN_ECHO_SIMILARITY)
        for sentence in ours
    )


def contains_run(part: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether `whole` contains `part` as consecutive words."""
    return f" {' '.join(part)} " in f" {' '.join(whole)} "


def repeats_parent(words: Sequence[str], parent: Sequence[str]) -> bool:
    """Whether two instructions have the same words, apart from those that introduce an instruction."""
    one, other = ([word for word in text if word not in HANDOVER_WORDS] for text in (words, parent))
    return one == other


# --- missing texts

MATERIAL_KINDS = (
    r"(?:text|article|passage|paragraph|sentence|sentences|story|e-?mail|letter|document|poem|essay|report|table|data|"
    r"list|code|snippet|program|function|dialogue|conversation|review|abstract|excerpt|quote|speech|content|information|"
    r"words|numbers|statement|statements|question|questions|problem|equation|expression|options|items|input)"
)
MENTION = re.compile(
    rf"(?<!\ball )\b(?:the|this|these|that|each)\s+(?:following|given|provided|attached|enclosed)\s+\w+|"
    rf"\b(?:following|attached|enclosed)\s+(?:[\w-]+\s+){{0,2}}?{MATERIAL_KINDS}\b|"
    rf"\b{MATERIAL_KINDS}\s+(?:[\w-]+\s+)?(?:below|provided|attached|given below|that follows|in the attachment)\b|"
    rf"\b(?:below|attached)\s+is\b|\bprovided\s+{MATERIAL_KINDS}\b",
    re.IGNORECASE,
)
# A request to work on `the article` and nothing more.
WORKED_ON = re.compile(
    r"\W*(?:please\s+)?(?:summari[sz]e|rewrite|re-?phrase|paraphrase|translate|proofread|edit|correct|shorten|simplify|"
    r"condense|punctuate|capitali[sz]e|reword|expand on|continue|complete)\s+(?:the|this|these)\s+"
    rf"(?:[\w-]+\s+){{0,2}}?{MATERIAL_KINDS}(?=\s*(?:[.!,;]|$)|\s+(?:in|into|to|using|so|by|for|and|from)\b)",
    re.IGNORECASE,
)
ABOVE_MENTION = re.compile(
    rf"\b(?:the|this)\s+above\b|\b(?:the\s+)?{MATERIAL_KINDS}\s+above\b|\babove[- ]mentioned\b", re.IGNORECASE
)
MATERIAL_SIGN = re.compile(
    r"\n\s*\S|[:\u2014]\s*\S|\s-\s+\S|\w,\s+[A-Z]|[\"\u201c\u00ab'\u2018][^\"\u201d\u00bb]{6,}|```|\[[^\]]*,[^\]]*\]|\{|\d+\s*[-+*/=]\s*\d|https?://"
)
DANGLING = re.compile(r"[:\u2014]\s*[\"\u201c']?\s*\Z")
BLANK_SLOT = re.compile(r"[\[<](?:insert|paste|text|article|add)\b[^\]>]*[\]>]", re.IGNORECASE)


def lacks_text(text: str) -> bool:
    """Whether an instruction refers to a text that it does not contain."""
    plain = text.strip()
    if BLANK_SLOT.search(plain) or ("\n" not in plain and DANGLING.search(plain)):
        return True
    if MENTION.search(plain) or WORKED_ON.match(plain):
        return not MATERIAL_SIGN.search(plain)
    found = ABOVE_MENTION.search(plain)
    return found is not None and len(casefolded_words(plain[: found.start()])) < 2 * MIN_SENTENCE_WORDS


# A statement: a pronoun and another word, or another subject and a finite verb.
PRONOUN = re.compile(r"(?:you|i|we|they|he|she|it)\s+\w+", re.IGNORECASE)
SUBJECT = re.compile(
    r"(?:(?:but|and|so|then|now|yesterday|today|also|however),?\s+)?(?:you|i|we|they|he|she|it|there|the|a|an|some|one|two|"
    r"three|my|your|his|her|its|our|their|this|that|these|those|mr\.|mrs\.|dr\.)(?:'\w+)?\s",
    re.IGNORECASE,
)
FINITE = re.compile(
    r"\b(?:is|are|was|were|am|has|have|had|will|would|can|feels?|felt|goes|went|gets?|got|says?|said|makes?|made|takes?|"
    r"took|[a-z]{2,}ed)\b|'(?:s|re|ve|m|d|ll)\b",
    re.IGNORECASE,
)
# Words that make a statement a request.
REQUEST = re.compile(
    r"\?|\b(?:what|why|how|which|who|whom|whose|when|where|whether|please|need|needs|want|wants|like to|wish|help|"
    r"should|must|have to|has to|asked|asks|ask|task|job|goal|role|question|answer|instruction|write|explain|describe|"
    r"list|give|tell|find|calculate|compute|solve|create|make a|generate|summari[sz]e|translate|rewrite|correct|"
    r"classify|compare|suggest|provide|identify|act as|respond|reply|choose|complete|fill|sort|rank|pretend|imagine|"
    r"suppose|if|looking for|trying to|unsure|wonder\w*|recommend\w*|advice|responsible|assistant|expert|assume|decide|"
    r"determine|predict|true or false|let's|let us)\b|_{2,}|\.\.\.|\u2026",
    re.IGNORECASE,
)


def is_only_statements(text: str) -> bool:
    """Whether a text consists of statements: no question, request or gap.

    True only for short texts of one paragraph, of complete sentences that begin with a subject: a phrase may be a
    request.
    """
    plain = text.strip()
    if "\n" in plain or ":" in plain or len(casefolded_words(plain)) > MAX_STATEMENT_WORDS or REQUEST.search(plain):
        return False
    sentences = SENTENCE.split(plain)
    stated = (PRONOUN.match(part) or (SUBJECT.match(part) and FINITE.search(part)) for part in sentences)
    return plain.endswith((".", "!")) and all(stated)


# --- all checks


def screen_instruction(text: str, parent: str, ours: Sequence[Sequence[str]]) -> str:
    """Why an instruction cannot be used; "" if it can. `ours` are prompt_sentences(), `parent` its parent's text."""
    words = casefolded_words(text)
    if is_echo(words, ours):
        return ECHO_REASON
    if repeats_parent(words, casefolded_words(parent)):
        return PARENT_REASON
    if lacks_text(text):
        return MISSING_REASON
    return STATEMENT_REASON if is_only_statements(text) else ""


def opening_words(text: str) -> str:
    """The first words of an instruction."""
    return " ".join(casefolded_words(text)[:OPENING_WORDS])


def max_shared_openings(share: float | None, rows: int) -> int:
    """How many of the `rows` new rows of a task may share an opening."""
    return rows if share is None else max(MIN_SHARED_OPENINGS, round(share * rows))
