"""Picture files: their axes, and the metadata by which a command knows its own again."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from distillcache.schemas.store.whole_file import make_folder_of, writing

MADE_BY = "distillcache"
# By suffix, as matplotlib wants them; no dates: the same numbers are the same file.
METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": MADE_BY}, "png": {"Software": MADE_BY}}
# What the metadata looks like in a file, of either kind: the name alone is also in pictures of others, as a title.
MARKS = (f"<dc:title>{MADE_BY}</dc:title>".encode(), b"Software\x00" + MADE_BY.encode())


# Lines differ in dash and marker as well as in colour.
DASHES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1)), (0, (8, 3)))
MARKERS = "osD^vP"
RATIO = 20  # between the largest and the smallest value: beyond it an axis is logarithmic


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure of Matplotlib's as .svg or .png, by the path; the same numbers give the same file."""
    from matplotlib import rc_context

    kind = path.name.rpartition(".")[2] if "." in path.name else ""
    with rc_context({"svg.hashsalt": path.name}):
        make_folder_of(path)
        with writing(path, says=True) as file:
            figure.savefig(file, dpi=110, format=kind or None, metadata=METADATA.get(kind))


def spans_ratios(values: Float[np.ndarray, " n"]) -> bool:
    """Return whether the finite values are above zero and span more than a factor of `RATIO`."""
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > RATIO * values.min())


def scale_by_ratios(panel: Any) -> None:
    """Give a panel of Matplotlib's a logarithmic vertical axis, with labels at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def label_places(panel: Any, labels: Sequence[str], most: int, size: float) -> None:
    """Write words along a panel's x axis, at 0, 1, 2, ...: all of them, or every k-th where `most` are fewer.

    Words of more than two letters stand upright, in this size.
    """
    places = range(0, len(labels), max(1, -(-len(labels) // most)))
    words = [labels[at] for at in places]
    upright = {"rotation": 90, "fontsize": size} if any(len(each) > 2 for each in words) else {}
    panel.set_xticks(list(places), words, parse_math=False, **upright)  # a dollar sign is itself


def pooled(values: Float[np.ndarray, "rows columns"], most: int) -> Float[np.ndarray, "rows pooled"]:
    """Neighbouring columns joined by their maximum, down to `most` of them; NaN only where all are."""
    width = -(-values.shape[1] // most)
    if width == 1:
        return values
    filled = np.full((values.shape[0], -(-values.shape[1] // width) * width), -np.inf)
    filled[:, : values.shape[1]] = np.where(np.isnan(values), -np.inf, values)
    joined = filled.reshape(len(values), -1, width).max(axis=2)
    return np.where(np.isneginf(joined), np.nan, joined)


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Draw without Matplotlib's warnings of letters that its own font lacks: it only measures them, or draws a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield
