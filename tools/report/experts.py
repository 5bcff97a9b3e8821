"""A report's section about experts: how evenly they are loaded, over time and at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distillcache.schemas.counted import counted
from distillcache.tools.pages.figures import Figure, HeatMap, Line, draw_lines, draw_maps
from distillcache.tools.pages.html import figures, folded, number, paragraph, table
from distillcache.tools.report.curves import BlockCurves, block_curves, step_map

BLOCKS_SHOWN = 6  # by expert and step; the others are in the figures over all blocks
SKEWED = 1.0  # max violation: the fullest expert has twice the mean


def expert_warnings(loads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Experts without tokens, and blocks whose max violation is above 1, at the last look."""
    if not loads:
        return []
    last, told = loads[-1], []
    values = dict(zip(last["blocks"], _loads(last), strict=True))
    idle = {block: int((load == 0).sum()) for block, load in values.items() if load.any() and not load.all()}
    skewed = {block: float(load.max()) for block, load in values.items() if load.max() - 1 > SKEWED}
    if idle:
        count = sum(idle.values())
        words = f"{counted(count, 'expert')} had"
        told.append(f"{words} no token at step {last['step']:,}: blocks {', '.join(map(str, idle))}.")
    if skewed:
        worst = max(skewed, key=lambda block: skewed[block])
        told.append(
            f"In {len(skewed)} of {counted(len(values), 'block')} the max violation is above {SKEWED:g}; "
            f"expert {int(values[worst].argmax())} of block {worst} had {skewed[worst]:.3g} times its own."
        )
    return told


def expert_fragments(lines: Sequence[Mapping[str, Any]], loads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Nothing of a student without experts."""
    violation, entropy = block_curves(lines, "router/max_violation_"), block_curves(lines, "router/entropy_")
    if violation is None and not loads:
        return []
    drawn = [
        _router_figure(
            violation, "Max violation", "The fullest expert's load divided by the mean, minus one: 0 is balanced"
        ),
        _router_figure(entropy, "Router entropy", "Entropy of a token's probabilities, in nats"),
    ]
    if not loads:
        return [figures(drawn)]
    words = "Load is an expert's share of the tokens times the number of experts: 1 is balanced."
    of_blocks = [_block_figure(loads, place) for place in _chosen(len(loads[-1]["blocks"]))]
    return [paragraph(words), figures([*drawn, _last_figure(loads), *of_blocks]), _table(loads)]


def _router_figure(found: BlockCurves | None, title: str, unit: str) -> Figure | None:
    if found is None:
        return None
    first, last = _mean(found.values[:, 0]), _mean(found.values[:, -1])
    words = f"mean over blocks {first:.4g} at first, {last:.4g} at last"
    if len(found.blocks) <= 4:
        lines = [Line(f"block {b}", found.step, v) for b, v in zip(found.blocks, found.values, strict=True)]
        svg = draw_lines(lines, "step", title.lower())
    else:
        svg = draw_maps([step_map(found, title.lower(), log=False)], 2.6)
    return Figure(title, f"{unit}; {words}.", f"{title} by block and step: {words}.", svg)


def _last_figure(loads: Sequence[Mapping[str, Any]]) -> Figure:
    last = loads[-1]
    values = _loads(last)
    words = f"from {values.min():.3g} to {values.max():.3g}"
    grid = HeatMap(values, "", "expert", "block", "load", row_labels=last["blocks"])
    return Figure(
        title="Final load of the experts",
        caption=f"At step {last['step']:,}, {words}.",
        alt=f"Heat map of the load by block and expert at step {last['step']:,}, {words}.",
        svg=draw_maps([grid], 2.4),
    )


def _block_figure(loads: Sequence[Mapping[str, Any]], place: int) -> Figure:
    """One block's experts over time; a line's place is that of the look, steps between looks may differ."""
    block = loads[-1]["blocks"][place]
    looks = [line for line in loads if block in line["blocks"]]
    values = np.stack([_loads(line)[line["blocks"].index(block)] for line in looks], axis=1)
    steps = [line["step"] for line in looks]
    words = f"{len(looks)} looks from step {steps[0]:,} to {steps[-1]:,}, load {values.min():.3g} to {values.max():.3g}"
    title = f"Load over time, block {block}"
    if len(values) <= 4:
        lines = [Line(f"expert {e}", np.asarray(steps, float), row) for e, row in enumerate(values)]
        svg = draw_lines(lines, "step", "load", points=len(steps) < 2)
    else:
        svg = draw_maps([HeatMap(values, "", f"look (steps {steps[0]:,} to {steps[-1]:,})", "expert", "load")], 2.6)
    return Figure(title, f"{words}.", f"Load of block {block}'s experts over time: {words}.", svg)


def _table(loads: Sequence[Mapping[str, Any]]) -> str:
    first, last = loads[0], loads[-1]
    before = dict(zip(first["blocks"], _loads(first), strict=True))
    rows = []
    for block, now in zip(last["blocks"], _loads(last), strict=True):
        start = before.get(block)
        rows.append(
            (
                str(block),
                number(float(start.max()) if start is not None and start.any() else None),
                *(
                    map(number, (float(now.max()), float(now.min()), int((now == 0).sum())))
                    if now.any()  # its experts ran: it had tokens
                    else [number(None)] * 3
                ),
            )
        )
    header = ("block", "highest load at first", "at last", "lowest at last", "experts without a token")
    return folded("Loads in numbers", table("Load of the experts", header, rows))


def _loads(line: Mapping[str, Any]) -> np.ndarray:
    share = np.asarray(line["share"], float)
    return share * share.shape[1]


def _chosen(count: int) -> list[int]:
    return sorted({*np.linspace(0, count - 1, min(count, BLOCKS_SHOWN)).round().astype(int).tolist()})


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
