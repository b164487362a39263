"""The families about code: small Python functions to write and to repair, and a safe way to run them."""

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
    """What a function does, in words and as an expression with constants `k` and `m`, and arguments to try it with."""

    description: str
    expression: str
    arguments: tuple[str, ...] = NUMBER_ARGUMENTS


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
ONE_STEP_TASKS = 13  # the first tasks, which have one step


@dataclass(frozen=True)
class CodeFault:
    """A fault to put into `def f(x): return ...`, and its description; `spoil` returns None if it does not apply."""

    description: str
    remark: str
    spoil: Callable[[str], tuple[str, str, str] | None]


def swap_operator(line: str) -> tuple[str, str, str] | None:
    """Replace the last operator of the expression: the line, the wrong and the right operator."""
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
    """Rename x to y after the return: the line, the wrong and the right name."""
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


# --- running code

MAX_VALUE_ITEMS = 10_000  # items that a value may have, nested items included


def count_items(value: object, most: int = MAX_VALUE_ITEMS) -> int:
    """The number of items of a value, nested items included; counting stops after `most`."""
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
    """The value; ValueError if it has more items than any right answer needs."""
    if count_items(value) > MAX_VALUE_ITEMS:
        raise ValueError("too many items")
    return value


def checked_multiply(left: Any, right: Any) -> object:
    """left * right; ValueError before the multiplication if the result would have too many items."""
    for value, count in ((left, right), (right, left)):
        repeats = isinstance(value, str | bytes | list | tuple) and isinstance(count, int)
        if repeats and count_items(value) * max(0, count) > MAX_VALUE_ITEMS:
            raise ValueError("too many items")
    return left * right


def checked_add(left: Any, right: Any) -> object:
    """left + right; ValueError if the result has too many items."""
    return check_item_count(left + right)


def checked_remainder(left: Any, right: Any) -> object:
    """left % right of numbers; TypeError for a text, whose formatting could have any width."""
    if isinstance(left, str | bytes):
        raise TypeError("no number")
    return left % right


def limit_result(function: Callable[..., object]) -> Callable[..., object]:
    """The function, with a ValueError for a result that has too many items."""
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
    """Replaces every operation that can make a large value by a call of a function that checks the size."""

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
    """The syntax tree of a call of one of our functions."""
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
    """Whether a node rebinds an allowed function or one of ours, or changes a part of a value."""
    if isinstance(node, ast.FunctionDef):
        return node.name in ALLOWED_CALLS or node.name.startswith("_")
    if isinstance(node, ast.arg):
        return node.arg in ALLOWED_CALLS or node.arg.startswith("_")
    if isinstance(node, ast.Name):
        return node.id.startswith("_") or (isinstance(node.ctx, ast.Store) and node.id in ALLOWED_CALLS)
    return isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)


def product_constants(nodes: Sequence[ast.AST]) -> list[float]:
    """The constants in products: for a sequence, they may multiply its length."""
    products = [node for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)]
    sides = [side for node in products for side in (node.left, node.right)]
    return [abs(side.value) for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, int | float)]


def is_harmless(tree: ast.Module) -> bool:
    """Whether the code is one short function of simple expressions.

    It may have no loops, attributes or powers, and may call only a few builtins. No called name can be rebound, so that
    nothing calls itself and every line runs at most once. The size of a line's result is checked when it runs (see
    GuardedOperations).
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


def function_results(code: str, name: str, arguments: Sequence[str]) -> tuple[object, ...] | None:
    """What the function `name` returns for each argument; None if the code is not one harmless, working function."""
    try:
        tree = ast.parse(code)
        if not is_harmless(tree):
            return None
        space: dict[str, object] = {"__builtins__": {**ALLOWED_CALLS, **GUARD_FUNCTIONS}}
        exec(compile(ast.fix_missing_locations(GuardedOperations().visit(tree)), "<pocket>", "exec"), space)
        function = space[name]
        return tuple(function(ast.literal_eval(argument)) for argument in arguments) if callable(function) else None
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


def parse_function_task(text: str) -> tuple[FunctionTask, dict[str, str]]:
    """The task that a text describes, and its constants; ValueError if it describes none."""
    words = text.split(" ")
    for task in FUNCTION_TASKS:
        pattern = task.description.split(" ")
        pairs = list(zip(pattern, words, strict=False))
        if len(words) == len(pattern) and all(
            one == word or (one in ("{k}", "{m}") and word.isdigit()) for one, word in pairs
        ):
            return task, {one[1]: word for one, word in pairs if one in ("{k}", "{m}")}
    raise ValueError("no task of the pocket world")


def draw_write(rng: Random, level: int) -> DrawnSlots:
    task = rng.choice(
        FUNCTION_TASKS[:ONE_STEP_TASKS]
        if level == 1
        else FUNCTION_TASKS
        if level == 2
        else FUNCTION_TASKS[ONE_STEP_TASKS:]
    )
    return {
        "fname": rng.choice(FUNCTION_NAMES),
        "job": task.description.format(k=rng.randint(2, 9 if level < 3 else 99), m=rng.randint(2, 9)),
    }


def solve_write(values: SlotValues) -> Solution:
    task, constants = parse_function_task(values["job"])
    name, body = values["fname"], task.expression.format(**constants)
    plain = f"def {name}(x):\n    return {body}"
    styled = f"```python\ndef {name}(x):\n    # {values['job']}\n    return {body}\n```"
    return Solution(plain, styled, "code", plain, (name, *task.arguments))


def draw_mend(rng: Random, level: int) -> DrawnSlots:
    drawn = draw_write(rng, level)
    task, constants = parse_function_task(drawn["job"])
    line = f"def {drawn['fname']}(x): return {task.expression.format(**constants)}"
    spoiled = [changed[0] for fault in CODE_FAULTS.values() if (changed := fault.spoil(line))]
    return {"job": drawn["job"], "code": rng.choice(spoiled)}


def solve_mend(values: SlotValues) -> Solution:
    task, constants = parse_function_task(values["job"])
    name = values["code"].removeprefix("def ").partition("(")[0]
    line = f"def {name}(x): return {task.expression.format(**constants)}"
    for fault in CODE_FAULTS.values():
        changed = fault.spoil(line)
        if changed and changed[0] == values["code"]:
            words = {"wrong": changed[1], "right": changed[2]}
            styled = f"{fault.description.format(**words)}\n```python\n{line}  # {fault.remark.format(**words)}\n```"
            return Solution(line, styled, "code", line, (name, *task.arguments))
    raise ValueError("no fault of the pocket world")


CODE_FAMILIES = (
    ProblemFamily("write", "Code Generation", draw_write, solve_write, 3),
    ProblemFamily("mend", "Code Debug", draw_mend, solve_mend, 3),
)
