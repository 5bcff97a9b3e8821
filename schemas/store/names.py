"""Local paths that cannot be asked for: refused where they come in, since every later question would raise."""

import os

from distillcache.schemas.base import LONGEST_NAME
from distillcache.schemas.errors import ConfigError, StorageError

LONGEST_PATH = 4095  # bytes, Linux' PATH_MAX


def is_possible_path(path: str) -> bool:
    """Return whether a file system can have this path."""
    try:
        data = os.fsencode(path)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON and YAML can spell
        return False
    return b"\0" not in data and len(data) <= LONGEST_PATH and max(map(len, data.split(b"/"))) <= LONGEST_NAME


def refuse_unusable_path(path: str) -> None:
    """Raise unless a local path could exist and its folders may be entered; it need not exist.

    Raises:
        ConfigError: no file system can have it.
        StorageError: a folder on the way may not be entered.
    """
    if not is_possible_path(path):
        shown = path if len(path) <= 80 else f"{path[:60]} ... {path[-16:]}"
        raise ConfigError(
            "no file system has such a path",
            {"path": repr(shown), "expected": f"names of {LONGEST_NAME} bytes at most, no NUL"},
            "check the path",
        )
    refuse_locked_path(path)


def refuse_other_encoding(path: str) -> None:
    """Raise `ConfigError` for an absolute path that is not UTF-8, as its working directory may make it: TensorStore
    takes no such name, and answers in words of its C++ binding."""
    if any("\ud800" <= letter <= "\udfff" for letter in path):
        shown = path.encode("utf-8", "backslashreplace").decode()
        raise ConfigError("a path is not UTF-8", {"path": shown}, "use a folder and a working directory named in UTF-8")


def refuse_locked_path(path: str) -> None:
    """Raise `StorageError` where a folder on the way to a local path may not be entered."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise StorageError(
            "a folder on the way to this path may not be entered",
            {"path": path, "cause": error},
            "run as a user who may, ask its owner, or name another place",
        ) from error
    except (OSError, ValueError):  # whoever uses the path finds out what is there
        return
