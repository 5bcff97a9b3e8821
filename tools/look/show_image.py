"""A row of a cache as a picture: documents and masks over norms and similarities, by token.

A tap of one or two slots, such as one block has, is drawn as lines; more slots are a heat map.
"""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from distillcache.schemas.store.whole_file import write_file
from distillcache.tools.look.row_facts import RowFacts, TapFacts, token_labels
from distillcache.tools.pages.pictures import (
    DASHES,
    MARKERS,
    METADATA,
    label_places,
    pooled,
    spans_ratios,
    without_glyph_warnings,
)

LABELLED_TOKENS = 90  # more would overlap
MARKED_TOKENS = 128  # of more a line has no markers: they would hide it
COLUMNS = 1000  # of a map: more tokens than points share one, which shows their largest norm or least cosine
INCHES = (14, 2.2)  # width, and height of a panel
LINES = 2  # slots of a tap, at most; more are a map
COLORS = ("#0b5cad", "#b3400f", "#0a7350", "#86358c")

Panel = tuple[float, Callable[[Any], None]]  # its height, and what draws it on axes


def draw(facts: RowFacts, path: str, block: int | None = None) -> None:
    """Write the picture in the format of the suffix.

    Args:
        block: the one that `facts` are of; None: all.

    Raises:
        StorageError: it cannot be written there.
    """
    from matplotlib import rc_context  # here, since it takes a while to import
    from matplotlib.figure import Figure

    # No dates and no random ids: the same row is the same picture.
    with rc_context({"svg.hashsalt": "row", "svg.fonttype": "none"}), without_glyph_warnings():
        figure = Figure(layout="constrained")
        panels = [(0.5, partial(_documents, facts)), *_lines(facts), *_maps(figure, facts)]
        heights = [height for height, _ in panels]
        figure.set_size_inches(INCHES[0], INCHES[1] * sum(heights) + 1)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        figure.suptitle(_title(facts, block))
        for panel, (_, draw_on) in zip(axes, panels, strict=True):
            draw_on(panel)
        axes[-1].set_xlim(-0.5, len(facts.token_texts) - 0.5)
        axes[-1].set_xlabel("token")
        label_places(axes[-1], token_labels(facts.token_texts, facts.real), LABELLED_TOKENS, 7)
        data = io.BytesIO()
        kind = path.rpartition(".")[2]
        figure.savefig(data, format=kind, dpi=110, metadata=METADATA[kind])
    write_file(path, data.getvalue(), says=True)


def _title(facts: RowFacts, block: int | None) -> str:
    """Title of the picture: what is drawn, of which row and block."""
    where = f"row {facts.number}" + ("" if block is None else f", block {block}")
    return (
        f"Norms and similarities of the tokens' vectors in {where} "
        f"({facts.row.split}, shard {facts.shard[1]} of segment {facts.shard[0]})"
    )


def _documents(facts: RowFacts, panel: Any) -> None:
    """A band for each document, numbered; beneath it what counts as a target."""
    for number, start, stop in facts.documents:
        color = ("#cfe0f3", "#f5d9b8")[number % 2]
        panel.axvspan(start - 0.5, stop - 0.5, ymin=0.5, color=color)
        panel.text((start + stop - 1) / 2, 0.75, str(number), ha="center", va="center", fontsize=8)
    counted = np.flatnonzero(facts.row.loss_mask)
    panel.bar(counted, 0.4, width=1.0, color="#4d7f57")
    panel.set_yticks([0.2, 0.75], ["targets", "documents"])
    panel.set_ylim(0, 1)


def _lines(facts: RowFacts) -> list[Panel]:
    """The panels of the taps that have few slots: their norms together, and how alike the stream's slots are."""
    few = [tap for tap in facts.taps if len(tap.slots) <= LINES]
    norms = {f"{tap.tap} {slot}": values for tap in few for slot, values in zip(tap.slots, tap.norm, strict=True)}
    alike = {
        f"slots {tap.slots[0]} and {tap.slots[1]}": tap.cosine[0]
        for tap in few
        if tap.tap == "resid" and len(tap.cosine)
    }
    panels: list[Panel] = [(1.4, partial(_draw_lines, facts, "norm of the token's vector", norms))] if norms else []
    return (
        [*panels, (1.0, partial(_draw_lines, facts, "cosine of the token's vectors in both slots of resid", alike))]
        if alike
        else panels
    )


def _draw_lines(facts: RowFacts, title: str, lines: dict[str, np.ndarray], panel: Any) -> None:
    real = facts.real
    for place, (name, values) in enumerate(lines.items()):
        at = place % len(COLORS)
        marker = MARKERS[at] if real.size <= MARKED_TOKENS else ""
        style = {"color": COLORS[at], "linestyle": DASHES[at], "marker": marker, "markersize": 4, "linewidth": 1.4}
        panel.plot(np.where(real, values, np.nan), label=name, **style)
    if spans_ratios(np.concatenate([values[real] for values in lines.values()])):
        panel.set_yscale("log")
    panel.grid(axis="y", linewidth=0.6, color="#d0d7de")
    panel.set_title(title, loc="left", fontsize=10)
    panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=3.5)


def _maps(figure: Any, facts: RowFacts) -> list[Panel]:
    """The panels of the taps that have many slots: a map of norms each, and of how alike the stream's slots are."""
    panels: list[Panel] = []
    for tap in (tap for tap in facts.taps if len(tap.slots) > LINES):
        panels.append((1.0, partial(_draw_map, figure, facts, tap, "norm of the token's vector", tap.norm)))
        if tap.tap == "resid":
            panels.append((1.0, partial(_draw_map, figure, facts, tap, "cosine to the next slot", tap.cosine)))
    return panels


def _draw_map(figure: Any, facts: RowFacts, tap: TapFacts, title: str, values: np.ndarray, panel: Any) -> None:
    """Norms by their logarithm, cosines as they are."""
    from matplotlib.colors import LogNorm, Normalize

    masked = np.where(facts.real[None, :], values, np.nan)
    is_norm = values is tap.norm
    shown = pooled(np.where(masked > 0, masked, np.nan), COLUMNS) if is_norm else -pooled(-masked, COLUMNS)
    seen = shown[np.isfinite(shown)]
    ratios = is_norm and len(seen) and seen.max() > seen.min()
    width = -(-masked.shape[1] // COLUMNS)
    image = panel.imshow(
        shown,
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        origin="lower",
        norm=LogNorm(seen.min(), seen.max()) if ratios else Normalize(),
        extent=(-0.5, shown.shape[1] * width - 0.5, -0.5, len(shown) - 0.5),
    )
    step = -(-len(values) // 8)
    places = range(0, len(values), step)
    panel.set_yticks(list(places), [str(tap.slots[at]) for at in places])
    panel.set_ylabel("slot")
    panel.set_title(f"{tap.tap}: {title}", loc="left", fontsize=10)
    figure.colorbar(image, ax=panel, pad=0.01)
