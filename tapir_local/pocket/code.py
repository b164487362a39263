"""The families about code: small Python functions to write and to mend, and a safe way to try them."""

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Any

from tapir_local.pocket.family import DrawnSlots, ProblemFamily, SlotValues, Solution
from tapir_local.pocket.words import FUNCTION_NAMES

NUMBER_ARGUMENTS = ("-7", "0", "1", "5", "12", "60", "100")
LIST_ARGUMENTS = ("[4, 1, 9, 2, 2, 7, 8, 3, 5, 6, 0, 11]", "[3, 3, 1, 20, 5, 8, 13, 2, 9, 40, 6, 7]")
TEXT_ARGUMENTS = ("'ab'", "'x'")


@dataclass(frozen=True)
class FunctionTask:
    """What a function does, as it is said and as it is written; `k` and `m` are constants, `tries` its arguments."""

    said: str
    written: str
    tries: tuple[str, ...] = NUMBER_ARGUMENTS


FUNCTION_TASKS = (
    FunctionTask("adds {k} to x", "x + {k}"),
    FunctionTask("subtracts {k} from x", "x - {k}"),
    FunctionTask("multiplies x by {k}", "x * {k}"),
    FunctionTask("gives the remainder of x divided by {k}", "x % {k}"),
    FunctionTask("tells whether x is larger than {k}", "x > {k}"),
    FunctionTask("tells whether x is smaller than {k}", "x < {k}"),
    FunctionTask("gives the larger of x and {k}", "max(x, {k})"),
    FunctionTask("gives the smaller of x and {k}", "min(x, {k})"),
    FunctionTask("gives the first {k} items of x", "x[:{k}]", LIST_ARGUMENTS),
    FunctionTask("gives the items of x after the first {k}", "x[{k}:]", LIST_ARGUMENTS),
    FunctionTask("counts the items of x and adds {k}", "len(x) + {k}", LIST_ARGUMENTS),
    FunctionTask("adds up the items of x and then {k}", "sum(x) + {k}", LIST_ARGUMENTS),
    FunctionTask("repeats the text x {k} times", "x * {k}", TEXT_ARGUMENTS),
    FunctionTask("gives the square of x plus {k}", "x * x + {k}"),
    FunctionTask("adds {k} to x and multiplies the result by {m}", "(x + {k}) * {m}"),
    FunctionTask("multiplies x by {k} and subtracts {m}", "x * {k} - {m}"),
    FunctionTask("multiplies x by {k} and adds {m}", "x * {k} + {m}"),
)
ONE_STEP_TASKS = 13  # jobs before this place have one step


@dataclass(frozen=True)
class CodeFault:
    """A way to spoil `def f(x): return ...`, and what is said of it. `spoil` returns None where it does not apply."""

    said: str
    remark: str
    spoil: Callable[[str], tuple[str, str, str] | None]


def swap_operator(line: str) -> tuple[str, str, str] | None:
    """The last operator of the expression exchanged: the line, the wrong and the right operator."""
    for right, wrong in (
        (" + ", " - "),
        (" - ", " + "),
        (" * ", " + "),
        (" > ", " < "),
        (" < ", " > "),
        (" % ", " * "),
    ):
        if right in line:
            return wrong.join(line.rsplit(right, 1)), wrong.strip(), right.strip()
    return None


def misname_argument(line: str) -> tuple[str, str, str] | None:
    """x is called y after the return."""
    head, _, body = line.partition("return ")
    changed = "y".join(body.split("x", 1)) if body.startswith("x") else None
    return (f"{head}return {changed}", "y", "x") if changed else None


CODE_FAULTS: Mapping[str, CodeFault] = {
    "operator": CodeFault("The operator {wrong} is wrong, it must be {right}.", "was {wrong}", swap_operator),
    "name": CodeFault("The name {wrong} is unknown, it must be {right}.", "was {wrong}", misname_argument),
    "colon": CodeFault(
        "The colon after the arguments is missing.", "colon added", lambda line: (line.replace("):", ")", 1), "", ":")
    ),
    "return": CodeFault(
        "The word return is missing.", "return added", lambda line: (line.replace("return ", "", 1), "", "return")
    ),
}


# --- trying code

MAX_VALUE_ITEMS = 10_000  # items that a value may have, counted with those of the values in it


def count_items(value: object, most: int = MAX_VALUE_ITEMS) -> int:
    """How many items a value has with those of its items; counting ends where there are more than `most`."""
    if not isinstance(value, str | bytes | list | tuple | range):
        return 1
    if isinstance(value, str | bytes | range):
        return 1 + len(value)
    total = 1
    for item in value:
        total += count_items(item, most - total)
        if total > most:
            break
    return total


def check_item_count(value: object) -> object:
    """The value; ValueError where it has more items than a right answer ever needs."""
    if count_items(value) > MAX_VALUE_ITEMS:
        raise ValueError("too many items")
    return value


def checked_multiply(left: Any, right: Any) -> object:
    """left * right; ValueError, before anything is made, where the result would have too many items."""
    for value, count in ((left, right), (right, left)):
        repeats = isinstance(value, str | bytes | list | tuple) and isinstance(count, int)
        if repeats and count_items(value) * max(0, count) > MAX_VALUE_ITEMS:
            raise ValueError("too many items")
    return left * right


def checked_add(left: Any, right: Any) -> object:
    """left + right, not too large."""
    return check_item_count(left + right)


def checked_remainder(left: Any, right: Any) -> object:
    """left % right of numbers: that of a text would be formatting, whose width has no bound."""
    if isinstance(left, str | bytes):
        raise TypeError("no number")
    return left % right


def limit_result(function: Callable[..., object]) -> Callable[..., object]:
    """The function with no result that is too large."""
    return lambda *values: check_item_count(function(*values))


BUILTINS = (max, min, len, sum, abs, sorted, list, int, str, bool, range)
ALLOWED_CALLS: Mapping[str, Callable[..., object]] = MappingProxyType(
    {function.__name__: limit_result(function) for function in BUILTINS}
)
GUARD_FUNCTIONS: Mapping[str, Callable[..., object]] = MappingProxyType(
    {"_times": checked_multiply, "_plus": checked_add, "_remainder": checked_remainder, "_bounded": check_item_count}
)
GUARDED_OPERATORS: Mapping[type[ast.operator], str] = MappingProxyType(
    {ast.Mult: "_times", ast.Add: "_plus", ast.Mod: "_remainder"}
)


class GuardedOperations(ast.NodeTransformer):
    """Has every operation that can make something large done by a function that looks at the size first."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        name = GUARDED_OPERATORS.get(type(node.op))
        return call_node(name, node.left, node.right) if name else node

    def visit_List(self, node: ast.List) -> ast.expr:
        self.generic_visit(node)
        return call_node("_bounded", node) if isinstance(node.ctx, ast.Load) else node

    def visit_Tuple(self, node: ast.Tuple) -> ast.expr:
        self.generic_visit(node)
        return call_node("_bounded", node) if isinstance(node.ctx, ast.Load) else node


def call_node(name: str, *values: ast.expr) -> ast.Call:
    """A call of one of our own functions."""
    return ast.Call(ast.Name(name, ast.Load()), list(values), [])


ALLOWED_NODES = (
    *(
        ast.Module,
        ast.FunctionDef,
        ast.arguments,
        ast.arg,
        ast.Return,
        ast.Assign,
        ast.Expr,
        ast.If,
        ast.IfExp,
        ast.Name,
        ast.Constant,
        ast.Call,
    ),
    *(
        ast.BinOp,
        ast.UnaryOp,
        ast.BoolOp,
        ast.Compare,
        ast.operator,
        ast.unaryop,
        ast.boolop,
        ast.cmpop,
        ast.expr_context,
    ),
    *(ast.Subscript, ast.Slice, ast.List, ast.Tuple),
)


def rebinds_name(node: ast.AST) -> bool:
    """Whether a node gives a name that is called, or one of ours, another meaning, or changes a part of a value."""
    if isinstance(node, ast.FunctionDef):
        return node.name in ALLOWED_CALLS or node.name.startswith("_")
    if isinstance(node, ast.arg):
        return node.arg in ALLOWED_CALLS or node.arg.startswith("_")
    if isinstance(node, ast.Name):
        return node.id.startswith("_") or (isinstance(node.ctx, ast.Store) and node.id in ALLOWED_CALLS)
    return isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)


def product_constants(nodes: Sequence[ast.AST]) -> list[float]:
    """The numbers that stand in products: of a sequence they may come to its length."""
    products = [node for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)]
    sides = [side for node in products for side in (node.left, node.right)]
    return [abs(side.value) for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, int | float)]


def is_harmless(tree: ast.Module) -> bool:
    """One short function of plain expressions: no loops, attributes, powers or calls but of a few builtins.

    Nothing that is called can be given another meaning, so nothing calls itself and every line runs once at the most.
    What one line can make is bounded when it runs (see Guarded).
    """
    nodes = list(ast.walk(tree))
    return (
        len(nodes) < 80
        and not any(rebinds_name(node) for node in nodes)
        and len(tree.body) == 1
        and isinstance(tree.body[0], ast.FunctionDef)
        and not tree.body[0].decorator_list
        and all(isinstance(node, ALLOWED_NODES) for node in nodes)
        and not any(isinstance(node, ast.Pow | ast.LShift) for node in nodes)
        and sum(isinstance(node, ast.Mult) for node in nodes) <= 3
        and math.prod(product_constants(nodes)) <= MAX_VALUE_ITEMS
        and all(
            isinstance(node.func, ast.Name) and node.func.id in ALLOWED_CALLS
            for node in nodes
            if isinstance(node, ast.Call)
        )
        and all(
            not isinstance(node.value, int | float) or abs(node.value) < 10_000
            for node in nodes
            if isinstance(node, ast.Constant)
        )
    )


def function_results(code: str, name: str, tries: Sequence[str]) -> tuple[object, ...] | None:
    """What the function `name` returns for each argument; None if the code is not one harmless function that works."""
    try:
        tree = ast.parse(code)
        if not is_harmless(tree):
            return None
        space: dict[str, object] = {"__builtins__": {**ALLOWED_CALLS, **GUARD_FUNCTIONS}}
        exec(compile(ast.fix_missing_locations(GuardedOperations().visit(tree)), "<pocket>", "exec"), space)
        function = space[name]
        return tuple(function(ast.literal_eval(argument)) for argument in tries) if callable(function) else None
    except (
        SyntaxError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        NameError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ):
        return None


# --- writing


def parse_function_task(said: str) -> tuple[FunctionTask, dict[str, str]]:
    """The job that a text tells, with its constants; ValueError if it tells none."""
    words = said.split(" ")
    for job in FUNCTION_TASKS:
        pattern = job.said.split(" ")
        pairs = list(zip(pattern, words, strict=False))
        if len(words) == len(pattern) and all(
            one == word or (one in ("{k}", "{m}") and word.isdigit()) for one, word in pairs
        ):
            return job, {one[1]: word for one, word in pairs if one in ("{k}", "{m}")}
    raise ValueError("no job of the pocket world")


def draw_write(rng: Random, level: int) -> DrawnSlots:
    job = rng.choice(
        FUNCTION_TASKS[:ONE_STEP_TASKS]
        if level == 1
        else FUNCTION_TASKS
        if level == 2
        else FUNCTION_TASKS[ONE_STEP_TASKS:]
    )
    return {
        "fname": rng.choice(FUNCTION_NAMES),
        "job": job.said.format(k=rng.randint(2, 9 if level < 3 else 99), m=rng.randint(2, 9)),
    }


def solve_write(values: SlotValues) -> Solution:
    job, constants = parse_function_task(values["job"])
    name, body = values["fname"], job.written.format(**constants)
    plain = f"def {name}(x):\n    return {body}"
    styled = f"```python\ndef {name}(x):\n    # {values['job']}\n    return {body}\n```"
    return Solution(plain, styled, "code", plain, (name, *job.tries))


def draw_mend(rng: Random, level: int) -> DrawnSlots:
    drawn = draw_write(rng, level)
    job, constants = parse_function_task(drawn["job"])
    line = f"def {drawn['fname']}(x): return {job.written.format(**constants)}"
    spoiled = [changed[0] for fault in CODE_FAULTS.values() if (changed := fault.spoil(line))]
    return {"job": drawn["job"], "code": rng.choice(spoiled)}


def solve_mend(values: SlotValues) -> Solution:
    job, constants = parse_function_task(values["job"])
    name = values["code"].removeprefix("def ").partition("(")[0]
    line = f"def {name}(x): return {job.written.format(**constants)}"
    for fault in CODE_FAULTS.values():
        changed = fault.spoil(line)
        if changed and changed[0] == values["code"]:
            words = {"wrong": changed[1], "right": changed[2]}
            styled = f"{fault.said.format(**words)}\n```python\n{line}  # {fault.remark.format(**words)}\n```"
            return Solution(line, styled, "code", line, (name, *job.tries))
    raise ValueError("no fault of the pocket world")


CODE_FAMILIES = (
    ProblemFamily("write", "Code Generation", draw_write, solve_write, 3),
    ProblemFamily("mend", "Code Debug", draw_mend, solve_mend, 3),
)
