"""Text from models, teachers, seed files and servers, made safe to show on a terminal."""

import re

# All of C0 except tab and line feed, DEL and C1 (which start the escape sequences of a terminal), the marks that
# reorder the characters around them (bidirectional embeddings, overrides and isolates), and halves of surrogate pairs,
# which cannot be encoded.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with a visible sign in place of each unsafe character: `␛` for escape, `<U+202E>` for an override."""
    return UNSAFE.sub(visible_sign, text.replace("\r\n", "\n"))


def visible_sign(found: re.Match[str]) -> str:
    """The sign for one unsafe character: Unicode's picture of it, or its number where there is none."""
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


def safe_json(text: str) -> str:
    r"""JSON in which each unsafe character is written as `\u....`: the same value, safe to show."""
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
