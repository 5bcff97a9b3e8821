"""`distillcache export-samples`: some rows with their decoded taps in one file, for notebooks and other programs.

Arrays: `row` `[B]`, `tokens`, `positions`, `segment_ids`, `loss_mask` `[B, T]`, and of every tap float32 `[S, B, T, D]`
with its `<tap>.slots`; of `topk_logits` the values.
"""

import io
import json
import sys
from collections.abc import Sequence

import numpy as np
import safetensors.numpy

from distillcache.schemas import command_line
from distillcache.schemas.cache.addressing import slots_of
from distillcache.schemas.config.look import ExportSamplesConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import ConfigError, InputError
from distillcache.schemas.store.store import using
from distillcache.schemas.store.whole_file import refuse_foreign_file, write_file
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.trainer.feed.source import stack_rows

MIB = 1 << 20
# Of a file that this command made: arrays of others are called row, too (a sparse matrix of scipy).
MARKS = ((b"row.npy", b"segment_ids.npy", b"loss_mask.npy"), (b'"row":', b'"segment_ids":', b'"loss_mask":'))


def run(argv: Sequence[str], command: str, as_json: bool) -> None:
    """Write the file, and print a summary."""
    config = command_line.parse(ExportSamplesConfig, argv, command, positional=("cache", "out"))
    with using(config.storage):
        refuse_foreign_file(config.out, "out", *MARKS)
        rows = StoredRows(config.cache)
        numbers = config.rows if config.rows is not None else rows.sample(config.count, config.seed)
        arrays = samples(rows, numbers, config.taps, config.blocks, config.max_mib)
        write(config.out, arrays)
    found = {name: list(values.shape) for name, values in arrays.items()}
    if as_json:
        print(json.dumps({"cache": config.cache, "out": config.out, "rows": list(numbers), "arrays": found}))
        return
    for name, shape in found.items():
        print(f"{name:20} {arrays[name].dtype} {shape}")
    print(f"{config.out} holds {counted(len(numbers), 'row')}", file=sys.stderr)


def samples(
    rows: StoredRows, numbers: Sequence[int], taps: Sequence[str] | None, blocks: Sequence[int] | None, max_mib: int
) -> dict[str, np.ndarray]:
    """The arrays.

    Args:
        blocks: of `resid`, what enters and what leaves them.

    Raises:
        InputError: there is no such row, tap or block, or not yet.
        ConfigError: the file would be larger than `max_mib`.
    """
    missing = [number for number in numbers if not rows.committed(number)]
    if missing or not numbers:
        raise InputError(
            "these rows are not committed yet" if missing else "there are no rows to export",
            {"cache": rows.store.url, "rows": missing[:8]},
            "choose others, or wait",
        )
    batch = stack_rows([rows.row(number) for number in numbers], rows.plan.rows.row_tokens)
    arrays = {"row": np.asarray(numbers, np.int64), **batch}
    names = rows.tap_names(numbers[0]) if taps is None else taps
    slots = {name: _slots(rows, numbers[0], name, blocks) for name in names}
    tokens, hidden = len(numbers) * rows.plan.rows.row_tokens, rows.plan.teacher.hidden_size
    mib = 4 * tokens * hidden * sum(map(len, slots.values())) // MIB
    if mib > max_mib:
        raise ConfigError(
            "the samples are too large for one file",
            {"--max-mib": max_mib, "found": f"about {mib} MiB"},
            "take fewer rows, taps or blocks, or raise --max-mib",
        )
    for name, wanted in slots.items():
        arrays[f"{name}.slots"] = np.asarray(wanted, np.int64)
        found = [dict(rows.slots(number, name, wanted)) for number in numbers]
        arrays[name] = np.stack([np.stack([each[slot] for each in found]) for slot in wanted])
    return arrays


def _slots(rows: StoredRows, number: int, name: str, blocks: Sequence[int] | None) -> list[int]:
    stored = sorted({slot for each in rows.taps(number) if each.tap.name == name for slot in each.tap.slots})
    wanted = sorted(slots_of(name, blocks)) if blocks is not None else stored
    if not stored or not set(wanted) <= set(stored):
        facts = {"cache": rows.store.url, "tap": name, "wanted": wanted, "stored": stored}
        raise InputError("the cache lacks this tap or these blocks", facts, "choose others")
    return wanted


def write(path: str, arrays: dict[str, np.ndarray]) -> None:
    """As the suffix says."""
    if path.endswith(".safetensors"):
        data = safetensors.numpy.save({name: np.ascontiguousarray(values) for name, values in arrays.items()})
    else:
        file = io.BytesIO()
        np.savez(file, **arrays)  # type: ignore[arg-type] - names, not options
        data = file.getvalue()
    write_file(path, data, says=True)
