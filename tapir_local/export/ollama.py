"""Write an Ollama Modelfile whose template prompts exactly as in training; without a template if that is not possible.

Ollama renders with a Go template. If none is given, it uses the known template whose Jinja is within 100 edits of the
GGUF's own (ollama, template/template.go, `Named`); the pocket student, at 79 edits, would get ChatML. The template
written here is derived from the Jinja template's renderings and compared with them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tapir_local.data.chat_template import render
from tapir_local.errors import TapirError
from tapir_local.inference.lib import library
from tapir_local.inference.model import Model, open_model, require_template, token_text
from tapir_local.records import Message

NO_TEMPLATE_COMMENT = """\
# No TEMPLATE: the student's chat template does more than put text around the turns (for example it trims them, or
# removes thoughts from answers), and Ollama's template language cannot do the same. Newer versions of Ollama then use
# the GGUF's own template (with OLLAMA_GO_TEMPLATE=0 they always do); older ones guess one, possibly a different one."""
# Ollama's default is 1.1, with which a greedy answer differs from the one that was evaluated.
NO_REPEAT_PENALTY_LINE = "PARAMETER repeat_penalty 1"
PLACEHOLDERS = ("Qalpha", "Qbeta", "Qgamma")  # contents that do not occur in templates
TEST_CONTENTS = (
    "What is 7 + 5?",
    "  two  spaces\n\nand lines \n",
    'Say "yes", {{ .Content }} or {% raw %}\\n\\t\t<b>',
    "Añade 你好 🙂",
    "<think>\nHm.\n</think>\n\nSo.",  # some templates remove this from earlier answers
    "",
)


@dataclass(frozen=True)
class TemplateParts:
    """What a template writes around the contents of turns.

    `opening` comes first if there is no system turn; `system`, `user` and `assistant` are the texts before and after
    the content of such a turn; `answer` starts the answer.
    """

    opening: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str


def render_parts(parts: TemplateParts, turns: Sequence[Message]) -> str:
    """The conversation and the start of its answer, as the Go template of these parts renders it."""
    around = {"system": parts.system or ("", ""), "user": parts.user, "assistant": parts.assistant}
    opening = parts.opening if turns[0].role != "system" else ""
    return opening + "".join(turn.content.join(around[turn.role]) for turn in turns) + parts.answer


def derive_parts(jinja: str, bos: str = "", eos: str = "") -> TemplateParts | None:
    """The parts of a Jinja template; None if it writes more than such parts or changes the contents."""

    def text(*turns: Message, answer: bool = False) -> str:
        return render(jinja, turns, add_generation_prompt=answer, bos_token=bos, eos_token=eos)

    user, answered, again = (Message(*pair) for pair in zip(("user", "assistant", "user"), PLACEHOLDERS, strict=True))
    try:
        before, after = split_at_contents(text(user), user)
        _, ended = split_at_contents(text(user, answered), answered)
        _, between, rest, _ = split_at_contents(text(user, answered, again), user, answered, again)
        asks = rest.removeprefix(ended)
        answer = text(user, answer=True).removeprefix(text(user))
        parts = TemplateParts(
            opening=before.removesuffix(asks),
            system=derive_system(text, asks),
            user=(asks, after),
            assistant=(between.removeprefix(after), ended),
            answer=answer,
        )
        return parts if renders_the_same(parts, text) else None
    except (TapirError, ValueError):
        return None


def derive_system(text: Callable[..., str], asks: str) -> tuple[str, str] | None:
    """The texts around a system turn's content; None if the template refuses system turns."""
    system, user = Message("system", PLACEHOLDERS[0]), Message("user", PLACEHOLDERS[1])
    try:
        before, after, _ = split_at_contents(text(system, user), system, user)
    except TapirError:
        return None
    return before, after.removesuffix(asks)


def split_at_contents(text: str, *turns: Message) -> list[str]:
    """The pieces of a text around the contents of turns, in order; ValueError unless each occurs exactly once."""
    pieces = []
    for turn in turns:
        before, text = text.split(turn.content)
        pieces.append(before)
    return [*pieces, text]


def renders_the_same(parts: TemplateParts, text: Callable[..., str]) -> bool:
    """Whether the parts render like the template: one and several turns, with and without a system turn, with unusual
    texts."""
    first, second = Message("user", "How?"), Message("assistant", "So.")
    for word in TEST_CONTENTS:
        user, answered = Message("user", word), Message("assistant", word)
        talks = [(user,), (first, answered, user), (user, second, first, answered, first)]
        if parts.system:
            system = Message("system", word or "Be brief.")
            talks += [(system, first), (system, user, answered, first)]
        if any(text(*turns, answer=True) != render_parts(parts, turns) for turns in talks):
            return False
    return True


def go_template(parts: TemplateParts) -> str:
    """The parts as Ollama's template over `.Messages`; the last turn is the user's, or an answer to continue."""
    last = "eq (len (slice $.Messages $i)) 1"
    opening = f"{{{{ if eq $i 0 }}}}{go_literal(parts.opening)}{{{{ end }}}}" if parts.opening else ""
    before, after = map(go_literal, parts.assistant)
    turns = {
        "system": "{{ .Content }}".join(map(go_literal, parts.system or ())),
        "user": opening
        + "{{ .Content }}".join(map(go_literal, parts.user))
        + f"{{{{ if {last} }}}}{go_literal(parts.answer)}{{{{ end }}}}",
        "assistant": f"{before}{{{{ .Content }}}}{{{{ if not ({last}) }}}}{after}{{{{ end }}}}",
    }
    branches = (f'if eq .Role "{role}" }}}}{text}{{{{ ' for role, text in turns.items() if text)
    return "{{ range $i, $_ := .Messages }}{{ " + "else ".join(branches) + "end }}{{ end }}"


def go_literal(text: str) -> str:
    """Text that a Go template and a Modelfile leave unchanged: as it is, or quoted if either would interpret it."""
    plain = all(letter.isprintable() or letter == "\n" for letter in text)
    if plain and "{{" not in text and '"""' not in text and not text.endswith("{"):
        return text
    return '{{ "' + "".join(map(go_escape, text)) + '" }}'


def go_escape(letter: str) -> str:
    """A character inside quotation marks in Go's syntax."""
    if letter in '"\\':
        return "\\" + letter
    return letter if letter.isprintable() else f"\\u{ord(letter):04x}"


def modelfile_text(model: Model, *, file: str, context: int | None = None, temperature: float | None = None) -> str:
    """The text of a Modelfile for the GGUF `file` beside it.

    `context` is the maximum number of tokens; Ollama's defaults apply to what is not given. With a temperature, the
    repeat penalty is turned off too. If the template cannot be
    reproduced exactly, it is left out with a comment that says why.
    """
    parts = derive_parts(require_template(model), model.bos, model.eos)
    stop = end_token_text(model)
    lines = [
        f"FROM ./{file}",
        NO_TEMPLATE_COMMENT if parts is None else f'TEMPLATE """{go_template(parts)}"""',
        *([f'PARAMETER stop "{stop}"'] if stop else []),
        *([f"PARAMETER num_ctx {context}"] if context else []),
        *([f"PARAMETER temperature {temperature:g}", NO_REPEAT_PENALTY_LINE] if temperature is not None else []),
    ]
    return "\n".join(lines) + "\n"


def write_modelfile(gguf: Path, out: Path, *, context: int | None = None, temperature: float | None = None) -> None:
    """Write the Modelfile of a GGUF in the same folder."""
    with open_model(gguf, vocab_only=True) as model:
        out.write_text(
            modelfile_text(model, file=gguf.name, context=context, temperature=temperature), encoding="utf-8"
        )


def end_token_text(model: Model) -> str:
    """The token that ends an answer; empty if the GGUF names none."""
    llama = library()
    number = llama.llama_vocab_eot(model.vocab)
    return token_text(model.vocab, number) or model.eos
