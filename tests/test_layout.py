"""The rooms of the house stand in one order, imports point one way, and heavy packages wait inside functions."""

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tapir_local"
# A module imports only from its own room and those above it; "" are the files that all rooms share.
ROOMS = (
    "",
    "recipe",
    "method",
    "data",
    "store",
    "pocket",
    "inference",
    "teacher",
    "training",
    "export",
    "stages",
    "pipeline",
    "doctor",
    "report",
    "page",
    "talk",
    "terminal",
    "commands",
)
HEAVY = {"torch", "transformers", "trl", "peft", "unsloth", "datasets", "llama_cpp", "openai", "gguf", "scipy"}
HEAVY |= {"pandas", "pyarrow", "zstandard", "vl_convert", "jinja2"}


def name_of(path: Path) -> str:
    """`tapir_local.store.keys` of that file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    """`store` of `tapir_local.store.keys`; "" of a shared file."""
    inside = MODULES[module].relative_to(PACKAGE).parts
    return inside[0] if len(inside) > 1 else ""


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module of ours that a file imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tapir_local":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (names & MODULES.keys()) or {node.module}
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "tapir_local")


def test_every_folder_is_a_room() -> None:
    assert {room_of(name) for name in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    above = ROOMS[: ROOMS.index(room_of(module)) + 1]
    assert [name for name in imported(TREES[module]) if room_of(name) not in above] == []


def test_no_imports_go_round_in_a_circle() -> None:
    TopologicalSorter({name: set(imported(tree)) - {"tapir_local"} for name, tree in TREES.items()}).prepare()


def defined(body: list[ast.stmt]) -> Iterator[str]:
    """Names that statements at the top of a module define."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.If | ast.Try):
            yield from defined(node.body)


def test_a_public_name_is_defined_once() -> None:
    places = defaultdict(set)
    for module, tree in TREES.items():
        for name in defined(tree.body):
            if not name.startswith("_"):
                places[name].add(module)
    assert {name: sorted(modules) for name, modules in places.items() if len(modules) > 1} == {}


def test_rooms_files_and_functions_are_small() -> None:
    rooms = Counter(path.parent.name for path in MODULES.values() if path.name != "__init__.py")
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in MODULES.items()}
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {room: count for room, count in rooms.items() if count > 14} == {}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    assert {name: length for name, length in lengths.items() if length > 50} == {}
    assert median((node.end_lineno or 0) - node.lineno + 1 for node in functions) <= 10


def is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Click calls the function: its parameters are a command's options."""
    return any("command(" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_functions_take_at_most_six_parameters() -> None:
    many = {}
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_command(node):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([argument for argument in taken if argument.arg not in ("self", "cls")])
                if count > 6:
                    many[f"{module}.{node.name}"] = count
    assert many == {}


@pytest.mark.parametrize("module", [*MODULES, "cli"])
def test_heavy_packages_are_imported_inside_functions(module: str) -> None:
    tree = TREES.get(module) or ast.parse((ROOT / "cli.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {(node.module or "").split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
    assert not names & HEAVY


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['tapir-local', '--help']\n"
        "import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'pydantic', 'rich', 'openai'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.endswith("[]\n")
    assert "distill" in out
