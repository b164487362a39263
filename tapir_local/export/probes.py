"""Texts for the gate: many scripts, digits, white space, code, every added token, and the training rows."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tapir_local.data.special_tokens import chat_format_of
from tapir_local.records import Example, Message, Prompt

PROBE_COUNT = 600
ANSWER_COUNT = 16  # prompts answered; more did not find more errors
FALLBACK_PROMPTS = (  # used if there are fewer rows
    "Say hello.",
    "List three fruits and the colour of each.",
    "What is 17 times 23? Show each step.",
    "Write a Python function that reverses a string.",
    "Übersetze ins Englische: Das Wetter ist heute schön.",
    "为什么天空是蓝色的\uff1f",
    "Summarise in one sentence: The river rose in the night, and by morning the mill stood in water.",
    "Write a polite letter that asks for a refund.",
)

FRAGMENTS = (
    *(
        "Hello, world!",
        "The quick brown fox",
        "I'm, you're, it'll, WE'VE, don't",
        "naïve café, coöperate, façade",
        "nai\u0308ve cafe\u0301, A\u030a \u1112\u1161\u11ab, >\u0338 a\u0323\u0302",
        "ﬁne ½ ² Ⅷ",
    ),
    *(
        "Привет, мир",
        "Ελληνικά ΑΒΓ",
        "你好\uff0c世界。",
        "こんにちは カタカナ",
        "안녕하세요",
        "مرحبا بالعالم",
        "שלום",
        "नमस्ते दुनिया",
        "สวัสดีชาวโลก",
    ),
    *(
        "Tiếng Việt có dấu",
        "ქართული",
        "தமிழ்",
        "ᚠᛇᚻ",
        "Straße ẞ ǅ",
        "🙂🚀",
        "👩‍👩‍👧 🇩🇪",
        "0",
        "12",
        "345",
        "6789",
        "3.14159",
        "1,000,000",
        "-7 + 8 = 1",
    ),
    *(
        "٣٤٥",
        "१२३",
        " ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        " \n ",
        "\u00a0",
        "\u3000",
        "\u200b",
        "a  b   c",
        "end. \n\n\n Next",
    ),
    *(
        "def f(x):\n    return x ** 2  # square\n",
        "for (int i = 0; i < n; ++i) { a[i] += 1; }",
        '{"key": [1, 2.5e-3, null]}',
        "SELECT * FROM t;",
    ),
    *(
        "<p class='x'>&amp;</p>",
        "https://example.org/a?b=c&d=%20",
        "C:\\dir\\file.txt",
        "\\frac{a}{b} $x^2$",
        "- item\n* item\n1. item",
        "`code`",
    ),
    *(
        "!!!",
        "...",
        "—\u2013-",
        "“quoted” \u2018text\u2019",
        "(a)[b]{c}<d>",
        "@#$%^&*",
        "~|\\/",
        "CamelCase snake_case kebab-case",
        "ALLCAPS",
        "x" * 40,
        "ha" * 20,
    ),
)


def gate_texts(tokenizer: Any, rows: Sequence[Example]) -> list[str]:
    """Every text to tokenize: the rows as trained, prompt and completion, and the probe texts as prompts.

    Special tokens quoted in a row or a probe are guarded (see quoting.py), as in training.
    """
    prompts = [*(row.prompt for row in rows), *((Message("user", text),) for text in probe_texts(tokenizer))]
    return [render_prompt(tokenizer, prompt) for prompt in prompts] + [render_example(tokenizer, row) for row in rows]


def render_prompt(tokenizer: Any, prompt: Prompt) -> str:
    """A prompt as the student is asked it."""
    return chat_format_of(tokenizer).asked(prompt)


def render_example(tokenizer: Any, row: Example) -> str:
    """Prompt and completion as in training; only the prompt if there is no completion."""
    form = replace(chat_format_of(tokenizer), stops=())
    return "".join(form.answered(row.prompt, row.completion)) if row.completion else form.asked(row.prompt)


def sample_prompts(rows: Sequence[Example]) -> list[Prompt]:
    """Prompts to answer: up to ANSWER_COUNT from the rows, always the same ones, filled up with FALLBACK_PROMPTS.

    "Say hello." is always included.
    """
    chosen = random.Random("gate-prompts").sample(range(len(rows)), min(ANSWER_COUNT, len(rows)))
    own = FALLBACK_PROMPTS[: max(1, len(FALLBACK_PROMPTS) - len(chosen))]
    return [*(rows[number].prompt for number in sorted(chosen)), *((Message("user", text),) for text in own)]


def probe_texts(tokenizer: Any) -> list[str]:
    """PROBE_COUNT texts of one or more fragments: every fragment, every added token in several places, and mixtures.

    Gemma's added tokens of several `▁` stand for as many spaces.
    """
    chance = random.Random("gate-probes")
    added = [token.content.replace("▁", " ") for token in tokenizer.added_tokens_decoder.values()][:64]
    texts = [*FRAGMENTS, *(f"a{token}b {token} 1{token}" for token in added)]
    while len(texts) < PROBE_COUNT:
        texts.append(chance.choice(["", " ", "\n"]).join(chance.choices([*FRAGMENTS, *added], k=chance.randint(2, 5))))
    return texts
