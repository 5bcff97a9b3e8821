"""The metadata of picture files, by which a command knows its own again."""

from typing import Any

MADE_BY = "distillcache"
# By suffix, as matplotlib wants them; no dates: the same numbers are the same file.
METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": MADE_BY}, "png": {"Software": MADE_BY}}
