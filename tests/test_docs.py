"""The documentation agrees with the code: generated pages, links, commands, settings, messages, files, JSON fields."""

import ast
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from annotations import make_annotations
from click.testing import CliRunner
from fakes import QUIET, World, fake_backends, make_recipe

from tapir_local.commands.main import cli
from tapir_local.pipeline.loop import distill
from tapir_local.recipe.endpoints import Teacher
from tapir_local.recipe.tasks import TASKS
from tapir_local.run_dir import RunDir
from tapir_local.teacher.rate_limit import backoff_seconds

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
GENERATED = ("docs/commands.md", "docs/settings.md")


def generator() -> Any:
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date() -> None:
    stale = [page.name for page, text in generator().pages().items() if page.read_text(encoding="utf-8") != text]
    assert stale == [], "run `make docs`"


def test_the_readme_is_short_and_links_every_page() -> None:
    readme = TEXTS["README.md"]
    assert len(readme.splitlines()) <= 105
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


# Links


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert broken == []


# Commands


def command_lines(text: str) -> Iterator[list[str]]:
    """Every `tapir-local …` of a page's code, as words; `…` and KEY=VALUE alone end a line that only describes."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in [line for block in blocks for line in block.splitlines()] + spans:
        for part in re.split(r"&&|;| then: ", line.removesuffix(" &")):  # in the background
            words = shlex.split(part, comments=True) if part.count("'") % 2 == 0 and part.count('"') % 2 == 0 else []
            words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word) or "--set" in words]
            if words and Path(words[0]).name == "tapir-local" and len(words) > 1:
                yield words[1 : words.index(">")] if ">" in words else words[1:]


def parse(words: list[str]) -> None:
    """Parse a command line as the program does, without running it."""
    command: click.Command = cli
    context = click.Context(cli, info_name="tapir-local")
    while isinstance(command, click.Group):
        if words[0].startswith("-"):
            return
        name, found, words = command.resolve_command(context, words)
        assert found
        command, context = found, click.Context(found, info_name=name, parent=context)
    if words in (["--help"], []) or "[OPTIONS]" in words:
        return
    numbers = ["1" if word == "N" else word for word in words]
    command.make_context(command.name, numbers, parent=context.parent)


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "docs/commands.md"])
def test_commands_are_parsed_by_the_program(name: str) -> None:
    refused = []
    for words in command_lines(TEXTS[name]):
        if words[0] == "COMMAND":
            continue
        try:
            parse(words)
        except click.MissingParameter:
            continue  # a command that is named without its arguments
        except click.ClickException as error:
            refused.append(f"{' '.join(words)}: {error.format_message()}")
    assert refused == []


def test_every_option_that_is_named_exists() -> None:
    known = {option for _, command in generator().commands(cli) for param in command.params for option in param.opts}
    known |= {"--help", "--version"}
    others = {"--multi_gpu", "--num_processes", "--nproc-per-node", "--start"}  # of accelerate, torchrun and bench/
    others |= {"--index-url", "--no-cache-dir", "--force-reinstall", "--no-deps", "--logdir"}  # of pip and tensorboard
    text = "\n".join(text for name, text in TEXTS.items() if name not in GENERATED)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text)) - others
    assert named <= known | bench_options()


def bench_options() -> set[str]:
    """The options of the benches."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py")]
    return {option for source in sources for option in re.findall(r'"(--[a-z-]+)"', source)}


# Settings


def test_settings_that_are_named_exist() -> None:
    known = generator().setting_paths()
    heads = "|".join(sorted({path.partition(".")[0] for path in known if "." in path}))
    named = {
        found
        for name, text in TEXTS.items()
        if name not in GENERATED
        for found in re.findall(rf"(?<![\w./])((?:{heads})\.[a-z_]+)(?![\w(/])", text)
        if not found.endswith((".json", ".jsonl", ".yaml", ".md", ".gguf", ".db", ".log"))
    }
    json_fields = set(re.findall(r"`([^`]+)`", TEXTS["docs/json.md"]))
    assert sorted(named - known - json_fields) == []


def test_the_recipes_in_the_docs_are_recipes(tmp_path: Path) -> None:
    from tapir_local.recipe.text import parse_recipe

    (text,) = re.findall(r"^```yaml\n(.*?)^```", TEXTS["README.md"], re.MULTILINE | re.DOTALL)
    recipe = parse_recipe(text, "README.md")
    assert recipe.name == "mine"
    launcher, fleet = re.findall(r"^```yaml\n(.*?)^```", TEXTS["docs/scaling.md"], re.MULTILINE | re.DOTALL)
    both = parse_recipe(fleet + launcher + "student: {path: student}\nseeds: {path: my.jsonl}\n", "scaling.md")
    assert (both.teacher.kind, both.teacher.alias, both.train.launcher) == (
        "openai",
        "fleet",
        "accelerate launch --multi_gpu --num_processes 2",
    )


def test_the_times_that_attempts_outlast_are_those_of_the_pauses() -> None:
    rows = re.findall(r"^\| (\d+)(?: \(the default\))? \| (\d+) to (\d+) \|$", TEXTS["docs/scaling.md"], re.MULTILINE)
    assert [int(row[0]) for row in rows] == [Teacher().attempts, 10, 12, 15, 20]
    for attempts, least, most in rows:
        for chance, seconds in ((0.0, least), (1.0, most)):
            assert round(sum(backoff_seconds(tries, chance) for tries in range(1, int(attempts)))) == int(seconds)


# Messages


def source_texts() -> list[str]:
    """Every text in the source, joined as Python joins them; the parts of an f-string one by one; the Makefile."""
    texts = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    for path in (ROOT / "tapir_local").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_quoted_messages_are_in_the_source() -> None:
    quoted = re.findall(r"^### `([^`]+)`", TEXTS["docs/troubleshooting.md"], re.MULTILINE)
    assert len(quoted) >= 20
    parts = [part.strip(" ,;:.") for message in quoted for part in message.split("…")]
    texts = source_texts()
    assert [part for part in parts if part and not any(part in text for text in texts)] == []


# Architecture


def test_files_that_are_named_exist() -> None:
    text = TEXTS["docs/architecture.md"]
    named = re.findall(r"`((?:tapir_local|tests|bench|docs|recipes|\.ci)/[\w./-]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
    assert len(named) > 20


def test_functions_that_are_named_are_in_their_files() -> None:
    text = TEXTS["docs/architecture.md"]
    found = re.findall(r"`(tapir_local/[\w/]+\.py)`\s+\(`(\w+)`\)", text)
    found += [(path, name) for name, path in re.findall(r"`(\w+)`\s+(?:of|in)\s+`(tapir_local/[\w/]+\.py)`", text)]
    assert len(found) > 20
    missing = [f"{name} in {path}" for path, name in found if not defines(ROOT / path, name)]
    assert missing == []


def defines(path: Path, name: str) -> bool:
    """Whether a file has such a function, class or constant."""
    return bool(re.search(rf"^(?:async def|def|class)? ?{name}\b", path.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_room_is_named() -> None:
    rooms = [path.parent.name for path in (ROOT / "tapir_local").glob("*/__init__.py")]
    assert [room for room in rooms if f"  {room}/" not in TEXTS["docs/architecture.md"]] == []


def rates_by_round(page: str, begin: str, end: str) -> list[tuple[str, str]]:
    """The rates with their intervals in a part of a page: accuracy and win rate of each round."""
    part = TEXTS[page].partition(begin)[2].partition(end)[0]
    return re.findall(r"(\d+\.\d) ?% \((\d+ to \d+)\)", part)


def test_the_quickstarts_rates_are_of_one_run_on_all_pages() -> None:
    """Untrained student and rounds 0 to 3; README shows the table as the program prints it."""
    found = rates_by_round("docs/quickstart.md", "## The result", "Run on")
    assert len(found) == 2 * 5
    assert rates_by_round("README.md", "## First run", "## Your own data") == found
    assert rates_by_round("docs/benchmarks.md", "## Quality", "The run was repeated") == found


def test_the_readmes_table_of_curricula_has_the_arm_that_beats_the_method() -> None:
    """With the rates of docs/curricula.md and of the measurement itself."""
    table = TEXTS["README.md"].partition("## Results")[2].partition("## Is it for you?")[0]
    (arm,) = [line for line in table.splitlines() if line.startswith("| `uniform-refined`")]
    rates = re.findall(r"(\d+\.\d) ?% (\([^)]*\))", arm)
    assert len(rates) == 2
    assert "random seeds with refined answers do at\nleast as well as `tapir`" in table
    measured = (ROOT / "bench" / "RESULTS.md").read_text(encoding="utf-8")
    for rate, interval in re.findall(r"(\d+\.\d) ?% (\([^)]*\))", table):
        assert f"{rate} % {interval}" in TEXTS["docs/curricula.md"]
        assert f"{rate}% {interval}" in measured


# JSON


def fields(value: Any, path: str = "") -> Iterator[str]:
    """`rounds[].stages[].name` and the like for everything in a value; labels of tasks and names of steps alike."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            name = "LABEL" if key in TASKS else "STEP" if "/" in key else key
            yield from fields(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from fields(inner, f"{path}[]")
    elif path:
        yield path


def documented(heading: str) -> set[str]:
    """The fields in a section of json.md."""
    section = TEXTS["docs/json.md"].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def shape(heading: str, inner: dict[str, str]) -> set[str]:
    """The fields of a section, and those of other sections that its fields refer to (`metrics`: metrics)."""
    found = documented(heading)
    for field, other in inner.items():
        found |= {f"{field}.{name}" for name in documented(other)}
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two rounds with fakes, twice, so that they can be compared."""
    folder = tmp_path_factory.mktemp("json")
    recipe = make_recipe(folder)
    for name in ("fake", "other"):
        distill(recipe.model_copy(update={"name": name}), RunDir(folder, name), fake_backends(World()), QUIET)
    (folder / "annotations.json").write_text(json.dumps(make_annotations()))
    return RunDir(folder, "fake")


def is_documented(path: str, known: set[str]) -> bool:
    """Whether a field is documented, or an object or list that holds it, or, of an empty list, what it would hold."""
    return any(
        path == name or path.startswith((f"{name}.", f"{name}[]")) or name.startswith(f"{path}[]") for name in known
    )


JSON: dict[str, tuple[str, dict[str, str]]] = {
    "status": ("status fake", {"rounds[].metrics": "metrics", "rounds[].metrics.judge_quality": "judge quality"}),
    "show": (
        "show fake --round 1",
        {
            "metrics": "metrics",
            "metrics.judge_quality": "judge quality",
            "plan": "plan of a round",
            "judge.pool": "judge quality",
            "judge.holdout": "judge quality",
        },
    ),
    "judge-check": ("judge-check fake --round 1", {}),
    "show --labels": ("show fake --labels", {}),
    "show --unusable": ("show fake --unusable", {}),
    "why": ("why fake seed-00001", {}),
    "plan": ("plan fake --round 1", {"now": "plan of a round", "then": "plan of a round"}),
    "compare": ("compare fake other", {}),
    "distill --dry-run": ("distill fake --dry-run", {}),
    "evaluate": ("evaluate --annotations CACHE/annotations.json", {}),
}


@pytest.mark.parametrize("heading", JSON)
def test_json_output_is_documented(heading: str, run: RunDir) -> None:
    words, inner = JSON[heading]
    command = [*shlex.split(words.replace("CACHE", str(run.cache))), "--json", "--cache", str(run.cache)]
    printed = CliRunner().invoke(cli, command, catch_exceptions=False).stdout
    value = json.loads(printed)
    known = shape(heading, inner)
    assert {path for path in fields(value) if not is_documented(path, known)} == set()
    top = {name.split(".")[0].removesuffix("[]") for name in documented(heading)}
    assert top == set(value)
