"""Configs from YAML files and dotted flags, and the help text that explains every field.

`--teacher.path X`, `--teacher.path=X`; hyphen and underscore are the same; a value is read as YAML (`--blocks
"[3, 7]"`), except where the field is text. Flags win over the file, and each is given
once. Whatever is wrong with a file, a flag or a value is one `ConfigError`.
"""

import difflib
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from distillcache.schemas.config.yaml_text import MAX_CHARACTERS, YamlError, as_yaml, parse_yaml, to_yaml
from distillcache.schemas.errors import ConfigError, DistillcacheError
from distillcache.schemas.runtime.console import shown_log
from distillcache.schemas.store.local_path import refuse_irregular
from distillcache.schemas.store.redaction import redacted
from distillcache.schemas.store.url_secrets import refuse_secret, refuse_secrets

ConfigType = TypeVar("ConfigType", bound=BaseModel)

_REQUIRED = "  (required)"
_TRUTHS = ("true", "false", "yes", "no", "on", "off", "1", "0", "null", "~")

OPEN_ALREADY = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # a shell's `<(...)` is a pipe that somebody writes to
STORAGE = "storage"  # the section of a config about buckets
MAX_BRIEF = 84  # characters of a description on a line of --help that only names a flag
MAX_FIELDS = 200  # characters in which help names all fields of a mapping


class HelpRequested(Exception):
    """`--help` was given; its text is the exception's text."""


def answer(command: Callable[[], int | None]) -> int:
    """Run a command with the library's log on standard error; help and mistakes become text. Returns: the exit code."""
    try:
        with shown_log():
            return command() or 0
    except HelpRequested as text:
        print(text)
    except DistillcacheError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def parse(
    model: type[ConfigType],
    argv: Sequence[str],
    command: str,
    *,
    positional: Sequence[str] = (),
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values,
) -> ConfigType:
    """The config that a command line and, with `--config FILE.yaml`, a file describe.

    Args:
        model: the config's pydantic model.
        argv: the words after the command's name.
        command: the command as the user typed it, for help and messages.
        positional: fields that may be given as bare words, in order.
        complete: fills in what was not given, before the values are checked.

    Raises:
        ConfigError: an unknown flag, a value that does not fit, a missing field, an unreadable file.
        HelpRequested: `--help`, `-h` or `--help-all` is among the words.
    """
    if "--help-all" in argv:
        raise HelpRequested(help_text(model, command, positional))
    if "--help" in argv or "-h" in argv:
        raise HelpRequested(short_help_text(model, command, positional))
    for before, word in zip(["", *argv], argv, strict=False):
        flag = word.partition("=")[0] if word.startswith("--") else before
        refuse_secret(word, redacted(flag) if flag.startswith("--") else "argument")
    values: dict[str, Any] = {}
    overrides: list[tuple[list[str], str | None, str]] = []
    words, bare = list(argv), list(positional)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if not bare:
                raise ConfigError("an unexpected word on the command line", {"found": word}, f"see {command} --help")
            name = bare.pop(0)
            overrides.append(([name], word, f"<{name}>"))
            continue  # the same field as a flag is refused below
        flag, equals, text = word.partition("=")
        value = text if equals else None
        name = flag[2:].replace("-", "_")
        annotation = None if name == "config" else _field_annotation(model, name.split("."), flag, command)
        if value is None and words and _is_value(words[0], annotation, bare):
            value = words.pop(0)
        if name == "config":
            values = merge(values, load_yaml(_given(value, flag, command)))
            refuse_secrets(values)
        else:
            overrides.append((name.split("."), value, flag))
    _refuse_repeated(overrides)
    for keys, value, flag in overrides:
        annotation = _field_annotation(model, keys, flag, command)
        if value is None and bool in _members(annotation):
            value = "true"
        _assign(values, keys, _parse_value(_given(value, flag, command), annotation, flag), flag)
    return validate(model, complete(values), command, positional)


def _refuse_repeated(overrides: Sequence[tuple[list[str], str | None, str]]) -> None:
    """Raise for a field that is given twice: nobody can know which value was meant. Files may be several."""
    first: dict[str, str] = {}
    for keys, value, flag in overrides:
        name, said = ".".join(keys), flag if value is None else f"{flag} {_shortly_said(value)}"
        if name in first:
            facts = {"found": first[name], "and": said}
            raise ConfigError("a flag is given twice", facts, "give it once; a list is one value: '[1, 2]'")
        first[name] = said


def _shortly_said(text: str) -> str:
    return text if len(text) <= MAX_FIELDS else f"{text[:MAX_FIELDS]}..."


def _is_value(word: str, annotation: Any, bare: Sequence[str]) -> bool:
    """True for a word that belongs to the flag before it; `verify --quick cache` names a cache, not how quick.

    Args:
        bare: fields that bare words may still fill.
    """
    if word.startswith("--"):
        return False
    return not bare or _members(annotation) != [bool] or word.lower() in _TRUTHS


def validate(
    model: type[ConfigType], values: dict[str, Any], source: str, positional: Sequence[str] = ()
) -> ConfigType:
    """The model of these values, with pydantic's findings as one `ConfigError`.

    Args:
        source: the command or file that they come from.
        positional: fields that may be given as bare words.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        facts: dict[str, object] = {}
        for keys, finding in _told(model, error):
            message = _message(finding)
            if finding["type"] == "extra_forbidden":
                message = _unknown_key(model, keys)
            elif finding["type"] == "string_pattern_mismatch" and message.startswith("string should match"):
                message = f"should be {_described(model, keys)} (found {_shortly(finding['input'])})"
            elif finding["type"] == "list_type":
                message = f"{_list_wanted(model, keys, finding['input'])} (found {_shortly(finding['input'])})"
            elif finding["type"] == "missing":
                message = _required(model, keys, positional)
            # What a validator of the whole model found is the whole config: it says itself what is wrong there.
            elif keys:
                message += f" (found {_shortly(finding['input'])})"
            facts.setdefault(".".join(keys) or "config", message)
        raise ConfigError("the config cannot be used", {"in": source, **facts}, f"see {source} --help") from error


def _told(model: type[BaseModel], error: ValidationError) -> list[tuple[list[str], Any]]:
    """The findings to tell, with their keys. Of a field of several types pydantic gives those of each: told are those
    inside the mapping or list that was given, and of a single value that a list belongs there.
    """
    found = [(_keys(model, finding["loc"]), finding) for finding in error.errors()]
    lists = [keys for keys, finding in found if finding["type"] == "list_type"]

    def is_told(keys: list[str], finding: Any) -> bool:
        given = finding["input"]
        if isinstance(given, dict | list) and any(len(o) > len(keys) and o[: len(keys)] == keys for o, _ in found):
            return not keys
        return finding["type"] == "list_type" or isinstance(given, dict | list) or keys not in lists

    return [(keys, finding) for keys, finding in found if is_told(keys, finding)]


def _list_wanted(model: type[BaseModel], keys: list[str], given: object) -> str:
    """The finding for another value where a list belongs: how this very value is written."""
    members = _members(_annotation_at(model, keys))
    words = [
        str(word) for each in members if typing.get_origin(each) is typing.Literal for word in typing.get_args(each)
    ]
    items = [typing.get_args(each)[0] for each in members if typing.get_origin(each) is list]
    lead = f"should be {' or '.join(words)}, or a list" if words else "should be a list"
    nested = _nested_model(items[0]) if items else None
    if isinstance(given, dict):
        return f"{lead}: put it in brackets, '[{{...}}]'"
    if nested is not None:
        return f"{lead} of mappings, such as '[{{{next(iter(nested.model_fields))}: ...}}]'"
    fits = items and _fits(list[items[0]], [given])
    return f"{lead}: write '[{as_yaml(given)}]'" if fits else f"{lead}, such as '[1, 2]' or '[resid]'"


def _fits(annotation: Any, value: object) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        return False
    return True


def _annotation_at(model: type[BaseModel], keys: list[str]) -> Any:
    """The type of the field at these keys; None where they lead elsewhere."""
    annotation: Any = model
    for key in keys:
        nested = _nested_model(annotation)
        field = nested.model_fields.get(key) if nested is not None else None
        if field is not None:
            annotation = field.annotation
        elif key.isdigit():
            lists = [each for each in _members(annotation) if typing.get_origin(each) is list]
            annotation = typing.get_args(lists[0])[0] if lists else None
        else:
            return None
    return annotation


def _keys(model: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """The keys that lead to a finding: pydantic's place of it, without the members of unions that were tried there."""
    keys: list[str] = []
    annotation: Any = model
    for key in map(str, place):
        members = _members(annotation)
        if len(members) > 1:
            annotation = next((each for each in members if getattr(each, "__name__", "Literal") in key), None)
            continue
        keys.append(key)
        nested = _nested_model(annotation)
        field = nested.model_fields.get(key) if nested is not None else None
        annotation = field.annotation if field is not None else next(iter(typing.get_args(members[0])), None)
    return keys


def _shortly(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= MAX_FIELDS else f"{shown[:MAX_FIELDS]}..."


def _unknown_key(model: type[BaseModel], keys: list[str]) -> str:
    """The finding for a key of a file that no field has: what was meant, by its name or by its place."""
    known = [name for name, *_ in _fields(model, "")]
    if "." in keys[-1] and ".".join(keys).replace("-", "_") in known:
        *sections, field = keys[-1].replace("-", "_").split(".")
        nested = "".join(f"{{{name}: " for name in [*sections[1:], field])
        return f"is no key of a file: write {sections[0]}: {nested}...{'}' * len(sections)}"
    sections = {name.rpartition(".")[0] for name in known} - {""}
    names = list(dict.fromkeys([*known, *sorted(sections)]))
    if ":" in keys[-1]:
        return "is no field: YAML needs a space after the colon, as in '{start: 1, end: 0}'"
    item = _item_model(model, keys)
    if item is not None:
        close = difflib.get_close_matches(keys[-1], item.model_fields, n=1, cutoff=0.6)
        return f"is no field: did you mean {close[0]}?" if close else f"is no field: use {', '.join(item.model_fields)}"
    path = ".".join(keys).replace("-", "_")
    leaf = path.rsplit(".", 1)[-1]
    same = [name for name in names if name.rsplit(".", 1)[-1] == leaf]
    beside = [name for name in names if name.rpartition(".")[0] == path.rpartition(".")[0]]
    close = difflib.get_close_matches(path, beside, n=1, cutoff=0.6) if not same else same[:3]
    close = close or difflib.get_close_matches(path, names, n=1, cutoff=0.6)
    return f"is no field: did you mean {' or '.join(close)}?" if close else "is no field"


def _item_model(model: type[BaseModel], keys: list[str]) -> type[BaseModel] | None:
    """The model of an entry of a list that a key was given in; None: the key is in no such entry."""
    return _nested_model(_annotation_at(model, keys[:-1])) if any(key.isdigit() for key in keys[:-1]) else None


def _described(model: type[BaseModel], keys: list[str]) -> str:
    """The first clause of a field's description, which shows the form of a value that a pattern decides on."""
    found = {name: description for name, _, _, description in _fields(model, "")}.get(".".join(keys), "another text")
    return found.partition(": ")[0]


def _required(model: type[BaseModel], keys: list[str], positional: Sequence[str]) -> str:
    """The finding for a field that was not given: its flags and what it is for; of a section those of what it needs."""
    rows, path = _fields(model, ""), ".".join(keys)
    needed = [row for row in rows if row[0].startswith(f"{path}.") and row[2] == _REQUIRED]
    needed = needed or [row for row in rows if row[0] == path]
    said = needed[0][3] if len(needed) == 1 else ""
    flags = [_flag(name) for name, *_ in needed] or [_flag(path)]
    ways = " or ".join([f"<{path}>", *flags]) if path in positional else " and ".join(flags)
    return f"is required: give {ways}" + (f" ({said})" if said else "")


def _message(finding: Mapping[str, Any]) -> str:
    """Translate a pydantic finding for readers who know neither pydantic nor regular expressions."""
    if finding["type"] == "string_type" and isinstance(finding["input"], bool | int | float):
        return "should be text: put it in quotes"
    if finding["type"] in ("model_type", "dict_type"):
        return "should be a mapping, such as '{field: value}'"
    if finding["type"] == "string_pattern_mismatch" and finding["ctx"]["pattern"].startswith("\\."):
        endings = re.findall("[a-z]+", finding["ctx"]["pattern"])
        return "should end in " + " or ".join(f".{ending}" for ending in endings)
    message = finding["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def load_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, at a local path or a URL."""
    try:
        data = _config_bytes(path)
    except (OSError, ValueError) as error:
        next = "name a YAML file that can be read"
        raise ConfigError("the config file cannot be read", {"file": path, "cause": error}, next) from error
    return stored_settings(data, path)


def stored_settings(data: bytes, place: str) -> dict[str, Any]:
    """The mapping in a YAML file's bytes.

    Args:
        place: where they lie, for messages.
    """
    try:
        loaded = parse_yaml(data.decode())
    except UnicodeDecodeError as error:
        facts = {"file": place, "cause": error}
        raise ConfigError("the config file cannot be read", facts, "save it as UTF-8") from error
    except YamlError as error:
        next = "correct the file; it is one document of plain values, whose keys are texts"
        raise ConfigError("the config file cannot be used as YAML", {"file": place, "cause": error}, next) from error
    if not isinstance(loaded, dict):
        found = "nothing" if loaded is None else type(loaded).__name__
        facts = {"file": place, "found": found}
        raise ConfigError("the config file holds no mapping", facts, "write `key: value` lines")
    return loaded


def _config_bytes(path: str) -> bytes:
    """The file's bytes, no more of them than a config may have, and one, which shows that there are more."""
    if "://" not in path:
        local = os.path.expanduser(path)  # no shell does it in `--config=~/x.yaml`
        if not local.startswith(OPEN_ALREADY):
            refuse_irregular(local)
        with open(local, "rb") as stream:
            return stream.read(4 * MAX_CHARACTERS + 1)
    from distillcache.schemas.store.path import (
        locate,  # here, since TensorStore takes a while to import, and most files are local
    )

    return locate(path).read_bytes()


def dump_yaml(config: BaseModel) -> str:
    """The resolved config as YAML, every field included."""
    return to_yaml(config.model_dump(mode="json"))


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mappings key by key."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def help_text(model: type[BaseModel], command: str, positional: Sequence[str] = ()) -> str:
    """Explains every field: its type, its default and its meaning. `--help-all` prints it."""
    lines = [line for row in _fields(model, "") for line in _explained(row)]
    return "\n".join([*_usage(model, command, positional), *lines, *_COMMON_FLAGS])


def short_help_text(model: type[BaseModel], command: str, positional: Sequence[str] = ()) -> str:
    """Explains the usual fields and names the others, a line each. `--help` prints it.

    A model that declares no usual fields explains all but its `storage`, which is the same for every command.
    """
    usual: Sequence[str] = getattr(model, "usual", ()) or [name for name in model.model_fields if name != STORAGE]
    if len(usual) == len(model.model_fields):
        return help_text(model, command, positional)
    rows = _fields(model, "")
    shown = [row for prefix in usual for row in rows if row[0] == prefix or row[0].startswith(f"{prefix}.")]
    lines = [line for row in shown for line in _explained(row)]
    explained = {row[0] for row in shown}
    # A section is named once, by its first line; a field of a section that is shown in part by its own.
    others = [
        row
        for row in rows
        if row[0] not in explained
        and not any(name.startswith(f"{row[0]}.") for name in explained)
        and not any(row[0].startswith(f"{other[0]}.") for other in rows if _is_hidden_section(other, explained))
    ]
    width = max((len(_flag(name)) for name, *_ in others), default=0)
    more = [f"  {_flag(name).ljust(width)}  {_in_brief(meaning)}" for name, _, _, meaning in others]
    heading = ["", f"Less usual; {command} --help-all explains these too:", ""]
    return "\n".join([*_usage(model, command, positional), *lines, *_COMMON_FLAGS, *heading, *more])


def _in_brief(meaning: str) -> str:
    """The first clause of a field's description, on one line."""
    return textwrap.shorten(meaning.split("; ")[0], MAX_BRIEF, placeholder=" ...")


def _is_hidden_section(row: tuple[str, str, str, str], explained: set[str]) -> bool:
    """True for the heading of a section of which no field is explained."""
    name, kinds = row[0], row[1]
    return kinds.endswith("its fields:") and not any(each.startswith(f"{name}.") for each in explained)


_COMMON_FLAGS = (
    "  --config FILE.yaml",
    "        the same fields as a file, local or at gs:// or s3://; flags override it",
    "  --json",
    "        one JSON object on standard output, and nothing else there",
)


def _usage(model: type[BaseModel], command: str, positional: Sequence[str]) -> list[str]:
    usage = " ".join([command, *(f"<{name}>" for name in positional), "[--config FILE.yaml]", "[--field value ...]"])
    paragraphs = [" ".join(each.split()) for each in (model.__doc__ or "").strip().split("\n\n")]
    return [f"usage: {usage}", "", *(line for each in paragraphs for line in (each, ""))]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _explained(row: tuple[str, str, str, str]) -> list[str]:
    name, type_name, default, description = row
    return [f"  {_flag(name)} {type_name}{default}", f"        {description}"]


def _fields(
    model: type[BaseModel], prefix: str, values: BaseModel | None = None, optional: bool = False
) -> list[tuple[str, str, str, str]]:
    """Flag, type, default and description of every field, sections first.

    Args:
        values: a section's own default, whose values go before those of its type.
        optional: the section may be left out, and with it what it requires.
    """
    rows = []
    for name, field in model.model_fields.items():
        given = getattr(values, name) if values is not None else field.get_default(call_default_factory=True)
        nested = _nested_model(field.annotation)
        if nested is not None and not _is_plain(field.annotation):
            if field.description:
                words = _words_instead(field.annotation)
                default = f"  (default: {given})" if isinstance(given, str) else ""
                kinds = " or ".join([*words, "its fields:"]) if default or given is None else "its fields:"
                rows.append((prefix + name, kinds, default, field.description))
            inner = given if isinstance(given, BaseModel) else None
            unset = given is None or isinstance(given, str)  # no field of it counts until one is given
            rows.extend(_fields(nested, f"{prefix}{name}.", inner, optional or unset))
            continue
        words = field.description or ""
        told = given in (None, "") and "default:" in words  # what is meant where nothing is given
        default = "" if told else _default_text(given, optional)
        rows.append((prefix + name, _type_name(field.annotation), default, words))
    return rows


def _words_instead(annotation: Any) -> list[str]:
    """Return the words that a section accepts instead of its fields: those of its type, and null."""
    words = [
        str(word)
        for member in _members(annotation)
        if typing.get_origin(member) is typing.Literal
        for word in typing.get_args(member)
    ]
    return [*words, "null"]


def _default_text(given: Any, optional: bool) -> str:
    if given is PydanticUndefined or given is ...:
        return "  (required with its section)" if optional else _REQUIRED
    shown = as_yaml(given) if isinstance(given, bool | list | tuple) else given
    return f"  (default{' with its section' if optional else ''}: {'none' if given in (None, '') else shown})"


def _members(annotation: Any) -> list[Any]:
    """The types in a union (or the one type), without None."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    found = typing.get_args(annotation) if union else [annotation]
    bare = [typing.get_args(each)[0] if typing.get_origin(each) is typing.Annotated else each for each in found]
    return [member for member in bare if member is not type(None)]


def _is_plain(annotation: Any) -> bool:
    """Return whether a number or a text is accepted, so that help needs one line, whatever else is accepted."""
    return any(member in (int, float, str) for member in _members(annotation))


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    models = [m for m in _members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
    return models[0] if models else None


def _type_name(annotation: Any, *, inside: bool = False) -> str:
    """`inside`: of a mapping's field, whose own fields are left out."""
    names = []
    for member in _members(annotation):
        if typing.get_origin(member) is typing.Literal:
            names.append("|".join(str(value) for value in typing.get_args(member)))
        elif typing.get_origin(member) is list:
            names.append(f"[{_type_name(typing.get_args(member)[0], inside=inside)}, ...]")
        elif isinstance(member, type) and issubclass(member, BaseModel):
            names.append("{...}" if inside else _fields_in_line(member))
        else:
            names.append(getattr(member, "__name__", str(member)))
    return " or ".join(names)


def _fields_in_line(model: type[BaseModel]) -> str:
    """A mapping's fields; where they are too many for a line, those that must be given."""
    fields = {n: f"{n}: {_type_name(f.annotation, inside=True)}" for n, f in model.model_fields.items()}
    line = "{" + ", ".join(fields.values()) + "}"
    if len(line) <= MAX_FIELDS:
        return line
    return "{" + ", ".join([*(fields[n] for n, f in model.model_fields.items() if f.is_required()), "..."]) + "}"


def _field_annotation(model: type[BaseModel], keys: list[str], flag: str, command: str) -> Any:
    other_names = getattr(model, "other_names", {})
    if len(keys) == 1 and keys[0] in other_names:
        return other_names[keys[0]]
    current: type[BaseModel] | None = model
    annotation: Any = None
    for key in keys:
        field = current.model_fields.get(key) if current is not None else None
        if field is None:
            known = [name for name, *_ in _fields(model, "")]
            close = difflib.get_close_matches(".".join(keys), known, n=1, cutoff=0.5)
            hint = f"did you mean --{close[0]}? See {command} --help" if close else f"see {command} --help"
            raise ConfigError("there is no such flag", {"found": flag}, hint)
        annotation = field.annotation
        current = _nested_model(annotation)
    return annotation


def _given(value: str | None, flag: str, command: str) -> str:
    if value is None:
        raise ConfigError("a flag lacks its value", {"flag": flag}, f"see {command} --help")
    if not value.strip():  # as from a shell variable that is not set
        raise ConfigError("a flag's value is empty", {"flag": flag}, "give it a value, or leave it out")
    return value


def _parse_value(text: str, annotation: Any, flag: str) -> Any:
    """The value of a flag: for a field of text the very words, whatever YAML would make of them."""
    members = _members(annotation)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        shown = text.encode("utf-8", "backslashreplace").decode()
        next = "name it in UTF-8; file names in another encoding are not supported"
        raise ConfigError("a flag's value is not UTF-8", {"flag": flag, "found": shown}, next)
    if str in members and (members == [str] or text.strip()[:1] not in ("[", "{")):
        return text
    try:
        value = parse_yaml(text)
    except YamlError as error:
        if str in members:
            return text
        raise ConfigError(
            "a flag's value is not YAML", {"flag": flag, "found": _shortly(text), "cause": error}
        ) from error
    if value is None and text.strip().lower() not in ("null", "~"):  # `#` and `!` are nothing to YAML
        raise ConfigError("a flag's value is empty", {"flag": flag, "found": text}, "quote it, or leave it out")
    return value if isinstance(value, list | dict) or str not in members else text


def _assign(values: dict[str, Any], keys: list[str], value: Any, flag: str) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError("a flag sets a field of something that is not a mapping", {"flag": flag, "found": inner})
        values[key] = dict(inner or {})
        values = values[key]
    values[keys[-1]] = value
