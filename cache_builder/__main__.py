"""`python -m cache_builder` is `distillcache build`: stage 1 of the batch job."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from cache_builder.build import build_cache
from schemas import settings
from schemas.config import BuildConfig
from schemas.errors import DistillcacheError


def build(argv: Sequence[str], command: str = "distillcache build", as_json: bool = False) -> None:
    """Build the cache that the command line describes, and say what it holds."""
    config = settings.parse(BuildConfig, argv, command, complete=_complete)
    manifest = build_cache(config)
    summary = {"cache": config.cache, "rows": manifest.rows, "tokens": manifest.tokens}
    if as_json:
        print(json.dumps(summary))
    else:
        print(f"cache {config.cache}: {manifest.rows} rows, {manifest.tokens} tokens, finished", file=sys.stderr)
        print(f"look at it: distillcache inspect {config.cache}", file=sys.stderr)


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    """A repair finds in the cache what the command line leaves out."""
    if not values.get("repair"):
        return values
    from cache_builder.repair import complete_config

    return complete_config(values)


def main() -> int:
    """Exit code: 0, 2 for a mistake of the user's, 143 when asked to stop."""
    argv = sys.argv[1:]
    try:
        build([word for word in argv if word != "--json"], "python -m cache_builder", "--json" in argv)
    except settings.HelpRequested as text:
        print(text)
    except DistillcacheError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
