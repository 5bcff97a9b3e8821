"""`python -m distillcache.cache_builder` is `distillcache build`: stage 1 of the batch job."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.record.replica import is_job
from distillcache.schemas import command_line
from distillcache.schemas.config import BuildConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.runtime.supervise import is_supervised, supervise


def build(argv: Sequence[str], command: str = "distillcache build", as_json: bool = False) -> int:
    """Build the cache that the command line describes, and print a summary. Where processes work in lockstep, a
    child of this one builds."""
    config = command_line.parse(BuildConfig, argv, command, complete=_complete)
    if is_job(config) and not is_supervised():
        return supervise("cache_builder", [*argv, *(["--json"] if as_json else [])])
    manifest = build_cache(config)
    if is_job(config) and jax.process_index():  # the first process says it for all
        return 0
    summary = {"cache": config.cache, "rows": manifest.rows, "tokens": manifest.tokens}
    if as_json:
        print(json.dumps(summary))
    else:
        print(
            f"cache {config.cache}: {counted(manifest.rows, 'row')}, {manifest.tokens:,} tokens, finished",
            file=sys.stderr,
        )
        print(f"look at it: distillcache inspect {config.cache}", file=sys.stderr)
    return 0


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    """A repair finds in the cache what the command line leaves out."""
    if not values.get("repair"):
        return values
    from distillcache.cache_builder.repair.from_teacher import complete_config

    return complete_config(values)


def main() -> int:
    """Exit code: 0, 2 for a mistake of the user's, 143 when asked to stop."""
    argv = sys.argv[1:]
    words = [word for word in argv if word != "--json"]
    return command_line.answer(lambda: build(words, "python -m distillcache.cache_builder", "--json" in argv))


if __name__ == "__main__":
    sys.exit(main())
