"""Commands on models, without a run: `generate` and `export`."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tapir_local.printable import format_count
from tapir_local.terminal.options import HomePath, help_examples
from tapir_local.terminal.output import bar_progress, echo, line_progress

if TYPE_CHECKING:
    from tapir_local.export.gate import GateReport
    from tapir_local.inference.prompt_file import AnsweredFile, PromptFileJob

FILE_PATH = HomePath()


def parse_parallel(context: click.Context, option: click.Parameter, text: str) -> int | None:
    """The number of answers to generate at the same time, 1 to 255, or None for `auto`."""
    return None if text == "auto" else click.IntRange(1, 255)(text, option, context)


@click.command(
    name="generate",
    epilog=help_examples(
        "tapir-local generate student.gguf prompts.jsonl -o answers.jsonl",
        "tapir-local generate base.gguf prompts.jsonl --adapter lora.gguf --parallel 64 --max-tokens 256",
    ),
)
@click.argument("model", type=FILE_PATH)
@click.argument("prompts", type=FILE_PATH)
@click.option(
    "-o", "--output", "--out", "out", type=FILE_PATH, help="File for the answers; standard output by default."
)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@click.option("--adapter", type=FILE_PATH, help="LoRA GGUF to apply to the model.")
@click.option(
    "--parallel",
    metavar="1-255|auto",
    callback=parse_parallel,
    default="auto",
    show_default=True,
    help="Maximum number of answers in progress. auto: 32, or 128 on a GPU; fewer if memory is short.",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Maximum tokens per answer."
)
@click.option(
    "--context",
    type=click.IntRange(min=32),
    default=2048,
    show_default=True,
    help="Maximum tokens of prompt and answer together.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 always takes the most likely token.",
)
@click.option("--random-seed", type=click.IntRange(min=0), default=1, show_default=True, help="Seed of sampling.")
@click.option("--stop", multiple=True, help="End an answer before this text; repeatable.")
@click.option("--json-schema", type=FILE_PATH, help="JSON schema that every answer must match.")
@click.option("--exact", is_flag=True, help="Same answers at any --parallel: computes in 32 bits, takes twice as long.")
def generate_command(
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
    """Answer the prompts in a file with a GGUF model.

    Answers the file PROMPTS with the GGUF MODEL, many prompts at the same time, and writes JSON lines in the order of
    the prompts. PROMPTS may have any format that seeds may have; answers in it are ignored.

    The same command gives the same answers. Another --parallel may change tokens that are almost equally likely,
    unless you add --exact. If the command is stopped, the same command with -o resumes. A prompt that the chat
    template refuses, or that is longer than the context, gets an empty text and a `finish` that names the reason; the
    command then exits with 1.
    """
    from tapir_local.files import check_output
    from tapir_local.inference.config import GenerationConfig
    from tapir_local.inference.lib import unused_gpu_remark
    from tapir_local.inference.prompt_file import PromptFileJob, read_json_schema

    if "" in stop:
        raise click.BadParameter("the text is empty", param_hint="--stop")
    if out:
        beside, fix = (".partial", ".partial.json"), "Choose another file, or replace this one with --force."
        check_output(out, [model, prompts, adapter, json_schema], beside=beside, force=force, fix=fix)
    schema = read_json_schema(json_schema) if json_schema else None
    config = GenerationConfig(
        max_tokens, context, temperature, random_seed, schema, stop, parallel=parallel, exact=exact
    )
    if remark := unused_gpu_remark():
        echo(remark, err=True)
    found = answer_with_progress(PromptFileJob(model, prompts, config, adapter), out)
    echo(generation_summary(found), err=True)
    if found.too_long or found.refused:
        sys.exit(1)


def answer_with_progress(job: "PromptFileJob", out: Path | None) -> "AnsweredFile":
    """Answer a file of prompts with a progress bar; resume what is in `out` already.

    Answers that go to a terminal show the progress themselves: a bar would share their lines.
    """
    from tapir_local.inference.prompt_file import answer_file, generation_task, open_answers

    with (
        open_answers(out, sys.stdout, generation_task(job)) as (file, done),
        bar_progress("answers", len(done), hidden=bool(out is None and sys.stdout and sys.stdout.isatty())) as (
            progress,
            tell,
        ),
    ):
        if done:
            tell(f"{format_count(len(done), 'answer is', 'answers are')} there already; resuming")
        return answer_file(job, file, progress, done, tell)


def generation_summary(found: "AnsweredFile") -> str:
    """The last line for the user: answers, tokens, what was cut or left out, and the context plan."""
    summary = (
        f"{format_count(found.rows, 'answer')}, {format_count(found.tokens, 'token')}; {found.cut:,} cut at the limit"
    )
    summary += f", {found.too_long:,} longer than the context" if found.too_long else ""
    summary += f", {found.refused:,} refused by the chat template" if found.refused else ""
    return summary + (f"; {found.plan.summary}" if found.plan else "")


@click.command(
    name="export",
    epilog=help_examples(
        "tapir-local export models/Qwen2.5-1.5B student.gguf --adapter cache/runs/mine/round-03/adapter",
        "tapir-local export models/Qwen2.5-1.5B base.gguf --quant q4_k_m",
        "tapir-local export models/Qwen2.5-1.5B lora.gguf --adapter my-lora --adapter-only --base base.gguf",
    ),
)
@click.argument("model")
@click.argument("out", type=FILE_PATH, required=False)
@click.option("-o", "--output", type=FILE_PATH, help="The same as OUT.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--adapter", type=FILE_PATH, help="LoRA folder, as PEFT writes it, to merge into the model.")
@click.option("--adapter-only", is_flag=True, help="Write only the adapter, which llama.cpp applies to its base.")
@click.option("--base", type=FILE_PATH, help="MODEL as a GGUF, to check an adapter on its own.")
@click.option(
    "--quant",
    help="f32, f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m; for --adapter-only f32 or f16.  "
    "[default: q8_0; f32 for --adapter-only]",
)
@click.option("--chat-template", help="Chat template to use: a Jinja file, `alpaca` or `chatml`.")
@click.option("--converter", type=FILE_PATH, help="llama.cpp's convert_hf_to_gguf.py, for model families not built in.")
@click.option("--modelfile", is_flag=True, help="Write OUT.Modelfile too, for `ollama create`.")
@click.option("--no-gate", is_flag=True, help="Skip the comparison with the model, which loads it in 32 bits.")
def export_command(
    model: str,
    out: Path | None,
    output: Path | None,
    force: bool,
    adapter: Path | None,
    adapter_only: bool,
    base: Path | None,
    quant: str | None,
    chat_template: str | None,
    converter: Path | None,
    modelfile: bool,
    no_gate: bool,
) -> None:
    """Convert a model to GGUF and check the result.

    MODEL is a folder, the name of a model on the Hub, or the GGUF of a student. It is written tensor by tensor and then
    compared with the GGUF. OUT exists only if it tokenizes, stops and answers as MODEL does; OUT.gate.json has the
    figures. The command prints the SHA-256 of OUT in the format of `sha256sum -c`.
    """
    if modelfile and adapter_only:
        raise click.UsageError(
            "--modelfile needs a whole model; for an adapter, add an ADAPTER line to the Modelfile of its base"
        )
    out = one_output(out, output)
    from tapir_local.export.base import gguf_student_folder
    from tapir_local.export.gated_export import ExportConfig, export_with_gate, model_with_template
    from tapir_local.export.ollama import write_modelfile
    from tapir_local.files import file_sha256
    from tapir_local.resources import default_cache, named_student_gguf

    show = line_progress("tensors")
    if gguf := named_student_gguf(model):
        tell = partial(echo, err=True)
        model = str(gguf_student_folder(gguf, default_cache(), say=tell, template=chat_template is None))
    with model_with_template(model, chat_template) as folder:
        config = ExportConfig(
            quant or ("f32" if adapter_only else "q8_0"),
            adapter,
            adapter_only,
            base,
            converter,
            check=not no_gate,
            force=force,
        )
        report = export_with_gate(folder, out, config, lambda done, total, _: show(done, total))
    if modelfile:
        write_modelfile(out, out.with_name(out.name + ".Modelfile"))
    echo(export_summary(out, report), err=True)
    echo(f"{file_sha256(out)}  {out}")


def one_output(out: Path | None, output: Path | None) -> Path:
    """The file to write, which an argument or an option names; UsageError unless one of them does."""
    found = [path for path in (out, output) if path]
    if len(found) != 1:
        raise click.UsageError("give the file to write once, as OUT or with --output")
    return found[0]


def export_summary(out: Path, report: "GateReport | None") -> str:
    """The line for the user: the file, its size, and how well it matches the model."""
    summary = f"{out}: {out.stat().st_size / 1e6:,.1f} MB"
    if not report:
        return summary
    summary += f", {report.bits_per_weight:.1f} bits per weight"
    found = report.figures
    matches = (
        f"{format_count(report.probes, 'text')} with the same token ids, {found.agreement:.1%} of greedy tokens agree"
    )
    return f"{summary}; {matches}, divergence {found.kl:.2g} nats"
