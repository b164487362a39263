"""The order of the rooms: imports point only upward, without cycles; heavy packages are imported inside functions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tapir_local"
# A module imports only from its own room and the rooms above it; "" stands for the shared files.
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
    "pipeline",
    "report",
    "commands",
)
HEAVY = {"torch", "transformers", "trl", "peft", "unsloth", "datasets", "llama_cpp", "openai", "gguf", "scipy"}
HEAVY |= {"pandas", "pyarrow", "zstandard"}


def name_of(path: Path) -> str:
    """The dotted name of a file: `tapir_local.store.keys`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    """The room of a module: `store` for `tapir_local.store.keys`, "" for a shared file."""
    inside = MODULES[module].relative_to(PACKAGE).parts
    return inside[0] if len(inside) > 1 else ""


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module of this package that a file imports, at any place."""
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
