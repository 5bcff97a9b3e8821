"""`distillcache prepare`: text to packed rows. What stands behind a bare `--` makes it a Beam pipeline."""

import json
import sys
from collections.abc import Sequence

from cache_builder.prepare import prepare_rows
from schemas import settings
from schemas.config import PrepareConfig
from schemas.errors import InputError, install_advice
from schemas.rows import SKIPPED_KEY, RowReader, RowsIndex, no_targets_note
from schemas.storage import Store


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Prepare the rows that the command line describes, and say what they are."""
    words, beam_options = _split(argv)
    config = settings.parse(PrepareConfig, words, command)
    index = prepare_rows(config) if beam_options is None else _with_beam(config, beam_options)
    summary = {
        "out": config.out,
        "documents": index.documents,
        "rows": index.rows,
        "eval_rows": len(index.eval_indices),
        "row_tokens": index.row_tokens,
        "tokens": index.tokens,
    }
    if index.skipped:
        summary["skipped"] = index.skipped
    without = RowReader(Store(config.out)).without_targets()
    if as_json:
        print(json.dumps(summary | ({"without_targets": without} if without else {})))
    else:
        text = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in summary.items() if name != "out")
        print(f"rows in {config.out}: {text}", file=sys.stderr)
        if index.skipped:
            print(f"what was skipped: {config.out}/{SKIPPED_KEY}", file=sys.stderr)
    if without:
        print(f"warning: {no_targets_note(without)}", file=sys.stderr)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Our words, and Beam's: None without a bare `--`."""
    words = list(argv)
    if "--" not in words:
        return words, None
    place = words.index("--")
    return words[:place], words[place + 1 :]


def _with_beam(config: PrepareConfig, options: Sequence[str]) -> RowsIndex:
    try:
        from cache_builder.beam import prepare_with_beam
    except ImportError as error:
        raise InputError(
            "a library is missing that runs pipelines", {"cause": error}, install_advice("beam")
        ) from error
    return prepare_with_beam(config, options)
