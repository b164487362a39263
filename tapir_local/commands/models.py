"""`tapir-local generate` and `export`: the commands that work on models, without a run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tapir_local.commands.common import HomePath, echo, example, shown, slowly

if TYPE_CHECKING:
    from tapir_local.inference.prompt_file import Answered

FILE = HomePath()


def at_once(context: click.Context, option: click.Parameter, text: str) -> int | None:
    """How many answers are written at once at the most: 1 to 255, or None for `auto`."""
    return None if text == "auto" else click.IntRange(1, 255)(text, option, context)


@click.command(
    epilog=example(
        "tapir-local generate student.gguf prompts.jsonl -o answers.jsonl",
        "tapir-local generate base.gguf prompts.jsonl --adapter lora.gguf --parallel 64 --max-tokens 256",
    )
)
@click.argument("model", type=FILE)
@click.argument("prompts", type=FILE)
@click.option("-o", "--out", type=FILE, help="File of the answers, whole or absent; standard output if left out.")
@click.option("--force", is_flag=True, help="Write OUT again where it is there already.")
@click.option("--adapter", type=FILE, help="A LoRA GGUF over the model.")
@click.option(
    "--parallel",
    metavar="1-255|auto",
    callback=at_once,
    default="auto",
    show_default=True,
    help="Answers written at once at the most; auto: 32, or 128 on a GPU, and fewer where memory is short.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of an answer.")
@click.option(
    "--context",
    type=click.IntRange(min=32),
    default=2048,
    show_default=True,
    help="Tokens of prompt and answer together.",
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is the likeliest.")
@click.option("--random-seed", type=click.IntRange(min=0), default=1, show_default=True, help="Where chance begins.")
@click.option("--stop", multiple=True, help="End an answer before this text; may be given several times.")
@click.option("--json-schema", type=FILE, help="A JSON schema that every answer is held to.")
@click.option("--exact", is_flag=True, help="The same at any --parallel, in 32 bits; it takes about twice as long.")
def generate(
    model: Path,
    prompts: Path,
    out: Path | None,
    force: bool,
    adapter: Path | None,
    parallel: int | None,
    max_tokens: int,
    context: int,
    temperature: float,
    random_seed: int,
    stop: tuple[str, ...],
    json_schema: Path | None,
    exact: bool,
) -> None:
    """Answer every prompt of the file PROMPTS with the GGUF MODEL, many at once; JSON lines in their order.

    PROMPTS may have any form that seeds may have; what it answers already is not read. The same command gives the same
    answers; at another --parallel near ties may fall otherwise, unless --exact. Cut in the middle, the same command
    with -o goes on where it stopped. A prompt that the chat template refuses, or that is longer than the context, has
    an empty text and says so as its `finish`; the command then exits with 1.
    """
    from tapir_local.files import check_output
    from tapir_local.inference.prompt_file import Manner, answer_file, opened, read_schema, task_of

    if "" in stop:
        raise click.BadParameter("it is empty", param_hint="--stop")
    if out:
        beside, fix = (".partial", ".partial.json"), "Name another, or write it again with --force."
        check_output(out, [model, prompts, adapter, json_schema], beside=beside, force=force, fix=fix)
    schema = read_schema(json_schema) if json_schema else None
    manner = Manner(max_tokens, context, parallel, temperature, random_seed, exact, adapter, schema, stop)
    with (
        opened(out, sys.stdout, task_of(model, prompts, manner)) as (file, done),
        shown("answers", len(done)) as (progress, tell),
    ):
        if done:
            tell(f"{len(done):,} answers are there already; going on")
        found = answer_file(model, prompts, file, manner, progress, done, tell)
    echo(closing(found), err=True)
    if found.too_long or found.refused:
        sys.exit(1)


def closing(found: "Answered") -> str:
    """The line that a person reads at the end: what there is, what did not end or fit, and what it took."""
    said = f"{found.rows:,} answers, {found.tokens:,} tokens; {found.cut:,} cut at the limit"
    said += f", {found.too_long:,} longer than the context" if found.too_long else ""
    said += f", {found.refused:,} refused by the chat template" if found.refused else ""
    return said + (f"; {found.plan.words}" if found.plan else "")


@click.command(
    epilog=example(
        "tapir-local export models/Qwen2.5-1.5B student.gguf --adapter cache/runs/mine/round-03/adapter",
        "tapir-local export models/Qwen2.5-1.5B base.gguf --quant q4_k_m",
        "tapir-local export models/Qwen2.5-1.5B lora.gguf --adapter my-lora --adapter-only --base base.gguf",
    )
)
@click.argument("model")
@click.argument("out", type=FILE)
@click.option("--adapter", type=FILE, help="A LoRA folder, as PEFT writes it, that is merged.")
@click.option("--adapter-only", is_flag=True, help="Write the adapter alone, for llama.cpp to lay over its base.")
@click.option("--base", type=FILE, help="MODEL as a GGUF, over which an adapter alone is checked.")
@click.option(
    "--quant",
    help="f32, f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m; of an adapter alone f32 or f16.  "
    "[default: q8_0, of an adapter alone f32]",
)
@click.option("--chat-template", help="Use this Jinja file, `alpaca` or `chatml` as template.")
@click.option("--converter", type=FILE, help="llama.cpp's convert_hf_to_gguf.py, for a family that is not mapped.")
@click.option("--modelfile", is_flag=True, help="Write OUT.Modelfile too, for `ollama create`.")
@click.option("--no-gate", is_flag=True, help="Do without the comparison with the model, which loads it in 32 bits.")
def export(
    model: str,
    out: Path,
    adapter: Path | None,
    adapter_only: bool,
    base: Path | None,
    quant: str | None,
    chat_template: str | None,
    converter: Path | None,
    modelfile: bool,
    no_gate: bool,
) -> None:
    """Write MODEL, a folder or Hub name, as the GGUF OUT, tensor by tensor, and compare it with the model.

    OUT is there only when it tokenises, stops and answers as MODEL does; OUT.gate.json has the figures. Its SHA-256 is
    printed as `sha256sum -c` reads it.
    """
    if modelfile and adapter_only:
        raise click.UsageError("--modelfile is of a whole model; an adapter alone is named in its base's, by ADAPTER")
    from tapir_local.export.ollama import write_modelfile
    from tapir_local.export.verified import export_checked, with_template
    from tapir_local.files import file_sha256

    show = slowly("tensors")
    with with_template(model, chat_template) as folder:
        report = export_checked(
            folder,
            out,
            adapter=adapter,
            quant=quant or ("f32" if adapter_only else "q8_0"),
            check=not no_gate,
            base=base,
            adapter_only=adapter_only,
            converter=converter,
            progress=lambda done, total, _: show(done, total),
        )
    said = f"{out}: {out.stat().st_size / 1e6:,.1f} MB"
    if report:
        found = report.figures
        said += f"; {report.probes:,} texts tokenised alike, {found.agreement:.1%} of greedy tokens agree, "
        said += f"divergence {found.kl:.2g} nats"
    if modelfile:
        write_modelfile(out, out.with_name(out.name + ".Modelfile"))
    echo(said, err=True)
    echo(f"{file_sha256(out)}  {out}")
