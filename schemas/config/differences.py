"""Differences of two plans, configs or records, field by field, for messages."""

import json
from collections.abc import Mapping
from typing import Any

MAX_TOLD = 8  # differences in one message: one field of a config changes several of a plan


def differing(there: Any, here: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (there, here), for every field in which two JSON values differ.

    Mappings and lists are walked; the entries of a list go by their `name`, where all have one, or by number.
    """
    if _walked(there) is None or _walked(here) is None:
        return {} if there == here else {name: (there, here)}
    then, now = _walked(there) or {}, _walked(here) or {}
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*then, *now}, key=str):
        found |= differing(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    return found


def told(differences: Mapping[str, tuple[Any, Any]]) -> dict[str, str]:
    """Label -> text for an error: the first `MAX_TOLD` differences, and how many more there are.

    Rows and teacher go first: what is planned for the taps follows from them.
    """
    order = sorted(differences, key=lambda name: not name.startswith(("teacher.", "rows.", "data.")))
    facts = {
        name: f"there {_json(differences[name][0])}, here {_json(differences[name][1])}" for name in order[:MAX_TOLD]
    }
    return facts | ({"also": f"{len(order) - MAX_TOLD} more"} if len(order) > MAX_TOLD else {})


def _walked(value: Any) -> dict[Any, Any] | None:
    """The value as a mapping, if it is a mapping or a list."""
    if not isinstance(value, list):
        return value if isinstance(value, dict) else None
    if all(isinstance(each, dict) and "name" in each for each in value):
        return {each["name"]: each for each in value}
    return dict(enumerate(value))


def _json(value: Any) -> str:
    """A value for a message; of a long list or mapping, its beginning."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{text[:80]} ..." if len(text) > 80 and not isinstance(value, str) else text
