"""`distillcache prepare`: text to packed rows."""

import json
import sys
from collections.abc import Sequence

from cache_builder.prepare import prepare_rows
from schemas import settings
from schemas.config import PrepareConfig


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Prepare the rows that the command line describes, and say what they are."""
    config = settings.parse(PrepareConfig, argv, command)
    index = prepare_rows(config)
    summary = {
        "out": config.out,
        "documents": index.documents,
        "rows": index.rows,
        "eval_rows": len(index.eval_indices),
        "row_tokens": index.row_tokens,
        "tokens": index.tokens,
    }
    if as_json:
        print(json.dumps(summary))
    else:
        text = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in summary.items() if name != "out")
        print(f"rows in {config.out}: {text}", file=sys.stderr)
