"""`distillcache prepare`: turn text into packed rows. Arguments after a bare `--` make it a Beam pipeline."""

import json
import sys
from collections.abc import Sequence

from distillcache.cache_builder.prepare import prepare_rows
from distillcache.models.checkpoint import read_config
from distillcache.models.layers.rope import context_length
from distillcache.schemas import command_line
from distillcache.schemas.config import PrepareConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DistillcacheError, InputError, install_advice
from distillcache.schemas.format.rows import SKIPPED_KEY, RowReader, RowsIndex, no_targets_note, too_long_for_teacher
from distillcache.schemas.store.store import Store


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Prepare the rows that the command line describes, and print a summary."""
    words, beam_options = _split(argv)
    config = command_line.parse(PrepareConfig, words, command)
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
    without, too_long = RowReader(Store(config.out)).without_targets(), _too_long(config.data.tokenizer, index)
    if as_json:
        print(json.dumps(summary | ({"without_targets": without} if without else {})))
    else:
        print(_said(config.out, index), file=sys.stderr)
        if index.skipped:
            skipped = f"{counted(index.skipped, 'record')} skipped"
            print(f"{skipped}, listed in {config.out}/{SKIPPED_KEY}", file=sys.stderr)
    for said in [*([no_targets_note(without)] if without else []), *([too_long] if too_long else [])]:
        print(f"warning: {said}", file=sys.stderr)


def _said(out: str, index: RowsIndex) -> str:
    """`rows in r: 40 rows of 1,024 tokens (8 held out) from 26 documents, 40,211 tokens without padding`."""
    size = f"{counted(index.rows, 'row')} of {counted(index.row_tokens, 'token')}"
    text = f"{counted(index.documents, 'document')}, {counted(index.tokens, 'token')} without padding"
    return f"rows in {out}: {size} ({len(index.eval_indices):,} held out) from {text}"


def _too_long(path: str | None, index: RowsIndex) -> str | None:
    """A line about rows that are longer than what the teacher is made for, if the tokenizer is that of a checkpoint."""
    if path is None or path.endswith(".json"):
        return None
    try:
        model = read_config(path)
    except DistillcacheError:  # a tokenizer without a model, or one that no build could use and will name
        return None
    return too_long_for_teacher(index.row_tokens, context_length(model))


def _split(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Our words, and Beam's: None without a bare `--`."""
    words = list(argv)
    if "--" not in words:
        return words, None
    place = words.index("--")
    return words[:place], words[place + 1 :]


def _with_beam(config: PrepareConfig, options: Sequence[str]) -> RowsIndex:
    try:
        from distillcache.cache_builder.text.beam import prepare_with_beam
    except ImportError as error:
        raise InputError("a library for pipelines is missing", {"cause": error}, install_advice("beam")) from error
    return prepare_with_beam(config, options)
