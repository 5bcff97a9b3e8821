"""Settings that a user asked for: written in a config or a flag, with another value than the default."""

from typing import Any

from pydantic import BaseModel


def asked(config: BaseModel, path: str) -> Any | None:
    """Return the value of a field (dotted path) that was set to something other than its default; None if it was not.

    A field set to null is not asked for.
    """
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, BaseModel) or key not in value.model_fields_set:
            return None
        default = type(value).model_fields[key].get_default(call_default_factory=True)
        value = getattr(value, key)
    return None if value == default else value


def asked_below(config: BaseModel, path: str = "") -> list[str]:
    """Return the dotted paths of all fields below a section that were asked for."""
    section = getattr(config, path) if path else config
    found = []
    for name in type(section).model_fields:
        if asked(section, name) is None:
            continue
        inner = getattr(section, name)
        below = asked_below(inner) if isinstance(inner, BaseModel) else []
        found += [f"{name}.{each}" for each in below] or [name]
    return [f"{path}.{name}" if path else name for name in found]
