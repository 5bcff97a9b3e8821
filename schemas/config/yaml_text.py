"""YAML as configs and flags use it: plain data, bounded in size, and one error for all that may be wrong with it.

The scalars are those of YAML 1.2's core schema (yaml.org/spec/1.2.2, chapter 10.3): `yes`, `2025-01-31` and `1:30` are
texts, which a field's own type reads, and `010` is ten. Of YAML 1.1 merge keys (`<<`) are kept. Tags, other keys than
texts, a key that is given twice and texts that no file name can hold are refused.
"""

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

from distillcache.schemas.counted import counted

MAX_CHARACTERS = 1 << 18  # a config is a page or two, and a second is enough to read this much
MAX_DEPTH = 64  # ours are five deep; PyYAML takes time quadratic in the number of open brackets
MAX_VALUES = 100_000  # with aliases spelled out: a few lines can stand for 10^9 values


class YamlError(ValueError):
    """A text that cannot be read as YAML; the message names the problem and its position."""


def as_yaml(value: Any) -> str:
    """A value of a config on one line, as a YAML file spells it: `[{op: kv_heads, to: 2}]`, `null`, `true`."""
    if isinstance(value, str):
        return value
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=1e9)
    return text.removesuffix("...\n").rstrip()


def parse_yaml(text: str) -> Any:
    """The one document in a text, as None, bool, int, float, str, list and dict.

    Raises:
        YamlError: it is no YAML, holds what is refused here, or stands for more than the limits above.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError(f"{len(text):,} characters, where {MAX_CHARACTERS:,} are the most")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise YamlError(_in_a_line(error)) from error
    except (ValueError, OverflowError, RecursionError, AttributeError, TypeError) as error:
        raise YamlError(str(error)) from error


def _in_a_line(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    if error.context == "expected a single document in the stream":
        return f"a second document begins{_place(error.problem_mark)}"
    said = ", ".join(part for part in (error.context, error.problem) if part)
    return f"{said}{_place(error.problem_mark or error.context_mark)}"


def _place(mark: Any) -> str:
    return "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with other scalars, and with limits."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # filled below, in place of YAML 1.1's
    yaml_constructors: ClassVar[dict] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # PyYAML's own name
        if self.flow_level >= MAX_DEPTH:
            raise _refused(f"more than {MAX_DEPTH} brackets inside each other", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self._depth >= MAX_DEPTH:
            raise _refused(f"more than {MAX_DEPTH} levels inside each other", self.peek_event().start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def compose_document(self) -> Any:
        node = super().compose_document()
        _count_values(node, {})
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (_STR, _MERGE):
                found = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise _refused(f"the key {found} is no text: put it in quotes", key.start_mark)
            if key.value in seen:
                raise _refused(f"the key {key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_STR, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def _refused(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _count_values(node: Any, counts: dict[int, int]) -> int:
    """Values below a node, aliases spelled out; a node that holds itself is refused."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in counts:
        if not counts[id(node)]:
            raise _refused("an alias refers to itself", node.start_mark)
        return counts[id(node)]
    counts[id(node)] = 0
    inner = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
    total = 1 + sum(_count_values(each, counts) for each in inner)
    if total > MAX_VALUES:
        raise _refused(f"more than {MAX_VALUES:,} values after expanding aliases", node.start_mark)
    counts[id(node)] = total
    return total


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    text = loader.construct_scalar(node)
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _refused("a text with a NUL or half a surrogate pair", node.start_mark)
    return text


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0x": 16, "0o": 8}.get(text[:2], 10)
    try:
        return int(text, base)
    except ValueError as error:  # thousands of digits
        raise _refused(f"a number of {counted(len(text), 'digit')}", node.start_mark) from error


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _foreign(loader: _Loader, node: Any) -> Any:
    raise _refused(f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not known here", node.start_mark)


def _whole(loader: _Loader, node: Any) -> dict[Hashable, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _refused("!!map before something else", node.start_mark)
    return loader.construct_mapping(node, deep=True)


def _sequence(loader: _Loader, node: Any) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise _refused("!!seq before something else", node.start_mark)
    return loader.construct_sequence(node, deep=True)


def _stated(pattern: str, construct: Any) -> Any:
    """`construct`, for scalars that look like one, which a stated tag (`!!int x`) does not promise."""
    looks = re.compile(pattern)

    def checked(loader: _Loader, node: Any) -> Any:
        if not isinstance(node, yaml.ScalarNode) or not looks.match(node.value):
            found = node.value if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise _refused(f"{found!r} is no {tag}", node.start_mark)
        return construct(loader, node)

    return checked


# Source: YAML 1.2.2, 10.3.2 "Tag Resolution"; the letters are those that such a scalar may begin with.
_SCALARS = {
    "null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""], lambda *_: None),
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF"), lambda _, node: node.value.lower() == "true"),
    "int": (r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789"), _integer),
    "float": (
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
        _float,
    ),
}
for _name, (_pattern, _letters, _construct) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _letters)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _stated(_pattern, _construct))
_Loader.add_implicit_resolver(_MERGE, re.compile(r"^<<$"), ["<"])
_Loader.add_constructor(_STR, _stated("", _text))
_Loader.add_constructor("tag:yaml.org,2002:map", _whole)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)
_Loader.yaml_constructors[None] = _foreign  # of any tag that is not above


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which puts in quotes what the loader above, or one of YAML 1.1, would not take for text."""

    yaml_implicit_resolvers: ClassVar[dict] = {
        letter: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(letter, []),
            *_Loader.yaml_implicit_resolvers.get(letter, []),
        ]
        for letter in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }


def to_yaml(value: Any) -> str:
    """The text that `parse_yaml` reads as this value again, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
