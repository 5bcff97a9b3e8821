"""`distillcache copy SRC DST`: copy a cache to other codecs, rows, blocks or taps, or to another path."""

import json
import sys
from collections.abc import Sequence

from distillcache.cache_builder.grow.copy import copy_cache
from distillcache.schemas import command_line
from distillcache.schemas.config import CopyConfig
from distillcache.schemas.counted import counted


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Copy, and print a summary."""
    config = command_line.parse(CopyConfig, argv, command, positional=("src", "dst"))
    manifest = copy_cache(config)
    if as_json:
        print(json.dumps({"src": config.src, "dst": config.dst, "rows": manifest.rows, "tokens": manifest.tokens}))
    else:
        print(
            f"copy {config.dst}: {counted(manifest.rows, 'row')}, {manifest.tokens:,} tokens, finished",
            file=sys.stderr,
        )
        print(f"look at it: distillcache inspect {config.dst}", file=sys.stderr)
