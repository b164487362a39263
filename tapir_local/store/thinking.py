"""Tell a reply's answer from what the model thought aloud before it."""

import re

THOUGHT_TAG = r"(?:seed:)?(?:think|thinking|thought|thoughts|reasoning)"
# How models open and close a thought: XML tags, Mistral's, Kimi's, Sky-T1's, Gemma's channel.
THOUGHT_MARKS = (
    (rf"<{NAMES}(?:\s[^<>]*)?>", rf"</{NAMES}\s*>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|channel>\s*(?:thought|analysis)\b", r"<channel\|>"),
)
THOUGHT_BLOCKS = tuple(re.compile(rf"{begin}.*?(?:{end})", re.DOTALL | re.IGNORECASE) for begin, end in THOUGHT_MARKS)
THOUGHT_OPENINGS = tuple(re.compile(begin, re.IGNORECASE) for begin, _ in THOUGHT_MARKS)
# The closing mark alone, on its own line or at a line's end: the chat template has written the opening one.
ORPHAN_CLOSING = re.compile(
    r"(?:^[ \t]*(?:{0})|(?:{0})(?=[ \t]*\r?\n))".format(rf"</{NAMES}\s*>|\[/THINK\]|◁/think▷"),
    re.IGNORECASE | re.MULTILINE,
)
SOLUTION_BLOCK = re.compile(r"\s*<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>\s*)?\Z", re.DOTALL)
# gpt-oss: channels `analysis` and `commentary`, then `final`; without its special tokens, the words run together.
HARMONY_CHANNEL = re.compile(r"(?:<\|start\|>\s*assistant\s*)?<\|channel\|>")
HARMONY_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
HARMONY_END = re.compile(r"<\|(?:return|end|call)\|>")
RUN_TOGETHER = re.compile(r"analysis(?=\S).*?assistantfinal(?=\S)", re.DOTALL)
LEADING_BLANK = re.compile(r"(?:[ \t]*\r?\n)+|[ \t]+")
CODE_SPAN = re.compile(r"(```|~~~).*?(?:\1|\Z)|`[^`\n]*`", re.DOTALL)


def strip_thoughts(text: str) -> str:
    """The text less what the model thought aloud; "" where it is nothing but an unfinished thought.

    A thought stands at the beginning. Where a reply begins with one, its later thoughts go too, but for what is quoted
    as code. A reply that only quotes such a tag is left as it is, blanks included.
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
    """The text less the blocks that it begins with, and less the later ones outside code; "" where one has no end."""
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
    """The text after a closing mark whose opening one the chat template wrote; the whole text where there is none."""
    found = ORPHAN_CLOSING.search(text)
    if not found:
        return text
    before = text[: found.start()]
    fenced, line = before.count("```") % 2, before.rpartition("\n")[2]
    quoted = fenced or line.count("`") % 2 or any(opening.search(before) for opening in THOUGHT_OPENINGS)
    return text if quoted else extract_solution(strip_leading_blank(text[found.end() :]))


def strip_leading_blank(text: str) -> str:
    """The text less the blank lines that it begins with, or the blanks where it begins in mid-line."""
    found = LEADING_BLANK.match(text)
    return text[found.end() :] if found else text


def extract_solution(text: str) -> str:
    """What stands between the marks of a solution, where a thought is followed by them."""
    found = SOLUTION_BLOCK.fullmatch(text)
    return found[1].strip() if found else text
