"""Nested settings as one level of dotted names, and their differences."""

from collections.abc import Mapping, Sequence
from typing import Any


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(a: Mapping[str, Any], b: Mapping[str, Any], leave_out: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Name -> the values of A and B; None if one of them lacks the name.

    Args:
        leave_out: beginnings of names that do not count.
    """
    names = [*a, *(name for name in b if name not in a)]
    return {
        name: [a.get(name), b.get(name)]
        for name in names
        if a.get(name) != b.get(name) and not name.startswith(tuple(leave_out))
    }
