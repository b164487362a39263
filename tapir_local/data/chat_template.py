"""Render messages with a chat template; training and llama.cpp use the same text."""

import json
from collections.abc import Callable, Sequence
from datetime import date
from functools import lru_cache, partial
from typing import Any, NoReturn

from tapir_local.errors import TapirError
from tapir_local.records import Message, Prompt

# Templates that print the date (Llama 3.2, SmolLM3) get this one, Llama 3's own default. With the current date,
# training and inference would use different texts.
FIXED_DATE = date(2024, 7, 26)
GENERATION = {"generation"}
NO_TEMPLATE = (
    "Set student.chat_template: `alpaca` for a base model without chat tokens, `chatml` for Qwen's, or a Jinja file. "
    "The option of `tapir-local export` is --chat-template."
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
    """Render a conversation; the result equals `tokenizer.apply_chat_template(tokenize=False)`.

    The text contains the special tokens, also BOS if the template writes it, so tokenize it without adding any.
    TapirError if the template is not valid Jinja, or refuses the messages (such as a system turn or two user turns in
    a row).
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
        fix = "Use messages that the model's template accepts, or a student with another template."
        raise TapirError(f"the chat template refused a conversation of turns {roles}: {error}", fix=fix) from error


def render_student_prompt(template: str, prompt: Prompt, *, bos_token: str = "", eos_token: str = "") -> str:
    """Render a prompt for the student, up to where its answer begins. TapirError as from `render`."""
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
    """Render a training row as (prompt, answer); the answer is the completion and the token that ends the turn.

    The two joined are the rendering of the whole conversation. `stops` are the texts of tokens that end a turn. If
    given, one of them must follow the completion, otherwise any text other than white space. TapirError if the
    conversation does not begin with the prompt, if the template changes the completion, or if no token ends the turn,
    because a student trained on such rows would never stop.
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
    """Whether the text after a completion ends the turn: one of `stops`, or if there are none, any visible text."""
    return any(stop in tail for stop in stops if stop) if stops else bool(tail.strip())


def refuse_template(what: str) -> NoReturn:
    raise TapirError(
        f"the chat template {what}",
        fix="Set a corrected one in student.chat_template (for `tapir-local export`: --chat-template), and run again.",
    )


@lru_cache(maxsize=8)
def supports_system_role(template: str, bos_token: str = "", eos_token: str = "") -> bool:
    """Whether a template writes system turns. Gemma's and Mistral's older ones refuse them, Granite's omits the text.

    TapirError if the template refuses a single user turn too.
    """
    words, user = "Say 4711 first", Message("user", "Hello")
    asked = partial(render, template, add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token)
    asked((user,))
    try:
        return words in asked((Message("system", words), user))
    except TapirError:
        return False


def merge_system_turns(template: str, prompt: Prompt, bos_token: str = "", eos_token: str = "") -> Prompt:
    """For a template without a system role, move system turns to the beginning of the user turn that follows."""
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
    """Compile a template in the sandbox that transformers uses (5.17, utils/chat_template_utils.py)."""
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
    """JSON without HTML escapes, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


@lru_cache(maxsize=1)
def generation_tag() -> Any:
    """The tag `{% generation %} … {% endgeneration %}`, which marks what an assistant writes; the text is unchanged."""
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
