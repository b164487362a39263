"""Read YAML without surprises: no duplicate keys, and no words or numbers converted to another type."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import yaml

from tapir_local.errors import TapirError
from tapir_local.recipe.old_names import OLD_NAMES, current_path
from tapir_local.recipe.own_tasks import OwnTask
from tapir_local.recipe.types import Settings, allowed_types

MAX_RECIPE_LENGTH = 1_000_000  # characters in a recipe
MAX_NUMBER_LENGTH = 400  # characters; Python refuses integers of 4,300 digits
MAX_VALUES, MAX_NESTING = 20_000, 40  # values, counting repetitions by aliases; levels of nesting
YAML_TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = frozenset(
    YAML_TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")
)
TRUE_WORDS, FALSE_WORDS = frozenset({"true", "yes", "on"}), frozenset({"false", "no", "off"})
WHOLE_NUMBER = re.compile(r"[-+]?\d+")
BASED_NUMBER = re.compile(r"[-+]?0[xob][0-9a-f]+", re.IGNORECASE)
DECIMAL_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
NUMBER_LIKE = re.compile(r"[-+]?\.?\d[\w.:+-]*")  # what may be a number
NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)


def read_yaml(text: str, kind: Any, where: str, path: str = "") -> Any:
    """The value of a YAML text at `path` of a recipe; `kind` is the section or the annotation of the setting.

    Where text is expected, a word stays as written (`no`, `2024`, `1.10`). Where a number is expected, `1e-5` is one,
    while `yes` or `1:30` stays text, which the setting then refuses. TapirError for invalid YAML, duplicate keys,
    numbers with a leading zero, and texts that would use up the memory of the machine.
    """
    if len(text) > MAX_RECIPE_LENGTH:
        raise TapirError(f"not a recipe: longer than {MAX_RECIPE_LENGTH:,} characters", where=where)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise TapirError(f"not YAML: {format_yaml_error(error)}", where=where, fix="Correct that line.") from error
    except RecursionError as error:
        raise TapirError("not a recipe: its brackets are nested too deeply", where=where) from error
    return None if node is None else YamlReader(where).value(node, kind, tuple(filter(None, path.split("."))))


def write_yaml(value: Mapping[str, Any]) -> str:
    """Settings as YAML that `read_yaml` reads back unchanged: text that looks like a number is quoted."""
    text: str = yaml.dump(value, Dumper=QuotingDumper, sort_keys=False, allow_unicode=True)
    return text


class QuotingDumper(yaml.SafeDumper):
    """A dumper that quotes `1e5`, which PyYAML leaves unquoted because it is text in YAML 1.1."""


def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text as a YAML node, quoted if it could be read as a number."""
    style = "'" if NUMBER_LIKE.fullmatch(text) else None
    return dumper.represent_scalar(f"{YAML_TAG}str", text, style=style)


QuotingDumper.add_representer(str, represent_text)


def format_yaml_error(error: yaml.YAMLError) -> str:
    """Format a YAML error as one sentence with its line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    if "'\\t'" in problem:
        problem = "a tab, where YAML allows only spaces"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


@dataclass
class YamlReader:
    """Convert the nodes of one text into values, and count them."""

    where: str
    count: int = 0

    def value(self, node: yaml.Node, kind: Any, path: tuple[str, ...]) -> Any:
        """The value of a node, converted to what `kind` expects."""
        self.count += 1
        if self.count > MAX_VALUES or len(path) > MAX_NESTING:
            raise TapirError(
                f"not a recipe: more than {MAX_VALUES:,} values or {MAX_NESTING} levels, counting aliases",
                where=self.where,
                fix="Write the values out instead of repeating them with `&` and `*`.",
            )
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, kind, path)
        if isinstance(node, yaml.SequenceNode):
            inner = str if wanted_type(kind) == "text" else Any  # the words of a command
            return [self.value(item, inner, (*path, str(place))) for place, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)  # YAML has no other kind
        return self.scalar(node, kind, path)

    def mapping(self, node: yaml.MappingNode, kind: Any, path: tuple[str, ...]) -> dict[Any, Any]:
        """A mapping without duplicate keys; `<<` includes another mapping, and settings get their present names."""
        lines, own, merged = dict[Any, int](), dict[Any, Any](), dict[Any, Any]()
        for key_node, item in node.value:
            if key_node.tag == f"{YAML_TAG}merge":
                merged = {**self.merged(item, kind, path), **merged}
                continue
            key = current_key(self.key(key_node, path), path)
            place, line = (*path, str(key)), key_node.start_mark.line + 1
            if key in lines:
                self.refuse_twice(place, lines[key], line)
            lines[key] = line
            own[key] = self.value(item, annotation_within(kind, key), place)
        return merged | own

    def merged(self, node: yaml.Node, kind: Any, path: tuple[str, ...]) -> dict[Any, Any]:
        """The mapping that `<<: *other` or `<<: [*one, *other]` includes; the first of several has precedence."""
        found = dict[Any, Any]()
        for part in reversed(node.value) if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(part, yaml.MappingNode):
                raise TapirError(f"{'.'.join((*path, '<<'))}: includes mappings only", where=self.where)
            found |= self.value(part, kind, (*path, "<<"))
        return found

    def key(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        """A key: a word as written, or an integer."""
        if not isinstance(node, yaml.ScalarNode):
            what = f"{'.'.join(path) or 'the recipe'}: a key must be one word, not a list or a mapping"
            raise TapirError(what, where=f"{self.where}, line {node.start_mark.line + 1}")
        return int(node.value) if node.tag == f"{YAML_TAG}int" and WHOLE_NUMBER.fullmatch(node.value) else node.value

    def refuse_twice(self, path: tuple[str, ...], first: int, second: int) -> None:
        """Raise TapirError for a key that is given twice."""
        lines = f"in lines {first} and {second}" if first != second else f"in line {first}"
        raise TapirError(f"{'.'.join(path)}: given twice, {lines}", where=self.where, fix="Keep only one of them.")

    def scalar(self, node: yaml.ScalarNode, kind: Any, path: tuple[str, ...]) -> Any:
        """A single value; quoted values are text."""
        if node.tag not in PLAIN_TAGS:
            raise TapirError(
                f"{'.'.join(path)}: the tag {node.tag.replace(YAML_TAG, '!!')} has no meaning in a recipe",
                where=f"{self.where}, line {node.start_mark.line + 1}",
                fix="Remove the tag.",
            )
        text = str(node.value)
        if node.style is not None:
            return text
        if node.tag == f"{YAML_TAG}null":
            return None
        return parse_plain_word(text, wanted_type(kind), f"{self.where}: {'.'.join(path)}" if path else self.where)


def current_key(key: Any, path: Sequence[str]) -> Any:
    """The present name of a key at a path; keys that were never renamed stay as they are."""
    place = ".".join(part for part in (*path, str(key)) if part != "<<")
    return current_path(place).rpartition(".")[2] if place in OLD_NAMES else key


def annotation_within(kind: Any, key: Any) -> Any:
    """The annotation of a key in a section or mapping; Any if there is none."""
    for part in allowed_types(kind):
        if isinstance(part, type) and issubclass(part, Settings):
            return part.model_fields[key].annotation if key in part.model_fields else Any
        if get_origin(part) is Mapping and get_args(part):
            return get_args(part)[1]
    return Any


def annotation_at(kind: Any, path: str) -> Any:
    """The annotation of the setting at a path such as `train.epochs`."""
    for key in path.split("."):
        kind = annotation_within(kind, key)
    return kind


def wanted_type(kind: Any) -> str:
    """How a plain word is read: as `text`, as a `number`, as a `truth` value, or by YAML's rules (`any`)."""
    found = allowed_types(kind)
    if bool in found:
        return "truth"
    if {int, float} & set(found) or OwnTask in found:
        return "number"
    if str in found or any(isinstance(part, type) and issubclass(part, Settings) for part in found):
        return "text"
    return "any"


def parse_plain_word(text: str, want: str, where: str) -> Any:
    """The value of a word without quotes."""
    if want == "text":
        return text
    if want != "number" and text.lower() in TRUE_WORDS | FALSE_WORDS:
        return text.lower() in TRUE_WORDS
    number = parse_number(text, where)
    return text if number is None else number


def parse_number(text: str, where: str) -> int | float | None:
    """Parse a number; None if it is none; TapirError if it is ambiguous: 010 is 8 in old YAML."""
    if NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if len(text) > MAX_NUMBER_LENGTH or not NUMBER_LIKE.fullmatch(text):
        return None
    word = text.replace("_", "")
    if BASED_NUMBER.fullmatch(word):
        try:
            return int(word, 0)
        except ValueError:  # 0b12
            return None
    if re.fullmatch(r"[-+]?0\d+", word):
        value = int(word)
        raise TapirError(f"{text} may mean {value} or an octal number", where=where, fix=f"Write {value}.")
    if WHOLE_NUMBER.fullmatch(word):
        return int(word)
    if DECIMAL_NUMBER.fullmatch(word):
        number = float(word)
        return int(number) if "e" in word.lower() and number.is_integer() and abs(number) < 2**53 else number
    return None
