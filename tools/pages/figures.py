"""The figures of a report, as SVG that takes its colours from the page: lines over steps, values by block, heat maps.

They are as wide as a phone (360 points at a scale of one), so that their words stay readable there; a wide page sets
several side by side. Lines differ in dash and marker as well as in colour. matplotlib draws in colours that mean
nothing; they are replaced by the page's variables afterwards.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from distillcache.tools.pages.pictures import (
    DASHES,
    MARKERS,
    label_places,
    scale_by_ratios,
    spans_ratios,
    without_glyph_warnings,
)

WIDTH_IN = 5.0  # 360 points
LABELS = 24  # beside each other along the x axis, upright
LABEL_SIZE = 8.0
ROUND = [1, 2, 5, 10]  # times powers of ten: where an axis has ticks
DECADES = 3  # of an axis; a longer one has ticks at powers of ten alone
NAME_LETTERS = 24  # of a line's name: longer ones are listed one below the other
INK, SOFT, GRID = "#01a001", "#01a002", "#01a003"
SERIES = tuple(f"#01b00{number}" for number in range(1, 7))
VARIABLES = {INK: "--ink", SOFT: "--soft", GRID: "--line"} | {c: f"--s{n}" for n, c in enumerate(SERIES, 1)}
MARKED = 40  # points of a line that get markers, at most: more would hide it
MAP = "cividis"  # evenly bright steps, readable with any kind of colour sight
ID = "@id@"  # stands where a figure's own name belongs: ids inside two drawings must differ

RULES: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "distillcache",  # equal figures are equal bytes
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "grid.color": GRID,
}


@dataclass(frozen=True)
class Figure:
    """title: unique on its page. alt: for who cannot see it. svg: with `ID` in its ids."""

    title: str
    caption: str
    alt: str
    svg: str


@dataclass(frozen=True)
class Line:
    """low, high: the minimum and maximum of the values that each point averages. level: a value to compare with, the
    same everywhere, which has no markers.
    """

    name: str
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    low: Float[np.ndarray, " n"] | None = None
    high: Float[np.ndarray, " n"] | None = None
    level: bool = False


@dataclass(frozen=True)
class HeatMap:
    """values: NaN is left blank. left, right: of the x axis, where columns are not numbered 0, 1, ...

    row_labels: of the y axis, where rows are not numbered so. x_labels: words for 0, 1, ... of the x axis, of which as
    many are written as fit. log: colours by the logarithm.
    """

    values: Float[np.ndarray, "rows columns"]
    title: str
    x: str
    y: str
    unit: str
    left: float | None = None
    right: float | None = None
    row_labels: Sequence[int] | None = None
    x_labels: Sequence[str] | None = None
    log: bool = False
    marks: Sequence[float] = ()


def draw_lines(
    lines: Sequence[Line],
    x: str,
    y: str,
    *,
    points: bool = False,
    whole: bool = False,
    linear: bool = False,
    percent: bool = False,
    covers: Sequence[float] = (),
    lowest: float | None = None,
    x_labels: Sequence[str] | None = None,
) -> str:
    """Lines over a common axis; logarithmic where values span many ratios (`spans_ratios`), unless it is to be linear.

    Args:
        points: x is a place such as a block, so every point has a marker.
        whole: x has whole numbers alone.
        percent: y is a share, and its axis has percentages; linear.
        covers: values that the y axis shows in any case, such as 0.
        lowest: where the y axis ends; what lies below it leaves the picture.
        x_labels: words for 0, 1, ... of the x axis, of which as many are written as fit.
    """
    with rc_context(RULES):
        columns = 1 if any(len(line.name) > NAME_LETTERS for line in lines) else 2
        canvas = Canvas(figsize=(WIDTH_IN, 3.1 + 0.2 * -(-len(lines) // columns)), layout="constrained")
        axes = canvas.subplots()
        for place, line in enumerate(lines):
            _draw_line(axes, line, place % len(SERIES), points)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        elif not linear and spans_ratios(np.concatenate([line.y for line in lines])):
            _scale_by_ratios(axes)
        if covers:
            axes.update_datalim([(lines[0].x[0], value) for value in covers])
            axes.autoscale_view()
        if lowest is not None and axes.get_ylim()[0] < lowest:
            highest = max(*covers, *(np.nanmax(line.y) for line in lines))
            axes.set_ylim(lowest, highest + 0.05 * (highest - lowest))
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=ROUND))
        if x_labels is not None:
            label_places(axes, x_labels, LABELS, LABEL_SIZE)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="y", linewidth=0.6)
        if len(lines) > 1:
            canvas.legend(loc="outside lower center", ncols=columns, handlelength=3.5)
        return _svg(canvas)


def draw_maps(maps: Sequence[HeatMap], height_in: float = 2.2, limits: tuple[float, float] | None = None) -> str:
    """Heat maps one above the other, each with its scale of colours; an x axis that is the same is labelled once.

    Args:
        limits: the least and the greatest value of one scale of colours that all maps share.
    """
    with rc_context({**RULES, "axes.spines.top": True, "axes.spines.right": True}):
        canvas = Canvas(figsize=(WIDTH_IN, height_in * len(maps)), layout="constrained")
        panels = np.atleast_1d(np.asarray(canvas.subplots(len(maps)))).tolist()
        images = [_draw_map(axes, each, limits or limits_of([each])) for each, axes in zip(maps, panels, strict=True)]
        if len({(each.x, each.left, each.right, tuple(each.x_labels or ())) for each in maps}) == 1:
            for axes in panels:
                axes.label_outer()
        if limits is None:
            for each, axes, image in zip(maps, panels, images, strict=True):
                _draw_scale(canvas, image, [axes], each.unit)
        else:
            _draw_scale(canvas, images[-1], panels, maps[-1].unit)
        return _svg(canvas)


def limits_of(maps: Sequence[HeatMap]) -> tuple[float, float] | None:
    """Return the least and the greatest value that these maps show; None where they show none."""
    values = np.concatenate([each.values[np.isfinite(each.values)] for each in maps])
    values = values[values > 0] if any(each.log for each in maps) else values
    return (float(values.min()), float(values.max())) if len(values) else None


def _draw_line(axes: Axes, line: Line, place: int, points: bool) -> None:
    every = None if points else max(1, len(line.x) // 8)
    axes.plot(
        line.x,
        line.y,
        color=SERIES[place],
        linestyle=DASHES[place],
        linewidth=1.6,
        marker="" if line.level else MARKERS[place],
        markersize=4.5,
        markevery=every if len(line.x) > MARKED or not points else None,
        label=line.name,
    )
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=SERIES[place], alpha=0.18, linewidth=0)


def _draw_map(axes: Axes, each: HeatMap, limits: tuple[float, float] | None) -> AxesImage:
    rows, columns = each.values.shape
    left = -0.5 if each.left is None else each.left
    right = columns - 0.5 if each.right is None else each.right
    values = np.where(each.values > 0, each.values, np.nan) if each.log else each.values
    low, high = limits or (None, None)
    ratios = each.log and low is not None and high is not None and high > low > 0
    # "none": the numbers' own picture, a pixel each, which the reader's device enlarges.
    image = axes.imshow(
        np.ma.masked_invalid(values),
        aspect="auto",
        origin="lower",
        cmap=MAP,
        norm=LogNorm(low, high) if ratios else Normalize(low, high),
        interpolation="none",
        extent=(left, right, -0.5, rows - 0.5),
    )
    for mark in each.marks:
        axes.axvline(mark, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_title(each.title)
    axes.set_xlabel(each.x)
    axes.set_ylabel(each.y)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=ROUND))
    if each.x_labels is not None:
        label_places(axes, each.x_labels, LABELS, LABEL_SIZE)
    elif each.left is None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=ROUND))
    if each.row_labels is not None:
        places = range(0, rows, -(-rows // 7))
        axes.set_yticks(list(places), [str(each.row_labels[place]) for place in places])
    return image


def _draw_scale(canvas: Canvas, image: AxesImage, panels: list[Axes], unit: str) -> None:
    """The scale of an image's colours, beside these panels."""
    bar = canvas.colorbar(image, ax=panels, pad=0.02, aspect=20 * len(panels))
    bar.set_label(unit)
    norm = image.norm
    if isinstance(norm, LogNorm):
        ticks = _round_ticks(float(norm.vmin or 1), float(norm.vmax or 1))
        bar.set_ticks(ticks, labels=list(map(_spelled, ticks)), minor=False)
        bar.minorticks_off()
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # one small picture, not 256 shapes


def _scale_by_ratios(axes: Axes) -> None:
    """A logarithmic y axis with ticks that do not crowd."""
    scale_by_ratios(axes)
    low, high = axes.get_ylim()
    if np.log10(high / low) > DECADES:
        axes.yaxis.set_major_locator(LogLocator(numticks=8))


def _round_ticks(low: float, high: float) -> list[float]:
    """At most six ticks of a logarithmic scale: 1, 2 and 5 times powers of ten, or powers alone; a short one's ends."""
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    several = np.outer(powers, [1, 2, 5]).ravel()
    inside, whole = (each[(low <= each) & (each <= high)].tolist() for each in (several, powers))
    if len(inside) < 2:
        return [low, high]
    return inside if len(inside) <= 6 else whole[:: -(-len(whole) // 6)]


def _spelled(tick: float) -> str:
    """Two digits, and no power of ten where people need none."""
    return f"{tick:.0f}" if 100 <= tick < 100_000 else f"{tick:.2g}"


def _svg(canvas: Canvas) -> str:
    """The drawing alone, without the file's head and metadata, in the page's colours."""
    file = io.StringIO()
    with without_glyph_warnings():  # the page's own fonts draw the words
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", svg, flags=re.DOTALL)  # the style would be the whole page's
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{ID}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{ID}-", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
