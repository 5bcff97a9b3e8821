"""`distillcache stats`: distributions of a cache's numbers by tap, slot and dimension, over a sample of rows.

Sums run over the rows one slot at a time; what stays in memory is a few numbers a dimension, and of every slot a
sample of tokens for the effective rank.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.markup import escape
from rich.table import Table

from distillcache.schemas import command_line
from distillcache.schemas.cache.describe import numbers_in_runs
from distillcache.schemas.config.look import StatsConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError, InputError
from distillcache.schemas.format.manifest import TOPK_LOGITS
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.store.store import using
from distillcache.schemas.store.whole_file import refuse_foreign_file, write_file
from distillcache.tools.look.inspect_warnings import repeated_slots
from distillcache.tools.look.sample_checks import SampleChecks
from distillcache.tools.look.stored_rows import StoredRows, lengths
from distillcache.tools.pages.terminal import table_console

OUTLIER = 6.0  # times the median dimension's rms
RANK_TOKENS = 256  # of a slot, for its effective rank: what this many can tell apart
RANK_BYTES = 256 << 20  # of all slots' samples together
TINY = 1e-30
MARK = (b".slots.npy", b".abs_max.npy", b".kurtosis.npy")  # names of arrays in the file of --out


@dataclass
class SlotStats:
    """Sums over the real tokens of one slot, by dimension, float64 `[D]`.

    cosines: of tokens' vectors with theirs in the next slot, over compared tokens.
    """

    count: int = 0
    total: Any = 0.0
    square: Any = 0.0
    fourth: Any = 0.0
    largest: Any = 0.0
    nonfinite: int = 0
    cosines: float = 0.0
    compared: int = 0
    sample: list[Float[np.ndarray, "t D"]] = field(default_factory=list)

    def add(self, values: Float[np.ndarray, "t D"], sampled: int) -> None:
        """More tokens; `sampled` of them, evenly drawn, are kept."""
        finite = np.isfinite(values)
        self.nonfinite += int(np.count_nonzero(~finite))
        wide = np.where(finite, values, 0).astype(np.float64)
        squares = np.square(wide)
        self.count += len(wide)
        self.total = self.total + wide.sum(0)
        self.square = self.square + squares.sum(0)
        self.fourth = self.fourth + np.square(squares).sum(0)
        self.largest = np.maximum(self.largest, np.abs(wide).max(0, initial=0))
        places = np.linspace(0, len(wide) - 1, min(sampled, len(wide))).round().astype(int)
        self.sample.append(wide[np.unique(places)].astype(np.float32))

    def compare(self, values: Float[np.ndarray, "t D"], after: Float[np.ndarray, "t D"]) -> None:
        """The same tokens here and in the next slot; those with a vector of zeros, or not finite, do not count."""
        norms = lengths(values) * lengths(after)
        counts = np.isfinite(norms) & (norms > 0)
        products = np.einsum("td,td->t", values[counts].astype(np.float64), after[counts])
        self.cosines += float(np.sum(products / norms[counts]))
        self.compared += int(np.count_nonzero(counts))

    @property
    def rms(self) -> Float[np.ndarray, " D"]:
        return np.sqrt(self.square / max(self.count, 1))

    @property
    def kurtosis(self) -> Float[np.ndarray, " D"]:
        """E[x^4] / E[x^2]^2 of every dimension: 3 for normal numbers."""
        return self.fourth * self.count / np.maximum(np.square(self.square), TINY)

    def effective_rank(self) -> float:
        """exp of the entropy of the sample's variances along its principal axes. Source: Roy and Vetterli, 2007."""
        tokens = np.concatenate(self.sample).astype(np.float64)
        centred = tokens - tokens.mean(0)
        # Of the smaller product: a tenth of the time that singular values take, and tiny ones do not count.
        gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
        variances = np.maximum(np.linalg.eigvalsh(gram), 0.0)
        if variances.sum() <= TINY:
            return 0.0
        shares = variances / variances.sum()
        return float(np.exp(-(shares * np.log(np.maximum(shares, TINY))).sum()))

    def describe(self) -> dict[str, Any]:
        """Figures as plain values; None where they are undefined: of no token, or (kurtosis) of zeros alone."""
        if not self.count:
            figures = dict.fromkeys(("rms", "abs_max", "kurtosis", "dead_dimensions", "cosine_to_next"))
            rest = {"outlier_dimensions": [], "effective_rank": None, "rank_tokens": 0, "nonfinite": 0}
            return {**figures, **rest}
        rms = self.rms
        median = max(float(np.median(rms)), TINY)
        outliers = [int(at) for at in np.argsort(-rms) if rms[at] > OUTLIER * median]
        squares = float(self.square.sum()) ** 2
        return {
            "rms": float(np.sqrt(np.mean(np.square(rms)))),
            "abs_max": float(self.largest.max()),
            "kurtosis": float(self.fourth.sum() * self.count * len(rms) / squares) if squares > TINY else None,
            "dead_dimensions": int(np.count_nonzero(rms == 0)),
            "outlier_dimensions": [[at, float(rms[at] / median)] for at in outliers],
            "cosine_to_next": self.cosines / self.compared if self.compared else None,
            "effective_rank": self.effective_rank(),
            "rank_tokens": sum(map(len, self.sample)),
            "nonfinite": self.nonfinite,
        }


def run(argv: Sequence[str], command: str, as_json: bool) -> int:
    """Print the statistics as a table or as one JSON object; the exit code: 2 where a row could not be read."""
    config = command_line.parse(StatsConfig, argv, command, positional=("cache",))
    with using(config.storage):
        if config.out is not None:
            refuse_foreign_file(config.out, "--out", MARK)
        rows = StoredRows(config.cache)
        numbers = rows.sample(config.rows, config.seed)
        if not numbers:
            facts = {"cache": rows.store.url}
            raise InputError(
                "no row of the cache is committed yet", facts, "try again when the first shards are committed"
            )
        checks = SampleChecks.of(rows.store, rows.plan)
        numbers, slots, damaged = measure(rows, numbers, config.taps, config.blocks, checks)
        found = describe(rows, numbers, slots)
        found["warnings"] = [*damaged, *_broken(found["slots"]), *_repeated(slots), *checks.findings()]
        if config.out is not None:
            write_dimensions(config.out, slots)
    if as_json:
        print(json.dumps(found))
    else:
        _print(found)
        if config.out is not None:
            print(f"the figures of every dimension are written to {config.out}")
    return 2 if damaged else 0


def measure(
    rows: StoredRows,
    numbers: Sequence[int],
    taps: Sequence[str] | None,
    slots: Sequence[int] | None,
    checks: SampleChecks,
) -> tuple[list[int], dict[tuple[str, int], SlotStats], list[str]]:
    """The rows that were read, the sums of every (tap, slot) in block order, and the damage.

    Args:
        numbers: of committed rows, at least one.
        checks: is given all that is read.

    Raises:
        DamageError: no row could be read.
        InputError: there is no such tap or slot.
    """
    names = rows.tap_names(numbers[0])
    wanted = [name for name in names if name != TOPK_LOGITS] if taps is None else list(taps)
    if not set(wanted) <= set(names):
        raise InputError(
            "the cache lacks statistics for these taps",
            {"cache": rows.store.url, "wanted": wanted, "found": names},
            "choose recorded taps",
        )
    found, damaged = _read(rows, numbers, wanted, slots, checks)
    if damaged and len(damaged) == len(numbers):
        raise next(iter(damaged.values()))
    whole = [number for number in numbers if number not in damaged]
    if not found:
        raise InputError("the cache lacks these blocks", {"cache": rows.store.url, "wanted": slots})
    order = {name: place for place, name in enumerate(wanted)}
    in_order = dict(sorted(found.items(), key=lambda pair: (order[pair[0][0]], pair[0][1])))
    return whole, in_order, list(_told(damaged))


def _read(
    rows: StoredRows, numbers: Sequence[int], taps: Sequence[str], slots: Sequence[int] | None, checks: SampleChecks
) -> tuple[dict[tuple[str, int], SlotStats], dict[int, DamageError]]:
    """The sums over these rows, and what is wrong with those that are damaged."""
    found: dict[tuple[str, int], SlotStats] = {}
    damaged: dict[int, DamageError] = {}
    hidden = rows.plan.teacher.hidden_size
    places = max(sum(len(stored.tap.slots) for stored in rows.taps(numbers[0])), 1)
    sampled = -(-max(min(RANK_TOKENS, RANK_BYTES // (4 * hidden * places)), 2) // len(numbers))
    with Progress("stats", len(numbers), unit="rows") as bar:
        for number in numbers:
            bar.advance()
            try:
                row = rows.row(number)
                checks.row(number, rows.shard(number), row)
                for name in taps:
                    before: tuple[int, np.ndarray] | None = None
                    for slot, values in rows.slots(number, name, slots):
                        real = values[row.segment_ids > 0]
                        found.setdefault((name, slot), SlotStats()).add(real, sampled)
                        checks.slot(name, slot, values)
                        if before is not None and before[0] == slot - 1:
                            found[name, slot - 1].compare(before[1], real)
                        before = (slot, real)
            except DamageError as error:
                damaged[number] = error
    return found, damaged


def _broken(slots: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for every tap with numbers that are not finite."""
    for tap in dict.fromkeys(each["tap"] for each in slots):
        broken = {each["slot"]: each["nonfinite"] for each in slots if each["tap"] == tap and each["nonfinite"]}
        if broken:
            count = counted(sum(broken.values()), "number")
            yield f"{tap}: {count} not finite, in slots {numbers_in_runs(list(broken))}"


def _repeated(slots: Mapping[tuple[str, int], SlotStats]) -> Iterator[str]:
    """A line for slots whose sums by dimension are equal to the bit."""
    for tap in dict.fromkeys(tap for tap, _ in slots):
        sums = {
            slot: (stats.square.tobytes(), stats.total.tobytes(), stats.largest.tobytes())
            for (name, slot), stats in slots.items()
            if name == tap and np.any(stats.square)
        }
        yield from repeated_slots(tap, sums)


def _told(damaged: Mapping[int, DamageError]) -> Iterator[str]:
    """A line for every damaged file, with the rows that were left out for it."""
    by_file: dict[tuple[str, str, str], list[int]] = {}
    for number, error in damaged.items():
        by_file.setdefault((str(error.facts.get("file", "")), error.what, error.next or ""), []).append(number)
    for (file, what, advice), numbers in by_file.items():
        yield f"{what}: {file}; rows {numbers} are left out. {advice[:1].upper()}{advice[1:]}"


def describe(rows: StoredRows, numbers: Sequence[int], slots: dict[tuple[str, int], SlotStats]) -> dict[str, Any]:
    """As plain values."""
    return {
        "cache": rows.store.url,
        "rows": list(numbers),
        "tokens": max(stats.count for stats in slots.values()),
        "slots": [{"tap": tap, "slot": slot, **stats.describe()} for (tap, slot), stats in slots.items()],
    }


def write_dimensions(path: str, slots: dict[tuple[str, int], SlotStats]) -> None:
    """An npz of `<tap>.rms`, `.mean`, `.abs_max`, `.kurtosis`, float32 `[S, D]`, and `<tap>.slots`."""
    arrays: dict[str, np.ndarray] = {}
    for tap in dict.fromkeys(tap for tap, _ in slots):
        of_tap = {slot: stats for (name, slot), stats in slots.items() if name == tap}
        arrays[f"{tap}.slots"] = np.asarray(list(of_tap))
        figures = {
            "rms": [stats.rms for stats in of_tap.values()],
            "mean": [stats.total / max(stats.count, 1) for stats in of_tap.values()],
            "abs_max": [stats.largest for stats in of_tap.values()],
            "kurtosis": [stats.kurtosis for stats in of_tap.values()],
        }
        arrays |= {f"{tap}.{name}": np.stack(values).astype(np.float32) for name, values in figures.items()}
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type] - names, not options
    write_file(path, data.getvalue(), says=True)


def _print(found: dict[str, Any]) -> None:
    console = table_console()
    console.print(f"{counted(len(found['rows']), 'row')}, {found['tokens']:,} tokens of {found['cache']}", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tap", "slot", "rms", "max", "kurtosis", "rank", "to next", "outlier dimensions"):
        table.add_column(column, justify="left" if column in ("tap", "outlier dimensions") else "right")
    for each in found["slots"]:
        outliers = each["outlier_dimensions"]
        words = ", ".join(f"{at} ({times:.3g})" for at, times in outliers[:3])
        words += f" and {len(outliers) - 3} more" if len(outliers) > 3 else ""
        notes = [words, f"[red]{each['nonfinite']} not finite[/]" if each["nonfinite"] else ""]
        notes.append(f"{each['dead_dimensions']} dead dimensions" if each["dead_dimensions"] else "")
        figures = ["-" if each[key] is None else f"{each[key]:.3g}" for key in ("rms", "abs_max", "kurtosis")]
        rank = "-" if each["effective_rank"] is None else f"{each['effective_rank']:.0f}"
        alike = "" if each["cosine_to_next"] is None else f"{each['cosine_to_next']:.3f}"
        table.add_row(each["tap"], str(each["slot"]), *figures, rank, alike, "; ".join(filter(None, notes)))
    console.print(table)
    tokens = found["slots"][0]["rank_tokens"]
    console.print("outlier dimensions: number (rms as a multiple of the median dimension's)")
    console.print(f"rank: the effective rank of {tokens} sampled tokens; it cannot exceed that number")
    console.print("to next: the mean cosine with the next slot; near 1 for resid if a block changes the stream little")
    for warning in found["warnings"]:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
