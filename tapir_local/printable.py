"""What people read: text from models, teachers, seed files and servers made safe for a terminal, and counts."""

import re

# Control characters (C0 except tab and line feed, DEL, and C1), which start the escape sequences of a terminal;
# bidirectional embeddings, overrides and isolates, which reorder the text around them; and lone surrogates, which
# cannot be encoded.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with each unsafe character replaced by a visible one: `␛` for escape, `<U+202E>` for an override."""
    return UNSAFE.sub(visible_sign, text.replace("\r\n", "\n"))


def visible_sign(found: re.Match[str]) -> str:
    """The replacement for one unsafe character: its control picture in Unicode, or else its code point."""
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


def safe_json(text: str) -> str:
    r"""The same JSON value with each unsafe character written as `\u....`."""
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def format_count(count: int, one: str, many: str = "") -> str:
    """`1 row`, `1,200 rows`; `many` where the plural is not `one` with an s: `2 replies`, `3 rows are`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
