"""Names that no file system takes: refused where a path comes in, since asking the system for one raises."""

import os

from distillcache.schemas.base import LONGEST_NAME
from distillcache.schemas.errors import ConfigError

LONGEST_PATH = 4095  # bytes, Linux' PATH_MAX


def is_possible_path(path: str) -> bool:
    """Return whether a file system can have this path."""
    try:
        data = os.fsencode(path)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON and YAML can spell
        return False
    return b"\0" not in data and len(data) <= LONGEST_PATH and max(map(len, data.split(b"/"))) <= LONGEST_NAME


def refuse_impossible_path(path: str) -> None:
    """Raise `ConfigError` for a local path that no file system can have."""
    if not is_possible_path(path):
        shown = path if len(path) <= 80 else f"{path[:60]} ... {path[-16:]}"
        raise ConfigError(
            "no file system has such a path",
            {"path": repr(shown), "expected": f"names of {LONGEST_NAME} bytes at most, no NUL"},
            "check the path",
        )
