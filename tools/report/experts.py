"""A report's section about experts: how evenly they are loaded, over time and at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distillcache.schemas.counted import counted
from distillcache.tools.pages.figures import Figure, HeatMap, draw_maps, limits_of
from distillcache.tools.pages.html import figures, folded, number, paragraph, table
from distillcache.tools.report.curves import BlockCurves, block_curves, block_picture

BLOCKS_SHOWN = 3  # by expert and step, the least balanced; the others are in the figures over all blocks
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
            violation,
            "Max violation",
            "The fullest expert's load divided by the mean, minus one: 0 is balanced",
        ),
        _router_figure(entropy, "Router entropy", "Entropy of a token's probabilities over the experts, in nats"),
    ]
    if not loads:
        return [figures(drawn)]
    words = "Load is an expert's share of the tokens times the number of experts: 1 is balanced."
    return [paragraph(words), figures([*drawn, _last_figure(loads), _time_figure(loads)]), _table(loads)]


def _router_figure(found: BlockCurves | None, title: str, unit: str) -> Figure | None:
    """Draw a figure of routers by block and step; none of a single step."""
    if found is None or len(found.step) < 2:
        return None
    first, last = _mean(found.values[:, 0]), _mean(found.values[:, -1])
    words = f"mean over blocks {first:.4g} at first, {last:.4g} at last"
    kind, svg = block_picture(found, title.lower())
    return Figure(f"{title} by step", f"{unit}; {words}.", f"{kind} of the {title.lower()} by step: {words}.", svg)


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


def _time_figure(loads: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draw the experts of the least balanced blocks over time, on one scale of colours; none of a single look.

    A column is a look, whose step is written below it: steps between looks may differ.
    """
    blocks = _least_balanced(loads[-1])
    looks = [line for line in loads if {*blocks} <= {*line["blocks"]}]
    if len(looks) < 2:
        return None
    steps = [f"{line['step']:,}" for line in looks]
    values = [np.stack([_loads(line)[line["blocks"].index(block)] for line in looks], axis=1) for block in blocks]
    maps = [
        HeatMap(each, f"block {block}", "step of the look", "expert", "load", x_labels=steps)
        for block, each in zip(blocks, values, strict=True)
    ]
    limits = limits_of(maps)
    spans = "; ".join(
        f"block {block} from {each.min():.3g} to {each.max():.3g}" for block, each in zip(blocks, values, strict=True)
    )
    which = "every block" if len(blocks) == len(loads[-1]["blocks"]) else "the least balanced blocks"
    return Figure(
        title=f"Load of the experts over time in {which}",
        caption=f"{len(looks)} looks from step {steps[0]} to {steps[-1]}: {spans}.",
        alt=f"Heat maps of the load by expert and look from step {steps[0]} to {steps[-1]}: {spans}.",
        svg=draw_maps(maps, 1.9 if len(maps) > 1 else 2.6, limits),
    )


def _least_balanced(last: Mapping[str, Any]) -> list[int]:
    """The blocks whose fullest expert has most, ascending."""
    fullest = np.argsort(-_loads(last).max(axis=1), kind="stable")[:BLOCKS_SHOWN]
    return sorted(last["blocks"][place] for place in fullest)


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


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
