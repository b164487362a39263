"""Remove the reasoning ("thoughts") that a model writes before its answer."""

import re

THOUGHT_TAG = r"(?:seed:)?(?:think|thinking|thought|thoughts|reasoning)"
# How models mark the beginning and end of a thought: XML tags, Mistral's, Kimi's, Sky-T1's, Gemma's channel.
THOUGHT_MARKS = (
    (rf"<{THOUGHT_TAG}(?:\s[^<>]*)?>", rf"</{THOUGHT_TAG}\s*>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|channel>\s*(?:thought|analysis)\b", r"<channel\|>"),
)
THOUGHT_BLOCKS = tuple(re.compile(rf"{begin}.*?(?:{end})", re.DOTALL | re.IGNORECASE) for begin, end in THOUGHT_MARKS)
THOUGHT_OPENINGS = tuple(re.compile(begin, re.IGNORECASE) for begin, _ in THOUGHT_MARKS)
# Only the closing mark, on its own line or at the end of one: the chat template has written the opening mark.
ORPHAN_CLOSING = re.compile(
    r"(?:^[ \t]*(?:{0})|(?:{0})(?=[ \t]*\r?\n))".format(rf"</{THOUGHT_TAG}\s*>|\[/THINK\]|◁/think▷"),
    re.IGNORECASE | re.MULTILINE,
)
SOLUTION_BLOCK = re.compile(r"\s*<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>\s*)?\Z", re.DOTALL)
# gpt-oss: channels `analysis` and `commentary`, then `final`. Without special tokens their names join the text.
HARMONY_CHANNEL = re.compile(r"(?:<\|start\|>\s*assistant\s*)?<\|channel\|>")
HARMONY_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
HARMONY_END = re.compile(r"<\|(?:return|end|call)\|>")
RUN_TOGETHER = re.compile(r"analysis(?=\S).*?assistantfinal(?=\S)", re.DOTALL)
LEADING_BLANK = re.compile(r"(?:[ \t]*\r?\n)+|[ \t]+")
CODE_SPAN = re.compile(r"(```|~~~).*?(?:\1|\Z)|`[^`\n]*`", re.DOTALL)


def strip_thoughts(text: str) -> str:
    """Remove a model's thoughts from a text; "" if the text is only an unfinished thought.

    A thought is at the beginning of a text. If there is one, later thoughts are removed too, except those in code. A
    text that only quotes such a mark is not changed.
    """
    begun = text.lstrip("\ufeff \t\r\n")
    if HARMONY_CHANNEL.match(begun):
        final = list(HARMONY_FINAL.finditer(begun))
        return HARMONY_END.split(strip_leading_blank(begun[final[-1].end() :]), maxsplit=1)[0].rstrip() if final else ""
    if together := RUN_TOGETHER.match(begun):
        return begun[together.end() :]
    for block, opening in zip(THOUGHT_BLOCKS, THOUGHT_OPENINGS, strict=True):
        if opening.match(begun):
            return extract_solution(strip_thought_blocks(begun, block, opening))
    return strip_orphan_thought(text)


def strip_thought_blocks(text: str, block: re.Pattern[str], opening: re.Pattern[str]) -> str:
    """Remove thoughts at the beginning, and later ones outside code; "" if a thought has no end."""
    while opening.match(text):
        first = block.match(text)
        if not first:
            return ""
        text = strip_leading_blank(text[first.end() :])
    code = [found.span() for found in CODE_SPAN.finditer(text)]

    def kept(found: re.Match[str]) -> str:
        return found[0] if any(start <= found.start() < end for start, end in code) else ""

    return block.sub(kept, text)


def strip_orphan_thought(text: str) -> str:
    """The text after a closing mark without an opening one; the whole text if there is none."""
    found = ORPHAN_CLOSING.search(text)
    if not found:
        return text
    before = text[: found.start()]
    fenced, line = before.count("```") % 2, before.rpartition("\n")[2]
    quoted = fenced or line.count("`") % 2 or any(opening.search(before) for opening in THOUGHT_OPENINGS)
    return text if quoted else extract_solution(strip_leading_blank(text[found.end() :]))


def strip_leading_blank(text: str) -> str:
    """Remove blank lines at the beginning of a text, or spaces if the text begins within a line."""
    found = LEADING_BLANK.match(text)
    return text[found.end() :] if found else text


def extract_solution(text: str) -> str:
    """The text between the marks of a solution; the whole text if it has none."""
    found = SOLUTION_BLOCK.fullmatch(text)
    return found[1].strip() if found else text
