"""Imports point one way, and heavy ones wait inside functions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports only from modules to its left in its line, or in a line above.
ORDER = """
errors printable paths records tasks form_check checkers setting_types own_tasks
endpoint_settings recipe recipe_yaml
pocket_words pocket_phrasings pocket_family pocket_code pocket_check pocket_language pocket_numbers pocket_world
prompts judging judge_quality ifd curriculum parents screening recipe_checks recipe_text
seedtext seedforms seedrows likeness near dataset metrics template quoting keys packing
stats memory private usage reply_limits
outputs rundir assets student_files lockfile unusable resumable seedfiles seedsource
libllama llama tokens ollama batching room sampling sequences generate score
process vocab_check storerows storefile inserting thinking replies calls claims store search transfer pace pocket
endpoint refusals streaming wire giving_up budget account asking local foreign
away online batch_lines batch_api batch teacher
lora footprint sft checkpoints steps classifier train
gguf_vocab weights families gguf_file adapter_gguf converter export probes trained gate exporting student
student_text work rows reading prepare judge_asking reflecting writing stages published card shipping distill
tools
forecast trust chat report costs why whatif llama_check doctor tables display labels
sides compare comparison explanations
answering console calls_cli runs_cli models_cli distill_cli commands
"""
MODULES = ORDER.split()
HEAVY = {"torch", "transformers", "trl", "peft", "unsloth", "datasets", "llama_cpp", "openai", "gguf", "scipy"}
HEAVY |= {"pandas", "pyarrow", "zstandard"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module of ours that a file imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "tapir_local":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("tapir_local."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tapir_local."))


def test_every_module_has_its_place() -> None:
    files = {path.stem for path in (ROOT / "tapir_local").glob("*.py")} - {"__init__"}
    assert files == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    tree = ast.parse((ROOT / "tapir_local" / f"{module}.py").read_text(encoding="utf-8"))
    above = set(MODULES[: MODULES.index(module)]) | {"__version__"}
    assert set(imported(tree)) <= above


@pytest.mark.parametrize("module", [*MODULES, "../cli"])
def test_heavy_packages_are_imported_inside_functions(module: str) -> None:
    tree = ast.parse((ROOT / "tapir_local" / f"{module}.py").read_text(encoding="utf-8"))
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
