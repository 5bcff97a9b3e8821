"""A cache in words, as `repr` gives it and a notebook shows it; known from plans and receipts alone."""

from collections.abc import Sequence
from html import escape

from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.counted import counted
from distillcache.schemas.format.manifest import Plan, TapPlan
from distillcache.schemas.store.redaction import redacted

Facts = list[tuple[str, str]]  # (what, words)


def describe_codec(tap: TapPlan) -> str:
    """`int8, groups of 32, rotated, delta, keyframes every 8, zstd`."""
    words = [tap.codec]
    if tap.k is not None:
        words.append(f"the largest {tap.k}" + (f" of {tap.vocab_size:,} ids" if tap.vocab_size else ""))
    if tap.group is not None:
        words.append(f"groups of {tap.group}" if tap.group else "one group")
    if tap.rotate:
        words.append("rotated")
    if tap.delta:
        words.append(f"delta, keyframes every {tap.keyframe_every}" if tap.keyframe_every else "delta")
    if tap.compress != "none":
        words.append(tap.compress)
    return ", ".join(words)


def numbers_in_runs(numbers: Sequence[int]) -> str:
    """`0 to 3, 7, 9 to 11`, of ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first} to {last}" for first, last in runs[:6]]
    return ", ".join(shown) + (f" and {len(runs) - 6} more runs" if len(runs) > 6 else "")


def in_bytes(count: int) -> str:
    """A size for people: 3.20 GB, 108 MB."""
    if count >= 1e9:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"


def layers_words(blocks: int, hidden_size: int) -> str:
    """`32 blocks, hidden size 4,096`."""
    return f"{counted(blocks, 'block')}, hidden size {hidden_size:,}"


def teacher_words(plan: Plan) -> str:
    """The teacher's name and compute dtype."""
    teacher = plan.teacher
    return (
        f"{redacted(teacher.path)}, {layers_words(teacher.num_blocks, teacher.hidden_size)}, "
        f"in {plan.numerics.dtype}, "
        f"weights {teacher.weights_digest[:12]}"
    )


def segment_words(segments: Sequence[Segment]) -> Facts:
    """Describe every segment: its rows, taps, bytes before compression, and progress."""
    found = []
    for segment in segments:
        plan = segment.plan
        rows = counted(plan.rows.count, "row") if plan.rows_of is None else f"more of the rows of {plan.rows_of}"
        taps = ", ".join(tap.name for tap in plan.taps)
        state = "finished"
        if segment.committed is not None:
            state = f"{len(segment.committed):,} of {counted(plan.num_shards, 'shard')} committed"
        size = in_bytes(plan.bytes_per_row * plan.rows.count)
        found.append((f"segment {plan.segment}", f"{rows}, {taps}, {size}, {state}"))
    return found


def as_text(title: str, facts: Facts) -> str:
    """One line a fact, below the title."""
    width = max(map(len, (what for what, _ in facts)), default=0)
    return "\n".join([title, *(f"  {what.ljust(width)}  {words}" for what, words in facts)])


def as_html(title: str, facts: Facts) -> str:
    """A table without styles of its own: the notebook's theme decides."""
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(what)}</th><td style="text-align:left">{escape(words)}</td></tr>'
        for what, words in facts
    )
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"
