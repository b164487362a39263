"""Chat templates: messages to the one text that is trained on and that llama.cpp is given."""

import json
from collections.abc import Callable, Sequence
from datetime import date
from functools import lru_cache, partial
from typing import Any, NoReturn

from tapir_local.errors import TapirError
from tapir_local.records import Message, Prompt

# Templates that print the date (Llama 3.2, SmolLM3) get this one, Llama 3's own default: a date that moves overnight
# would train on one text and answer to another.
FIXED_DATE = date(2024, 7, 26)
GENERATION = {"generation"}
NO_TEMPLATE = (
    "Set student.chat_template: `alpaca` for a base without chat tokens, `chatml` for Qwen's, or a Jinja file; of "
    "`tapir-local export` it is --chat-template."
)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    bos_token: str = "",
    eos_token: str = "",
    today: date = FIXED_DATE,
) -> str:
    """The conversation as text, character for character what `tokenizer.apply_chat_template(tokenize=False)` gives.

    Special tokens are in the text, BOS too where the template writes it: tokenise without adding any. TapirError when
    the template is no Jinja, or refuses the messages (a system turn it does not know, two user turns on end).
    """
    from jinja2 import TemplateError

    try:
        text: str = compile_template(template).render(
            messages=[{"role": turn.role, "content": turn.content} for turn in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            strftime_now=today.strftime,
            tools=None,
            documents=None,
        )
        return text
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(turn.role for turn in messages)
        fix = "Use messages that the model's template takes, or a student with another template."
        raise TapirError(f"the chat template refused a conversation of turns {roles}: {error}", fix=fix) from error


def render_student_prompt(template: str, prompt: Prompt, *, bos_token: str = "", eos_token: str = "") -> str:
    """The prompt as a student is asked it: up to where its answer begins. TapirError as from `render`."""
    turns = merge_system_turns(template, prompt, bos_token, eos_token)
    return render(template, turns, add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token)


def render_training_text(
    template: str,
    prompt: Sequence[Message],
    completion: str,
    *,
    bos_token: str = "",
    eos_token: str = "",
    stops: Sequence[str] = (),
) -> tuple[str, str]:
    """The prompt as a student is asked it, and what it ought to write: the completion and the token that ends its turn.

    The two joined are the template's rendering of the whole conversation. `stops` are the texts of tokens that end a
    turn; given any, one must follow the completion, otherwise anything but white space will do. TapirError when the
    prompt is not how the conversation begins, when the template changed the completion, or when nothing ends the turn:
    a student trained so never stops.
    """
    prompt = merge_system_turns(template, tuple(prompt), bos_token, eos_token)
    asked = render(template, prompt, add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token)
    turns = (*prompt, Message("assistant", completion))
    whole = render(template, turns, add_generation_prompt=False, bos_token=bos_token, eos_token=eos_token)
    if not whole.startswith(asked):
        refuse_template("renders a prompt that is not the beginning of the answered conversation")
    answered = whole[len(asked) :]
    words = completion.strip()
    if words not in answered:
        refuse_template("changes the assistant's words")
    if not ends_turn(answered.rpartition(words)[2] if words else answered, stops):
        refuse_template("writes no token that ends the assistant's turn, so a student would never stop")
    return asked, answered


def ends_turn(tail: str, stops: Sequence[str]) -> bool:
    """True when the text after a completion ends the turn: one of `stops`, or without any, something one can see."""
    return any(stop in tail for stop in stops if stop) if stops else bool(tail.strip())


def refuse_template(what: str) -> NoReturn:
    raise TapirError(
        f"the chat template {what}",
        fix="Name a corrected one in student.chat_template (of `tapir-local export`: --chat-template), and run again.",
    )


@lru_cache(maxsize=8)
def supports_system_role(template: str, bos_token: str = "", eos_token: str = "") -> bool:
    """Whether a template writes a system turn: Gemma's and older ones of Mistral refuse it, Granite's drops its words.

    TapirError when the template does not take a single user turn either.
    """
    words, user = "Say 4711 first", Message("user", "Hello")
    asked = partial(render, template, add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token)
    asked((user,))
    try:
        return words in asked((Message("system", words), user))
    except TapirError:
        return False


def merge_system_turns(template: str, prompt: Prompt, bos_token: str = "", eos_token: str = "") -> Prompt:
    """The prompt as a template without a system role can take it: system turns at the head of the user turn after."""
    if not any(turn.role == "system" for turn in prompt) or supports_system_role(template, bos_token, eos_token):
        return prompt
    found, waiting = list[Message](), list[str]()
    for turn in prompt:
        if turn.role == "system":
            waiting.append(turn.content)
        elif turn.role == "user" and waiting:
            found.append(Message("user", "\n\n".join([*filter(None, waiting), turn.content])))
            waiting = []
        else:
            found.append(turn)
    return (*found, *(Message("system", words) for words in waiting))


@lru_cache(maxsize=8)
def compile_template(template: str) -> Any:
    """The template in the sandbox that transformers uses (transformers 5.17, utils/chat_template_utils.py)."""
    from jinja2 import ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation_tag(), ext.loopcontrols]
    )
    jinja.filters["tojson"] = tojson
    jinja.globals["raise_exception"] = raise_exception
    return jinja.from_string(template)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes HTML, which no chat template wants."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


@lru_cache(maxsize=1)
def generation_tag() -> Any:
    """`{% generation %} … {% endgeneration %}`, which marks what an assistant writes and leaves the text as it is."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = GENERATION

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("written"), [], [], body).set_lineno(line)

        def written(self, caller: Callable[[], str]) -> str:
            return caller()

    return Generation
